"""Sequences that have one class each, as arrays: joints of a body, or sensors on it.

A frame is (J, C): J joints or sensors with C numbers each. What takes long to read is kept by `prepare` as columns that
all processes of a host map into memory.
"""

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from trainer.config import show
from trainer.data import columns
from trainer.data.columns import Columns
from trainer.errors import UserError

Split = Literal["train", "valid", "test"]
FILE = f"motions{columns.ENDING}"


class ClipError(Exception):
    """A clip that cannot be used.

    Args:
        reason: one of few texts.
        detail: what is particular to this clip.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} {detail}".strip())
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Clips:
    """One split, whatever it holds."""

    names: Sequence[str]
    labels: NDArray[np.int64]
    """(N,) numbers of classes."""
    lengths: NDArray[np.int64]
    """(N,) frames."""
    classes: tuple[str, ...]
    digest: str
    """Of all that the clips depend on."""
    read: Callable[[int], NDArray[Any]]
    """Frames (T, ...) of one; raises `ClipError`."""
    shape: tuple[int, ...]
    """Of a frame: (J, C), (F,) features, or (rows, columns, 3)."""


@dataclass(frozen=True)
class Motions:
    """A whole corpus."""

    frames: NDArray[np.float32]
    """(all frames, J, C), clip after clip."""
    lengths: NDArray[np.int64]
    labels: NDArray[np.int64]
    names: Sequence[str]
    classes: tuple[str, ...]
    groups: dict[str, NDArray[np.int64]] = field(default_factory=dict)
    """(N,) who or what a clip is of, by name of the kind: what splits are made by."""

    def part(self, chosen: NDArray[np.int64]) -> Clips:
        """Some of the clips, by number."""
        ends = np.cumsum(self.lengths)
        frames, digest = self.frames, 0
        starts = (ends - self.lengths)[chosen]
        clips = (frames[s:e] for s, e in zip(starts, ends[chosen], strict=True))
        for values in (self.lengths[chosen], self.labels[chosen], *clips):
            digest = zlib.crc32(np.ascontiguousarray(values).tobytes(), digest)

        def read(number: int) -> NDArray[np.float32]:
            clip: NDArray[np.float32] = frames[starts[number] : ends[chosen[number]]]
            if not np.isfinite(clip).all():
                raise ClipError("NaN or infinite values")
            return clip

        return Clips(
            [self.names[n] for n in chosen],
            self.labels[chosen],
            self.lengths[chosen],
            self.classes,
            f"{len(chosen)} clips {digest:08x}",
            read,
            frames.shape[1:],
        )


def joined(
    clips: Sequence[NDArray[Any]],
    labels: Sequence[int],
    names: Sequence[str],
    classes: Sequence[str],
    groups: Mapping[str, Sequence[int]],
) -> Motions:
    """A corpus from its clips, (T, J, C) each."""
    return Motions(
        np.concatenate(clips).astype(np.float32),
        np.array([len(c) for c in clips], dtype=np.int64),
        np.array(labels, dtype=np.int64),
        names,
        tuple(classes),
        {name: np.array(values, dtype=np.int64) for name, values in groups.items()},
    )


def keep(folder: Path, made_of: dict[str, Any], motions: Motions) -> None:
    """Write a corpus for `kept` to find.

    Args:
        made_of: settings that it depends on, JSON values.
    """
    facts = {"made_of": made_of, "shape": motions.frames.shape[1:], "classes": motions.classes}
    arrays: dict[str, NDArray[Any]] = {
        "frames": motions.frames.reshape(-1),
        "lengths": motions.lengths,
        "labels": motions.labels,
        "names": np.frombuffer("\n".join(motions.names).encode(), dtype=np.uint8),
        **{f"group {name}": values for name, values in motions.groups.items()},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        columns.write(folder / FILE, Columns(arrays, facts))
    except OSError as error:
        raise UserError(f"{show(folder)}: cannot be written: {error.strerror}; name another data.path") from error


def kept(folder: Path, made_of: dict[str, Any]) -> Motions:
    """What `keep` wrote, mapped into memory.

    Raises:
        UserError: nothing, something damaged, or another corpus.
    """
    path = folder / FILE
    found = columns.read(path, {})
    if found is None:
        state = "is damaged" if path.exists() else "is not there"
        raise UserError(f"{show(path)}: {state}; run `./launch.sh prepare CONFIG` first")
    if found.facts.get("made_of") != made_of:
        raise UserError(
            f"{show(path)}: holds another corpus ({json.dumps(found.facts.get('made_of'))}); run `./launch.sh prepare "
            "CONFIG` again, or set data.path"
        )
    groups = {name[6:]: values for name, values in found.arrays.items() if name.startswith("group ")}
    names = bytes(found["names"]).decode().split("\n")
    frames = found["frames"].reshape(-1, *found.facts["shape"])
    return Motions(frames, found["lengths"], found["labels"], names, tuple(found.facts["classes"]), groups)


def read_npz(path: Path) -> Motions:
    """A corpus from `frames` (all frames, J, C) or (all frames, D), `lengths` (N,), `labels` (N,) and, where they are
    there, `label_names` and `names`.

    Raises:
        UserError: it is not there, damaged, or its arrays do not fit together.
    """
    try:
        with np.load(path, allow_pickle=False) as archive:
            given = {name: archive[name] for name in archive.files}
        frames, lengths, labels = given["frames"], given["lengths"], given["labels"]
        if not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(f"labels of {labels.dtype}, not whole numbers")
        classes = given.get("label_names", np.arange(labels.max(initial=-1) + 1)).astype(str)
        names = given.get("names", np.array([f"{path.stem}-{i}" for i in range(len(lengths))])).astype(str)
        if frames.ndim == 2:
            frames = frames[..., None]
        fits = frames.ndim == 3 and lengths.ndim == 1 and lengths.shape == labels.shape == names.shape
        if not (fits and lengths.min(initial=1) >= 1 and lengths.sum() == len(frames)):
            raise ValueError(f"frames {frames.shape}, lengths {lengths.shape} of {lengths.sum()} frames")
        if labels.min(initial=0) < 0 or labels.max(initial=-1) >= len(classes):
            raise ValueError(f"labels from {labels.min()} to {labels.max()} of {len(classes)} classes")
    except FileNotFoundError as error:
        raise UserError(
            f"{show(path)}: there is no such file; put it there, or set data.corpus.path to its folder"
        ) from error
    except Exception as error:  # numpy raises what zip and its own headers give
        raise UserError(
            f"{show(path)}: is no archive of motions ({type(error).__name__}: {error}); wanted frames (all frames, J, "
            "C), lengths (N,) and labels (N,), see docs/video.md"
        ) from error
    return Motions(frames.astype(np.float32), lengths.astype(np.int64), labels.astype(np.int64), names, tuple(classes))
