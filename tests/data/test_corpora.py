"""What is read from each raw corpus, and what is said when it cannot be."""

import pickle
from pathlib import Path

import numpy as np
import pytest
import soundfile

from trainer.data.corpora import festvox_ru
from trainer.data.corpora.base import split_by_text
from trainer.data.corpora.festvox_ru import FestvoxRuConfig
from trainer.data.corpora.manifest import ManifestConfig
from trainer.data.corpora.tones import TonesConfig
from trainer.errors import UserError


def no_progress(what: str, done: int, total: int) -> None:
    pass


def test_split_is_the_documented_one() -> None:
    splits = [split_by_text(f"sentence {n}") for n in range(2000)]
    assert [splits.count(s) / 2000 for s in ("train", "valid", "test")] == pytest.approx([0.85, 0.05, 0.10], abs=0.02)
    assert [split_by_text(text) for text in ("", "a", "да")] == ["train", "train", "train"]


# --- tones ---------------------------------------------------------------------------------------


def test_tones_are_a_function_of_seed_and_number(tmp_path: Path) -> None:
    first = TonesConfig(num_utterances=6).utterances(tmp_path, no_progress)
    more = TonesConfig(num_utterances=9).utterances(tmp_path, no_progress)
    other = TonesConfig(num_utterances=6, seed=1).utterances(tmp_path, no_progress)
    assert first == more[:6]
    assert [u.text for u in first] != [u.text for u in other]
    for utterance in pickle.loads(pickle.dumps(first)):
        assert not isinstance(utterance.audio, Path)
        samples, rate = utterance.audio()
        assert np.array_equal(samples, utterance.audio()[0])
        assert 1 <= len(samples) / rate <= 4
        assert 0.05 < np.abs(samples).max() < 1
        words = utterance.text.split(" ")
        assert 2 <= len(words) <= 5
        assert all(2 <= len(word) <= 5 and set(word) <= set("abcdefgh") for word in words)


def test_tones_refuse_a_letter_given_twice() -> None:
    with pytest.raises(ValueError, match="each letter once"):
        TonesConfig(alphabet="abca")


# --- festvox-ru ----------------------------------------------------------------------------------

SENTENCES = ["Она завела, прядь волнистых вол+ос за ухо.", '+Окна домов, - +"дома".', "Да?"]


def make_voice(root: Path) -> Path:
    """The package's tree in miniature."""
    voice = root / "usr/share/festival/voices/russian/msu_ru_nsh_clunits"
    (voice / "wav").mkdir(parents=True)
    (voice / "etc").mkdir()
    lines = [f'( ru_{n:04d} "{text}" )\n' for n, text in enumerate(SENTENCES, 1)]
    (voice / "etc/txt.done.data").write_text("".join(lines), encoding="utf-8")
    for n in range(1, len(lines) + 1):
        soundfile.write(voice / f"wav/ru_{n:04d}.wav", np.zeros(1600, np.int16), 16000)
    return voice


@pytest.mark.parametrize("below", ["", "usr/share/festival/voices/russian/msu_ru_nsh_clunits"])
def test_festvox_is_read_from_an_unpacked_voice(tmp_path: Path, below: str) -> None:
    voice = make_voice(tmp_path / "voice")
    found = FestvoxRuConfig(path=tmp_path / "voice" / below).utterances(tmp_path / "data", no_progress)
    assert [u.key for u in found] == ["ru_0001", "ru_0002", "ru_0003"]
    assert [u.text for u in found] == [s.replace("+", "") for s in SENTENCES]
    assert found[1].audio == voice / "wav/ru_0002.wav"
    assert found[1].where.endswith("etc/txt.done.data line 2")
    assert {u.split for u in found} == {None}


def test_festvox_is_read_as_phones(tmp_path: Path) -> None:
    voice = make_voice(tmp_path)
    (voice / "lab").mkdir()
    for n, phones in enumerate(("pau d aa pau", "nn ee t", "oo k n pau a"), 1):
        lines = [f"{0.1 * i:.5f} 125 {phone}\n" for i, phone in enumerate(phones.split(), 1)]
        (voice / f"lab/ru_{n:04d}.lab").write_text("#\n" + "".join(lines))
    found = FestvoxRuConfig(path=tmp_path, labels="phones").utterances(tmp_path / "data", no_progress)
    assert [u.text for u in found] == ["d aa", "nn ee t", "oo k n a"]

    with (voice / "lab/ru_0002.lab").open("a") as file:
        file.write("0.4 oo\n")
    with pytest.raises(UserError, match=r"ru_0002\.lab line 5: '0.4 oo': wanted END COLOUR PHONE; mend the line"):
        FestvoxRuConfig(path=tmp_path, labels="phones").utterances(tmp_path / "data", no_progress)


def test_festvox_names_bad_lines(tmp_path: Path) -> None:
    voice = make_voice(tmp_path)
    (voice / "wav/ru_0002.wav").unlink()
    with (voice / "etc/txt.done.data").open("a", encoding="utf-8") as file:
        file.write("ru_0004 nothing\n")
    with pytest.raises(UserError) as caught:
        FestvoxRuConfig(path=tmp_path).utterances(tmp_path / "data", no_progress)
    first, second = str(caught.value).splitlines()
    assert "line 2: key ru_0002" in first
    assert "no such file" in first
    assert "line 4: 'ru_0004 nothing'" in second


def test_festvox_without_apt_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError) as caught:
        FestvoxRuConfig().utterances(tmp_path / "data", no_progress)
    for part in (
        "no apt-get",
        "festvox-ru_0.5+dfsg-6_all.deb",
        festvox_ru.PACKAGE.sha256,
        "data/raw",
        "run the command again",
    ):
        assert part in str(caught.value)

    make_voice(tmp_path / "data/raw/festvox-ru")  # what it told us to do
    assert len(FestvoxRuConfig().utterances(tmp_path / "data", no_progress)) == 3


def test_festvox_says_why_apt_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("apt-get", "apt-cache"):
        stub = tmp_path / "bin" / name
        stub.parent.mkdir(exist_ok=True)
        stub.write_text("#!/bin/sh\necho 'E: the moon is in the way' >&2\nexit 100\n")
        stub.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}")
    with pytest.raises(UserError, match=r"the moon is in the way\n.*\n.*data/raw"):
        FestvoxRuConfig().utterances(tmp_path / "data", no_progress)
    assert not list((tmp_path / "data/raw").iterdir()), "nothing is left of the attempt"


def test_festvox_uses_an_archive_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_voice(tmp_path / "package")
    stub = tmp_path / "bin/dpkg"
    stub.parent.mkdir()
    stub.write_text('#!/bin/sh\nPATH=/bin:/usr/bin\nmkdir -p "$3" && cp -r ' + f'{tmp_path}/package/usr "$3"\n')
    stub.chmod(0o755)
    monkeypatch.setenv("PATH", str(stub.parent))
    archive = tmp_path / "data/raw/festvox-ru_0.5+dfsg-6_all.deb"
    archive.parent.mkdir(parents=True)
    archive.write_bytes(b"cut short")
    with pytest.raises(UserError, match=r"SHA-256 .*, wanted 21ef3f0f.*delete it"):
        FestvoxRuConfig().utterances(tmp_path / "data", no_progress)

    archive.rename(archive.with_name("festvox-ru_0.6-1_all.deb"))  # a version that nobody knows the checksum of
    assert len(FestvoxRuConfig().utterances(tmp_path / "data", no_progress)) == 3


# --- manifests -----------------------------------------------------------------------------------


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    (tmp_path / "clips").mkdir()
    for name in ("a.wav", "b.c.wav"):
        soundfile.write(tmp_path / "clips" / name, np.zeros(800, np.int16), 8000)
    return tmp_path


def test_manifests_of_both_forms_say_the_same(clips: Path) -> None:
    (clips / "x.jsonl").write_text(
        '{"audio": "clips/a.wav", "text": "hello, you", "split": "test"}\n\n'
        '{"audio_filepath": "clips/b.c.wav", "text": "Да", "key": "k.1/2", "duration": 0.1}\n',
        encoding="utf-8",
    )
    (clips / "x.csv").write_text(
        'audio,text,split,key\nclips/a.wav,"hello, you",test,\nclips/b.c.wav,Да,,k.1/2\n', encoding="utf-8"
    )
    read = [ManifestConfig(files=(clips / n,)).utterances(clips, no_progress) for n in ("x.jsonl", "x.csv")]
    for first, second in read:
        assert (first.key, first.text, first.split) == ("clips_a", "hello, you", "test")
        assert (second.key, second.text, second.split) == ("k_1_2", "Да", None)
        assert second.audio == clips / "clips/b.c.wav"
    assert read[0][1].where.endswith("x.jsonl line 3")


BAD_LINES = {
    "not json": ("{'audio'", "is not JSON"),
    "not an object": ("[1]", "is not an object"),
    "no audio": ('{"text": "a"}', "audio: is missing; add"),
    "no text": ('{"audio": "clips/a.wav", "key": "K"}', "key K: text: is missing; add"),
    "empty text": ('{"audio": "clips/a.wav", "key": "K", "text": " "}', "key K: text = ' ': is empty; write"),
    "no file": ('{"audio": "clips/z.wav", "text": "a"}', "key clips_z: audio = 'clips/z.wav': there is no such file"),
    "split": ('{"audio": "clips/a.wav", "text": "a", "split": "dev"}', "split = 'dev': wanted one of train, valid"),
    "offset": ('{"audio": "clips/a.wav", "text": "a", "offset": -1.5}', "offset = -1.5: wanted seconds"),
    "duration": ('{"audio": "clips/a.wav", "text": "a", "offset": 0, "duration": 0}', "duration = 0: wanted seconds"),
    "time": ('{"audio": "clips/a.wav", "text": "a", "offset": "1:20"}', "offset = '1:20': wanted seconds"),
    "number": ('{"audio": "clips/a.wav", "text": 5, "key": "K"}', "key K: text = 5: is not text; write it in quotes"),
    "list": ('{"audio": "clips/a.wav", "text": ["a"], "key": "K"}', "text = ['a']: is not text"),
    "false": ('{"audio": "clips/a.wav", "text": false, "key": "K"}', "text = False: is not text"),
    "audio as a list": ('{"audio": ["clips/a.wav"], "text": "a"}', "audio = ['clips/a.wav']: is not text"),
    "field twice": ('{"audio": "clips/a.wav", "text": "a", "text": "b"}', "the field 'text' is given twice"),
    "half a character": ('{"audio": "clips/a.wav", "text": "a\\ud800"}', r"holds '\ud800', which is no character"),
    "control character": ('{"audio": "clips/a.wav", "text": "a\\u0000"}', r"holds '\x00', which is no character"),
    "deep": ("[" * 100_000, "is not JSON"),
    "no path": ('{"audio": "a\\u0000\\ud800", "text": "a"}', "there is no such file"),
    "twice": ('{"audio": "clips/b.c.wav", "text": "a", "key": "first"}', "key = 'first': is that of"),
}


@pytest.mark.parametrize("name", [*BAD_LINES, "all"])
def test_manifest_names_its_bad_lines(clips: Path, name: str) -> None:
    bad = list(BAD_LINES.values()) if name == "all" else [BAD_LINES[name]]
    lines = ['{"audio": "clips/a.wav", "text": "good", "key": "first"}', *(line for line, _ in bad)]
    (clips / "x.jsonl").write_text("\n".join(lines), encoding="utf-8")
    with pytest.raises(UserError) as caught:
        ManifestConfig(files=(clips / "x.jsonl",)).utterances(clips, no_progress)
    shown = str(caught.value).splitlines()
    assert len(shown) == len(bad)
    for number, (line, (_, part)) in enumerate(zip(shown, bad, strict=True), 2):
        assert f"x.jsonl line {number}: " in line
        assert part in line


BAD_TABLES = {
    "quote": ('audio,text\nclips/a.wav,"open\nclips/b.c.wav,b\n', "x.csv line 2: cannot be read as a row"),
    "quote inside": ('audio,text\nclips/a.wav,a\n\nclips/b.c.wav,"b" c\n', "is a quote open that should be closed?"),
    "huge": (f"audio,text\nclips/a.wav,{'a' * 140_000}\n", "x.csv line 2: cannot be read as a row (field larger"),
    "comma": ("audio,text\nclips/a.wav,hello, you\n", "x.csv line 2: has 3 fields, the heading 2; put a field"),
    "control character": ("audio,text\nclips/a.wav,a\0b\n", "x.csv line 2: "),
    "semicolons": (
        "audio;text\nclips/a.wav;a\n",
        "x.csv line 1: the heading names 'audio;text': wanted audio and text",
    ),
    "no heading": ("clips/a.wav,a\nclips/b.c.wav,b\n", "x.csv line 1: the heading names 'clips/a.wav', 'a'"),
    "column twice": ("audio,text,text\nclips/a.wav,a,b\n", "each once"),
    "empty": ("", "x.csv line 1: the heading names nothing"),
    "after two lines in one": (
        'audio,text\nclips/a.wav,"a\nb"\n\nclips/z.wav,b\n',
        "x.csv line 5: key clips_z: audio = 'clips/z.wav': there is no such file",
    ),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_table_names_its_bad_rows(clips: Path, name: str) -> None:
    text, wanted = BAD_TABLES[name]
    (clips / "x.csv").write_text(text, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        ManifestConfig(files=(clips / "x.csv",)).utterances(clips, no_progress)
    shown = str(caught.value).splitlines()
    assert len(shown) == 1, shown
    assert wanted in shown[0]


def test_manifest_without_files_says_what_to_set(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.corpus\.files = \[\]: .*name your manifests"):
        ManifestConfig().utterances(tmp_path, no_progress)
    with pytest.raises(UserError, match=r"gone\.jsonl: there is no such file; mend the path"):
        ManifestConfig(files=(tmp_path / "gone.jsonl",)).utterances(tmp_path, no_progress)
    (tmp_path / "x.txt").write_text("")
    with pytest.raises(UserError, match=r"ending '\.txt', wanted \.jsonl"):
        ManifestConfig(files=(tmp_path / "x.txt",)).utterances(tmp_path, no_progress)
