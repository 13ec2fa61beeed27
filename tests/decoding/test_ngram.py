"""Kneser-Ney as it is defined, number by number, in the file that KenLM reads; the verb that writes it."""

import itertools
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import TINY
from trainer.__main__ import main
from trainer.decoding.language_models import load_arpa, read_words
from trainer.decoding.ngram import estimate
from trainer.errors import UserError

# Enough different n-grams that all counts of counts are there for bigrams, and too few for trigrams.
TEXT = """a b a c
a b
c a b d
b b a
a
a b a c a b
d c b a a b c
b a b d e
e e a b
c c a d
a b a b a c
f a b""".splitlines()
SENTENCES = [line.split() for line in TEXT]


class Brute:
    """The definition (Chen & Goodman 1998), a dictionary at a time."""

    def __init__(self, sentences: list[list[str]], order: int, prune: list[int]) -> None:
        self.order, self.prune = order, prune
        self.raw: Counter[tuple[str, ...]] = Counter()
        for sentence in sentences:
            units = ["<s>", *sentence, "</s>"]
            for n in range(1, order + 1):
                self.raw.update(tuple(units[i : i + n]) for i in range(len(units) - n + 1))
        self.words = [*sorted({g[0] for g in self.raw} - {"<s>"}), "<unk>"]
        self.adjusted = {g: self._adjusted(g) for g in self.raw if g != ("<s>",)}
        self.discounts = {n: self._discounts(n) for n in range(1, order + 1)}

    def _adjusted(self, gram: tuple[str, ...]) -> int:
        if len(gram) == self.order or gram[0] == "<s>":
            return self.raw[gram]
        return len({g[0] for g in self.raw if len(g) == len(gram) + 1 and g[1:] == gram})

    def _discounts(self, n: int) -> list[float]:
        t = Counter(a for g, a in self.adjusted.items() if len(g) == n)
        if not all(t[k] for k in (1, 2, 3, 4)):
            return [0.0, 0.5, 1.0, 1.5]
        y = t[1] / (t[1] + 2 * t[2])
        found = [0.0, *(k - (k + 1) * y * t[k + 1] / t[k] for k in (1, 2, 3))]
        return found if all(0 <= d <= k for k, d in enumerate(found)) else [0.0, 0.5, 1.0, 1.5]

    def p(self, word: str, history: tuple[str, ...]) -> float:
        n = len(history) + 1
        after = {g: a for g, a in self.adjusted.items() if len(g) == n and g[:-1] == history}
        lower = self.p(word, history[1:]) if history else 1 / len(self.words)
        total = sum(after.values())
        if not total:
            return lower
        threshold = self.prune[n - 1]
        left = {
            g: a - self.discounts[n][min(a, 3)] if n == 1 or self.raw[g] > threshold else 0.0 for g, a in after.items()
        }
        return left.get((*history, word), 0.0) / total + (total - sum(left.values())) / total * lower


def histories(brute: Brute) -> Iterator[tuple[str, ...]]:
    """What a sentence may begin with, seen or not."""
    words = [w for w in brute.words if w != "</s>"]
    yield from itertools.chain.from_iterable(itertools.product(words, repeat=n) for n in range(3))


@pytest.mark.parametrize(("order", "prune"), [(2, [0, 0]), (3, [0, 0, 0]), (3, [0, 0, 1]), (3, [0, 1, 1])], ids=str)
def test_every_probability_is_that_of_the_definition_and_all_add_to_one(
    order: int, prune: list[int], tmp_path: Path
) -> None:
    model = estimate(SENTENCES, order, prune)
    model.write(tmp_path / "model.arpa")
    brute = Brute(SENTENCES, order, prune)
    for n, found in enumerate(model.discounts, 1):
        assert list(found) == pytest.approx(brute.discounts[n][1:])
    assert model.discounts[0] == (0.5, 1.0, 1.5) or model.discounts[1] != (0.5, 1.0, 1.5)
    names = brute.words
    lm = load_arpa(tmp_path / "model.arpa", names)
    for history in histories(brute):
        state = lm.start(False)
        for word in history:
            state, _ = lm.score(state, names.index(word))
        context = ("<s>", *history)[-(order - 1) :]
        found = {w: 10 ** (lm.finish(state) if w == "</s>" else lm.score(state, i))[1] for i, w in enumerate(names)}
        assert found == pytest.approx({w: brute.p(w, context) for w in names}, rel=1e-5)  # seven digits in the file
        assert sum(found.values()) == pytest.approx(1, abs=1e-5)


def test_a_model_by_hand(tmp_path: Path) -> None:
    """ "a b" and "a c": bigrams <s>a 2, ab, ac, b</s>, c</s> 1 each; too few for discounts of their own."""
    model = estimate([["a", "b"], ["a", "c"]], 2)
    model.write(tmp_path / "model.arpa")
    # Of unigrams count what comes before: a 1, b 1, c 1, </s> 2: (1 - 0.5) / 5 and, for </s>, (2 - 1) / 5; what is
    # taken, 3 * 0.5 + 1 = 2.5 of 5, is shared by <unk>, </s>, a, b, c alike.
    a, end, unknown = 0.1 + 0.1, 0.2 + 0.1, 0.1
    lm = load_arpa(tmp_path / "model.arpa", ["a", "b", "c", "<unk>"])
    state, first = lm.start(False), {}
    for i, name in enumerate(["a", "b", "c", "<unk>"]):
        first[name] = 10 ** lm.score(state, i)[1]
    # <s> a: (2 - 1) / 2, and half of what is below.
    assert first == pytest.approx({"a": 0.5 + 0.5 * a, "b": 0.5 * a, "c": 0.5 * a, "<unk>": 0.5 * unknown}, rel=1e-5)
    after_a, _ = lm.score(state, 0)
    assert 10 ** lm.score(after_a, 1)[1] == pytest.approx((1 - 0.5) / 2 + 0.5 * 0.2, rel=1e-5)
    after_b, _ = lm.score(after_a, 1)
    assert 10 ** lm.finish(after_b)[1] == pytest.approx(0.5 + 0.5 * end, rel=1e-5)
    assert model.counts == [6, 5]


def test_pruning_leaves_out_what_is_rare_and_a_vocabulary_adds_what_is_not_there() -> None:
    whole, pruned = estimate(SENTENCES, 3), estimate(SENTENCES, 3, [0, 1], vocabulary=["z", "a"])
    assert pruned.counts[0] == whole.counts[0] + 1
    assert all(few < many for few, many in zip(pruned.counts[1:], whole.counts[1:], strict=True))
    assert pruned.log_probabilities[0][pruned.words.index("z")] == pytest.approx(pruned.log_probabilities[0][0])


def test_what_cannot_be_counted_is_told() -> None:
    with pytest.raises(UserError, match="<s>: is the name of a special unit"):
        estimate([["a", "<s>"]], 2)
    with pytest.raises(UserError, match="holds no sentence"):
        estimate([[]], 2)
    with pytest.raises(ValueError, match="do not fall"):
        estimate(SENTENCES, 3, [0, 2, 1])


def test_the_verb_counts_files_and_transcripts_and_measures(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("\n".join(TEXT) + "\n")
    (tmp_path / "other.txt").write_text("a b\nc new\n")
    assert main(["ngram", "text.txt", "units=words", "order=2", "test=other.txt"]) == 0
    told = capsys.readouterr().out
    # <s> a b </s>, <s> c new </s>: six units, ends counted.
    brute = Brute(SENTENCES, 2, [0, 0])
    pairs = [("a", "<s>"), ("b", "a"), ("</s>", "b"), ("c", "<s>"), ("<unk>", "c"), ("</s>", "<unk>")]
    logs = [math.log(brute.p(word, (before,))) for word, before in pairs]
    assert f"perplexity {math.exp(-sum(logs) / 6):.4g}" in told
    assert f"{math.exp(-(sum(logs) - logs[4]) / 5):.4g} without the 1 unknown units" in told
    assert "25.0 % of 4 words are not in training" in told
    assert read_words(tmp_path / "text-words-2.arpa") == list("abcdef")

    more = [*TINY, f"data.path={corpus}"]
    assert main(["ngram", "speech/tones", *more, "to=labels.arpa", "order=3"]) == 0
    told = capsys.readouterr().out
    assert "labels of" in told
    assert "valid: perplexity" in told
    assert "test: perplexity" in told
    assert set(read_words(tmp_path / "labels.arpa")) == {"▁", *"abcdefgh"}
    assert main(["ngram", "speech/tones", *more, "text=text.txt", "units=words", "to=words.arpa"]) == 0
    assert set(read_words(tmp_path / "words.arpa")) == set("abcdef")


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["text.txt", "units=bytes"], "units = 'bytes': wanted labels or words"),
        (["text.txt", "prune=1"], "prune = '1': must begin with 0"),
        (["text.txt", "prune=x"], "prune = 'x': wanted whole numbers"),
        (["text.txt", "nowhere.txt"], "nowhere.txt: cannot be read as text"),
        (["copying/t1000"], "the recipe copying has no transcripts"),
        (["text.txt", "to=/dev/null/x"], "set to=FILE"),
    ],
    ids=str,
)
def test_mistakes_are_answered_in_one_message(
    arguments: list[str],
    wanted: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a b\n")
    assert main(["ngram", *arguments]) == 2
    assert wanted in capsys.readouterr().err
