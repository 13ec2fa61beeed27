"""One plain state dict of a run's best checkpoint, with the configuration beside it.

    ./launch.sh export speech-tones                 into runs/speech-tones/export/
    ./launch.sh export speech-tones to=/some/folder

weights.pt is what `torch.load(..., weights_only=True)` reads wherever there is torch: names to whole tensors, averaged
over the last steps if the run keeps an average. config.yaml is the run's configuration, and export.json says what the
outputs stand for, which step the weights are of, and their SHA-256. The data are not needed.
"""

import argparse
from pathlib import Path

from trainer.verbs import find_run, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name under runs/")
    parser.add_argument("overrides", metavar="to=FOLDER", nargs="*", help="where to (default: export/ of the run)")


def main(arguments: argparse.Namespace) -> int:
    from trainer.config import show
    from trainer.errors import UserError
    from trainer.transfer import export

    to, others = take(arguments.overrides, "to")
    if others:
        raise UserError(f"the command line: {others[0]}: export takes RUN and to=FOLDER alone")
    run = find_run(arguments.run)
    folder = Path(to) if to else run.path / "export"
    facts = export(run, folder)
    print(f"{show(folder / 'weights.pt')}: {facts['numbers']:,} numbers, step {facts['step']}")
    return 0
