"""The plan: which samples make up every step of an epoch, as a pure function.

A plan depends on (seed, epoch, index, batching settings, excluded keys) and on nothing else: no world size, no worker
count, no state that was reached by reading data. So a resumed run goes on at any step by computing it, on any number
of processes. A step has up to G micro-batches; rank r of N takes numbers r, r + N, ...

Here is what every plan gives; `trainer.data.buckets` is that of utterances, `trainer.data.stream` that of long texts.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol


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
    lr_share: float = 1.0
    """The step's share of the learning rate: half as long a window of a stream moves the weights half as far."""


@dataclass(frozen=True)
class Rejection:
    """A sample the plan cannot use, or finds odd, and why."""

    key: str
    reason: str
    detail: str = ""


class Steps(Sequence[Step]):
    """The steps of an epoch, or a part of them."""

    def totals(self) -> dict[str, float]:
        """The counts of all steps, added up."""
        counts: dict[str, float] = {}
        for step in self:
            for name, value in step.counts.items():
                counts[name] = counts.get(name, 0.0) + value
        return counts

    def num_micro_batches(self) -> int:
        """Of all steps together."""
        return sum(len(step.micro_batches) for step in self)

    def worst(self) -> list[MicroBatch]:
        """Micro-batches that may need the most memory, none twice: that with the most padded seconds, that with the
        longest clips, that with the most samples."""
        every = [m for step in self for m in step.micro_batches]
        keys: list[Callable[[MicroBatch], float]] = [
            lambda m: m.cost,
            lambda m: m.cost / len(m.samples),
            lambda m: len(m.samples),
        ]
        return list(dict.fromkeys(max(every, key=key) for key in keys)) if every else []


class Plan(Protocol):
    """Order of one split. Plans of other kinds (streams of text, generated data) give the same answers."""

    @property
    def micro_batches_per_step(self) -> int: ...

    @property
    def rejections(self) -> Sequence[Rejection]:
        """What the plan leaves out."""
        ...

    @property
    def suspicions(self) -> Sequence[Rejection]:
        """What the plan uses and someone should look at."""
        ...

    def epoch(self, epoch: int, excluded: Collection[str] = ()) -> Steps:
        """The steps of an epoch; `excluded` keys are left out."""
        ...


def mine(step: Step, rank: int, world_size: int, rounds: int) -> list[MicroBatch | None]:
    """The micro-batches of one rank, one a round; None where it runs a dummy."""
    own: list[MicroBatch | None] = list(step.micro_batches[rank::world_size])
    return own + [None] * (rounds - len(own))
