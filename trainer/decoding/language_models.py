"""Language models that a beam search asks for the score of the next label or word: an n-gram, or a trained run."""

import contextlib
import hashlib
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import torch
from flashlight.lib.text.decoder import LM, LMState, ZeroLM
from flashlight.lib.text.decoder.kenlm import KenLM
from flashlight.lib.text.dictionary import Dictionary
from pydantic import Field
from torch import Tensor

from trainer.config import Config, show
from trainer.data.text import SPACE, Tokens
from trainer.data.vocabulary import END as END_OF_LINE
from trainer.data.vocabulary import UNKNOWN as UNKNOWN_WORD
from trainer.data.vocabulary import Characters, Words
from trainer.decoding.ngram import SPECIAL, UNKNOWN, estimate
from trainer.errors import UserError
from trainer.scoring import Scorer

log = logging.getLogger(__name__)

Units = Literal["labels", "words"]
MAX_ORDER = 6
"""Of the KenLM that flashlight-text is built with."""


@dataclass(frozen=True)
class Loaded:
    """A language model in the search's hands."""

    lm: LM
    vocabulary: list[str] | None
    """Words with their numbers; None: the units are the labels, with their own numbers."""
    nats: float
    """What its scores are to be multiplied with to be nats."""


@dataclass(frozen=True)
class Source:
    """What a language model may be made from."""

    tokens: Tokens
    """The labels of the recogniser."""
    training: Callable[[], "Transcribed"]
    """Opens the training split."""
    folder: Path
    """Where what was made of it may be kept."""


class Transcribed(Protocol):
    """A split as a language model needs it."""

    @property
    def identity(self) -> dict[str, str]:
        """Differs where the transcripts differ."""
        ...

    def transcripts(self) -> list[str]:
        """All of them, normalised."""
        ...


class NgramConfig(Config):
    """An n-gram model in an ARPA file, or of the training transcripts."""

    kind: Literal["ngram"] = "ngram"
    path: Path | None = None
    """An ARPA file, as the verb `ngram` writes it; null: estimated from the training transcripts when it is needed."""
    units: Units = "labels"
    """Of the n-gram. With labels any word can come out; with words only those of the n-gram."""
    order: int = Field(MAX_ORDER, ge=2, le=MAX_ORDER)
    """Longest n-gram of a model that is estimated here."""

    def build(self, source: Source) -> Loaded:
        """Load the model.

        Raises:
            UserError: the file cannot be read or is no ARPA file, or has none of the units.
        """
        path = self.path or self._estimated(source)
        names = source.tokens.names if self.units == "labels" else [*read_words(path), UNKNOWN]
        if self.units == "labels" and not set(names) & set(read_words(path)):
            raise UserError(
                f"{show(path)}: has none of the recogniser's labels ({' '.join(names[1:6])} ...); is it of words? set "
                "decoder.language_model.units=words"
            )
        lm = load_arpa(path, names)
        return Loaded(lm, None if self.units == "labels" else names, math.log(10))

    def _estimated(self, source: Source) -> Path:
        training = source.training()
        identity = repr(sorted({**training.identity, "tokens": source.tokens.identity}.items()))
        digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
        path = source.folder / f"{self.units}-{self.order}-{digest}.arpa"
        if not path.is_file():
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                texts = training.transcripts()
                vocabulary = source.tokens.names[1:] if self.units == "labels" else ()
                sentences = [units_of(text, self.units, source.tokens) for text in texts]
                estimate(sentences, self.order, vocabulary=vocabulary).write(path)
            except OSError as error:
                raise UserError(
                    f"{show(path)}: cannot be written: {error.strerror}; write an n-gram elsewhere with the verb "
                    "ngram, and name it with decoder.language_model='{kind: ngram, path: FILE}'"
                ) from error
        return path


class RunLanguageModelConfig(Config):
    """A trained run of `language_model`, by characters or words, asked at each step of the search. It works on one
    hypothesis at a time, which is slow: see `rescore` too."""

    kind: Literal["run"] = "run"
    run: str
    """Its run directory, or its name under runs/."""

    def build(self, source: Source) -> Loaded:
        """Load the run.

        Raises:
            UserError: there is no such run, or its tokens are neither labels of the recogniser nor words.
        """
        scorer = Scorer.load(self.run)
        vocabulary = scorer.vocabulary
        if isinstance(vocabulary, Words):
            names = [word for word in vocabulary.words if word not in (END_OF_LINE, UNKNOWN_WORD)]
            return Loaded(RunLM(scorer, [vocabulary.number[name] for name in names] + [None]), [*names, UNKNOWN], 1.0)
        names = [name.replace(SPACE, " ") for name in source.tokens.names]
        if not isinstance(vocabulary, Characters) or any(len(name) != 1 for name in names[1:]):
            raise UserError(
                f"decoder.language_model.run = {self.run}: its tokens are no labels of the recogniser; take a run by "
                "characters for labels that are characters, one by words, or decoder.rescore.run"
            )
        known = {c: i for i, c in enumerate(vocabulary.alphabet)}
        if (unknown := [name for name in names[1:] if name not in known]) and not set(names[1:]) - {" ", *unknown}:
            raise UserError(
                f"decoder.language_model.run = {self.run}: has none of the recogniser's labels "
                f"({' '.join(names[1:6])} ...); is it of another language?"
            )
        if unknown:
            log.warning("decoder.language_model.run = %s lacks %s: they never come out", self.run, " ".join(unknown))
        return Loaded(RunLM(scorer, [None, *(known.get(name) for name in names[1:])]), None, 1.0)


LanguageModelConfig = Annotated[NgramConfig | RunLanguageModelConfig, Field(discriminator="kind")]


def none() -> Loaded:
    """No language model: every label is as likely as any."""
    return Loaded(ZeroLM(), None, 1.0)


def units_of(text: str, units: Units, tokens: Tokens) -> list[str]:
    """What an n-gram counts in a normalised text: its words, or the names of its labels."""
    if units == "words":
        return text.split()
    names = tokens.names
    return [names[label] for label in tokens.encode(text)]


def read_words(path: Path) -> list[str]:
    """The unigrams of an ARPA file, in its order, without the special ones.

    Raises:
        UserError: there is no such file, or it is none.
    """
    words: list[str] = []
    try:
        with path.open(encoding="utf-8") as file:
            lines = (line.rstrip("\n") for line in file)
            if "\\1-grams:" not in lines:  # reads on to that line
                raise UserError(f"{show(path)}: is no ARPA file: it has no \\1-grams; write one with the verb ngram")
            for line in lines:
                if not line.strip() or line.startswith("\\"):
                    break
                words.append(line.split("\t")[1])
    except OSError as error:
        raise UserError(f"{show(path)}: cannot be read: {error.strerror}; name another ARPA file") from error
    except (UnicodeDecodeError, IndexError) as error:
        raise UserError(f"{show(path)}: is no ARPA file ({error}); write one with the verb ngram") from error
    return [word for word in words if word not in SPECIAL]


def load_arpa(path: Path, names: Sequence[str]) -> KenLM:
    """A model whose units have the numbers of their names; its scores are logarithms to the base 10.

    Raises:
        UserError: it is no ARPA file that KenLM reads.
    """
    try:
        with _silence():
            return KenLM(str(path), Dictionary(list(names)))
    except RuntimeError as error:
        told = " ".join(str(error).split())
        raise UserError(f"{show(path)}: KenLM cannot read it ({told}); write one with the verb ngram") from error


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keep KenLM's progress off the console."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class RunLM(LM):  # type: ignore[misc]
    """A recurrent language model as flashlight asks for it: one state and one unit at a time, scores in nats.

    The net reads a unit when something after it is asked for, and once for each state.

    Args:
        scorer: of the run.
        numbers: the run's token of each unit; None: it has none, and such a unit never comes.
    """

    def __init__(self, scorer: Scorer, numbers: Sequence[int | None]) -> None:
        super().__init__()
        self.scorer, self.numbers = scorer, numbers
        self._end = scorer.vocabulary.start
        # Of each state what the net made of it, or the parent's carried state and the token to be read.
        self._known: dict[Any, tuple[list[float], Any]] = {}
        self._waiting: dict[Any, tuple[Any, int]] = {}

    def start(self, start_with_nothing: bool) -> LMState:
        self._known.clear()
        self._waiting.clear()
        state = LMState()
        log_p, carried = self.scorer.start(1)
        self._known[state] = (log_p[0].tolist(), carried)
        return state

    def _read(self, state: LMState) -> tuple[list[float], Any]:
        if state not in self._known:
            carried, token = self._waiting.pop(state)
            log_p, carried = self.scorer.step(torch.tensor([token]), carried)
            self._known[state] = (log_p[0].tolist(), carried)
        return self._known[state]

    def score(self, state: LMState, usr_token_idx: int) -> tuple[LMState, float]:
        log_p, carried = self._read(state)
        number = self.numbers[usr_token_idx]
        after = state.child(usr_token_idx)
        if number is None:
            self._waiting.setdefault(after, (carried, self._end))
            return after, -1e4
        if after not in self._known:
            self._waiting.setdefault(after, (carried, number))
        return after, log_p[number]

    def finish(self, state: LMState) -> tuple[LMState, float]:
        log_p, _ = self._read(state)
        return state.child(len(self.numbers)), log_p[self._end]


@torch.inference_mode()
def score_texts(scorer: Scorer, texts: Sequence[str]) -> Tensor:
    """Log-probabilities (N,) of whole lines, their ends included, in nats."""
    rows = [torch.from_numpy(scorer.vocabulary.encode(text + "\n").astype("int64")) for text in texts]
    lengths = torch.tensor([len(row) for row in rows])
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return scorer.score(padded, lengths).double().sum(-1).cpu()
