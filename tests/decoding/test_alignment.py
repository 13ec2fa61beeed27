"""Times and confidences of words are those of the likeliest path, found by trying all of them."""

import itertools
import math

import pytest
import torch

from trainer.data.text import Characters, Phones, Subwords, SubwordsConfig
from trainer.decoding.alignment import spans, words


@pytest.mark.parametrize("labels", [[1], [1, 2], [2, 2], [1, 3, 3]], ids=str)
def test_the_likeliest_alignment(labels: list[int]) -> None:
    log_probs = torch.randn(6, 4, generator=torch.Generator().manual_seed(len(labels))).log_softmax(-1)
    paths = [
        path
        for path in itertools.product(range(4), repeat=6)
        if [label for label, _ in itertools.groupby(path) if label] == labels
    ]
    best = max(paths, key=lambda path: sum(float(log_probs[t, label]) for t, label in enumerate(path)))
    groups, t = [], 0
    for label, group in itertools.groupby(best):
        end = t + len(list(group))
        if label:
            groups.append((t, end, float(log_probs[t:end, label].max())))
        t = end
    assert [found[:2] for found in spans(log_probs, labels)] == [wanted[:2] for wanted in groups]
    assert [found[2] for found in spans(log_probs, labels)] == pytest.approx([wanted[2] for wanted in groups])
    assert spans(log_probs, []) == []


def test_words_have_times_in_seconds_and_the_geometric_mean_of_their_labels() -> None:
    tokens = Characters(" ab")
    path = [0, 2, 3, 0, 0, 1, 2, 2, 0]  # .ab.. aa.
    p = torch.full((len(path), 4), 0.1 / 3)
    p[range(len(path)), path] = 0.9
    p[2] = torch.tensor([0.2, 0.1, 0.1, 0.6])
    first, second = words(p.log(), tokens.encode("ab a"), tokens, 0.04)
    assert (first.word, first.start, first.end) == ("ab", 0.04, 0.12)
    assert first.confidence == pytest.approx(math.sqrt(0.9 * 0.6), abs=1e-4)
    assert (second.word, second.start, second.end) == ("a", 0.24, 0.32)
    assert second.confidence == pytest.approx(0.9, abs=1e-4)


def test_labels_know_their_words() -> None:
    tokens = Characters(" ab")
    assert tokens.words(tokens.encode(" ab  b ")) == [("ab", 1, 3), ("b", 5, 6)]
    assert Characters("ab").words([1, 2]) == [("ab", 0, 2)]
    assert tokens.words([]) == []
    assert Phones("aa b").words([2, 1]) == [("b", 0, 1), ("aa", 1, 2)]
    texts = ["the cat sat", "the mat", "a cat on the mat", "sat on a cat"]
    pieces = Subwords(SubwordsConfig(vocabulary_size=14).train(texts))
    labels = pieces.encode("the cat sat")
    found = pieces.words(labels)
    assert [word for word, *_ in found] == ["the", "cat", "sat"]
    assert found[0][1] == 0
    assert found[-1][2] == len(labels)
    assert all(pieces.decode(labels[a:b]).strip() == word for word, a, b in found)
    for made in (tokens, pieces, Phones("aa b")):
        assert made.words([]) == []
        assert len(made.names) == len(made)
        assert not any(" " in name for name in made.names)
