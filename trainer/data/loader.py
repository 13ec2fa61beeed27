"""The batches of one rank, in the order of the plan, loaded ahead by worker processes."""

import os
import signal
import time
from collections import deque
from collections.abc import Iterable, Iterator
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from trainer.data.dataset import Batch, Dataset
from trainer.data.plan import MicroBatch, Step, mine
from trainer.place import DATA, Reading, board, own, take
from trainer.signals import STOP_SIGNALS, die_with_parent

AHEAD = 4
"""Micro-batches that each worker prepares in advance."""
SMALL_BYTES = 1 << 16


def _start_worker(number: int, reading: Reading) -> None:
    die_with_parent(os.getppid())
    take(reading.slot(number))
    torch.set_num_threads(1)
    for name in STOP_SIGNALS:  # the rank decides when to stop
        signal.signal(name, signal.SIG_IGN)


class _Small(NamedTuple):
    """A small tensor on its way from a worker: inside the message, where torch would open a file of shared memory."""

    values: NDArray[Any]


class _MicroBatches(TorchDataset[Batch]):
    def __init__(self, dataset: Dataset) -> None:
        self.dataset = dataset

    def __getitem__(self, micro_batch: MicroBatch | None) -> Batch:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # resampling rounds differently on more: the ledger must not depend on it
        try:
            batch = self.dataset.dummy() if micro_batch is None else self.dataset.load(micro_batch)
        finally:
            torch.set_num_threads(threads)
        return batch if get_worker_info() is None else {name: _packed(value) for name, value in batch.items()}


def _packed(value: Any) -> Any:
    small = isinstance(value, torch.Tensor) and value.nbytes <= SMALL_BYTES and value.dtype != torch.bfloat16
    return _Small(value.numpy()) if small else value


def _unpacked(value: Any) -> Any:
    return torch.from_numpy(value.values) if isinstance(value, _Small) else value


def _as_it_is(batch: Any) -> Any:
    """Instead of torch's conversion, which walks through every list of a batch that is complete already."""
    return batch


class Loader:
    """Iterates over steps: yields each with the list of batches that this rank runs in it.

    Steps are drawn while the ones before them are still trained, so that the workers go on over the end of an epoch.

    Args:
        dataset: one split.
        steps: of the plan, those still to do; of one epoch or of many.
        rank, world_size: whose micro-batches.
        rounds: micro-batches of a rank a step.
        num_workers: processes; 0 loads here.

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
        self.rounds = rounds
        self.waited_seconds = 0.0
        self._drawn: deque[Step] = deque()
        self._reading = Reading(num_workers) if num_workers else own

        def wanted() -> Iterator[MicroBatch | None]:
            for step in steps:
                self._drawn.append(step)
                yield from mine(step, rank, world_size, rounds)

        self._loader: DataLoader[Batch] = DataLoader(
            _MicroBatches(dataset),
            batch_size=None,
            collate_fn=_as_it_is,
            sampler=wanted(),
            num_workers=num_workers,
            prefetch_factor=AHEAD if num_workers else None,
            worker_init_fn=partial(_start_worker, reading=self._reading),
            multiprocessing_context="fork" if num_workers else None,
        )

    def __str__(self) -> str:
        """What is being read."""
        return str(self._reading)

    def __iter__(self) -> Iterator[tuple[Step, list[Batch]]]:
        board.at(DATA, describe=self.__str__)
        start = time.perf_counter()
        batches = iter(self._loader)  # starts the workers, and whoever asks for the first step waits for them
        while group := list(islice(batches, self.rounds)):
            self.waited_seconds = time.perf_counter() - start
            yield self._drawn.popleft(), [{name: _unpacked(value) for name, value in b.items()} for b in group]
            board.at(DATA, board.place.step + 1, self.__str__)
            start = time.perf_counter()
