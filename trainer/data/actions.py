"""Clips of actions as batches: segments of joints, of features of frames, or of frames, and the class of each clip."""

import zlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field

from trainer import keyed
from trainer.config import Config, Free
from trainer.data.clips import AugmentConfig, Input, SamplingConfig, at, derived
from trainer.data.corpora.base import Progress
from trainer.data.dataset import Batch, Fault, Media
from trainer.data.generated import GeneratedConfig, GeneratedDataset, GeneratedPlan
from trainer.data.gestures import WatchConfig
from trainer.data.motions import ClipError, Clips, Split
from trainer.data.plan import MicroBatch
from trainer.data.skeletons import JointsConfig, NTUConfig
from trainer.data.videos import VideosConfig
from trainer.errors import UserError

CorpusConfig = WatchConfig | JointsConfig | NTUConfig | VideosConfig
PICTURE = 3
"""Axes of a frame that is a picture: (height, width, colours), in bytes."""
SHOWN = 8
"""Pictures of a strip."""


class ActionsConfig(Config):
    """Which clips, and what of them a net sees."""

    path: Free[Path] = Path("data/watch")
    """Folder for what `prepare` makes."""
    corpus: Annotated[CorpusConfig, Field(discriminator="kind")] = WatchConfig()
    sampling: SamplingConfig = SamplingConfig()
    augment: AugmentConfig = AugmentConfig()
    inputs: tuple[Input, ...] = Field(("positions",), min_length=1)
    """Of joints: positions, motion (from frame to frame), distances (of each two joints)."""

    def prepare(self, progress: Progress) -> str:
        """Read the corpus and keep what takes long; says what came of it."""
        said = self.corpus.prepare(self.path, progress)
        _clips.cache_clear()
        return said

    def clips(self, split: Split, seed: int) -> Clips:
        """One split.

        Raises:
            UserError: it is not there, or damaged.
        """
        return _clips(self.path, self.corpus, split, seed)

    def frame_shape(self, clips: Clips) -> tuple[int, ...]:
        """Of a frame as a net gets it: (D,), or (rows, columns, 3)."""
        if len(clips.shape) != 2:
            return clips.shape
        return derived(np.zeros((1, *clips.shape), dtype=np.float32), self.inputs).shape[1:]


@lru_cache(maxsize=4)
def _clips(folder: Path, corpus: CorpusConfig, split: Split, seed: int) -> Clips:
    return corpus.clips(folder, split, seed)


class ActionsDataset(GeneratedDataset):
    """Batches with `inputs` (B S, n, ...), S segments of each clip one after the other, `lengths` (B S,) of their rows,
    and `targets` (B,) int64 classes. In training S is 1.

    Raises:
        UserError: the split is not there, or has fewer joints than are to be mirrored.
    """

    plan: GeneratedPlan

    def __init__(self, config: ActionsConfig, split: Split, plan: GeneratedConfig, seed: int) -> None:
        self.config, self.split, self.seed = config, split, seed
        self.clips = config.clips(split, seed)
        pairs, count = config.augment.mirror_pairs, self.clips.shape[0]
        if (
            len(self.clips.shape) == 2
            and config.augment.mirror
            and max((j for p in pairs for j in p), default=0) >= count
        ):
            raise UserError(
                f"data.augment.mirror_pairs = {pairs}: a frame has {count} joints, from 0 to {count - 1}; set the "
                "pairs of these, or data.augment.mirror=0"
            )
        self.segments = 1 if split == "train" else config.sampling.segments
        self.shape = config.frame_shape(self.clips)
        frames = config.sampling.frames * self.segments
        super().__init__(
            GeneratedPlan(plan, len(self.clips.labels), frames, seed, shuffle=split == "train"), self.clips.digest
        )
        self.identity["classes"] = " ".join(self.clips.classes)

    def sample(self, number: int, epoch: int) -> list[NDArray[Any]]:
        """The segments of a clip, (n, ...) each.

        Raises:
            ClipError: it cannot be used.
        """
        config, frames = self.config, self.clips.read(number)
        if self.split != "train":
            segments = [at(frames, places) for places in config.sampling.fixed(len(frames))]
        else:
            key = keyed.key(self.seed, epoch, str(number), "clip")
            segments = [config.augment(at(frames, config.sampling.drawn(len(frames), key)), key)]
        return [derived(s, config.inputs) for s in segments] if frames.ndim == 3 else segments

    def _type(self, segments: list[NDArray[Any]]) -> np.dtype[Any]:
        """Of the numbers in a batch; where no clip of it can be read, that of those that can."""
        found = np.result_type(*segments)
        if np.issubdtype(found, np.bool_):
            return np.dtype(np.uint8 if len(self.shape) == PICTURE else np.float32)
        return found

    def load(self, micro_batch: MicroBatch) -> Batch:
        """The samples of a micro-batch; a clip that cannot be read is zeros, invalid, and named in `faults`."""
        segments: list[NDArray[Any]] = []
        valid, faults, checksums = [], [], []
        for number in micro_batch.samples:
            try:
                found = self.sample(number, micro_batch.epoch)
                valid.append(True)
            except ClipError as error:
                found = [np.zeros((1, *self.shape), dtype=bool)] * self.segments  # changes no other's type
                valid.append(False)
                faults.append(Fault(str(number), error.reason, f"{self.clips.names[number]} {error.detail}".strip()))
            segments += found
            checksums.append(zlib.crc32(b"".join(segment.tobytes() for segment in found)))
        lengths = torch.tensor([len(segment) for segment in segments])
        inputs = np.zeros((len(segments), int(lengths.max()), *self.shape), dtype=self._type(segments))
        for row, segment in zip(inputs, segments, strict=True):
            row[: len(segment)] = segment
        keys = [str(number) for number in micro_batch.samples]
        return {
            "inputs": torch.from_numpy(inputs),
            "lengths": lengths,
            "targets": torch.from_numpy(self.clips.labels[list(micro_batch.samples)]),
            "keys": keys,
            "names": [self.clips.names[number] for number in micro_batch.samples],
            "valid": torch.tensor(valid),
            "noise_keys": torch.tensor([keyed.key(self.seed, micro_batch.epoch, key) for key in keys]),
            "checksums": checksums,
            "faults": faults,
        }

    def media(self, key: str) -> Media:
        """The first segment: its numbers over time, or a strip of its pictures."""
        number = int(key)
        segment = self.sample(number, 0)[0]
        about = {"clip": self.clips.names[number], "frames": str(self.clips.lengths[number])}
        if segment.ndim == 2:
            return Media(image=segment.T, captions=about)
        chosen = segment[np.linspace(0, len(segment) - 1, min(SHOWN, len(segment))).astype(int)]
        strip = np.concatenate(list(chosen.mean(-1)), axis=1)
        return Media(image=strip[::-1], captions=about)
