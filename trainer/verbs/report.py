"""Writes RUN/report.html: curves, tables, sound, configuration in one file that opens anywhere.

    ./launch.sh report speech-tones
    ./launch.sh report runs/speech-tones split=valid

Pictures lie as PNG in RUN/report/ as well. Samples and their errors come from `./launch.sh evaluate RUN`.
"""

import argparse
from typing import get_args

from trainer.verbs import add_overrides, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name under runs/")
    add_overrides(parser)
    parser.epilog = "split=test: whose evaluation is shown; other key=value change the saved configuration"


def main(arguments: argparse.Namespace) -> int:
    split, overrides = take(arguments.overrides, "split")
    split = split or "test"

    from trainer import report
    from trainer.config import show
    from trainer.errors import UserError
    from trainer.recipe import Split, from_plain
    from trainer.run import RunDirectory
    from trainer.verbs.evaluate import summary

    if split not in get_args(Split):
        raise UserError(f"the command line: split = {split!r}: wanted train, valid or test")
    run = RunDirectory.existing(arguments.run)
    recipe = from_plain(run.saved_config(), show(run.config), overrides)
    metrics = report.write(run, recipe, split)
    if not metrics:
        print(f"{split}: not evaluated; run `./launch.sh evaluate {arguments.run} split={split}` and this again")
    for line in summary(metrics):
        print(f"{split}: {line}")
    print(f"report: {show(run.report)}")
    return 0
