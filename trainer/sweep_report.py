"""The report of a sweep: one HTML file with its tables and pictures, that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from trainer.page import escape, table, write_page
from trainer.plots import saved


def write(path: Path, name: str, tables: dict[str, list[dict[str, str]]], pictures: Sequence[Path]) -> None:
    """Write it.

    Args:
        name: of the sweep.
        tables: lines of equal keys, by heading.
        pictures: PNG files, which it holds then.
    """
    parts = [
        f"<h2>{escape(heading)}</h2>{table([list(line.values()) for line in lines], list(lines[0]))}"
        for heading, lines in tables.items()
    ]
    parts += [f"<p>{saved(picture)}</p>" for picture in pictures]
    write_page(path, name, "".join(parts))
