"""Our speed beside what a user would otherwise write, as ratios of one interleaved run.

The loops that we are compared with stand here in full, so that anyone can see that nothing was left out of them or put
into them: `bare_step` and `bare_load`.
"""

import io
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import soundfile
import torch
from torch import nn

from kernels import keep_pages
from trainer import recipe as recipes
from trainer.data.dataset import Batch
from trainer.data.loader import Loader
from trainer.data.plan import Step
from trainer.distributed import Ranks
from trainer.engine import Training, initialise
from trainer.errors import UserError
from trainer.run import read_lines


@dataclass(frozen=True)
class Timing:
    """Seconds of one way of doing a thing, a value a repetition."""

    name: str
    seconds: list[float]

    def over(self, other: "Timing") -> list[float]:
        """Ratios, repetition by repetition: the two stood side by side each time."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]


def interleaved(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, Timing]:
    """Time each way in turn, A B C A B C ..., after one warm-up of each."""
    for run in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for i in range(repetitions):
        for name in list(ways)[:: 1 if i % 2 else -1]:  # whoever comes first alternates
            start = time.perf_counter()
            ways[name]()
            seconds[name].append(time.perf_counter() - start)
    return {name: Timing(name, values) for name, values in seconds.items()}


def describe(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


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


def bench_step(config: str, overrides: list[str], ranks: Ranks, repetitions: int, num_steps: int) -> dict[str, Any]:
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


def bare_load(dataset: Any, steps: Sequence[Step]) -> None:
    """Read, decode, change speed, compute features and pad, as a plain loop over files would: no worker, no checks."""
    from trainer.data.audio import change_speed

    rate = dataset.config.sample_rate_hz
    for step in steps:
        for m in step.micro_batches:
            clips = []
            for row, speed in zip(m.samples, m.speeds, strict=True):
                entry = dataset.index.entries[row]
                with open(dataset.index.shards[dataset.index.shard[row]], "rb") as file:
                    file.seek(entry.audio_offset)
                    content = file.read(entry.audio_size)
                samples, _ = soundfile.read(io.BytesIO(content), dtype="float32")
                wave = change_speed(torch.from_numpy(samples), rate, speed)
                clips.append(dataset.log_mel.normalise(dataset.log_mel.energies(wave)))
            torch.nn.utils.rnn.pad_sequence(clips, batch_first=True)


def bench_loader(config: str, overrides: list[str], ranks: Ranks, repetitions: int, num_steps: int) -> dict[str, Any]:
    """Audio-hours a second of the loader against `bare_load`, and the share of a real run that waits for data.

    Args:
        repetitions: how often each way loads all the steps.
        num_steps: steps of the plan.

    Returns:
        hours a second and ratios to the bare loop; of two whole epochs of training, the first step and those at the
        start of an epoch included, the share of the step time that was waiting.
    """
    recipe = recipes.load(config, overrides)
    dataset: Any = recipe.build_dataset("train")
    if dataset.config.features.kind != "log_mel":
        raise UserError(f"{config}: bench loader decodes sound, and the features of this corpus are precomputed")
    steps = dataset.plan.epoch(0)[:num_steps]
    hours = sum(s.counts["seconds"] for s in steps) / 3600
    size = dataset.plan.micro_batches_per_step

    def load(workers: int) -> None:
        for _ in Loader(dataset, steps, 0, 1, size, workers):
            pass

    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in a worker, so that the ways differ in nothing else
    timings = interleaved(
        {
            "bare loop": lambda: bare_load(dataset, steps),
            "loader, no worker": lambda: load(0),
            "loader, 1 worker": lambda: load(1),
            "loader, 2 workers": lambda: load(2),
        },
        repetitions,
    )
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as folder:
        extra = [f"runs_dir={folder}", "name=wait", "max_epochs=2", "max_steps=null", "validation.every_steps=1000000"]
        extra += ["tracking.wandb=disabled", "tracking.log_every_steps=1", "checkpoint.every_steps=1000000"]
        training = Training(recipes.load(config, [*overrides, *extra]), ranks)
        training.fit()
        rows = [row for row in read_lines(training.run.metrics) if row["kind"] == "train"]
    base = timings["bare loop"]
    return {
        "config": config,
        "threads": 1,
        "hours": hours,
        "rows": {
            name: {
                "audio_hours_per_second": describe([hours / s for s in t.seconds]),
                "speed_over_bare": describe(base.over(t)),
            }
            for name, t in timings.items()
        },
        "waiting_percent": _waiting_percent(rows),
        "waiting_percent_of_first_steps": [row["data_wait_percent"] for row in _first_steps(rows)],
        "waiting_percent_after_the_first_step": _waiting_percent(rows[1:]),  # that one waits for the workers to start
        "trained_steps": len(rows),
        "num_workers": recipe.config.num_workers,
    }


def _waiting_percent(rows: Sequence[dict[str, Any]]) -> float:
    """Share of the time of all steps together that was waiting for data."""
    seconds = sum(row["step_seconds"] for row in rows)
    return float(sum(row["data_wait_percent"] * row["step_seconds"] for row in rows) / seconds) if rows else 0.0


def _first_steps(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The first step of each epoch."""
    return [row for i, row in enumerate(rows) if i == 0 or row["epoch"] != rows[i - 1]["epoch"]]
