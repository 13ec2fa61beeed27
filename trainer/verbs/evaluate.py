"""Metrics of a run's best checkpoint, with a table of the worst cases.

    ./launch.sh evaluate speech-tones                the test split
    ./launch.sh evaluate runs/speech-tones split=valid

Writes RUN/evaluation/SPLIT.json, from which the report takes its tables.
"""

import argparse
import json
from typing import get_args

from trainer.verbs import add_overrides, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name under runs/")
    add_overrides(parser)
    parser.epilog = "split=test: train, valid or test; other key=value change the saved configuration"


def main(arguments: argparse.Namespace) -> int:
    split, overrides = take(arguments.overrides, "split")
    split = split or "test"

    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from trainer import checkpoint, distributed
    from trainer.config import show
    from trainer.engine import Evaluator
    from trainer.errors import UserError
    from trainer.recipe import Split, from_plain
    from trainer.run import RunDirectory

    if split not in get_args(Split):
        raise UserError(f"the command line: split = {split!r}: wanted train, valid or test")
    chosen: Split = split  # type: ignore[assignment]
    run = RunDirectory.existing(arguments.run)
    recipe = from_plain(run.saved_config(), show(run.config), overrides)
    best = checkpoint.best(run.checkpoints)
    ranks = distributed.start()
    try:
        values, rows = Evaluator(recipe, recipe.build_dataset(chosen), ranks).run(best.weights())
    finally:
        distributed.stop()
    rows.sort(key=lambda r: r.rate, reverse=True)
    folder = run.path / "evaluation"
    folder.mkdir(exist_ok=True)
    result = {
        "split": split,
        "step": best.state["position"]["step"],
        "metrics": values,
        "rows": [asdict(r) for r in rows],
    }
    temporary = folder / f"{split}.tmp"
    temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(folder / f"{split}.json")

    console = Console()
    if rows:
        table = Table(title=f"The worst of {len(rows)} samples")
        for name in ("error", *rows[0].columns):
            table.add_column(name)
        for row in rows[:5]:
            table.add_row(f"{row.rate:.0%}", *row.columns.values())
        console.print(table, markup=False)
    console.print(f"{run.path.name}, {split}, {len(rows)} samples, step {result['step']}:", highlight=False)
    for line in summary(values):
        console.print(f"  {line}", highlight=False)
    return 0


def summary(values: dict[str, float]) -> list[str]:
    """Numbers as lines: error rates in percent with their parts, the rest as they are."""
    lines = []
    for name, value in values.items():
        parts = [f"{name}_{kind}" for kind in ("insertions", "deletions", "substitutions")]
        if all(p in values for p in parts):
            inside = ", ".join(f"{p.rpartition('_')[2]} {100 * values[p]:.2f}" for p in parts)
            lines.append(f"{name.upper()} {100 * value:.2f} %  ({inside})")
        elif not name.endswith(("_insertions", "_deletions", "_substitutions")):
            lines.append(f"{name} {value:.4f}")
    return lines
