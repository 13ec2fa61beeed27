"""Spectra, pseudo-spectra, trajectories, noise and attacks of a trained run, as numbers and pictures.

    ./launch.sh analyze pixels-permuted              200 samples of the test split
    ./launch.sh analyze runs/speech-tones split=valid samples=50

Writes RUN/analysis/analysis.json and pictures, shows them in the report and sends them to W&B. docs/analysis.md says
what each number means.
"""

import argparse

from trainer.verbs import add_run, open_run, positive, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.epilog = (
        "split=test: train, valid or test; samples=200: how many of it are perturbed; other key=value change the "
        "saved configuration"
    )


def main(arguments: argparse.Namespace) -> int:
    given, arguments.overrides = take(arguments.overrides, "samples")
    samples = positive(given, "samples")
    run, recipe, split = open_run(arguments)

    from rich.console import Console

    from trainer import report
    from trainer.analysis import run as analysis
    from trainer.analysis.study import Options
    from trainer.config import show
    from trainer.data.parallel import Display

    options = Options() if samples is None else Options(samples=samples)
    console = Console()
    with Display(console) as progress:
        values = analysis.analyze(run, recipe, split, options, progress)
    console.print(f"Recurrent matrices at step {values['step']}:", highlight=False)
    for name, *numbers in analysis.cells(values):  # a table of so many columns fits no terminal
        named = zip(analysis.HEAD[1:], numbers, strict=True)
        console.print(f"  {name}: {'; '.join(f'{head} {n}' for head, n in named if n)}", markup=False, highlight=False)
    for line in analysis.lines(values):
        console.print(line, markup=False, highlight=False)
    report.write(run, recipe, split)
    console.print(f"{show(run.path)}/analysis/, {show(run.report)}", highlight=False)
    return 0
