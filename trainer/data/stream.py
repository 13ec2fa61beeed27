"""The plan of a long text that is read on and on: a number of streams side by side, cut into windows.

The text is cut into R equal pieces, the streams. A step is the next window of all of them, and micro-batch m holds the
m-th part of the streams in every step, so a state that is carried belongs to the number of a micro-batch. Each token of
the text is predicted once an epoch, the first of a stream from the token before it. How long a window is may vary, as
hashes of (seed, epoch, number of the window) say.

Source: Zaremba et al. 2014, arXiv:1409.2329 (streams); Merity et al. 2018, arXiv:1708.02182, section 5 (windows of
varying length).
"""

import zlib
from collections.abc import Collection, Iterator, Sequence
from functools import lru_cache
from typing import Literal, overload

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from trainer import keyed
from trainer.config import Config
from trainer.data.dataset import Batch, Media
from trainer.data.plan import MicroBatch, Rejection, Step, Steps

SHORTEST = 5
"""Tokens of a window whose length is drawn, at least."""
NOTHING = -100
"""Target where there is no token to predict: what torch's losses leave out."""


class StreamConfig(Config):
    """Windows of contiguous streams."""

    kind: Literal["stream"] = "stream"
    micro_batch_streams: PositiveInt = 20
    """Streams of one forward pass on one device."""
    micro_batches_per_step: PositiveInt = 1
    """G: the text is cut into G times so many streams, spread over however many processes there are."""
    window: PositiveInt = 35
    """Tokens of each stream a step, through which the gradient goes back."""
    jitter: float = Field(0.0, ge=0)
    """Standard deviation of the length of a window, in training; the learning rate of a step is in proportion to its
    length. 0: all are equal, and the learning rate is as it is."""
    half_share: float = Field(0.05, ge=0, le=1)
    """Where there is jitter, the share of windows that are half as long."""
    evaluation_streams: PositiveInt = 10
    """Streams of validation and test. Each begins without a state: 1 has the whole text in one, and takes longest."""


class StreamSteps(Steps):
    """The steps of an epoch, made when they are asked for.

    Args:
        plan: of which they are.
        epoch: its number.
        numbers: which of the steps; None: all.
    """

    def __init__(self, plan: "StreamPlan", epoch: int, numbers: range | None = None) -> None:
        self._plan, self._epoch = plan, epoch
        self._numbers = range(len(plan.edges(epoch)) - 1) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Step: ...
    @overload
    def __getitem__(self, place: slice) -> "StreamSteps": ...
    def __getitem__(self, place: int | slice) -> "Step | StreamSteps":
        if isinstance(place, slice):
            return StreamSteps(self._plan, self._epoch, self._numbers[place])
        return self._step(self._numbers[place])

    def __iter__(self) -> Iterator[Step]:
        return map(self._step, self._numbers)

    def _step(self, number: int) -> Step:
        plan = self._plan
        edges = plan.edges(self._epoch)
        start, stop = int(edges[number]), int(edges[number + 1])
        micro_batches = tuple(
            MicroBatch(self._epoch, number, m, part, (1.0,) * len(part), float(len(part) * (stop - start)))
            for m, part in enumerate(plan.parts)
        )
        tokens = (np.minimum(stop, plan.lengths) - start).sum()
        counts = {"samples": float(len(plan.lengths)), "tokens": float(tokens)}
        share = (stop - start) / plan.config.window if plan.varies else 1.0
        return Step(micro_batches, counts, last=number == len(edges) - 2, lr_share=share)


class StreamPlan:
    """See the module's text.

    Args:
        config: sizes.
        num_tokens: N, of the text.
        seed: of the run.
        training: false takes the streams of an evaluation, and windows of equal length.

    Attributes:
        starts, lengths: of the streams in the text, (R,); lengths differ by one at most.
        parts: the streams of each micro-batch.
        varies: whether the windows differ in length.
    """

    rejections: Sequence[Rejection] = ()
    suspicions: Sequence[Rejection] = ()

    def __init__(self, config: StreamConfig, num_tokens: int, seed: int, training: bool) -> None:
        self.config, self.num_tokens, self.seed = config, num_tokens, seed
        self.varies = training and config.jitter > 0
        wanted = config.micro_batch_streams * config.micro_batches_per_step if training else config.evaluation_streams
        streams = min(wanted, num_tokens)
        borders = np.arange(streams + 1) * num_tokens // max(streams, 1)
        self.starts, self.lengths = borders[:-1], np.diff(borders)
        parts = np.array_split(np.arange(streams), config.micro_batches_per_step)
        self.parts = [tuple(part.tolist()) for part in parts if len(part)]
        self._edges = lru_cache(maxsize=4)(self._cut)

    @property
    def micro_batches_per_step(self) -> int:
        return self.config.micro_batches_per_step

    def epoch(self, epoch: int, excluded: Collection[str] = ()) -> StreamSteps:
        """The steps of an epoch; a stream has no part that could be left out, so `excluded` changes nothing."""
        return StreamSteps(self, epoch)

    def edges(self, epoch: int) -> NDArray[np.int64]:
        """Where the windows of an epoch begin inside each stream, and where the last one ends: (S + 1,)."""
        return self._edges(epoch if self.varies else 0)

    def _cut(self, epoch: int) -> NDArray[np.int64]:
        window, longest = self.config.window, int(self.lengths.max(initial=0))
        if not self.varies:
            return np.append(np.arange(0, longest, window), longest)
        shortest = min(SHORTEST, window)
        drawn = keyed.table(np.arange(-(-longest // shortest)), 3, self.seed, epoch, "windows")
        mean = np.where(drawn[:, 0] < self.config.half_share, window / 2, window)
        normal = np.sqrt(-2 * np.log1p(-drawn[:, 1])) * np.cos(2 * np.pi * drawn[:, 2])  # Box & Muller 1958
        ends = np.cumsum(np.maximum(np.rint(mean + self.config.jitter * normal).astype(np.int64), shortest))
        return np.concatenate([[0], ends[ends < longest], [longest]])


class StreamDataset:
    """A text of N tokens in streams: see `trainer.data.dataset.Dataset`.

    A batch holds `inputs` and `targets` (B, T) int64, of which the second is the first a token later (streams that are
    a token shorter have no target at the very end), and `units`, as given.

    Args:
        plan: of the text.
        tokens: (N,), may lie on the disk.
        start: the token that stands before the first one.
        identity: what the tokens are, as texts.
        units: what else the text is measured in, as so many for each token.
    """

    def __init__(
        self,
        plan: StreamPlan,
        tokens: NDArray[np.integer],
        start: int,
        identity: dict[str, str],
        units: dict[str, float],
    ) -> None:
        self.plan, self.tokens, self.start, self.identity, self.units = plan, tokens, start, identity, units

    def __len__(self) -> int:
        return len(self.plan.lengths) * (len(self.plan.edges(0)) - 1)

    def load(self, micro_batch: MicroBatch) -> Batch:
        """The window of a step of some streams."""
        plan, streams = self.plan, np.array(micro_batch.samples)
        first, end = plan.edges(micro_batch.epoch)[micro_batch.step : micro_batch.step + 2].tolist()
        rows = np.full((len(streams), end - first + 1), self.start, np.int64)
        targets = np.full((len(streams), end - first), NOTHING, np.int64)
        for row, target, stream in zip(rows, targets, streams, strict=True):
            place, count = int(plan.starts[stream]) + first, min(end, int(plan.lengths[stream])) - first
            before = min(place, 1)  # nothing stands before the text
            row[1 - before : count + 1] = self.tokens[place - before : place + count]
            target[:count] = row[1 : count + 1]
        keys = [f"{stream}.{first}" for stream in streams.tolist()]
        return {
            "inputs": torch.from_numpy(rows[:, :-1]),
            "targets": torch.from_numpy(targets),
            "keys": keys,
            "valid": torch.ones(len(keys), dtype=torch.bool),
            "noise_keys": torch.tensor([keyed.key(plan.seed, micro_batch.epoch, key) for key in keys]),
            "checksums": [zlib.crc32(row.tobytes()) for row in rows],
            "faults": [],
            "units": self.units,
        }

    def dummy(self) -> Batch:
        """One token that counts 0."""
        token = torch.full((1, 1), self.start)
        nothing = {"keys": [""], "checksums": [0], "faults": [], "noise_keys": torch.zeros(1, dtype=torch.long)}
        return {
            **nothing,
            "valid": torch.zeros(1, dtype=torch.bool),
            "inputs": token,
            "targets": torch.full_like(token, NOTHING),
            "units": self.units,
        }

    def media(self, key: str) -> Media:
        """Nothing to hear or see."""
        return Media()
