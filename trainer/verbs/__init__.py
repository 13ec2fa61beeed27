"""What `./launch.sh VERB` runs: a module a verb, with `add_arguments(parser)` and `main(arguments) -> exit code`."""

import argparse
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
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optimizer.lr=1e-3")


def add_run(parser: argparse.ArgumentParser) -> None:
    """RUN [split=SPLIT] [key=value ...]"""
    parser.add_argument("run", metavar="RUN", help="a run directory, or its name under runs/")
    add_overrides(parser)
    parser.epilog = "split=test: train, valid or test; other key=value change the saved configuration"


def take(overrides: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take an argument `name=value` that is not a key of the configuration out of the overrides."""
    found = [o.partition("=")[2] for o in overrides if o.startswith(f"{name}=")]
    return (found[-1] if found else None), [o for o in overrides if not o.startswith(f"{name}=")]


def open_run(arguments: argparse.Namespace) -> "tuple[RunDirectory, Recipe[Any], Split]":
    """RUN [split=SPLIT] [key=value ...]: the run, its recipe with the saved configuration, and the split (test).

    Raises:
        UserError: no such run or split.
    """
    from trainer.config import show
    from trainer.errors import UserError
    from trainer.recipe import Split, from_plain
    from trainer.run import RunDirectory

    given, overrides = take(arguments.overrides, "split")
    split = next((s for s in get_args(Split) if s == (given or "test")), None)
    if split is None:
        raise UserError(f"the command line: split = {given!r}: wanted train, valid or test")
    run = RunDirectory.existing(arguments.run)
    return run, from_plain(run.saved_config(), show(run.config), overrides), split


def positive(text: str | None, name: str) -> int | None:
    """A positive whole number, or None.

    Raises:
        UserError: it is something else.
    """
    from trainer.errors import UserError

    if text is None:
        return None
    if not text.isdigit() or int(text) < 1:
        raise UserError(f"the command line: {name} = {text!r}: wanted a whole number from 1 on")
    return int(text)
