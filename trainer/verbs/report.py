"""Writes RUN/report.html: curves, tables, sound, configuration in one file that opens anywhere.

    ./launch.sh report speech-tones
    ./launch.sh report runs/speech-tones split=valid

Pictures lie as PNG in RUN/report/ as well. Samples and their errors come from `./launch.sh evaluate RUN`.
"""

import argparse

from trainer.verbs import add_run, open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def main(arguments: argparse.Namespace) -> int:
    run, recipe, split = open_run(arguments, weights=False)

    from trainer import report
    from trainer.config import show
    from trainer.verbs.evaluate import summary

    metrics = report.write(run, recipe, split)
    if not metrics:
        print(f"{split}: not evaluated; run `./launch.sh evaluate {arguments.run} split={split}` and this again")
    for line in summary(metrics):
        print(f"{split}: {line}")
    print(f"report: {show(run.report)}")
    return 0
