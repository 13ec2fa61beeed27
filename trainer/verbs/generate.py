"""Text or music from a run's best checkpoint.

    ./launch.sh generate music-chorales
    ./launch.sh generate runs/music-chorales count=3 seed=7 length=200 temperature=0.9

Writes RUN/generated/SEED.*, which the report shows: a piece for each of `count` seeds from `seed` on. A seed gives the
same piece each time. `length` counts what the recipe goes by (frames, characters, words); `prompt` is what to go on
from.
"""

import argparse

from trainer.verbs import add_run, number, open_run, positive, take

COLDEST = 1e-6
"""Below, a log-probability divided by the temperature overflows."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.epilog = (
        "count=1 seed=0 length=N temperature=1.0 prompt=TEXT; other key=value change the saved configuration"
    )


def main(arguments: argparse.Namespace) -> int:
    from trainer.errors import UserError

    given = {}
    for name in ("count", "seed", "length", "temperature", "prompt"):
        given[name], arguments.overrides = take(arguments.overrides, name)
    count = positive(given["count"], "count") or 1
    seed = int(number(given["seed"], "seed", 0.0, whole=True))
    temperature = number(given["temperature"], "temperature", 1.0)
    if 0 < temperature < COLDEST:
        raise UserError(f"the command line: temperature = {temperature:g}: wanted 0, or {COLDEST:g} at least")
    length = positive(given["length"], "length")
    try:
        (given["prompt"] or "").encode()
    except UnicodeEncodeError as error:
        raise UserError(f"the command line: prompt = {given['prompt']!r}: is not UTF-8; write it as UTF-8") from error
    run, recipe, _ = open_run(arguments, own=("count", "seed", "length", "temperature", "prompt"))

    import torch
    from rich.console import Console

    from trainer import checkpoint
    from trainer.config import show
    from trainer.recipe import Wish

    best = checkpoint.best(run.checkpoints)
    model = recipe.build_model().eval()
    best.check_shapes(checkpoint.shapes_of(model))
    best.check_labels(recipe.build_dataset("train").identity)
    model.load_state_dict(best.weights())
    folder = run.path / "generated"
    folder.mkdir(exist_ok=True)
    console = Console()
    for s in range(seed, seed + count):
        with torch.inference_mode():
            piece = recipe.generate(model, Wish(s, length, temperature, given["prompt"]))
        console.print(piece.text, markup=False, highlight=False, soft_wrap=True)
        for ending, content in {".txt": piece.text.encode(), **piece.files}.items():
            path = folder / f"{s}{ending}"
            path.write_bytes(content)
            console.print(f"  {show(path)}", markup=False, highlight=False, soft_wrap=True)
    return 0
