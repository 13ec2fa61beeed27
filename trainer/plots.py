"""Pictures: curves of a run over its steps, and heat maps of what a model sees.

Every picture is a PNG file, and an <img> that holds the same bytes for a page that is to be whole on its own.
"""

import base64
import html
import io
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib import font_manager
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from trainer.data.dataset import Media
from trainer.metrics import error_rates

Rows = list[dict[str, Any]]
T = TypeVar("T")

BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by colour-blind eyes too (Okabe & Ito)
MAX_PICTURE_FRAMES = 600
LEVELS = 32
LINE = 12
"""Pixels."""
LEAST_PROBABILITY, MAX_CLASSES = 0.1, 40
"""Of what is drawn of a model's outputs: what comes up to that somewhere, and of these the likeliest."""


def _inline(path: Path, kind: str, name: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img class="{kind}" alt="{html.escape(name)}" src="data:image/png;base64,{data}">'


def picture(figure: Figure, path: Path, kind: str = "plot") -> str:
    """Save a figure beside the report and return it as an <img> that holds it."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130)
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(256).save(path, optimize=True)  # a third of the bytes
    return _inline(path, kind, path.stem.replace("-", " "))


def saved(path: Path) -> str:
    """A picture that was saved before, as an <img> that holds it."""
    return _inline(path, "plot", path.stem.replace("-", " "))


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def series(rows: Rows, name: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    kept = [(row["step"], row[name] * factor) for row in rows if row.get(name) is not None]
    return [s for s, _ in kept], [v for _, v in kept]


def _curve(axes: Axes, rows: Rows, name: str, label: str, color: str, factor: float = 1.0) -> None:
    """Raw values faintly, their running mean over them."""
    steps, values = series(rows, name, factor)
    if values:
        axes.plot(steps, values, color=color, alpha=0.25, linewidth=0.8)
        axes.plot(steps, smooth(values, max(1, len(values) // 40)), color=color, label=label)


def _axes(ylabel: str) -> tuple[Figure, Axes]:
    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return figure, axes


def _few(items: Sequence[T], count: int) -> list[T]:
    """The first, the last, and as many between them at equal distances."""
    last = len(items) - 1
    return [items[i] for i in dict.fromkeys(round(last * k / max(1, count - 1)) for k in range(count))]


def _hours(axes: Axes, train: Rows) -> None:
    """The hours of audio that were trained on by then, at some of the steps."""
    low, high = axes.get_xlim()
    hours = {step: h for step, h in zip(*series(train, "audio_hours"), strict=True) if low <= step <= high}
    if len(hours) > 1:
        top = axes.twiny()
        top.set_xlim(low, high)
        ticks = _few(list(hours), 5)
        top.set_xticks(ticks, [f"{hours[t]:.3g}" for t in ticks], fontsize=8)
        top.set_xlabel("hours of audio", fontsize=9)
        top.spines[["right"]].set_visible(False)


def curves(train: Rows, valid: Rows, refused: Rows) -> dict[str, Figure]:
    """Pictures over optimizer steps, by name; one that would be empty is left out."""
    figures: dict[str, Figure] = {}
    sound = not any(series(train, "tokens_per_second")[1]) or any(series(train, "audio_hours_per_second")[1])
    figures["loss"], axes = _axes("loss")
    _curve(axes, train, "loss", "training, smoothed", BLUE)
    axes.plot(*series(valid, "loss"), "o-", color=ORANGE, label="validation", markersize=4)
    # The first steps may be far above the rest, which is what one wants to see.
    settled = [*series(train, "loss")[1][len(train) // 20 :], *series(valid, "loss")[1]]
    if settled and max(settled) > min(settled):
        margin = 0.05 * (max(settled) - min(settled))
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    if sound:
        _hours(axes, train)

    measured = list(dict.fromkeys(name for row in valid for name in error_rates(row)))
    if measured:
        figures["error-rates"], axes = _axes("errors in validation, %")
        for name, color, marker in zip(measured, (ORANGE, BLUE, GREEN), "os^", strict=False):
            axes.plot(*series(valid, name, 100), marker + "-", color=color, label=name.upper(), markersize=4)
        axes.set_ylim(0, None)
        if sound:
            _hours(axes, train)

    figures["learning-rate"], axes = _axes("learning rate")
    axes.plot(*series(train, "lr"), color=BLUE)
    axes.set_ylim(0, None)

    figures["gradient-norm"], axes = _axes("gradient norm before clipping")
    _curve(axes, train, "grad_norm", "gradient norm, smoothed", BLUE)
    if any(value > 0 for value in series(train, "grad_norm")[1]):
        axes.set_yscale("log")
    for i, row in enumerate(refused):
        axes.axvline(row["step"], color=ORANGE, linestyle=":", label=None if i else "refused step")

    # A norm of zero, or none, has no place on the scale and leaves a gap: the layers keep their numbers.
    layers = [(row["step"], [v or math.nan for k, v in row.items() if k.startswith("gradient/")]) for row in valid]
    layers = [(step, norms) for step, norms in layers if len(norms) > 1 and any(map(math.isfinite, norms))]
    if layers:
        figures["gradient-norm-of-layers"], axes = _axes("gradient norm of a layer")
        axes.set(xlabel="layer", yscale="log")
        for (step, norms), color in zip(_few(layers, 3), (GREEN, ORANGE, BLUE), strict=False):
            axes.plot(range(1, len(norms) + 1), norms, ".-", color=color, label=f"step {step}", markersize=3)

    matrices = {
        label: [
            (row["step"], found)
            for row in valid
            if (found := [v for k, v in row.items() if k.startswith(kind) and v is not None])
        ]
        for kind, label in (
            ("norm/", "norm"),
            ("radius/", "radius of eigenvalues"),
            ("nonnormality/", "departure from normality"),
        )
    }
    if any(matrices.values()):
        figures["recurrent-matrices"], axes = _axes("recurrent matrices: largest, and all")
        for (label, found), color in zip(matrices.items(), (BLUE, ORANGE, GREEN), strict=True):
            steps, least, most = [s for s, _ in found], [min(v) for _, v in found], [max(v) for _, v in found]
            if steps:
                axes.plot(steps, most, "o-", color=color, label=label, markersize=4)
                axes.fill_between(steps, least, most, color=color, alpha=0.15, linewidth=0)
        axes.set_ylim(0, None)

    figures["throughput"], axes = _axes("hours of audio an hour (x real time)" if sound else "tokens a second")
    speed = ("audio_hours_per_second", 3600) if sound else ("tokens_per_second", 1)
    _curve(axes, train, speed[0], "throughput, smoothed", BLUE, speed[1])
    axes.set_ylim(0, None)

    figures["padding-and-waiting"], axes = _axes("%")
    _curve(axes, train, "padding_percent", "padding, % of what is computed", GREEN)
    _curve(axes, train, "data_wait_percent", "waiting for data, % of the time", ORANGE)
    axes.set_ylim(0, None)
    for figure in figures.values():
        axes = figure.axes[0]
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    return figures


def _scaled(image: NDArray[Any]) -> NDArray[np.float64]:
    """Values to [0, 1], the brightest and darkest hundredth cut off."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64))
    low, high = np.percentile(values, [1, 99])
    return np.clip((values - low) / max(high - low, 1e-9), 0, 1)


def _pixels(values: NDArray[Any]) -> Image.Image:
    """Values in [0, 1] (rows, columns) in colours, the first row at the bottom."""
    levels = (values[::-1] * (LEVELS - 1)).round().astype(np.uint8)  # few of them: fewer bytes
    pixels = Image.fromarray(levels, mode="P")
    colors = plt.get_cmap("magma")(np.linspace(0, 1, LEVELS))[:, :3]
    pixels.putpalette((colors * 255).astype(np.uint8).tobytes() + b"\xff\xff\xff")  # the last one for what is written
    return pixels


def seen(media: Media) -> Image.Image:
    """A small picture of a sample without axes: its image (bands, frames), time to the right, low bands at the bottom;
    below it the labels of the likeliest path and the probabilities of all that come up, where a model tells."""
    assert media.image is not None
    if media.outputs is None or not media.outputs.shape[1]:
        return _pixels(_scaled(media.image[:, :: math.ceil(media.image.shape[1] / MAX_PICTURE_FRAMES)]))
    outputs, frames = np.asarray(media.outputs), media.outputs.shape[1]
    font = ImageFont.truetype(
        font_manager.findfont("DejaVu Sans"), LINE - 2
    )  # comes with matplotlib, knows many letters
    most = outputs.max(1)
    shown = np.sort(np.argsort(-most, kind="stable")[:MAX_CLASSES])
    shown = shown[most[shown] >= LEAST_PROBABILITY]
    names = [media.classes[i].strip("<>") for i in shown]
    margin = math.ceil(max(font.getlength(name) for name in names)) + 4
    wide = frames * min(12, max(4, 1200 // frames))
    above = _pixels(_scaled(media.image)).resize((wide, 2 * media.image.shape[0]), Image.Resampling.NEAREST)
    below = _pixels(outputs[shown][::-1]).resize((wide, LINE * len(shown)), Image.Resampling.NEAREST)
    page = Image.new("P", (margin + wide, above.height + LINE + 4 + below.height))
    page.putpalette(above.getpalette() or [])
    page.paste(above, (margin, 0))
    page.paste(below, (margin, page.height - below.height))
    pen = ImageDraw.Draw(page)
    pen.fontmode = "1"  # no shades: there is one colour for it
    for i, name in enumerate(names):
        pen.text((margin - 3, page.height - below.height + LINE * i), name, LEVELS, font, "ra")
    path = outputs.argmax(0)
    for t in np.flatnonzero(np.diff(path, prepend=0)):
        if path[t]:
            middle = margin + (t + 0.5) * wide / frames
            pen.text((middle, above.height + 1), media.classes[path[t]], LEVELS, font, "ma")
    return page


def heat_map(media: Media, path: Path) -> str:
    """What is `seen` of a sample as a file, and an <img> that holds it; nothing of one without an image."""
    if media.image is None:
        return ""
    seen(media).save(path, optimize=True)
    return _inline(path, "image" if media.outputs is None else "image outputs", path.stem.replace("-", " "))


def large_heat_map(image: NDArray[Any], seconds: float | None) -> Figure:
    """The same with axes, in seconds where the length of the sound is known."""
    figure, axes = plt.subplots(figsize=(10, 3), layout="constrained")
    extent = (0, seconds or image.shape[1], 0, image.shape[0])
    axes.imshow(_scaled(image), origin="lower", aspect="auto", cmap="magma", extent=extent)
    axes.set(xlabel="frames" if seconds is None else "seconds", ylabel="band")
    return figure


def ratios(lines: list[dict[str, Any]], path: Path) -> None:
    """Bars of how many times faster each line of `bench kernels` is than each rival, forward and with backward."""
    bars = [
        (f"{line['name']}  vs {name}", line["forward"][name]["median"], line["both"].get(name, {}).get("median"))
        for line in lines
        if not line.get("less is better")
        for name in line["forward"]
        if name not in ("milliseconds", "floor", "copy")
    ]
    figure, axes = plt.subplots(figsize=(9, 1 + 0.28 * len(bars)), layout="constrained")
    places = np.arange(len(bars))[::-1]
    axes.barh(places + 0.2, [forward for _, forward, _ in bars], 0.38, color=BLUE, label="forward")
    axes.barh(places - 0.2, [both or np.nan for _, _, both in bars], 0.38, color=ORANGE, label="forward + backward")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set(xscale="log", yticks=places, xlabel="times faster (log scale)", ylim=(-0.7, len(bars) - 0.3))
    axes.set_yticklabels([name for name, _, _ in bars], fontsize=8)
    ticks = [0.5, 1, 2, 5, 10, 20, 50, 100]
    axes.set_xticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right")
    picture(figure, path)


def loader_ratios(lines: list[dict[str, Any]], path: Path) -> None:
    """Bars of how many times as fast the loader is as each rival, with quartiles, and what was wanted."""
    figure, axes = plt.subplots(figsize=(9, 1 + 0.4 * len(lines)), layout="constrained")
    places = np.arange(len(lines))[::-1]
    for offset, kind, color in ((0.19, "processor", BLUE), (-0.19, "clock", ORANGE)):
        middle = np.array([line[kind]["median"] for line in lines])
        around = [[abs(line[kind][side] - line[kind]["median"]) for line in lines] for side in ("low", "high")]
        label = {"processor": "by processor time", "clock": "by the clock"}[kind]
        axes.barh(places + offset, middle, 0.36, xerr=around, color=color, label=label, error_kw={"linewidth": 1})
    for place, line in zip(places, lines, strict=True):
        if line["wanted"]:
            axes.plot([line["wanted"]] * 2, [place - 0.42, place + 0.42], color="black", linewidth=2)
    axes.plot([], [], color="black", linewidth=2, label="wanted")
    axes.axvline(1, color="grey", linewidth=0.8)
    axes.set(yticks=places, xlabel="times as fast", ylim=(-0.7, len(lines) - 0.3))
    rivals = ["two workers vs one" if x["rival"] == "one worker" else f"ours vs {x['rival']}" for x in lines]
    names = [f"{line['contest']}: {rival}" for line, rival in zip(lines, rivals, strict=True)]
    axes.set_yticklabels(names, fontsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize=8)
    picture(figure, path)


def shard_statistics(seconds: dict[str, list[float]], units: dict[str, int], what: str, path: Path) -> None:
    """Two histograms: the length of each sample, by group, and how often each character (or phone) occurs."""
    shown = sorted(units.items(), key=lambda item: -item[1])[:60]
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(13, 4.2), layout="constrained", width_ratios=(1, max(1.2, len(shown) / 28))
    )
    longest = max((max(s) for s in seconds.values() if s), default=1.0)
    edges = np.linspace(0, longest, 41)
    for (name, values), color in zip(seconds.items(), (BLUE, ORANGE, GREEN, "#cc79a7", "#56b4e9"), strict=False):
        left.hist(values, edges, histtype="step", linewidth=1.6, color=color, label=name.replace("$", r"\$"))
    left.set(xlabel="seconds", ylabel="samples (log scale)", yscale="log", title="length")
    left.legend(fontsize=8, frameon=False)
    places = np.arange(len(shown))
    right.bar(places, [count for _, count in shown], color=BLUE)
    names = [{" ": "space", "$": r"\$"}.get(c, c) for c, _ in shown]
    right.set_xticks(places, names, fontsize=9)
    right.tick_params("x", rotation=90 if any(len(n) > 1 for n in names) and len(names) > 40 else 0)
    more = f", the {len(shown)} most frequent of {len(units)}" if len(units) > len(shown) else ""
    right.set(yscale="log", ylabel="occurrences (log scale)", title=f"{what}{more}")
    for axes in (left, right):
        axes.set_ylim(bottom=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    picture(figure, path)


def sweep(
    curves: dict[str, list[list[tuple[int, float]]]], chances: dict[str, float], monitor: str, path: Path
) -> None:
    """Validations over steps, a colour a variant and a line a seed; a dashed line where nothing was learnt."""
    figure, axes = _axes(monitor)
    for i, (variant, runs) in enumerate(curves.items()):
        color = plt.colormaps["tab10"](i % 10)
        for j, run in enumerate(runs):
            steps, values = zip(*run, strict=True) if run else ((), ())
            axes.plot(steps, values, color=color, linewidth=1.2, alpha=0.8, label=variant[:60] if not j else None)
        chance = next((value for label, value in chances.items() if variant.startswith(label)), None)
        if chance is not None:
            axes.axhline(chance, color=color, linestyle="--", linewidth=0.8)
    if min((value for runs in curves.values() for run in runs for _, value in run), default=0.0) > 0:
        axes.set_yscale("log")
    if len(curves) <= 12:
        axes.legend(fontsize=7)
    picture(figure, path)
