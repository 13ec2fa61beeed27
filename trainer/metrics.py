"""Metrics as (sum, count) pairs, so that they add over micro-batches and ranks, and error rates by alignment."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import kaldialign
from torch import Tensor


@dataclass(frozen=True)
class Mean:
    """A quotient that is divided only after everything was added."""

    sum: float | Tensor
    count: float


@dataclass(frozen=True)
class Loss:
    """One term of the loss over a micro-batch.

    The engine divides `sum` by the whole step's count of `unit`, which the plan knows beforehand; `count` is what this
    micro-batch really held, for validation and logs.
    """

    sum: Tensor
    """Scalar, differentiable."""
    count: float
    unit: str
    """What is counted: a name in `Step.counts`, such as "samples" or "tokens"."""
    weight: float = 1.0


PARTS = ("insertions", "deletions", "substitutions")


class Edits(NamedTuple):
    """Errors of a hypothesis against its reference (Levenshtein alignment)."""

    insertions: int
    deletions: int
    substitutions: int
    length: int
    """Tokens of the reference."""

    @property
    def total(self) -> int:
        return self.insertions + self.deletions + self.substitutions

    def metrics(self, name: str) -> dict[str, Mean]:
        """As metrics: NAME, the error rate, and its three parts."""
        parts = zip(PARTS, (self.insertions, self.deletions, self.substitutions), strict=True)
        return {
            name: Mean(self.total, self.length),
            **{f"{name}_{part}": Mean(errors, self.length) for part, errors in parts},
        }


def error_rates(metrics: Mapping[str, Any]) -> dict[str, tuple[Any, ...]]:
    """The metrics that are error rates, those that come with their three parts: (rate, ins, del, sub) by name."""
    names = {name: (name, *(f"{name}_{part}" for part in PARTS)) for name in metrics}
    return {n: tuple(metrics[x] for x in all_four) for n, all_four in names.items() if set(all_four) <= metrics.keys()}


def edits(reference: list[str], hypothesis: list[str]) -> Edits:
    """Fewest insertions, deletions and substitutions that turn the reference into the hypothesis."""
    counts = kaldialign.edit_distance(reference, hypothesis)
    return Edits(counts["ins"], counts["del"], counts["sub"], len(reference))


def align(reference: list[str], hypothesis: list[str]) -> list[tuple[str, str]]:
    """Pairs of aligned tokens; an empty string where one side has none."""
    return [(a, b) for a, b in kaldialign.align(reference, hypothesis, "")]


def add(totals: dict[str, Mean], more: dict[str, Mean]) -> None:
    """Add metrics into `totals`, in float64."""
    for name, mean in more.items():
        old = totals.get(name, Mean(0.0, 0.0))
        totals[name] = Mean(float(old.sum) + float(mean.sum), old.count + float(mean.count))
