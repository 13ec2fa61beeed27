"""Checkpoints: named tensors in slices, whole or absent, independent of world size and ZeRO stage.

    checkpoints/
      step-00001200/
        state.json        everything that is not a tensor, and the size of each file
        rank-00000.pt     the slices that rank 0 owned: [(name, slot, start, values), ...]
        SHA256SUMS        of all of these, as `sha256sum -c` reads it
      latest              name of the newest whole checkpoint

A checkpoint is written under another name, read back, and renamed; `latest` moves after that. So at any instant
`latest` names a whole one, and what a killed run left half-written has a name that nobody reads.
`trainer.checkpoint_writer` does that.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.config import Config, show
from trainer.distributed import BUFFER, CARRIED, WEIGHT, Slice
from trainer.errors import UserError
from trainer.optim import AVERAGE

FORMAT = 2
LATEST = "latest"
SUMS = "SHA256SUMS"
log = logging.getLogger(__name__)


class CheckpointConfig(Config):
    """When checkpoints are written and which are kept."""

    every_steps: PositiveInt = 500
    """Besides these, one is written at each new best, at the end, and on SIGTERM."""
    keep_last: PositiveInt = 2
    """The newest ones that are kept."""
    keep_best: PositiveInt = 1
    """The best ones by validation that are kept besides."""


class BrokenCheckpointError(Exception):
    """A checkpoint that is not whole; the text says what is wrong."""


@dataclass(frozen=True)
class Checkpoint:
    """A whole checkpoint on disk.

    Attributes:
        folder: where it lies.
        state: what `state.json` holds.
    """

    folder: Path
    state: dict[str, Any]

    @classmethod
    def open(cls, folder: Path) -> "Checkpoint":
        """Check every byte.

        Raises:
            BrokenCheckpointError: something is missing or differs from its checksum.
        """
        try:
            content = (folder / "state.json").read_bytes()
            lines = (folder / SUMS).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise BrokenCheckpointError(f"{show(folder)}: {error}") from error
        sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        check_file(folder / "state.json", {"bytes": len(content), "sha256": sums.get("state.json")})
        state = json.loads(content)
        if state["format"] != FORMAT:
            raise BrokenCheckpointError(f"{show(folder)}: format {state['format']!r}, wanted {FORMAT}")
        for name, size in state["files"].items():
            check_file(folder / name, {"bytes": size, "sha256": sums.get(name)})
        return cls(folder, state)

    def slices(self) -> Iterable[Slice]:
        """Every slice of every rank."""
        for name in self.state["files"]:
            for item in torch.load(self.folder / name, map_location="cpu", weights_only=True, mmap=True):
                yield Slice(*item)

    def tensors(self, slot: str) -> dict[str, Tensor]:
        """One slot as whole tensors by name; empty if the slot was not kept."""
        shapes = self.state["shapes"] | self.state.get("carried", {})
        whole: dict[str, Tensor] = {}
        for piece in self.slices():
            if piece.slot == slot:
                if piece.name not in whole:
                    whole[piece.name] = torch.zeros(shapes[piece.name], dtype=piece.values.dtype)
                whole[piece.name].view(-1)[piece.start : piece.start + len(piece.values)] = piece.values
        return whole

    def weights(self) -> dict[str, Tensor]:
        """The state dict to evaluate with: averaged weights if there are any, frozen ones, and buffers."""
        weights = self.tensors(WEIGHT) | self.tensors(AVERAGE)
        ties = {other: weights[name] for other, name in self.state.get("ties", {}).items()}
        return weights | ties | self.tensors(BUFFER)

    def slots(self) -> set[str]:
        """Names of the optimizer's slots."""
        return {piece.slot for piece in self.slices()} - {WEIGHT, BUFFER, CARRIED}

    def fill(self, targets: Iterable[Slice], shapes: Mapping[str, list[int]]) -> None:
        """Copy saved values into live slices, however either side is cut.

        Args:
            targets: what is to be filled.
            shapes: of the whole tensors by name.

        Raises:
            UserError: a tensor was saved with another shape.
            BrokenCheckpointError: a value that is wanted was not saved.
        """
        self.check_shapes(shapes)
        saved: dict[tuple[str, str], list[Slice]] = {}
        for piece in self.slices():
            saved.setdefault((piece.name, piece.slot), []).append(piece)
        for target in targets:
            end, missing = target.start + len(target.values), len(target.values)
            for piece in saved.get((target.name, target.slot), []):
                low, high = max(target.start, piece.start), min(end, piece.start + len(piece.values))
                if low < high:
                    values = piece.values[low - piece.start : high - piece.start]
                    target.values[low - target.start : high - target.start].copy_(values)
                    missing -= high - low
            if missing:
                raise BrokenCheckpointError(
                    f"{show(self.folder)}: {target.name} ({target.slot}) lacks {missing} numbers"
                )

    def check_shapes(self, shapes: Mapping[str, list[int]]) -> None:
        """Compare the model that was saved with another.

        Args:
            shapes: of the other one's tensors by name.

        Raises:
            UserError: it has other tensors, or some of another shape; all are named.
        """
        saved = self.state["shapes"]
        wrong = [
            f"{name}: here {shapes.get(name, 'absent')}, there {saved.get(name, 'absent')}"
            for name in sorted({*shapes, *saved})
            if shapes.get(name) != saved.get(name)
        ]
        if wrong:
            shown = wrong[:10] + ([f"and {len(wrong) - 10} more"] if len(wrong) > 10 else [])
            raise UserError(f"{show(self.folder)}: its weights do not fit this model:\n" + "\n".join(shown))

    def check_data(self, found: Mapping[str, Mapping[str, str]]) -> None:
        """Compare the data that was trained on with what is there now.

        Args:
            found: for each split (or some), the identity of its data set.

        Raises:
            UserError: it is other data; every difference is named, with the cure.
        """
        saved = self.state.get("data", {})
        lines = [
            f"{show(self.folder)}: {split}: {name}: saved {saved[split][name]!r}, now {value!r}"
            for split, facts in found.items()
            for name, value in facts.items()
            if saved.get(split, {}).get(name, value) != value
        ]
        if lines:
            run = show(self.folder.parent.parent)
            raise UserError(
                "\n".join(lines)
                + f"\nthis is other data than the run in {run} was trained on: put it back (data.path), or start a new "
                f"run with name=OTHER and init_from={run} to take its weights"
            )

    def check_labels(self, found: Mapping[str, str]) -> None:
        """Compare what the model's inputs and outputs mean, whichever samples there are now; as `check_data`.

        Args:
            found: the identity of a data set.
        """
        self.check_data({"train": {name: value for name, value in found.items() if name != "samples"}})


def shapes_of(model: nn.Module) -> dict[str, list[int]]:
    """Shape of every tensor of a model by name."""
    return {name: list(t.shape) for name, t in model.state_dict().items()}


def check_file(path: Path, facts: Mapping[str, Any]) -> None:
    """Read a file and compare it with its {"bytes", "sha256"}.

    Raises:
        BrokenCheckpointError: it differs or cannot be read.
    """
    try:
        size = path.stat().st_size
        if size != facts["bytes"]:
            raise BrokenCheckpointError(f"{show(path)}: {size} bytes, wanted {facts['bytes']}")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(2**22):
                digest.update(part)
        if digest.hexdigest() != facts["sha256"]:
            raise BrokenCheckpointError(f"{show(path)}: the checksum differs, the file was damaged")
    except OSError as error:
        raise BrokenCheckpointError(f"{show(path)}: {error.strerror}") from error


class _Summed:
    """A file to write to that counts and hashes what passes, and remembers why it could not be written."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.size, self.digest = file, 0, hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        try:
            self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(content)
        self.size += len(content)
        return len(content)

    def flush(self) -> None:
        self.file.flush()


def write_tensors(path: Path, slices: list[tuple[str, str, int, Tensor]]) -> dict[str, Any]:
    """Write one rank's file; returns its {"bytes", "sha256"}.

    Raises:
        OSError: it could not be written.
    """
    with path.open("wb", buffering=2**20) as file:
        summed = _Summed(file)
        try:
            torch.save(slices, summed)  # type: ignore[arg-type]
        except RuntimeError as error:  # torch hides why
            raise (summed.error or error) from error
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": summed.size, "sha256": summed.digest.hexdigest()}


def write(path: Path, content: bytes) -> str:
    """Write a small file and wait until it is on the disk; returns its SHA-256."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def write_state(folder: Path, state: Mapping[str, Any], files: Mapping[str, Mapping[str, Any]]) -> None:
    """Complete a checkpoint whose tensors are written: `state.json`, and the checksums of everything.

    Args:
        files: {"bytes", "sha256"} of each.
    """
    sizes = {name: facts["bytes"] for name, facts in files.items()}
    text = json.dumps({**state, "files": sizes}, ensure_ascii=False, indent=1)
    sums = {name: facts["sha256"] for name, facts in files.items()}
    sums["state.json"] = write(folder / "state.json", text.encode())
    write(folder / SUMS, "".join(f"{digest}  {name}\n" for name, digest in sums.items()).encode())


def sync_folder(folder: Path) -> None:
    """Wait until the names in a folder are on the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def step_folder(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def save(folder: Path, config: CheckpointConfig, step: int, slices: Iterable[Slice], state: dict[str, Any]) -> bool:
    """Write a checkpoint and wait for it; every rank calls it. For the arguments see `Writer.start`.

    Returns:
        whether it was written; why not is logged, and the older ones stay.
    """
    from trainer.checkpoint_writer import Writer  # it is made of the functions of this module

    writer = Writer(folder, config)
    writer.start(step, slices, state)
    return writer.wait()


def prune(folder: Path, config: CheckpointConfig, best: dict[int, float]) -> None:
    """Delete what neither `keep_last` nor `keep_best` keeps."""
    steps = steps_in(folder)
    kept = set(steps[-config.keep_last :])
    kept |= set(sorted((s for s in best if s in steps), key=lambda s: (best[s], s))[: config.keep_best])
    for step in set(steps) - kept:
        doomed = folder / f".step-{step:08d}.old"
        step_folder(folder, step).rename(doomed)  # a half-deleted one must not look whole
        shutil.rmtree(doomed, ignore_errors=True)


def steps_in(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder, oldest first."""
    return sorted(int(p.name[5:]) for p in folder.glob("step-*") if p.name[5:].isdigit())


def newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint: the one that `latest` names, or if that is damaged the next older, loudly.

    Raises:
        UserError: there are checkpoints, or have been, but none is whole.
    """
    steps = steps_in(folder)
    try:
        named = (folder / LATEST).read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        named = ""
    if not steps and not named:
        return None
    if named not in [step_folder(folder, step).name for step in steps]:
        log.warning("%s: names %r, which is not there", show(folder / LATEST), named)
    order = sorted(steps, key=lambda s: (step_folder(folder, s).name == named, s), reverse=True)
    problems = []
    for step in order:
        try:
            found = Checkpoint.open(step_folder(folder, step))
        except BrokenCheckpointError as error:
            problems.append(str(error))
            log.warning("damaged checkpoint, trying the one before: %s", error)
            continue
        return found
    raise UserError(
        "\n".join(problems)
        + f"\n{show(folder)}: no checkpoint is whole; restore a copy, or move the run directory away to start anew"
    )


def back(folder: Path, number: int) -> Checkpoint | None:
    """The `number`-th newest checkpoint that is whole, or the oldest where there are fewer; None: there is none."""
    found = None
    for step in reversed(steps_in(folder)):
        try:
            found = Checkpoint.open(step_folder(folder, step))
        except BrokenCheckpointError as error:
            log.warning("damaged checkpoint, trying the one before: %s", error)
            continue
        number -= 1
        if not number:
            break
    return found


def best(folder: Path) -> Checkpoint:
    """The best whole checkpoint by validation, or the newest where none was validated.

    Raises:
        UserError: there is none.
    """
    last = newest(folder)
    if last is None:
        raise UserError(f"{show(folder)}: holds no checkpoint; train the run first")
    values = {int(s): v for s, v in last.state.get("best", {}).items()}
    for step in sorted(values, key=lambda s: (values[s], s)):
        if step_folder(folder, step).is_dir():
            try:
                return Checkpoint.open(step_folder(folder, step))
            except BrokenCheckpointError as error:
                log.warning("damaged best checkpoint, taking the newest: %s", error)
                break
    return last
