"""Some samples of a validation to look at: the worst, and others by chance."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from trainer import keyed
from trainer.data.dataset import Media
from trainer.evaluation import Evaluator
from trainer.recipe import Row
from trainer.tracking import Markup

log = logging.getLogger(__name__)


def chosen(rows: Sequence[Row], count: int) -> list[Row]:
    """Half of them the worst, the worst first; the others are the same each time, as long as they are none of these."""
    ordered = sorted(rows, key=lambda r: -r.rate)
    worst, others = ordered[: count // 2], ordered[count // 2 :]
    return worst + sorted(others, key=lambda r: keyed.key("table", r.key))[: count - len(worst)]


def examples(evaluator: Evaluator, rows: Sequence[Row], count: int) -> Iterator[tuple[dict[str, str | float], Media]]:
    """Cells of a table, and sound and pictures, of so many rows; one that cannot be had is left out."""
    from trainer import page  # draws, which only the first rank does

    for r in chosen(rows, count):
        try:
            cells: dict[str, str | float] = {"key": r.key, "error": r.rate, **r.columns}
            if text := page.alignment(asdict(r)):
                cells["aligned"] = Markup(f"<style>{page.STYLE}</style>{text}")
            if (heard := r.facts.get("words")) is not None:
                cells["words"] = "  ".join(f"{w['word']} {w['start']:.2f}-{w['end']:.2f} s" for w in heard)
            media = evaluator.recipe.media(evaluator.model, evaluator.dataset, r.key)
        except Exception as error:  # a picture must not end a run, least of all on one rank alone
            log.warning("%s is missing in the table: %s", r.key, error)
            continue
        yield cells, media
