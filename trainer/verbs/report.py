"""Writes RUN/report.html: curves, tables, sound, configuration in one file that opens anywhere.

./launch.sh report speech-tones
./launch.sh report runs/speech-tones split=valid
"""

import argparse

from trainer.verbs import add_overrides, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name under runs/")
    add_overrides(parser)
    parser.epilog = "split=test: whose evaluation is shown; other key=value change the saved configuration"


def main(arguments: argparse.Namespace) -> int:
    split, overrides = take(arguments.overrides, "split")

    from trainer import report
    from trainer.config import show
    from trainer.recipe import from_plain
    from trainer.run import RunDirectory
    from trainer.verbs.evaluate import summary

    run = RunDirectory.existing(arguments.run)
    recipe = from_plain(run.saved_config(), show(run.config), overrides)
    metrics = report.write(run, recipe, split or "test")
    print(f"report: {show(run.report)}")
    for line in summary(metrics):
        print(f"{split or 'test'}: {line}")
    return 0
