"""Which frames of a clip a net sees, and how the joints in them are disturbed in training.

Both are functions of (seed, epoch, clip) alone, see `trainer.keyed`: the same on any number of processes and workers,
in any batch, and after a resume. Validation and test are never disturbed.
"""

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator, model_validator

from trainer import keyed
from trainer.config import Config

Floats = NDArray[np.float32]
Input = Literal["positions", "motion", "distances"]


class SamplingConfig(Config):
    """Segments of clips."""

    frames: PositiveInt = 32
    """Frames of a segment."""
    stride: PositiveFloat | None = None
    """Frames of the clip from one to the next, between which positions are interpolated; a clip that is too short gives
    a shorter segment. Null: all of the clip, however long it is, in so many frames."""
    min_share: float = Field(1.0, gt=0, le=1)
    """Without a stride, training takes a part of the clip: a share between this and 1, anywhere in it."""
    time_warp: float = Field(1.0, ge=1)
    """Training goes through a segment at speeds that change smoothly, each between 1 / time_warp and time_warp; with a
    stride its mean is drawn in the same way."""
    segments: PositiveInt = 1
    """Validation and test look at so many segments, evenly spread over the clip, and take the mean of their
    probabilities. Without a stride a segment is the whole clip, so one is enough."""

    @model_validator(mode="after")
    def _fits(self) -> "SamplingConfig":
        if self.stride is None and self.segments > 1:
            raise ValueError(f"segments = {self.segments} without a stride would be {self.segments} times the same")
        if self.stride is not None and self.min_share < 1:
            raise ValueError(f"min_share = {self.min_share} with stride = {self.stride}: take one of them")
        return self

    def drawn(self, length: int, key: int) -> Floats:
        """Places in a clip of `length` frames that training takes, (n,) ascending in [0, length - 1]."""
        n, last = self.frames, length - 1.0
        if self.stride is None:
            share = self.min_share + (1 - self.min_share) * keyed.number(key, "share")
            span = share * last
        else:
            step = self.stride * self._speed(key, "mean")
            n = min(n, int(last / step) + 1)
            span = (n - 1) * step
        start = (last - span) * keyed.number(key, "start")
        places = np.linspace(0.0, 1.0, n)
        if self.time_warp > 1 and n > 2:
            knots = [self._speed(key, f"knot {i}") for i in range(4)]
            passed = np.cumsum(np.interp(np.linspace(0, 3, n - 1), range(4), knots))
            places[1:] = passed / passed[-1]
        return _clipped(start + span * places, last)

    def fixed(self, length: int) -> list[Floats]:
        """The places of each segment that validation and test take."""
        n, last = self.frames, length - 1.0
        if self.stride is None:
            return [_clipped(np.linspace(0.0, last, n), last)]
        n = min(n, int(last / self.stride) + 1)
        span = (n - 1) * self.stride
        starts = [(last - span) / 2] if self.segments == 1 else np.linspace(0.0, last - span, self.segments).tolist()
        return [_clipped(start + self.stride * np.arange(n), last) for start in starts]

    def _speed(self, key: int, name: str) -> float:
        return float(self.time_warp ** (2 * keyed.number(key, "speed", name) - 1))


def _clipped(places: NDArray[Any], last: float) -> Floats:
    return np.clip(places, 0.0, last).astype(np.float32)


def at(frames: NDArray[Any], places: Floats) -> NDArray[Any]:
    """Frames at places between them: numbers by linear interpolation, pictures (bytes) the nearest.

    Shape:
        frames: (T, ...), places: (n,) -> (n, ...)
    """
    if frames.dtype == np.uint8:
        return frames[np.rint(places).astype(np.int64)]
    below = np.minimum(places.astype(np.int64), max(len(frames) - 2, 0))
    above = np.minimum(below + 1, len(frames) - 1)
    share = (places - below).astype(np.float32).reshape(-1, *[1] * (frames.ndim - 1))
    found: NDArray[Any] = frames[below] * (1 - share) + frames[above] * share
    return found.astype(np.float32)


class AugmentConfig(Config):
    """What training does to the joints of a segment. The default is nothing."""

    rotation_degrees: float = Field(0.0, ge=0, le=180)
    """All frames are turned by one angle of up to so many degrees: in the plane, or in space about a random axis."""
    scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest factor of each coordinate, all frames and joints alike."""
    shift: float = Field(0.0, ge=0)
    """All frames are moved by up to so much in each coordinate."""
    noise: float = Field(0.0, ge=0)
    """Standard deviation of normal numbers added to each joint, each frame anew."""
    hidden_joints: float = Field(0.0, ge=0, lt=1)
    """Chance of each joint to stand still at its mean place."""
    mirror: float = Field(0.0, ge=0, le=1)
    """Chance of left and right to change places; of pictures, too."""
    mirror_pairs: tuple[tuple[NonNegativeInt, NonNegativeInt], ...] = ()
    """Joints (from 0 on) that are each other's mirror image."""

    @field_validator("scale")
    @classmethod
    def _ordered(cls, scale: tuple[float, float]) -> tuple[float, float]:
        if not 0 < scale[0] <= scale[1]:
            raise ValueError("wanted [smallest, largest], both above 0, as [0.8, 1.2]")
        return scale

    def __call__(self, frames: NDArray[Any], key: int) -> NDArray[Any]:
        """A segment (n, J, C) of joints, or (n, rows, columns, 3) of pictures, which are mirrored at most."""
        mirrored = keyed.number(key, "mirror") < self.mirror
        if frames.ndim != 3:
            return frames[:, :, ::-1] if mirrored and frames.ndim == 4 else frames
        joints, size = np.array(frames, dtype=np.float32), frames.shape[-1]
        if mirrored:
            for left, right in self.mirror_pairs:
                joints[:, [left, right]] = joints[:, [right, left]]
            joints[..., 0] *= -1
        low, high = self.scale
        joints *= [low + (high - low) * keyed.number(key, "scale", c) for c in range(size)]
        if self.rotation_degrees and size in (2, 3):
            joints = joints @ self._rotation(size, key).T
        joints += [self.shift * (2 * keyed.number(key, "shift", c) - 1) for c in range(size)]
        for j in range(frames.shape[1]):
            if keyed.number(key, "hidden", j) < self.hidden_joints:
                joints[:, j] = joints[:, j].mean(0)
        if self.noise:
            drawn = keyed.table(np.array([key]), joints.size * 2, "noise").reshape(2, *joints.shape)
            joints += self.noise * np.sqrt(-2 * np.log1p(-drawn[0])) * np.cos(2 * np.pi * drawn[1])  # Box & Muller
        return joints.astype(np.float32)

    def _rotation(self, size: int, key: int) -> Floats:
        angle = np.deg2rad(self.rotation_degrees) * (2 * keyed.number(key, "angle") - 1)
        cos, sin = np.cos(angle), np.sin(angle)
        if size == 2:
            return np.array([[cos, -sin], [sin, cos]], dtype=np.float32)
        z, turn = 2 * keyed.number(key, "axis", "z") - 1, 2 * np.pi * keyed.number(key, "axis", "turn")
        x, y = np.sqrt(1 - z * z) * np.array([np.cos(turn), np.sin(turn)])
        cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
        return np.asarray(np.eye(3) + sin * cross + (1 - cos) * cross @ cross, dtype=np.float32)  # Rodrigues


def derived(joints: Floats, inputs: tuple[Input, ...]) -> Floats:
    """What a net reads of joints (n, J, C): (n, D).

    `positions` are the joints themselves, `motion` their differences from frame to frame (0 in the first), `distances`
    those between each two joints (Yang et al. 2019, arXiv:1907.09658, section 3.1).
    """
    parts = []
    for kind in inputs:
        if kind == "positions":
            parts.append(joints.reshape(len(joints), -1))
        elif kind == "motion":
            parts.append(np.diff(joints, axis=0, prepend=joints[:1]).reshape(len(joints), -1))
        else:
            one, other = np.triu_indices(joints.shape[1], 1)
            parts.append(np.linalg.norm(joints[:, one] - joints[:, other], axis=-1))
    return np.concatenate(parts, axis=-1).astype(np.float32)
