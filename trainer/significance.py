"""How far an error rate can be believed, and whether two of them differ by more than chance."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer import keyed
from trainer.metrics import align, edits

DRAWS = 10_000
BLOCK_NUMBERS = 1 << 20
"""Numbers that are drawn at a time."""
GAP = 2
"""Correct words in a row, of both, that part two segments (Gillick & Cox 1989)."""

Floats = NDArray[np.float64]


def bootstrap(
    errors: Sequence[float], lengths: Sequence[float], clusters: Sequence[str] | None = None, seed: int = 0
) -> tuple[float, float]:
    """A 95 % interval of sum(errors) / sum(lengths): percentiles over samples drawn with replacement.

    Args:
        errors, lengths: of each utterance.
        clusters: what is drawn as a whole, such as its speaker; None: each utterance on its own.

    Source: Bisani & Ney 2004.
    """
    units = _summed(np.array([errors, lengths], float), clusters)
    rates = np.concatenate([sums[0] / np.maximum(sums[1], 1e-9) for sums in _resampled(units, seed)])
    low, high = np.percentile(rates, (2.5, 97.5))
    return float(low), float(high)


@dataclass(frozen=True)
class Difference:
    """An error rate minus another one on the same utterances."""

    utterances: int
    rates: tuple[float, float]
    """Ours and theirs."""
    interval: tuple[float, float]
    """95 %, of ours minus theirs, by paired bootstrap."""
    p_bootstrap: float
    """Two-sided: twice the smaller share of samples in which the difference has the other sign, or none."""
    segments: int
    """In which at least one of the two errs."""
    z: float
    """Of the mean difference of errors a segment; negative where ours are fewer."""
    p_segments: float
    """Two-sided, of the matched-pairs test."""


@dataclass(frozen=True)
class Paired:
    """Two hypotheses for each reference, as lists of words or other units."""

    references: list[list[str]]
    ours: list[list[str]]
    theirs: list[list[str]]
    clusters: Sequence[str] | None = None
    """Of each utterance, see `bootstrap`."""

    def compare(self, by_cluster: bool = False, seed: int = 0) -> Difference:
        """Compare both.

        Args:
            by_cluster: draw whole clusters.
            seed: of the draws.

        Source: Bisani & Ney 2004 (paired bootstrap); Gillick & Cox 1989, Pallett et al. 1990 (matched pairs of
        segments).
        """
        pairs = list(zip(self.references, self.ours, self.theirs, strict=True))
        errors = np.array([[edits(r, a).total, edits(r, b).total, len(r)] for r, a, b in pairs], float).T
        units = _summed(errors, self.clusters if by_cluster else None)
        drawn = np.concatenate([(s[0] - s[1]) / np.maximum(s[2], 1e-9) for s in _resampled(units, seed)])
        low, high = np.percentile(drawn, (2.5, 97.5))
        length = max(errors[2].sum(), 1e-9)
        found = np.array([s for r, a, b in pairs for s in segments(r, a, b)], float).reshape(-1, 2)
        z, p = matched_pairs(found[:, 0] - found[:, 1])
        return Difference(
            len(pairs),
            (float(errors[0].sum() / length), float(errors[1].sum() / length)),
            (float(low), float(high)),
            min(1.0, 2 * float(min((drawn >= 0).mean(), (drawn <= 0).mean()))),
            len(found),
            z,
            p,
        )


def matched_pairs(differences: Floats) -> tuple[float, float]:
    """z and two-sided p of the hypothesis that differences of independent segments have mean 0, by a normal law."""
    if len(differences) < 2 or not differences.any():
        return 0.0, 1.0
    deviation = float(differences.std(ddof=1))
    if deviation == 0:
        return math.copysign(math.inf, differences[0]), 0.0
    z = float(differences.mean()) / (deviation / math.sqrt(len(differences)))
    return z, math.erfc(abs(z) / math.sqrt(2))


def segments(reference: Sequence[str], ours: Sequence[str], theirs: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Errors of both in each stretch that is parted from the next by `GAP` units that both have right.

    Stretches without any error are left out. An inserted unit belongs to the place before the next unit of the
    reference.
    """
    a, b = _errors_at(reference, ours), _errors_at(reference, theirs)
    inside, correct = [0, 0], 0
    for i in range(len(reference) + 1):
        for side, (inserted, wrong) in enumerate((a[i], b[i])):
            inside[side] += inserted
            if inserted:
                correct = 0
            inside[side] += wrong
        if i < len(reference) and not a[i][1] and not b[i][1]:
            correct += 1
        else:
            correct = 0
        if correct >= GAP and any(inside):
            yield inside[0], inside[1]
            inside = [0, 0]
    if any(inside):
        yield inside[0], inside[1]


def _errors_at(reference: Sequence[str], hypothesis: Sequence[str]) -> list[tuple[int, int]]:
    """(inserted before it, whether it is wrong) of each unit of the reference, and of its end."""
    found = [(0, 0)] * (len(reference) + 1)
    i = inserted = 0
    for wanted, got in align(list(reference), list(hypothesis)):
        if not wanted:
            inserted += 1
            continue
        found[i] = (inserted, int(wanted != got))
        i, inserted = i + 1, 0
    found[i] = (inserted, 0)
    return found


def _summed(values: Floats, clusters: Sequence[str] | None) -> Floats:
    """Columns added up by cluster; values: (K, N) -> (K, C)."""
    if clusters is None:
        return values
    _, number = np.unique(np.array(clusters), return_inverse=True)
    return np.stack([np.bincount(number, weights=row) for row in values])


def _resampled(units: Floats, seed: int) -> Iterator[Floats]:
    """Sums over samples drawn with replacement, some at a time; units: (K, N) -> (K, some)."""
    count = units.shape[1]
    at_once = max(1, BLOCK_NUMBERS // count)
    for first in range(0, DRAWS, at_once):
        draws = np.arange(first, min(first + at_once, DRAWS))
        keys = (draws[:, None] * count + np.arange(count)).astype(np.uint64)
        chosen = (keyed.uniform(keys, seed, "bootstrap") * count).astype(np.int64)
        yield units[:, chosen].sum(-1)
