"""The plan: which samples make up every step of an epoch, as a pure function.

A plan depends on (seed, epoch, index, batching settings, excluded keys) and on nothing else: no world size, no worker
count, no state that was reached by reading data. So a resumed run goes on at any step by computing it, on any number
of processes. A step has up to G micro-batches; rank r of N takes numbers r, r + N, ...

Length buckets: the shards are shuffled, then windows of shards are pooled, cut into buckets of similar duration,
shuffled inside each and filled into micro-batches up to a budget of padded seconds. All micro-batches of a step come
from one bucket, so that no rank waits for a long one. What is left of a bucket joins the next, and what is left of a
window the next window, so at most one step of an epoch is short.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt

from trainer import keyed
from trainer.config import Config


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """What one forward pass sees."""

    epoch: int
    step: int
    """Number of the step inside the epoch."""
    number: int
    """Place inside the step: rank = number mod world size."""
    samples: tuple[int, ...]
    """Rows of the index."""
    speeds: tuple[float, ...]
    """Speed factor of each sample."""
    cost: float
    """What a device computes: padded seconds."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one optimizer step sees, over all ranks."""

    micro_batches: tuple[MicroBatch, ...]
    counts: dict[str, float]
    """Totals over the step: samples, tokens, seconds (of sound), padded_seconds (what the devices compute)."""
    last: bool = False
    """Whether the epoch ends with it."""


@dataclass(frozen=True)
class Rejection:
    """A sample the plan cannot use, and why."""

    key: str
    reason: str


class Plan(Protocol):
    """Order of one split. Plans of other kinds (streams of text, generated data) give the same answers."""

    @property
    def micro_batches_per_step(self) -> int: ...

    @property
    def rejections(self) -> Sequence[Rejection]: ...

    def epoch(self, epoch: int, excluded: Collection[str] = ()) -> Sequence[Step]:
        """The steps of an epoch; `excluded` keys are left out."""
        ...


class BucketedConfig(Config):
    """Batches of similar length under a budget of padded seconds."""

    kind: Literal["bucketed"] = "bucketed"
    micro_batch_seconds: PositiveFloat = 60.0
    """Most padded seconds of sound in one forward pass on one device."""
    micro_batches_per_step: PositiveInt = 2
    """G: the global batch is up to this many micro-batches, spread over however many processes there are."""
    num_buckets: PositiveInt = 20
    """Length classes with equally many samples; more of them pad less and mix less."""
    window_shards: PositiveInt = 16
    """Shards that are pooled: reading stays inside a window."""
    max_seconds: float | None = Field(None, gt=0)
    """Leave longer samples out; null: those above `micro_batch_seconds`."""
    min_seconds: float = Field(0.1, ge=0)
    """Leave shorter samples out."""


PlanConfig = BucketedConfig
"""A second kind makes it a union: `Annotated[BucketedConfig | ..., Field(discriminator="kind")]`."""


@dataclass(frozen=True)
class Lengths:
    """What a plan needs to know of each sample, as columns of N."""

    keys: Sequence[str]
    sample_keys: NDArray[np.uint64]
    shard: NDArray[np.int32]
    tokens: NDArray[np.int64]
    seconds: NDArray[np.float64]
    """(S, N): duration at each of S speeds."""
    feasible: NDArray[np.bool_]
    """(S, N): whether the sample can be learnt at each speed (CTC: enough output frames)."""
    speeds: tuple[float, ...] = (1.0,)
    num_drawn: int | None = None
    """So many of the speeds, from the first on, are drawn; the rest are there to fall back on. None: all are."""


class BucketedPlan:
    """See the module's text.

    Args:
        config: budget, buckets, windows.
        lengths: columns of the index.
        seed: of the run.
        shuffle: false keeps one order for ever (validation and test: sorted by length, no speed drawn).
    """

    def __init__(self, config: BucketedConfig, lengths: Lengths, seed: int, shuffle: bool = True) -> None:
        self.config = config
        self.lengths = lengths
        self.seed = seed
        self.shuffle = shuffle
        self._plain = lengths.speeds.index(1.0)
        longest = min(config.max_seconds or config.micro_batch_seconds, config.micro_batch_seconds)
        seconds = lengths.seconds[self._plain]
        reasons = {
            f"longer than {longest:g} s": seconds > longest,
            f"shorter than {config.min_seconds:g} s": seconds < config.min_seconds,
            "more labels than output frames (CTC)": ~lengths.feasible[self._plain],
        }
        self.rejections = [
            Rejection(lengths.keys[int(row)], reason) for reason, bad in reasons.items() for row in np.flatnonzero(bad)
        ]
        self._usable = ~np.logical_or.reduce(list(reasons.values()))
        usable_seconds = np.sort(seconds[self._usable])
        cuts = np.arange(1, config.num_buckets) * len(usable_seconds) // config.num_buckets
        self._edges = usable_seconds[cuts] if len(usable_seconds) else usable_seconds

    @property
    def micro_batches_per_step(self) -> int:
        return self.config.micro_batches_per_step

    def epoch(self, epoch: int, excluded: Collection[str] = ()) -> list[Step]:
        lengths = self.lengths
        usable = self._usable.copy()
        if excluded:
            left_out = set(excluded)
            usable &= np.array([k not in left_out for k in lengths.keys])
        speed = self._draw_speeds(epoch)
        seconds = np.take_along_axis(lengths.seconds, speed[None], 0)[0]
        if not self.shuffle:
            order = np.argsort(seconds, kind="stable")
            batches, rest = self._fill(order[usable[order]].tolist(), seconds)
            groups = self._group([*batches, *([rest] if rest else [])])
        else:
            groups = self._shuffled(epoch, usable, seconds)
        steps = [self._step(epoch, i, group, speed, seconds) for i, group in enumerate(groups)]
        return steps[:-1] + [replace(step, last=True) for step in steps[-1:]]

    def _draw_speeds(self, epoch: int) -> NDArray[np.int64]:
        """Number of the speed of each sample: 1 where the drawn one leaves too little time or takes too much."""
        lengths = self.lengths
        plain = np.full(len(lengths.keys), self._plain, dtype=np.int64)
        if not self.shuffle or len(lengths.speeds) == 1:
            return plain
        choices = lengths.num_drawn or len(lengths.speeds)
        draw = keyed.uniform(lengths.sample_keys, self.seed, epoch, "speed") * choices
        drawn = draw.astype(np.int64)
        fits = np.take_along_axis(lengths.feasible, drawn[None], 0)[0]
        fits &= np.take_along_axis(lengths.seconds, drawn[None], 0)[0] <= self.config.micro_batch_seconds
        return np.where(fits, drawn, plain)

    def _shuffled(self, epoch: int, usable: NDArray[np.bool_], seconds: NDArray[np.float64]) -> list[list[list[int]]]:
        """Steps as lists of micro-batches as lists of rows."""
        size = self.config.micro_batches_per_step
        num_shards = int(self.lengths.shard.max(initial=-1)) + 1
        shards = keyed.permutation(num_shards, self.seed, epoch, "shards")
        order = np.argsort(keyed.hashes(self.lengths.sample_keys, self.seed, epoch, "order"), kind="stable")
        bucket = np.searchsorted(self._edges, seconds, side="right")
        window_of_shard = np.empty(num_shards, dtype=np.int64)
        window_of_shard[shards] = np.arange(num_shards) // self.config.window_shards
        window = window_of_shard[self.lengths.shard]

        steps: list[list[list[int]]] = []
        left: list[int] = []  # rows that did not fill a step
        for w in range(int(window.max(initial=-1)) + 1):
            here: list[list[list[int]]] = []
            pool = np.concatenate([np.array(left, dtype=np.int64), order[(window[order] == w) & usable[order]]])
            left = []
            for b in range(self.config.num_buckets):
                rows = [*left, *pool[bucket[pool] == b].tolist()]
                batches, rest = self._fill(rows, seconds)
                full = len(batches) - len(batches) % size
                here += self._group(batches[:full])
                left = [row for batch in batches[full:] for row in batch] + rest
            steps += [here[i] for i in keyed.permutation(len(here), self.seed, epoch, w, "steps")]
        batches, rest = self._fill(left, seconds)
        return steps + self._group([*batches, *([rest] if rest else [])])

    def _fill(self, rows: Sequence[int], seconds: NDArray[np.float64]) -> tuple[list[list[int]], list[int]]:
        """Cut rows into micro-batches up to the budget: (full ones, the open rest)."""
        batches: list[list[int]] = []
        batch: list[int] = []
        longest = 0.0
        for row in rows:
            wanted = max(longest, float(seconds[row]))
            if batch and wanted * (len(batch) + 1) > self.config.micro_batch_seconds:
                batches.append(batch)
                batch, wanted = [], float(seconds[row])
            batch.append(row)
            longest = wanted
        return batches, batch

    def _group(self, batches: Sequence[list[int]]) -> list[list[list[int]]]:
        size = self.config.micro_batches_per_step
        return [list(batches[i : i + size]) for i in range(0, len(batches), size)]

    def _step(
        self,
        epoch: int,
        number: int,
        group: list[list[int]],
        speed: NDArray[np.int64],
        seconds: NDArray[np.float64],
    ) -> Step:
        speeds = self.lengths.speeds
        rows = [row for batch in group for row in batch]
        micro_batches = tuple(
            MicroBatch(
                epoch,
                number,
                m,
                tuple(batch),
                tuple(speeds[speed[row]] for row in batch),
                float(seconds[batch].max() * len(batch)),
            )
            for m, batch in enumerate(group)
        )
        return Step(
            micro_batches,
            {
                "samples": float(len(rows)),
                "tokens": float(self.lengths.tokens[rows].sum()),
                "seconds": float(seconds[rows].sum()),
                "padded_seconds": sum(m.cost for m in micro_batches),
            },
        )


def mine(step: Step, rank: int, world_size: int, rounds: int) -> list[MicroBatch | None]:
    """The micro-batches of one rank, one a round; None where it runs a dummy."""
    own: list[MicroBatch | None] = list(step.micro_batches[rank::world_size])
    return own + [None] * (rounds - len(own))
