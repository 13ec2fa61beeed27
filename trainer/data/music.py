"""Piano rolls: which of 88 keys sound in each frame of a piece, and the task to predict each frame from all before it.

Training takes chunks of a piece, each from a state of its own; validation and test take whole pieces. Frames past a
piece's end count nothing anywhere: with padding in the mean, chorales that are half padding look twice as predictable.

Source: Boulanger-Lewandowski, Bengio & Vincent 2012, arXiv:1206.6392, whose four sets and splits `benchmark` reads.
"""

import zlib
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from trainer import keyed
from trainer.config import Config, Free
from trainer.data.corpora.base import Progress
from trainer.data.dataset import Batch, Media
from trainer.data.generated import GeneratedConfig, GeneratedDataset, GeneratedPlan
from trainer.data.plan import MicroBatch
from trainer.data.scores import KEYS, ChoralesConfig, CorpusConfig, Piece, Roll, read_cache, write_cache

Split = Literal["train", "valid", "test"]


class MusicConfig(Config):
    """Which pieces, and how they are cut."""

    path: Free[Path] = Path("data/music")
    """Folder for the piano rolls that `prepare` makes."""
    corpus: CorpusConfig = Field(ChoralesConfig(), discriminator="kind")
    chunk_frames: PositiveInt | None = 100
    """Predictions in one training sample; null: whole pieces."""
    transpose: int = Field(0, ge=0, le=12)
    """Training moves each piece by up to so many semitones up or down, another number each epoch; a piece that would
    leave the keyboard stays nearer."""

    def pieces(self) -> Sequence[Piece]:
        """All pieces of all splits.

        Raises:
            UserError: they are not there, or damaged.
        """
        return _pieces(self.path, self.corpus)

    def prepare(self, progress: Progress) -> str:
        """Read the corpus and keep its rolls; says what was left out."""
        pieces, bad = self.corpus.read(self.path, progress)
        write_cache(self.path, self.corpus, pieces)
        _pieces.cache_clear()
        left_out = "".join(f"\nleft out: {line}" for line in bad)
        return f"{len(pieces)} pieces, {sum(len(p.roll) for p in pieces):,} frames{left_out}"


@lru_cache(maxsize=2)
def _pieces(folder: Path, corpus: CorpusConfig) -> Sequence[Piece]:
    if corpus.direct:
        return corpus.read(folder, lambda *_: None)[0]
    return read_cache(folder, corpus)


class MusicDataset(GeneratedDataset):
    """Batches with `inputs` and `targets` (B, T, 88) of zeros and ones, and `lengths` (B,) of their rows.

    A target is the frame after its input; a piece of T frames has T - 1 of them.
    """

    plan: GeneratedPlan

    def __init__(self, config: MusicConfig, split: Split, plan: GeneratedConfig, seed: int) -> None:
        self.pieces = [p for p in config.pieces() if p.split == split and len(p.roll) > 1]
        self.transpose = config.transpose if split == "train" else 0
        chunk = config.chunk_frames if split == "train" else None
        self.chunks = [  # piece, first frame, predictions
            (n, start, min(chunk or len(piece.roll), len(piece.roll) - 1 - start))
            for n, piece in enumerate(self.pieces)
            for start in range(0, len(piece.roll) - 1, chunk or len(piece.roll))
        ]
        frames = np.array([count for _, _, count in self.chunks], dtype=np.int64)
        self.plan = GeneratedPlan(plan, len(self.chunks), frames, seed, shuffle=split == "train")
        checksum = 0
        for piece in self.pieces:
            checksum = zlib.crc32(piece.roll.tobytes(), checksum)
        self.identity = {"samples": f"{len(self.chunks)} of {frames.sum()} frames: rolls {checksum:08x}"}

    def roll(self, sample: int, epoch: int) -> Roll:
        """Frames of one sample, one more than it has predictions."""
        number, start, count = self.chunks[sample]
        roll = self.pieces[number].roll[start : start + count + 1]
        if not self.transpose:
            return roll
        span = 2 * self.transpose + 1
        shift = int(keyed.number(self.plan.seed, epoch, self.pieces[number].name, "transpose") * span) - self.transpose
        return transposed(self.pieces[number].roll, roll, shift)

    def load(self, micro_batch: MicroBatch) -> Batch:
        """The samples of a micro-batch."""
        rolls = [self.roll(sample, micro_batch.epoch) for sample in micro_batch.samples]
        lengths = torch.tensor([len(roll) - 1 for roll in rolls])
        padded = np.zeros((len(rolls), int(lengths.max()) + 1, KEYS), dtype=np.float32)
        for row, roll in zip(padded, rolls, strict=True):
            row[: len(roll)] = roll
        frames = torch.from_numpy(padded)
        keys = [str(sample) for sample in micro_batch.samples]
        return {
            "inputs": frames[:, :-1],
            "targets": frames[:, 1:],
            "lengths": lengths,
            "keys": keys,
            "valid": torch.ones(len(keys), dtype=torch.bool),
            "noise_keys": torch.tensor([keyed.key(self.plan.seed, micro_batch.epoch, key) for key in keys]),
            "checksums": [zlib.crc32(roll.tobytes()) for roll in rolls],
            "faults": [],
        }

    def media(self, key: str) -> Media:
        """The roll as a picture."""
        return Media(image=self.roll(int(key), 0).T)


def transposed(piece: Roll, roll: Roll, shift: int) -> Roll:
    """A part of a piece moved by some semitones, by fewer where the piece as a whole would leave the keyboard."""
    used = np.flatnonzero(piece.any(0))
    if len(used):
        shift = max(-int(used[0]), min(shift, KEYS - 1 - int(used[-1])))
    return np.roll(roll, shift, axis=1)


# What can be predicted without a memory


def marginals(rolls: Sequence[Roll]) -> NDArray[np.float64]:
    """(88,) how often each key sounds, with one frame on and one off added."""
    on = sum(roll.sum(0, dtype=np.float64) for roll in rolls)
    return np.asarray((on + 1) / (sum(len(roll) for roll in rolls) + 2))


def transitions(rolls: Sequence[Roll]) -> NDArray[np.float64]:
    """(2, 88) how often each key sounds after it was silent, and after it sounded."""
    seen, on = np.zeros((2, KEYS)), np.zeros((2, KEYS))
    for roll in rolls:
        for before in (0, 1):
            chosen = roll[:-1] == before
            seen[before] += chosen.sum(0)
            on[before] += (chosen & (roll[1:] == 1)).sum(0)
    return (on + 1) / (seen + 2)
