"""A checkpoint is whole or absent, and its slices fit however they are cut."""

import contextlib
import hashlib
import json
import random
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import run_ranks, small_disk
from trainer import checkpoint, checkpoint_writer, distributed
from trainer.checkpoint import BrokenCheckpointError, Checkpoint, CheckpointConfig
from trainer.checkpoint_writer import Writer
from trainer.distributed import Slice
from trainer.errors import UserError

CONFIG = CheckpointConfig(keep_last=2, keep_best=1)
VALUES = torch.arange(12.0)


def save_steps(ranks: Any, folder: Path, steps: dict[int, float], seen: list[str] | None = None) -> list[bool]:
    """Save VALUES + step, cut in as many slices as there are ranks."""
    best: dict[str, float] = {}
    results = []
    for step, value in steps.items():
        best[str(step)] = value
        part = (VALUES + step).tensor_split(ranks.world_size)[ranks.rank]
        start = int(part[0]) - step
        slices = [Slice("layer.weight", "weight", start, part), Slice("layer.weight", "average", start, -part)]
        state = {"best": dict(best), "shapes": {"layer.weight": [3, 4]}, "step": step}
        results.append(checkpoint.save(folder, CONFIG, step, slices, state))
    return results


def test_what_is_written_by_three_is_read_by_any(tmp_path: Path) -> None:
    run_ranks(3, save_steps, tmp_path, {1: 0.5})
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert torch.equal(found.weights()["layer.weight"], -(VALUES + 1).view(3, 4))  # the average is what is evaluated
    assert found.slots() == {"average"}
    for cuts in (1, 2, 5):
        targets = []
        start = 0
        for piece in torch.zeros(12).tensor_split(cuts):
            targets.append(Slice("layer.weight", "weight", start, piece))
            start += len(piece)
        found.fill(targets, {"layer.weight": [3, 4]})
        assert torch.equal(torch.cat([t.values for t in targets]), VALUES + 1)
    with pytest.raises(BrokenCheckpointError, match=r"layer.bias \(weight\) lacks 2"):
        found.fill([Slice("layer.bias", "weight", 0, torch.zeros(2))], {"layer.weight": [3, 4]})
    with pytest.raises(UserError, match=r"do not fit this model:\nlayer.weight: here \[2, 4\], there \[3, 4\]"):
        found.fill([Slice("layer.weight", "weight", 0, torch.zeros(8))], {"layer.weight": [2, 4]})


class Odd(torch.nn.Module):
    """A tied weight, a frozen one, a buffer that is kept and one that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False)
        self.b.weight = self.a.weight
        self.frozen = torch.nn.Parameter(torch.ones(3), requires_grad=False)
        self.register_buffer("kept", torch.ones(2))
        self.register_buffer("lost", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x)) * self.frozen


def train_odd(ranks: Any, folder: Path, stage: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Two steps, saved, read into another model: (averaged weights, trained weights) of it."""
    from trainer.distributed import Trained, ZeroConfig
    from trainer.optim import AdamWConfig

    def make(value: float) -> Trained:
        torch.manual_seed(0)
        model = Odd()
        model.frozen.data.fill_(value)
        return Trained(model, ZeroConfig(stage=stage), AdamWConfig(average_decay=0.9), "fp32", 1)

    first, second = make(2.0), make(5.0)
    for _ in range(2):
        first.backward(first.model(torch.ones(4, 3)).square().sum())
        first.step()
    state = {"best": {}, "shapes": first.shapes, "ties": first.ties}
    checkpoint.save(folder, CONFIG, 1, first.slices(), state)
    found = checkpoint.newest(folder)
    second.allocate(found.slots(), first.scalars())
    found.fill(second.slices(everything=True), second.shapes)
    second.filled()
    Odd().load_state_dict(found.weights())
    assert first.untrained().keys() == second.untrained().keys() == {"frozen", "kept"}
    for whole in (Trained.untrained, lambda trained: trained.full("weight")):
        for name, value in whole(first).items():
            assert torch.equal(whole(second)[name], value), name
    x = torch.ones(2, 3)
    assert torch.equal(second.model(x), first.model(x))  # what is computed with, not only what is kept
    average = first.full()
    assert average.keys() == {"a.weight", "b.weight"}
    assert torch.equal(average["b.weight"], average["a.weight"])
    assert not torch.equal(average["a.weight"], first.full("weight")["a.weight"])
    return found.weights(), average


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (1, 2), (3, 2)])
def test_tied_and_frozen_weights_are_kept(tmp_path: Path, stage: int, world_size: int) -> None:
    for weights, average in run_ranks(world_size, train_odd, tmp_path, stage):
        assert weights.keys() == {"a.weight", "b.weight", "frozen", "kept"}
        assert torch.equal(weights["frozen"], torch.full((3,), 2.0))
        assert all(torch.equal(weights[n], average[n]) for n in average)


def test_the_newest_and_the_best_are_kept(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, {1: 0.5, 2: 0.1, 3: 0.4, 4: 0.3, 5: 0.2})
    assert checkpoint.steps_in(tmp_path) == [2, 4, 5]
    assert (tmp_path / "latest").read_text() == "step-00000005\n"
    assert checkpoint.best(tmp_path).state["step"] == 2
    assert not list(tmp_path.glob(".step-*"))


DAMAGE = {
    "cut short": lambda folder: (folder / "rank-00000.pt").write_bytes((folder / "rank-00000.pt").read_bytes()[:-7]),
    "a bit flipped": lambda folder: (folder / "rank-00000.pt").write_bytes(
        bytes([*(content := (folder / "rank-00000.pt").read_bytes())[:-1], content[-1] ^ 1])
    ),
    "a file missing": lambda folder: (folder / "rank-00000.pt").unlink(),
    "no state": lambda folder: (folder / "state.json").unlink(),
    "state cut short": lambda folder: (folder / "state.json").write_text("{"),
    "another state": lambda folder: (folder / "state.json").write_text(
        (folder / "state.json").read_text().replace('"step": ', '"step": 1')
    ),
    "no checksums": lambda folder: (folder / "SHA256SUMS").unlink(),
    "checksums of less": lambda folder: (folder / "SHA256SUMS").write_text(
        (folder / "SHA256SUMS").read_text().splitlines()[-1]
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_one_is_never_read_and_the_one_before_is(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    run_ranks(1, save_steps, tmp_path, {1: 0.5, 2: 0.1})
    DAMAGE[damage](tmp_path / "step-00000002")
    found = checkpoint.newest(tmp_path)
    assert found is not None
    assert found.state["step"] == 1
    assert "step-00000002" in caplog.text
    DAMAGE[damage](tmp_path / "step-00000001")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpoint.newest(tmp_path)


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, {1: 0.5})
    shutil.rmtree(tmp_path / "step-00000001")
    with pytest.raises(UserError, match="no checkpoint is whole"):
        checkpoint.newest(tmp_path)
    (tmp_path / "latest").unlink()
    assert checkpoint.newest(tmp_path) is None


def test_no_flipped_bit_is_read(tmp_path: Path) -> None:
    """In whatever file, wherever."""
    run_ranks(2, save_steps, tmp_path, {1: 0.5})
    draw, whole = random.Random(0), Checkpoint.open(tmp_path / "step-00000001").state
    for file in sorted((tmp_path / "step-00000001").iterdir()):
        content = file.read_bytes()
        for _ in range(60):
            place, bit = draw.randrange(len(content)), draw.randrange(8)
            file.write_bytes(content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :])
            if file.name == "SHA256SUMS":  # one that only ends a line differently does no harm
                with contextlib.suppress(BrokenCheckpointError):
                    assert Checkpoint.open(file.parent).state == whole
            else:
                with pytest.raises(BrokenCheckpointError):
                    Checkpoint.open(file.parent)
        file.write_bytes(content)
    assert Checkpoint.open(tmp_path / "step-00000001").state == whole


def test_a_shell_can_check_it(tmp_path: Path) -> None:
    run_ranks(2, save_steps, tmp_path, {1: 0.5})
    command = ["sha256sum", "--check", "--strict", "SHA256SUMS"]
    done = subprocess.run(command, cwd=tmp_path / "step-00000001", capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.count(": OK") == 3


def save_and_die(ranks: Any, folder: Path, point: int) -> None:
    """Kill this process without notice at the n-th file operation of a save."""
    import os

    counter = [0]

    def deadly(function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            counter[0] += 1
            if counter[0] == point:
                os.kill(os.getpid(), 9)
            return function(*args, **kwargs)

        return call

    for name in ("write", "write_tensors", "sync_folder", "check_file"):
        setattr(checkpoint, name, deadly(getattr(checkpoint, name)))
    for name in ("rename", "replace"):
        setattr(Path, name, deadly(getattr(Path, name)))
    save_steps(ranks, folder, {2: 0.1})


@pytest.mark.distributed
def test_killed_at_any_point_latest_is_whole(tmp_path: Path) -> None:
    survivors = []
    for point in range(1, 12):
        folder = tmp_path / str(point)
        run_ranks(1, save_steps, folder, {1: 0.5})
        with contextlib.suppress(RuntimeError):  # a save has fewer operations than the last points
            run_ranks(1, save_and_die, folder, point)
        found = checkpoint.newest(folder)
        assert found is not None
        named = (folder / "latest").read_text().strip()
        assert Checkpoint.open(folder / named)
        survivors.append(found.state["step"])
        assert run_ranks(1, save_steps, folder, {3: 0.1}) == [[True]]  # what was left behind is in nobody's way
        assert not list(folder.glob(".step-*"))
    assert survivors[0] == 1
    assert survivors[-1] == 2
    assert survivors == sorted(survivors)


@pytest.mark.distributed
def test_one_that_was_being_written_anew_comes_back(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, {1: 0.5})
    own = tmp_path / "step-00000001"
    aside = own.with_name(f".{own.name}{checkpoint_writer.REPLACED}")
    shutil.copytree(own, aside)
    Writer(tmp_path, CONFIG).clean()
    assert own.exists()
    assert not aside.exists()
    own.rename(aside)  # killed before the new one had its name
    Writer(tmp_path, CONFIG).clean()
    assert Checkpoint.open(own)
    assert not aside.exists()


def fail_to_write(ranks: Any, folder: Path, failures: int) -> list[bool]:
    """A disk that refuses rank 1 so often at step 2."""
    original, left = checkpoint.write_tensors, [failures]

    def refuse(path: Path, slices: Any) -> Any:
        if ranks.rank == 1 and "step-00000002" in str(path) and left[0]:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        return original(path, slices)

    checkpoint.write_tensors = refuse
    checkpoint_writer.RETRY_SECONDS = (0.0, 0.0)
    return save_steps(ranks, folder, {1: 0.5, 2: 0.1, 3: 0.3})


@pytest.mark.distributed
@pytest.mark.parametrize(("failures", "written"), [(2, True), (3, False)])
def test_a_failed_write_is_tried_again_and_does_not_end_the_run(tmp_path: Path, failures: int, written: bool) -> None:
    assert run_ranks(2, fail_to_write, tmp_path, failures) == [[True, written, True]] * 2
    assert checkpoint.steps_in(tmp_path) == ([2, 3] if written else [1, 3])
    assert (tmp_path / "latest").read_text() == "step-00000003\n"
    assert not list(tmp_path.glob(".*"))


def write_slowly(ranks: Any, folder: Path) -> dict[str, Any]:
    """Save where the disk of rank 0 takes its time, and go on meanwhile."""
    original, gate = checkpoint.write_tensors, threading.Event()

    def slow(path: Path, slices: Any) -> Any:
        assert ranks.rank or gate.wait(60)
        return original(path, slices)

    checkpoint.write_tensors = slow
    writer, values = Writer(folder, CONFIG), VALUES.clone()
    state = {"best": {}, "shapes": {"layer.weight": [3, 4]}}

    def start(step: int) -> None:
        writer.start(step, [Slice("layer.weight", "weight", 0, values)] if ranks.first else [], {**state, "step": step})

    start(1)
    values += 100  # the next optimizer step
    state["best"]["9"] = 1.0
    seen = {"ready": writer.ready and ranks.first, "written": writer.written_step, "files": checkpoint.steps_in(folder)}
    gate.set()
    start(2)  # waits for the one before: one is in flight at most
    seen["between"] = writer.written_step
    writer.wait()
    return {**seen, "after": writer.written_step, "busy": writer.busy}


@pytest.mark.distributed
def test_a_step_waits_only_for_the_copy(tmp_path: Path) -> None:
    """What changes after `start` is not in the checkpoint, whenever it is written."""
    want = {"ready": False, "written": -1, "files": [], "between": 1, "after": 2, "busy": False}
    assert run_ranks(2, write_slowly, tmp_path) == [want] * 2
    first = Checkpoint.open(tmp_path / "step-00000001")
    assert torch.equal(first.tensors("weight")["layer.weight"], VALUES.view(3, 4))
    assert first.state["best"] == {}
    second = Checkpoint.open(tmp_path / "step-00000002")
    assert torch.equal(second.tensors("weight")["layer.weight"], (VALUES + 100).view(3, 4))


def fill_up(ranks: Any, folder: Path) -> list[Any]:
    """Save with room, without, and with room again, on a real disk."""
    checkpoint_writer.RETRY_SECONDS, checkpoint_writer.PAUSE_SECONDS = (), 0.0
    writer, seen = Writer(folder / "checkpoints", CONFIG), []
    weights, state = torch.zeros(2**18), {"shapes": {}}  # 1 MB
    for step in range(1, 4):
        if step == 2 and ranks.first:
            (folder / "balloon").write_bytes(bytes(shutil.disk_usage(folder).free - 2**19))
        if step == 3 and ranks.first:
            seen.append(writer.may_try())
            (folder / "balloon").unlink()
            seen.append(writer.may_try())
        distributed.barrier()
        slices = [Slice("w", "weight", 0, weights + step)] if ranks.first else []
        writer.start(step, slices, {**state, "step": step})
        seen += [writer.wait(), writer.paused]
    return seen


@pytest.mark.distributed
def test_a_full_disk_pauses_checkpoints(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=8) as folder:
        first, second = run_ranks(2, fill_up, folder)
        assert first == [True, False, False, True, False, True, True, False]
        assert second == [True, False, False, True, True, False]
        assert checkpoint.steps_in(folder / "checkpoints") == [1, 3]
        assert checkpoint.newest(folder / "checkpoints").state["step"] == 3
        assert not list((folder / "checkpoints").glob(".step-*"))


def test_a_folder_that_cannot_be_written_pauses_them_too(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=8) as folder:
        run_ranks(1, save_steps, folder, {1: 0.5})
        subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        assert run_ranks(1, save_steps, folder, {2: 0.5}) == [[False]]
        assert checkpoint.newest(folder).state["step"] == 1


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, {1: 0.5})
    folder = tmp_path / "step-00000001"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save([("layer.weight", "weight", 0, Evil())], folder / "rank-00000.pt")
    content = (folder / "rank-00000.pt").read_bytes()
    state = json.loads((folder / "state.json").read_text())
    facts = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    checkpoint.write_state(folder, state, {"rank-00000.pt": facts})
    with pytest.raises(Exception, match=r"(?i)weights"):
        Checkpoint.open(folder).weights()
    assert not (tmp_path / "executed").exists()
