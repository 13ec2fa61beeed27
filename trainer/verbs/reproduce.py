"""A paper's table: their figure, ours, parameters, minutes, command and seeds, with curves beside the line of chance.

    ./launch.sh reproduce memory
    ./launch.sh reproduce robustness

It is the sweep of configs/sweeps/TABLE.yaml, whose variants name what papers report: it goes on where it was stopped.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="a file under configs/sweeps/, without its ending")
    parser.add_argument("--workers", type=int, help="processes at a time (default: what the file says, or one a core)")


def main(arguments: argparse.Namespace) -> int:
    from trainer.config import PROJECT
    from trainer.errors import UserError
    from trainer.verbs.sweep import sweep

    folder = PROJECT / "configs" / "sweeps"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if arguments.table not in known:
        raise UserError(f"{arguments.table}: there is no such table; known tables: {', '.join(known)}")
    if arguments.workers is not None and arguments.workers < 1:
        raise UserError(f"--workers {arguments.workers}: wanted 1 or more")
    return sweep(folder / f"{arguments.table}.yaml", arguments.workers)
