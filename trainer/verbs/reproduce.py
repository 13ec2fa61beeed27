"""A paper's table: their figure, ours, parameters, minutes, command and seeds, with curves beside the line of chance.

    ./launch.sh reproduce memory
    ./launch.sh reproduce robustness
    ./launch.sh reproduce music config=music/jsb data.corpus.path=FOLDER

It is the sweep of configs/sweeps/TABLE.yaml, whose variants name what papers report: it goes on where it was stopped.
"""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("table", metavar="TABLE", help="a file under configs/sweeps/, without its ending")
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="a key of that file, or else of every run")


def main(arguments: argparse.Namespace) -> int:
    from trainer.config import PROJECT
    from trainer.errors import UserError
    from trainer.verbs.sweep import sweep

    folder = PROJECT / "configs" / "sweeps"
    known = sorted(path.stem for path in folder.glob("*.yaml"))
    if arguments.table not in known:
        raise UserError(f"{arguments.table}: there is no such table; known tables: {', '.join(known)}")
    return sweep(folder / f"{arguments.table}.yaml", arguments.overrides)
