"""What `./launch.sh VERB` runs: a module a verb, with `add_arguments(parser)` and `main(arguments) -> exit code`."""

import argparse
import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:  # a verb that only explains itself starts at once
    from trainer.recipe import Recipe, Split
    from trainer.run import RunDirectory


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...]"""
    parser.add_argument("config", metavar="CONFIG", help="a file under configs/ without its ending, or any path")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """[key=value ...]"""
    parser.add_argument("overrides", metavar="key=value", nargs="*", default=[], help="e.g. optimizer.lr=1e-3")


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN [split=SPLIT] [key=value ...]"""
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name under runs/")
    add_overrides(parser)
    parser.epilog = "split=test: train, valid or test; other key=value change the saved configuration"


def take(overrides: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take an argument `name=value` that is not a key of the configuration out of the overrides."""
    found = [o.partition("=")[2] for o in overrides if o.startswith(f"{name}=")]
    return (found[-1] if found else None), [o for o in overrides if not o.startswith(f"{name}=")]


def refuse_unwritable(arguments: argparse.Namespace, *names: str) -> None:
    """See to it, before long work begins, that the files of these options can be written.

    Raises:
        UserError: one cannot.
    """
    from trainer.errors import UserError

    for name in names:
        path: Path | None = getattr(arguments, name, None)
        if path is None:
            continue
        new = not path.exists()
        try:
            path.open("ab").close()
            if new:
                path.unlink(missing_ok=True)
        except OSError as error:
            raise UserError(f"--{name} {path}: cannot be written: {error.strerror}; name another file") from error


def find_run(name: str) -> "RunDirectory":
    """RUN.

    Raises:
        UserError: there is no such run.
    """
    from trainer.run import RunDirectory

    return RunDirectory.existing(name)


def open_run(
    arguments: argparse.Namespace, weights: bool = True, own: tuple[str, ...] = ()
) -> "tuple[RunDirectory, Recipe[Any], Split]":
    """RUN [split=SPLIT] [key=value ...]: the run, its recipe with the saved configuration, and the split (test).

    Args:
        weights: check that the saved weights fit the model of this configuration.
        own: keys of the verb that `take` looked for: one that was misspelt is told.

    Raises:
        UserError: no such run or split, or the weights do not fit.
    """
    from trainer.config import show
    from trainer.decoding.tuning import with_recorded
    from trainer.errors import UserError
    from trainer.recipe import Split, of_trained

    given, overrides = take(arguments.overrides, "split")
    split = next((s for s in get_args(Split) if s == (given or "test")), None)
    if split is None:
        raise UserError(f"the command line: split = {given!r}: wanted train, valid or test")
    run = find_run(arguments.run)
    saved = run.saved_config()
    for name in (o.partition("=")[0] for o in overrides):
        near = difflib.get_close_matches(name, [*own, "split"], n=1)
        if near and name.partition(".")[0] not in saved:
            raise UserError(f"the command line: {name}: there is no such key; did you mean {near[0]}?")
    recipe = of_trained(saved, show(run.config), with_recorded(overrides, run))
    if weights:
        _check_shapes(run, recipe)
    return run, recipe, split


def _check_shapes(run: "RunDirectory", recipe: "Recipe[Any]") -> None:
    from trainer import checkpoint
    from trainer.config import show
    from trainer.errors import UserError

    found = checkpoint.newest(run.checkpoints)
    saved = found.state["shapes"] if found else {}
    shapes = {name: list(value.shape) for name, value in recipe.build_model().state_dict().items()} if found else {}
    lines = [
        f"{show(run.path)}: {name} is {saved.get(name, 'absent')} in its checkpoint, {shapes.get(name, 'absent')} with "
        "the data of this configuration"
        for name in sorted({*saved, *shapes})
        if saved.get(name) != shapes.get(name)
    ]
    if lines:
        raise UserError(
            "\n".join(lines) + "\nthe run was trained on other data or another alphabet: name those, with data.path=..."
        )


def positive(text: str | None, name: str) -> int | None:
    """A positive whole number, or None.

    Raises:
        UserError: it is something else.
    """
    from trainer.errors import UserError

    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and int(text) >= 1):
        raise UserError(f"the command line: {name} = {text!r}: wanted a whole number from 1 on")
    return int(text)


def shares(text: str | None, name: str) -> list[float]:
    """Numbers above 0 and up to 1, with commas between them, sorted; none of None.

    Raises:
        UserError: it is something else.
    """
    from trainer.errors import UserError

    try:
        found = sorted({float(part) for part in text.split(",")}) if text is not None else []
    except ValueError:
        found = [0.0]
    if not all(0 < value <= 1 for value in found):
        raise UserError(f"the command line: {name} = {text!r}: wanted numbers above 0 and up to 1, as 0.01,0.1")
    return found


def number(text: str | None, name: str, default: float, whole: bool = False) -> float:
    """A number from 0 on, or the default.

    Raises:
        UserError: it is something else.
    """
    from trainer.errors import UserError

    if text is None:
        return default
    if re.fullmatch(r"\d{1,15}" if whole else r"\d{1,15}(\.\d*)?(e-?\d+)?", text, re.ASCII) is None:
        raise UserError(f"the command line: {name} = {text!r}: wanted a {'whole ' if whole else ''}number from 0 on")
    return float(text)
