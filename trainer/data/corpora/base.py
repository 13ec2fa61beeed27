"""What every raw corpus yields: utterances, each with its transcript, its audio and its split."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

SplitName = Literal["train", "valid", "test"]

SPLITS: tuple[SplitName, ...] = ("train", "valid", "test")

Progress = Callable[[str, int, int], None]
"""Told (what, done, total) from time to time during something long, in any unit."""


@dataclass(frozen=True)
class Utterance:
    """One recording and what was said in it."""

    key: str
    """Unique in the corpus, without '.' and '/', which end a key inside a shard."""
    text: str
    """Transcript before normalisation."""
    audio: Path | Callable[[], tuple[NDArray[np.float32], int]]
    """A file, or what makes mono samples (N,) in [-1, 1] and their rate in Hz.

    A callable is pickled for the worker processes, and its `repr` must say all that its samples depend on: by that
    `prepare` knows whether a shard is still good.
    """
    split: SplitName | None
    """None: by the normalised transcript, see `split_by_text`."""
    where: str
    """Its place for a person, such as `etc/txt.done.data line 17`."""


def split_by_text(text: str) -> SplitName:
    """The split of a sentence: 10 % test, 5 % valid, the rest train, by a hash of the text alone.

    So a sentence that was read twice is never in two splits, and a corpus that grows keeps its old split.

    Args:
        text: a normalised transcript.
    """
    percent = int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) % 100
    return "test" if percent < 10 else "valid" if percent < 15 else "train"


MAX_SHOWN = 20
"""Problems that one message lists."""


def listing(problems: list[str]) -> str:
    """Problems as the text of one message, a line each."""
    shown = problems[:MAX_SHOWN]
    if len(problems) > MAX_SHOWN:
        shown.append(f"and {len(problems) - MAX_SHOWN} more")
    return "\n".join(shown)


class BadLinesError(UserError):
    """Some lines of a corpus cannot be used; `prepare` goes on with the others to find all that is wrong at once.

    Args:
        problems: a line each, with place, key, value and cure.
        usable: the utterances of the other lines.
    """

    def __init__(self, problems: list[str], usable: list[Utterance]) -> None:
        super().__init__(listing(problems))
        self.problems = problems
        self.usable = usable
