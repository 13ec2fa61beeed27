"""What `./launch.sh VERB` runs: a module a verb, with `add_arguments(parser)` and `main(arguments) -> exit code`."""

import argparse


def add_config(parser: argparse.ArgumentParser) -> None:
    """CONFIG [key=value ...]"""
    parser.add_argument("config", metavar="CONFIG", help="a file under configs/ without its ending, or any path")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """[key=value ...]"""
    parser.add_argument("overrides", metavar="key=value", nargs="*", help="e.g. optimizer.lr=1e-3")


def take(overrides: list[str], name: str) -> tuple[str | None, list[str]]:
    """Take an argument `name=value` that is not a key of the configuration out of the overrides."""
    found = [o.partition("=")[2] for o in overrides if o.startswith(f"{name}=")]
    return (found[-1] if found else None), [o for o in overrides if not o.startswith(f"{name}=")]


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
