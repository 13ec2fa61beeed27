"""What every raw corpus yields: utterances, each with its transcript, its audio and its split."""

import gzip
import hashlib
import json
import math
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.config import Config, Free, is_file, show
from trainer.data.text import not_text
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
    """A file, or what makes mono samples (N,) in [-1, 1] and their rate in Hz. Where the features are precomputed: a
    file that holds a matrix, see `matrices.py`.

    A callable is pickled for the worker processes, and its `repr` must say all that its samples depend on: by that
    `prepare` knows whether a shard is still good.
    """
    split: SplitName | None
    """None: by the normalised transcript, see `split_by_text`."""
    where: str
    """Its place for a person, such as `etc/txt.done.data line 17`."""
    speaker: str | None = None
    """Who speaks, where the corpus says it."""
    start_seconds: float = 0.0
    """Where it begins in the file."""
    end_seconds: float | None = None
    """Where it ends in the file; None: with the file."""
    channel: int | None = None
    """Of a file with several, from 0 on; None: their mean."""


def percentile(text: str) -> int:
    """A number from 0 to 99 that is a function of the text alone, evenly spread over texts."""
    return int(hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), 16) % 100


def split_by_text(text: str) -> SplitName:
    """The split of a sentence: 10 % test, 5 % valid, the rest train, by a hash of the text alone.

    So a sentence that was read twice is never in two splits, and a corpus that grows keeps its old split.

    Args:
        text: a normalised transcript.
    """
    percent = percentile(text)
    return "test" if percent < 10 else "valid" if percent < 15 else "train"


def make_key(text: str) -> str:
    """A text as a key: webdataset ends one at the first dot, and a slash makes a folder."""
    return re.sub(r"[^\w@+=-]", "_", text)


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


class Reading:
    """Utterances of a corpus as they are found, and what is wrong with the others.

    Attributes:
        found: by key.
        problems: a line each, with place, key, value and cure.
    """

    def __init__(self) -> None:
        self.found: dict[str, Utterance] = {}
        self.problems: list[str] = []

    def add(self, utterance: Utterance) -> None:
        """Take an utterance, unless its key is taken, its text is none, or its file is not there."""
        audio, text = utterance.audio, utterance.text
        named = f"{utterance.where}: key {utterance.key}"
        before = len(self.problems)
        if isinstance(audio, Path) and not is_file(audio):
            cure = "put it back or remove the line"
            self.problems.append(f"{named}: audio = {show(audio)}: there is no such file; {cure}")
        if not text.strip():
            self.problems.append(f"{named}: text = {text!r}: is empty; write what is said or remove the line")
        elif bad := not_text(text):
            cure = "write it again or remove the line"
            self.problems.append(f"{named}: text = {text[:60]!r}: holds {bad!r}, no character of a text; {cure}")
        start, end = utterance.start_seconds, utterance.end_seconds
        if not 0 <= start < (math.inf if end is None else end) or (end is not None and not math.isfinite(end)):
            self.problems.append(f"{named}: lasts from {start} to {end} s; mend the times or remove the line")
        if len(self.problems) > before:
            return
        first = self.found.setdefault(utterance.key, utterance)
        if first is not utterance:
            self.problems.append(
                f"{utterance.where}: key = {utterance.key!r}: is that of {first.where} too; give each its own, or "
                "remove one"
            )

    def result(self, what: str) -> list[Utterance]:
        """All utterances.

        Args:
            what: was read, for the message where there is none.

        Raises:
            BadLinesError: some cannot be used.
            UserError: there is none.
        """
        if self.problems:
            raise BadLinesError(self.problems, list(self.found.values()))
        if not self.found:
            raise UserError(f"{what}: holds no utterance")
        return list(self.found.values())


class SplitFiles(Config):
    """Files or folders that are each of one split.

    Where valid or test is not given, sentences of `train` make it up, by a hash of the text as in `split_by_text`.
    """

    train: Free[tuple[Path, ...]] = ()
    valid: Free[tuple[Path, ...]] = ()
    test: Free[tuple[Path, ...]] = ()

    def by_split(self) -> Iterator[tuple[SplitName, Path]]:
        """All of them, each with its split."""
        for split in SPLITS:
            for path in getattr(self, split):
                yield split, path

    def split_of(self, given: SplitName, text: str) -> SplitName | None:
        """Split of an utterance in the files of `given`; None leaves it to the normalised text."""
        if given != "train" or (self.valid and self.test):
            return given
        if not self.valid and not self.test:
            return None
        drawn = split_by_text(text)
        return drawn if not getattr(self, drawn) else "train"


def read_text(path: Path, cure: str) -> list[str]:
    """Lines of a text file of a corpus.

    Raises:
        UserError: there is none (the message ends in `cure`), or it is not UTF-8 text.
    """
    if not is_file(path):
        raise UserError(f"{show(path)}: there is no such file; {cure}")
    try:
        with path.open(encoding="utf-8-sig") as lines:  # not `splitlines`, for which some signs in a line end it
            return [line.removesuffix("\n") for line in lines]
    except UnicodeDecodeError as error:
        raise UserError(not_utf8(path, error)) from error


def not_utf8(path: Path, error: UnicodeDecodeError) -> str:
    """What a user is told of such a file."""
    return f"{show(path)}: is not UTF-8 text ({error.reason}); save it as UTF-8"


def json_lines(path: Path, problems: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects of a file of JSON lines, packed with gzip or not, as (line number, fields).

    Args:
        problems: what is wrong with the other lines is added to it.

    Raises:
        UserError: the file is not UTF-8, or a packed one is damaged.
    """
    packed = path.suffix.lower() == ".gz"
    with gzip.open(path, "rt", encoding="utf-8-sig") if packed else path.open(encoding="utf-8-sig") as lines:
        try:
            for number, text in enumerate(lines, 1):
                if not text.strip():
                    continue
                where = f"{show(path)} line {number}"
                try:
                    fields = json.loads(text, object_pairs_hook=_once)
                except (ValueError, RecursionError) as error:
                    problems.append(f"{where}: {text.strip()[:60]!r}: is not JSON ({error}); write one object a line")
                    continue
                if isinstance(fields, dict):
                    yield number, fields
                else:
                    problems.append(f"{where}: {text.strip()[:60]!r}: is not an object; write {{...}} on each line")
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise UserError(f"{show(path)}: cannot be unpacked ({error}); fetch or write it again") from error
        except UnicodeDecodeError as error:
            raise UserError(not_utf8(path, error)) from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON; of a field that is repeated, JSON would silently take the last."""
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the field {next(n for n in names if names.count(n) > 1)!r} is given twice")
    return fields
