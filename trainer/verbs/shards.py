"""Shards from elsewhere: makes their indexes, checks every byte and label, counts, lets you listen.

    ./launch.sh shards index data/foreign speech/mine     indexes and corpus.json: `train` can use the folder
    ./launch.sh shards lint data/foreign speech/mine      exit code 3, and a table, if anything is wrong
    ./launch.sh shards stats data/foreign                 hours, lengths and characters, as a table and a picture
    ./launch.sh shards preview data/foreign               a page with players

PATH is a tar or a folder of them: KEY.flac (wav, mp3, ogg, opus; npy for precomputed features) and KEY.txt, or KEY.json
with a field `text`. CONFIG says rate, text and features as for `train`; without one the defaults hold, and the rate is
that of the first sound.
"""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.verbs import refuse_unwritable

if TYPE_CHECKING:
    from trainer.recipe import Recipe


def add_arguments(parser: argparse.ArgumentParser) -> None:
    commands = parser.add_subparsers(dest="what", required=True, metavar="index, lint, stats or preview")
    added = {}
    for name, text in (
        ("index", "make the index of each shard, and corpus.json"),
        ("lint", "check every byte and label"),
        ("stats", "hours, lengths and characters"),
        ("preview", "a page with players"),
    ):
        added[name] = command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", metavar="PATH", help="a tar, or a folder of them")
        command.add_argument(
            "settings", metavar="CONFIG key=value", nargs="*", help="as for train, e.g. data.text.lowercase=false"
        )
    added["index"].add_argument("--into", metavar="FOLDER", type=Path, help="where PATH may not be written to")
    added["lint"].add_argument("--json", metavar="FILE", type=Path, help="write all findings there, a line each")
    added["stats"].add_argument("--picture", metavar="FILE", type=Path, default=Path("shards-stats.png"))
    added["preview"].add_argument("--page", metavar="FILE", type=Path, default=Path("shards-preview.html"))
    added["preview"].add_argument("--count", metavar="N", type=int, default=20, help="samples (default 20)")


def main(arguments: argparse.Namespace) -> int:
    from trainer.errors import UserError

    refuse_unwritable(arguments, "json", "picture", "page")
    if "://" in arguments.path:
        raise UserError(
            f"{arguments.path}: is a URL, and shards are read where they lie: run this there, or copy them here; "
            "training reads them by data.remote.url"
        )
    arguments.path = Path(arguments.path)
    recipe, any_rate = _recipe(arguments.settings)
    return {"index": _index, "lint": _lint, "stats": _stats, "preview": _preview}[arguments.what](
        arguments, recipe, any_rate
    )


def _recipe(settings: list[str]) -> "tuple[Recipe[Any], bool]":
    """The speech recipe with CONFIG and overrides, and whether nobody has said the sample rate."""
    from trainer.data.prepared import SpeechDataConfig
    from trainer.errors import UserError
    from trainer.recipe import from_plain, load

    configs = [s for s in settings if "=" not in s]
    overrides = [s for s in settings if "=" in s]
    if len(configs) > 1:
        raise UserError(f"the command line: {' '.join(configs)}: wanted one CONFIG at most")
    recipe = load(configs[0], overrides) if configs else from_plain({"recipe": "speech"}, "the defaults", overrides)
    if not isinstance(getattr(recipe.config, "data", None), SpeechDataConfig):
        raise UserError(f"{configs[0]}: is of the recipe {recipe.config.recipe}; wanted one that trains on speech")
    return recipe, not configs and not any(o.startswith("data.sample_rate_hz=") for o in overrides)


def _index(arguments: argparse.Namespace, recipe: "Recipe[Any]", any_rate: bool) -> int:
    from rich.console import Console

    from trainer.config import show
    from trainer.data.lint import Finding
    from trainer.data.prepare import size_table
    from trainer.data.shards import make_indexes

    data = recipe.config.data
    made = make_indexes(arguments.path, arguments.into, data, any_rate)
    console = Console()
    findings = [Finding(e.shard, p) for e in made.examined for p in e.problems]
    if findings:
        _print(console, findings, "left out, or wrong")
    folder = made.written[0].parent if made.prepared is None else made.written[0].parent.parent
    console.print(f"{show(folder)}: {len(made.written)} indexes written", highlight=False, markup=False, soft_wrap=True)
    if made.prepared:
        console.print(size_table(made.prepared))
        rate = f" data.sample_rate_hz={made.prepared.sample_rate_hz}" if data.features.kind == "log_mel" else ""
        console.print(f"train on it with data.path={show(folder)}{rate}", highlight=False, soft_wrap=True)
    return 0


def _lint(arguments: argparse.Namespace, recipe: "Recipe[Any]", any_rate: bool) -> int:
    import json

    from rich.console import Console

    from trainer.data.lint import lint
    from trainer.errors import EXIT_CHECK_FOUND_SOMETHING, EXIT_DONE

    plan = recipe.config.plan
    frames = recipe.num_output_frames  # type: ignore[attr-defined]
    findings, examined = lint(
        arguments.path, recipe.config.data, (plan.min_seconds, plan.longest_seconds), frames, any_rate
    )
    if arguments.json:
        rows = [
            {"shard": str(f.shard), "key": f.problem.key, "check": f.problem.check, "detail": f.problem.detail}
            for f in findings
        ]
        arguments.json.write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", errors="replace"
        )
    console = Console()
    samples = sum(len(e.samples) for e in examined)
    hours = sum(f.seconds for e in examined for f in e.samples) / 3600
    if findings:
        _print(console, findings, "wrong")
    told = f"{len(findings):,} findings" if findings else "all is well"
    console.print(f"{samples:,} good samples, {hours:.3f} h in {len(examined):,} shards: {told}", highlight=False)
    return EXIT_CHECK_FOUND_SOMETHING if findings else EXIT_DONE


def _print(console: Any, findings: list[Any], title: str) -> None:
    """Findings as counts of each kind, and the first of each."""
    from rich.table import Table
    from rich.text import Text

    from trainer.config import show

    kinds: dict[str, list[Any]] = {}
    for finding in findings:
        kinds.setdefault(finding.problem.check, []).append(finding)
    table = Table(title=title)
    for heading in ("", "count", "shard", "sample", "what"):
        table.add_column(heading, justify="right" if heading == "count" else "left", overflow="fold")
    for check, group in sorted(kinds.items(), key=lambda item: -len(item[1])):
        for number, finding in enumerate(group[:SHOWN]):
            first = (check, f"{len(group):,}") if not number else ("", "")
            cells = (*first, show(finding.shard), finding.problem.key, finding.problem.detail)
            table.add_row(*map(Text, cells))
        if len(group) > SHOWN:
            table.add_row("", "", "", "", f"and {len(group) - SHOWN:,} more")
    console.print(table)


SHOWN = 5
"""Lines of each kind in the table."""


def _stats(arguments: argparse.Namespace, recipe: "Recipe[Any]", any_rate: bool) -> int:
    from collections import Counter

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trainer.data.lint import collect
    from trainer.errors import UserError
    from trainer.plots import shard_statistics

    groups, what = collect(arguments.path, recipe.config.data)
    units: Counter[str] = Counter()
    table = Table(title="lengths in seconds")
    for heading in ("", "samples", "hours", "shortest", "median", "longest", what, "a second", "bad"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, group in groups.items():
        units.update(group.units)
        lengths = group.seconds or [0.0]
        table.add_row(
            Text(name),
            f"{group.samples:,}",
            f"{group.hours:.3f}",
            *(f"{s:.2f}" for s in (min(lengths), group.median_seconds, max(lengths))),
            f"{sum(group.units.values()):,}",
            f"{group.pace:.1f}",
            f"{group.problems:,}",
        )
    console = Console()
    console.print(table)
    counts = "  ".join(f"{c!r} {n:,}" for c, n in sorted(units.items(), key=lambda item: -item[1]))
    console.print(f"{len(units)} {what}: {counts}", highlight=False, markup=False)
    try:
        shard_statistics({name: group.seconds for name, group in groups.items()}, dict(units), what, arguments.picture)
    except OSError as error:
        raise UserError(f"--picture {arguments.picture}: cannot be written: {error.strerror}") from error
    console.print(f"picture: {arguments.picture}", highlight=False, markup=False)
    return 0


def _preview(arguments: argparse.Namespace, recipe: "Recipe[Any]", any_rate: bool) -> int:
    from trainer import preview
    from trainer.errors import UserError

    if arguments.count < 1:
        raise UserError(f"--count {arguments.count}: wanted 1 or more")
    number = preview.write(arguments.path, arguments.page, arguments.count, recipe.config.data)
    print(f"preview: {arguments.page} ({number} samples)")
    return 0
