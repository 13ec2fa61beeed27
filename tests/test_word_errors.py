"""Errors by group, confusions, intervals and tests of significance, against counts and formulas by hand."""

import math
from typing import Any

import numpy as np
import pytest

from trainer.errors import UserError
from trainer.metrics import Edits
from trainer.significance import Paired, bootstrap, matched_pairs, segments
from trainer.word_errors import assess, by_duration, by_speaker, confusions, has_texts, paired


def row(key: str, reference: str, hypothesis: str, **facts: Any) -> dict[str, Any]:
    return {"key": key, "columns": {"reference": reference, "hypothesis": hypothesis}, "facts": facts}


ROWS = [
    row("1", "a b c d", "a x c d", seconds=1.0, speaker="anna"),
    row("2", "a b", "a x", seconds=2.0, speaker="anna"),
    row("3", "c d", "c d e", seconds=7.9, speaker="boris"),
    row("4", "a b c d", "a", seconds=42.0),
]


def test_groups_hold_the_errors_of_their_members() -> None:
    groups = by_duration(ROWS, "wer")
    assert [(g.name, g.utterances, g.edits.total, g.edits.length) for g in groups] == [
        ("0 to 2 s", 1, 1, 4),
        ("2 to 4 s", 1, 1, 2),
        ("6 to 8 s", 1, 1, 2),
        ("30 s and more", 1, 3, 4),
    ]
    assert [(g.name, g.utterances, g.edits) for g in by_speaker(ROWS, "wer")] == [
        ("boris", 1, Edits(1, 0, 0, 2)),
        ("anna", 2, Edits(0, 0, 2, 6)),
    ]
    assert [g.edits.length for g in by_speaker(ROWS, "cer")] == [3, 10]
    assert by_duration([row("1", "a", "a")], "wer") == []


def test_confusions_are_counted_the_most_frequent_first() -> None:
    found = confusions(ROWS, "wer")
    assert found["substitutions"] == [("b", "x", 2)]
    assert found["insertions"] == [("", "e", 1)]
    assert found["deletions"] == [("b", "", 1), ("c", "", 1), ("d", "", 1)]


def test_an_assessment_is_json_and_needs_texts() -> None:
    found = assess(ROWS, ["cer", "wer"], "speakers", 0)
    low, high = found["wer"]["interval"]
    assert low <= 6 / 12 <= high
    with pytest.raises(UserError, match="there is one speaker alone"):
        assess(ROWS[:2], ["wer"], "speakers", 0)
    assert has_texts(ROWS)
    assert not has_texts([])
    assert not has_texts([{"columns": {"label": "3"}}])


def test_an_interval_is_that_of_the_normal_law_where_that_holds_and_the_same_each_time() -> None:
    random = np.random.default_rng(0)
    lengths = np.full(400, 20.0)
    errors = random.binomial(20, 0.3, 400).astype(float)
    low, high = bootstrap(errors, lengths, seed=1)
    rate, deviation = errors.sum() / lengths.sum(), (errors / 20).std() / math.sqrt(400)
    assert (low, high) == pytest.approx((rate - 1.96 * deviation, rate + 1.96 * deviation), abs=0.1 * deviation)
    assert bootstrap(errors, lengths, seed=1) == (low, high) != bootstrap(errors, lengths, seed=2)
    # Forty speakers of ten utterances each who all err alike: a tenth of the samples.
    errors = np.repeat(random.binomial(20, 0.3, 40), 10).astype(float)
    names = [str(i // 10) for i in range(400)]
    alone, together = (np.subtract(*reversed(bootstrap(errors, lengths, c))) for c in (None, names))
    assert together / alone == pytest.approx(math.sqrt(10), rel=0.15)


def test_segments_are_parted_by_two_words_that_both_have_right() -> None:
    reference = ["a", "b", "c", "d", "e", "f", "g", "h"]
    ours = ["a", "x", "c", "d", "e", "f", "g", "h"]  # b
    theirs = ["a", "b", "c", "d", "e", "y", "f", "h", "z"]  # y inserted, g missing, z at the end
    assert list(segments(reference, ours, theirs)) == [(1, 0), (0, 3)]
    assert list(segments(reference, reference, reference)) == []
    assert list(segments(["a", "b", "c"], ["x", "b", "y"], ["a", "b", "c"])) == [(2, 0)]  # one word between
    assert list(segments([], ["x"], [])) == [(1, 0)]


def test_matched_pairs_by_the_formula() -> None:
    d = np.array([-1.0, 0.0, -2.0, 1.0, -1.0])
    z, p = matched_pairs(d)
    assert z == pytest.approx(d.mean() / (d.std(ddof=1) / math.sqrt(5)))
    assert p == pytest.approx(2 * 0.5 * math.erfc(abs(z) / math.sqrt(2)))
    assert matched_pairs(np.zeros(4)) == (0.0, 1.0)
    assert matched_pairs(np.array([])) == (0.0, 1.0)
    assert matched_pairs(np.full(4, -1.0)) == (-math.inf, 0.0)


def test_two_runs_are_told_apart_only_where_they_differ() -> None:
    random = np.random.default_rng(3)
    words = [[str(w) for w in random.integers(0, 9, 12)] for _ in range(60)]

    def noisy(share: float) -> list[list[str]]:
        return [[w if random.random() > share else "x" for w in line] for line in words]

    good, bad, alike = noisy(0.1), noisy(0.3), noisy(0.1)
    far = Paired(words, good, bad).compare()
    assert far.interval[1] < 0
    assert far.p_bootstrap < 0.001
    assert far.p_segments < 0.001
    assert far.z < 0
    assert far.rates[0] - far.rates[1] == pytest.approx(-0.2, abs=0.05)
    near = Paired(words, good, alike).compare()
    assert near.interval[0] < 0 < near.interval[1]
    assert min(near.p_bootstrap, near.p_segments) > 0.05
    same = Paired(words, good, good).compare()
    assert (same.p_bootstrap, same.p_segments, same.interval) == (1.0, 1.0, (0.0, 0.0))


def test_only_the_same_utterances_are_compared() -> None:
    found = paired(ROWS, [row("2", "a b", "a b"), row("9", "z", "z")], "wer")
    assert (found.references, found.ours, found.theirs) == ([["a", "b"]], [["a", "x"]], [["a", "b"]])
    with pytest.raises(ValueError, match="2 has another reference"):
        paired(ROWS, [row("2", "a c", "a b")], "wer")
    with pytest.raises(ValueError, match="no utterance in common"):
        paired(ROWS, [row("9", "z", "z")], "wer")
