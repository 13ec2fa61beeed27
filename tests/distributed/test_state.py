"""A state that is carried from step to step belongs to the number of its micro-batch, not to a rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.helpers import run_ranks
from trainer import checkpoint, keyed
from trainer.data.plan import MicroBatch, Step
from trainer.metrics import Loss
from trainer.recipe import Recipe, RunConfig, State, StepOutput
from trainer.run import read_lines

pytestmark = pytest.mark.distributed
STREAMS, STEPS, WIDTH = 3, 3, 4


class Streams:
    """Three streams, cut into three steps an epoch; also its own plan."""

    micro_batches_per_step = STREAMS
    rejections = suspicions = ()

    def __init__(self, split: str) -> None:
        self.identity = {"samples": "three streams"}
        self.split = split
        self.plan = self

    def __len__(self) -> int:
        return STREAMS * STEPS

    def epoch(self, epoch: int, excluded: Any = ()) -> list[Step]:
        return [
            Step(
                tuple(MicroBatch(epoch, s, n, (s * STREAMS + n,), (1.0,), 1.0) for n in range(STREAMS)),
                {"samples": float(STREAMS)},
                last=s == STEPS - 1,
            )
            for s in range(STEPS)
        ]

    def x(self, micro_batch: MicroBatch) -> Tensor:
        place = (self.split, micro_batch.step, micro_batch.number)
        return torch.randn(1, WIDTH, generator=keyed.generator(*place))

    def load(self, micro_batch: MicroBatch) -> dict[str, Any]:
        keys = [f"{self.split}-{micro_batch.samples[0]}"]
        return {**self.dummy(), "keys": keys, "valid": torch.ones(1, dtype=torch.bool), "x": self.x(micro_batch)}

    def dummy(self) -> dict[str, Any]:
        nothing = {"keys": [""], "checksums": [0], "faults": [], "noise_keys": torch.zeros(1, dtype=torch.long)}
        return {**nothing, "valid": torch.zeros(1, dtype=torch.bool), "x": torch.zeros(1, WIDTH)}


class Stream(Recipe[RunConfig]):
    """h <- tanh(W x + h); the loss is its square."""

    monitor = "square"
    poisoned: str | None = None

    def build_model(self) -> nn.Module:
        return nn.Linear(WIDTH, WIDTH)

    def build_dataset(self, split: str) -> Any:
        return Streams(split)

    def step(self, model: nn.Module, batch: Any, state: State | None = None) -> StepOutput:
        h = torch.tanh(model(batch["x"]) + (state["h"] if state else 0.0))
        loss = (h.square() * batch["valid"][:, None]).sum()
        if model.training and batch["keys"] == [self.poisoned]:
            loss = loss * float("nan")
        return StepOutput({"square": Loss(loss, float(batch["valid"].sum()), "samples")}, state={"h": h})


def fit(ranks: Any, folder: Path, name: str, max_steps: int, poisoned: str | None = None) -> dict[str, Any]:
    from trainer.engine import Training

    config = RunConfig(
        recipe="stream",
        name=name,
        runs_dir=folder,
        max_steps=max_steps,
        num_workers=0,
        tracking={"wandb": "disabled"},
        schedule={"kind": "constant"},
        optimizer={"kind": "adamw", "lr": 1e-2},
        validation={"every_steps": 2},
    )
    recipe = Stream(config)
    recipe.poisoned = poisoned
    training = Training(recipe, ranks)
    first = {n: t.clone() for n, t in training.weights().items()}
    training.fit()
    rows = list(read_lines(training.run.metrics)) if ranks.first else []
    return {
        "first": first,
        "train": [r["loss"] for r in rows if r["kind"] == "train"],
        "valid": [r["square"] for r in rows if r["kind"] == "validation"],
        "weights": training.weights(),
        "carried": training.carried,
    }


def by_hand(weights: dict[str, Tensor], steps: int, split: str, poisoned: int | None = None) -> list[float]:
    """Losses of the same steps in a plain loop."""
    data, model = Streams(split), nn.Linear(WIDTH, WIDTH)
    model.load_state_dict(weights)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0)
    losses, states = [], [torch.zeros(1, WIDTH)] * STREAMS
    for number in range(steps):
        step = data.epoch(0)[number % STEPS]
        if number % STEPS == 0:
            states = [torch.zeros(1, WIDTH)] * STREAMS
        hidden = [torch.tanh(model(data.x(m)) + h) for m, h in zip(step.micro_batches, states, strict=True)]
        loss = sum(h.square().sum() for h in hidden) / STREAMS
        losses.append(loss.item())
        states = [h.detach() for h in hidden]
        if number == poisoned:
            losses[-1], states = None, [torch.zeros(1, WIDTH)] * STREAMS
        elif split == "train":
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
    return losses


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_state_is_carried_and_a_resumed_run_has_it(tmp_path: Path, world_size: int) -> None:
    """Over validations and the end of an epoch, where it starts anew; at another world size too."""
    whole = run_ranks(world_size, fit, tmp_path, "whole", 5)[0]
    assert whole["train"] == pytest.approx(by_hand(whole["first"], 5, "train"), rel=1e-5)
    assert whole["valid"][-1] == pytest.approx(sum(by_hand(whole["weights"], 3, "valid")) / 3, rel=1e-5)

    run_ranks(world_size, fit, tmp_path, "parts", 2)
    found = checkpoint.newest(tmp_path / "parts" / "checkpoints")
    assert sorted(found.tensors("carried")) == ["0.h", "1.h", "2.h"]
    resumed = run_ranks(world_size, fit, tmp_path, "parts", 5)
    assert all(torch.equal(resumed[0]["weights"][n], w) for n, w in whole["weights"].items())
    assert resumed[0]["train"] == whole["train"]
    assert resumed[0]["valid"][1:] == whole["valid"][1:]
    assert [sorted(r["carried"]) for r in resumed] == ([[0, 1, 2]] if world_size == 1 else [[0, 2], [1]])

    run_ranks(world_size, fit, tmp_path, "moved", 2)
    moved = run_ranks(3 - world_size, fit, tmp_path, "moved", 5)[0]
    assert moved["train"] == pytest.approx(whole["train"], rel=1e-5)


def test_a_refused_step_resets_it(tmp_path: Path) -> None:
    result = run_ranks(2, fit, tmp_path, "poisoned", 3, "train-4")[0]  # step 2, the stream of rank 1
    want = by_hand(result["first"], 3, "train", poisoned=1)
    assert result["train"][1] is None
    assert [result["train"][0], result["train"][2]] == pytest.approx([want[0], want[2]], rel=1e-5)


def spiking(ranks: Any, folder: Path, spike_step: int) -> list[dict[int, Tensor]]:
    """Train over a spike; what is carried after each step."""
    from trainer.engine import Training

    config = RunConfig(
        recipe="stream",
        name=f"spike{spike_step}",
        runs_dir=folder,
        max_steps=6,
        num_workers=0,
        tracking={"wandb": "disabled"},
        checkpoint={"every_steps": 1},
        spikes={"factor": 10.0, "window_steps": 1},
        validation={"every_steps": 99},
    )
    training = Training(Stream(config), ranks)
    original, seen = training.recipe.step, []

    def step(model: nn.Module, batch: Any, state: State | None = None) -> StepOutput:
        output = original(model, batch, state)
        if training.position.step + 1 == spike_step and model.training:
            output.losses["square"] = Loss(output.losses["square"].sum * 100, 1.0, "samples")
        return output

    training.recipe.step = step  # type: ignore[method-assign]
    original_step = training.step

    def watch(*arguments: Any) -> None:
        training.writer.wait()
        original_step(*arguments)
        seen.append({number: state["h"].clone() for number, state in training.carried.items()})

    training.step = watch  # type: ignore[method-assign]
    training.fit()
    assert training.position.taken_back == [[spike_step, spike_step]]
    return seen


def test_a_spike_brings_back_the_states_that_go_with_the_weights(tmp_path: Path) -> None:
    """But at the end of an epoch, after which a stream starts anew."""
    for seen in run_ranks(2, spiking, tmp_path, 5):
        assert seen[4].keys() == seen[3].keys() != set()
        assert all(torch.equal(seen[4][number], h) for number, h in seen[3].items())
    for seen in run_ranks(2, spiking, tmp_path, 3):
        assert seen[1]
        assert not seen[2]
