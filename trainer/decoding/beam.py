"""Prefix beam search for CTC, by flashlight-text: with or without a lexicon and a language model, then rescoring.

A hypothesis scores log P(labels | sound) + weight * log P(labels or words) + word_score * words, in nats.

Source: Graves & Jaitly 2014 and Hannun et al. 2014, arXiv:1408.2873 (prefix search with a language model); Collobert et
al. 2016, arXiv:1609.03193, and Kahn et al. 2022, arXiv:2201.12465 (this implementation).
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
import torch.nn.functional as F
from flashlight.lib.text.decoder import (
    CriterionType,
    LexiconDecoder,
    LexiconDecoderOptions,
    LexiconFreeDecoder,
    LexiconFreeDecoderOptions,
    SmearingMode,
    Trie,
)
from pydantic import Field, PositiveInt
from torch import Tensor

from trainer.config import Config
from trainer.data.text import BLANK, Phones, UnknownCharacterError, label_of_space
from trainer.decoding.base import without_blanks
from trainer.decoding.language_models import LanguageModelConfig, NgramConfig, Source, none, score_texts
from trainer.errors import UserError
from trainer.scoring import Scorer

THRESHOLD = 30.0
"""Hypotheses that score so many nats less than the best one are dropped."""
LABELS = 40
"""Labels of a frame that are looked at, the likeliest."""
IMPOSSIBLE = -1e4


class RescoreConfig(Config):
    """A second pass over the best hypotheses with a trained run of `language_model`."""

    run: str
    """Its run directory, or its name under runs/; its tokens may be anything."""
    weight: float = Field(0.3, ge=0)
    """Of its log-probability, which is added to the first pass's score."""
    candidates: PositiveInt = 50
    """So many of the best hypotheses are scored."""


class BeamConfig(Config):
    """Prefix beam search."""

    kind: Literal["beam"] = "beam"
    language_model: LanguageModelConfig | None = NgramConfig()
    """Null: none."""
    weight: float = Field(1.0, ge=0)
    """Of the language model's log-probability; the default is what validations of the default recipe like best."""
    word_score: float = 0.0
    """Added for each word; without a lexicon, for each frame of a space, which is about the same, and where no label is
    one it does nothing."""
    beam_size: PositiveInt = 50
    """Hypotheses that are kept after each frame."""
    rescore: RescoreConfig | None = None

    def build(self, source: Source) -> "Beam":
        """Load all that the search needs.

        Raises:
            UserError: the language model cannot be had, or does not fit the labels.
        """
        return Beam(self, source)


@dataclass(frozen=True)
class Hypothesis:
    """What a search found."""

    labels: list[int]
    score: float
    """In nats, of the whole."""


class Beam:
    """A decoder, see `trainer.decoding.base.Decoder`.

    Args:
        config: its settings.
        source: labels, and what a language model may be made from.

    Raises:
        UserError: see `BeamConfig.build`.
    """

    def __init__(self, config: BeamConfig, source: Source) -> None:
        self.config = config
        self.tokens = source.tokens
        self.model = config.language_model.build(source) if config.language_model else none()
        names = source.tokens.names
        self.space = label_of_space(source.tokens)
        self._trie = self._lexicon(names) if self.model.vocabulary is not None else None
        self._search = self._searcher(config.weight, config.word_score)
        self._scorer = Scorer.load(config.rescore.run) if config.rescore else None

    @property
    def makes_words(self) -> bool:
        """Whether the word score does anything: there is a lexicon, or a space between words."""
        return self._trie is not None or self.space is not None

    def set_weights(self, weight: float, word_score: float) -> None:
        """Search with other weights from now on."""
        self._search = self._searcher(weight, word_score)

    def _lexicon(self, names: list[str]) -> Trie:
        """The spellings of the language model's words, each with the space after it where there is one."""
        if isinstance(self.tokens, Phones):
            raise UserError(
                "decoder.language_model.units = words: the labels are phones, and nothing says how words are "
                "pronounced; set units=labels"
            )
        assert self.model.vocabulary is not None
        lm = self.model.lm
        start = lm.start(False)
        trie = Trie(len(names), self._silence)
        count = 0
        for number, word in enumerate(self.model.vocabulary[:-1]):  # the last one is <unk>
            try:
                labels = self.tokens.encode(word)
            except UnknownCharacterError:
                continue
            trie.insert(labels + ([] if self.space is None else [self.space]), number, lm.score(start, number)[1])
            count += 1
        if not count:
            raise UserError(
                "decoder.language_model: the labels spell none of its words; is it of another language, or of labels?"
            )
        trie.smear(SmearingMode.MAX)
        return trie

    @property
    def _silence(self) -> int:
        """What flashlight takes for the label between words."""
        return BLANK if self.space is None else self.space

    def _searcher(self, weight: float, word_score: float) -> Any:
        common: dict[str, Any] = {
            "beam_size": self.config.beam_size,
            "beam_size_token": min(LABELS, len(self.tokens)),
            "beam_threshold": THRESHOLD,
            "lm_weight": weight * self.model.nats,
            "log_add": True,
            "criterion_type": CriterionType.CTC,
        }
        if self._trie is None:
            options = LexiconFreeDecoderOptions(sil_score=word_score if self.space is not None else 0.0, **common)
            silence = -1 if self.space is None else self.space
            return LexiconFreeDecoder(options, self.model.lm, silence, BLANK, [])
        options = LexiconDecoderOptions(word_score=word_score, unk_score=-float("inf"), sil_score=0.0, **common)
        assert self.model.vocabulary is not None
        unknown = len(self.model.vocabulary) - 1
        return LexiconDecoder(options, self._trie, self.model.lm, self._silence, BLANK, unknown, [], False)

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        rows = zip(log_probs.float().cpu(), lengths.tolist(), strict=True)
        return [self.best(row[:n]) for row, n in rows]

    def best(self, log_probs: Tensor) -> list[int]:
        """Labels of one utterance, after rescoring if that is asked for; log_probs: (T, V)."""
        found = self.search(log_probs)
        if not found:
            return []
        if self._scorer is not None and self.config.rescore is not None and len(found) > 1:
            found = found[: self.config.rescore.candidates]
            more = score_texts(self._scorer, [self.tokens.decode(h.labels) for h in found]).tolist()
            weight = self.config.rescore.weight
            return max(zip(found, more, strict=True), key=lambda pair: pair[0].score + weight * pair[1])[0].labels
        return found[0].labels

    def search(self, log_probs: Tensor) -> list[Hypothesis]:
        """All hypotheses that are left at the end, different ones, the best first; log_probs: (T, V) on the CPU."""
        if not len(log_probs):
            return []
        if self._trie is not None and self.space is not None:
            # Each word of the lexicon ends with a space, which a transcript lacks at its end.
            last = torch.full((1, log_probs.shape[1]), IMPOSSIBLE)
            last[0, self.space] = 0
            log_probs = torch.cat([log_probs, last])
        # Sums of -inf, of which a log-sum-exp is made, would be NaN.
        log_probs = F.threshold(log_probs.contiguous(), IMPOSSIBLE, IMPOSSIBLE)
        found: dict[tuple[int, ...], Hypothesis] = {}
        for result in self._search.decode(log_probs.data_ptr(), *log_probs.shape):
            # One entry a frame, and one at each end that stands for silence.
            path = [label for label, _ in groupby(result.tokens[1:-1])]
            labels = self._trimmed(without_blanks(path))
            found.setdefault(tuple(labels), Hypothesis(labels, result.score))
        return sorted(found.values(), key=lambda h: -h.score)

    def _trimmed(self, labels: list[int]) -> list[int]:
        """Without spaces at the ends or one after the other."""
        if self.space is None:
            return labels
        kept: list[int] = []
        for label in labels:
            if label != self.space or (kept and kept[-1] != self.space):
                kept.append(label)
        return kept[:-1] if kept and kept[-1] == self.space else kept
