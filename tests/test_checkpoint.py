"""A checkpoint is whole or absent, and its slices fit however they are cut."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import run_ranks
from trainer import checkpoint
from trainer.checkpoint import BrokenCheckpointError, Checkpoint, CheckpointConfig
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
    state = {"best": {}, "shapes": checkpoint.shapes_of(first.module), "ties": first.ties}
    checkpoint.save(folder, CONFIG, 1, first.slices(), state)
    found = checkpoint.newest(folder)
    second.allocate(found.slots(), first.scalars())
    found.fill(second.slices(everything=True), checkpoint.shapes_of(second.module))
    second.filled()
    Odd().load_state_dict(found.weights())
    for name, value in first.module.state_dict().items():
        assert torch.equal(second.module.state_dict()[name], value), name
    average = first.full()
    assert average.keys() == {"a.weight", "b.weight"}
    assert torch.equal(average["b.weight"], average["a.weight"])
    assert not torch.equal(average["a.weight"], first.module.a.weight)
    return found.weights(), average


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "world_size"), [(0, 1), (1, 2)])
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

    for module, name in [(checkpoint, "_write"), (checkpoint, "_sync_folder"), (checkpoint, "_check_file")]:
        setattr(module, name, deadly(getattr(module, name)))
    for name in ("rename", "replace"):
        setattr(Path, name, deadly(getattr(Path, name)))
    save_steps(ranks, folder, {2: 0.1})


@pytest.mark.distributed
def test_killed_at_any_point_latest_is_whole(tmp_path: Path) -> None:
    survivors = []
    for point in range(1, 10):
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


def fail_to_write(ranks: Any, folder: Path) -> list[bool]:
    """A disk that is full for rank 1 at step 2."""
    original = checkpoint._write

    def full(path: Path, content: bytes) -> Any:
        if ranks.rank == 1 and "step-00000002" in str(path):
            raise OSError(28, "No space left on device")
        return original(path, content)

    checkpoint._write = full
    return save_steps(ranks, folder, {1: 0.5, 2: 0.1, 3: 0.3})


@pytest.mark.distributed
def test_a_failed_write_does_not_end_the_run(tmp_path: Path) -> None:
    assert run_ranks(2, fail_to_write, tmp_path) == [[True, False, True]] * 2
    assert checkpoint.steps_in(tmp_path) == [1, 3]


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    run_ranks(1, save_steps, tmp_path, {1: 0.5})
    folder = tmp_path / "step-00000001"

    class Evil:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    torch.save([("layer.weight", "weight", 0, Evil())], folder / "rank-00000.pt")
    content = (folder / "rank-00000.pt").read_bytes()
    state = json.loads((folder / "state.json").read_text())
    state["files"]["rank-00000.pt"] = {"bytes": len(content), "sha256": checkpoint._digest(content).hexdigest()}
    (folder / "state.json").write_text(json.dumps(state))
    with pytest.raises(Exception, match=r"(?i)weights"):
        Checkpoint.open(folder).weights()
    assert not (tmp_path / "executed").exists()
