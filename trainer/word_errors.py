"""Where a recogniser errs: errors by length of the recording and by speaker, intervals, and what it takes for what.

Everything is computed from the rows of an evaluation, whose columns are a reference and a hypothesis.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.errors import UserError
from trainer.metrics import PARTS, Edits, align, edits
from trainer.significance import Paired, bootstrap

UNITS: dict[str, Callable[[str], list[str]]] = {"cer": list, "wer": str.split, "per": str.split}
"""How a text is cut for each error rate."""
BUCKET_SECONDS = (0, 2, 4, 6, 8, 10, 15, 20, 30)
"""Where buckets of recordings begin."""
CONFUSIONS = 50
"""That are kept, of each kind."""

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Group:
    """Some utterances together."""

    name: str
    utterances: int
    edits: Edits

    @property
    def rate(self) -> float:
        return self.edits.total / max(self.edits.length, 1)

    def plain(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "name": self.name,
            "utterances": self.utterances,
            "length": self.edits.length,
            "rate": self.rate,
            **{part: getattr(self.edits, part) for part in PARTS},
        }


def has_texts(rows: Sequence[Row]) -> bool:
    """Whether all rows have a reference and a hypothesis."""
    return bool(rows) and all({"reference", "hypothesis"} <= row["columns"].keys() for row in rows)


def counted(row: Row, rate: str) -> Edits:
    """The errors of one row, in the units of an error rate."""
    cut, columns = UNITS[rate], row["columns"]
    return edits(cut(columns["reference"]), cut(columns["hypothesis"]))


def grouped(rows: Sequence[Row], rate: str, by: Callable[[Row], str | None]) -> list[Group]:
    """Errors of each group that has a name, in the order in which the groups come first."""
    found: dict[str, list[Edits]] = {}
    for row in rows:
        if (name := by(row)) is not None:
            found.setdefault(name, []).append(counted(row, rate))
    return [Group(name, len(all_), Edits(*map(sum, zip(*all_, strict=True)))) for name, all_ in found.items()]


def by_duration(rows: Sequence[Row], rate: str) -> list[Group]:
    """Errors by length of the recording, the shortest first."""

    def bucket(row: Row) -> str | None:
        seconds = row.get("facts", {}).get("seconds")
        if seconds is None:
            return None
        i = max(i for i, start in enumerate(BUCKET_SECONDS) if seconds >= start)
        end = BUCKET_SECONDS[i + 1] if i + 1 < len(BUCKET_SECONDS) else None
        return f"{BUCKET_SECONDS[i]} to {end} s" if end else f"{BUCKET_SECONDS[i]} s and more"

    ordered = sorted(rows, key=lambda row: row.get("facts", {}).get("seconds") or 0.0)
    return grouped(ordered, rate, bucket)


def by_speaker(rows: Sequence[Row], rate: str) -> list[Group]:
    """Errors of each speaker who is named, the worst first."""
    return sorted(grouped(rows, rate, lambda row: row.get("facts", {}).get("speaker")), key=lambda g: -g.rate)


def confusions(rows: Iterable[Row], rate: str) -> dict[str, list[tuple[str, str, int]]]:
    """What came instead of what, how often: (reference, hypothesis, count), the most frequent first.

    Returns:
        by `PARTS`: of insertions the reference is empty, of deletions the hypothesis.
    """
    counts: dict[str, Counter[tuple[str, str]]] = {part: Counter() for part in PARTS}
    cut = UNITS[rate]
    for row in rows:
        for pair in align(cut(row["columns"]["reference"]), cut(row["columns"]["hypothesis"])):
            if pair[0] != pair[1]:
                counts["insertions" if not pair[0] else "deletions" if not pair[1] else "substitutions"][pair] += 1
    ordered = {part: sorted(c.items(), key=lambda item: (-item[1], item[0])) for part, c in counts.items()}
    return {part: [(*pair, n) for pair, n in items[:CONFUSIONS]] for part, items in ordered.items()}


def assess(rows: Sequence[Row], rates: Iterable[str], resample: str, seed: int) -> dict[str, Any]:
    """Everything about the errors of an evaluation, as JSON values.

    Args:
        rows: with texts.
        rates: names of the error rates, of those in `UNITS`.
        resample: what an interval draws anew, "utterances" or "speakers".
        seed: of the draws.

    Returns:
        by rate: `interval` (95 %), `by_duration`, `by_speaker`, `confusions`.

    Raises:
        UserError: speakers are to be drawn, and there is one alone.
    """
    clusters = speakers(rows) if resample == "speakers" else None
    if clusters is not None and len(set(clusters)) < 2:
        raise UserError(
            "the command line: resample = speakers: there is one speaker alone, and nothing to draw; leave it out"
        )
    found = {}
    for rate in rates:
        all_ = [counted(row, rate) for row in rows]
        found[rate] = {
            "interval": bootstrap([e.total for e in all_], [e.length for e in all_], clusters, seed),
            "by_duration": [group.plain() for group in by_duration(rows, rate)],
            "by_speaker": [group.plain() for group in by_speaker(rows, rate)],
            "confusions": confusions(rows, rate),
        }
    return found


def speakers(rows: Sequence[Row]) -> list[str]:
    """The speaker of each row; one who is not named is a speaker of their own."""
    return [str(row.get("facts", {}).get("speaker") or f"\x1f{row['key']}") for row in rows]


def paired(ours: Sequence[Row], theirs: Sequence[Row], rate: str) -> Paired:
    """Errors of two evaluations on the utterances that both have scored.

    Raises:
        ValueError: the same utterance has another reference, or there is none in common.
    """
    other = {row["key"]: row for row in theirs}
    pairs = [(row, other[row["key"]]) for row in ours if row["key"] in other]
    for a, b in pairs:
        if a["columns"]["reference"] != b["columns"]["reference"]:
            raise ValueError(f"{a['key']} has another reference there")
    if not pairs:
        raise ValueError("no utterance in common")
    cut = UNITS[rate]
    references = [cut(a["columns"]["reference"]) for a, _ in pairs]
    first, second = ([cut(row["columns"]["hypothesis"]) for row in side] for side in zip(*pairs, strict=True))
    return Paired(references, first, second, speakers([a for a, _ in pairs]))
