"""The training library: configuration, data plan, engine, checkpoints, tracking. `load` gives a trained recogniser."""

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from pathlib import Path

    from trainer.recogniser import Recogniser


def load(run: "str | Path", *overrides: str) -> "Recogniser":
    """The recogniser of a run, or of a folder that `export` wrote, its configuration changed by `key=value`; see
    `trainer.recogniser`."""
    from trainer import recogniser

    return recogniser.load(run, overrides)
