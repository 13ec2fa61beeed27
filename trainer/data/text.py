"""Text to labels and back: normalisation, and what a label stands for: a character, a phone or a subword."""

import hashlib
import io
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol

import sentencepiece
from pydantic import Field, ValidationInfo, field_validator

from trainer.config import Config, show
from trainer.errors import UserError

BLANK = 0
"""Label of the CTC blank; the tokens follow from 1 on."""
SPACE = "▁"
"""Stands for a space, or for the beginning of a word in front of a subword, where names must have no space."""
SUBWORDS_FILE = "subwords.model"
"""Beside `corpus.json`: the vocabulary in sentencepiece's own format."""


def not_text(text: str) -> str:
    """The characters that no written text holds: control characters (but for white space) and halves of a character,
    as in JSON's "\\ud800"."""
    return "".join(sorted({c for c in text if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace()}))


class UnknownCharacterError(ValueError):
    """A transcript holds a character outside the alphabet."""


class Tokens(Protocol):
    """What the labels of an output layer mean; 0 is the CTC blank."""

    @property
    def identity(self) -> str:
        """Short text that differs where the labels differ."""
        ...

    def __len__(self) -> int:
        """Number of classes, the blank included."""
        ...

    def encode(self, text: str) -> list[int]:
        """Labels of a normalised text.

        Raises:
            UnknownCharacterError: something in it has no label.
        """
        ...

    def decode(self, labels: Sequence[int]) -> str:
        """Text of labels without blanks."""
        ...

    @property
    def names(self) -> list[str]:
        """A name without white space for each label, that of the blank first; `SPACE` stands for a space."""
        ...

    def words(self, labels: Sequence[int]) -> list[tuple[str, int, int]]:
        """The words that labels spell, each with the number of its first label and of the one after its last."""
        ...


class CharactersConfig(Config):
    """A label a character."""

    kind: Literal["characters"] = "characters"

    def build(self, alphabet: str, folder: Path) -> "Characters":
        return Characters(alphabet)


class PhonesConfig(Config):
    """A label a phone: the transcript names phones, with spaces between them."""

    kind: Literal["phones"] = "phones"
    scored_as: dict[str, str] = Field({})
    """What a phone counts as in error rates, "" for nothing, e.g. {ao: aa, cl: sil}; others count as what they are."""

    def build(self, alphabet: str, folder: Path) -> "Phones":
        return Phones(alphabet)

    def scored(self, text: str) -> list[str]:
        """The phones of a text as they are counted."""
        return [p for phone in text.split() if (p := self.scored_as.get(phone, phone))]


class SubwordsConfig(Config):
    """A label a piece of a word, from a vocabulary that `prepare` learns from the training transcripts.

    Source: Kudo & Richardson 2018, arXiv:1808.06226 (sentencepiece); Kudo 2018, arXiv:1804.10959 (unigram); Sennrich et
    al. 2016, arXiv:1508.07909 (bpe).
    """

    kind: Literal["subwords"] = "subwords"
    vocabulary_size: int = Field(500, ge=3)
    """Pieces, and the blank."""
    model: Literal["unigram", "bpe"] = "unigram"

    def build(self, alphabet: str, folder: Path) -> "Subwords":
        path = folder / SUBWORDS_FILE
        try:
            return Subwords(path.read_bytes())
        except OSError as error:
            raise UserError(
                f"{show(path)}: cannot be read: {error.strerror}; put it back, or run `./launch.sh prepare` again"
            ) from error
        except RuntimeError as error:
            raise UserError(f"{show(path)}: is no vocabulary; delete it and run `./launch.sh prepare` again") from error

    def train(self, texts: Iterable[str]) -> bytes:
        """Learn the vocabulary; the same texts give the same bytes.

        Args:
            texts: normalised, all of training.

        Raises:
            UserError: the texts do not hold so many different pieces, or more different characters than that.
        """
        writer = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(texts),
                model_writer=writer,
                vocab_size=self.vocabulary_size,
                model_type=self.model,
                character_coverage=1.0,
                normalization_rule_name="identity",  # ours is done
                unk_id=BLANK,  # nothing is unknown: its place is that of the blank
                bos_id=-1,
                eos_id=-1,
                pad_id=-1,
                max_sentence_length=1 << 20,  # bytes; longer ones would silently be left out
                minloglevel=2,
            )
        except RuntimeError as error:
            raise UserError(
                f"data.text.tokens.vocabulary_size = {self.vocabulary_size}: {_vocabulary_limit(str(error))}"
            ) from error
        return writer.getvalue()


TokensConfig = Annotated[CharactersConfig | PhonesConfig | SubwordsConfig, Field(discriminator="kind")]


def _vocabulary_limit(message: str) -> str:
    """What sentencepiece says about a vocabulary of the wrong size, in our words."""
    if found := re.search(r"value <= (\d+)", message):
        return f"the training transcripts give {found[1]} at most; lower it"
    if found := re.search(r"required_chars\D+\d+\D+(\d+)", message):
        return f"the training transcripts have {found[1]} characters, and each needs a piece; raise it"
    return f"sentencepiece cannot learn it ({message.strip().splitlines()[-1]}); choose another size"


class TextConfig(Config):
    """How a transcript becomes labels."""

    tokens: TokensConfig = CharactersConfig()
    alphabet: str | None = Field(None, min_length=1)
    """What a transcript may hold: characters one after the other, or phones with spaces between; for characters and
    phones these are the labels, in order. Null takes those of the training transcripts."""
    lowercase: bool = True
    """Fold case before anything else."""
    map: dict[str, str] = Field({})
    """Characters (or phones) to replace, e.g. {"é": "e", "-": " "}, before anything is compared with the alphabet."""
    unknown: Literal["error", "space", "drop"] = "error"
    """A character (or phone) outside the alphabet stops `prepare`, becomes a space, or disappears; `prepare` says how
    many there were."""

    @field_validator("alphabet")
    @classmethod
    def _characters_are_distinct(cls, alphabet: str | None, info: ValidationInfo) -> str | None:
        if bad := not_text(alphabet or ""):
            raise ValueError(f"holds {bad!r}, which is no character of a text; take it out")
        if isinstance(info.data.get("tokens"), PhonesConfig):
            twice = sorted(phone for phone, n in Counter((alphabet or "").split()).items() if n > 1)
            if twice:
                raise ValueError(f"holds {', '.join(twice)} more than once; write each phone once")
        elif twice := sorted(c for c, n in Counter(alphabet or "").items() if n > 1):
            raise ValueError(f"holds {''.join(twice)!r} more than once; write each character once")
        return alphabet

    @field_validator("map")
    @classmethod
    def _one_at_a_time(cls, mapping: dict[str, str], info: ValidationInfo) -> dict[str, str]:
        phones = isinstance(info.data.get("tokens"), PhonesConfig)
        for name in mapping:
            if len(name.split()) != 1 if phones else len(name) != 1:
                raise ValueError(f"{name!r} is not one {'phone' if phones else 'character'}; map each on its own")
        return mapping

    @property
    def phones(self) -> bool:
        """Whether the units of a text are separated by spaces."""
        return isinstance(self.tokens, PhonesConfig)

    def alphabet_of(self, texts: Iterable[str]) -> str:
        """The alphabet of normalised texts, sorted."""
        if self.phones:
            return " ".join(sorted({phone for text in texts for phone in text.split()}))
        return "".join(sorted({c for text in texts for c in text}))

    def normalise(self, text: str, alphabet: str | None) -> tuple[str, Counter[str]]:
        """Text as it is trained on and scored: folded, mapped, cleaned, single spaces.

        Args:
            alphabet: in the form of the field; None: anything goes.

        Returns:
            the text, without what is outside the alphabet, and how often each of that was in it.
        """
        text = text.lower() if self.lowercase else text
        if not (self.map or self.phones) and (alphabet is None or _members(alphabet).issuperset(text)):
            return " ".join(text.split()), Counter()  # for the most part
        units = text.split() if self.phones else list(text)
        if self.map:
            mapped = [self.map.get(unit, unit) for unit in units]
            units = " ".join(mapped).split() if self.phones else list("".join(mapped))
        outside: Counter[str] = Counter()
        if alphabet is not None:
            known = set(alphabet.split() if self.phones else alphabet)
            outside.update(unit for unit in units if unit not in known and not unit.isspace())
            if outside:
                instead = " " if self.unknown == "space" else ""
                units = [instead if unit in outside else unit for unit in units]
        text = " ".join((" " if self.phones else "").join(units).split())
        if alphabet is not None and not self.phones and " " not in alphabet and " " in text:
            outside[" "] = text.count(" ")
            text = text.replace(" ", "")
        return text, outside


@lru_cache(maxsize=8)
def _members(alphabet: str) -> frozenset[str]:
    return frozenset(alphabet)


class Characters:
    """One label a character.

    Args:
        alphabet: the characters, each once.
    """

    def __init__(self, alphabet: str) -> None:
        if len(set(alphabet)) != len(alphabet):
            raise ValueError(f"alphabet={alphabet!r} holds a character twice")
        self.identity = alphabet
        self._label = {c: i + 1 for i, c in enumerate(alphabet)}

    def __len__(self) -> int:
        return len(self.identity) + 1

    def encode(self, text: str) -> list[int]:
        try:
            return [self._label[c] for c in text]
        except KeyError as error:
            raise UnknownCharacterError(error.args[0]) from error

    def decode(self, labels: Sequence[int]) -> str:
        return "".join(self.identity[i - 1] for i in labels if i != BLANK)

    @property
    def names(self) -> list[str]:
        return ["<blank>", *(SPACE if c == " " else c for c in self.identity)]

    def words(self, labels: Sequence[int]) -> list[tuple[str, int, int]]:
        found, end = [], 0
        for word in self.decode(labels).split(" "):
            end += len(word) + 1
            if word:
                found.append((word, end - 1 - len(word), end - 1))
        return found


class Phones:
    """One label a phone.

    Args:
        alphabet: the phones, each once, with spaces between.
    """

    def __init__(self, alphabet: str) -> None:
        self.phones = alphabet.split()
        if len(set(self.phones)) != len(self.phones):
            raise ValueError(f"alphabet={alphabet!r} holds a phone twice")
        self.identity = " ".join(self.phones)
        self._label = {phone: i + 1 for i, phone in enumerate(self.phones)}

    def __len__(self) -> int:
        return len(self.phones) + 1

    def encode(self, text: str) -> list[int]:
        try:
            return [self._label[phone] for phone in text.split()]
        except KeyError as error:
            raise UnknownCharacterError(error.args[0]) from error

    def decode(self, labels: Sequence[int]) -> str:
        return " ".join(self.phones[i - 1] for i in labels if i != BLANK)

    @property
    def names(self) -> list[str]:
        return ["<blank>", *self.phones]

    def words(self, labels: Sequence[int]) -> list[tuple[str, int, int]]:
        return [(self.phones[label - 1], i, i + 1) for i, label in enumerate(labels)]


class Subwords:
    """One label a piece of a word.

    Args:
        model: a vocabulary, as `SubwordsConfig.train` returns it.
    """

    def __init__(self, model: bytes) -> None:
        self.processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.identity = f"{len(self)} subwords {hashlib.sha256(model).hexdigest()[:16]}"

    def __len__(self) -> int:
        return int(self.processor.get_piece_size())

    def encode(self, text: str) -> list[int]:
        labels: list[int] = self.processor.encode(text)
        if BLANK in labels:
            raise UnknownCharacterError("a character outside the vocabulary")
        return labels

    def decode(self, labels: Sequence[int]) -> str:
        return str(self.processor.decode([i for i in labels if i != BLANK]))

    @property
    def names(self) -> list[str]:
        return ["<blank>", *(self.processor.id_to_piece(i) for i in range(1, len(self)))]

    def words(self, labels: Sequence[int]) -> list[tuple[str, int, int]]:
        names = self.names
        starts = [i for i, label in enumerate(labels) if i == 0 or names[label].startswith(SPACE)]
        pairs = itertools.pairwise([*starts, len(labels)])
        found = [("".join(names[label] for label in labels[a:b]).lstrip(SPACE), a, b) for a, b in pairs]
        return [(word, a, b) for word, a, b in found if word]


def label_of_space(tokens: Tokens) -> int | None:
    """The label of the space between words; None where none has one (phones, and pieces of words, which begin one)."""
    names = tokens.names
    pieces = any(name.startswith(SPACE) and name != SPACE for name in names)
    return names.index(SPACE) if SPACE in names and not pieces else None


def ctc_frames(labels: Sequence[Any]) -> int:
    """Frames that CTC needs at least: one a label and a blank between equal neighbours (Graves et al. 2006).

    Args:
        labels: integers, or a text with a label a character.
    """
    return len(labels) + sum(a == b for a, b in itertools.pairwise(labels))
