"""The index beside each shard, and one merged index of a split: where every sample lies and how long it is.

A shard is a plain webdataset tar, `KEY.flac KEY.txt KEY.json`, that anyone's loader can read. Its index,
`shard-000000.index.jsonl` beside `shard-000000.tar`, starts with a header line {"format", "shard", "bytes", "samples"}
and has one line a sample, an `Entry`. Planning reads indexes only; reading a sample is one `pread`.

Twenty thousand such files are merged once into columns that all processes of a host map into memory (`Index`). The
merged file remembers the names, sizes and times of the indexes it was made from, and is made anew when they differ.
"""

import bisect
import hashlib
import itertools
import json
import logging
import os
import time
from array import array
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from trainer.config import show
from trainer.data import columns
from trainer.data.columns import Columns
from trainer.errors import UserError
from trainer.keyed import key as make_key

log = logging.getLogger(__name__)

FORMAT = 2
"""Of the index beside a shard."""
MERGED_FORMAT = 1
"""Of the merged one."""
BLOCK = 512
"""A tar's contents start at multiples of so many bytes."""
PROGRESS_SECONDS = 10.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of a shard. Offsets and sizes are bytes of the members' contents inside the tar."""

    key: str
    audio_offset: int
    audio_size: int
    audio_crc32: int
    text_offset: int
    text_size: int
    text_crc32: int
    num_samples: int
    """Length of the waveform."""
    label_length: int
    """Characters of the normalised transcript."""
    ctc_frames: int
    """Output frames that CTC needs at least: labels plus repeats."""


NUMBERS = tuple(name for name in Entry.__dataclass_fields__ if name != "key")
_BLOCKS = ("audio_offset", "text_offset")  # kept as numbers of blocks, so that 32 bits reach 2 TiB into a shard


def index_path(shard: Path) -> Path:
    """The index file of a shard."""
    return shard.with_suffix(".index.jsonl")


def write_index(shard: Path, entries: list[Entry]) -> None:
    """Write a shard's index, whole or not at all."""
    header = {"format": FORMAT, "shard": shard.name, "bytes": shard.stat().st_size, "samples": len(entries)}
    lines = [json.dumps(header)] + [json.dumps(asdict(e), ensure_ascii=False) for e in entries]
    temporary = index_path(shard).with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(index_path(shard))


class Rows(Sequence[T], Generic[T]):
    """A list whose members are made when they are asked for.

    Args:
        count: how many there are.
        make: number -> member.
    """

    def __init__(self, count: int, make: Callable[[int], T]) -> None:
        self._count, self._make = count, make

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, row: int) -> T: ...
    @overload
    def __getitem__(self, row: slice) -> list[T]: ...
    def __getitem__(self, row: int | slice) -> T | list[T]:
        if isinstance(row, slice):
            return [self._make(i) for i in range(self._count)[row]]
        return self._make(range(self._count)[row])


class Index:
    """All samples of one split, as columns in memory that the processes of a host share: what a plan is made from.

    Rows are sorted by shard.

    Args:
        shards: the tars, sorted by name.
        merged: columns of N numbers, see `NUMBERS`, and `sample_keys`, `key_end`, `key_bytes`, `shard_end`.
        sample_rate_hz: of every waveform.
        folder: where what is computed from the index may be kept for all processes.

    Attributes:
        keys: name of each sample, unique.
        entries: `Entry` of each sample.
        shard: number of each sample's tar in `shards`.
        shard_end: (S,) row after the last one of each shard.
        num_samples, label_length, ctc_frames: (N,) uint32, see `Entry`.
        sample_keys: (N,) uint64, the hash of each name, for keyed randomness.
    """

    def __init__(self, shards: list[Path], merged: Columns, sample_rate_hz: int, folder: Path) -> None:
        self.shards, self.sample_rate_hz, self.folder = shards, sample_rate_hz, folder
        self._columns = merged
        self.sample_keys: NDArray[np.uint64] = merged["sample_keys"]
        self.shard_end: NDArray[np.int64] = merged["shard_end"]
        self.num_samples: NDArray[np.uint32] = merged["num_samples"]
        self.label_length: NDArray[np.uint32] = merged["label_length"]
        self.ctc_frames: NDArray[np.uint32] = merged["ctc_frames"]
        self._numbers = [(merged[name], BLOCK if name in _BLOCKS else 1) for name in NUMBERS]
        self._ends: list[int] = self.shard_end.tolist()
        self.keys: Sequence[str] = Rows(len(self), self._key)
        self.entries: Sequence[Entry] = Rows(len(self), self._entry)
        self.shard: Sequence[int] = Rows(len(self), self._shard)

    def __len__(self) -> int:
        return len(self.sample_keys)

    def _key(self, row: int) -> str:
        ends = self._columns["key_end"]
        start = int(ends[row - 1]) if row else 0
        return bytes(self._columns["key_bytes"][start : int(ends[row])]).decode()

    def _entry(self, row: int) -> Entry:
        return Entry(self._key(row), *[column.item(row) * unit for column, unit in self._numbers])

    def _shard(self, row: int) -> int:
        return bisect.bisect_right(self._ends, row)

    def row(self, key: str) -> int:
        """Row of a sample.

        Raises:
            KeyError: there is none of that name.
        """
        for row in np.flatnonzero(self.sample_keys == np.uint64(make_key(key))).tolist():
            if self._key(row) == key:
                return row
        raise KeyError(key)

    @property
    def digest(self) -> str:
        """Hash of all that a plan or a batch depends on."""
        content = f"{self.sample_rate_hz} {self._columns.facts['digest']}"
        return hashlib.blake2b(content.encode(), digest_size=8).hexdigest()

    @property
    def hours(self) -> float:
        return float(self.num_samples.sum(dtype=np.int64)) / self.sample_rate_hz / 3600

    @classmethod
    def load(cls, folder: Path, sample_rate_hz: int) -> "Index":
        """Open the merged index of a folder of shards, or make it from the indexes beside them.

        The folder is listed each time; the indexes are read only if it is not the one that was merged.

        Raises:
            UserError: no shards, a shard without index or an index without shard, an index that is damaged or of
                another format, a key that occurs twice. A shard that was cut short is no error here: what is missing
                is found, and left out, where it is read.
        """
        shards, listing = _listing(folder)
        cache = columns.folder_for(folder)
        facts = {"what": "index", "format": MERGED_FORMAT, "listing": listing}
        merged = columns.shared(cache / f"index{columns.ENDING}", facts, lambda: _merge(shards))
        return cls(shards, merged, sample_rate_hz, cache)


def _listing(folder: Path) -> tuple[list[Path], str]:
    """The shards of a folder, and a hash that changes with any of their names or indexes."""
    tars, indexes = set(), {}
    if folder.is_dir():
        with os.scandir(folder) as found:
            for file in found:
                if file.name.endswith(".tar"):
                    tars.add(file.name)
                elif file.name.endswith(".index.jsonl"):
                    status = file.stat()
                    indexes[file.name] = (status.st_size, status.st_mtime_ns)
    if not tars:
        raise UserError(f"{show(folder)}: holds no shards (*.tar); run `./launch.sh prepare CONFIG` first")
    names = sorted(tars)
    lost = sorted(name for name in indexes if name.replace(".index.jsonl", ".tar") not in tars)
    if lost:
        raise UserError(
            f"{show(folder / lost[0])}: the shard of this index is missing (one of {len(lost)}); put it back, or run "
            "`./launch.sh prepare CONFIG` again"
        )
    for name in names:
        path = index_path(folder / name)
        if path.name not in indexes:
            raise UserError(
                f"{show(folder / name)}: has no index beside it ({path.name}); run `./launch.sh prepare` again"
            )
    listing = json.dumps(sorted(indexes.items()))
    return [folder / name for name in names], hashlib.blake2b(listing.encode(), digest_size=16).hexdigest()


def _merge(shards: list[Path]) -> Columns:
    """Read the index of every shard."""
    started = told = time.monotonic()
    keys = bytearray()
    # Grown in place: with a list of arrays to be joined there would be two copies of everything at the end.
    numbers = {name: array("I") for name in NUMBERS}
    lengths, hashed = array("I"), array("Q")
    counts = []
    for i, shard in enumerate(shards):
        names, columns_of_shard = _read_index(shard)
        encoded = [name.encode() for name in names]
        keys += b"".join(encoded)
        lengths.extend(map(len, encoded))
        hashed.extend(map(make_key, names))
        for name in NUMBERS:
            numbers[name].frombytes(columns_of_shard[name].tobytes())
        counts.append(len(names))
        if time.monotonic() - told > PROGRESS_SECONDS:
            told = time.monotonic()
            log.info("merging indexes: %d of %d", i + 1, len(shards))
    arrays: dict[str, NDArray[Any]] = {name: np.frombuffer(numbers[name], dtype=np.uint32) for name in NUMBERS}
    arrays["sample_keys"] = np.frombuffer(hashed, dtype=np.uint64)
    arrays["key_end"] = np.cumsum(np.frombuffer(lengths, dtype=np.uint32), dtype=np.int64)
    arrays["key_bytes"] = np.frombuffer(keys, dtype=np.uint8)
    arrays["shard_end"] = np.cumsum(np.array(counts, dtype=np.int64))
    merged = Columns(arrays, {})
    _refuse_twins(shards, merged)
    digest = hashlib.blake2b(digest_size=16)
    for name in ("key_bytes", "key_end", "shard_end", "audio_crc32", "text_crc32", *PLANNED):
        digest.update(arrays[name].data)
    if (seconds := time.monotonic() - started) > 1:
        log.info("merged the indexes of %d shards in %.0f s", len(shards), seconds)
    return Columns(arrays, {"digest": digest.hexdigest()})


PLANNED = ("num_samples", "label_length", "ctc_frames")
"""Numbers of an entry that a plan depends on."""


def _read_index(shard: Path) -> tuple[list[str], dict[str, NDArray[np.uint32]]]:
    """Keys and numbers of one shard."""
    path = index_path(shard)
    try:
        with path.open(encoding="utf-8") as file:  # not `splitlines`, for which some signs in a key end the line
            head, *lines = file
        header = json.loads(head)
        rows = json.loads(f"[{','.join(lines)}]")
        if header["format"] != FORMAT:
            raise ValueError(f"format {header['format']!r}, wanted {FORMAT}")
        if len(rows) != header["samples"]:
            raise ValueError(f"holds {len(rows)} samples, wanted {header['samples']}")
        names = [row["key"] for row in rows]
        if not all(isinstance(name, str) for name in names):
            raise TypeError("a key is no text")
        numbers = {name: np.array([row[name] for row in rows], dtype=np.int64) for name in NUMBERS}
        for name in _BLOCKS:
            if (numbers[name] % BLOCK).any():
                raise ValueError(f"{name} is no multiple of {BLOCK}")
            numbers[name] //= BLOCK
        for name in NUMBERS:
            if len(rows) and not 0 <= numbers[name].min() <= numbers[name].max() < 2**32:
                raise ValueError(f"{name} is out of range")
        return names, {name: values.astype(np.uint32) for name, values in numbers.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        cure = "delete the folder and run `./launch.sh prepare` again"
        raise UserError(f"{show(path)}: is damaged or of another format ({error}); {cure}") from error
    except OSError as error:
        raise UserError(f"{show(path)}: cannot be read: {error.strerror}; mend it and go on") from error


def _refuse_twins(shards: list[Path], merged: Columns) -> None:
    """Raises: UserError: two samples have one name."""
    order = np.sort(merged["sample_keys"])
    twins = np.unique(order[1:][order[1:] == order[:-1]])
    del order
    if not len(twins):
        return
    index = Index(shards, merged, 1, Path())
    names = sorted(index.keys[row] for row in np.flatnonzero(np.isin(merged["sample_keys"], twins)).tolist())
    twice = sorted({a for a, b in itertools.pairwise(names) if a == b})[:3]
    if twice:
        raise UserError(f"{show(shards[0].parent)}: the keys {', '.join(twice)} occur twice; prepare it anew")
