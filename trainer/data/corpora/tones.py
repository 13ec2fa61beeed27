"""Generated speech-like audio: every letter is a voiced sound with two resonances of its own. Needs no download.

Enough of speech is there for a recogniser to learn something: pitch, loudness, tempo and resonances vary from clip to
clip, letters run into each other and may be doubled, there is noise. Clip i is a function of (seed, i).
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator

from trainer import keyed
from trainer.config import Config
from trainer.data.corpora.base import Progress, Utterance

SAMPLE_RATE_HZ = 16000
RAMP_MS = 15
"""Rise and fall of a letter; two neighbours overlap by half of it."""
HIGHEST_HARMONIC_HZ = 3600
MIN_SECONDS = 1.0


class TonesConfig(Config):
    """A made-up language of tones, to try things out and to test with."""

    kind: Literal["tones"] = "tones"
    num_utterances: PositiveInt = 400
    """About 2.3 s each."""
    alphabet: str = Field("abcdefgh", min_length=2)
    """Letters; the space between words comes on top of them."""
    seed: int = 0

    @field_validator("alphabet")
    @classmethod
    def _letters_are_distinct(cls, alphabet: str) -> str:
        if len(set(alphabet)) != len(alphabet) or any(c.isspace() for c in alphabet):
            raise ValueError("each letter once, and no space; take out the others")
        return alphabet

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """All clips; their sound is made when it is asked for.

        Args:
            folder: of the prepared corpus; not used, nothing is downloaded.
            progress: not used.
        """
        clips = [Tones(self.alphabet, self.seed, number) for number in range(self.num_utterances)]
        return [
            Utterance(f"tones_{clip.number:06d}", clip.text(), clip, None, f"tones number {clip.number}")
            for clip in clips
        ]


@dataclass(frozen=True)
class Tones:
    """One clip: calling it gives samples (N,) and their rate."""

    alphabet: str
    seed: int
    number: int

    def _generator(self, name: str) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64(keyed.key(self.seed, "tones", self.number, name)))

    def text(self) -> str:
        """Two to five words of two to five letters."""
        random = self._generator("text")
        sizes = random.integers(2, 6, size=random.integers(2, 6))
        return " ".join("".join(random.choice(list(self.alphabet), size)) for size in sizes)

    def __call__(self) -> tuple[NDArray[np.float32], int]:
        random = self._generator("audio")
        pitch_hz = random.uniform(100, 240)
        vocal_tract = random.uniform(0.94, 1.06)  # scales all resonances, as the size of a speaker does
        tempo = random.uniform(0.9, 1.1)

        overlap = SAMPLE_RATE_HZ * RAMP_MS // 2000
        pieces = []
        for c in self.text():
            if c == " ":
                pieces.append(np.zeros(_samples(random.uniform(80, 150))))
                continue
            size = _samples(min(max(random.uniform(70, 140) * tempo, 70), 140))
            first, last = pitch_hz * random.uniform(0.92, 1.08, size=2)
            pitch = np.linspace(first, last, size)
            formants = [f * vocal_tract * random.uniform(0.98, 1.02) for f in resonances_hz(self.alphabet, c)]
            pieces.append(random.uniform(0.6, 1.0) * _voiced(pitch, formants, random))

        lead, tail = (_samples(ms) for ms in random.uniform(40, 160, size=2))
        speech_size = sum(len(p) - overlap for p in pieces) + overlap
        size = max(lead + speech_size + tail, _samples(1000 * MIN_SECONDS))
        samples = np.zeros(size)
        at = lead
        for piece in pieces:
            samples[at : at + len(piece)] += piece
            at += len(piece) - overlap

        samples *= random.uniform(0.1, 0.5) / np.abs(samples).max()
        signal_to_noise_db = random.uniform(20, 35)
        noise = np.sqrt(np.mean(samples**2)) * 10 ** (-signal_to_noise_db / 20)
        samples += noise * random.standard_normal(size)
        return samples.astype(np.float32), SAMPLE_RATE_HZ


def _samples(ms: float) -> int:
    return round(SAMPLE_RATE_HZ * ms / 1000)


def resonances_hz(alphabet: str, letter: str) -> tuple[float, float]:
    """The two resonances of a letter: the letters lie on a grid, evenly in the logarithm."""
    columns = math.ceil(math.sqrt(len(alphabet)))
    row, column = divmod(alphabet.index(letter), columns)
    rows = math.ceil(len(alphabet) / columns)
    first = 280 * (850 / 280) ** (column / max(columns - 1, 1))
    second = 1100 * (2900 / 1100) ** (row / max(rows - 1, 1))
    return first, second


def _voiced(pitch: NDArray[np.float64], formants: list[float], random: np.random.Generator) -> NDArray[np.float64]:
    """Harmonics of `pitch` (N,) Hz under the resonances, louder at the start than at the end -> (N,)."""
    harmonics = np.arange(1, int(HIGHEST_HARMONIC_HZ / pitch.max()) + 1)[:, None]
    frequency = harmonics * pitch.mean()
    gain = 0.02 + sum(1 / (1 + ((frequency - f) / (60 + f / 20)) ** 2) for f in formants)  # Lorentz curves
    phase = 2 * np.pi * np.cumsum(pitch) / SAMPLE_RATE_HZ
    start = random.uniform(0, 2 * np.pi, size=harmonics.shape)
    tone = (gain * np.sin(harmonics * phase + start)).sum(0)

    # The decay lets one hear that a letter was doubled.
    envelope = np.linspace(1.0, 0.35, len(tone))
    ramp = 0.5 - 0.5 * np.cos(np.pi * np.linspace(0, 1, _samples(RAMP_MS)))
    envelope[: len(ramp)] *= ramp
    envelope[-len(ramp) :] *= ramp[::-1]
    return np.asarray(tone * envelope / np.sqrt(np.mean(tone**2)))
