"""The study of a run's best checkpoint, kept in its directory and shown wherever runs are looked at.

RUN/analysis/ holds `analysis.json` (see `trainer.analysis.study`) and a PNG file a picture.
"""

import json
import math
from typing import Any

from trainer import checkpoint
from trainer import config as configuration
from trainer.analysis import pictures, recurrences
from trainer.analysis.recurrences import EPSILONS
from trainer.analysis.study import Options, Progress, Study, study
from trainer.plots import picture
from trainer.recipe import Recipe, Split, from_plain
from trainer.run import RunDirectory
from trainer.tracking import Tracker

FILE = "analysis.json"


def analyze(
    run: RunDirectory, recipe: Recipe[Any], split: Split, options: Options, progress: Progress
) -> dict[str, Any]:
    """Study a run's best checkpoint and keep what was found.

    Returns:
        what lies in `analysis.json` then.

    Raises:
        UserError: there is no checkpoint, or it is of another model or other data.
    """
    from trainer.engine import initialise

    recipe = perturbable(recipe)
    best = checkpoint.best(run.checkpoints)
    model = recipe.build_model()
    initialise(model, recipe.config.seed)  # as the run began
    start = {} if recipe.config.init_from else recurrences.largest(recurrences.logged(model))
    best.check_shapes(checkpoint.shapes_of(model))
    identity = recipe.build_dataset(split).identity
    best.check_data({"train": {k: v for k, v in identity.items() if k != "samples"}})
    model.load_state_dict(best.weights())
    found = study(recipe, model, split, options, progress)
    position = best.state["position"]
    values = {"step": position["step"], "epoch": position["epoch"], **found.values}
    values["summary"] |= {f"{name}_at_start": value for name, value in start.items()}
    _keep(run, values, found)
    _track(run, recipe, values)
    return values


def perturbable(recipe: Recipe[Any]) -> Recipe[Any]:
    """The recipe with the settings that bring what is to be perturbed into its batches."""
    inputs = recipe.inputs()
    if inputs is None or not inputs.overrides:
        return recipe
    return from_plain(configuration.plain(recipe.config), "the run", inputs.overrides)


def _keep(run: RunDirectory, values: dict[str, Any], found: Study) -> None:
    folder = run.path / "analysis"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for name, figure in pictures.draw(found):
        picture(figure, folder / f"{name}.png")
    temporary = folder / "analysis.tmp"
    temporary.write_text(json.dumps(values, indent=1, allow_nan=False), encoding="utf-8")
    temporary.replace(folder / FILE)


def _track(run: RunDirectory, recipe: Recipe[Any], values: dict[str, Any]) -> None:
    config = recipe.config
    settings = configuration.plain(config)
    tracker = Tracker(config.tracking, run.path, config.name, settings, values["step"], active=True, bar=False)
    numbers = {name: value for name, value in values["summary"].items() if value is not None}
    images = sorted((run.path / "analysis").glob("*.png"))
    tracker.show(values["step"], values["epoch"], "analysis", numbers, {p.stem: p for p in images})
    tracker.finish()


HEAD = (
    "matrix",
    "radius",
    "numerical radius",
    "norm",
    "non-normality",
    "Kreiss",
    "largest ‖Wᵏ‖ (k)",
    *(f"radius, ε = {epsilon:g}" for epsilon in EPSILONS),
)


def cells(values: dict[str, Any]) -> list[list[str]]:
    """A row a recurrent matrix, under `HEAD`."""
    rows = []
    for layer, found in values["recurrences"].items():
        for gate, n in found["gates"].items():
            kreiss = "∞" if n["kreiss"] is None else f"{n['kreiss']:.3g}"
            if n["kreiss_scaled_by"] != 1:
                kreiss += " scaled to radius 1"
            power = "∞" if n["largest_power"] is None else f"{n['largest_power']:.3g}"
            more = [f"{n['pseudospectral'][f'{e:g}']['radius']:.4g}" if "pseudospectral" in n else "" for e in EPSILONS]
            sizes = [f"{n[name]:.4g}" for name in ("radius", "numerical_radius", "norm", "nonnormality")]
            rows.append([f"{layer} {gate}", *sizes, kreiss, f"{power} ({n['largest_power_at']})", *more])
    return rows


def lines(values: dict[str, Any]) -> list[str]:
    """What else there is to say, a line each."""
    said = [f"estimates of the {of}, error at most: {told}" for of, told in _estimates(values).items()]
    if values["inputs"] is None:
        said.append("the recipe names no inputs that could be perturbed (`inputs`): matrices and states were, alone")
    if values["curves"] and "state" not in values["curves"]:
        said.append("the states of fast dropout are distributions: none was perturbed, nor followed")
    for layer, found in values["recurrences"].items():
        if "dynamics" in found:
            d = found["dynamics"]
            largest = ", ".join(f"{x:+.4f}" for x in d["largest_exponents"])
            said.append(f"{layer}: largest Lyapunov exponents over {d['steps']} steps: {largest} nats a step")
    monitor, sizes = values["monitor"], values["sizes"]
    for kind, curve in values["curves"].items():
        means = [_mean([run[i] for run in curve["monitor"]]) for i in range(len(sizes))]
        told = "  ".join(f"{size:g}: {value}" for size, value in zip(sizes, means, strict=True))
        said.append(f"{monitor} by size, {pictures.NAMES[kind]}: {told}")
    scaled = [(of, score["monitor"]) for of, score in values.get("normalised", {}).items()]
    if scaled:
        told = ", ".join(f"{of} at most 1: {_mean([value])}" for of, value in scaled)
        said.append(f"{monitor} with every recurrent matrix scaled down, not trained further: {told}")
    if values.get("certified") is not None:
        told = "  ".join(f"{size:g}: {_mean([v])}" for size, v in zip(sizes, values["certified"], strict=True))
        said.append(f"{monitor} by size, at most, whatever attack in the 2-norm (certified): {told}")
    if (bound := values.get("lipschitz")) is not None:
        constant = f"{bound['bound']:.4g}" if bound["bound"] is not None else bound["why_not"] or "beyond numbers"
        said.append(f"Lipschitz bound over {bound['frames']} frames: {constant}")
    return said


def _estimates(values: dict[str, Any]) -> dict[str, str]:
    """Of norm and radius, by how much each method is wrong on the matrix where it is most."""
    gates = [gate["estimates"] for layer in values["recurrences"].values() for gate in layer["gates"].values()]
    names = {"power": "power method", "rayleigh": "Rayleigh quotients", "arnoldi": "Arnoldi"}
    found = {}
    for of in ("norm", "radius") if gates else ():
        told = []
        for method, name in names.items():
            pairs = [(gate[of][method], gate[of]["exact"]) for gate in gates]
            wrong = [math.inf if a is None else abs(a - b) / max(b, 1e-30) for a, b in pairs]
            told.append(f"{name} {100 * max(wrong):.2g} %")
        found[of] = ", ".join(told)
    return found


def _mean(values: list[float | None]) -> str:
    known = [v for v in values if v is not None]
    return f"{sum(known) / len(known):.4g}" if known else "∞"
