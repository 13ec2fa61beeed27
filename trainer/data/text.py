"""Text to labels and back: normalisation and character tokens."""

import itertools
import unicodedata
from collections.abc import Sequence
from typing import Literal

from pydantic import Field, field_validator

from trainer.config import Config

BLANK = 0
"""Label of the CTC blank; the characters follow from 1 on."""


def not_text(text: str) -> str:
    """The characters that no written text holds: control characters (but for white space) and halves of a character,
    as in JSON's "\\ud800"."""
    return "".join(sorted({c for c in text if unicodedata.category(c) in ("Cc", "Cs") and not c.isspace()}))


class UnknownCharacterError(ValueError):
    """A transcript holds a character outside the alphabet."""


class TextConfig(Config):
    """How a transcript becomes labels."""

    alphabet: str | None = Field(None, min_length=1)
    """The characters of the labels, in order; null takes those of the training transcripts."""
    lowercase: bool = True
    """Fold case before anything else."""
    unknown: Literal["error", "space", "drop"] = "error"
    """A character outside the alphabet stops `prepare`, becomes a space, or disappears."""

    @field_validator("alphabet")
    @classmethod
    def _characters_are_distinct(cls, alphabet: str | None) -> str | None:
        twice = "".join(sorted({c for c in alphabet or "" if str(alphabet).count(c) > 1}))
        if twice:
            raise ValueError(f"holds {twice!r} more than once; write each character once")
        if bad := not_text(alphabet or ""):
            raise ValueError(f"holds {bad!r}, which is no character of a text; take it out")
        return alphabet

    def normalise(self, text: str) -> str:
        """Text as it is trained on and scored: folded, cleaned, single spaces.

        Raises:
            UnknownCharacterError: a character is not in `alphabet` and `unknown` is "error".
        """
        text = text.lower() if self.lowercase else text
        if self.alphabet is not None:
            outside = sorted({c for c in text if c not in self.alphabet and not c.isspace()})
            if outside and self.unknown == "error":
                raise UnknownCharacterError("".join(outside))
            replacement = " " if self.unknown == "space" else ""
            for c in outside:
                text = text.replace(c, replacement)
        return " ".join(text.split())


class Characters:
    """One label a character; 0 is the CTC blank.

    Args:
        alphabet: the characters, each once.
    """

    def __init__(self, alphabet: str) -> None:
        if len(set(alphabet)) != len(alphabet):
            raise ValueError(f"alphabet={alphabet!r} holds a character twice")
        self.alphabet = alphabet
        self._label = {c: i + 1 for i, c in enumerate(alphabet)}

    def __len__(self) -> int:
        """Number of classes, the blank included."""
        return len(self.alphabet) + 1

    def encode(self, text: str) -> list[int]:
        """Labels of a normalised text.

        Raises:
            UnknownCharacterError: a character has no label.
        """
        try:
            return [self._label[c] for c in text]
        except KeyError as error:
            raise UnknownCharacterError(error.args[0]) from error

    def decode(self, labels: Sequence[int]) -> str:
        """Text of labels without blanks."""
        return "".join(self.alphabet[i - 1] for i in labels if i != BLANK)


def ctc_frames(text: str) -> int:
    """Frames that CTC needs at least: one a label and a blank between equal neighbours (Graves et al. 2006)."""
    return len(text) + sum(a == b for a, b in itertools.pairwise(text))
