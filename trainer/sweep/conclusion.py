"""What a file in recipes/ makes of the finished runs of a sweep."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Conclusion:
    """What a file in recipes/ makes of finished runs."""

    tables: dict[str, list[dict[str, str]]]
    """Lines of equal keys, by heading."""
    pictures: list[Path]


def conclude(name: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> Conclusion:
    """What `conclude` of recipes/NAME.py says of finished runs; its pictures go into the folder."""
    found: Conclusion = importlib.import_module(f"recipes.{name}").conclude(rows, folder)
    return found
