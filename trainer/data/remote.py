"""A prepared corpus that lies elsewhere: its folder here is a copy that is filled as it is read, within a size limit.

`data.remote.url` names the folder that holds `corpus.json`, and `data.path` becomes the local copy, on a disk of this
host. `corpus.json`, the indexes and a vocabulary of subwords come at once. A shard comes when it is wanted, or ahead of
that; until then, and after it was removed again to make room for others, an empty file has its name, so that what lists
shards finds all of them. All processes of a host may share the folder: a shard is fetched by one of them, arrives by a
rename, and is never removed while someone has it open.

What lies beside, in `.remote/`: locks, parts of shards that are on their way, and `missing.jsonl`, the account of what
never came.
"""

import contextlib
import fcntl
import json
import logging
import os
import threading
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from queue import Empty, SimpleQueue

from pydantic import PositiveFloat, field_validator

from trainer import keyed
from trainer.config import Config, show
from trainer.data.transfer import TransferError, fetch, open_source, public, wrong_url
from trainer.errors import UserError

log = logging.getLogger(__name__)

STATE = ".remote"
PARALLEL = 4
"""Shards that one process fetches at the same time."""
AGAIN_SECONDS = 300.0
"""A shard that did not come is not asked for again before that: each of its samples would wait for all the tries."""
GIGABYTE = 10**9


class RemoteConfig(Config):
    """A prepared corpus that is read from elsewhere, through a local copy in `data.path`."""

    url: str | None = None
    """Folder that holds corpus.json: http(s)://host/folder, s3://bucket/folder, or `pipe:` and a command with {} for
    the name of a file, as in pipe:ssh host cat /data/speech/{}. Null: the corpus lies in `data.path`."""
    cache_gb: PositiveFloat = 100.0
    """Most that the shards in the local copy take, in units of 1e9 bytes; those unused for longest go first."""

    @field_validator("url", mode="before")
    @classmethod
    def _url_can_be_fetched(cls, url: object) -> object:
        if url is None:
            return None
        # Not as an error of the value, whose text would show it, with whatever secret is in it.
        if not isinstance(url, str):
            raise UserError("data.remote.url: wanted text; write it in quotes, or without a space behind `pipe:`")
        if problem := wrong_url(url):
            raise UserError(f"data.remote.url = {public(url)}: {problem}")
        return url


@dataclass
class Account:
    """What a process has seen of its cache."""

    hits: int = 0
    """Shards that were here when they were wanted."""
    fetched: int = 0
    fetched_bytes: int = 0
    removed: int = 0
    """To make room."""
    exceeded: int = 0
    """Times that there was none to make."""


class Cache:
    """Files of a folder that is elsewhere, on this disk.

    Args:
        folder: of the local copy.
        url: of the other folder.
        sizes: bytes of each file, by its path below the folder: these and no others can be asked for.
        limit: most bytes that they take here. It is exceeded, with a warning, only where all that is here is in use.
        max_open: of the files that `open` gave, so many stay open, and cannot be removed.
    """

    def __init__(self, folder: Path, url: str, sizes: Mapping[str, int], limit: int, max_open: int = 64) -> None:
        self.folder = folder
        self.url = url
        self.sizes = dict(sizes)
        self.limit = limit
        self.max_open = max_open
        self.account = Account()
        self.missing: dict[str, str] = {}
        """Files that did not come, and why, as far as this process knows."""
        self._asked: dict[str, float] = {}
        self._files: OrderedDict[str, FileIO] = OrderedDict()
        (folder / STATE).mkdir(parents=True, exist_ok=True)
        self._source = open_source(self.url)
        self._lock = threading.Lock()
        self._wanted: SimpleQueue[str] = SimpleQueue()
        self._threads: list[threading.Thread] = []

    def open(self, name: str) -> FileIO:
        """A file that is whole, to be read with `os.pread`; it is not removed while it is open.

        It stays open until `max_open` others have been opened and the caller has let go of it.

        Raises:
            TransferError: the file cannot be had; the text is the reason.
        """
        with self._lock:
            if name in self._files:
                self._files.move_to_end(name)
                return self._files[name]
        file = self._take(name)
        self.account.hits += file is not None
        while file is None:  # another process may have removed it before it was opened here
            self._fetch(name)
            file = self._take(name)
        with self._lock:
            self._files[name] = file
            while len(self._files) > self.max_open:
                self._files.popitem(last=False)  # closed once nobody reads it any more
        return file

    def path(self, name: str) -> Path:
        """A file that is whole, and stays so until `max_open` others have been opened.

        Raises:
            TransferError: see `open`.
        """
        self.open(name)
        return self.folder / name

    def prefetch(self, names: Iterable[str]) -> None:
        """Fetch files in the background, in this order; what was asked for before and has not begun is dropped.

        Files that another process is fetching, or that there is no room for, are left out.
        """
        with contextlib.suppress(Empty):
            while True:
                self._wanted.get_nowait()
        names = list(names)
        for name in names:
            self._wanted.put(name)
        while names and len(self._threads) < PARALLEL:
            # Not a pool: it would hold up the end of the process until all is fetched.
            thread = threading.Thread(target=self._work, args=(self._wanted,), daemon=True, name="prefetch")
            thread.start()
            self._threads.append(thread)

    def close(self) -> None:
        """Close what is open; what is being fetched comes to its end."""
        self.prefetch([])
        with self._lock:
            self._files.clear()

    def _work(self, wanted: "SimpleQueue[str]") -> None:
        while True:
            name = wanted.get()
            try:
                self._fetch(name, ahead=True)
            except TransferError:
                pass  # it is on record, and who wants the file is told
            except Exception:
                log.exception("%s: fetching ahead failed", name)

    # --- one file ------------------------------------------------------------------------------------------------

    def _take(self, name: str) -> FileIO | None:
        """A file that is here, locked against removal, and marked as used now."""
        path = self.folder / name
        try:
            file = FileIO(path)
        except FileNotFoundError:
            return None
        fcntl.flock(file, fcntl.LOCK_SH)  # waits for one that is just being removed
        status = os.fstat(file.fileno())
        with contextlib.suppress(OSError):
            if status.st_size and os.path.samestat(status, path.stat()):
                os.utime(file.fileno())
                return file
        file.close()
        return None

    def _is_here(self, name: str) -> bool:
        with contextlib.suppress(OSError):
            return (self.folder / name).stat().st_size > 0
        return False

    def _fetch(self, name: str, ahead: bool = False) -> None:
        """Bring a file here if it is not.

        Raises:
            TransferError: it did not come.
        """
        if name not in self.sizes:
            raise TransferError(f"{name}: is not in corpus.json", final=True)
        if self._is_here(name):
            return
        if name in self.missing and time.monotonic() - self._asked[name] < AGAIN_SECONDS:
            raise TransferError(self.missing[name], final=True)
        with self._locked(name.replace("/", "-"), wait=not ahead) as mine:
            if not mine or self._is_here(name) or not self._make_room(self.sizes[name], name, ahead):
                return
            try:
                received = fetch(self._source, name, self.folder / name, self._part(name), self.sizes[name])
            except TransferError as error:
                self._record(name, str(error))
                raise
        with self._lock:
            self.missing.pop(name, None)
            self.account.fetched += 1
            self.account.fetched_bytes += received

    def _part(self, name: str) -> Path:
        return self.folder / STATE / f"{name.replace('/', '-')}.part"

    def _record(self, name: str, reason: str) -> None:
        with self._lock:
            self.missing[name] = reason
            self._asked[name] = time.monotonic()
        log.warning("%s of %s never came: %s; its samples count as missing", name, public(self.url), reason)
        row = {"shard": name, "reason": reason, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())}
        with contextlib.suppress(OSError), (self.folder / STATE / "missing.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")

    @contextlib.contextmanager
    def _locked(self, name: str, wait: bool = True) -> Iterator[bool]:
        """Hold a lock that all processes share.

        Yields:
            whether it is held; without waiting it may be another's.
        """
        with (self.folder / STATE / f"{name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            yield True

    # --- room ----------------------------------------------------------------------------------------------------

    def _make_room(self, size: int, name: str, ahead: bool) -> bool:
        """Remove what was unused for longest until `size` more bytes fit; false if that cannot be and is no must."""
        with self._locked("room"):
            here: list[tuple[float, Path, int]] = []
            used = size
            for other in self.sizes:
                if other != name and self._part(other).exists():
                    used += self.sizes[other]  # on its way
                with contextlib.suppress(OSError):
                    status = (self.folder / other).stat()
                    if status.st_size:
                        here.append((status.st_mtime, self.folder / other, status.st_size))
                        used += status.st_size
            for _, path, bytes_here in sorted(here):
                if used <= self.limit:
                    break
                if self._remove(path):
                    used -= bytes_here
            if used > self.limit:
                used -= self._drop_parts(name)
            if used > self.limit:
                if ahead:
                    return False
                if not self.account.exceeded:
                    log.warning(
                        "%s: takes more than data.remote.cache_gb = %g for a while, since all that is there is in use",
                        show(self.folder),
                        self.limit / GIGABYTE,
                    )
                self.account.exceeded += 1
            # Counts from now on, also in the eyes of other processes.
            self._part(name).touch()
            return True

    def _remove(self, path: Path) -> bool:
        """Replace a shard by an empty file, unless someone has it open."""
        try:
            handle = os.open(path, os.O_RDONLY)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            put_empty(path, self.folder / STATE)
        except BlockingIOError:
            return False
        finally:
            os.close(handle)
        self.account.removed += 1
        return True

    def _drop_parts(self, name: str) -> int:
        """Remove parts that nobody goes on with."""
        freed = 0
        for other in self.sizes:
            part = self._part(other)
            if other != name and part.exists():
                with self._locked(other.replace("/", "-"), wait=False) as mine:
                    if mine:
                        part.unlink(missing_ok=True)
                        freed += self.sizes[other]
        return freed


class Ahead:
    """Which files an epoch will want next, in the order in which the plan reads them.

    Args:
        names: of the shards, in the order of the index.
        seed: of the run.
        window_shards: of the plan; None: it reads from all shards all the time.
    """

    def __init__(self, names: list[str], seed: int, window_shards: int | None) -> None:
        self.names = names
        self.seed = seed
        self.window_shards = window_shards or len(names)
        self.shuffled = window_shards is not None
        self._at = (-1, -1)

    def __call__(self, epoch: int, shards: Iterable[int]) -> list[str] | None:
        """The files of this window and of the next one, where a new window has begun; else None.

        Args:
            shards: numbers of those that a micro-batch reads.
        """
        order = self._order(epoch)
        place = {shard: i for i, shard in enumerate(order)}
        window = max(place[shard] for shard in shards) // self.window_shards
        if (epoch, window) <= self._at or (self._at != (-1, -1) and not self.shuffled):
            return None
        self._at = (epoch, window)
        start = window * self.window_shards
        ahead = order[start : start + 2 * self.window_shards]
        if self.shuffled and start + self.window_shards >= len(order):
            ahead += self._order(epoch + 1)[: self.window_shards]
        return [self.names[shard] for shard in dict.fromkeys(ahead)]

    def _order(self, epoch: int) -> list[int]:
        if not self.shuffled:
            return list(range(len(self.names)))
        return keyed.permutation(len(self.names), self.seed, epoch, "shards").tolist()  # as BucketedPlan has it


def put_empty(path: Path, state: Path) -> None:
    """Put an empty file in the place of a shard that is not here."""
    temporary = state / f"{path.parent.name}-{path.name}.empty{os.getpid()}"
    temporary.touch()
    temporary.replace(path)
