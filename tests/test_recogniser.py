"""A recogniser hears the same however sound comes: at once, in pieces, by a pipe, at another rate, in long files."""

import hashlib
import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
import torchaudio

import trainer
from tests.helpers import overrides, spoil
from trainer import config as configuration
from trainer import recipe, recogniser, sounds
from trainer.__main__ import main, run
from trainer.data.audio import FeaturesConfig
from trainer.data.text import Characters, label_of_space
from trainer.decoding import alignment, greedy
from trainer.decoding.ngram import estimate
from trainer.engine import initialise
from trainer.errors import UserError
from trainer.models.acoustic import AcousticConfig, AcousticModel
from trainer.models.rnn import RNNConfig
from trainer.recogniser import Hypothesis, Recogniser

LETTERS = " abcdefgh"


def sound(seconds: float, rate: int = 16000) -> np.ndarray:
    generator = np.random.default_rng(0)
    t = np.arange(int(seconds * rate)) / rate
    return (0.3 * np.sin(2e3 * t * (1 + 0.3 * np.sin(3 * t))) + 0.02 * generator.standard_normal(len(t))).astype("f4")


def build(directions: str = "forward", decoder=None, **features: object) -> Recogniser:
    config = AcousticConfig(
        rnn=RNNConfig(hidden_size=12, num_layers=2, directions=directions),
        lookahead_frames=2 if directions == "forward" else 0,
    )
    model = AcousticModel(config, FeaturesConfig(num_bands=20, **features).build(16000), len(LETTERS) + 1)
    initialise(model, 0)
    torch.nn.init.normal_(model.output.weight, std=3.0, generator=torch.Generator().manual_seed(1))  # not one letter
    return Recogniser(model, Characters(LETTERS), 16000, decoder)


def best_path(log_probs: torch.Tensor) -> str:
    path = torch.unique_consecutive(log_probs.argmax(-1)).tolist()
    return Characters(LETTERS).decode([label for label in path if label])


@pytest.mark.parametrize("directions", ["forward", "sum"])
def test_a_long_file_in_pieces_has_the_probabilities_of_the_whole(directions, monkeypatch) -> None:
    monkeypatch.setattr(recogniser, "WINDOW_SECONDS", 4.0)
    made, wave = build(directions), sound(14.3)
    want = made.log_probs(wave)
    parts = list(made.pieces(sounds.of_samples(torch.from_numpy(wave), 16000, 16000)))
    assert len(parts) >= 3
    # Windows are joined where what lies further away than a margin hardly counts; nothing else is an approximation.
    torch.testing.assert_close(torch.cat(parts), want, rtol=0, atol=0.05 if directions == "sum" else 1e-4)
    assert made.transcribe(wave) == best_path(want)
    assert len(best_path(want)) > 10


@pytest.mark.parametrize("size", [97, 1280, 40000])
def test_a_stream_ends_with_the_text_of_the_whole(size: int) -> None:
    made, wave = build(), sound(5)
    stream = made.stream()
    texts = [stream.push(wave[i : i + size]) for i in range(0, len(wave), size)]
    assert stream.finish() == made.transcribe(wave) == best_path(made.log_probs(wave))
    assert texts == sorted(texts, key=len)
    assert stream.seconds == pytest.approx(5)
    assert 0.1 < stream.behind_seconds + 0.2 < 0.4  # nothing is left but what no window holds
    as_integers = made.stream()
    as_integers.push((wave * 32768).astype(np.int16))
    assert as_integers.finish()


def test_a_mean_over_the_clip_does_not_stream() -> None:
    made, wave = build(clip_mean=True), sound(2)
    with pytest.raises(UserError, match=r"data\.features\.clip_mean = true"):
        made.stream()
    parts = list(made.pieces(sounds.of_samples(torch.from_numpy(wave), 16000, 16000)))
    torch.testing.assert_close(torch.cat(parts), made.log_probs(wave))


def test_a_decoder_has_the_last_word_at_each_pause() -> None:
    given: list[int] = []

    def decoder(log_probs, lengths):
        given.append(int(lengths[0]))
        return [[9]]

    heard = Hypothesis(decoder, 0.04)
    spoken, silent = torch.eye(10)[[1, 1, 0, 2]], torch.eye(10)[[0] * 25]
    for part in (spoken[:3], spoken[3:], silent, spoken):
        heard.push(part)
    assert heard.labels == [9, 1, 2]  # final, and still to come
    heard.finish()
    assert heard.labels == [9, 9]
    assert given == [24, 9]
    for _ in range(40):
        heard.push(torch.eye(10)[[1, 2] * 25])  # no pause, no blank: cut all the same
    assert max(given) <= 2 * recogniser.LONGEST_SECONDS / 0.04
    assert heard.first_frame == 0


def test_words_have_their_times_in_the_whole_recording() -> None:
    made, wave = build(), sound(5)
    made.tokens = Characters("abcd efgh")  # what it says most often is a space
    stream = made.stream(timed=True)
    for part in np.array_split(wave, 40):
        stream.push(part)
    text, log_probs = stream.finish(), made.log_probs(wave)
    labels = made.tokens.encode(text)
    assert stream.words == made.words(wave) == alignment.words(log_probs, labels, made.tokens, made.frame_seconds)
    assert [word.word for word in stream.words] == text.split()
    assert len(stream.words) > 3
    assert made.stream().words == []


@pytest.mark.parametrize("decoder", [None, greedy])
def test_words_have_their_times_where_the_text_is_decoded_in_parts(decoder) -> None:
    letters = Characters(LETTERS)
    heard = Hypothesis(decoder, 0.04, label_of_space(letters), timed=True)
    for part in ("ab.c", "." * 25, "d.d", ".", " e"):
        heard._longest = 3 if "a" in part else 999  # cut at the first dot, within a word; then a pause
        path = [0 if c == "." else letters.encode(c)[0] for c in part]
        heard.push((0.9 * torch.eye(len(letters))[path] + 0.01).log())
    assert [word.word for word in heard.words(letters)] == ["abc"]  # the rest may still change
    heard.finish()
    found = [(w.word, round(w.start / 0.04), round(w.end / 0.04), w.confidence) for w in heard.words(letters)]
    assert found == [("abc", 0, 4, 0.91), ("dd", 29, 32, 0.91), ("e", 34, 35, 0.91)]


@pytest.mark.parametrize("pause", [True, False])
@pytest.mark.parametrize("parts", [("ab", "cd"), ("ab ", "cd"), ("ab", " cd"), (" ab ", " ", " cd ")])
def test_words_stay_apart_where_the_text_is_decoded_in_parts(parts, pause: bool, monkeypatch) -> None:
    """At a pause always, else where the best path says so, though a search leaves spaces out at its ends."""
    monkeypatch.setattr(recogniser, "LONGEST_SECONDS", 30.0 if pause else 0.08)
    letters = Characters(LETTERS)

    def search(log_probs, lengths):
        return [letters.encode(letters.decode(labels).strip()) for labels in greedy(log_probs, lengths)]

    wanted = "ab cd" if pause or " " in "".join(parts) else "abcd"
    for decoder in (search, None):
        heard = Hypothesis(decoder, 0.04, label_of_space(letters))
        for part in (*parts, " e"):
            heard.push(torch.eye(len(letters))[letters.encode(part) + [0] * (25 if pause else 1)])
        shown = letters.decode(heard.labels)  # still to come, but for a pause
        heard.finish()
        text = letters.decode(heard.labels)
        assert shown.split() == text.split()
        assert (text if decoder else " ".join(text.split())) == f"{wanted} e"


@pytest.mark.parametrize(("rate", "wanted"), [(8000, 16000), (44100, 16000), (48000, 8000), (11025, 16000)])
def test_a_rate_is_converted_in_pieces_as_at_once(rate: int, wanted: int) -> None:
    wave = torch.from_numpy(sound(1.3, rate))
    want = torchaudio.functional.resample(wave, rate, wanted)
    for size in (50, 999, 20000):
        resampler = sounds.Resampler(rate, wanted)
        parts = [resampler.push(piece) for piece in wave.split(size)] + [resampler.push(wave[:0], last=True)]
        torch.testing.assert_close(torch.cat(parts), want, rtol=0, atol=1e-6)
        assert len(resampler._waiting) < 3 * 48000 / 100 + size


@pytest.fixture
def exported(tmp_path, corpus):
    """What `export` writes, of a model that was not trained."""
    more = ["model.rnn.directions=forward", "model.lookahead_frames=2", "data.path=nowhere"]
    made = recipe.load("speech/tones", overrides(corpus, tmp_path))
    model = recipe.load("speech/tones", [*overrides(corpus, tmp_path), *more[:2]]).build_model()
    initialise(model, 3)
    folder = tmp_path / "exported"
    folder.mkdir()
    torch.save(model.state_dict(), folder / "weights.pt")
    plain = configuration.plain(recipe.load("speech/tones", [*overrides(corpus, tmp_path), *more]).config)
    (folder / "config.yaml").write_text(configuration.dump_yaml(plain))
    digest = hashlib.sha256((folder / "weights.pt").read_bytes()).hexdigest()
    (folder / "export.json").write_text(json.dumps({"labels": {"alphabet": made.tokens.identity}, "sha256": digest}))
    return folder


def test_files_and_pipes_say_the_same_without_the_corpus(exported, tmp_path, capsys) -> None:
    wave = sound(2.2)
    soundfile.write(tmp_path / "a.wav", wave, 16000, subtype="PCM_16")
    soundfile.write(tmp_path / "two.flac", np.stack([wave, wave], 1), 16000, subtype="PCM_16")
    soundfile.write(tmp_path / "high.wav", torchaudio.functional.resample(torch.from_numpy(wave), 16000, 48000), 48000)
    want = trainer.load(exported).transcribe(tmp_path / "a.wav")
    names = [str(tmp_path / name) for name in ("a.wav", "two.flac")]
    assert main(["transcribe", str(exported), *names, "--final"]) == 0
    told = capsys.readouterr()
    assert told.out.splitlines() == [f"{name}: {want}" for name in names]
    assert "real-time factor" in told.err
    assert main(["transcribe", str(exported), names[0], "--final", "--words"]) == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first == f"{names[0]}: {want}"
    words = trainer.load(exported).words(names[0])
    assert [line.split() for line in lines] == [
        [f"{w.start:.2f}", f"{w.end:.2f}", f"{w.confidence:.2f}", w.word] for w in words
    ]
    assert len(words) == len(want.split()) > 0
    assert main(["transcribe", str(exported), str(tmp_path / "high.wav"), "--chunk-ms", "200"]) == 0
    assert " s behind " in capsys.readouterr().out
    raw = (wave * 32768).round().clip(-32768, 32767).astype("<i2").tobytes()
    for content in ((tmp_path / "a.wav").read_bytes(), raw):
        blocks = sounds.of_stream(io.BufferedReader(io.BytesIO(content)), 16000, 0.1, None)
        stream = trainer.load(exported).stream()
        for block in blocks:
            stream.push(block)
        assert stream.finish() == want


def test_a_beam_search_needs_no_corpus_where_its_ngram_is_a_file(exported, tmp_path) -> None:
    path = tmp_path / "letters.arpa"
    estimate([list("abcabc"), list("cab")], 2, vocabulary=Characters(LETTERS).names[1:]).write(path)
    file = f"decoder.language_model={{kind: ngram, path: {path}}}"
    made = trainer.load(exported, "decoder.kind=beam", "decoder.weight=2", file)
    wave = sound(2.2)
    (want,) = made.decoder(made.log_probs(wave)[None], torch.tensor([len(made.log_probs(wave))]))
    assert made.transcribe(wave) == Characters(LETTERS).decode(want) != trainer.load(exported).transcribe(wave)
    with pytest.raises(UserError, match="nowhere"):
        trainer.load(exported, "decoder.kind=beam")


def test_what_cannot_be_heard_is_the_users_to_mend(exported, tmp_path, monkeypatch, capsys) -> None:
    (tmp_path / "text.wav").write_text("no sound")
    monkeypatch.setitem(sys.modules, "sounddevice", None)
    wave = sound(0.5)
    wave[7000] = np.nan
    soundfile.write(tmp_path / "nan.wav", wave, 16000, subtype="FLOAT")
    with pytest.raises(ValueError, match="no finite numbers"):
        build().transcribe(wave)
    for arguments, told in (
        ([str(tmp_path / "text.wav")], "is no sound"),
        ([str(tmp_path / "absent.wav")], "there is no such file"),
        (["microphone"], "pip install 'ostinato\\[microphone\\]'"),
        ([str(tmp_path / "nan.wav")], r"nan\.wav: holds samples that are no finite numbers"),
        (["x.wav", "--chunk-ms", "0"], "--chunk-ms"),
        (["x.wav", "--chunk-ms", "nan"], "--chunk-ms nan: wanted more than 0"),
        (["x.wav", "model.rnn.num_layers=1"], r"model\.rnn\.num_layers = 1: the run was trained with 2"),
        (["x.wav", "data.features.hop_ms=20"], r"data\.features\.hop_ms = 20\.0: the run was trained with 10\.0"),
        (["x.wav", "data.sample_rate_hz=8000"], r"data\.sample_rate_hz = 8000: the run was trained with 16000"),
        (["x.wav", "datta.path=x"], "datta: unknown key; did you mean data"),
    ):
        with pytest.raises(UserError, match=told):
            run("transcribe", [str(exported), *arguments])
    for name in ("x" * 5000, "a\0b"):
        with pytest.raises(UserError, match="is not a run directory"):
            trainer.load(name)
    with pytest.raises(UserError, match=r"model\.rnn\.directions = sum"):
        build("sum").stream()
    text = (exported / "config.yaml").read_text().replace("recipe: speech", "recipe: copying")
    (exported / "config.yaml").write_text(text)
    assert main(["transcribe", str(exported), "x.wav"]) == 2


@pytest.mark.parametrize("start", [b"fLaC", b"OggS", b"ID3", b"RF64"], ids=bytes.decode)
def test_files_that_are_no_samples_are_not_heard_as_noise(start: bytes) -> None:
    pipe = io.BufferedReader(io.BytesIO(start + bytes(2000)))
    with pytest.raises(UserError, match=r"standard input: is .*, not samples"):
        list(sounds.of_stream(pipe, 16000, 0.1, None))


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1\n", None], ids=str)
def test_weights_that_are_not_those_of_the_export_are_refused(exported, content: bytes | None) -> None:
    path = exported / "weights.pt"
    if content is None:  # others, whole
        weights = torch.load(path)
        torch.save({name: 0 * value for name, value in weights.items()}, path)
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"weights\.pt, [\d,]+ bytes, has another SHA-256"):
        trainer.load(exported)


def test_a_damaged_clip_costs_only_itself_where_errors_are_counted(corpus, tmp_path, caplog) -> None:
    data = shutil.copytree(corpus, tmp_path / "data")
    task = recipe.load("speech/tones", overrides(data, tmp_path))
    whole = task.utterances("test", 50)
    (key,) = spoil(data / "test", 1)
    assert [text for _, text in task.utterances("test", 50)] == [text for _, text in whole[1:]]
    assert f"{key} (test) is left out" in caplog.text


def test_standard_input_of_a_process(exported) -> None:
    code = f"import sys; from trainer.__main__ import main; sys.exit(main(['transcribe', {str(exported)!r}, '-']))"
    raw = (sound(1.0) * 32768).astype("<i2").tobytes()
    done = subprocess.run([sys.executable, "-c", code], input=raw, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().splitlines()[-1].startswith("-: ")
