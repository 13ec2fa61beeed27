"""The report of a sweep: one HTML file with its tables, pictures and commands, that needs nothing else."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from trainer.page import escape, table, write_page
from trainer.plots import saved


def write(
    path: Path,
    name: str,
    tables: dict[str, list[dict[str, str]]],
    pictures: Sequence[Path],
    commands: Mapping[str, str],
) -> None:
    """Write it.

    Args:
        name: of the sweep.
        tables: lines of equal keys, by heading.
        pictures: PNG files, which it holds then.
        commands: of each run, by its name.
    """
    parts = [
        f"<h2>{escape(heading)}</h2>{table([list(line.values()) for line in lines], list(lines[0]))}"
        for heading, lines in tables.items()
    ]
    parts += [f"<p>{saved(picture)}</p>" for picture in pictures]
    parts.append(f"<h2>Commands</h2>{table([[run, command] for run, command in commands.items()], ['run', 'command'])}")
    write_page(path, name, "".join(parts))
