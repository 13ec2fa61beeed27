"""Pictures of a study: pseudo-spectra, singular values and powers, trajectories, curves of noise and attacks."""

import statistics
from collections.abc import Iterator
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from trainer.analysis.pseudospectrum import Grid
from trainer.analysis.study import Study
from trainer.plots import BLUE, GREEN, ORANGE

PURPLE, GOLD = "#aa4499", "#e69f00"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, GOLD)
LEVELS = np.arange(-3.0, 0.01, 0.5)
"""log10 of epsilon of the contours."""
LABELS = {
    "gaussian": "Gaussian",
    "uniform": "uniform",
    "drop": "frames dropped",
    "clip": "clipped",
    "flips": "zeros and ones flipped",
    "fgsm": "FGSM, largest norm",
    "pgd_largest": "PGD, largest norm",
    "pgd_l2": "PGD, 2-norm",
    "flips_worst": "worst zeros and ones flipped",
    "weights": "random",
    "weights_worst": "worst found",
    "state": "random",
    "state_worst": "worst found",
}
NAMES = {
    **LABELS,
    "gaussian": "Gaussian noise",
    "uniform": "uniform noise",
    "weights": "random E added to W",
    "weights_worst": "worst E added to W",
    "state": "random initial state",
    "state_worst": "worst initial state",
}
PANELS = (
    ("noise on the input", ("gaussian", "uniform", "drop", "clip", "flips")),
    ("attacks on the input", ("fgsm", "pgd_largest", "pgd_l2", "flips_worst")),
    ("recurrent matrices W + E", ("weights", "weights_worst")),
    ("initial state", ("state", "state_worst")),
)


def draw(study: Study) -> Iterator[tuple[str, Figure]]:
    """All pictures by name, each drawn when it is asked for: deep nets have hundreds."""
    if study.values["curves"]:
        yield "robustness", curves(study.values)
    for layer, arrays in study.arrays.items():
        numbers = study.values["recurrences"][layer]
        yield f"pseudospectra-{layer}", pseudospectra(layer, numbers["gates"], arrays["gates"])
        yield f"powers-{layer}", powers(layer, numbers["gates"], arrays["gates"])
        if "dynamics" in arrays:
            yield f"trajectories-{layer}", trajectories(layer, numbers, arrays["dynamics"])


def _plain(axes: Axes, **labels: Any) -> None:
    axes.set(**labels)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.2)


def contours(axes: Axes, grid: Grid, eigenvalues: NDArray[Any], boundary: NDArray[Any] | None = None) -> Any:
    """Nested pseudo-spectra with the eigenvalues and the unit circle; dashed: the numerical range."""
    heights = np.log10(np.maximum(grid.smallest, 1e-16))
    levels = [-16.5, *LEVELS]
    colors = plt.get_cmap("YlGnBu_r", len(levels) - 1)
    norm = BoundaryNorm(levels, colors.N)  # a colour of its own between each two contours
    shown = axes.contourf(grid.x, grid.y, heights, levels, cmap=colors, norm=norm, alpha=0.85)
    axes.contour(grid.x, grid.y, heights, LEVELS, colors="white", linewidths=0.6)
    turn = np.exp(1j * np.linspace(0, 2 * np.pi, 400))
    axes.plot(turn.real, turn.imag, color="black", linewidth=1)
    if boundary is not None:
        closed = np.append(boundary, boundary[0])
        axes.plot(closed.real, closed.imag, "--", color=ORANGE, linewidth=1)
    axes.plot(eigenvalues.real, eigenvalues.imag, ".", color=ORANGE, markersize=3.5, markeredgewidth=0)
    axes.set(aspect="equal", xlim=(grid.x[0], grid.x[-1]), ylim=(grid.y[0], grid.y[-1]))
    axes.tick_params(labelsize=8)
    return shown


def _bar(figure: Figure, shown: Any, axes: Any) -> None:
    bar = figure.colorbar(shown, ax=axes, ticks=range(-3, 1), shrink=0.8, aspect=25, pad=0.02)
    bar.ax.set_yticklabels([f"$10^{{{level}}}$" for level in range(-3, 1)], fontsize=8)
    bar.ax.set_title("ε", fontsize=9)


def pseudospectra(layer: str, numbers: dict[str, Any], arrays: dict[str, Any]) -> Figure:
    """A panel a gate."""
    count = len(arrays)
    figure, panels = plt.subplots(1, count, figsize=(3.6 * count + 1.2, 4.3), layout="constrained", squeeze=False)
    for axes, (gate, found) in zip(panels[0], arrays.items(), strict=True):
        shown = contours(axes, found["grid"], found["eigenvalues"], found["range"])
        n = numbers[gate]
        axes.set_title(
            f"{gate}: radius {n['radius']:.3g}, norm {n['norm']:.3g}\nnon-normality {n['nonnormality']:.2f}, "
            f"Kreiss {_number(n['kreiss'])}",
            fontsize=9,
        )
    _bar(figure, shown, panels[0])
    figure.suptitle(f"ε-pseudo-spectra of {layer}; dots: eigenvalues, dashed: numerical range", fontsize=10)
    return figure


def _number(value: float | None) -> str:
    return "∞" if value is None else f"{value:.3g}"


def powers(layer: str, numbers: dict[str, Any], arrays: dict[str, Any]) -> Figure:
    """Singular values beside absolute eigenvalues, and the norms of powers beside those of the radius."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.8), layout="constrained")
    for (gate, found), color in zip(arrays.items(), COLORS, strict=False):
        places = np.arange(1, len(found["singular_values"]) + 1)
        left.plot(places, found["singular_values"], color=color, label=f"{gate}: singular values")
        left.plot(places, np.abs(found["eigenvalues"]), ":", color=color, label="|eigenvalues|")
        steps = np.arange(len(found["growth"]))
        with np.errstate(over="ignore"):
            bare = numbers[gate]["radius"] ** steps
        right.plot(steps, found["growth"], color=color, label=f"{gate}: $\\|W^k\\|$")
        right.plot(steps, bare, ":", color=color, label="radius$^k$")
    _plain(left, xlabel="number", ylabel="size", title=f"{layer}: singular values and eigenvalues", ylim=(0, None))
    _plain(right, xlabel="power k", title="growth of powers")
    every = np.concatenate([found["growth"] for found in arrays.values()])
    top = every[np.isfinite(every)].max(initial=1.0)
    if top > 20 or every.min() < 0.05:
        right.set_yscale("log")
        right.set_ylim(max(1e-8, min(every.min(), 0.5)), min(top * 2, 1e12))
    for axes in (left, right):
        axes.title.set_fontsize(10)
        axes.legend(fontsize=7, frameon=False, ncols=2 if len(arrays) > 1 else 1)
    return figure


def trajectories(layer: str, numbers: dict[str, Any], arrays: dict[str, Any]) -> Figure:
    """Jacobians along a trajectory: their eigenvalues, the pseudo-spectrum of one, and Lyapunov exponents."""
    wide = "grid" in arrays
    figure, panels = plt.subplots(1, 2 + wide, figsize=(4.6 * (2 + wide), 4.2), layout="constrained")
    frames, values = arrays["frames"], arrays["eigenvalues"][0]
    first = panels[0]
    turn = np.exp(1j * np.linspace(0, 2 * np.pi, 400))
    first.plot(turn.real, turn.imag, color="black", linewidth=1)
    for frame, found, shade in zip(frames, values, np.linspace(0.1, 0.9, len(frames)), strict=True):
        color = plt.colormaps["viridis"](shade)
        first.plot(found.real, found.imag, ".", color=color, markersize=3, label=f"frame {frame + 1}")
    _plain(first, title="eigenvalues of Jacobians, one sequence", aspect="equal")
    first.legend(fontsize=7, frameon=False, markerscale=2)
    if wide:
        shown = contours(panels[1], arrays["grid"], arrays["grid_eigenvalues"])
        panels[1].set_title("pseudo-spectrum of the one half way")
        _bar(figure, shown, panels[1])
    last = panels[-1]
    exponents = arrays["exponents"]
    places = np.arange(1, exponents.shape[1] + 1)
    last.axhline(0, color="black", linewidth=0.8)
    for i, row in enumerate(exponents):
        last.plot(places, row, color=BLUE, alpha=0.6, linewidth=1, label=None if i else "a line a sequence")
    floor = np.percentile(exponents, 5)
    last.set_ylim(bottom=max(floor, exponents.max() - 8) - 0.1)
    _plain(
        last,
        xlabel="number",
        ylabel="nats a step",
        title=f"Lyapunov exponents over {numbers['dynamics']['steps']} steps",
    )
    last.legend(fontsize=8, frameon=False)
    figure.suptitle(f"{layer}, {numbers['cell'].replace('_', ' ')}, along real sequences", fontsize=10)
    for axes in panels:
        axes.title.set_fontsize(9)
    return figure


def curve(
    axes: Axes,
    sizes: list[float],
    runs: list[list[float | None]],
    color: str,
    label: str,
    style: str = "-",
    width: float = 1.5,
) -> None:
    """Mean over the seeds, and a band from the least to the most."""
    places = [s or sizes[1] / 2 for s in sizes]  # 0 has no place on a logarithmic axis
    columns = [[v for v in column if v is not None] for column in zip(*runs, strict=True)]
    middle = [statistics.fmean(c) if c else np.nan for c in columns]
    axes.plot(places, middle, style, marker="o", markersize=2 + width, color=color, label=label, linewidth=width)
    if len(runs) > 1:
        low, high = ([pick(c) if c else np.nan for c in columns] for pick in (min, max))
        axes.fill_between(places, low, high, color=color, alpha=0.15, linewidth=0)


def size_axis(axes: Axes, sizes: list[float], xlabel: str) -> None:
    """A logarithmic axis with the sizes as ticks, 0 at the left."""
    axes.set_xscale("log")
    axes.set_xticks([s or sizes[1] / 2 for s in sizes], [f"{s:g}" for s in sizes], fontsize=8)
    axes.minorticks_off()
    _plain(axes, xlabel=xlabel)


def curves(values: dict[str, Any]) -> Figure:
    """The task's metric against the size of what is perturbed."""
    sizes, found = values["sizes"], values["curves"]
    panels = [(title, [kind for kind in kinds if kind in found]) for title, kinds in PANELS]
    panels = [(title, kinds) for title, kinds in panels if kinds]
    figure, every = plt.subplots(
        -(-len(panels) // 2),
        2,
        figsize=(10.5, 3.5 * -(-len(panels) // 2)),
        layout="constrained",
        sharey=True,
        squeeze=False,
    )
    for axes, (title, kinds) in zip(every.flat, panels, strict=False):
        widths = (4.0, 2.5, 1.5, 1.5, 1.5)  # each is seen below the next where the two are equal
        for kind, color, width in zip(kinds, COLORS, widths, strict=False):
            curve(axes, sizes, found[kind]["monitor"], color, LABELS[kind], width=width)
        on_input = "input" in title
        if "attacks" in title and values.get("certified"):
            curve(axes, sizes, [values["certified"]], "grey", "certified bound, 2-norm", "--")
        unit = "size of E, spectral norm" if "W" in title else "size, root mean square a number"
        unit = "size, a share (drop, clip, flip) or a number's deviation" if title.startswith("noise") else unit
        if on_input and values["relative"]:
            unit = "size, a share of the sample's root mean square"
        size_axis(axes, sizes, unit)
        if on_input and values["relative"]:
            top = axes.secondary_xaxis("top")
            top.set_xticks([s for s in sizes if s], [f"{-20 * np.log10(s):.0f}" for s in sizes if s], fontsize=8)
            top.minorticks_off()
            top.set_xlabel("signal-to-noise ratio of Gaussian noise, dB", fontsize=8)
        axes.set_title(title, fontsize=10)
        axes.legend(fontsize=8, frameon=False)
    for axes in every[:, 0]:
        axes.set_ylabel(values["monitor"])
    for axes in every.flat[len(panels) :]:
        axes.set_visible(False)
    tops = [v for kind in found.values() for run in kind["monitor"] for v in run if v is not None]
    clean = next(iter(found.values()))["monitor"][0][0] or 0.0
    every[0, 0].set_ylim(0, min(max(tops, default=1.0) * 1.05, max(20 * clean, 2.0)))
    figure.suptitle(
        f"{values['monitor']} on {values['samples']} samples of {values['split']}; bands: least to most over seeds",
        fontsize=10,
    )
    return figure
