"""N-gram models by interpolated modified Kneser-Ney smoothing, counted in arrays and written as ARPA.

A unit is whatever the caller says: a word, a character, a piece of a word. Sentences begin with `<s>` and end with
`</s>`; `<unk>` stands for all that was not counted.

Source: Chen & Goodman 1998, TR-10-98, section 3 (modified Kneser-Ney, all orders interpolated); Heafield et al. 2013 (a
sentence's beginning keeps its raw counts, and the unigrams are interpolated with a uniform distribution over the
vocabulary).
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

UNKNOWN, BEGIN, END = "<unk>", "<s>", "</s>"
SPECIAL = (UNKNOWN, BEGIN, END)
NEVER = -99.0
"""Base-10 logarithm that ARPA files give to what is never predicted."""
FALLBACK = (0.5, 1.0, 1.5)
"""Discounts where the counts of counts give none, as in a small text."""
Ids = NDArray[np.int64]
Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """All different n-grams of one length, and of each:"""

    prefix: Ids
    """the number of its first n - 1 units, among those of the length below;"""
    suffix: Ids
    """that of its last n - 1;"""
    word: Ids
    """its last unit;"""
    begins: NDArray[np.bool_]
    """whether it begins a sentence;"""
    raw: Ids
    """how often it occurs."""


@dataclass(frozen=True)
class Ngram:
    """An estimated model: of each length the n-grams that are kept.

    Attributes:
        words: the vocabulary, the three special units first.
        prefixes, last: per length, of each n-gram the number of its first units in the length below, and its last one.
        log_probabilities, log_backoffs: per length, in nats; a backoff is that of the n-gram as a context.
        kept: per length, whether an n-gram was not pruned.
        discounts: per length, what is taken from counts of 1, of 2, of 3 and more.
        units: how many were counted, ends of sentences included.
    """

    words: list[str]
    prefixes: list[Ids]
    last: list[Ids]
    log_probabilities: list[Numbers]
    log_backoffs: list[Numbers]
    kept: list[NDArray[np.bool_]]
    discounts: list[tuple[float, ...]]
    units: int

    @property
    def order(self) -> int:
        return len(self.last)

    @property
    def counts(self) -> list[int]:
        """N-grams of each length that are kept."""
        return [int(kept.sum()) for kept in self.kept]

    def write(self, path: Path) -> None:
        """Write the model as ARPA, whole or not at all."""
        lines = ["\\data\\", *(f"ngram {n}={count}" for n, count in enumerate(self.counts, 1)), ""]
        names = [""]
        for n in range(1, self.order + 1):
            lines.append(f"\\{n}-grams:")
            pairs = zip(self.prefixes[n - 1].tolist(), self.last[n - 1].tolist(), strict=True)
            names = [f"{names[p]} {self.words[w]}" if n > 1 else self.words[w] for p, w in pairs]
            log_p = (self.log_probabilities[n - 1] / math.log(10)).tolist()
            backoff = (self.log_backoffs[n - 1] / math.log(10)).tolist()
            for i in np.flatnonzero(self.kept[n - 1]).tolist():
                end = f"\t{backoff[i]:.7g}" if n < self.order else ""
                lines.append(f"{log_p[i]:.7g}\t{names[i]}{end}")
            lines.append("")
        temporary = path.with_name(path.name + ".tmp")
        temporary.write_text("\n".join([*lines, "\\end\\", ""]), encoding="utf-8")
        temporary.replace(path)


def estimate(
    sentences: Iterable[Sequence[str]], order: int, prune: Sequence[int] = (), vocabulary: Iterable[str] = ()
) -> Ngram:
    """Count n-grams and smooth them.

    Args:
        sentences: of units without white space in them.
        order: longest n-gram.
        prune: of each length, leave out n-grams that occur so often or less; the last number holds for all longer
            ones, the first must be 0, and none may be smaller than the one before it.
        vocabulary: units that may come though the sentences lack them; each then is as likely as `<unk>`.

    Raises:
        UserError: there is nothing to count, or a unit has the name of a special one.
    """
    thresholds = [*prune, *[prune[-1] if prune else 0] * order][:order]
    if order < 1 or thresholds[0] != 0 or sorted(thresholds) != thresholds:
        raise ValueError(f"order={order}, prune={prune}: wanted 1 or more, and numbers from 0 on that do not fall")
    words, tokens = _numbered(sentences, vocabulary)
    orders = _count(tokens, order, len(words))
    log_p: list[Numbers] = []
    log_backoffs: list[Numbers] = []
    kept: list[NDArray[np.bool_]] = []
    discounts: list[tuple[float, ...]] = []
    lower = np.full(1, 1 / (len(words) - 1))  # uniform over all but <s>
    for n, table in enumerate(orders, 1):
        # How many different units come before it; how often it occurs where nothing can or is asked.
        adjusted = table.raw
        if n < order:
            extensions = np.bincount(orders[n].suffix, minlength=len(table.raw))
            adjusted = np.where(table.begins, table.raw, extensions)
        if n == 1:
            adjusted = np.where(np.isin(table.word, (0, 1)), 0, adjusted)
        discount = _discounts(adjusted)
        keep = table.raw > thresholds[n - 1] if n > 1 else np.ones(len(table.raw), np.bool_)
        left = np.where(keep, adjusted - np.array([0.0, *discount])[np.minimum(adjusted, 3)], 0.0)
        contexts = 1 if n == 1 else len(orders[n - 2].raw)
        total = np.bincount(table.prefix, weights=adjusted, minlength=contexts)
        taken = np.bincount(table.prefix, weights=adjusted - left, minlength=contexts)
        gamma = np.divide(taken, total, out=np.ones(contexts), where=total > 0)
        p = left / np.maximum(total, 1)[table.prefix] + gamma[table.prefix] * lower[table.suffix]
        if n > 1:
            log_backoffs.append(np.log(np.maximum(gamma, 1e-99)))
        lower = p
        log_p.append(np.log(p))
        kept.append(keep)
        discounts.append(discount)
    log_p[0][1] = NEVER * math.log(10)
    log_backoffs.append(np.zeros(len(orders[-1].raw)))
    return Ngram(
        words,
        [table.prefix for table in orders],
        [table.word for table in orders],
        log_p,
        log_backoffs,
        kept,
        discounts,
        int((tokens > 1).sum()),
    )


def _numbered(sentences: Iterable[Sequence[str]], vocabulary: Iterable[str]) -> tuple[list[str], Ids]:
    """The vocabulary, and all sentences one after the other as its numbers."""
    number = {word: i for i, word in enumerate(SPECIAL)}
    tokens: list[int] = []
    for sentence in sentences:
        if not sentence:
            continue
        if odd := [word for word in sentence if word in SPECIAL]:
            raise UserError(f"{odd[0]}: is the name of a special unit of n-gram models; leave it out of the text")
        tokens.append(1)
        tokens.extend(number.setdefault(word, len(number)) for word in sentence)
        tokens.append(2)
    if not tokens:
        raise UserError("the text holds no sentence; name another")
    for word in vocabulary:
        number.setdefault(word, len(number))
    return list(number), np.array(tokens, np.int64)


def _count(tokens: Ids, order: int, num_words: int) -> list[_Order]:
    """The different n-grams of each length; no n-gram goes over the end of a sentence."""
    end_of = np.flatnonzero(tokens == 2)
    room = end_of[np.searchsorted(end_of, np.arange(len(tokens)))] - np.arange(len(tokens)) + 1  # units to the end
    # One of every unit, so that numbers of unigrams are those of words.
    raw = np.bincount(tokens, minlength=num_words)
    every = np.arange(num_words)
    zeros = np.zeros(num_words, np.int64)
    tables = [_Order(zeros, zeros, every, every == 1, raw)]
    number = tokens  # of the n-gram that starts at each place
    for n in range(2, order + 1):
        starts = np.flatnonzero(room >= n)
        keys = number[starts] * num_words + tokens[starts + n - 1]
        different, first, inverse, raw = np.unique(keys, return_index=True, return_inverse=True, return_counts=True)
        place = starts[first]
        tables.append(_Order(different // num_words, number[place + 1], different % num_words, tokens[place] == 1, raw))
        number = np.full(len(tokens), -1)
        number[starts] = inverse
    return tables


def _discounts(counts: Ids) -> tuple[float, ...]:
    """What to take from counts of 1, 2, and 3 or more (Chen & Goodman 1998, equation 26)."""
    t = np.bincount(np.minimum(counts, 5), minlength=6)[:5].astype(float)  # how many have each count
    if not t[1:].all():
        return FALLBACK
    y = t[1] / (t[1] + 2 * t[2])
    found = tuple(k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3))
    return found if all(0 <= d <= k for k, d in enumerate(found, 1)) else FALLBACK
