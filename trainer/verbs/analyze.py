"""Spectra, pseudo-spectra, trajectories, noise and attacks of a trained run, as numbers and pictures.

    ./launch.sh analyze pixels-permuted              200 samples of the test split
    ./launch.sh analyze runs/speech-tones split=valid samples=50
    ./launch.sh analyze speech-tones snr_db=40,30,20            sound, by signal-to-noise ratios

Writes RUN/analysis/analysis.json and pictures, shows them in the report and sends them to W&B. docs/analysis.md says
what each number means.
"""

import argparse

from trainer.verbs import add_run, open_run, positive, shares, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.epilog = (
        "split=test: train, valid or test; samples=200: how many of it are perturbed; sizes=0.01,0.1: of all "
        "perturbations, or of sound snr_db=40,20; other key=value change the saved configuration"
    )


def decibels(text: str) -> list[float]:
    """Sizes, rising, of signal-to-noise ratios from 0 dB on with commas between them.

    Raises:
        UserError: it is something else.
    """
    from trainer.errors import UserError

    try:
        sizes = sorted({10 ** (-float(part) / 20) for part in text.split(",")})
    except (ValueError, OverflowError):
        sizes = [0.0]
    if not all(0 < size <= 1 for size in sizes):
        raise UserError(f"the command line: snr_db = {text!r}: wanted ratios in dB from 0 on, as 40,30,20")
    return sizes


def main(arguments: argparse.Namespace) -> int:
    given, arguments.overrides = take(arguments.overrides, "samples")
    samples = positive(given, "samples")
    given, arguments.overrides = take(arguments.overrides, "sizes")
    sizes = shares(given, "sizes")
    ratios, arguments.overrides = take(arguments.overrides, "snr_db")
    run, recipe, split = open_run(arguments, own=("samples", "sizes", "snr_db"))
    if ratios is not None:
        from trainer.errors import UserError

        sizes = decibels(ratios)
        if given is not None:
            raise UserError(f"the command line: snr_db = {ratios!r} with sizes = {given!r}: take one")
        if (inputs := recipe.inputs()) is None or not inputs.relative:
            raise UserError(f"the command line: snr_db = {ratios!r}: the run's inputs are no sound; take sizes")

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
