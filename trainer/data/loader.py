"""The batches of one rank, in the order of the plan, loaded ahead by threads.

Threads, since nearly all of the work (reading, decoding, checksums, resampling, features) is done by compiled code that
lets go of the interpreter: docs/decisions/0009.
"""

import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from threading import Barrier

import torch

from trainer.data.dataset import Batch, Dataset
from trainer.data.plan import MicroBatch, Step, mine
from trainer.place import DATA, being_read, board

AHEAD = 4
"""Micro-batches that each worker prepares in advance."""


class Loader:
    """Iterates over steps: yields each with the list of batches that this rank runs in it.

    Steps are drawn while the ones before them are still trained, so that the workers go on over the end of an epoch.

    Args:
        dataset: one split.
        steps: of the plan, those still to do; of one epoch or of many.
        rank, world_size: whose micro-batches.
        rounds: micro-batches of a rank a step.
        num_workers: threads; 0 loads when a batch is asked for.

    Attributes:
        waited_seconds: time the last step waited for data.
    """

    def __init__(
        self,
        dataset: Dataset,
        steps: Iterable[Step],
        rank: int,
        world_size: int,
        rounds: int,
        num_workers: int,
    ) -> None:
        self.dataset = dataset
        self.rounds = rounds
        self.num_workers = num_workers
        self.waited_seconds = 0.0
        self._drawn: deque[Step] = deque()

        def wanted() -> Iterator[MicroBatch | None]:
            for step in steps:
                self._drawn.append(step)
                yield from mine(step, rank, world_size, rounds)

        self._wanted = wanted()

    def __iter__(self) -> Iterator[tuple[Step, list[Batch]]]:
        board.at(DATA, describe=being_read)
        start = time.perf_counter()
        batches = self._ahead() if self.num_workers else self._one_by_one()
        while group := list(islice(batches, self.rounds)):
            self.waited_seconds = time.perf_counter() - start
            yield self._drawn.popleft(), group
            board.at(DATA, board.place.step + 1, being_read)
            start = time.perf_counter()

    def _load(self, micro_batch: MicroBatch | None) -> Batch:
        return self.dataset.dummy() if micro_batch is None else self.dataset.load(micro_batch)

    def _one_by_one(self) -> Iterator[Batch]:
        for micro_batch in self._wanted:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)  # resampling rounds differently on more: the ledger must not depend on it
            try:
                batch = self._load(micro_batch)
            finally:
                torch.set_num_threads(threads)
            yield batch

    def _ahead(self) -> Iterator[Batch]:
        pool, all_started = ThreadPoolExecutor(self.num_workers, "loader"), Barrier(self.num_workers + 1)

        def start() -> None:
            torch.set_num_threads(1)  # of this thread, and of all that torch sees for the first time later
            torch.get_num_threads()  # torch sees this one
            all_started.wait()

        try:
            threads = torch.get_num_threads()
            for _ in range(self.num_workers):
                pool.submit(start)
            all_started.wait()
            torch.set_num_threads(threads)
            coming = (pool.submit(self._load, micro_batch) for micro_batch in self._wanted)
            loading: deque[Future[Batch]] = deque(islice(coming, AHEAD * self.num_workers))
            while loading:
                batch = loading.popleft().result()
                loading.extend(islice(coming, 1))
                yield batch
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
