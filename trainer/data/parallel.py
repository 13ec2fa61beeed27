"""Work over the shards of a corpus: spread over processes, with progress, and left in order when a signal comes."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import wait as wait_for_connection
from types import FrameType
from typing import TypeVar

import rich.console
import rich.progress
import torch

from trainer.errors import RequeueError, UserError
from trainer.signals import STOP_SIGNALS

PLAIN_LINE_SECONDS = 10.0
SIGNAL_SECONDS = 0.2
"""A signal waits so long at most."""

T = TypeVar("T")
R = TypeVar("R")


def results(function: Callable[[T], R], tasks: Sequence[T], processes: int) -> Generator[tuple[int, R], None, None]:
    """(number of the task, what the function returned for it) as they are finished.

    Raises:
        UserError: a worker process was killed.
    """
    if processes <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: the sums must come out the same
        try:
            for number, task in enumerate(tasks):
                yield number, function(task)
        finally:
            torch.set_num_threads(threads)
        return
    others = set(multiprocessing.active_children())
    # Forked: a spawned worker spends seconds on importing torch, and wants a main module that can be imported.
    context = multiprocessing.get_context("fork" if "fork" in multiprocessing.get_all_start_methods() else None)
    pool = ProcessPoolExecutor(processes, context, _start_worker, ())
    with signals_put_off() as take_signal:
        try:
            running: dict[Future[R], int] = {pool.submit(function, t): n for n, t in enumerate(tasks)}
            while running:
                take_signal()
                for future in wait(running, SIGNAL_SECONDS, FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool as error:
            raise UserError(
                "a worker process was killed, most often because the memory was used up; finished shards are kept, run "
                "the command again with fewer processes"
            ) from error
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in set(multiprocessing.active_children()) - others:
                worker.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def signals_put_off() -> Iterator[Callable[[], None]]:
    """Keep signals until they are asked for: an exception that a handler raises inside the pool's code would leave one
    of its locks held for ever.

    Yields:
        what lets the first one that came go to its own handler, which may raise.
    """
    if threading.current_thread() is not threading.main_thread():
        yield lambda: None  # only the main thread has handlers
        return
    came: list[int] = []
    handlers = {n: signal.signal(n, lambda number, _: came.append(number)) for n in STOP_SIGNALS}

    def take() -> None:
        if came and callable(handler := handlers[signal.Signals(number := came.pop())]):
            handler(number, None)

    try:
        yield take
        take()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def _start_worker() -> None:
    """Leave signals to the parent, and go when it has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    torch.set_num_threads(1)
    process = multiprocessing.parent_process()
    assert process is not None

    def follow() -> None:
        # Workers forked later hold an end of this pipe too, so it closes after they have gone: the last one first.
        wait_for_connection([process.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


@contextlib.contextmanager
def stop_by_exception(what: str) -> Iterator[None]:
    """SIGTERM and SIGUSR1 become an exception, so that workers and half-written files are cleared away."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise RequeueError(f"{what} was stopped by a signal; finished shards are kept, run it again to go on")

    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may set handlers
        return
    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Display:
    """How far it is: a bar on a terminal, elsewhere a plain line every ten seconds."""

    def __init__(self, console: rich.console.Console) -> None:
        self.console = console
        # No refresh thread: workers are forked, and a lock that it holds would stay locked in them.
        self.bar = rich.progress.Progress(console=console, auto_refresh=False) if console.is_terminal else None
        self.bars: dict[str, rich.progress.TaskID] = {}
        self.last = time.monotonic()

    def __enter__(self) -> "Display":
        if self.bar:
            self.bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar:
            self.bar.stop()

    def __call__(self, what: str, done: int, total: int) -> None:
        if self.bar is not None:
            if what not in self.bars:
                self.bars[what] = self.bar.add_task(what, total=total)
            self.bar.update(self.bars[what], completed=done, refresh=True)
        elif done >= total or time.monotonic() - self.last > PLAIN_LINE_SECONDS:
            self.last = time.monotonic()
            print(f"{what}: {done:,} of {total:,} ({100 * done // max(total, 1)} %)", flush=True)
