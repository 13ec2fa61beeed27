"""A sweep from what is left of it to its end."""

import json
import statistics
from collections.abc import Callable
from typing import Any

from trainer.config import show
from trainer.errors import RequeueError, UserError
from trainer.signals import StopSignals
from trainer.sweep.config import SweepConfig
from trainer.sweep.points import Point, check_same, points, result_of
from trainer.sweep.table import best
from trainer.sweep.workers import PROBE_STEPS, Workers, default_workers

PROBED = 4
"""Runs that are tried for some steps, spread over the sweep, to say how long it takes."""


def run(sweep: SweepConfig, name: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run what is not finished yet.

    Args:
        name: of the sweep and its folder.
        say: told how it goes.

    Returns:
        the rows of all finished runs, in the sweep's order.

    Raises:
        UserError: a point's configuration is wrong; nothing was begun. Or some runs failed; the others are done.
        RequeueError: stopped by a signal; all runs saved.
    """
    from trainer import recipe

    every = points(sweep, name)
    mistakes: dict[str, str] = {}
    for point in every:
        try:
            check_same(sweep.runs_dir / name / point.name, recipe.load(point.config, point.overrides).config)
        except UserError as error:
            mistakes.setdefault(str(error), point.variant)
    if mistakes:
        raise UserError("\n".join(f"{variant}: {text}" for text, variant in list(mistakes.items())[:5]))
    folder = sweep.runs_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    done = {point.name: row for point in every if (row := result_of(sweep, name, point)) is not None}
    todo = [point for point in every if point.name not in done]
    failures: dict[str, list[str]] = {}
    """Names of runs by what went wrong: many may fail for one reason, which is then told once."""
    workers = Workers(min(sweep.workers or default_workers(), max(1, len(todo))), folder)
    try:
        with StopSignals() as signals:
            say(f"{len(every)} runs, {len(done)} finished, {workers.count} at a time")
            if todo:
                say(_estimate(todo, list(done.values()), workers, signals))
            for point, how, answer in workers.each(todo, signals):
                if how == "done":
                    done[point.name] = answer
                    say(f"[{len(done)}/{len(every)}] {point.name}: {answer['monitor']} {best(answer):.4g}")
                elif how != "stopped":
                    names = failures.setdefault(answer.strip().splitlines()[-1], [])
                    names.append(point.name)
                    if len(names) == 1:
                        say(f"[{len(done)}/{len(every)}] {point.name}: {answer.strip().splitlines()[-1]}")
            if signals.received is not None:
                raise RequeueError
    finally:
        workers.close()
    rows = [done[point.name] for point in every if point.name in done]
    temporary = folder / "results.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(folder / "results.jsonl")
    if failures:
        shown = "\n".join(
            f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}: {text}"
            for text, names in list(failures.items())[:10]
        )
        count = sum(map(len, failures.values()))
        raise UserError(f"{count} runs failed; see {show(folder)}/worker-*.log; the same command tries again\n{shown}")
    return rows


def _estimate(todo: list[Point], rows: list[dict[str, Any]], workers: Workers, signals: StopSignals) -> str:
    """How long it will take, by the runs that are finished, or else by some steps of a few."""
    if rows:
        spent = [row["seconds"] + row.get("analysis", {}).get("seconds", 0.0) for row in rows]
        each, basis = statistics.fmean(spent), f"as the {len(rows)} finished ones"
    else:
        few = todo[:: -(-len(todo) // PROBED)]
        seconds = [answer for _, how, answer in workers.each(few, signals, probe=True) if how == "done"]
        if not seconds:
            return "no estimate: none of the runs that were tried for some steps could start"
        apart = "validation and analysis" if todo[0].analyze else "validation"
        each, basis = statistics.fmean(seconds), f"{PROBE_STEPS} steps of {len(seconds)} runs, {apart} apart"
    return f"about {each * len(todo) / workers.count / 60:.1f} min, by {basis}"
