"""The ranks of one host: started together, told of signals, ended together.

DeepSpeed's own front end passes no signals on and leaves orphans behind. Each rank here dies with the process that
started it (the kernel sees to it), the first one that fails ends the others, and what came of it is one `Outcome`. A
mistake of the user is noticed by the ranks, mostly by all of them, and told once: they leave their messages to the
spawner, which knows nothing of torch and therefore starts them at once.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from trainer.errors import EXIT_DONE, EXIT_OUR_FAULT, EXIT_REQUEUE, EXIT_USER_MISTAKE
from trainer.place import NOTES, Place, board, latest_of, published
from trainer.signals import SAME_SECONDS, STOP_SIGNALS, die_with_parent

GRACE_SECONDS = 30.0
"""Time that the others have to end after one rank has saved and ended."""
AFTER_FAILURE_SECONDS = 3.0
"""Time that the others have to end after one rank failed."""
CAUSE_SECONDS = 1.0
"""Time in which the cause must show after a rank has lost another one."""
POLL_SECONDS = 0.05
SHOWN = 4
"""Ranks that a message names."""
STORE = "OSTINATO_STORE"
PARENT = "OSTINATO_PARENT"
GPU_DEVICES = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")
"""Without one of these there is no GPU, and torch, which takes seconds to import, need not be asked."""
OUTSIDE = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)
"""Signals that come from elsewhere; by any other a process ends for a reason of its own."""


@dataclass(frozen=True)
class Outcome:
    """What came of one attempt.

    Attributes:
        code: exit code; 128 + n for a signal n.
        step: that was at work when it failed.
        saved: step of the newest checkpoint that a rank knew of; -1: none.
        error: what failed, in words that are the same if it happens again; empty if the cause came from outside (a
            signal, a lost host, the network).
        text: for the user.
        messages: what the ranks had to tell the user.
        began: false if hosts were asked and too few of them answered.
    """

    code: int
    step: int = 0
    saved: int = -1
    error: str = ""
    text: str = ""
    messages: tuple[str, ...] = field(default=())
    began: bool = True


class Job(Protocol):
    """Something that was started and ends."""

    def poll(self) -> Outcome | None:
        """What came of it, once everything has ended; to be called often, since it does what there is to do."""
        ...

    def signal(self, number: int) -> None:
        """Pass a signal to every rank; a second one ends them at once."""
        ...

    def close(self) -> None:
        """End whatever is left."""
        ...


def default_processes() -> int:
    """One process a GPU, or one in all."""
    if not any(Path(path).exists() for path in GPU_DEVICES):
        return 1
    import torch

    return max(1, torch.cuda.device_count())


class HostJob:
    """The ranks of this host.

    Args:
        arguments: a verb that enters `StopSignals`, and what follows it.
        nproc: processes on this host.
        first_rank: number of the first of them.
        world_size: of the whole job; None: they are alone.
        environment: on top of this process's; where the ranks of several hosts meet.
    """

    def __init__(
        self,
        arguments: list[str],
        nproc: int,
        first_rank: int = 0,
        world_size: int | None = None,
        environment: dict[str, str] | None = None,
    ) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="ostinato-"))
        alone = world_size is None
        self._first = first_rank
        variables = os.environ | (environment or {}) | {NOTES: str(self._folder), PARENT: str(os.getpid())}
        if alone:  # a file is enough to meet on one host: no port to choose, nothing that listens
            variables[STORE] = str(self._folder / "store")
            variables.setdefault("GLOO_SOCKET_IFNAME", "lo")
        variables["WORLD_SIZE"] = str(nproc if world_size is None else world_size)
        variables["LOCAL_WORLD_SIZE"] = str(nproc)
        variables.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
        self._ranks: list[subprocess.Popen[bytes]] = []
        self._code = 0
        self._deadline: float | None = None
        self._signalled: float | None = None
        self._doubt: float | None = None
        self._failure = Outcome(EXIT_DONE)
        # A rank inherits this and takes signals from where it enters `StopSignals`: one that comes before waits.
        signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            for local in range(nproc):
                place = {"RANK": str(first_rank + local), "LOCAL_RANK": str(local)}
                self._ranks.append(start(arguments, variables | place, stdin=subprocess.DEVNULL))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)

    def poll(self) -> Outcome | None:
        running = [rank for rank in self._ranks if rank.poll() is None]
        ended_badly = not running and any(rank.returncode for rank in self._ranks)
        if not self._code and (ended_badly or self._has_failed()):
            self._note_failure()
            if self._code in (EXIT_REQUEUE, EXIT_USER_MISTAKE):  # these two are mostly everybody's
                self._deadline = time.monotonic() + GRACE_SECONDS
            else:
                self.fail()
        if self._deadline is not None and time.monotonic() > self._deadline:
            for rank in running:
                rank.kill()
        if running:
            return None
        return self._told(self._failure)

    def _has_failed(self) -> bool:
        """Whether a rank has failed; one that only lost another one waits a moment for the cause to be known."""
        if any(not note["lost"] for note in self._notes()):
            return True  # to end may take it seconds
        lost = {note["rank"] for note in self._notes()}
        failed = {self._first + i for i, rank in enumerate(self._ranks) if rank.returncode}
        if failed and failed <= lost:
            self._doubt = self._doubt or time.monotonic()
            return time.monotonic() - self._doubt > CAUSE_SECONDS
        return bool(failed)

    def _note_failure(self) -> None:
        """What the first failure was; the others are looked at before they are ended."""
        codes = {self._first + i: rank.returncode for i, rank in enumerate(self._ranks) if rank.returncode}
        # A rank that a signal ended or that found a mistake is the cause, and connections that broke thereby are not.
        number, code = min(
            codes.items(),
            key=lambda item: (item[1] != EXIT_USER_MISTAKE, item[1] > 0, item[0]),
            default=(0, EXIT_OUR_FAULT),
        )
        places = published(self._folder)
        place = places.get(number, Place())
        step, where = place.step, str(place)
        self._code = code if code > 0 else 128 - code
        error, how = f"exit code {code}", f"ended with exit code {code}"
        if code < 0:
            name = signal.Signals(-code).name
            error, how = "" if -code in OUTSIDE else name, f"was ended by {name}"
        elif notes := self._notes():
            failure = min(notes, key=lambda note: (note["lost"], note["time"]))
            number, error, how = failure["rank"], failure["error"], f"failed ({failure['text']})"
            step, where = failure["step"], failure["place"]
        text = f"rank {number} {how} in {where}" + self._places({number, *codes})
        if self._code in (EXIT_REQUEUE, EXIT_USER_MISTAKE):
            text, error = "", ""
        self._failure = Outcome(self._code, step, error=error, text=text)

    def _places(self, without: set[int]) -> str:
        """Where the ranks are that all wait for, of those that have not failed."""
        places = {rank: place for rank, place in published(self._folder).items() if rank not in without}
        return "".join(f"; rank {rank} was in {places[rank]}" for rank in latest_of(places)[:SHOWN])

    def _notes(self) -> list[dict[str, Any]]:
        """What ranks told of what ends them."""
        found = []
        for path in self._folder.glob("failure-*"):
            try:
                found.append(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError):  # it was killed while it wrote
                continue
        return found

    def _told(self, outcome: Outcome) -> Outcome:
        if not self._folder.is_dir():
            return outcome
        messages = dict.fromkeys(p.read_text(encoding="utf-8") for p in sorted(self._folder.glob("message-*")))
        saved = max((p.saved for p in published(self._folder).values()), default=-1)
        return Outcome(outcome.code, outcome.step, saved, outcome.error, outcome.text, tuple(messages))

    def signal(self, number: int) -> None:
        now = time.monotonic()
        if self._signalled is None:
            self._signalled = now
        for rank in self._ranks:
            if rank.poll() is None:
                rank.send_signal(number)
        if now - self._signalled > SAME_SECONDS:  # a rank that waits in C++ code would not notice
            self._deadline = now

    def fail(self) -> None:
        """End the ranks: something failed, here or elsewhere."""
        if not self._code:
            self._code = EXIT_OUR_FAULT
            self._failure = Outcome(EXIT_OUR_FAULT, text=self._places(set()).removeprefix("; "))
        if self._deadline is None or self._code in (EXIT_REQUEUE, EXIT_USER_MISTAKE):
            self._deadline = time.monotonic() + AFTER_FAILURE_SECONDS
            for rank in self._ranks:
                if rank.poll() is None:
                    rank.send_signal(signal.SIGTERM)

    def close(self) -> None:
        for rank in self._ranks:
            if rank.poll() is None:
                rank.kill()
            rank.wait()
        shutil.rmtree(self._folder, ignore_errors=True)


def start(arguments: list[str], environment: dict[str, str], stdin: int | None = None) -> subprocess.Popen[bytes]:
    """Start `python -m trainer ARGUMENTS`, in a session of its own, so that Ctrl-C reaches it once, through us."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.Popen(command, env=environment, stdin=stdin, start_new_session=True)


@contextmanager
def catching_signals() -> Iterator[list[int]]:
    """Catch stop signals and do nothing.

    Yields:
        those that came so far.
    """
    came: list[int] = []
    old = {name: signal.signal(name, lambda number, _: came.append(number)) for name in STOP_SIGNALS}
    try:
        yield came
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)


def wait(job: Job, came: list[int], passed: int = 0) -> Outcome:
    """Wait until a job has ended; pass signals on as they come.

    Args:
        came: of `catching_signals`.
        passed: how many of them are not for this job.
    """
    while (outcome := job.poll()) is None:
        while passed < len(came):
            job.signal(came[passed])
            passed += 1
        time.sleep(POLL_SECONDS)
    return outcome


def story(config: str, overrides: list[str]) -> int:
    """Prepare, train, evaluate and report, one after the other; a signal goes to the one at work, and no other follows.

    Returns:
        the exit code of the first verb that did not end with 0; 128 + n for a signal n.
    """
    name = config.replace("/", "-")
    data = [text for text in overrides if not text.startswith("nproc=")]
    passed = 0
    with catching_signals() as came:
        for arguments in (
            ["prepare", config, *data],
            ["train", config, *overrides],
            ["evaluate", name],
            ["report", name],
        ):
            process = start(arguments, os.environ | {PARENT: str(os.getpid())})
            try:
                while (code := process.poll()) is None:
                    for number in came[passed:]:
                        process.send_signal(number)
                    passed = len(came)
                    time.sleep(POLL_SECONDS)
            finally:
                process.kill()
                process.wait()
            if code or came:
                return (code if code >= 0 else 128 - code) or EXIT_REQUEUE
    return 0


# What a rank tells


def tell(message: str) -> None:
    """Say what the user did wrong; a rank leaves that to its spawner, which says it once."""
    rank = int(os.environ.get("RANK", "0"))
    if (folder := notes()) is not None:
        (folder / f"message-{rank:05d}").write_text(message, encoding="utf-8", errors="backslashreplace")
    else:
        print(f"rank {rank}: {message}" if rank else message, file=sys.stderr)


def notes() -> Path | None:
    """The folder that the spawner of this rank reads."""
    folder = os.environ.get(NOTES)
    return Path(folder) if folder and Path(folder).is_dir() else None


def tell_failure(error: str, text: str, lost: bool = False) -> None:
    """In a rank: what ends it.

    Args:
        error: comparable, once numbers are left out; empty if the cause came from outside.
        text: for the user.
        lost: it is another rank that failed, and this one only noticed.
    """
    if (folder := notes()) is None:
        return
    rank = int(os.environ.get("RANK", "0"))
    comparable = re.sub(r"0x[0-9a-f]+|\d+", "#", error)
    place = board.place
    note = {"rank": rank, "error": comparable, "text": text, "lost": lost, "time": time.time()}
    note |= {"step": place.step, "place": str(place)}
    temporary = folder / f"note-{rank:05d}"
    temporary.write_text(json.dumps(note), encoding="utf-8")
    temporary.replace(folder / f"failure-{rank:05d}")  # the spawner acts upon it


def follow_parent() -> None:
    """In a process that was started here: end when the one that started it does, even if that is killed."""
    if (parent := os.environ.pop(PARENT, None)) is not None:
        die_with_parent(int(parent))
