"""Named numpy arrays in one file that all processes of a host map into memory, so that their pages are there once.

What is costly to compute and the same for every rank (the merged index, the plan of an epoch) is computed by whichever
process comes first, under a lock, and opened by the others. A file: the magic bytes, the length of the header (8 bytes,
little endian), the header as JSON ({"facts", "columns": {name: [dtype, count, offset]}, "bytes"}), then the arrays,
little endian, each at a multiple of 64 bytes. Nothing in it is ever executed.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import mmap
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

log = logging.getLogger(__name__)

MAGIC = b"OSTCOL1\n"
ALIGNMENT = 64
ENDING = ".columns"


@dataclass(frozen=True)
class Columns:
    """Arrays by name, and what they were made from (JSON values)."""

    arrays: Mapping[str, NDArray[Any]]
    facts: Mapping[str, Any]

    def __getitem__(self, name: str) -> NDArray[Any]:
        return self.arrays[name]


def write(path: Path, columns: Columns) -> None:
    """Write a file, whole or not at all.

    Raises:
        OSError: it cannot be written; nothing is left behind.
    """
    arrays = {name: _little_endian(array) for name, array in columns.arrays.items()}
    layout: dict[str, tuple[str, int, int]] = {name: (a.dtype.str, len(a), 0) for name, a in arrays.items()}
    header, room = b"", -1
    while len(header) != room:  # the offsets depend on the length of the header, which depends on the offsets
        room = len(header)
        end = _aligned(len(MAGIC) + 8 + room)
        for name, array in arrays.items():
            layout[name] = (array.dtype.str, len(array), end)
            end = _aligned(end + array.nbytes)
        header = json.dumps({"facts": columns.facts, "columns": layout, "bytes": end}).encode()
        header += b" " * (-len(header) % ALIGNMENT)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(MAGIC + len(header).to_bytes(8, "little") + header)
            for name, array in arrays.items():
                file.seek(layout[name][2])
                file.write(array.data)
            file.truncate(end)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _little_endian(array: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def read(path: Path, facts: Mapping[str, Any]) -> Columns | None:
    """Map a file, or None where there is none, it is of another format or size, or was made from something else.

    Args:
        facts: that it must have been made from; it may hold more of them.
    """
    try:
        with path.open("rb") as file:
            if file.read(len(MAGIC)) != MAGIC:
                return None
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
            if header["bytes"] != os.fstat(file.fileno()).st_size:
                return None
            if any(header["facts"].get(name, ...) != value for name, value in facts.items()):
                return None
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            arrays = {
                name: np.frombuffer(content, np.dtype(dtype), count, offset)
                for name, (dtype, count, offset) in header["columns"].items()
            }
        return Columns(arrays, header["facts"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
        return None


def shared(path: Path, facts: Mapping[str, Any], build: Callable[[], Columns]) -> Columns:
    """Open a file, or make it if it is not there, not whole, or made from something else.

    One process of a host builds it while the others wait. Where nothing can be written (a full disk) each process keeps
    its own copy in memory: nothing here ends a run.

    Args:
        path: its folder is made.
        facts: what it is made from, JSON values.
        build: computes it; its facts are added to those given. It must not call `shared` for the same folder, whose
            lock is held meanwhile.
    """
    if (found := read(path, facts)) is not None:
        return found
    with _locked(path):
        if (found := read(path, facts)) is not None:
            return found
        built = build()
        built = Columns(built.arrays, {**built.facts, **facts})
        try:
            for left in path.parent.glob(f"{path.name}.*.tmp"):  # of a process that was killed
                left.unlink(missing_ok=True)
            write(path, built)
        except OSError as error:
            log.warning("%s could not be written (%s); every process keeps its own copy in memory", path, error)
            return built
        del built  # the pages of the file take its place
        return read(path, facts) or build()


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold the lock of a file; where it cannot be locked, go on without: the work is then done more than once."""
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = stack.enter_context((path.parent / "lock").open("a"))
            fcntl.flock(lock, fcntl.LOCK_EX)
        except OSError as error:
            log.warning("%s cannot be locked: %s", path, error)
        yield


def folder_for(data: Path) -> Path:
    """Where files made from a folder of data are kept: inside it, or in the user's cache if it is read-only."""
    inside = data / ".columns"
    if os.access(inside if inside.exists() else data, os.W_OK):
        return inside
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "ostinato" / hashlib.blake2b(str(data.resolve()).encode(), digest_size=8).hexdigest()


def keep_newest(folder: Path, pattern: str, count: int) -> None:
    """Delete the older files of a kind; processes that have one open keep it."""
    with contextlib.suppress(OSError):
        files = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime_ns)
        for path in files[:-count]:
            path.unlink(missing_ok=True)
