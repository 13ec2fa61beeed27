"""Exercises of the shoulder as a smart watch measures them: motion, not video, and the only set that a package brings.

10 people did 7 exercises with each arm, about 20 times in one recording; acceleration and turning rate in three axes
each, 50 frames a second (Burns, Leung, Hardisty, Whyne, Henry & McLachlin 2018, arXiv:1802.01489, whose own set has 20
people). The data lie in the Python package seglearn (BSD), from which `prepare` takes this one file: nothing of it is
installed or run.
"""

import hashlib
import io
import pickle
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from trainer.config import Config, show
from trainer.data.corpora.base import Progress
from trainer.data.motions import Clips, Motions, Split, joined, keep, kept
from trainer.errors import UserError

VERSION = "1.2.5"
WHEEL = f"seglearn-{VERSION}-py3-none-any.whl"
SHA256 = "ec6b952c85c9627050102854b372d85951563d3b990df677d7c55547e87413dd"
MEMBER = "seglearn/data/watch_dataset.npy"
SENSORS = 2
CLASSES = {
    "PEN": "pendulum",
    "ABD": "abduction",
    "FEL": "forward elevation",
    "IR": "internal rotation",
    "ER": "external rotation",
    "TRAP": "trapezius extension",
    "ROW": "upright row",
}


class WatchConfig(Config):
    """Seven exercises by 10 people with a watch on the wrist. Motion, not video."""

    kind: Literal["watch"] = "watch"
    held_out: int | None = Field(None, ge=0)
    """Number of the person (from 0 on) whom the test is of, and who is in no other split. Null: that of the run's seed,
    so that a sweep over the seeds 0 to 9 leaves each person out once."""
    valid_people: PositiveInt = 1
    """Those after that person are for validation."""

    def prepare(self, folder: Path, progress: Progress) -> str:
        """Fetch the package and keep its frames."""
        motions = read_package(fetch(folder / "raw", progress))
        keep(folder, {"kind": self.kind}, motions)
        people = len(set(motions.groups["person"].tolist()))
        return f"{len(motions.labels)} recordings of {people} people, {len(motions.frames):,} frames"

    def clips(self, folder: Path, split: Split, seed: int) -> Clips:
        """One split."""
        motions = kept(folder, {"kind": self.kind})
        people, person = np.unique(motions.groups["person"], return_inverse=True)
        count = len(people)
        if self.held_out is not None and self.held_out >= count:
            raise UserError(f"data.corpus.held_out = {self.held_out}: wanted a number from 0 to {count - 1}")
        if self.valid_people > count - 2:
            raise UserError(f"data.corpus.valid_people = {self.valid_people}: wanted at most {count - 2}")
        out = (seed if self.held_out is None else self.held_out) % count
        after = (person - out) % count  # 0 is left out
        chosen = {"test": after == 0, "valid": (after >= 1) & (after <= self.valid_people)}
        chosen["train"] = ~chosen["test"] & ~chosen["valid"]
        return motions.part(np.flatnonzero(chosen[split]))


def fetch(raw: Path, progress: Progress) -> Path:
    """The package's wheel, after `pip download` of what is missing.

    Raises:
        UserError: it cannot be had, or is another file.
    """
    wheel = raw / WHEEL
    if not wheel.is_file():
        raw.mkdir(parents=True, exist_ok=True)
        progress(f"fetching {WHEEL}", 0, 1)
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", str(raw), f"seglearn=={VERSION}"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode or not wheel.is_file():
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
            raise UserError(
                f"data.corpus.kind = watch: pip could not fetch seglearn {VERSION}: {errors[-1] if errors else ''}\n"
                f"Fetch {WHEEL} (SHA-256 {SHA256}) from a package index elsewhere, put it into {show(raw)}/, and run "
                "the command again."
            )
        progress(f"fetching {WHEEL}", 1, 1)
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise UserError(f"{show(wheel)}: SHA-256 {digest}, wanted {SHA256}; delete it and run the command again")
    return wheel


def read_package(wheel: Path) -> Motions:
    """The recordings: frames (T, 2, 3), acceleration and turning rate."""
    with zipfile.ZipFile(wheel) as archive:
        content = archive.read(MEMBER)
    found = unpacked(content)
    clips = [np.asarray(x, dtype=np.float32).reshape(len(x), SENSORS, 3) for x in found["X"]]
    classes = [CLASSES.get(str(name), str(name)) for name in found["y_labels"]]
    people, labels = ([int(n) for n in found[name]] for name in ("subject", "y"))
    names = [
        f"person {person}, {classes[label]}, {'right' if int(side) else 'left'} arm, number {n}"
        for n, (person, label, side) in enumerate(zip(people, labels, found["side"], strict=True))
    ]
    return joined(clips, labels, names, classes, {"person": people})


class _Arrays(pickle.Unpickler):
    """Makes arrays, lists and dicts of a pickle and nothing else, so that no other code of its choice is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("numpy.core.multiarray", "_reconstruct"):
            return _reconstruct
        if (module, name) == ("_codecs", "encode"):
            return _bytes
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        raise pickle.UnpicklingError(f"holds {module}.{name}, which is not read here")


def _reconstruct(kind: type, shape: tuple[int, ...], code: bytes) -> NDArray[Any]:
    """An empty array, which the pickle fills."""
    return np.ndarray(shape, code.decode())


def _bytes(text: str, encoding: str) -> bytes:
    """How Python 2 wrote bytes."""
    return text.encode("latin-1")


def unpacked(content: bytes) -> dict[str, Any]:
    """The dictionary in a .npy file that holds a single object.

    Raises:
        pickle.UnpicklingError: anything but arrays, numbers and texts is in it.
    """
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}[version]
    read(stream)
    found: dict[str, Any] = _Arrays(stream).load().item()
    return found
