"""The search finds what all hypotheses, tried one by one, have best; words stay in the lexicon; states go with rows."""

import itertools
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.data.text import Characters, Phones
from trainer.data.vocabulary import Characters as LineCharacters
from trainer.decoding import BeamConfig, greedy
from trainer.decoding.beam import Beam, RescoreConfig
from trainer.decoding.language_models import NgramConfig, RunLanguageModelConfig, Source, load_arpa
from trainer.decoding.ngram import estimate
from trainer.errors import UserError
from trainer.scoring import Scorer

LINES = ["abba", "abc", "cab", "ab", "cabba", "abab", "bab"]


class Training:
    """A training split of a few lines."""

    def __init__(self, lines: Sequence[str]) -> None:
        self.lines, self.identity = lines, {"samples": "few"}

    def transcripts(self) -> list[str]:
        return list(self.lines)


def source(alphabet: str, folder: Path, lines: Sequence[str] = LINES) -> Source:
    return Source(Characters(alphabet), lambda: Training(lines), folder)


def emissions(frames: int, labels: int, seed: int) -> Tensor:
    return torch.randn(frames, labels, generator=torch.Generator().manual_seed(seed)).mul(1.5).log_softmax(-1)


def by_hand(log_probs: Tensor) -> dict[tuple[int, ...], float]:
    """The log-probability of every label sequence, all its paths added."""
    found: dict[tuple[int, ...], list[float]] = defaultdict(list)
    frames, labels = log_probs.shape
    for path in itertools.product(range(labels), repeat=frames):
        kept = tuple(label for label, _ in itertools.groupby(path) if label)
        found[kept].append(sum(float(log_probs[t, label]) for t, label in enumerate(path)))
    return {kept: float(torch.tensor(parts).double().logsumexp(0)) for kept, parts in found.items()}


@pytest.mark.parametrize("seed", range(4))
def test_without_a_language_model_the_likeliest_labels_are_found_with_their_probability(
    seed: int, tmp_path: Path
) -> None:
    beam = Beam(BeamConfig(language_model=None, weight=0.0, beam_size=500), source("abc", tmp_path))
    log_probs = emissions(5, 4, seed)
    wanted = by_hand(log_probs)
    found = {tuple(h.labels): h.score for h in beam.search(log_probs)}
    labels = max(wanted, key=wanted.__getitem__)
    assert tuple(beam.best(log_probs)) == labels
    # The scores of a sequence that ends in a blank and of one that does not are not added at the end.
    assert wanted[labels] - math.log(2) <= found[labels] <= wanted[labels] + 1e-4


@pytest.mark.parametrize("seed", range(4))
def test_an_ngram_of_the_transcripts_is_weighed_in_nats(seed: int, tmp_path: Path) -> None:
    """The best of all, by CTC and KenLM apart; several weights, so that both matter."""
    config = BeamConfig(language_model=NgramConfig(order=3), beam_size=500)
    beam = Beam(config, source("abc", tmp_path))
    (path,) = tmp_path.glob("labels-3-*.arpa")
    lm = load_arpa(path, beam.tokens.names)
    log_probs = emissions(5, 4, seed)
    chosen = []
    for weight in (0.0, 0.5, 3.0):
        beam.set_weights(weight, 0.0)
        scores = {}
        for labels, value in by_hand(log_probs).items():
            state, total = lm.start(False), 0.0
            for label in labels:
                state, more = lm.score(state, label)
                total += more
            scores[labels] = value + weight * math.log(10) * (total + lm.finish(state)[1])
        ranked = sorted(scores, key=scores.__getitem__, reverse=True)
        found = tuple(beam.best(log_probs))
        assert scores[found] >= scores[ranked[0]] - math.log(2)  # see above
        chosen.append(found)
    assert len(set(chosen)) > 1


def peaks(text: str, tokens: Characters, doubt: float = 0.0) -> Tensor:
    """Each character in a frame of its own, blanks between; `doubt` goes to all other labels alike."""
    labels = [x for label in tokens.encode(text) for x in (0, label)]
    log_probs = torch.full((len(labels), len(tokens)), max(doubt, 1e-6) / (len(tokens) - 1))
    log_probs[range(len(labels)), labels] = 1 - max(doubt, 1e-6)
    return log_probs.log()


def test_with_a_lexicon_only_its_words_come_out(tmp_path: Path) -> None:
    lines = ["cab abba", "abba bab", "cab bab"]
    config = BeamConfig(language_model=NgramConfig(units="words", order=2), weight=0.1)
    beam = Beam(config, source(" abc", tmp_path, lines))
    tokens = beam.tokens
    for said, wanted in (("cab abba", "cab abba"), ("caab bab", "cab bab"), (" cab  bab ", "cab bab")):
        assert tokens.decode(beam.best(peaks(said, tokens, 0.3))) == wanted
    for seed in range(4):
        assert set(tokens.decode(beam.best(emissions(20, 5, seed))).split()) <= {"cab", "abba", "bab"}
    free = Beam(BeamConfig(language_model=None), source(" abc", tmp_path))
    assert tokens.decode(free.best(peaks(" caab  bab ", tokens))) == "caab bab"


def test_a_batch_is_its_rows_and_the_word_score_makes_words(tmp_path: Path) -> None:
    beam = Beam(BeamConfig(language_model=None), source(" abc", tmp_path))
    rows = torch.stack([emissions(9, 5, 1), emissions(9, 5, 2)])
    lengths = torch.tensor([9, 4])
    assert beam(rows, lengths) == [beam.best(rows[0]), beam.best(rows[1, :4])]
    assert beam(rows, torch.tensor([0, 0])) == [[], []]
    assert beam.makes_words
    assert not Beam(BeamConfig(language_model=None), source("abc", tmp_path)).makes_words
    counts = []
    for score in (-5.0, 0.0):  # far above, all frames would be spaces
        beam.set_weights(0.0, score)
        counts.append(len(beam.tokens.decode(beam.best(rows[0])).split()))
    assert counts[0] < counts[-1]


class Net:
    """A recurrent model in the place of a run's: it likes what alternates, and counts what it reads."""

    def __init__(self, alphabet: str) -> None:
        self.vocabulary = LineCharacters(alphabet)
        self.reads = 0

    def _next(self, token: int) -> Tensor:
        return emissions(1, len(self.vocabulary), 100 + token)[0]

    def start(self, batch_size: int) -> tuple[Tensor, dict[str, Tensor]]:
        return self.step(torch.full((batch_size,), self.vocabulary.start), None)

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, dict[str, Tensor]]:
        self.reads += 1
        return torch.stack([self._next(t) for t in tokens.tolist()]), {}

    def score(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        before = torch.cat([torch.full_like(tokens[:, :1], self.vocabulary.start), tokens[:, :-1]], 1)
        rows = [
            [float(self._next(b)[t]) if i < n else 0.0 for i, (b, t) in enumerate(zip(bs, ts, strict=True))]
            for bs, ts, n in zip(before.tolist(), tokens.tolist(), lengths.tolist(), strict=True)
        ]
        return torch.tensor(rows)


@pytest.fixture
def net(monkeypatch: pytest.MonkeyPatch) -> Net:
    made = Net("\nabc")
    monkeypatch.setattr(Scorer, "load", lambda *_: made)
    return made


@pytest.mark.parametrize("how", ["fusion", "rescoring"])
def test_a_run_of_a_language_model_is_asked_at_each_step_or_afterwards(how: str, net: Net, tmp_path: Path) -> None:
    """Both find the best of all by the sum of CTC and the net."""
    if how == "fusion":
        config = BeamConfig(language_model=RunLanguageModelConfig(run="lm"), weight=1.5, beam_size=500)
    else:
        rescore = RescoreConfig(run="lm", weight=1.5, candidates=500)
        config = BeamConfig(language_model=None, weight=0.0, beam_size=500, rescore=rescore)
    beam = Beam(config, source("abc", tmp_path))
    differs = False
    for seed in range(4):
        log_probs = emissions(4, 4, seed)
        scores = {}
        for labels, value in by_hand(log_probs).items():
            tokens = [net.vocabulary.start, *labels, net.vocabulary.start]  # the labels have the net's numbers
            pairs = itertools.pairwise(tokens)
            scores[labels] = value + 1.5 * sum(float(net._next(a)[b]) for a, b in pairs)
        best = max(scores.values())
        net.reads = 0
        found = beam.best(log_probs)
        assert scores[tuple(found)] >= best - math.log(2)
        differs = differs or [found] != greedy(log_probs[None], torch.tensor([4]))
        assert net.reads <= 4**4 // 2  # once a prefix, not once a path
    assert differs


def test_what_does_not_fit_is_told(net: Net, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    words = tmp_path / "words.arpa"
    estimate([["дом", "дома"]], 2).write(words)
    (tmp_path / "other.arpa").write_text("nothing\n")
    cases = {
        "has none of the recogniser's labels": NgramConfig(path=words),
        "spell none of its words": NgramConfig(path=words, units="words"),
        "cannot be read": NgramConfig(path=tmp_path / "nowhere.arpa"),
        "is no ARPA file": NgramConfig(path=tmp_path / "other.arpa"),
    }
    for told, language_model in cases.items():
        with pytest.raises(UserError, match=told):
            Beam(BeamConfig(language_model=language_model), source("abc", tmp_path))
    with pytest.raises(UserError, match="has none of the recogniser's labels"):
        Beam(BeamConfig(language_model=RunLanguageModelConfig(run="lm")), source(" xyz", tmp_path))
    Beam(BeamConfig(language_model=RunLanguageModelConfig(run="lm")), source("xyc", tmp_path))
    assert "run = lm lacks x y: they never come out" in caplog.text
    phones = Source(Phones("aa b"), lambda: Training(["aa b"]), tmp_path)
    with pytest.raises(UserError, match="the labels are phones"):
        Beam(BeamConfig(language_model=NgramConfig(units="words", order=2)), phones)
    with pytest.raises(UserError, match="its tokens are no labels"):
        Beam(BeamConfig(language_model=RunLanguageModelConfig(run="lm")), phones)
    made = Beam(BeamConfig(language_model=NgramConfig(order=2)), phones)
    assert made.tokens.decode(made.best(torch.tensor([[0.1, 0.8, 0.1], [0.1, 0.1, 0.8]]).log())) == "aa b"
