"""What sparsity of the recurrence buys: errors, weights, speed of training, and of recognition while sound comes.

`./launch.sh reproduce sparsity` trains the runs of configs/sweeps/sparsity.yaml, whose variants are named STRUCTURE,
SIZE; here each is timed beside the others on one thread, and all becomes one table and one picture. The first variant
is what others are compared with.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch

from kernels.bench import interleaved, quartiles
from trainer.models.acoustic import AcousticModel
from trainer.plots import BLUE, GREEN, ORANGE, picture
from trainer.recogniser import Recogniser, open_weights
from trainer.sweep.conclusion import Conclusion

Row = Mapping[str, Any]
Timed = dict[str, Callable[[], object]]
SECONDS = 2.0
"""For the timings of training and of listening each; five rounds at least, which take longer where nets are large."""
MICRO_BATCHES = 2
"""Of a training step that is timed."""
RECORDINGS = 5
"""Of the test split, heard chunk by chunk."""
CHUNK_MS = 80
MARKERS = {"equal width": ("o", BLUE), "equal parameters": ("s", ORANGE)}


@dataclass(frozen=True)
class Point:
    """A variant in the picture."""

    name: str
    error: float
    weights: float
    faster: float
    factor: float


def conclude(rows: Sequence[Row], folder: Path) -> Conclusion:
    """One table, and FOLDER/sparsity.png."""
    variants: dict[str, list[Row]] = {}
    for row in rows:
        variants.setdefault(row["variant"], []).append(row)
    if not variants:
        return Conclusion({}, [])
    steps: Timed = {}
    listens: Timed = {}
    weights, seconds = {}, 0.0
    for name, runs in variants.items():
        steps[name], weights[name], listens[name], seconds = _timed(folder / runs[0]["run"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        trained, heard = interleaved(steps, SECONDS), interleaved(listens, SECONDS)
    finally:
        torch.set_num_threads(threads)
    first = next(iter(variants))
    lines, points = [], []
    for name, runs in variants.items():
        errors = [100 * run["test"][run["monitor"]] for run in runs]
        faster = [a / b for a, b in zip(trained[first], trained[name], strict=True)]
        factor = statistics.median(heard[name]) / seconds
        lines.append(
            {
                "structure, size": name,
                f"test {runs[0]['monitor'].upper()}, %": _told(errors),
                "weights": f"{runs[0]['parameters']:,}",
                "recurrent weights": f"{weights[name]:,}",
                "training, times as fast": _spread(faster),
                "real-time factor": f"{factor:.4f}",
                "times as fast": _spread([a / b for a, b in zip(heard[first], heard[name], strict=True)]),
                "seeds": str(len(runs)),
            }
        )
        millions = runs[0]["parameters"] / 1e6
        points.append(Point(name, statistics.fmean(errors), millions, statistics.median(faster), factor))
    path = folder / "sparsity.png"
    page(points, path)
    return Conclusion({f"One thread; chunks of {CHUNK_MS} ms": lines}, [path])


def _timed(run: Path) -> tuple[Callable[[], object], int, Callable[[], object], float]:
    """Of a trained run: forward and backward over the first micro-batches of its plan, the net's recurrent weights,
    recognition of some recordings while they come, and the seconds of these."""
    recipe, weights, labels, folder = open_weights(run)
    model = recipe.build_model()
    assert isinstance(model, AcousticModel)
    model.load_state_dict(weights)
    dataset = recipe.build_dataset("train")
    places = [m for step in dataset.plan.epoch(0)[:MICRO_BATCHES] for m in step.micro_batches][:MICRO_BATCHES]
    batches = [dataset.load(m) for m in places]

    def step() -> None:
        model.train()
        for batch in batches:
            recipe.step(model, batch).loss().backward()

    recogniser = recipe.recogniser(weights, labels, folder)
    assert isinstance(recogniser, Recogniser)
    found = [wave for wave, _ in recipe.utterances("test", RECORDINGS)]
    size = recogniser.sample_rate_hz * CHUNK_MS // 1000

    def listen() -> None:
        for wave in found:
            stream = recogniser.stream()
            for piece in wave.split(size):
                stream.push(piece)
            stream.finish()

    recurrent = sum(layer.weight_hh.num_weights() for layer in model.rnn.recurrent_layers())
    return step, recurrent, listen, sum(map(len, found)) / recogniser.sample_rate_hz


def _told(values: Sequence[float]) -> str:
    spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.2f}{spread}"


def _spread(values: list[float]) -> str:
    found = quartiles(values)
    return f"{found['median']:.2f} ({found['low']:.2f}-{found['high']:.2f})"


def page(points: Sequence[Point], path: Path) -> None:
    """Errors against weights, speed of training and real-time factor, a point a variant."""
    columns: dict[str, Callable[[Point], float]] = {
        "million weights": lambda point: point.weights,
        "training, times as fast as the first": lambda point: point.faster,
        "real-time factor of recognition, one core": lambda point: point.factor,
    }
    figure, panels = plt.subplots(1, len(columns), figsize=(13, 4.2), layout="constrained", sharey=True)
    for axes, (label, value) in zip(panels, columns.items(), strict=True):
        for point in points:
            structure, _, size = point.name.partition(", ")
            marker, color = MARKERS.get(size, ("^", GREEN))
            axes.plot(value(point), point.error, marker, color=color, markersize=8, label=size)
            place = (value(point), point.error)
            axes.annotate(structure, place, textcoords="offset points", xytext=(7, 4), fontsize=8)
        axes.set(xlabel=label)
        axes.margins(0.2)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("test errors, %")
    drawn = dict(zip(*reversed(panels[0].get_legend_handles_labels()), strict=True))
    figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=3, frameon=False)
    picture(figure, path)
