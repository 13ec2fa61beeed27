"""Runs a grid or a random search over any keys and seeds; goes on where it was stopped or killed.

    ./launch.sh sweep configs/sweeps/memory.yaml
    ./launch.sh sweep configs/sweeps/memory.yaml seeds=[0] workers=1 optimizer.lr=3e-4

FILE names a CONFIG and what varies:

    config: copying/t1000
    overrides: [max_steps=2000]
    grid: {optimizer.lr: [1e-3, 3e-4]}            # every combination; or:
    random: {optimizer.lr: {low: 1e-4, high: 1e-2, log: true}}
    variants: {orthogonal: {wanted: below 0.002}, lstm: {overrides: [model.cell.kind=lstm]}}
    seeds: [0, 1, 2]
    analyze: 200                                  # samples on which `analyze` perturbs each trained net
    conclusion: robustness                        # recipes/robustness.py makes more tables and pictures of all runs

Each run is a run directory below runs/NAME, where NAME is that of the file. A table (means over seeds, the paired
difference from the first line with the p-value of a sign-flip test), a picture and a report with both and each run's
command lie there too.
Exit codes as in train.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

WIDEST = 9
"""Columns of a table that a console can show; wider ones are in the files alone."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=Path, help="a YAML file")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a key of FILE, or else of every run")


def main(arguments: argparse.Namespace) -> int:
    return sweep(arguments.file, arguments.overrides)


def sweep(path: Path, overrides: Sequence[str]) -> int:
    """Run a sweep's file, and show and write what came of it."""
    from rich.console import Console
    from rich.table import Table

    from trainer import plots
    from trainer.config import show
    from trainer.errors import UserError
    from trainer.sweep import report
    from trainer.sweep.conclusion import conclude
    from trainer.sweep.config import load
    from trainer.sweep.points import points, result_of
    from trainer.sweep.run import run
    from trainer.sweep.table import curves, markdown, table

    config = load(path, overrides)
    name, console = path.stem, Console()
    failed: UserError | None = None
    try:
        rows = run(config, name, lambda text: console.print(text, highlight=False, markup=False, soft_wrap=True))
    except UserError as error:
        if not (config.runs_dir / name / "results.jsonl").is_file():
            raise
        failed, rows = error, [r for p in points(config, name) if (r := result_of(config, name, p))]
    folder, title = config.runs_dir / name, f"{name}: means over seeds, +- their standard deviation"
    if rows:
        tables, pictures = {title: table(config, rows)}, []
        chances = {label: v.chance for label, v in config.variants.items() if v.chance is not None}
        monitors = list(dict.fromkeys(row["monitor"] for row in rows))
        for monitor in monitors:
            pictures.append(folder / ("curves.png" if len(monitors) == 1 else f"curves-{monitor}.png"))
            own = [row for row in rows if row["monitor"] == monitor]
            plots.sweep(curves(config, name, own), chances, monitor, pictures[-1])
        if config.conclusion is not None:
            more = conclude(config.conclusion, rows, folder)
            tables, pictures = tables | more.tables, [*more.pictures, *pictures]
        for heading, lines in tables.items():
            if len(lines[0]) > WIDEST:
                continue
            shown = Table(title=heading)
            for column in lines[0]:
                shown.add_column(column)
            for line in lines:
                shown.add_row(*line.values())
            console.print(shown, markup=False)
        parts = [f"{heading}\n\n{markdown(lines)}" for heading, lines in tables.items()]
        commands = {row["run"]: row["command"] for row in rows}
        listed = "".join(f"- {run}: `{command}`\n" for run, command in commands.items())
        (folder / "table.md").write_text("\n".join([*parts, listed]), encoding="utf-8")
        report.write(folder / "report.html", name, tables, pictures, commands)
        names = ", ".join(["table.md", *(path.name for path in pictures), "results.jsonl", "report.html"])
        console.print(f"{show(folder)}/{names}", highlight=False)
    if failed is not None:
        raise failed
    return 0
