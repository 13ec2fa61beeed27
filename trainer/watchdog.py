"""The watchdog of a rank: ends it, with a reason and stack traces, when it is late.

The deadline is that of the job: from the moment at which something stops until every process has ended. A rank that is
late itself is ended first, so that it can say why; the ones that wait for it come after that.
"""

import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

from trainer.errors import EXIT_OUR_FAULT
from trainer.place import WAITING, board

LATE = 0.7
"""Share of the deadline after which a rank that is at work is late."""
LATE_WAITING = 0.8
"""... one that waits for others: then those have had their say. Collectives time out at the same time."""
STDERR = 2
STACKS = signal.SIGUSR2
"""Asks a process for its stack traces."""
FOREIGN = ("TORCHELASTIC_RUN_ID", "CROSS_RANK")
"""Environment variables of launchers (torchrun, DeepSpeed's) that leave ranks behind when they are killed."""

log = logging.getLogger(__name__)


def show_stacks_when_asked() -> None:
    """Write the stacks of all threads to stderr at SIGUSR2, also while C++ code is at work."""
    faulthandler.register(STACKS, file=STDERR, all_threads=True)


class Watchdog(threading.Thread):
    """Looks every second, or ten times in a short deadline, where this process is.

    Args:
        rank: of this process.
        deadline_seconds: of the job.
        tell: called before the process is ended, with what was late, and whether it was waiting for others.
    """

    def __init__(self, rank: int, deadline_seconds: float, tell: Callable[[str, bool], None]) -> None:
        super().__init__(name="watchdog", daemon=True)
        self.rank, self.deadline, self.tell = rank, deadline_seconds, tell
        self._over = threading.Event()
        self._parent = os.getppid() if any(name in os.environ for name in FOREIGN) else None

    def __enter__(self) -> "Watchdog":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self.join()
        faulthandler.cancel_dump_traceback_later()

    def run(self) -> None:
        while not self._over.wait(min(1.0, self.deadline / 40)):
            # If code that holds the interpreter lets this thread not run at all, this one, in C, ends the process.
            faulthandler.dump_traceback_later(self.deadline * LATE_WAITING, exit=True, file=STDERR)
            if self._parent is not None and os.getppid() != self._parent:
                log.error("the launcher of rank %d is gone: the rank ends", self.rank)
                os._exit(EXIT_OUR_FAULT)
            place = board.place
            share = LATE_WAITING if place.phase in WAITING else LATE
            if time.monotonic() - place.since > share * self.deadline:
                self._end()

    def _end(self) -> None:
        place = board.place
        waits = " (there it waits for other ranks)" if place.phase in WAITING else ""
        more = board.describe()
        print(
            f"rank {self.rank} is late: in {place}{waits}; launch.deadline_seconds = {self.deadline:g}"
            + (f"; {more}" if more else ""),
            file=sys.stderr,
            flush=True,
        )
        faulthandler.dump_traceback(file=STDERR, all_threads=True)
        self.tell(f"late in {place.phase}", place.phase in WAITING)
        os._exit(EXIT_OUR_FAULT)
