"""The engine's step beside a bare PyTorch loop, which stands here in full, so that anyone can see that nothing was left
out of it or put into it: `bare_step`.
"""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from kernels import keep_pages
from trainer import recipe as recipes
from trainer.bench.timing import describe, interleaved
from trainer.data.dataset import Batch
from trainer.data.plan import Step
from trainer.distributed import Ranks
from trainer.engine import Training, initialise
from trainer.errors import UserError


def bare_step(
    recipe: recipes.Recipe[Any],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: list[torch.Tensor],
    decay: float,
    clip_norm: float,
    step: Step,
    batches: list[Batch],
) -> float:
    """A training step as people write it: forward, backward, clip, update, moving average. Returns the loss."""
    optimizer.zero_grad(set_to_none=True)
    total = 0.0
    for batch in batches:
        output = recipe.step(model, batch)
        loss = sum(x.sum / step.counts[x.unit] * x.weight for x in output.losses.values())
        assert isinstance(loss, torch.Tensor)
        loss.backward()
        total += float(loss.detach())
    if clip_norm:
        torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    if decay:
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
    return total


def measure(config: str, overrides: list[str], ranks: Ranks, repetitions: int, num_steps: int) -> dict[str, Any]:
    """The engine's step against `bare_step`: same model, same batches, same optimizer, one process.

    Args:
        repetitions: how often each way runs all the steps.
        num_steps: steps of the plan, loaded beforehand.

    Returns:
        seconds a step and ratios to the bare loop.
    """
    keep_pages()  # as `train` does; the bare loop has it too
    first = recipes.load(config, overrides)
    dataset = first.build_dataset("train")
    steps = dataset.plan.epoch(0)[:num_steps]
    loaded = [[dataset.load(m) for m in step.micro_batches] for step in steps]
    if any(len(step.micro_batches) != dataset.plan.micro_batches_per_step for step in steps):
        raise UserError(f"{config}: bench step wants {num_steps} full steps; the corpus gives fewer, lower --steps")

    model = first.build_model().train()
    initialise(model, first.config.seed)
    settings = first.config.optimizer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=settings.weight_decay)
    average = [p.detach().clone() for p in model.parameters()]

    def bare() -> list[float]:
        return [
            bare_step(first, model, optimizer, average, settings.average_decay, settings.clip_norm, step, batches)
            for step, batches in zip(steps, loaded, strict=True)
        ]

    with tempfile.TemporaryDirectory() as folder:
        trainings = {}
        for stage in (0, 1):
            constant = ["schedule={kind: constant}", "optimizer.lr=1e-5", "optimizer.kind=adamw"]
            extra = [f"runs_dir={folder}", f"name=zero{stage}", f"zero.stage={stage}", "tracking.wandb=disabled"]
            trainings[stage] = Training(recipes.load(config, [*overrides, *constant, *extra]), ranks)

        def ours(stage: int) -> list[float]:
            for step, batches in zip(steps, loaded, strict=True):
                trainings[stage].step(step, batches, 0.0)
            rows = Path(folder, f"zero{stage}", "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            return [json.loads(row)["loss"] for row in rows[-len(steps) :]]

        losses = {"bare": bare(), "zero0": ours(0), "zero1": ours(1)}
        for name in ("zero0", "zero1"):
            if not torch.allclose(torch.tensor(losses[name]), torch.tensor(losses["bare"]), rtol=1e-3):
                raise AssertionError(
                    f"{name} computes other losses than the bare loop: {losses[name]} {losses['bare']}"
                )
        ways: dict[str, Callable[[], object]] = {
            "bare loop": bare,
            "engine, ZeRO 0": lambda: ours(0),
            "engine, ZeRO 1": lambda: ours(1),
        }
        timings = interleaved(ways, repetitions)
        for training in trainings.values():
            training.close(0)
    base = timings["bare loop"]
    return {
        "config": config,
        "threads": torch.get_num_threads(),
        "parameters": sum(p.numel() for p in model.parameters()),
        "micro_batches_a_step": dataset.plan.micro_batches_per_step,
        "seconds_of_sound_a_step": sum(s.counts.get("seconds", 0.0) for s in steps) / len(steps),
        "rows": {
            name: {
                "seconds_a_step": describe([s / len(steps) for s in t.seconds]),
                "ratio_to_bare": describe(t.over(base)),
            }
            for name, t in timings.items()
        },
    }
