"""The worst cases of an evaluation as one page to listen to, with what the recogniser takes for what."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import page
from trainer.data.dataset import Media
from trainer.page import LEGEND, table
from trainer.word_errors import by_duration, by_speaker, confusions

SHOWN = 30
"""Samples on the page."""
LINES = 20
"""Of each table."""


def write_gallery(path: Path, title: str, rows: Sequence[dict[str, Any]], get: Callable[[str], Media]) -> None:
    """Write the page, which needs nothing else.

    Args:
        rows: of an evaluation of texts, the worst first.
        get: gives sound and pictures of a key; one that it cannot give costs only its own sound.
    """
    rate = "per" if rows and rows[0].get("aligned_by") == "word" else "wer"
    name = rate.upper()
    parts = []
    for heading, groups in (("By length", by_duration(rows, rate)), ("By speaker", by_speaker(rows, rate))):
        if len(groups) > 1:
            lines = [(g.name, g.utterances, f"{100 * g.rate:.2f}") for g in groups[:LINES]]
            parts.append(f"<h2>{heading}</h2>" + table(lines, ("", "samples", f"{name}, %"), numbers=2))
    parts.append("<h2>The most frequent errors</h2>" + _confusions(confusions(rows, rate)))
    parts.append(f"<h2>The worst {min(SHOWN, len(rows))} of {len(rows)}</h2>{LEGEND}")
    parts.append(
        "<p>Below, the hypothesis as it was heard: the paler a word, the less sure; rest the pointer on one for its "
        "time. The picture shows the sound, the labels of the likeliest path where they come, and how likely each one "
        "is.</p>"
    )
    pictures = path.with_suffix("")
    pictures.mkdir(exist_ok=True)
    for number, row in enumerate(rows[:SHOWN]):
        media = page.media_of(get, row["key"])
        parts.append(page.sample(row, media, pictures / f"worst-{number:02d}.png"))
    page.write_page(path, f"{title}: the worst", "".join(parts))


def _confusions(found: Mapping[str, Sequence[tuple[str, str, int]]]) -> str:
    lines = [(part[:-1], a or "·", b or "·", n) for part, pairs in found.items() for a, b, n in pairs]
    lines = sorted(lines, key=lambda line: -line[3])[:LINES]
    if not lines:
        return "<p>There is none.</p>"
    return table(lines, ("", "reference", "hypothesis", "times"), numbers=1)
