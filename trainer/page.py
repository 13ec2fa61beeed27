"""Pages that need nothing else: text as HTML, sound, pictures and alignments inside one file.

Everything that comes from data is escaped: a transcript is never markup.
"""

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from trainer.data.dataset import Media
from trainer.metrics import align
from trainer.plots import heat_map

SOUNDS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("MP3", "audio/mpeg", {"compression_level": 0.7, "bitrate_mode": "VARIABLE"}),
    ("OGG", "audio/ogg", {}),
    ("WAV", "audio/wav", {}),
)
"""In order of preference: the smallest first; what this libsndfile cannot write falls to the next."""

STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #8882; --add: #b8860055; --miss: #0072b255; --swap: #d55e0055 }
* { box-sizing: border-box }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { margin: 0; line-height: 1.2 } h2 { margin-top: 2.5rem; border-bottom: 1px solid var(--line) }
.facts { display: flex; flex-wrap: wrap; gap: .6rem; margin: 1rem 0 }
.facts div { background: var(--soft); border-radius: .5rem; padding: .5rem .9rem; font-size: .9rem }
.facts b { display: block; font-size: 1.3rem }
.facts .head { flex-basis: 100% } .facts .head b { font-size: 2.8rem; line-height: 1.2 }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); gap: .8rem }
img { max-width: 100%; display: block; border-radius: .3rem } .plot { width: 100%; background: white }
@media (prefers-color-scheme: dark) { .plot { filter: invert(.91) hue-rotate(180deg) } .plot.image { filter: none } }
.wide { overflow-x: auto } table { border-collapse: collapse; font-size: .95rem }
td, th { text-align: left; vertical-align: top; padding: .25rem .8rem .25rem 0; border-bottom: 1px solid var(--line) }
th, td { overflow-wrap: break-word; min-width: 4rem } td:first-child { min-width: 7rem }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.sample { border-bottom: 1px solid var(--line); padding: .9rem 0 } .sample p { margin: 0 0 .4rem }
.sample audio { display: block; width: 100%; max-width: 26rem; height: 2.4rem; margin: .4rem 0 }
.sample img { height: 5rem; min-width: min(100%, 12rem); margin: .4rem 0 }
.sample img.outputs { height: auto }
.aligned, .key { font: 15px/1.35 ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace }
.aligned { margin: .5rem 0 }
.aligned > span { display: inline-block; white-space: pre; margin-bottom: .5rem; vertical-align: top }
.aligned i, .aligned b { display: block; font-style: normal; font-weight: normal; min-height: 1.35em }
.aligned b, small { color: GrayText }
ins { background: var(--add) } del { background: var(--miss); text-decoration: underline dashed }
em { background: var(--swap); font-style: normal }
pre { overflow-x: auto; background: var(--soft); padding: 1rem; border-radius: .5rem; font-size: .85rem }
summary { cursor: pointer; padding: .5rem 0 }
"""


def escape(value: object) -> str:
    """Text as HTML that shows it, also inside a quoted attribute."""
    return html.escape(str(value), quote=True)


def sound(media: Media) -> str:
    """An <audio> element that holds the sound."""
    if media.audio is None:
        return ""
    samples = np.clip(np.nan_to_num(np.asarray(media.audio, dtype=np.float32)), -1, 1)
    for kind, mime, options in SOUNDS:
        buffer = io.BytesIO()
        try:
            with soundfile.SoundFile(buffer, "w", media.sample_rate_hz, 1, format=kind, **options) as file:
                for start in range(0, len(samples), 16000):  # one large block overflows the encoder's stack
                    file.write(samples[start : start + 16000])
        except (soundfile.SoundFileError, TypeError, ValueError):
            continue
        data = base64.b64encode(buffer.getvalue()).decode()
        return f'<audio controls preload="none" src="data:{mime};base64,{data}"></audio>'
    return ""


def aligned(reference: str, hypothesis: str, by: str = "character", width: int = 24) -> str:
    """Reference over hypothesis, character under character, and a third line that names each error: I, D or S.

    Args:
        by: "word" puts word under word, or whatever else has spaces between.
        width: columns after which a line may break even inside a word.
    """
    if by == "word":
        pairs = align(reference.split(), hypothesis.split())
        return "".join(f"<span>{_chunk([pair])}</span> " for pair in pairs)
    chunks: list[list[tuple[str, str]]] = [[]]
    for pair in align(list(reference), list(hypothesis)):
        chunks[-1].append(pair)
        if " " in pair or len(chunks[-1]) >= width:
            chunks.append([])
    return "".join(f"<span>{_chunk(pairs)}</span>" for pairs in chunks if pairs)


def _chunk(pairs: Iterable[tuple[str, str]]) -> str:
    above, below, marks = "", "", ""
    for wanted, got in pairs:
        if wanted == got:
            above, below, marks = above + escape(wanted), below + escape(got), marks + " "
            continue
        # A space that is wrong must be seen.
        a, b = (escape({"": "·", " ": "_"}.get(x, x)) for x in (wanted, got))
        mark, tag = ("I", "ins") if not wanted else ("D", "del") if not got else ("S", "em")
        above += a if not wanted else f"<{tag}>{a}</{tag}>"
        below += b if not got else f"<{tag}>{b}</{tag}>"
        marks += mark
    return f"<i>{above}</i><i>{below}</i><b>{marks.rstrip()}</b>"


LEGEND = (
    "<p>Reference above, hypothesis below: <ins>I</ins> inserted, <del>D</del> deleted, <em>S</em> substituted; "
    "· stands for nothing, _ for a space that is wrong.</p>"
)


def table(rows: Iterable[Sequence[object]], head: Sequence[str] = (), numbers: int = 0) -> str:
    """A table whose last `numbers` columns are numbers."""

    def line(cells: Sequence[object], tag: str) -> str:
        first = len(cells) - numbers
        parts = (
            f"<{tag}{' class=number' if i >= first else ''}>{escape(cell)}</{tag}>" for i, cell in enumerate(cells)
        )
        return f"<tr>{''.join(parts)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f"<div class=wide><table>{line(head, 'th') if head else ''}{body}</table></div>"


def rate(row: dict[str, Any]) -> float:
    rate: float = row["errors"] / max(row["length"], 1.0)
    return rate


def media_of(get: Callable[[str], Media], key: str) -> Media | str:
    """Sound and picture of a sample, or why there is none."""
    try:
        return get(key)
    except Exception as error:  # a bad sample fails in any way; it must not cost the report
        return f"{type(error).__name__}: {error}"


def alignment(row: dict[str, Any]) -> str:
    """Reference over hypothesis, and the hypothesis as it was heard; nothing of a row without both."""
    columns, parts = row["columns"], []
    if "reference" in columns and "hypothesis" in columns:
        both = aligned(columns["reference"], columns["hypothesis"], row.get("aligned_by", "character"))
        parts.append(f"<div class=aligned>{both}</div>")
    if heard := row.get("facts", {}).get("words"):
        parts.append(f"<p class=heard>{' '.join(_heard(word) for word in heard)}</p>")
    return "".join(parts)


def sample(row: dict[str, Any], media: Media | str | None, path: Path) -> str:
    columns = dict(row["columns"])
    cells = [f"<p><b>{rate(row):.0%}</b> <span class=key>{escape(row['key'])}</span></p>", alignment(row)]
    if {"reference", "hypothesis"} <= columns.keys():
        del columns["reference"], columns["hypothesis"]
    cells += [f"<p><small>{escape(name)}</small> {escape(text)}</p>" for name, text in columns.items()]
    if isinstance(media, str):
        cells.append(f"<p><small>no sound: {escape(media)}</small></p>")
    elif media is not None:
        cells.append(sound(media))
        cells.append(heat_map(media, path))
        cells += [f"<p><small>{escape(name)}</small> {escape(text)}</p>" for name, text in media.captions.items()]
    return f"<div class=sample>{''.join(cells)}</div>"


def _heard(word: dict[str, Any]) -> str:
    """A word, the paler the less sure; its time and confidence are told where the pointer rests."""
    title = f"{word['start']:.2f} to {word['end']:.2f} s, confidence {word['confidence']:.2f}"
    opacity = 0.35 + 0.65 * min(max(float(word["confidence"]), 0.0), 1.0)
    return f'<span title="{escape(title)}" style="opacity:{opacity:.2f}">{escape(word["word"])}</span>'


def write_page(path: Path, title: str, body: str) -> None:
    """Write a page, whole or not at all.

    Args:
        title: as text.
        body: as HTML.
    """
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{escape(title)}</h1>{body}</body></html>\n"
    )
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(page, encoding="utf-8", errors="replace")
    temporary.replace(path)
