"""The report of a run: one HTML file that needs nothing else, and the pictures in it as PNG beside it.

Everything that comes from data (keys, texts, configuration) is escaped: a transcript is never markup. A section whose
numbers do not exist yet says so, so that a run in progress has a report too.
"""

import base64
import json
import statistics
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from torch import nn

from trainer import checkpoint, confusion, keyed, machine, page
from trainer import config as configuration
from trainer.analysis import run as analysis
from trainer.config import show
from trainer.data.dataset import Media
from trainer.distributed import WEIGHT
from trainer.errors import UserError
from trainer.evaluation import read_evaluation
from trainer.metrics import PARTS, error_rates
from trainer.page import LEGEND, escape, table
from trainer.plots import Rows, curves, large_heat_map, picture, saved, series
from trainer.recipe import Recipe
from trainer.run import RunDirectory, read_lines

SHOWN = 10
"""Rows in each of the two tables of samples."""


def write(run: RunDirectory, recipe: Recipe[Any], split: str) -> dict[str, float]:
    """Write RUN/report.html and RUN/report/*.png.

    Args:
        run: with a configuration; what else is missing is said in the report.
        recipe: with the run's configuration.
        split: whose evaluation is shown.

    Returns:
        the metrics of that evaluation; empty if there is none.

    Raises:
        UserError: an evaluation is damaged, or the run directory cannot be written.
    """
    folder = run.path / "report"
    try:
        folder.mkdir(exist_ok=True)
        for old in folder.glob("*.png"):
            old.unlink()
    except OSError as error:
        raise UserError(f"{show(folder)}: cannot be written: {error.strerror}; copy the run where you may") from error
    rows = [row for row in read_lines(run.metrics) if isinstance(row, dict)]
    train = [r for r in rows if r.get("kind") == "train"]
    valid = [r for r in rows if r.get("kind") == "validation"]
    evaluations = {p.stem: read_evaluation(p) for p in sorted((run.path / "evaluation").glob("*.json"))}
    state, parameters, damage = _state(run)
    refused = list(read_lines(run.refused))
    name = run.path.resolve().name
    sections = {
        "": _facts(run, recipe, split, evaluations, train, valid, state, parameters),
        "Curves": _curves(curves(train, valid, refused), folder) if rows else "<p>No step has been recorded yet.</p>",
        "Errors": _errors(evaluations, valid),
        f"Classes of {split}": _classes(evaluations.get(split), folder),
        f"Samples of {split}": _samples(evaluations.get(split), recipe, run, split, folder),
        "Recurrence and robustness": _analysis(run),
        "Generated": _generated(run.path / "generated"),
        "Bad samples and refused steps": _faults(list(read_lines(run.quarantine)), refused)
        + _spikes(list(read_lines(run.spikes)))
        + damage,
        "Configuration": _configuration(recipe),
        "Versions and machine": _machine(state),
    }
    sections = {title: text for title, text in sections.items() if text}
    parts = "".join((f"<h2>{escape(title)}</h2>" if title else "") + text for title, text in sections.items())
    page.write_page(run.report, name, parts)
    metrics: dict[str, float] = evaluations.get(split, {}).get("metrics", {})
    return metrics


def _state(run: RunDirectory) -> tuple[dict[str, Any], int | None, str]:
    """The newest checkpoint's state, the number of trained weights in it, and what is wrong with it."""
    try:
        newest = checkpoint.newest(run.checkpoints)
    except UserError as error:
        return {}, None, f"<p>{escape(error)}</p>"
    if newest is None:
        return {}, None, ""
    return newest.state, sum(piece.values.numel() for piece in newest.slices() if piece.slot == WEIGHT), ""


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _facts(
    run: RunDirectory,
    recipe: Recipe[Any],
    split: str,
    evaluations: dict[str, dict[str, Any]],
    train: Rows,
    valid: Rows,
    state: dict[str, Any],
    parameters: int | None,
) -> str:
    boxes = []
    metrics, monitor = evaluations.get(split, {}).get("metrics", {}), recipe.monitor
    if metrics.get(monitor) is not None:
        value = f"{100 * metrics[monitor]:.2f} %" if monitor in error_rates(metrics) else f"{metrics[monitor]:.4g}"
        found = evaluations[split]
        told = [f"{monitor.upper()} on {split}", f"step {found.get('step', '?')}", *found.get("settings", [])]
        boxes.append((", ".join(told), value))
    lead = "".join(f"<div class=head><b>{escape(v)}</b>{escape(k)}</div>" for k, v in boxes)
    if not lead:
        what = "holds no sample that could be scored" if split in evaluations else "is not evaluated yet"
        command = f"./launch.sh evaluate {run.path.name} split={split}"
        lead = f"<div class=head>{escape(split)} {what}: run <code>{escape(command)}</code></div>"
    boxes = []
    if parameters is not None:
        boxes.append(("parameters", f"{parameters:,}"))
    position = state.get("position", {})
    if train:
        last = train[-1]
        total = position.get("total_steps")
        boxes.append(("steps" + (f" of {total:,}" if total else ""), f"{last['step']:,}"))
        # The checkpoint's clock counts every step, but not those since it was written.
        seconds = max(position.get("train_seconds", 0.0), sum(r.get("step_seconds") or 0.0 for r in train))
        boxes.append(("in training steps", _duration(seconds)))
        hours, speeds = last.get("audio_hours"), series(train, "audio_hours_per_second", 3600)[1]
        if hours:
            boxes.append(("of audio trained on", f"{hours:.3g} h"))
        if any(speeds):
            boxes.append(("median throughput", f"{statistics.median(speeds):,.0f} x real time"))
        elif tokens := series(train, "tokens_per_second")[1]:
            boxes.append(("median throughput", f"{statistics.median(tokens):,.0f} tokens a second"))
    if valid:
        boxes.append(("in validation", _duration(sum(r.get("seconds") or 0.0 for r in valid))))
    if "world_size" in state:
        boxes.append(("processes", str(state["world_size"])))
    if run.metrics.is_file():
        last_written = time.strftime("%Y-%m-%d %H:%M", time.gmtime(run.metrics.stat().st_mtime))
        boxes.append(("last recorded, UTC", last_written))
    inside = "".join(f"<div><b>{escape(v)}</b>{escape(k)}</div>" for k, v in boxes)
    return f"<div class=facts>{lead}{inside}</div>"


def _curves(figures: dict[str, Figure], folder: Path) -> str:
    return f"<div class=plots>{''.join(picture(f, folder / f'{name}.png') for name, f in figures.items())}</div>"


def _errors(evaluations: dict[str, dict[str, Any]], valid: Rows) -> str:
    sources = {
        ", ".join(
            [split, f"step {e.get('step', '?')}", f"{e.get('scored', len(e['rows']))} samples", *e.get("settings", [])]
        ): e["metrics"]
        for split, e in evaluations.items()
    }
    if valid:
        sources[f"last validation, step {valid[-1]['step']}"] = valid[-1]
    lines = []
    for title, metrics in sources.items():
        for name, values in error_rates(metrics).items():
            lines.append([title, name.upper(), *("" if v is None else f"{100 * v:.2f}" for v in values)])
    if not lines and sources:  # a task without error rates
        told = {"step", "epoch", "seconds", "time", "best", "kind"}
        for title, metrics in sources.items():
            numbers = {n: v for n, v in metrics.items() if n not in told and isinstance(v, (int, float))}
            lines += [[title, name.replace("_", " "), f"{value:.5g}"] for name, value in numbers.items()]
        return table(lines, ("split", "", "value"), numbers=1)
    if not lines:
        return "<p>Nothing has been validated or evaluated yet.</p>"
    return table(lines, ("split", "", "errors, %", *(f"{part}, %" for part in PARTS)), numbers=4)


EMBEDDED = {
    ".png": '<img alt="{name}" src="data:image/png;base64,{data}">',
    ".wav": '<audio controls preload="none" src="data:audio/wav;base64,{data}"></audio>',
    ".txt": "<pre>{text}</pre>",
}
OTHER = '<p><a download="{name}" href="data:application/octet-stream;base64,{data}">{name}</a></p>'


def _generated(folder: Path) -> str:
    """What `generate` wrote, nothing where it was not run."""
    parts = []
    for path in sorted(p for p in folder.glob("*") if p.is_file()):
        content = path.read_bytes()
        parts.append(
            EMBEDDED.get(path.suffix, OTHER).format(
                name=escape(path.name),
                data=base64.b64encode(content).decode(),
                text=escape(content.decode("utf-8", "replace")),
            )
        )
    return "".join(parts)


def _analysis(run: RunDirectory) -> str:
    """What `analyze` found."""
    folder = run.path / "analysis"
    try:
        values = json.loads((folder / analysis.FILE).read_text(encoding="utf-8"))
        rows, said = analysis.cells(values), analysis.lines(values)
    except OSError:
        return ""
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{show(folder / analysis.FILE)}: is not what `analyze` writes ({error}); analyze again"
        ) from error
    parts = [f"<p>The checkpoint of step {escape(values['step'])}.</p>"]
    parts.append(table(rows, analysis.HEAD, numbers=len(analysis.HEAD) - 1))
    parts += [f"<p>{escape(line)}</p>" for line in said]
    images = sorted(folder.glob("*.png"), key=lambda p: (p.stem != "robustness", p.stem))
    return "".join(parts) + "".join(f"<p>{saved(path)}</p>" for path in images)


def _classes(evaluation: dict[str, Any] | None, folder: Path) -> str:
    """Of a task whose rows name a class and a guess: each class, and which is taken for which."""
    found = confusion.pairs(evaluation["rows"]) if evaluation is not None else []
    if not found:
        return ""
    image = picture(confusion.figure(found), folder / "confusion.png")
    return table(confusion.table(found), confusion.HEAD) + image


def _model(recipe: Recipe[Any], run: RunDirectory, step: Any) -> nn.Module | None:
    """The model that was evaluated, if the run still has it."""
    try:
        best = checkpoint.best(run.checkpoints)
        if best.state["position"]["step"] != step:
            return None
        model = recipe.build_model().eval()
        model.load_state_dict(best.weights())
    except (UserError, RuntimeError):  # no checkpoint, or other data: the report is still worth having
        return None
    return model


def _samples(
    evaluation: dict[str, Any] | None, recipe: Recipe[Any], run: RunDirectory, split: str, folder: Path
) -> str:
    if evaluation is None:
        command = f"./launch.sh evaluate {run.path.resolve().name} split={split}"
        return f"<p>Not evaluated: <code>{escape(command)}</code></p>"
    rows = evaluation["rows"]
    if not rows:
        return "<p>The evaluation holds no sample.</p>"
    try:
        dataset, note = recipe.build_dataset(split), ""  # type: ignore[arg-type]
    except Exception as error:  # the data may be gone or changed in any way; the texts are still worth showing
        dataset, note = None, f"<p>Without sound and pictures, the data cannot be opened: {escape(error)}</p>"
    worst = sorted(rows, key=page.rate, reverse=True)[:SHOWN]
    random = sorted(rows, key=lambda r: keyed.key("report", r["key"]))[:SHOWN]
    media: dict[str, Media | str] = {}
    if dataset is not None:
        model = _model(recipe, run, evaluation.get("step"))
        get = dataset.media if model is None else partial(recipe.media, model, dataset)
        media = {row["key"]: page.media_of(get, row["key"]) for row in [*worst, *random]}
    parts = [note]
    example = media.get(random[0]["key"])
    if isinstance(example, Media) and example.image is not None:
        parts.append(f"<p>What the model sees of <span class=key>{escape(random[0]['key'])}</span>:</p>")
        seconds = None if example.audio is None else len(example.audio) / example.sample_rate_hz
        parts.append(picture(large_heat_map(example.image, seconds), folder / "example.png", "plot image"))
    if "reference" in rows[0]["columns"] and "hypothesis" in rows[0]["columns"]:
        parts.append(LEGEND)
    for title, chosen in ((f"The {len(worst)} worst", worst), (f"{len(random)} at random", random)):
        parts.append(f"<h3>{title}</h3>")
        for number, row in enumerate(chosen):
            path = folder / f"{'worst' if chosen is worst else 'random'}-{number:02d}.png"
            parts.append(page.sample(row, media.get(row["key"]), path))
    return "".join(parts)


def _faults(bad: Rows, refused: Rows) -> str:
    reasons: dict[str, list[str]] = {}
    for row in bad:
        reasons.setdefault(str(row.get("reason")), []).append(str(row.get("key")))
    lines = sorted(((reason, _some(keys), len(keys)) for reason, keys in reasons.items()), key=lambda x: -x[2])
    text = table(lines, ("reason", "samples", "count"), numbers=1) if lines else "<p>No bad sample.</p>"
    if not refused:
        return text + "<p>No step was refused.</p>"
    text += f"<p>{len(refused)} refused, because the gradient was not finite:</p>"
    return text + table(
        [(r["step"], r.get("epoch"), _some(r.get("keys", []))) for r in refused[:SHOWN]], ("step", "epoch", "samples")
    )


def _spikes(rows: Rows) -> str:
    if not rows:
        return ""
    lines = [
        (r["step"], f"{r['loss']:.4g}", f"{r['usual']:.4g}", f"{r['taken_back_from']} to {r['step']}") for r in rows
    ]
    head = ("step", "loss", "usual before", "steps taken back")
    return "<p>The loss jumped, and the run went back to an older checkpoint:</p>" + table(lines, head, numbers=3)


def _some(keys: Sequence[str], count: int = 3) -> str:
    more = f" and {len(keys) - count} more" if len(keys) > count else ""
    return ", ".join(keys[:count]) + more


def _configuration(recipe: Recipe[Any]) -> str:
    values = configuration.plain(recipe.config)
    try:
        usual = configuration.flatten(configuration.plain(recipe.config_class()(recipe=recipe.config.recipe)))
    except ValueError:  # a recipe may have keys without a default
        usual = {}
    absent = "(absent)"
    different = [
        (name, value, usual.get(name, absent))
        for name, value in configuration.flatten(values).items()
        if usual.get(name, absent) != value
    ]
    whole = f"<details><summary>All of it</summary><pre>{escape(configuration.dump_yaml(values))}</pre></details>"
    return table(different, ("differs from the defaults", "here", "default")) + whole


def _machine(state: dict[str, Any]) -> str:
    absent = "unknown: no checkpoint yet"
    facts = [
        ("processes in training", state.get("world_size", absent)),
        ("ZeRO stage", state.get("zero_stage", absent)),
        *state.get("machine", {}).items(),
    ]
    here = {k: v for k, v in machine.describe().items() if v != state.get("machine", {}).get(k)}
    if not here:
        return table(facts)
    return table(facts) + "<p>Different where this report was made:</p>" + table(here.items())
