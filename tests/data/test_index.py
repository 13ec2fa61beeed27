"""The merged index: made once, the same as what lies beside the shards, and made anew when that changes."""

import json
import logging
import multiprocessing
import os
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.helpers import contents
from trainer import keyed
from trainer.data import columns, index
from trainer.data import reader as reader_module
from trainer.data.columns import Columns
from trainer.data.index import Index, index_path
from trainer.data.reader import FILES_OPEN, ShardReader
from trainer.errors import UserError

RATE = 16000


@pytest.fixture
def folder(corpus: Path, tmp_path: Path) -> Path:
    """A training split of its own, not merged yet."""
    shutil.copytree(corpus / "train", tmp_path / "train", ignore=shutil.ignore_patterns(".columns"))
    return tmp_path / "train"


def test_it_says_what_the_indexes_of_the_shards_say(folder: Path) -> None:
    merged = Index.load(folder, RATE)
    shards = sorted(folder.glob("*.tar"))
    wanted = [(n, entry) for n, shard in enumerate(shards) for entry, *_ in contents(shard).values()]
    assert list(merged.entries) == [entry for _, entry in wanted]
    assert list(merged.shard) == [n for n, _ in wanted]
    assert list(merged.keys) == [entry.key for _, entry in wanted]
    assert merged.sample_keys.tolist() == [keyed.key(entry.key) for _, entry in wanted]
    assert [merged.row(key) for key in merged.keys] == list(range(len(merged)))
    assert merged.hours == pytest.approx(sum(e.num_samples for _, e in wanted) / RATE / 3600)
    with pytest.raises(KeyError):
        merged.row("nobody")


def never(*_: Any) -> Any:
    raise AssertionError("it is merged already")


def test_it_is_merged_once(folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Opening it again reads none of the indexes; a copy of the folder with its times needs no merging either."""
    first = Index.load(folder, RATE)
    monkeypatch.setattr(index, "_merge", never)
    assert list(Index.load(folder, RATE).entries) == list(first.entries)
    copied = Index.load(shutil.copytree(folder, tmp_path / "copy"), RATE)
    assert copied.digest == first.digest
    assert not copied.num_samples.flags.writeable


def rewrite(shard: Path) -> None:
    path = index_path(shard)
    lines = path.read_text().splitlines()
    row = json.loads(lines[1]) | {"num_samples": 77777}
    path.write_text("\n".join([lines[0], json.dumps(row), *lines[2:]]) + "\n")


def remove(shard: Path) -> None:
    shard.unlink()
    index_path(shard).unlink()


STALE: dict[str, Callable[[Path], None]] = {
    "another index": rewrite,
    "a shard less": remove,
    "touched": lambda shard: os.utime(index_path(shard), ns=(1, 1)),
}


@pytest.mark.parametrize("change", STALE.values(), ids=STALE.keys())
def test_a_stale_one_is_made_anew(folder: Path, change: Callable[[Path], None]) -> None:
    before = Index.load(folder, RATE)
    change(sorted(folder.glob("*.tar"))[1])
    after = Index.load(folder, RATE)
    wanted = [entry for shard in sorted(folder.glob("*.tar")) for entry, *_ in contents(shard).values()]
    assert list(after.entries) == wanted
    assert (after.digest == before.digest) == (change is STALE["touched"])


FOREIGN: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda content: b"",
    "cut short": lambda content: content[:-1],
    "longer": lambda content: content + b"\0",
    "of another kind": lambda content: b"PK\3\4" + content[4:],
    "of another format": lambda content: content.replace(b'"format": 1', b'"format": 9', 1),
    "no header": lambda content: content[:16] + b"\xff" * 64 + content[80:],
    "a header of a petabyte": lambda content: content[:8] + (2**50).to_bytes(8, "little") + content[16:],
}


@pytest.mark.parametrize("change", FOREIGN.values(), ids=FOREIGN.keys())
def test_a_foreign_or_damaged_one_is_made_anew(folder: Path, change: Callable[[bytes], bytes]) -> None:
    wanted = list(Index.load(folder, RATE).entries)
    merged = columns.folder_for(folder) / "index.columns"
    content = merged.read_bytes()
    merged.unlink()  # a new file: the old one is still mapped
    merged.write_bytes(change(content))
    assert list(Index.load(folder, RATE).entries) == wanted
    assert merged.read_bytes() == content


def test_a_key_that_occurs_twice_is_refused(folder: Path) -> None:
    first, second = sorted(folder.glob("*.tar"))[:2]
    lines = index_path(first).read_text().splitlines()
    key = next(iter(contents(second)))
    index_path(first).write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | {"key": key})]))
    with pytest.raises(UserError, match=f"the keys {key} occur twice"):
        Index.load(folder, RATE)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ({"audio_offset": 513}, "multiple of 512"),
        ({"num_samples": -1}, "out of range"),
        ({"key": 5}, "a key is no text"),
    ],
    ids=str,
)
def test_a_damaged_index_is_named(folder: Path, change: dict[str, Any], wanted: str) -> None:
    path = index_path(sorted(folder.glob("*.tar"))[0])
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:-1], json.dumps(json.loads(lines[-1]) | change)]))
    with pytest.raises(UserError, match=rf"shard-000000\.index\.jsonl: is damaged .*{wanted}"):
        Index.load(folder, RATE)


def test_read_only_data_is_merged_in_the_users_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(columns.os, "access", lambda path, mode: False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    merged = Index.load(folder, RATE)
    assert not (folder / ".columns").exists()
    assert merged.folder.is_relative_to(tmp_path / "cache" / "ostinato")
    assert (merged.folder / "index.columns").is_file()


def test_columns_come_back_as_they_were(tmp_path: Path) -> None:
    arrays = {
        "bytes": np.frombuffer(b"abc", np.uint8),
        "none": np.empty(0, np.float64),
        "big endian": np.arange(5, dtype=">u4"),
        "strided": np.arange(20, dtype=np.int64)[::3],
    }
    columns.write(tmp_path / "x.columns", Columns(arrays, {"a": 1, "b": "é"}))
    found = columns.read(tmp_path / "x.columns", {"a": 1})
    assert found is not None
    assert found.facts == {"a": 1, "b": "é"}
    for name, array in arrays.items():
        assert np.array_equal(found[name], array)
    assert columns.read(tmp_path / "x.columns", {"a": 2}) is None


def build_and_tell(path: Path, log: Path) -> None:
    def build() -> Columns:
        with log.open("a") as file:
            file.write("built\n")
        return Columns({"x": np.arange(100_000)}, {})

    assert columns.shared(path, {"of": "this"}, build)["x"].sum() == 4999950000


def test_of_many_processes_one_builds(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    arguments = (tmp_path / "new" / "x.columns", tmp_path / "log")
    processes = [context.Process(target=build_and_tell, args=arguments) for _ in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 6
    assert (tmp_path / "log").read_text() == "built\n"
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["lock", "x.columns"]


def test_a_full_disk_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(columns, "write", full)
    with caplog.at_level(logging.WARNING):
        found = columns.shared(tmp_path / "x.columns", {}, lambda: Columns({"x": np.arange(3)}, {}))
    assert found["x"].tolist() == [0, 1, 2]
    assert "could not be written" in caplog.text


def test_few_shards_are_open_at_a_time(tmp_path: Path) -> None:
    paths = [tmp_path / f"{i}.tar" for i in range(2 * FILES_OPEN)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 10)
    reader = ShardReader(paths)

    def opened() -> int:
        links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
        return sum(str(tmp_path) in os.readlink(link) for link in links if link.is_symlink())

    for i in [*range(2 * FILES_OPEN), 0, 5]:
        assert reader.read(i, 2, 4) == bytes([i]) * 4
        assert opened() <= FILES_OPEN
    assert reader.read(3, 8, 4) == bytes([3]) * 2
    del reader
    assert opened() == 0


def test_threads_read_shards_that_others_close(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader_module, "FILES_OPEN", 1)
    paths = [tmp_path / f"{i}.tar" for i in range(8)]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * 10)
    reader = ShardReader(paths)
    rows = [i * 5 % 8 for i in range(4000)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda i: reader.read(i, 0, 1)[0], rows)) == rows
