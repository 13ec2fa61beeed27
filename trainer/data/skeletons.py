"""Joints of bodies: archives of arrays, such as those of JHMDB, and the skeleton files of NTU RGB+D.

Sources: Jhuang, Gall, Zuffi, Schmid & Black 2013 (JHMDB); Shahroudy, Liu, Ng & Wang 2016, arXiv:1604.02808 (NTU RGB+D,
its two protocols in section 3.2); Liu et al. 2019, arXiv:1905.04757 (NTU RGB+D 120).
"""

import os
import re
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from trainer.config import Config, Free
from trainer.data.corpora.base import Progress, percentile
from trainer.data.motions import ClipError, Clips, Motions, Split, joined, keep, kept, read_npz
from trainer.data.parallel import results
from trainer.errors import UserError


class JointsConfig(Config):
    """Archives (.npz) of motions that are there already: see `read_npz`."""

    kind: Literal["joints"] = "joints"
    path: Free[Path]
    """Folder of the archives."""
    train: str = "train.npz"
    valid: str | None = None
    """Null: clips of the training archive."""
    test: str = "test.npz"
    valid_share: float = Field(0.15, gt=0, lt=1)
    """Of each class in the training archive, so many of the last clips are for validation. Clips that were cut from one
    film mostly stand side by side, so few films are in both."""

    def prepare(self, folder: Path, progress: Progress) -> str:
        """Nothing to make: look at the archives."""
        parts = {split: self.clips(folder, split, 0) for split in ("train", "valid", "test")}
        if empty := [split for split, p in parts.items() if not len(p.labels)]:
            raise UserError(
                f"data.corpus.path = {self.path}: no clip for {' and '.join(empty)}; name an archive for it, or for "
                f"validation a larger valid_share than {self.valid_share}"
            )
        classes = len(parts["train"].classes)
        return f"{classes} classes; " + ", ".join(
            f"{split} {len(p.labels):,} clips of {p.lengths.sum():,} frames" for split, p in parts.items()
        )

    def clips(self, folder: Path, split: Split, seed: int) -> Clips:
        """One split."""
        train = read_npz(self.path / self.train)
        name = self.valid if split == "valid" else self.test
        if split != "train" and name is not None:
            found = read_npz(self.path / name)
            if (found.classes, found.frames.shape[1:]) != (train.classes, train.frames.shape[1:]):
                raise UserError(
                    f"data.corpus: {name} has {len(found.classes)} classes and frames of {found.frames.shape[1:]}, "
                    f"{self.train} {len(train.classes)} and {train.frames.shape[1:]}; take two parts of one set"
                )
            return found.part(np.arange(len(found.labels)))
        if self.valid is not None:
            return train.part(np.arange(len(train.labels)))
        late = np.zeros(len(train.labels), dtype=bool)
        for label in range(len(train.classes)):
            own = np.flatnonzero(train.labels == label)
            late[own[len(own) - round(self.valid_share * len(own)) :]] = True
        return train.part(np.flatnonzero(late if split == "valid" else ~late))


# NTU RGB+D

NAME = re.compile(r"S(\d{3})C(\d{3})P(\d{3})R(\d{3})A(\d{3})")
"""Setup, camera, performer, repetition, action."""
JOINTS, BODIES = 25, 2
SPINE = 1
"""Middle of the spine."""
SUBJECTS = {1, 2, 4, 5, 8, 9, 13, 14, 15, 16, 17, 18, 19, 25, 27, 28, 31, 34, 35, 38}
"""Performers of the training part of the first 60 classes."""
SUBJECTS_120 = SUBJECTS | {45, 46, 47, 49, 50, 52, 53, 54, 55, 56, 57, 58, 59, 70, 74, 78}
SUBJECTS_120 |= {80, 81, 82, 83, 84, 85, 86, 89, 91, 92, 93, 94, 95, 97, 98, 100, 103}


class NTUConfig(Config):
    """NTU RGB+D: a folder of .skeleton files, 25 joints in space of up to two people."""

    kind: Literal["ntu"] = "ntu"
    path: Free[Path]
    """Folder of the files, searched to any depth."""
    protocol: Literal["cross_subject", "cross_view", "cross_subject_120", "cross_setup"] = "cross_subject"
    """What training and test differ in: performers, cameras (2 and 3 train), performers of the 120 classes, or setups
    (even ones train)."""
    valid_percent: int = Field(5, gt=0, lt=100)
    """Of the training clips for validation, by their names."""

    def prepare(self, folder: Path, progress: Progress) -> str:
        """Read every file and keep the joints."""
        files = sorted(p for p in self.path.rglob("*.skeleton") if NAME.search(p.name))
        if not files:
            raise UserError(
                f"data.corpus.path = {self.path}: holds no S000C000P000R000A000.skeleton; name the folder of the files"
            )
        tasks, found = [str(p) for p in files], dict[int, NDArray[np.float32] | str]()
        for done, (number, answer) in enumerate(results(_read, tasks, len(os.sched_getaffinity(0))), 1):
            found[number] = answer
            progress("skeleton files", done, len(tasks))
        clips, numbers, bad = [], [], []
        for n, path in enumerate(files):
            answer = found[n]
            if isinstance(answer, str):
                bad.append(f"left out: {path.name}: {answer}")
            else:
                clips.append(answer)
                numbers.append([int(part) for part in NAME.search(path.name).groups()])  # type: ignore[union-attr]
        if not clips:
            raise UserError(f"data.corpus.path = {self.path}: none of {len(files)} files can be used; {bad[0]}")
        names = [path.stem for n, path in enumerate(files) if not isinstance(found[n], str)]
        setups, cameras, performers, _, actions = zip(*numbers, strict=True)
        classes = [f"A{n:03d}" for n in range(1, max(actions) + 1)]
        groups = {"setup": setups, "camera": cameras, "performer": performers}
        motions = joined(clips, [n - 1 for n in actions], names, classes, groups)
        keep(folder, {"kind": self.kind}, motions)
        return "\n".join([f"{len(clips):,} clips, {len(motions.frames):,} frames", *bad])

    def clips(self, folder: Path, split: Split, seed: int) -> Clips:
        """One split."""
        motions = kept(folder, {"kind": self.kind})
        train = self._trains(motions)
        valid = train & np.array([percentile(name) < self.valid_percent for name in motions.names])
        chosen = ~train if split == "test" else valid if split == "valid" else train & ~valid
        return motions.part(np.flatnonzero(chosen))

    def _trains(self, motions: Motions) -> NDArray[np.bool_]:
        groups = motions.groups
        if self.protocol == "cross_view":
            return groups["camera"] != 1
        if self.protocol == "cross_setup":
            return groups["setup"] % 2 == 0
        trained = SUBJECTS if self.protocol == "cross_subject" else SUBJECTS_120
        return np.isin(groups["performer"], list(trained))


def _read(path: str) -> NDArray[np.float32] | str:
    try:
        return read_skeleton(Path(path).read_text(encoding="ascii"))
    except (OSError, ValueError, ClipError) as error:
        return str(error) or type(error).__name__


def read_skeleton(text: str) -> NDArray[np.float32]:
    """Joints (T, 2 x 25, 3) in metres of the two people that move most, seen from the first one's spine at the start.

    A person who is not there is zeros; frames without anybody are left out.

    Raises:
        ValueError: the text is cut short or no such file.
        ClipError: nobody is in it.
    """
    numbers = iter(text.split())

    def take(count: int) -> list[str]:
        found = list(islice(numbers, count))
        if len(found) < count:
            raise ValueError("is cut short")
        return found

    frames: list[dict[str, NDArray[np.float32]]] = []
    for _ in range(int(take(1)[0])):
        frames.append(dict(_bodies(take)))
    frames = [bodies for bodies in frames if bodies]
    if not frames:
        raise ClipError("nobody is in it")
    tracks: dict[str, list[NDArray[np.float32]]] = {}
    for bodies in frames:
        for name, joints in bodies.items():
            tracks.setdefault(name, []).append(joints)
    most = sorted(tracks, key=lambda name: -float(np.stack(tracks[name]).std(0).sum()) * len(tracks[name]))[:BODIES]
    found = np.zeros((len(frames), BODIES, JOINTS, 3), dtype=np.float32)
    origin = tracks[most[0]][0][SPINE]
    for t, bodies in enumerate(frames):
        for b, name in enumerate(most):
            if name in bodies:
                found[t, b] = bodies[name] - origin
    return found.reshape(len(frames), BODIES * JOINTS, 3)


def _bodies(take: Any) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """The people of a frame: a line about each, the number of joints, then a line of 12 numbers a joint."""
    for _ in range(int(take(1)[0])):
        name = take(10)[0]
        count = int(take(1)[0])
        if count != JOINTS:
            raise ValueError(f"{count} joints, wanted {JOINTS}")
        values = np.array(take(12 * JOINTS), dtype=np.float32).reshape(JOINTS, 12)
        yield name, values[:, :3]
