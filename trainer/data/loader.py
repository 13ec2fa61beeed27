"""The batches of one rank, in the order of the plan, loaded ahead by worker processes."""

import os
import signal
import time
from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from trainer.data.dataset import Batch, Dataset
from trainer.data.plan import MicroBatch, Step, mine
from trainer.signals import STOP_SIGNALS, die_with_parent

AHEAD = 4
"""Micro-batches that each worker prepares in advance."""


def _start_worker(_: int) -> None:
    die_with_parent(os.getppid())
    torch.set_num_threads(1)
    for name in STOP_SIGNALS:  # the rank decides when to stop
        signal.signal(name, signal.SIG_IGN)


class _MicroBatches(TorchDataset[Batch]):
    def __init__(self, dataset: Dataset, wanted: Sequence[MicroBatch | None]) -> None:
        self.dataset = dataset
        self.wanted = wanted

    def __len__(self) -> int:
        return len(self.wanted)

    def __getitem__(self, i: int) -> Batch:
        micro_batch = self.wanted[i]
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # resampling rounds differently on more: the ledger must not depend on it
        try:
            return self.dataset.dummy() if micro_batch is None else self.dataset.load(micro_batch)
        finally:
            torch.set_num_threads(threads)


class Loader:
    """Iterates over the steps of an epoch: yields the list of batches that this rank runs in each.

    Args:
        dataset: one split.
        steps: of the plan, those still to do.
        rank, world_size: whose micro-batches.
        rounds: micro-batches of a rank a step.
        num_workers: processes; 0 loads here.

    Attributes:
        waited_seconds: time the last step waited for data.
    """

    def __init__(
        self,
        dataset: Dataset,
        steps: Sequence[Step],
        rank: int,
        world_size: int,
        rounds: int,
        num_workers: int,
    ) -> None:
        self.rounds = rounds
        self.num_steps = len(steps)
        self.waited_seconds = 0.0
        wanted = [m for step in steps for m in mine(step, rank, world_size, rounds)]
        self._loader: DataLoader[Batch] = DataLoader(
            _MicroBatches(dataset, wanted),
            batch_size=None,
            shuffle=False,
            num_workers=num_workers,
            prefetch_factor=AHEAD if num_workers else None,
            worker_init_fn=_start_worker,
            multiprocessing_context="fork" if num_workers else None,
        )

    def __iter__(self) -> Iterator[list[Batch]]:
        batches = iter(self._loader)
        for _ in range(self.num_steps):
            start = time.perf_counter()
            group = [next(batches) for _ in range(self.rounds)]
            self.waited_seconds = time.perf_counter() - start
            yield group
