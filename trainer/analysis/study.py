"""Everything that `analyze` finds out about a trained model: of its recurrent matrices, its trajectories, its task.

What a study holds is JSON: `recurrences` by the name of the layer (of each gate the numbers of `recurrences.study`;
`dynamics`, what happens along real sequences), `curves` by the kind of perturbation, and `summary`, a few numbers by
which runs are compared.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from trainer import keyed
from trainer.analysis import inputs as input_changes
from trainer.analysis import jacobian, lipschitz, perturbations, pseudospectrum, recurrences
from trainer.analysis.perturbations import BEFORE, Judge, Score
from trainer.data.dataset import Batch, Dataset
from trainer.models.recurrence import RecurrentLayer
from trainer.recipe import Recipe, Split, State

SIZES = (0.0, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
"""Of all perturbations, if nobody says others; `trainer.analysis.inputs` and `perturbations` say what they are."""
COMPARED = 0.1
"""The size at which a summary compares."""
Progress = Callable[[str, int, int], None]
"""(what, done, of how many)"""


@dataclass(frozen=True)
class Options:
    """How much work a study is."""

    samples: int = 200
    """Of the split, for the curves; drawn by keys, so that runs on the same data are judged on the same samples."""
    seeds: int = 3
    """Draws of each kind of noise."""
    sizes: tuple[float, ...] = SIZES
    """Of all perturbations: 0, and then rising up to 1."""
    num_points: int = 120
    """Of a side of a pseudo-spectrum's grid."""
    num_powers: int = 100
    trajectories: int = 4
    max_frames: int = 800
    """Of a trajectory."""
    widest_jacobian: int = 512
    """State up to which the pseudo-spectrum of a Jacobian is computed."""


@dataclass(frozen=True)
class Study:
    """What was found."""

    values: dict[str, Any]
    """As JSON; numbers that are not finite are None."""
    arrays: dict[str, dict[str, Any]]
    """By layer: what the pictures of its `gates` (of `recurrences.study`) and `dynamics` are drawn from."""


def study(recipe: Recipe[Any], model: nn.Module, split: Split, options: Options, progress: Progress) -> Study:
    """Study a trained model.

    Args:
        recipe: with the overrides that its `inputs` ask for.
        model: with the weights of a checkpoint; changed: its weights become plain numbers that ask for no gradient.
        split: whose samples are perturbed.
        options: how much work.
        progress: told how far it is.
    """
    model.eval()
    perturbations.plain_weights(model)
    layers = dict(recurrences.recurrences(model))
    matrices = {name: recurrences.gate_matrices(layer) for name, layer in layers.items()}
    judge = judge_of(recipe, model, split, options.samples)
    work = curves_of(judge, options)
    total, done = sum(map(len, matrices.values())) + len(layers) + len(work), 0

    def advance() -> None:
        nonlocal done
        done += 1
        progress("analysis", done, total)

    values: dict[str, Any] = {"split": split, "samples": _count(judge.batches), "monitor": recipe.monitor}
    inputs = recipe.inputs()
    values["inputs"] = None if inputs is None else inputs.name
    values["relative"] = inputs is not None and inputs.relative
    found: dict[str, Any] = {name: {"cell": layer.cell.name, "gates": {}} for name, layer in layers.items()}
    arrays: dict[str, dict[str, Any]] = {name: {"gates": {}} for name in layers}
    for name, gates in matrices.items():
        for gate, a in gates.items():
            numbers, arrays[name]["gates"][gate] = recurrences.study(a, options.num_points, options.num_powers)
            found[name]["gates"][gate] = numbers
            advance()
    batch = max(judge.batches, key=lambda b: int(b["valid"].sum()), default=None)
    seen = {} if batch is None else jacobian.inputs_of_layers(model, lambda: judge.step(batch))
    for name, layer in layers.items():
        if name in seen:
            found[name]["dynamics"], arrays[name]["dynamics"] = _dynamics(layer, *seen[name], options)
        advance()
    values["recurrences"] = found
    curves: dict[str, list[list[Score]]] = {}
    for kind, run in work:
        curves.setdefault(kind, []).append(run())
        advance()
    values["sizes"] = list(options.sizes)
    values["curves"] = {
        kind: {of: [[score[of] for score in run] for run in runs] for of in ("monitor", "loss")}
        for kind, runs in curves.items()
    }
    if inputs is not None and judge.batches:
        frames = judge.batches[0][inputs.name].shape[1]
        constant, why = lipschitz.bound(model, frames)
        values["lipschitz"] = {"bound": constant, "frames": frames, "why_not": why}
        values["certified"] = lipschitz.certified_errors(judge, inputs, options.sizes)
    if judge.batches:
        values["normalised"] = {of: perturbations.normalised_score(judge, of) for of in ("norm", "radius")}
    values["summary"] = summary(values)
    return Study(finite(values), arrays)


def judge_of(recipe: Recipe[Any], model: nn.Module, split: Split, samples: int) -> Judge:
    """A judge on micro-batches of a split, taken in an order drawn by hashes until they hold so many samples.

    Those of a stream go on from the states that `evaluate` has there, so that it is the same metric.
    """
    dataset = recipe.build_dataset(split)
    micro_batches = [m for step in dataset.plan.epoch(0) for m in step.micro_batches]
    chosen: dict[tuple[int, int], Batch] = {}
    for i in keyed.permutation(len(micro_batches), "analysis"):
        if _count(chosen.values()) >= samples:
            break
        micro_batch = micro_batches[int(i)]
        batch = dataset.load(micro_batch)
        if batch["valid"].any():
            chosen[micro_batch.step, micro_batch.number] = batch
    _carry_states(recipe, model, dataset, chosen)
    return Judge(recipe, model, list(chosen.values()))


@torch.no_grad()
def _carry_states(
    recipe: Recipe[Any], model: nn.Module, dataset: Dataset, chosen: dict[tuple[int, int], Batch]
) -> None:
    """Give batches of a stream, by step and number, their `BEFORE`; others stay as they are."""
    if not chosen or recipe.step(model, next(iter(chosen.values()))).state is None:
        return
    carried: dict[int, State] = {}
    for step in dataset.plan.epoch(0)[: max(number for number, _ in chosen) + 1]:
        for micro_batch in step.micro_batches:
            batch = chosen.get((micro_batch.step, micro_batch.number)) or dataset.load(micro_batch)
            state = carried.pop(micro_batch.number, None)
            if state is not None:
                batch[BEFORE] = state
            output = recipe.step(model, batch, state)
            assert output.state is not None
            carried[micro_batch.number] = output.state


def _count(batches: Iterable[Batch]) -> int:
    return sum(int(batch["valid"].sum()) for batch in batches)


def curves_of(judge: Judge, options: Options) -> list[tuple[str, Callable[[], list[Score]]]]:
    """The curves that a model bears, each as a function that computes it, one a seed where it is drawn."""
    work: list[tuple[str, Callable[[], list[Score]]]] = []
    if not judge.batches:
        return work
    seeds, sizes, states = options.seeds, options.sizes, perturbations.bears_states(judge.model)
    if (inputs := judge.recipe.inputs()) is not None:
        for kind in input_changes.noises(inputs):
            for seed in range(seeds):
                work.append((kind, _bound(input_changes.noise_curve, judge, inputs, kind, sizes, seed)))
        for kind in input_changes.attacks(inputs):
            work.append((kind, _bound(input_changes.attack_curve, judge, inputs, kind, sizes)))
    for seed in range(seeds):
        work.append(("weights", _bound(perturbations.weight_noise_curve, judge, sizes, seed)))
        if states:
            work.append(("state", _bound(perturbations.state_curve, judge, sizes, seed, False)))
    work.append(("weights_worst", _bound(perturbations.weight_attack_curve, judge, sizes)))
    if states:
        work.append(("state_worst", _bound(perturbations.state_curve, judge, sizes, 0, True)))
    return work


def _bound(function: Callable[..., list[Score]], *arguments: Any) -> Callable[[], list[Score]]:
    return lambda: function(*arguments)


def _dynamics(
    layer: RecurrentLayer, x: Tensor, lengths: Tensor | None, options: Options
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Lyapunov exponents and Jacobians of a layer along the longest sequences of a batch."""
    own = torch.full((len(x),), x.shape[1]) if lengths is None else lengths
    rows = own.argsort(descending=True, stable=True)[: options.trajectories]
    steps = min(int(own[rows].min()), options.max_frames)
    size = jacobian.state_size(layer)
    u = jacobian.gate_inputs(layer, x[rows, :steps])
    with torch.no_grad():
        found = jacobian.dynamics(jacobian.one_step(layer), u, size)
    middle = found.jacobian.numpy()
    arrays: dict[str, Any] = {"exponents": found.exponents.numpy(), "eigenvalues": found.eigenvalues.numpy()}
    arrays["frames"] = found.frames
    if size <= options.widest_jacobian:
        resolvent = pseudospectrum.Resolvent(middle)
        reach = 1.2 * max(1.0, float(abs(resolvent.eigenvalues).max()))
        arrays["grid"] = pseudospectrum.grid(resolvent, (-reach, reach, -reach, reach), options.num_points)
        arrays["grid_eigenvalues"] = resolvent.eigenvalues
    return {
        "trajectories": len(u),
        "steps": steps,
        "exponents": found.exponents.mean(0).tolist(),
        "largest_exponents": found.exponents[:, 0].tolist(),
        "jacobian_radius": [float(r) for r in found.eigenvalues.abs().amax(-1).mean(0)],
        "jacobian_norm": float(torch.linalg.matrix_norm(found.jacobian, 2)),
        "frames": found.frames,
    }, arrays


def summary(values: dict[str, Any]) -> dict[str, float]:
    """A few numbers by which runs are compared: the largest of all recurrences and gates, and the metric clean, with
    matrices scaled down, and at `COMPARED` of each kind of perturbation, if that is one of the sizes."""
    gates = [gate for layer in values["recurrences"].values() for gate in layer["gates"].values()]
    found = {
        name: max((gate[name] for gate in gates), default=math.nan)
        for name in ("radius", "norm", "nonnormality", "henrici", "kreiss", "largest_power")
    }
    exponents = [
        statistics.fmean(layer["dynamics"]["largest_exponents"])
        for layer in values["recurrences"].values()
        if "dynamics" in layer
    ]
    found["lyapunov"] = max(exponents, default=math.nan)
    found |= {f"scaled_to_{of}_1": score["monitor"] for of, score in values.get("normalised", {}).items()}
    sizes = values["sizes"]
    for kind, curve in values["curves"].items():
        found.setdefault("clean", curve["monitor"][0][0])
        if COMPARED in sizes:
            found[kind] = statistics.fmean(run[sizes.index(COMPARED)] for run in curve["monitor"])
    return found


def finite(values: Any) -> Any:
    """The same for JSON, which has no infinity: None in its place."""
    if isinstance(values, dict):
        return {str(name): finite(value) for name, value in values.items()}
    if isinstance(values, (list, tuple)):
        return [finite(value) for value in values]
    return None if isinstance(values, float) and not math.isfinite(values) else values
