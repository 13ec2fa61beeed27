"""Finished runs as a table and as curves."""

import itertools
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from trainer import keyed
from trainer.run import read_lines
from trainer.sweep.config import SweepConfig

STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""
Curves = dict[str, list[list[tuple[int, float]]]]
"""By variant, of each seed the validations' (step, monitored value)."""


def table(sweep: SweepConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line a variant: mean and spread over the seeds, and the difference from the first variant, paired by seed.

    A variant is compared with the first one of its own configuration.
    """
    by_variant: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    if not isinstance(sweep.config, str | None):  # what is compared stands together
        by_variant = dict(sorted(by_variant.items(), key=lambda item: next(iter(item[1].values()))["config"]))
    firsts: dict[str, dict[int, Mapping[str, Any]]] = {}
    lines, chosen = [], _chosen(sweep, by_variant)
    asides = [aside for aside in ("paper", "wanted") if any(getattr(v, aside) for v in sweep.variants.values())]
    monitors = {row["monitor"] for row in rows}
    for variant, runs in by_variant.items():
        last = next(iter(runs.values()))
        first = firsts.setdefault(last["config"], runs)
        line = {"": f"{variant} *" if variant in chosen else variant}
        of, unit = ("", f" {last['monitor']}") if len(monitors) > 1 else (f" {last['monitor']}", "")
        columns = {f"best{of}": best}
        if sweep.test:
            columns[f"test{of}"] = _tested
        for name, value in columns.items():
            values = [value(row) for row in runs.values()]
            spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 and _finite(values) else ""
            line[name] = f"{statistics.fmean(values):.4g}{spread}{unit}"
        compared = _tested if sweep.test else best
        pairs = [compared(runs[seed]) - compared(first[seed]) for seed in runs if seed in first]
        line["against the first, 95 % (p)"] = (
            _difference(pairs) if runs is not first and pairs and _finite(pairs) else ""
        )
        for aside in asides:
            line[aside] = getattr(sweep.variants.get(last["label"]), aside, "")
        line["parameters"] = f"{last['parameters']:,}"
        line["steps"] = f"{last['steps']:,}"
        line["minutes"] = f"{statistics.fmean(row['seconds'] for row in runs.values()) / 60:.1f}"
        line["ms a step"] = f"{1000 * statistics.fmean(row['seconds'] / row['steps'] for row in runs.values()):.3g}"
        line["seeds"] = ", ".join(map(str, runs))
        lines.append(line)
    return lines


def best(row: Mapping[str, Any]) -> float:
    """The monitored value of a run's best validation; infinite where none gave a number."""
    return math.inf if row["best"] is None else float(row["best"])


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _tested(row: Mapping[str, Any]) -> float:
    return float(row["test"][row["monitor"]])


def _chosen(sweep: SweepConfig, by_variant: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> set[str]:
    """Of each family and configuration the variant with the best mean on validation."""
    leading: dict[tuple[str, str], tuple[float, str]] = {}
    for variant, runs in by_variant.items():
        row = next(iter(runs.values()))
        family = sweep.variants[row["label"]].family if row["label"] in sweep.variants else ""
        if family:
            place = (family, row["config"])
            mean = statistics.fmean(map(best, runs.values()))
            leading[place] = min(leading.get(place, (math.inf, "")), (mean, variant))
    return {variant for _, variant in leading.values()}


def _difference(pairs: Sequence[float]) -> str:
    """Mean of paired differences, half of its 95 % interval by Student's t, and the p-value of the signs."""
    half, freedom = "", len(pairs) - 1
    if freedom:
        t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.5 / freedom  # to 1 %
        half = f" +- {t * statistics.stdev(pairs) / math.sqrt(len(pairs)):.2g}"
    return f"{statistics.fmean(pairs):+.2g}{half} ({sign_flip_test(pairs):.2g})"


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of paired differences: the share of all choices of their signs whose mean is as far from zero.

    Exact up to 14 pairs, 16,384 choices drawn by hashes beyond. With n pairs it is never below 2^(1 - n).
    """
    n, observed = len(differences), abs(sum(differences)) * (1 - 1e-12)
    if n <= 14:
        choices: Iterator[tuple[int, ...]] = itertools.product((1, -1), repeat=n)
        sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in choices]
    else:
        sums = [
            abs(sum(d if keyed.key("sign", i, j) & 1 else -d for j, d in enumerate(differences))) for i in range(16384)
        ]
    return sum(s >= observed for s in sums) / len(sums)


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """Lines of equal keys as a table of Markdown."""
    if not lines:
        return ""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def curves(sweep: SweepConfig, name: str, rows: Sequence[Mapping[str, Any]]) -> Curves:
    """The validations of finished runs."""
    found: Curves = {}
    for row in rows:
        metrics = read_lines(sweep.runs_dir / name / row["run"] / "metrics.jsonl")
        values = [
            (r["step"], r[row["monitor"]])
            for r in metrics
            if r["kind"] == "validation" and r.get(row["monitor"]) is not None
        ]
        found.setdefault(row["variant"], []).append(values)
    return found
