"""The report of a run: one HTML file that needs nothing else, and the pictures in it as PNG beside it.

Everything that comes from data (keys, texts, configuration) is escaped: a transcript is never markup.
"""

import base64
import html
import io
import json
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import soundfile
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer import checkpoint, keyed
from trainer import config as configuration
from trainer.config import PROJECT
from trainer.data.dataset import Media
from trainer.errors import UserError
from trainer.metrics import GAP, align
from trainer.recipe import Recipe
from trainer.run import RunDirectory, read_lines

SHOWN = 10
"""Rows in each of the two tables of samples."""
PACKAGES = ("ostinato", "torch", "torchaudio", "deepspeed", "webdataset", "wandb", "numpy", "pydantic")
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by colour-blind eyes too (Okabe & Ito)

STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; }
h1 { margin-bottom: 0; } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line); }
.facts { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1rem 0; padding: 0; }
.facts div { background: var(--soft); border-radius: .5rem; padding: .5rem 1rem; }
.facts b { display: block; font-size: 1.4rem; } .facts .head b { font-size: 2.2rem; }
.wide { overflow-x: auto; } table { border-collapse: collapse; } img { max-width: 100%; }
td, th { text-align: left; padding: .3rem .8rem; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
figure { margin: 1rem 0; background: white; border-radius: .5rem; padding: .5rem; }
.sample { border-bottom: 1px solid var(--line); padding: 1rem 0; } 
.sample audio { width: 100%; max-width: 30rem; height: 2.2rem; }
.aligned { font: 15px/1.6 ui-monospace, monospace; overflow-wrap: anywhere; }
.aligned ins { background: #d55e0055; text-decoration: underline; } .aligned del { background: #0072b255; }
.aligned em { background: #e69f0077; font-style: normal; border-bottom: 2px dotted; }
pre { overflow-x: auto; background: var(--soft); padding: 1rem; border-radius: .5rem; }
"""


def escape(value: object) -> str:
    return html.escape(str(value), quote=True)


def picture(figure: Figure, path: Path, dpi: int = 110) -> str:
    """Save a figure beside the report and return it as an <img> that holds it."""
    figure.savefig(path, dpi=dpi, bbox_inches="tight")
    plt.close(figure)
    data = base64.b64encode(path.read_bytes()).decode()
    return f'<img alt="{escape(path.stem.replace("-", " "))}" src="data:image/png;base64,{data}">'


def smooth(values: Sequence[float], width: int) -> list[float]:
    """Mean over the last `width` values."""
    return [statistics.fmean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def _series(rows: list[dict[str, Any]], name: str, factor: float = 1.0) -> tuple[list[int], list[float]]:
    kept = [(row["step"], row[name] * factor) for row in rows if row.get(name) is not None]
    return [s for s, _ in kept], [v for _, v in kept]


def _curve(axes: Axes, rows: list[dict[str, Any]], name: str, label: str, color: str, factor: float = 1.0) -> None:
    steps, values = _series(rows, name, factor)
    if values:
        axes.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        axes.plot(steps, smooth(values, max(1, len(values) // 40)), color=color, label=label)


def curves(train: list[dict[str, Any]], valid: list[dict[str, Any]], refused: list[dict[str, Any]]) -> Figure:
    """Loss, error rates, learning rate and gradient, speed: over optimizer steps."""
    figure, grid = plt.subplots(2, 2, figsize=(12, 7.5), sharex=True)
    loss, errors, gradient, speed = grid.flat
    _curve(loss, train, "loss", "training (smoothed)", BLUE)
    loss.plot(*_series(valid, "loss"), "o-", color=ORANGE, label="validation", markersize=4)
    loss.set(ylabel="loss", title="Loss")
    low = [v for _, v in zip(*_series(train, "loss"), strict=True)][len(train) // 20 :]
    if low:
        loss.set_ylim(0, 1.05 * max(*low, *_series(valid, "loss")[1], 1e-9))
    rates = [name for name in (valid[0] if valid else {}) if f"{name}_insertions" in valid[0]]
    for name, color in zip(rates, (ORANGE, BLUE, GREEN), strict=False):
        errors.plot(*_series(valid, name, 100), "o-", color=color, label=name.upper(), markersize=4)
    errors.set(ylabel="errors, %", title="Validation", ylim=(0, None))
    _curve(gradient, train, "grad_norm", "gradient norm", BLUE)
    for i, row in enumerate(refused):
        gradient.axvline(row["step"], color=ORANGE, linestyle=":", label="refused step" if i == 0 else None)
    gradient.set(ylabel="gradient norm", xlabel="step", title="Gradient and learning rate", yscale="log")
    rate = gradient.twinx()
    rate.plot(*_series(train, "lr"), color=GREEN, label="learning rate")
    rate.set(ylabel="learning rate", ylim=(0, None))
    _curve(speed, train, "audio_hours_per_second", "speed", BLUE, 3600)
    speed.set(ylabel="x real time", xlabel="step", title="Speed, padding, waiting for data", ylim=(0, None))
    share = speed.twinx()
    _curve(share, train, "padding_percent", "padding, %", GREEN)
    _curve(share, train, "data_wait_percent", "waiting for data, %", ORANGE)
    share.set(ylabel="% of a step", ylim=(0, 100))
    for axes, twin in ((loss, None), (errors, None), (gradient, rate), (speed, share)):
        axes.grid(alpha=0.25)
        handles = [line for a in (axes, twin) if a is not None for line in a.get_legend_handles_labels()[0]]
        if handles:
            axes.legend(handles=handles, fontsize=8, loc="best")
    figure.tight_layout()
    return figure


def heat_map(media: Media, seconds: float) -> Figure:
    """Bands over time, low ones at the bottom."""
    assert media.image is not None
    figure, axes = plt.subplots(figsize=(9, 1.8))
    axes.imshow(media.image, origin="lower", aspect="auto", cmap="magma", extent=(0, seconds, 0, len(media.image)))
    axes.set(xlabel="seconds", ylabel="band")
    return figure


def sound(media: Media) -> str:
    """An <audio> element that holds the sound as MP3."""
    if media.audio is None:
        return ""
    buffer = io.BytesIO()
    soundfile.write(buffer, media.audio, media.sample_rate_hz, format="MP3")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<audio controls preload="none" src="data:audio/mpeg;base64,{data}"></audio>'


def aligned(reference: str, hypothesis: str) -> str:
    """The reference as it was recognised: <del> missed, <ins> added, <em> one for another ("wanted>got")."""
    parts = []
    for wanted, got in align(list(reference), list(hypothesis)):
        if wanted == got:
            parts.append(escape(wanted))
        elif got == GAP:
            parts.append(f"<del>{escape(wanted)}</del>")
        elif wanted == GAP:
            parts.append(f"<ins>{escape(got)}</ins>")
        else:
            parts.append(f"<em>{escape(wanted)}&gt;{escape(got)}</em>")
    return "".join(parts)


def _sample(row: dict[str, Any], media: Media | None, path: Path) -> str:
    columns = row["columns"]
    cells = [f"<p><b>{row['errors'] / max(row['length'], 1):.0%}</b> of {escape(row['key'])}</p>"]
    if media is not None:
        cells.append(sound(media))
        if media.image is not None and media.audio is not None:
            cells.append(
                f"<figure>{picture(heat_map(media, len(media.audio) / media.sample_rate_hz), path, 75)}</figure>"
            )
    for name, text in columns.items():
        cells.append(f"<div><small>{escape(name)}</small> <span class=aligned>{escape(text)}</span></div>")
    if "reference" in columns and "hypothesis" in columns:
        both = aligned(columns["reference"], columns["hypothesis"])
        cells.append(f"<div><small>aligned</small> <span class=aligned>{both}</span></div>")
    return f"<div class=sample>{''.join(cells)}</div>"


def _media(dataset: Any, key: str) -> Media | None:
    try:
        found: Media = dataset.media(key)
    except (OSError, ValueError, KeyError):
        return None
    return found


def _table(rows: Sequence[Sequence[object]], head: Sequence[str] = ()) -> str:
    top = f"<tr>{''.join(f'<th>{escape(h)}</th>' for h in head)}</tr>" if head else ""
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<div class=wide><table>{top}{body}</table></div>"


def _commit() -> str:
    try:
        options: dict[str, Any] = {"cwd": PROJECT, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "not a checkout"
    return commit + ("+dirty" if dirty else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def write(run: RunDirectory, recipe: Recipe[Any], split: str) -> dict[str, float]:
    """Write RUN/report.html and RUN/report/*.png.

    Args:
        run: with a configuration; what else is missing is said in the report.
        recipe: with the run's configuration.
        split: whose evaluation is shown.

    Returns:
        the metrics of that evaluation; empty if there is none.
    """
    folder = run.path / "report"
    folder.mkdir(exist_ok=True)
    rows = list(read_lines(run.metrics))
    train = [r for r in rows if r["kind"] == "train"]
    valid = [r for r in rows if r["kind"] == "validation"]
    refused, bad = list(read_lines(run.refused)), list(read_lines(run.quarantine))
    evaluations = {}
    for path in sorted((run.path / "evaluation").glob("*.json")):
        evaluations[path.stem] = json.loads(path.read_text(encoding="utf-8"))
    state: dict[str, Any] = {}
    try:
        newest = checkpoint.newest(run.checkpoints)
        state = newest.state if newest is not None else {}
    except UserError as error:
        state = {"problem": str(error)}
    page = [f"<h1>{escape(run.path.name)}</h1>", _facts(recipe, split, evaluations, train, state)]

    page.append("<h2>Curves</h2>")
    page.append(
        f"<figure>{picture(curves(train, valid, refused), folder / 'curves.png')}</figure>"
        if train
        else "<p>No step has been recorded yet.</p>"
    )
    page.append("<h2>Errors</h2>")
    page.append(_errors(evaluations, valid))
    page.append(f"<h2>Samples of {escape(split)}</h2>")
    page.append(_samples(evaluations.get(split), recipe, split, folder))
    page.append("<h2>What went wrong</h2>")
    reasons: dict[str, int] = {}
    for row in bad:
        reasons[row["reason"]] = reasons.get(row["reason"], 0) + 1
    page.append(_table(sorted(reasons.items()), ("bad sample", "count")) if reasons else "<p>No bad sample.</p>")
    page.append(f"<p>{len(refused)} steps were refused because their gradient was not finite.</p>")
    if "problem" in state:
        page.append(f"<p>{escape(state['problem'])}</p>")
    page.append("<h2>Configuration</h2>")
    saved = configuration.flatten(configuration.plain(recipe.config))
    usual = configuration.flatten(configuration.plain(recipe.config_class()(recipe=recipe.config.recipe)))
    page.append(_table([(k, v) for k, v in saved.items() if usual.get(k) != v], ("differs from the defaults", "value")))
    whole = configuration.dump_yaml(configuration.plain(recipe.config))
    page.append(f"<details><summary>All of it</summary><pre>{escape(whole)}</pre></details>")
    page.append("<h2>Versions and machine</h2>")
    facts = [(name, _version(name)) for name in PACKAGES]
    facts += [("python", platform.python_version()), ("commit", _commit()), ("processor", _cpu())]
    facts += [("processes", state.get("world_size", "unknown")), ("ZeRO stage", state.get("zero_stage", "unknown"))]
    page.append(_table(facts))
    head = '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    text = f"{head}<title>{escape(run.path.name)}</title><style>{STYLE}</style><body>{''.join(page)}</body></html>"
    temporary = run.report.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(run.report)
    metrics: dict[str, float] = evaluations.get(split, {}).get("metrics", {})
    return metrics


def _facts(
    recipe: Recipe[Any], split: str, evaluations: dict[str, Any], train: list[dict[str, Any]], state: dict[str, Any]
) -> str:
    boxes = []
    if split in evaluations:
        value = evaluations[split]["metrics"][recipe.monitor]
        boxes.append((f"{split} {recipe.monitor.upper()}", f"{100 * value:.2f} %", "head"))
    else:
        boxes.append((f"{split} is not evaluated", "./launch.sh evaluate RUN", ""))
    if shapes := state.get("shapes"):
        buffers = sum(len(s) == 0 for s in shapes.values())
        count = sum(_product(s) for s in shapes.values()) - buffers
        boxes.append(("numbers in the model", f"{count:,}", ""))
    if train:
        seconds = sum(r["step_seconds"] for r in train)
        boxes.append(("steps", f"{train[-1]['step']:,}", ""))
        boxes.append(("hours of sound trained on", f"{train[-1]['audio_hours']:.1f}", ""))
        boxes.append(("minutes in steps", f"{seconds / 60:.1f}", ""))
        boxes.append(("x real time", f"{3600 * statistics.median(r['audio_hours_per_second'] for r in train):.0f}", ""))
    inside = "".join(f'<div class="{kind}"><b>{escape(v)}</b>{escape(k)}</div>' for k, v, kind in boxes)
    return f"<div class=facts>{inside}</div>"


def _product(shape: list[int]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _errors(evaluations: dict[str, Any], valid: list[dict[str, Any]]) -> str:
    sources = {name: e["metrics"] for name, e in evaluations.items()}
    if valid:
        sources.setdefault(f"validation at step {valid[-1]['step']}", valid[-1])
    lines = []
    for split, metrics in sources.items():
        for name in metrics:
            if f"{name}_insertions" in metrics:
                kinds = ("", "_insertions", "_deletions", "_substitutions")
                lines.append([split, name.upper(), *(f"{100 * metrics[name + kind]:.2f}" for kind in kinds)])
    if not lines:
        return "<p>Nothing has been validated or evaluated yet.</p>"
    return _table(lines, ("split", "", "errors, %", "insertions", "deletions", "substitutions"))


def _samples(evaluation: dict[str, Any] | None, recipe: Recipe[Any], split: str, folder: Path) -> str:
    if evaluation is None or not evaluation["rows"]:
        return f"<p>Run <code>./launch.sh evaluate RUN split={escape(split)}</code> to see them.</p>"
    try:
        dataset: Any = recipe.build_dataset(split)  # type: ignore[arg-type]
    except UserError as error:
        dataset, note = None, f"<p>Without sound: {escape(error)}</p>"
    else:
        note = ""
    note += "<p class=aligned>In the aligned line: <del>missed</del>, <ins>added</ins>, <em>wanted&gt;got</em>.</p>"
    rows = evaluation["rows"]
    worst = rows[:SHOWN]
    random = sorted(rows, key=lambda r: keyed.key("report", r["key"]))[:SHOWN]
    parts = [note]
    for title, chosen in (("The worst", worst), ("At random", random)):
        parts.append(f"<h3>{title}</h3>")
        for row in chosen:
            media = None if dataset is None else _media(dataset, row["key"])
            name = f"{title.split()[-1].lower()}-{chosen.index(row)}.png"
            parts.append(_sample(row, media, folder / name))
    return "".join(parts)
