"""Metrics of a run's best checkpoint, with a table of the worst cases.

    ./launch.sh evaluate speech-tones                the test split
    ./launch.sh evaluate runs/speech-tones split=valid
    ./launch.sh evaluate speech-tones decoder.kind=beam --against speech-tones

Writes RUN/evaluation/SPLIT.json with the numbers, SPLIT.jsonl with a line for each sample, and for speech SPLIT.html,
the worst cases to listen to. `--against` compares with what `evaluate` wrote of another run, or of this one before,
scored on the same split. `decoder=tuned` takes what the verb `tune` recorded.
"""

import argparse
from collections.abc import Sequence
from typing import Any

from trainer.verbs import add_run, find_run, open_run, take

RESAMPLE = ("utterances", "speakers")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)
    parser.add_argument("--against", metavar="RUN", help="compare with what is evaluated of another run, or of this")
    parser.epilog = (
        "split=test: train, valid or test; resample=utterances: what an interval draws anew, utterances or speakers; "
        "other key=value change the saved configuration"
    )


def main(arguments: argparse.Namespace) -> int:
    from trainer.errors import UserError

    given, arguments.overrides = take(arguments.overrides, "resample")
    resample = given or RESAMPLE[0]
    if resample not in RESAMPLE:
        raise UserError(f"the command line: resample = {resample!r}: wanted {' or '.join(RESAMPLE)}")
    run, recipe, split = open_run(arguments)

    from dataclasses import asdict
    from functools import partial

    from rich.console import Console

    from trainer import checkpoint, distributed, word_errors
    from trainer.config import show
    from trainer.data.dataset import Fault
    from trainer.data.plan import Rejection
    from trainer.evaluation import Evaluator, left_out, read_evaluation, write_evaluation
    from trainer.gallery import write_gallery
    from trainer.metrics import error_rates

    _, settings = take(arguments.overrides, "split")
    # Read before this evaluation takes its place.
    theirs = None
    if arguments.against is not None:
        theirs = read_evaluation(find_run(arguments.against).path / "evaluation" / f"{split}.json")
    best = checkpoint.best(run.checkpoints)
    ranks = distributed.start()
    try:
        evaluator = Evaluator(recipe, split, ranks)
        best.check_shapes(checkpoint.shapes_of(evaluator.model))
        best.check_labels(evaluator.dataset.identity)
        evaluation = evaluator.run(best.weights())
        position = best.state["position"]
        evaluator.account(evaluation, run, position["step"], position["epoch"])
    finally:
        distributed.stop()
    rows = [asdict(row) for row in sorted(evaluation.rows, key=lambda r: r.rate, reverse=True)]
    missing: list[Rejection | Fault] = [*evaluator.dataset.plan.rejections, *evaluator.known, *evaluation.bad]
    total = len(evaluator.dataset)
    rates = [name for name in error_rates(evaluation.values) if name in word_errors.UNITS]
    rates = rates if word_errors.has_texts(rows) else []
    result: dict[str, Any] = {
        "split": split,
        "step": position["step"],
        "scored": evaluation.scored,
        "total": total,
        "settings": settings,
        "left_out": [{"key": m.key, "reason": m.reason} for m in missing],
        "metrics": evaluation.values,
    }
    if rates:
        result["errors"] = word_errors.assess(rows, rates, resample, recipe.config.seed)
        result["resampled"] = resample
    if theirs is not None:
        result["against"] = _compare(arguments.against, rows, theirs, rates, resample, recipe.config.seed)
    folder = run.path / "evaluation"
    write_evaluation(folder, split, result, rows)

    console = Console()

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    if rows:
        _tables(console, rows, result, rates)
    if missing:
        say(f"left out: {left_out(missing)}")
    scored = f"{evaluation.scored} of {total} samples scored"
    say(", ".join([run.path.name, split, scored, f"step {position['step']}", *settings]) + ":")
    for line in summary(evaluation.values):
        say(f"  {line}")
    for name in rates:
        low, high = result["errors"][name]["interval"]
        say(f"  {name.upper()} 95 % interval {100 * low:.2f} to {100 * high:.2f} % (bootstrap over {resample})")
    for name, found in result.get("against", {}).get("rates", {}).items():
        for line in compared(name, found, arguments.against):
            say(f"  {line}")
    if rates:
        worst = folder / f"{split}.html"
        write_gallery(
            worst, f"{run.path.name}, {split}", rows, partial(recipe.media, evaluator.model, evaluator.dataset)
        )
        say(f"  the worst to listen to: {show(worst)}")
    return 0


def _compare(
    name: str, rows: list[dict[str, Any]], theirs: dict[str, Any], rates: list[str], resample: str, seed: int
) -> dict[str, Any]:
    """Both evaluations on the samples they share, by error rate."""
    from dataclasses import asdict

    from trainer import word_errors
    from trainer.errors import UserError

    if not rates or not word_errors.has_texts(theirs["rows"]):
        raise UserError(f"--against {name}: only evaluations of texts can be compared")
    try:
        found = {rate: word_errors.paired(rows, theirs["rows"], rate) for rate in rates}
    except ValueError as error:
        raise UserError(f"--against {name}: {error}; evaluate both on the same split of the same data") from error
    compare = {rate: pair.compare(resample == "speakers", seed) for rate, pair in found.items()}
    return {"run": name, "step": theirs.get("step"), "rates": {rate: asdict(d) for rate, d in compare.items()}}


def compared(name: str, found: dict[str, Any], other: str) -> list[str]:
    """A comparison as lines."""
    ours, theirs = found["rates"]
    low, high = found["interval"]
    p, p_segments = (
        f"p {'< 0.001' if p < 0.001 else f'= {p:.3f}'}" for p in (found["p_bootstrap"], found["p_segments"])
    )
    return [
        f"{name.upper()} {100 * ours:.2f} % against {100 * theirs:.2f} % of {other}, on {found['utterances']} samples: "
        f"difference {100 * (ours - theirs):+.2f}, 95 % interval {100 * low:+.2f} to {100 * high:+.2f}",
        f"  paired bootstrap: {p}; matched pairs of {found['segments']} segments: z = {found['z']:.2f}, {p_segments}",
    ]


def _tables(console: Any, rows: list[dict[str, Any]], result: dict[str, Any], rates: list[str]) -> None:
    """The worst samples; of classes, each; of words, errors by length and speaker, and what is taken for what."""
    from rich.table import Table

    from trainer import confusion
    from trainer.page import rate

    def show(title: str, head: Sequence[str], lines: Sequence[Sequence[str]], numbers: int = 0) -> None:
        table = Table(title=title)
        for i, name in enumerate(head):
            table.add_column(name, justify="right" if i >= len(head) - numbers else "left")
        for line in lines:
            table.add_row(*line)
        console.print(table, markup=False)

    worst = [[f"{rate(row):.0%}", *row["columns"].values()] for row in rows[:5]]
    show(f"The worst of {len(rows)} samples", ["error", *rows[0]["columns"]], worst)
    if found := confusion.pairs(rows):
        show("Classes", confusion.HEAD, confusion.table(found))
    if not rates:
        return
    name = rates[-1]  # of words, where there are any
    errors = result["errors"][name]
    for title, key in (("By length", "by_duration"), ("By speaker, the worst", "by_speaker")):
        lines = [[g["name"], str(g["utterances"]), f"{100 * g['rate']:.1f}"] for g in errors[key][:10]]
        if len(lines) > 1:
            show(title, ["", "samples", f"{name.upper()}, %"], lines, numbers=2)
    pairs = [[a or "·", b or "·", str(n)] for part in errors["confusions"].values() for a, b, n in part]
    pairs = sorted(pairs, key=lambda line: -int(line[2]))[:10]
    if pairs:
        show("The most frequent errors", ["reference", "hypothesis", "times"], pairs, numbers=1)


def summary(values: dict[str, float]) -> list[str]:
    """Numbers as lines: error rates in percent with their parts, the rest as they are."""
    from trainer.metrics import PARTS, error_rates

    rates = error_rates(values)
    lines = []
    for name, (rate, *parts) in rates.items():
        inside = ", ".join(f"{part} {100 * value:.2f}" for part, value in zip(PARTS, parts, strict=True))
        lines.append(f"{name.upper()} {100 * rate:.2f} %  ({inside})")
    told = {*rates, *(f"{name}_{part}" for name in rates for part in PARTS)}
    others = [f"{name} {value:.4g}" for name, value in values.items() if name not in told]
    return [*([", ".join(others)] if others else []), *lines]
