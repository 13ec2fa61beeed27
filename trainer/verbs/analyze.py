"""Spectra, pseudo-spectra, trajectories, noise and attacks of a trained run, as numbers and pictures.

    ./launch.sh analyze pixels-permuted              200 samples of the test split
    ./launch.sh analyze runs/speech-tones split=valid samples=50
    ./launch.sh analyze speech-tones sizes=0.01,0.0316,0.1      sound at 40, 30 and 20 dB

Writes RUN/analysis/analysis.json and pictures, shows them in the report and sends them to W&B. docs/analysis.md says
what each number means.
"""

import argparse

from trainer.verbs import add_run, open_run, positive, shares, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.epilog = (
        "split=test: train, valid or test; samples=200: how many of it are perturbed; sizes=0.01,0.1: of all "
        "perturbations; other key=value change the saved configuration"
    )


def main(arguments: argparse.Namespace) -> int:
    given, arguments.overrides = take(arguments.overrides, "samples")
    samples = positive(given, "samples")
    given, arguments.overrides = take(arguments.overrides, "sizes")
    sizes = shares(given, "sizes")
    run, recipe, split = open_run(arguments)

    from rich.console import Console

    from trainer import report
    from trainer.analysis import run as analysis
    from trainer.analysis.study import Options
    from trainer.config import show
    from trainer.data.parallel import Display

    options = Options(samples=samples or Options.samples, sizes=(0.0, *sizes) if sizes else Options.sizes)
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
