"""The report of a sweep: one HTML file with its tables and pictures, that needs nothing else."""

from collections.abc import Sequence
from pathlib import Path

from trainer.plots import saved
from trainer.report import STYLE, escape


def write(path: Path, name: str, tables: dict[str, list[dict[str, str]]], pictures: Sequence[Path]) -> None:
    """Write it.

    Args:
        name: of the sweep.
        tables: lines of equal keys, by heading.
        pictures: PNG files, which it holds then.
    """
    parts = [f"<h2>{escape(heading)}</h2>{_table(lines)}" for heading, lines in tables.items()]
    parts += [f"<p>{saved(picture)}</p>" for picture in pictures]
    temporary = path.with_suffix(".tmp")
    temporary.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(name)}</h1>{''.join(parts)}</body></html>\n",
        encoding="utf-8",
    )
    temporary.replace(path)


def _table(lines: Sequence[dict[str, str]]) -> str:
    rows = [("th", lines[0]), *(("td", line.values()) for line in lines)]
    body = "".join(f"<tr>{''.join(f'<{tag}>{escape(cell)}</{tag}>' for cell in cells)}</tr>" for tag, cells in rows)
    return f"<div class=wide><table>{body}</table></div>"
