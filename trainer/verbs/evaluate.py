"""Metrics of a run's best checkpoint, with a table of the worst cases.

    ./launch.sh evaluate speech-tones                the test split
    ./launch.sh evaluate runs/speech-tones split=valid

Writes RUN/evaluation/SPLIT.json, from which the report takes its tables.
"""

import argparse
import json

from trainer.verbs import add_run, open_run


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_run(parser)


def main(arguments: argparse.Namespace) -> int:
    run, recipe, split = open_run(arguments)

    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from trainer import checkpoint, confusion, distributed
    from trainer.data.dataset import Fault
    from trainer.data.plan import Rejection
    from trainer.evaluation import Evaluator, left_out

    best = checkpoint.best(run.checkpoints)
    ranks = distributed.start()
    try:
        evaluator = Evaluator(recipe, split, ranks)
        best.check_shapes(checkpoint.shapes_of(evaluator.model))
        best.check_data({"train": {k: v for k, v in evaluator.dataset.identity.items() if k != "samples"}})
        evaluation = evaluator.run(best.weights())
        position = best.state["position"]
        evaluator.account(evaluation, run, position["step"], position["epoch"])
    finally:
        distributed.stop()
    rows = sorted(evaluation.rows, key=lambda r: r.rate, reverse=True)
    missing: list[Rejection | Fault] = [*evaluator.dataset.plan.rejections, *evaluator.known, *evaluation.bad]
    total = len(evaluator.dataset)
    folder = run.path / "evaluation"
    folder.mkdir(exist_ok=True)
    result = {
        "split": split,
        "step": position["step"],
        "scored": evaluation.scored,
        "total": total,
        "left_out": [{"key": m.key, "reason": m.reason} for m in missing],
        "metrics": evaluation.values,
        "rows": [asdict(r) for r in rows],
    }
    temporary = folder / f"{split}.tmp"
    temporary.write_text(json.dumps(result, ensure_ascii=False, indent=1), encoding="utf-8")
    temporary.replace(folder / f"{split}.json")

    console = Console()
    if rows:
        table = Table(title=f"The worst of {len(rows)} samples")
        for name in ("error", *rows[0].columns):
            table.add_column(name)
        for row in rows[:5]:
            table.add_row(f"{row.rate:.0%}", *row.columns.values())
        console.print(table, markup=False)
    if found := confusion.pairs(result["rows"]):
        table = Table(title="Classes")
        for name in confusion.HEAD:
            table.add_column(name)
        for cells in confusion.table(found):
            table.add_row(*cells)
        console.print(table, markup=False)
    if missing:
        console.print(f"left out: {left_out(missing)}", markup=False, highlight=False)
    scored = f"{evaluation.scored} of {total} samples scored"
    console.print(f"{run.path.name}, {split}, {scored}, step {position['step']}:", highlight=False)
    for line in summary(evaluation.values):
        console.print(f"  {line}", highlight=False)
    return 0


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
