"""A corpus becomes shards that anyone can read, the same bytes every time, and a mistake in it is named."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
import webdataset

from tests.helpers import overrides
from trainer import recipe
from trainer.config import PROJECT
from trainer.data.audio import FeaturesConfig, decode
from trainer.data.corpora.base import split_by_text
from trainer.data.corpora.manifest import ManifestConfig
from trainer.data.corpora.tones import TonesConfig
from trainer.data.index import FORMAT, Index, index_path
from trainer.data.parallel import signals_put_off
from trainer.data.prepare import prepare
from trainer.data.prepared import Prepared, SpeechDataConfig
from trainer.data.text import TextConfig, ctc_frames
from trainer.errors import UserError

RATE = 8000
WORD = "abccdefghijkl"
SPLITS = {"train": 8, "valid": 2, "test": 2}


def write_clip(path: Path, number: int, rate: int = RATE) -> np.ndarray[Any, Any]:
    samples = np.random.default_rng(number).integers(-3000, 3000, size=2000 + 10 * number).astype(np.int16)
    soundfile.write(path, samples, rate, subtype="PCM_16")
    return samples


def write_manifest(folder: Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / "all.jsonl").write_text(text, encoding="utf-8")


@pytest.fixture
def rows(tmp_path: Path) -> list[dict[str, Any]]:
    """Twelve clips, their manifest written; for a test to change."""
    rows = []
    for split, size in SPLITS.items():
        for _ in range(size):
            number = len(rows)
            write_clip(tmp_path / f"{number}.wav", number)
            rows.append({"audio": f"{number}.wav", "text": f"Call {WORD[number:]}", "split": split})
    write_manifest(tmp_path, rows)
    return rows


def settings(folder: Path, name: str = "made", **changes: Any) -> SpeechDataConfig:
    values: dict[str, Any] = {
        "corpus": ManifestConfig(files=(folder / "all.jsonl",)),
        "path": folder / name,
        "sample_rate_hz": RATE,
        "samples_per_shard": 4,
        "features": FeaturesConfig(num_bands=8),
    }
    return SpeechDataConfig(**values | changes)


def bytes_of(folder: Path) -> dict[str, str]:
    """Hash of every prepared file."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and ".prepare" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.usefixtures("rows")
def test_webdataset_reads_the_pairs(tmp_path: Path) -> None:
    prepare(settings(tmp_path), processes=1)
    shards = [str(p) for p in sorted((tmp_path / "made/train").glob("*.tar"))]
    samples = list(webdataset.WebDataset(shards, shardshuffle=False))
    assert [s["__key__"] for s in samples] == [str(n) for n in range(8)]
    for number, sample in enumerate(samples):
        want, _ = soundfile.read(tmp_path / f"{number}.wav", dtype="int16")
        got = np.rint(decode(sample["flac"], RATE) * 32768)
        assert np.array_equal(got, want), "16-bit audio comes through bit by bit"
        assert sample["txt"].decode() == f"call {WORD[number:]}"
        assert json.loads(sample["json"])["source"] == f"{number}.wav"


@pytest.mark.usefixtures("rows")
def test_index_points_at_the_contents(tmp_path: Path) -> None:
    prepared = prepare(settings(tmp_path), processes=1)
    for split, size in SPLITS.items():
        index = Index.load(tmp_path / "made" / split, RATE)
        assert len(index) == size == prepared.splits[split].samples
        assert index.hours == pytest.approx(prepared.splits[split].hours)
        for shard, entry in zip(index.shard, index.entries, strict=True):
            file = os.open(index.shards[shard], os.O_RDONLY)
            text = os.pread(file, entry.text_size, entry.text_offset).decode()
            samples = decode(os.pread(file, entry.audio_size, entry.audio_offset), RATE)
            os.close(file)
            want, _ = soundfile.read(tmp_path / f"{entry.key}.wav", dtype="float32")
            assert np.array_equal(samples, want)
            assert (entry.label_length, entry.ctc_frames) == (len(text), ctc_frames(text))
            assert entry.num_samples == len(want)
            assert text.startswith("call ")


@pytest.mark.usefixtures("rows")
def test_statistics_are_those_of_the_training_clips(tmp_path: Path) -> None:
    config = settings(tmp_path)
    statistics = prepare(config, processes=1).statistics
    log_mel = config.features.build(RATE)
    waves = [torch.from_numpy(soundfile.read(tmp_path / f"{n}.wav", dtype="float32")[0]) for n in range(8)]
    energies = torch.cat([log_mel.energies(wave) for wave in waves]).double()
    # float32 energies, added up in another order
    assert statistics.mean == pytest.approx(energies.mean(0).tolist(), rel=1e-6)
    assert statistics.deviation == pytest.approx(energies.std(0, correction=0).tolist(), rel=1e-6)


@pytest.mark.usefixtures("rows")
def test_same_bytes_whatever_the_processes(tmp_path: Path) -> None:
    for name, processes in (("first", 1), ("second", 1), ("third", 2)):
        prepare(settings(tmp_path, name), processes=processes)
    first = bytes_of(tmp_path / "first")
    assert len(first) == 2 * (2 + 1 + 1) + 2  # shards and their indexes; all indexes in one; corpus.json
    assert bytes_of(tmp_path / "second") == first
    assert bytes_of(tmp_path / "third") == first


@pytest.mark.usefixtures("rows")
def test_restart_writes_only_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(tmp_path)
    prepare(config, processes=1)
    before = bytes_of(config.path)
    shards = sorted(config.path.rglob("*.tar"))
    times = {shard: shard.stat().st_mtime_ns for shard in shards}
    capsys.readouterr()

    started = time.monotonic()
    prepare(config, processes=1)
    assert time.monotonic() - started < 2
    assert "up to date" in capsys.readouterr().out
    assert {shard: shard.stat().st_mtime_ns for shard in shards} == times

    (config.path / "train/shard-000001.tar").unlink()
    prepare(config, processes=1)
    assert "1 of 4 shards written" in capsys.readouterr().out
    changed = [s.name for s in shards if s.stat().st_mtime_ns != times[s]]
    assert changed == ["shard-000001.tar"]
    assert bytes_of(config.path) == before

    index = index_path(shards[0])
    index.write_text(index.read_text().replace(f'"format": {FORMAT}', '"format": 1', 1))
    prepare(config, processes=1)
    assert "1 of 4 shards written" in capsys.readouterr().out
    assert bytes_of(config.path) == before


def test_a_changed_clip_changes_its_shard_only(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    config = settings(tmp_path)
    prepare(config, processes=1)
    write_clip(tmp_path / "0.wav", 99)
    prepare(config, processes=1)
    assert "1 of 4 shards written" in capsys.readouterr().out
    write_manifest(tmp_path, rows[:4] + rows[8:])
    prepared = prepare(config, processes=1)
    assert "1 shards of an earlier preparation were removed" in capsys.readouterr().out
    assert prepared.splits["train"].shards == len(list((config.path / "train").glob("*.tar"))) == 1
    assert prepared == Prepared.load(config.path)


@pytest.mark.usefixtures("rows")
def test_shards_of_others_are_left_alone(tmp_path: Path) -> None:
    foreign = tmp_path / "made/train/shard-000000.tar"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"precious")
    with pytest.raises(UserError, match=r"shard-000000\.tar: is a shard that `prepare` has not made"):
        prepare(settings(tmp_path), processes=1)
    assert foreign.read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("gone", "wanted"),
    [
        (["shard-000002.tar"], r"shard-000002\.index\.jsonl: the shard of this index is missing \(one of 1\)"),
        (["shard-000002.index.jsonl"], r"shard-000002\.tar: has no index"),
        (["shard-000002.tar", "shard-000002.index.jsonl"], r"42 samples in 6 shards, corpus\.json .* says 50 in 7"),
    ],
)
def test_a_missing_shard_is_noticed(tmp_path: Path, corpus: Path, gone: list[str], wanted: str) -> None:
    data = shutil.copytree(corpus, tmp_path / "data")
    task = recipe.load("speech/tones", overrides(data, tmp_path))
    task.build_dataset("train")
    for name in gone:
        (data / "train" / name).unlink()
    with pytest.raises(UserError, match=wanted):
        task.build_dataset("train")


@pytest.mark.parametrize("processes", [1, 2])
def test_all_that_is_bad_is_named_at_once(tmp_path: Path, rows: list[dict[str, Any]], processes: int) -> None:
    (tmp_path / "5.wav").write_bytes(b"this is not audio")
    soundfile.write(tmp_path / "4.wav", np.zeros(0, np.int16), RATE)
    rows[9]["text"] = "  "
    rows[10]["text"] = "Call жq"
    write_manifest(tmp_path, rows)
    (tmp_path / "11.wav").unlink()
    config = settings(tmp_path, text=TextConfig(alphabet=" abcdefghijkl"))
    for _ in range(2):
        with pytest.raises(UserError) as caught:
            prepare(config, processes=processes)
        lines = str(caught.value).splitlines()
        assert len(lines) == 7, lines
        for line, parts in zip(
            lines,
            [
                ("line 10: key 9", "text = '  '", "is empty", "write what is said"),
                ("line 12: key 11", "audio = '11.wav'", "no such file", "mend the path"),
                ("line 11: key 10", "text = 'Call жq'", "holds 'q' 'ж'", "data.text.unknown to space or drop"),
                ("line 5: key 4", "4.wav", "no samples", "replace the file"),
                ("line 6: key 5", "5.wav", "not audio", "replace the file"),
                ("outside the alphabet (an error): 'ж' 1 in 1 utterances, 'q' 1 in 1 utterances",),
                ("are kept", "run the command again"),
            ],
            strict=True,
        ):
            assert all(part in line for part in parts), line
    assert {p.parent.name for p in config.path.rglob("*.tar")} == {"train", "valid"}
    assert len(list(config.path.rglob("*.tar"))) == 2, "the good shards are there"
    assert not (config.path / "corpus.json").exists()


def test_a_share_of_the_corpus_may_be_left_out_and_is_listed(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    good = (tmp_path / "5.wav").read_bytes()
    (tmp_path / "5.wav").write_bytes(b"this is not audio")
    rows[9]["text"] = "  "
    write_manifest(tmp_path, rows)
    few, enough = (settings(tmp_path, max_unusable_share=n / len(rows)) for n in (1.5, 2.5))
    with pytest.raises(UserError, match="let it leave out such a share"):
        prepare(few, processes=1)
    for _ in range(2):  # again, over what is there already
        prepared = prepare(enough, processes=1)
        assert sum(info.samples for info in prepared.splits.values()) == len(rows) - 2
        told = (enough.path / "left_out.txt").read_text().splitlines()
        assert sorted(line.split("key ")[1].split(":")[0] for line in told) == ["5", "9"]
        assert "2 lines are unusable and left out" in " ".join(capsys.readouterr().out.split())
    with pytest.raises(UserError, match="not audio"):
        prepare(settings(tmp_path), processes=1)
    (tmp_path / "5.wav").write_bytes(good)
    rows[9]["text"] = rows[8]["text"]
    write_manifest(tmp_path, rows)
    assert sum(info.samples for info in prepare(settings(tmp_path), processes=1).splits.values()) == len(rows)
    assert not (enough.path / "left_out.txt").exists()


def test_audio_that_ends_early_is_named(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    whole = (tmp_path / "4.wav").read_bytes()
    (tmp_path / "4.wav").write_bytes(whole[:2000])
    streamed = bytearray((tmp_path / "5.wav").read_bytes())
    streamed[40:44] = b"\xff\xff\xff\xff"  # what a pipe writes, which does not know the length
    (tmp_path / "5.wav").write_bytes(streamed)
    soundfile.write(tmp_path / "6.mp3", np.random.default_rng(0).uniform(-0.1, 0.1, 4 * RATE), RATE)
    (tmp_path / "7.mp3").write_bytes((tmp_path / "6.mp3").read_bytes()[: (tmp_path / "6.mp3").stat().st_size // 2])
    rows[6]["audio"], rows[7]["audio"] = "6.mp3", "7.mp3"
    write_manifest(tmp_path, rows)
    with pytest.raises(UserError) as caught:
        prepare(settings(tmp_path), processes=1)
    first, second, _ = str(caught.value).splitlines()
    assert "line 5: key 4" in first
    assert "4.wav: ends early, with 1,956 of the 4,080 bytes of sound that its header names; replace" in first
    assert "7.mp3: ends early, with " in second


@pytest.mark.usefixtures("rows")
def test_the_folder_of_another_corpus_is_left_alone(tmp_path: Path) -> None:
    prepare(settings(tmp_path), processes=1)
    before = bytes_of(tmp_path / "made")
    with pytest.raises(UserError, match=r"corpus\.json: the folder holds the corpus manifest, not .* = tones"):
        prepare(settings(tmp_path, corpus=TonesConfig(num_utterances=40)), processes=1)
    assert bytes_of(tmp_path / "made") == before


def test_letters_of_other_splits_must_be_those_of_training(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    rows[11]["text"] = "call z"
    write_manifest(tmp_path, rows)
    with pytest.raises(UserError, match=r"line 12: key 11: text = 'call z': holds 'z'"):
        prepare(settings(tmp_path), processes=1)
    drop = TextConfig(alphabet=" abcdefghijkl", unknown="drop")
    assert prepare(settings(tmp_path, text=drop), processes=1).alphabet == " abcdefghijkl"


def test_many_problems_are_counted(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_manifest(tmp_path, rows + [{"audio": "0.wav", "key": f"more{n}", "text": ""} for n in range(25)])
    with pytest.raises(UserError, match="and 5 more") as caught:
        prepare(settings(tmp_path), processes=1)
    assert len(str(caught.value).splitlines()) == 22
    (path,) = tmp_path.rglob("problems.txt")
    assert len(path.read_text().splitlines()) == 25
    assert str(path.relative_to(tmp_path)) in str(caught.value)


def test_splits_that_share_a_text_are_told(
    tmp_path: Path, rows: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    prepare(settings(tmp_path), processes=1)
    assert "warning" not in capsys.readouterr().out
    rows[8]["text"], rows[10]["text"], rows[11]["text"] = (rows[i]["text"].upper() for i in (0, 0, 1))
    write_manifest(tmp_path, rows)
    prepare(settings(tmp_path), processes=1)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "warning" in line]
    assert "(1 in train and valid, 2 in train and test, 1 in valid and test)" in line


def test_no_split_may_be_empty(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    write_manifest(tmp_path, rows[:8])
    with pytest.raises(UserError, match="valid and test would be empty"):
        prepare(settings(tmp_path), processes=1)


def test_other_rates_and_channels_are_converted(tmp_path: Path, rows: list[dict[str, Any]]) -> None:
    seconds = np.arange(2 * RATE) / (2 * RATE)
    left = 0.5 * np.sin(2 * np.pi * 440 * seconds)
    soundfile.write(tmp_path / "0.wav", np.stack([left, 0 * left], axis=1), 2 * RATE)
    prepare(settings(tmp_path), processes=1)
    index = Index.load(tmp_path / "made/train", RATE)
    entry = index.entries[0]
    content = index.shards[0].read_bytes()[entry.audio_offset :][: entry.audio_size]
    got = decode(content, RATE)
    want = 0.25 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)
    # away from the ends, where the filter sees silence; 1e-3 is the ripple of the resampler
    assert np.abs(got - want)[100:-100].max() < 1e-3


def test_splits_share_no_text(tmp_path: Path) -> None:
    config = settings(tmp_path, corpus=TonesConfig(num_utterances=80, alphabet="ab"), samples_per_shard=64)
    prepared = prepare(config, processes=2)
    assert sum(info.samples for info in prepared.splits.values()) == 80
    texts = {}
    for split in SPLITS:
        shards = [str(p) for p in sorted((config.path / split).glob("*.tar"))]
        texts[split] = {s["txt"].decode() for s in webdataset.WebDataset(shards, shardshuffle=False)}
        assert all(split_by_text(text) == split for text in texts[split])
    assert not texts["train"] & texts["valid"]
    assert not texts["train"] & texts["test"]
    assert not texts["valid"] & texts["test"]


ENDLESS = """
import sys
from pathlib import Path
from trainer.data.corpora.tones import TonesConfig
from trainer.data.prepare import prepare
from trainer.data.prepared import SpeechDataConfig
corpus = TonesConfig(num_utterances=3000)
prepare(SpeechDataConfig(corpus=corpus, path=Path(sys.argv[1]), samples_per_shard=4), processes=2)
"""


def test_a_signal_waits_until_the_pool_can_be_left() -> None:
    """An exception in the middle of the pool's own code would leave a lock held, and the process waiting for it."""
    with signals_put_off() as take_signal:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            take_signal()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_a_signal_leaves_neither_workers_nor_half_a_shard(tmp_path: Path, number: signal.Signals) -> None:
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(tmp_path)],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.rglob("*.index.jsonl"))) < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.05)
        process.send_signal(number)
        process.wait(timeout=20)
        gone = False
        while not gone and time.monotonic() < deadline:
            try:
                os.killpg(process.pid, 0)  # anyone left of the process group?
                time.sleep(0.05)
            except ProcessLookupError:
                gone = True
        assert gone
    finally:
        if process.poll() is None:
            process.kill()
    for index in tmp_path.rglob("*.index.jsonl"):
        header = json.loads(index.read_text().splitlines()[0])
        shard = index.with_name(header["shard"])
        assert shard.stat().st_size == header["bytes"]
    if number != signal.SIGKILL:  # after that, the next start clears up
        assert not list(tmp_path.rglob("*.tmp"))
    assert not (tmp_path / "corpus.json").exists()
