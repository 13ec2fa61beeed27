"""Signals that ask a run to stop, and processes that end with the one that started them. Needs nothing of torch."""

import ctypes
import os
import signal
import time
from types import FrameType
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_SECONDS = 2.0
"""Within this time a further signal is the same request: a scheduler tells the spawner and the ranks, and the spawner
passes it on, so that a rank hears it twice."""
PR_SET_PDEATHSIG = 1


class StopSignals:
    """Catches SIGTERM, SIGUSR1 and SIGINT: the first asks the loop to save and stop, a later one ends at once.

    It may be entered again where it is in force already. Once asked it stays in force, since the process is about to
    end: the same request, heard again at that time, must not take its exit code.

    Attributes:
        received: the first signal that came.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._since = 0.0
        self._old: list[dict[signal.Signals, Any]] = []

    def __enter__(self) -> "StopSignals":
        self._old.append({name: signal.signal(name, self._receive) for name in STOP_SIGNALS})
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # the spawner starts ranks with them blocked
        return self

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self.received is None:
            self.received, self._since = number, time.monotonic()
        elif time.monotonic() - self._since > SAME_SECONDS:
            os._exit(128 + number)

    def __exit__(self, *_: object) -> None:
        old = self._old.pop()
        if self.received is not None and not self._old:
            return
        for name, handler in old.items():
            signal.signal(name, handler)


def die_with_parent(parent: int) -> None:
    """Ask the kernel (Linux) to end this process when `parent`, which started it, ends, however it ends."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before that
        os._exit(1)
