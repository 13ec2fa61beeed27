"""Our speed beside what a user would write instead, as ratios of one interleaved run.

    ./launch.sh bench step speech/read_ru        the engine's step against a bare PyTorch loop
    ./launch.sh bench loader speech/read_ru      the loader against a bare loop, and the time a step waits for it

The bare loops stand in trainer/bench.py. Close other programs first; the spread (quartiles) tells whether it was quiet.
"""

import argparse
import json
from pathlib import Path

from trainer.verbs import add_overrides


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=["step", "loader"])
    parser.add_argument("config", metavar="CONFIG", nargs="?", default="speech/read_ru")
    add_overrides(parser)
    parser.add_argument("--repetitions", type=int, default=7, help="of every way (default 7)")
    parser.add_argument("--steps", type=int, default=8, help="optimizer steps in a repetition (default 8)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")


def main(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from trainer import bench, distributed, machine
    from trainer.errors import UserError

    for name in ("repetitions", "steps"):
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name} {getattr(arguments, name)}: wanted a whole number from 1 on")

    ranks = distributed.start()
    try:
        run = bench.bench_step if arguments.what == "step" else bench.bench_loader
        result = run(arguments.config, arguments.overrides, ranks, arguments.repetitions, arguments.steps)
    finally:
        distributed.stop()
    result["machine"] = machine.describe()
    columns = list(next(iter(result["rows"].values())))
    table = Table(title=f"bench {arguments.what} {arguments.config}: median (quartiles) of {arguments.repetitions}")
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in result["rows"].items():
        table.add_row(name, *(f"{v['median']:.3f} ({v['low']:.3f}-{v['high']:.3f})" for v in row.values()))
    console = Console()
    console.print(table)
    for key, value in result.items():
        if key != "rows":
            console.print(f"{key.replace('_', ' ')}: {value}", highlight=False)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0
