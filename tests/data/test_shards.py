"""Shards that others made are indexed, checked, counted, listened to and trained on, whatever was done to them."""

import io
import json
import random
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

from tests.helpers import overrides
from trainer import preview, recipe
from trainer.__main__ import main
from trainer.config import PROJECT
from trainer.data import shards
from trainer.data.audio import FeaturesConfig
from trainer.data.buckets import BucketedConfig
from trainer.data.corpora.base import read_text
from trainer.data.corpora.manifest import ManifestConfig
from trainer.data.examine import read_sound
from trainer.data.index import Index, index_path
from trainer.data.lint import collect, lint
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared, SpeechDataConfig
from trainer.data.remote import RemoteConfig
from trainer.data.shards import make_indexes
from trainer.data.speech import SpeechDataset
from trainer.data.tars import read_contents, transcript
from trainer.data.text import PhonesConfig, SubwordsConfig, TextConfig
from trainer.errors import UserError
from trainer.run import append, read_quarantine

RATE = 8000
FORMATS = ("flac", "wav", "mp3", "ogg")
EVIL = "<script>alert(1)</script>"
WORDS = ("Yes", "no", "STOP", "go on", "not", "sent", "so", "ten")
"""The letters of the last four, which valid and test hold, are those of the first."""


def wave(number: int, seconds: float = 0.5, rate: int = RATE) -> np.ndarray[Any, Any]:
    """Noise that is another for each number."""
    return np.random.default_rng(number).uniform(-0.3, 0.3, int(seconds * rate)).astype(np.float32)


def encode(samples: np.ndarray[Any, Any], kind: str = "flac", rate: int = RATE, subtype: str | None = None) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind.upper(), subtype=subtype)
    return stream.getvalue()


Members = list[tuple[str, bytes]]


def sample(number: int, key: str = "", kind: str = "flac", text: str | None = None) -> Members:
    key = key or f"s{number:03d}"
    text = WORDS[number % len(WORDS)] if text is None else text
    audio = encode(wave(number), kind)
    if number % 2:
        return [(f"{key}.{kind}", audio), (f"{key}.json", json.dumps({"id": number, "text": text}).encode())]
    return [(f"{key}.txt", f"{text}\n".encode()), (f"{key}.{kind}", audio)]


def write_tar(path: Path, members: Members) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def foreign(folder: Path, start: int = 0) -> Path:
    """Tars of two samples for each split, as others name them."""
    for number, name in enumerate(["train-0", "train-1", "dev-clean-0", "test_0"]):
        members = [m for n in range(2) for m in sample(2 * number + n + start, kind=FORMATS[(number + n) % 4])]
        write_tar(folder / f"{name}.tar", members)
    return folder


CONFIG = SpeechDataConfig(sample_rate_hz=RATE)


def check(path: Path, config: SpeechDataConfig = CONFIG) -> list[tuple[str, str, str]]:
    """(check, key, detail) of what `lint` finds."""
    found, _ = lint(path, config, (0.1, 10.0), lambda frames: frames // 4)
    return [(f.problem.check, f.problem.key, f.problem.detail) for f in found]


# --- index -----------------------------------------------------------------------------------------------------------


def test_the_index_of_our_own_shards_is_the_one_that_prepare_wrote(tmp_path: Path, corpus: Path) -> None:
    """Offsets, lengths, checksums and band statistics, to the last bit."""
    copy = shutil.copytree(corpus, tmp_path / "copy", ignore=shutil.ignore_patterns("*.jsonl", "corpus.json", ".*"))
    task = recipe.load("speech/tones", overrides(copy, tmp_path))
    make_indexes(copy, None, task.config.data)
    for index in corpus.rglob("*.index.jsonl"):
        assert (copy / index.relative_to(corpus)).read_bytes() == index.read_bytes()
    made, wanted = Prepared.load(copy), Prepared.load(corpus)
    assert made == wanted.model_copy(update={"corpus": "shards"})


@pytest.mark.parametrize("into", [None, "elsewhere"])
def test_training_runs_on_foreign_shards(tmp_path: Path, into: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    """Four formats, two kinds of text, names that say the split: the labels are those of the sound."""
    folder = foreign(tmp_path / "given")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    arguments = ["data.features.num_bands=20", *(["--into", str(tmp_path / into)] if into else [])]
    assert main(["shards", "index", str(folder), *arguments]) == 0
    root = tmp_path / into if into else folder
    assert "data.sample_rate_hz=8000" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix == ".tar"} == before
    if into:
        assert {p.name for p in folder.iterdir()} == set(before), "nothing is written where the shards are"
    more = ["data.sample_rate_hz=8000", "data.augment.speeds=[1.0]", "plan.micro_batch_seconds=2"]
    task = recipe.load("speech/tones", overrides(root, tmp_path, *more))
    seen = {}
    for split in ("train", "valid", "test"):
        dataset = task.build_dataset(split)
        for step in dataset.plan.epoch(0):
            for micro_batch in step.micro_batches:
                batch = dataset.load(micro_batch)
                assert batch["valid"].all(), batch["faults"]
                task.step(task.build_model(), batch)
                seen |= dict.fromkeys(batch["keys"], split)
        for row, key in enumerate(dataset.index.keys):
            number = int(key[1:])
            assert dataset.text(row) == WORDS[number].lower()
            if FORMATS[(number // 2 + number % 2) % 4] in ("flac", "wav"):  # the others lose something
                assert np.abs(dataset.waveform(row) - wave(number)).max() < 1e-4
    assert seen == {f"s{n:03d}": ("train", "train", "valid", "test")[n // 2] for n in range(8)}


def test_where_no_name_says_the_split_the_text_does(tmp_path: Path) -> None:
    folder = tmp_path / "flat"
    texts = ["".join(random.Random(n).choices("abcdef", k=6)) for n in range(40)]
    for tar in range(2):
        numbers = range(20 * tar, 20 * tar + 20)
        write_tar(folder / f"part{tar}.tar", [m for n in numbers for m in sample(n, f"s{n % 20}", text=texts[n])])
    for _ in range(2):  # also again, over what the first call left
        made = make_indexes(folder, None, CONFIG)
    assert made.prepared is not None
    assert made.prepared.splits["train"].samples + made.prepared.splits["test"].samples < 40
    keys: list[str] = []
    for split, info in made.prepared.splits.items():
        index = Index.load(folder / split, RATE)
        assert len(index) == info.samples > 0
        assert list(info.files) == sorted(p.name for p in (folder / split).glob("*.tar"))
        assert all(p.is_symlink() and p.resolve().parent == folder for p in (folder / split).glob("*.tar"))
        for key, entry, number in zip(index.keys, index.entries, index.shard, strict=True):
            content = index.shards[number].read_bytes()[entry.text_offset :][: entry.text_size]
            tar, inside = key.split("/")
            assert transcript(content).strip() == texts[20 * int(tar[4:]) + int(inside[1:])]
        keys += index.keys
    assert len(set(keys)) == 40, "a key that two tars have gets the tar's name in front"
    assert check(folder) == [("duplicate", f"s{n}", "the key is in " + f"{folder}/part0.tar too") for n in range(20)], (
        "and lint tells"
    )
    for path, into in ((folder, tmp_path / "again"), (tmp_path / "again", None)):  # over links that share a tar
        again = make_indexes(path, into, CONFIG).prepared
        assert again is not None
        assert {s: i.samples for s, i in again.splits.items()} == {
            s: i.samples for s, i in made.prepared.splits.items()
        }
    own, other = (index_path(tmp_path / "again" / split / "part0.tar") for split in ("train", "test"))
    lines = other.read_text().splitlines()
    head = json.dumps(json.loads(lines[0]) | {"samples": len(lines)})
    other.write_text("\n".join([head, *lines[1:], own.read_text().splitlines()[1]]) + "\n")
    told = [detail for _, _, detail in check(tmp_path / "again") if "would be in both" in detail]
    assert len(told) == 1
    shutil.move(folder, tmp_path / "moved")
    assert len(Index.load(tmp_path / "moved/train", RATE)) == made.prepared.splits["train"].samples


def test_a_single_tar_gets_its_index_beside_it_or_elsewhere(tmp_path: Path) -> None:
    tar = write_tar(tmp_path / "a.tar", [*sample(0), *sample(1, "deep/er.x", "wav")])
    made = make_indexes(tar, None, CONFIG)
    assert made.written == [tmp_path / "a.index.jsonl"]
    assert [json.loads(line)["key"] for line in made.written[0].read_text().splitlines()[1:]] == ["s000", "deep/er"]
    made = make_indexes(tar, tmp_path / "there", CONFIG)
    assert made.written[0].read_bytes() == (tmp_path / "a.index.jsonl").read_bytes()
    assert (tmp_path / "there/a.tar").samefile(tar)


def test_what_cannot_be_used_is_left_out_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path)
    write_tar(folder / "train-2.tar", [*sample(20, text="é" * 3), *sample(21, text=" "), *sample(22)])
    write_tar(folder / "test-2.tar", [*sample(24, text="q!"), *sample(26, "twice"), *sample(27, "twice")])
    assert main(["shards", "index", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "left out, or wrong" in shown
    for text in ("'!' 'q'", "is empty", "2 members with audio"):
        assert text in " ".join(shown.split()), text
    assert Prepared.load(folder).splits["train"].samples == 6
    assert Prepared.load(folder).splits["test"].samples == 2


def test_mistakes_with_index_are_told(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="there is no such file or folder"):
        make_indexes(tmp_path / "nowhere", None, CONFIG)
    with pytest.raises(UserError, match="holds no shards"):
        make_indexes(tmp_path, None, CONFIG)
    with pytest.raises(UserError, match="were made by `prepare`"):
        make_indexes(corpus, None, CONFIG)
    folder = foreign(tmp_path / "given")
    with pytest.raises(UserError, match=r"no sample can be used: rate: 8000 Hz, wanted 16000 \(8 times\)"):
        make_indexes(folder, None, SpeechDataConfig())
    write_tar(folder / "test_0.tar", sample(9, text=""))
    with pytest.raises(UserError, match="the split test would be empty"):
        make_indexes(folder, None, CONFIG)

    def refuse(*_: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(shards, "write_index", refuse)
    with pytest.raises(UserError, match=r"Read-only file system; name a folder where it can, with --into"):
        make_indexes(folder / "train-0.tar", None, CONFIG)


def prepared_corpus(root: Path, **settings: Any) -> SpeechDataConfig:
    """Settings of a corpus that was prepared here: a recording of its own, or a matrix, for each text."""
    texts = {"train": ["on the", "ten no", "Not en-", "ten ten"], "valid": ["no ten", "no on-"], "test": ["on ten?"]}
    rows = []
    for split, group in texts.items():
        for number, text in enumerate(group):
            key = f"{split}{number}"
            if "features" in settings:
                np.save(root / f"{key}.npy", wave(len(rows), 0.05).reshape(-1, 4))
            else:
                soundfile.write(root / f"{key}.wav", wave(len(rows), 2.0), RATE)
            audio = f"{key}.npy" if "features" in settings else f"{key}.wav"
            rows.append({"audio": audio, "text": text, "split": split, "key": key})
    (root / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    corpus = ManifestConfig(files=(root / "all.jsonl",))
    config = SpeechDataConfig(
        corpus=corpus, path=root / "made", sample_rate_hz=RATE, samples_per_shard=3, **{"text": DROP, **settings}
    )
    prepare(config, processes=1)
    return config


DROP = TextConfig(unknown="drop", map={"e": "n", "n": "e"})
KINDS: dict[str, dict[str, Any]] = {
    "characters": {},
    "phones": {"text": TextConfig(tokens=PhonesConfig(), unknown="drop")},
    "subwords": {"text": DROP.model_copy(update={"tokens": SubwordsConfig(vocabulary_size=12)})},
    "precomputed": {"features": FeaturesConfig(kind="precomputed", num_bands=4)},
}


@pytest.mark.parametrize("kind", KINDS)
def test_all_kinds_of_labels_and_features_are_indexed_checked_and_copied(tmp_path: Path, kind: str) -> None:
    """As `prepare` does it; the map, which is another if it is applied twice, shows who has normalised a text."""
    config = prepared_corpus(tmp_path, **KINDS[kind])
    assert {f for f in check(config.path) if f[0] != "pace"} == set(), "lint believes corpus.json, not the defaults"
    assert collect(config.path, CONFIG)[1] == ("phones" if kind == "phones" else "characters")
    assert preview.write(config.path, tmp_path / "page.html", 2, CONFIG) == 2
    assert (tmp_path / "page.html").read_text().count("<audio") == (0 if kind == "precomputed" else 2)

    foreign = shutil.copytree(config.path, tmp_path / "foreign", ignore=shutil.ignore_patterns("*.j*", "sub*", ".*"))
    rules = config.text.model_copy(update={"map": {}})
    made = make_indexes(foreign, None, config.model_copy(update={"text": rules})).prepared
    assert made == Prepared.load(config.path).model_copy(update={"corpus": "shards", "outside_alphabet": {}})
    for file in [*config.path.rglob("*.index.jsonl"), *config.path.glob("*.model")]:
        assert (foreign / file.relative_to(config.path)).read_bytes() == file.read_bytes()
    assert {f for f in check(foreign) if f[0] != "pace"} == set()

    remote = {"path": tmp_path / "copy", "remote": RemoteConfig(url=f"pipe:cat {config.path}/{{}}")}
    for split in ("train", "valid", "test"):
        there, copy = (
            SpeechDataset(c, split, BucketedConfig(), 0, lambda frames: frames)
            for c in (config, config.model_copy(update=remote))
        )
        assert copy.identity == there.identity
        if split == "train":
            assert there.text(there.index.keys.index("train0")) == ("on the" if kind == "phones" else "oe thn")
        for row in range(len(there)):
            assert there.text(row) == copy.text(row)
            assert len(there.tokens.encode(there.text(row))) == there.index.label_length[row]
            assert np.array_equal(there.waveform(row), copy.waveform(row))


def test_the_rule_for_what_is_outside_the_alphabet_holds_for_foreign_texts(tmp_path: Path) -> None:
    folder = foreign(tmp_path)
    write_tar(folder / "test-2.tar", [*sample(24, text="q s!"), *sample(26, text="q!")])
    config = CONFIG.model_copy(update={"text": TextConfig(unknown="drop")})
    made = make_indexes(folder, None, config)
    assert made.prepared is not None
    assert made.prepared.outside_alphabet == {"q": 1, "!": 1}
    assert made.prepared.splits["test"].samples == 3
    dataset = SpeechDataset(
        config.model_copy(update={"path": folder}), "test", BucketedConfig(), 0, lambda frames: frames
    )
    assert dataset.text(dataset.index.keys.index("s024")) == "s"
    assert dataset.index.label_length[dataset.index.keys.index("s024")] == 1


def test_a_key_may_hold_a_sign_that_elsewhere_ends_a_line(tmp_path: Path) -> None:
    key = "a\u2028b\x85c"
    folder = foreign(tmp_path / "given")
    write_tar(folder / "train-2.tar", sample(8, key))
    make_indexes(folder, made := tmp_path / "made", CONFIG)
    assert check(made) == []
    assert collect(made, CONFIG)[0]["train"].samples == 5
    assert key in Index.load(made / "train", RATE).keys
    append(tmp_path / "quarantine.jsonl", [{"key": key, "reason": "audio"}])
    assert [fault.key for fault in read_quarantine(tmp_path / "quarantine.jsonl", "train")] == [key]
    (tmp_path / "text").write_text(f"{key}\x0c\r\nd\n", encoding="utf-8")
    assert read_text(tmp_path / "text", "") == [f"{key}\x0c", "d"]


# --- lint ------------------------------------------------------------------------------------------------------------


def with_audio(content: bytes, ending: str = "wav") -> Members:
    return [*sample(0), (f"bad.{ending}", content), ("bad.txt", b"yes")]


def with_text(content: bytes) -> Members:
    return [*sample(0), ("bad.flac", encode(wave(1))), ("bad.txt", content)]


def changed_flac() -> bytes:
    """Another sound under the MD5 sum of this one: as where a bit was changed and the frame's checksum with it."""
    ours, other = encode(wave(1)), bytearray(encode(wave(2)))
    other[26:42] = ours[26:42]
    return bytes(other)


def edited(change: Callable[[bytearray], bytes | bytearray | None]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = bytearray(path.read_bytes())
        result = change(content)
        path.write_bytes(content if result is None else result)

    return edit


def flip_header(content: bytearray) -> None:
    content[read_offset(content, "s001.flac") - 512 + 3] ^= 4


def read_offset(content: bytes | bytearray, name: str) -> int:
    with tarfile.open(fileobj=io.BytesIO(bytes(content))) as tar:
        return tar.getmember(name).offset_data


PLAIN = [*sample(0), *sample(1)]
FAULTS: dict[str, tuple[Members, Any, str, str]] = {
    "NaN": (
        with_audio(encode(np.array([0.1, np.nan] * 800, np.float32), "wav", subtype="FLOAT")),
        None,
        "audio",
        "NaN",
    ),
    "not audio": (with_audio(b"this is no sound"), None, "audio", "cannot be decoded"),
    "zero bytes": (with_audio(b""), None, "audio", "cannot be decoded"),
    "no samples": (with_audio(encode(wave(0, 0), "wav")), None, "audio", "no samples"),
    "cut sound": (with_audio(encode(wave(0), "wav")[:5000]), None, "audio", "ends early, with 4,956 of"),
    "cut flac": (with_audio(encode(wave(0))[:3000], "flac"), None, "audio", ""),
    "changed flac": (with_audio(changed_flac(), "flac"), None, "audio", "not those whose MD5 sum"),
    "wrong rate": (with_audio(encode(wave(0), "wav", 16000)), None, "rate", "16000 Hz, wanted 8000"),
    "stereo": (with_audio(encode(np.stack([wave(0), wave(1)], 1), "wav")), None, "rate", "2 channels"),
    "empty text": (with_text(b" \n"), None, "label", "is empty"),
    "not UTF-8": (with_text(b"caf\xe9"), None, "label", "is not UTF-8"),
    "control": (with_text(b"a\x00b"), None, "label", r"'\x00'"),
    "outside": (with_text(b"yes?"), None, "label", "'?', which the alphabet has not"),
    "no text": ([*PLAIN, ("bad.flac", encode(wave(3)))], None, "pairs", "no text"),
    "no audio": ([*PLAIN, ("bad.txt", b"yes")], None, "pairs", "no audio"),
    "two sounds": ([*PLAIN, *sample(2), ("s002.wav", encode(wave(3), "wav"))], None, "pairs", "2 members with audio"),
    "no field": (
        [*PLAIN, ("bad.flac", encode(wave(3))), ("bad.json", b'{"words": 1}')],
        None,
        "label",
        "no field `text`",
    ),
    "too short": (with_audio(encode(wave(0, 0.05), "wav")), None, "length", "0.05 s, wanted 0.1 to 10"),
    "too long": (with_audio(encode(wave(0, 11), "wav")), None, "length", "11.00 s"),
    "pace": (with_text(b"yes " * 10), None, "pace", "suspicious: 39 characters in 0.50 s"),
    "CTC": (with_text(b"ss" * 7), None, "ctc", "14 labels need 27 output frames, it has"),
    "same sound": ([*PLAIN, *sample(0, "other")], None, "duplicate", "the same sound and text: s000"),
    "other text": ([*PLAIN, *sample(0, "other", text="no")], None, "duplicate", "but another text, 'yes'"),
    "cut inside": (PLAIN, edited(lambda c: c[: read_offset(c, "s001.json") + 3]), "tar", "s001.json: cut, "),
    "cut between": (PLAIN, edited(lambda c: c[: read_offset(c, "s001.flac") - 512]), "tar", "has no end mark"),
    "cut in a header": (PLAIN, edited(lambda c: c[: read_offset(c, "s001.flac") - 100]), "tar", "no part of a tar"),
    "damaged header": (PLAIN, edited(flip_header), "tar", "are no part of a tar: damaged"),
    "empty tar": (PLAIN, edited(lambda c: b""), "tar", "is empty"),
    "compressed": (PLAIN, edited(lambda c: b"\x1f\x8b" + c), "tar", "is compressed"),
    "no tar": (PLAIN, edited(lambda c: b"?" * 5000), "tar", "no part of a tar"),
    "nothing in it": ([("readme.md", b"x")], None, "", "no audio"),
    "index of another": (PLAIN, lambda p: index_path(p).write_text('{"samples": 1}\n'), "index", "ends after 0 of 1"),
    "no index": (PLAIN, lambda p: index_path(p).write_text("?"), "index", "is damaged"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_lint_names_what_is_wrong(tmp_path: Path, name: str) -> None:
    members, edit, kind, detail = FAULTS[name]
    tar = write_tar(tmp_path / "a.tar", members)
    if edit:
        edit(tar)
    config = CONFIG.model_copy(update={"text": TextConfig(alphabet=" abcdefghijklmnopqrstuvwxyz")})
    found = check(tmp_path, config)
    assert any((c == kind or not kind) and detail in d for c, _, d in found), found
    if "bad" in str(members):
        assert {key for _, key, _ in found} == {"bad"}, "and nothing else"


def test_lint_ends_with_its_own_code_and_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "given")
    (folder / "a.tar").mkdir()
    assert main(["shards", "lint", str(folder)]) == 0
    assert "8 good samples, 0.001 h in 4 shards: all is well" in capsys.readouterr().out
    (folder / "a-link.tar").symlink_to("nowhere.tar")
    write_tar(folder / "more.tar", [*with_text(EVIL.encode() + b"\xff"), ("[red]x.flac", b"")])
    assert main(["shards", "lint", str(folder), "--json", str(tmp_path / "all.jsonl")]) == 3
    shown = capsys.readouterr().out
    assert "is not UTF-8" in shown
    assert "[red]x" in shown, "a name is no markup"
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert ("bad", "label") in {(row["key"], row["check"]) for row in rows}
    assert "cannot be read: No such file or directory" in [row["detail"] for row in rows]
    assert f"{len(rows)} findings" in shown
    assert main(["shards", "lint", str(tmp_path / "nowhere")]) == 2
    assert main(["shards", "lint", "https://example.org/shards"]) == 2
    assert "https://example.org/shards: is a URL, and shards are read where they lie" in capsys.readouterr().err
    write_tar(tmp_path / "films" / "a.tar", sample(1))
    (tmp_path / "films" / "corpus.json").write_text('{"classes": ["run"], "shape": [3]}')
    assert main(["shards", "lint", str(tmp_path / "films")]) == 2
    shown = capsys.readouterr().err
    assert "corpus.json: is not what `prepare` writes for sound" in shown
    assert len(shown.splitlines()) == 1, shown


def test_lint_holds_an_index_against_its_shard(tmp_path: Path) -> None:
    folder = foreign(tmp_path)
    make_indexes(folder, None, CONFIG)
    assert check(folder) == []
    write_tar(folder / "train-0.tar", [*sample(0), *sample(1, kind="wav", text="never")])
    problems = {(c, k) for c, k, _ in check(folder)}
    assert ("index", "s001") in problems


@pytest.mark.parametrize("subtype", ["PCM_16", "PCM_24"])
def test_flac_that_is_whole_passes_its_own_sum(subtype: str) -> None:
    samples, num_samples, rate, channels = read_sound(encode(wave(0), subtype=subtype))
    want, _ = soundfile.read(io.BytesIO(encode(wave(0), subtype=subtype)), dtype="float32")
    assert (num_samples, rate, channels) == (len(want), RATE, 1)
    assert np.array_equal(samples, want)


def test_a_header_that_lies_about_the_length_costs_no_memory() -> None:
    content = bytearray(encode(wave(0)))
    content[21] |= 0x0F  # 36 bits of the number of samples: now beyond 6e10
    with pytest.raises(ValueError, match=r"ends early|cannot be decoded"):
        read_sound(bytes(content))


# --- fuzzed tars -----------------------------------------------------------------------------------------------------


def fuzz(content: bytes, number: int) -> tuple[bytes, int]:
    """A tar, damaged or reordered, and how many bits were flipped."""
    chance = random.Random(number)
    kind = number % 4
    if kind == 0:
        return content[: chance.randrange(len(content))], 0
    if kind == 1:  # on a member boundary
        with tarfile.open(fileobj=io.BytesIO(content)) as tar:
            return content[: chance.choice(tar.getmembers()).offset], 0
    if kind == 2:
        damaged = bytearray(content)
        flips = chance.choice([1, 5, 50])
        for _ in range(flips):
            # Half of them where they hurt most.
            place = chance.randrange(len(content))
            damaged[place // 512 * 512 + place % 160 if chance.random() < 0.5 else place] ^= 1 << chance.randrange(8)
        return bytes(damaged), flips
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = [(m.name, tar.extractfile(m).read()) for m in tar.getmembers()]
    chance.shuffle(members)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return stream.getvalue(), 0


def bits(a: bytes, b: bytes) -> int:
    return sum((x ^ y).bit_count() for x, y in zip(a, b, strict=True))


def test_no_fuzzed_tar_gives_a_sound_the_label_of_another(tmp_path: Path) -> None:
    """100 tars: no crash, no hang, and every sample that is indexed is one of the original's, sound and label."""
    folder, members = tmp_path / "given", [m for n in range(8) for m in sample(n, kind=FORMATS[n % 4])]
    original = dict(members)
    content = write_tar(tmp_path / "original.tar", members).read_bytes()
    flips = {}
    for number in range(100):
        name = f"{('test', 'valid', *['train'] * 8)[number // 4 % 10]}-{number:03d}"
        damaged, flips[name] = fuzz(content, number)
        (folder / f"{name}.tar").parent.mkdir(exist_ok=True)
        (folder / f"{name}.tar").write_bytes(damaged)
    made = make_indexes(folder, tmp_path / "into", CONFIG)
    assert made.prepared is not None
    indexed = 0
    for index in made.written:
        tar = index.with_name(index.name.replace(".index.jsonl", ".tar")).read_bytes()
        allowed = flips[index.name.partition(".")[0]]
        for line in index.read_text().splitlines()[1:]:
            entry = json.loads(line)
            number = int(entry["key"].rpartition("s")[2])
            text_name, audio_name = (
                next(n for n in original if n.startswith(f"s{number:03d}.") and (n[-3:] in ("txt", "son")) == is_text)
                for is_text in (True, False)
            )
            text = tar[entry["text_offset"] :][: entry["text_size"]]
            audio = tar[entry["audio_offset"] :][: entry["audio_size"]]
            assert bits(text, original[text_name]) + bits(audio, original[audio_name]) <= allowed
            if not allowed or audio_name.endswith("flac"):
                got, want = read_sound(audio)[0], read_sound(original[audio_name])[0]
                assert np.array_equal(got, want)
            indexed += 1
    assert indexed == sum(info.samples for info in made.prepared.splits.values()) > 300
    found, examined = lint(folder, CONFIG, (0.1, 10.0), lambda frames: frames // 4)
    assert len(examined) == 100
    damaged_tars = {f.shard.name for f in found if f.problem.check in ("tar", "pairs", "audio", "label")}
    for e in examined:
        number = int(e.shard.stem[-3:])
        if number % 4 < 2:
            assert e.shard.name in damaged_tars, "every cut is noticed, also one between two members"
        if number % 4 == 3:
            assert e.shard.name not in damaged_tars
            assert len(e.samples) == 8, "order means nothing"


def test_hostile_headers_end_the_search_and_nothing_else(tmp_path: Path) -> None:
    """Extended headers in a chain, sizes below zero and beyond the file, names that are no text."""
    huge = tarfile.TarInfo("a.flac")
    huge.size = 1 << 60
    odd = tarfile.TarInfo("\udcff\x1b[31m.flac")
    plain = write_tar(tmp_path / "x.tar", sample(0)).read_bytes()
    block = bytearray(tarfile.TarInfo("n.flac").tobuf())
    block[124:136] = b"\xff" * 12  # minus one
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    chain = tarfile.TarInfo("p")
    chain.type, chain.size = tarfile.XHDTYPE, 0
    start = plain[: -(-len(plain.rstrip(b"\0")) // 512) * 512]
    pieces = [start, bytes(block), odd.tobuf(errors="surrogateescape"), chain.tobuf() * 5000, huge.tobuf()]
    (tmp_path / "x.tar").write_bytes(b"".join(pieces))
    contents = read_contents(tmp_path / "x.tar")
    assert [pair.key for pair in contents.pairs] == ["s000"]
    assert all(p.detail.isprintable() and p.key.isprintable() for p in contents.problems)


# --- stats and preview -----------------------------------------------------------------------------------------------


def test_stats_counts_and_draws(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = foreign(tmp_path / "given")
    picture = tmp_path / "picture.png"
    make_indexes(folder, None, CONFIG)
    groups, what = collect(folder, CONFIG)
    assert what == "characters"
    assert {name: group.samples for name, group in groups.items()} == {"train": 4, "valid": 2, "test": 2}
    assert sum(groups["train"].units.values()) == len("yesnostopgo on")
    assert groups["test"].hours == pytest.approx(2 * 0.5 / 3600, rel=0.2)  # an MP3 is a little longer
    assert main(["shards", "stats", str(folder), "--picture", str(picture)]) == 0
    assert "characters: 'o' " in capsys.readouterr().out
    assert Image.open(picture).size[0] > 1000


def test_a_preview_is_a_page_of_its_own_in_which_nothing_is_markup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, page = foreign(tmp_path / "given"), tmp_path / "page.html"
    write_tar(
        folder / f"{EVIL.replace('/', '')}.tar", [*sample(9, EVIL.replace(".", ""), text=EVIL), *with_audio(b"?")]
    )
    (folder / "gone.tar").symlink_to("nowhere.tar")
    assert main(["shards", "preview", str(folder), "--page", str(page), "--count", "50"]) == 0
    assert "(11 samples)" in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert "<script" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in text
    assert text.count("<audio") == 10
    assert text.count("no sound: cannot be decoded") == 1
    assert "nowhere.tar: cannot be read: No such file" in text
    assert "http://" not in text
    assert "https://" not in text
    first = page.read_bytes()
    assert main(["shards", "preview", str(folder), "--page", str(page), "--count", "3"]) == 0
    assert page.read_text().count("<audio") <= 3 < first.count(b"<audio")


def test_the_commands_of_the_documents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of docs/data.md, on a miniature."""
    foreign(tmp_path / "foreign")
    (tmp_path / "mine.yaml").write_text(f"recipe: speech\ndata: {{sample_rate_hz: {RATE}}}\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    text = (PROJECT / "docs/data.md").read_text(encoding="utf-8").replace(" /data/foreign", " foreign")
    lines = re.findall(r"^\./launch\.sh (shards .*)$", text.replace("speech/mine", "mine.yaml"), re.M)
    done = [arguments[1] for line in lines if not main(arguments := shlex.split(line, comments=True))]
    assert done == ["lint", "stats", "preview", "index"]
    assert Path("shards-stats.png").is_file()
    assert Path("shards-preview.html").is_file()
    assert Prepared.load(tmp_path / "data/foreign").splits["train"].samples == 4
