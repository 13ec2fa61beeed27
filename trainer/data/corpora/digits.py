"""Free Spoken Digit Dataset: the ten digits by six speakers, 50 times each, 8 kHz, CC BY-SA 4.0.

https://github.com/Jakobovski/free-spoken-digit-dataset. Layout: `recordings/7_jackson_32.wav`: digit, speaker, number.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import soundfile
from numpy.typing import NDArray
from pydantic import Field, model_validator

from trainer import keyed
from trainer.config import Config, Free, show
from trainer.data.corpora.base import SPLITS, Progress, Reading, SplitName, Utterance
from trainer.errors import UserError

WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
NAME = re.compile(r"([0-9])_([a-z]+)_([0-9]+)")
HELD_OUT = 5
"""Recordings 0 to 4 of each digit and speaker are the set's own test part."""
PAUSE_MS = (50, 300)
"""Shortest and longest silence between the digits of a string, and at its ends."""


class DigitsConfig(Config):
    """Spoken digits, one at a time or joined into strings."""

    kind: Literal["digits"] = "digits"
    path: Free[Path | None] = None
    """Folder that holds recordings/."""
    test_speakers: tuple[str, ...] = ("yweweler",)
    """All they say is the test split, so that it is of speakers whom training has not heard. Recordings 0 to 4 of the
    others validate. Without any, 0 to 4 of all speakers test, as the set's authors have it, and 5 to 9 validate."""
    min_digits: int = Field(1, ge=1)
    """Shortest string."""
    max_digits: int = Field(1, ge=1)
    """Longest string; the digits of one are by one speaker."""
    repeats: int = Field(1, ge=1)
    """How many strings each recording is in."""
    seed: int = 0
    """Of the strings: each is a function of (seed, split, speaker, number)."""

    @model_validator(mode="after")
    def _shortest_first(self) -> "DigitsConfig":
        if self.min_digits > self.max_digits:
            raise ValueError(f"min_digits = {self.min_digits} is above max_digits = {self.max_digits}")
        return self

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """All recordings or strings.

        Args:
            folder: of the prepared corpus; not used.
            progress: not used, reading takes a second.

        Raises:
            UserError: there are no recordings, or not of the speakers named.
        """
        if self.path is None:
            raise UserError("data.corpus.path: is missing; set it to the folder that holds recordings/")
        place = self.path / "recordings"
        files = sorted(place.glob("*.wav"))
        if not files:
            raise UserError(f"{show(place)}: holds no *.wav; set data.corpus.path to the folder that holds recordings/")
        reading = Reading()
        groups: dict[tuple[SplitName, str], list[Path]] = defaultdict(list)
        for file in files:
            match = NAME.fullmatch(file.stem)
            if match is None:
                reading.problems.append(f"{show(file)}: wanted a name as 7_jackson_32.wav; rename or remove it")
            else:
                groups[self._split(match[2], int(match[3])), match[2]].append(file)
        speakers = {speaker for _, speaker in groups}
        if unknown := [speaker for speaker in self.test_speakers if speaker not in speakers]:
            named = ", ".join(sorted(speakers))
            raise UserError(
                f"data.corpus.test_speakers: {', '.join(unknown)}: {show(place)} has {named}; name one of these"
            )
        for split in SPLITS:
            for speaker in sorted(speakers):
                for utterance in self._strings(groups[split, speaker], split, speaker):
                    reading.add(utterance)
        return reading.result(show(place))

    def _split(self, speaker: str, number: int) -> SplitName:
        if self.test_speakers:
            return "test" if speaker in self.test_speakers else "valid" if number < HELD_OUT else "train"
        return "test" if number < HELD_OUT else "valid" if number < 2 * HELD_OUT else "train"

    def _strings(self, files: list[Path], split: SplitName, speaker: str) -> list[Utterance]:
        """The recordings of a speaker as they are, or shuffled and cut into strings."""
        if self.max_digits == 1 and self.repeats == 1:
            return [Utterance(file.stem, WORDS[int(file.stem[0])], file, split, show(file), speaker) for file in files]
        strings: list[Utterance] = []
        for repeat in range(self.repeats):
            random = _generator(self.seed, split, speaker, repeat)
            order = random.permutation(len(files))
            start = 0
            while start < len(files):
                stop = start + int(random.integers(self.min_digits, self.max_digits + 1))
                chosen = tuple(files[i] for i in order[start:stop])
                start = stop
                if len(chosen) < self.min_digits:  # what is left at the end
                    break
                key = f"{speaker}_{split}_{len(strings):05d}"
                text = " ".join(WORDS[int(file.stem[0])] for file in chosen)
                joined = Joined(chosen, tuple(file.stat().st_mtime_ns for file in chosen), self.seed, key)
                strings.append(Utterance(key, text, joined, split, f"string {key} of digits", speaker))
        return strings


def _generator(*parts: int | str) -> np.random.Generator:
    """Philox, a generator that is a function of its key and a counter (Salmon et al. 2011)."""
    return np.random.Generator(np.random.Philox(key=keyed.key("digits", *parts)))


@dataclass(frozen=True)
class Joined:
    """Recordings one after the other, with pauses; calling it gives samples (N,) and their rate."""

    files: tuple[Path, ...]
    mtimes_ns: tuple[int, ...]
    seed: int
    key: str

    def __call__(self) -> tuple[NDArray[np.float32], int]:
        read = [soundfile.read(file, dtype="float32") for file in self.files]
        rates = {rate for _, rate in read}
        if len(rates) > 1 or any(samples.ndim > 1 for samples, _ in read):
            raise soundfile.SoundFileError(f"recordings of different rates {sorted(rates)} or of several channels")
        (rate,) = rates
        pauses_ms = _generator(self.seed, self.key).uniform(*PAUSE_MS, size=len(read) + 1)
        silences = [np.zeros(round(rate * ms / 1000), np.float32) for ms in pauses_ms]
        pieces = [part for silence, (samples, _) in zip(silences, read, strict=False) for part in (silence, samples)]
        return np.concatenate([*pieces, silences[-1]]), rate
