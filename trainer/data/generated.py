"""The plan of samples in memory: a batch is a number of them. And what data sets have in common that follow it.

For data that is made when it is asked for (sample i is a function of the seed and of i), and for any that lies in
memory, such as images. Each epoch is an order of the numbers 0 .. N - 1, drawn by hashes, cut into micro-batches. Where
lengths differ, samples of similar length come together: pools of steps are sorted by length, and their steps shuffled.
"""

import zlib
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt
from torch import Tensor

from trainer import keyed
from trainer.config import Config
from trainer.data.dataset import Batch, Media
from trainer.data.plan import MicroBatch, Rejection, Step, Steps

POOL = 8
"""Steps whose samples are sorted by length together."""


class GeneratedConfig(Config):
    """Batches of a number of samples."""

    kind: Literal["generated"] = "generated"
    micro_batch_samples: PositiveInt = 20
    """Samples of one forward pass on one device."""
    micro_batches_per_step: PositiveInt = 1
    """G: the global batch is up to this many micro-batches, spread over however many processes there are."""


class GeneratedSteps(Steps):
    """The steps of an epoch, cut from its order when they are asked for.

    Args:
        epoch: its number.
        order: of the samples.
        config: sizes.
        frames: of all samples, or of each (N,).
        numbers: which of the steps; None: all.
    """

    def __init__(
        self,
        epoch: int,
        order: NDArray[np.int64],
        config: GeneratedConfig,
        frames: int | NDArray[np.int64],
        numbers: range | None = None,
    ) -> None:
        self._epoch, self._order, self._config, self._frames = epoch, order, config, frames
        size = config.micro_batch_samples * config.micro_batches_per_step
        self._total = -(-len(order) // size)
        self._numbers = range(self._total) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Step: ...
    @overload
    def __getitem__(self, place: slice) -> "GeneratedSteps": ...
    def __getitem__(self, place: int | slice) -> "Step | GeneratedSteps":
        if isinstance(place, slice):
            return GeneratedSteps(self._epoch, self._order, self._config, self._frames, self._numbers[place])
        return self._step(self._numbers[place])

    def __iter__(self) -> Iterator[Step]:
        return map(self._step, self._numbers)

    def _step(self, number: int) -> Step:
        size = self._config.micro_batch_samples
        whole = size * self._config.micro_batches_per_step
        samples = self._order[number * whole :][:whole].tolist()
        parts = [tuple(samples[i : i + size]) for i in range(0, len(samples), size)]
        f = self._frames
        frames = [np.full(len(part), f) if isinstance(f, int) else f[list(part)] for part in parts]
        micro_batches = tuple(
            MicroBatch(self._epoch, number, m, part, (1.0,) * len(part), float(len(part) * lengths.max()))
            for m, (part, lengths) in enumerate(zip(parts, frames, strict=True))
        )
        counts = {"samples": float(len(samples)), "frames": float(sum(int(part.sum()) for part in frames))}
        return Step(micro_batches, counts, last=number == self._total - 1)


class GeneratedPlan:
    """See the module's text.

    Args:
        config: sizes.
        num_samples: N.
        frames: of all samples, or of each (N,).
        seed: of the run.
        shuffle: false keeps them in order (validation and test), which is that of their lengths where those differ.
    """

    rejections: Sequence[Rejection] = ()
    suspicions: Sequence[Rejection] = ()

    def __init__(
        self, config: GeneratedConfig, num_samples: int, frames: int | NDArray[np.int64], seed: int, shuffle: bool
    ) -> None:
        self.config, self.num_samples, self.frames, self.seed, self.shuffle = config, num_samples, frames, seed, shuffle

    @property
    def micro_batches_per_step(self) -> int:
        return self.config.micro_batches_per_step

    def epoch(self, epoch: int, excluded: Collection[str] = ()) -> GeneratedSteps:
        """The steps of an epoch; `excluded` keys, which are numbers of samples, are left out."""
        order = np.arange(self.num_samples)
        if self.shuffle:
            order = keyed.permutation(self.num_samples, self.seed, epoch, "samples")
        if out := [int(key) for key in excluded if key.isdigit()]:
            order = order[~np.isin(order, out)]
        if not isinstance(self.frames, int):
            order = self._by_length(order, epoch)
        return GeneratedSteps(epoch, order, self.config, self.frames)

    def _by_length(self, order: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """Bring samples of similar length together."""
        assert not isinstance(self.frames, int)
        lengths: NDArray[np.int64] = self.frames[order]
        if not self.shuffle:
            return order[np.argsort(lengths, kind="stable")]
        step = self.config.micro_batch_samples * self.config.micro_batches_per_step
        pools = np.arange(len(order)) // (step * POOL)
        order = order[np.lexsort((lengths, pools))]
        whole = len(order) // step * step  # the short step stays the last
        steps = order[:whole].reshape(-1, step)[keyed.permutation(whole // step, self.seed, epoch, "steps")]
        return np.concatenate([steps.reshape(-1), order[whole:]])


class GeneratedDataset:
    """A split whose sample of number i is known from i: see `trainer.data.dataset.Dataset`.

    A subclass gives `tensors`; its batches hold those, beside what every batch holds.

    Args:
        plan: order of the samples.
        identity: what the samples depend on, as a text.
    """

    def __init__(self, plan: GeneratedPlan, identity: str) -> None:
        self.plan = plan
        self.identity = {"samples": f"{plan.num_samples} x {plan.frames}: {identity}"}

    def __len__(self) -> int:
        return self.plan.num_samples

    def tensors(self, samples: NDArray[np.int64]) -> dict[str, Tensor]:
        """Some samples (B,), each name with B rows; the first is what the checksum in the ledger is of."""
        raise TypeError(f"{type(self).__name__} lacks tensors")

    def load(self, micro_batch: MicroBatch) -> Batch:
        """The samples of a micro-batch."""
        tensors = self.tensors(np.array(micro_batch.samples))
        keys = [str(sample) for sample in micro_batch.samples]
        return {
            **tensors,
            "keys": keys,
            "valid": torch.ones(len(keys), dtype=torch.bool),
            "noise_keys": torch.tensor([keyed.key(self.plan.seed, micro_batch.epoch, key) for key in keys]),
            "checksums": [zlib.crc32(row.numpy().tobytes()) for row in next(iter(tensors.values()))],
            "faults": [],
        }

    def dummy(self) -> Batch:
        """One sample that counts 0."""
        batch = self.load(MicroBatch(0, 0, 0, (0,), (1.0,), 0.0))
        return batch | {"keys": [""], "valid": torch.zeros(1, dtype=torch.bool)}

    def media(self, key: str) -> Media:
        """Nothing to hear or see."""
        return Media()
