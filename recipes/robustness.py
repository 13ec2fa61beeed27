"""Accuracy, stability and robustness of nets in several forms: no task of its own, the conclusion of a sweep.

`./launch.sh reproduce robustness` trains and analyses the runs of configs/sweeps/robustness.yaml, whose variants are
named TASK, CELL, FORM; here they become tables and a page. What is asked: is an accurate net stable, is a stable one
robust, are trained matrices normal?

By size 0.1 at most a perturbation counts as small. What it costs is the task's metric under it less that without it,
the mean over the sizes from 0.005 to 0.1: how robust a net is, its accuracy apart.

Source: Sengupta & Friston 2018, arXiv:1804.11313; its abstract and first page were read, not its list of nets and sets.
"""

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from scipy.stats import binomtest, spearmanr

from trainer.analysis.pictures import COLORS, NAMES, curve, size_axis
from trainer.analysis.study import COMPARED
from trainer.plots import picture
from trainer.sweep.conclusion import Conclusion

Run = Mapping[str, Any]
Runs = list[Run]

FREE = "free"
"""The form that others are compared with."""
ATTACK, NOISE, WEIGHTS, STATE = "pgd_l2", "gaussian", "weights_worst", "state_worst"
COSTS = {ATTACK: "attack", WEIGHTS: "worst E", STATE: "worst start", NOISE: "noise"}
MARKERS = "os^Dv"


def parts(run: Run) -> tuple[str, str, str]:
    """Task, cell and form of a run, from its variant's name."""
    task, cell, form = (*run["variant"].split(", ", 2), "", "")[:3]
    return task, cell, form


def number(run: Run, name: str) -> float:
    """A number of the analysis' summary; infinite where JSON had none."""
    value = run["analysis"]["summary"].get(name)
    return math.inf if value is None else float(value)


def clean(run: Run) -> float:
    """The metric without perturbation: of the whole test where the sweep scored it, else of the samples analysed."""
    return float(run["test"][run["monitor"]]) if run.get("test") else number(run, "clean")


def cost(run: Run, kind: str) -> float:
    """See the module's text; nan where the run bears no such perturbation."""
    values, sizes = run["analysis"]["curves"].get(kind), run["analysis"]["sizes"]
    if values is None:
        return math.nan
    small = [v for v, size in zip(values, sizes, strict=True) if 0 < size <= COMPARED]
    return math.inf if None in small else statistics.fmean(small) - values[0]


def conclude(rows: Sequence[Run], folder: Path) -> Conclusion:
    """Tables, and FOLDER/robustness.png."""
    runs = [row for row in rows if "analysis" in row]
    if not runs:
        return Conclusion({}, [])
    path = folder / "robustness.png"
    page(runs, path)
    tables = {
        "Every net; costs are of small perturbations, see docs/analysis.md": [_line(v) for v in _by(runs, parts)],
        "Each form beside the free one of the same task, cell and seed": _forms(runs),
        "Are trained matrices normal? The largest of each net's": _normality(runs),
        "Do accuracy, stability and robustness go together? Rank correlations (p)": _correlations(runs),
        "Does a larger size ever help? Steps that lower the mean over all nets, and by how much at most": _helped(runs),
    }
    return Conclusion({heading: lines for heading, lines in tables.items() if lines}, [path])


def _by(runs: Runs, name: Any) -> list[Runs]:
    groups: dict[Any, Runs] = {}
    for run in runs:
        groups.setdefault(name(run), []).append(run)
    return list(groups.values())


def _told(values: Sequence[float]) -> str:
    if any(map(math.isnan, values)):
        return ""
    known = [v for v in values if math.isfinite(v)]
    if len(known) < len(values):
        return "∞"
    spread = f" +- {statistics.stdev(known):.1g}" if len(known) > 1 else ""
    return f"{statistics.fmean(known):.3g}{spread}"


def _line(runs: Runs) -> dict[str, str]:
    line = dict(zip(("task", "cell", "form"), parts(runs[0]), strict=True))
    line |= {"metric": runs[0]["monitor"], "clean": _told([clean(run) for run in runs])}
    line |= {f"cost of {name}": _told([cost(run, kind) for run in runs]) for kind, name in COSTS.items()}
    shown = {"radius": "radius", "norm": "norm", "kreiss": "Kreiss", "lyapunov": "Lyapunov"}
    line |= {heading: _told([number(run, name) for run in runs]) for name, heading in shown.items()}
    start = _told([number(run, "nonnormality_at_start") for run in runs])
    return line | {"non-normality (at start)": f"{_told([number(run, 'nonnormality') for run in runs])} ({start})"}


def _forms(runs: Runs) -> list[dict[str, str]]:
    """How many nets of each form are stable, and how they differ from the free ones."""
    free = {(*parts(run)[:2], run["seed"]): run for run in runs if parts(run)[2] == FREE}
    lines = []
    for group in _by(runs, lambda run: parts(run)[2]):
        line = {
            "form": parts(group[0])[2],
            "nets": str(len(group)),
            "radius <= 1": str(sum(number(run, "radius") <= 1 + 1e-5 for run in group)),
            "Lyapunov < 0": str(sum(number(run, "lyapunov") < 0 for run in group)),
        }
        pairs = [(run, free[key]) for run in group if (key := (*parts(run)[:2], run["seed"])) in free]
        line["worse clean"] = _larger([(clean(a), clean(b)) for a, b in pairs])
        for kind, name in COSTS.items():
            line[f"larger cost of {name}; ratio"] = _larger([(cost(a, kind), cost(b, kind)) for a, b in pairs], True)
        lines.append(line)
    return lines


def _larger(pairs: Sequence[tuple[float, float]], ratio: bool = False) -> str:
    """In how many pairs the first is larger, the two-sided p-value of their signs, and the median of the ratios."""
    unequal = [a > b for a, b in pairs if a != b and not math.isnan(a) and not math.isnan(b)]
    if not unequal:
        return ""
    told = f"{sum(unequal)} of {len(unequal)} ({binomtest(sum(unequal), len(unequal)).pvalue:.2g})"
    ratios = [a / b for a, b in pairs if b > 0 and math.isfinite(a)]
    return f"{told}; {statistics.median(ratios):.2f}" if ratio and ratios else told


def _normality(runs: Runs) -> list[dict[str, str]]:
    """Of free nets before and after training, by cell and task; and their metric, trained free and scaled down then."""
    lines = []
    for group in _by([run for run in runs if parts(run)[2] == FREE], lambda run: parts(run)[:2]):
        line = dict(zip(("task", "cell"), parts(group[0]), strict=False))
        for name, heading in (("nonnormality", "non-normality"), ("radius", "radius"), ("norm", "norm")):
            before, after = ([number(run, of) for run in group] for of in (f"{name}_at_start", name))
            line |= {f"{heading} at start": _told(before), f"{heading} trained": _told(after)}
        further = sum(number(run, "nonnormality") > number(run, "nonnormality_at_start") for run in group)
        line["further from normal than at start"] = f"{further} of {len(group)}"
        line["Kreiss"] = _told([number(run, "kreiss") for run in group])
        for name in ("clean", "scaled_to_norm_1", "scaled_to_radius_1"):
            known = [number(run, name) if name in run["analysis"]["summary"] else math.nan for run in group]
            line[f"metric {name.replace('_', ' ')}"] = _told(known)
        lines.append(line)
    return lines


def _correlations(runs: Runs) -> list[dict[str, str]]:
    """Between what is wrong without perturbation, growth along trajectories, and the cost of an attack."""
    lines = []
    for group in _by(runs, lambda run: parts(run)[0]):
        columns = {
            "clean": [clean(run) for run in group],
            "Lyapunov": [number(run, "lyapunov") for run in group],
            "non-normality": [number(run, "nonnormality") for run in group],
            "cost of attack": [cost(run, ATTACK) for run in group],
        }
        line, names = {"task": parts(group[0])[0], "nets": str(len(group))}, list(columns)
        for i, a in enumerate(names):
            for b in names[i + 1 :]:
                line[f"{a}, {b}"] = _ranks(columns[a], columns[b])
        lines.append(line)
    return lines


def _helped(runs: Runs) -> list[dict[str, str]]:
    kinds = [kind for kind in NAMES if any(kind in run["analysis"]["curves"] for run in runs)]
    lines = []
    for group in _by(runs, lambda run: parts(run)[0]):
        line = {"task": parts(group[0])[0]}
        for kind in kinds:
            curves = [found for run in group if (found := run["analysis"]["curves"].get(kind)) is not None]
            means = [math.inf if None in column else statistics.fmean(column) for column in zip(*curves, strict=True)]
            falls = [a - b for a, b in itertools.pairwise(means) if a > b]
            told = f"{len(falls)} of {len(means) - 1}" + (f" ({max(falls):.1g})" if falls else "")
            line[NAMES[kind]] = told if curves else ""
        lines.append(line)
    return lines


def _ranks(a: Sequence[float], b: Sequence[float]) -> str:
    if len(set(a)) < 2 or len(set(b)) < 2 or len(a) < 3 or any(map(math.isnan, [*a, *b])):
        return ""
    found = spearmanr(a, b)
    return f"{found.statistic:+.2f} ({found.pvalue:.1g})"


# The page


def page(runs: Runs, path: Path) -> None:
    """Two rows of panels a task, of an attack on the input and of the worst E added to W: a panel a cell, a line a
    form. Below, a panel a task: how costly the attack is against how much states grow."""
    names = [parts(run) for run in runs]
    tasks, cells, forms = (list(dict.fromkeys(column)) for column in zip(*names, strict=True))
    colors = dict(zip(forms, itertools.cycle([*COLORS, "#56b4e9", "#000000", "#999999"]), strict=False))
    lines = [(task, kind) for task in tasks for kind in (ATTACK, WEIGHTS)]
    columns = max(len(cells), len(tasks))
    figure, every = plt.subplots(
        len(lines) + 1, columns, figsize=(4 * columns, 2.4 * (len(lines) + 1)), layout="constrained", squeeze=False
    )
    for panels, (task, kind) in zip(every, lines, strict=False):
        for axes, cell in zip(panels, cells, strict=False):
            _panel(axes, [run for run in runs if parts(run)[:2] == (task, cell)], kind, colors)
            axes.set_title(f"{task}, {cell}: {NAMES[kind]}", fontsize=9)
        for axes in panels[len(cells) :]:
            axes.set_visible(False)
    for axes, task in zip(every[-1], tasks, strict=False):
        for run in runs:
            if parts(run)[0] == task and math.isfinite(value := cost(run, ATTACK)):
                marker = MARKERS[cells.index(parts(run)[1]) % len(MARKERS)]
                axes.plot(number(run, "lyapunov"), value, marker, color=colors[parts(run)[2]], markersize=5)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set(xlabel="largest Lyapunov exponent, nats a step", ylabel="cost of attack")
        told = ", ".join(f"{marker} {cell}" for marker, cell in zip("○□△◇▽", cells, strict=False))
        axes.set_title(f"{task} ({told})", fontsize=9)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in every[-1][len(tasks) :]:
        axes.set_visible(False)
    drawn = dict(pair for axes in every.flat for pair in zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    labels, handles = list(drawn), list(drawn.values())
    figure.legend(handles, labels, loc="outside upper center", ncols=min(len(forms), 8), frameon=False)
    picture(figure, path)


def _panel(axes: Axes, runs: Runs, kind: str, colors: dict[str, str]) -> None:
    for group in _by(runs, parts):
        curves = [found for run in group if (found := run["analysis"]["curves"].get(kind)) is not None]
        if not curves:
            continue
        form = parts(group[0])[2]
        curve(axes, group[0]["analysis"]["sizes"], curves, colors[form], form)
        size_axis(axes, group[0]["analysis"]["sizes"], "size")
        axes.set_ylabel(group[0]["monitor"])
    if runs and runs[0]["monitor"] != "nll":
        axes.set_ylim(bottom=0)
    elif runs and kind == ATTACK:  # its cost has no upper bound
        axes.set_ylim(0, 3 * max(number(run, "clean") for run in runs))
