"""Where this process is: in what, since when, of which step, reading which sample. Needs nothing of torch.

The engine says so as it goes; the watchdog and, through a small file, the spawner read it. A process that was ended by
`kill -9` cannot tell any more, its file still does.
"""

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

START, DATA, FORWARD, BACKWARD, COLLECTIVE, VALIDATION, CHECKPOINT, END = PHASES = (
    "start",
    "data",
    "forward",
    "backward",
    "collective",
    "validation",
    "checkpoint",
    "end",
)
WAITING = (BACKWARD, COLLECTIVE)
"""Phases in which a rank waits for others: DeepSpeed reduces gradients while they are computed."""
RECORD_BYTES = 256
NOTES = "OSTINATO_MESSAGES"
"""Environment variable: the folder in which the ranks of a host leave notes for their spawner."""


@dataclass(frozen=True)
class Place:
    """Of one process.

    Attributes:
        step: of the plan, from 1; 0 before the first.
        saved: step of the last checkpoint that this process knows of; -1: none.
        since: when the phase began, on this host's `time.monotonic()`, which its processes share.
    """

    phase: str = START
    step: int = 0
    saved: int = -1
    since: float = 0.0

    def __str__(self) -> str:
        where = self.phase if self.phase in (START, END) else f"{self.phase} of step {self.step}"
        return f"{where} for {time.monotonic() - self.since:.1f} s"


def _nothing() -> str:
    return ""


class Board:
    """The place of this process, and the file that shows it.

    Attributes:
        place: now.
        describe: says more of it, if asked: samples, shards.
    """

    def __init__(self) -> None:
        self.place = Place(since=time.monotonic())
        self.describe: Callable[[], str] = _nothing
        self._file: int | None = None

    def publish(self, folder: Path, rank: int) -> None:
        """From now on show it in a file, too."""
        self._file = os.open(folder / f"place-{rank:05d}", os.O_CREAT | os.O_WRONLY, 0o600)
        self._write()

    def at(self, phase: str, step: int | None = None, describe: Callable[[], str] = _nothing) -> None:
        """Enter a phase, or the next piece of the same one."""
        step = self.place.step if step is None else step
        self.place = Place(phase, step, self.place.saved, time.monotonic())
        self.describe = describe
        self._write()

    def saved(self, step: int) -> None:
        """A checkpoint was written or loaded."""
        self.place = replace(self.place, saved=step)
        self._write()

    def _write(self) -> None:
        if self._file is not None:
            os.pwrite(self._file, json.dumps(asdict(self.place)).encode().ljust(RECORD_BYTES), 0)


board = Board()
"""Of this process."""


def published(folder: Path) -> dict[int, Place]:
    """What the ranks of a host showed last, by rank."""
    found = {}
    for path in folder.glob("place-*"):
        try:
            found[int(path.name[6:])] = Place(**json.loads(path.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):  # just being written
            continue
    return found


def latest_of(places: dict[int, Place]) -> list[int]:
    """The ranks that all others wait for: those that are least far."""
    if not places:
        return []
    least = min(_order(place) for place in places.values())
    return sorted(rank for rank, place in places.items() if _order(place) == least)


def _order(place: Place) -> tuple[int, bool]:
    return place.step, place.phase in WAITING


@dataclass(slots=True)
class Reading:
    """The sample that a thread reads now."""

    shard: str = ""
    key: str = ""


_reading: dict[str, Reading] = {}  # by the name of the thread


@contextlib.contextmanager
def reading() -> Iterator[Reading]:
    """Meanwhile this thread reads the sample that is written into what this gives, one after the other."""
    name = threading.current_thread().name
    _reading[name] = now = Reading()
    try:
        yield now
    finally:
        del _reading[name]


def being_read() -> str:
    """What each thread reads now."""
    found = sorted(_reading.copy().items())
    return "; ".join(
        f"{n.replace('_', ' ')} reads sample {now.key} of shard {now.shard}" for n, now in found if now.key
    )
