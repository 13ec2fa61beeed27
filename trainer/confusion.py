"""Which classes are taken for which: a table a class and a matrix, from the rows of any evaluation of classes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

Pair = tuple[str, str]
HEAD = ("class", "samples", "right, %", "of those called so, %", "most often called")


def pairs(rows: Sequence[Mapping[str, Any]]) -> list[Pair]:
    """(class, guess) of each row that has both columns."""
    columns = [row["columns"] for row in rows]
    return [(c["class"], c["guess"]) for c in columns if "class" in c and "guess" in c]


def matrix(found: Sequence[Pair]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the classes, sorted, and how often each (row) was called each (column)."""
    names = sorted({name for pair in found for name in pair}, key=lambda n: (n.isdigit(), int(n) if n.isdigit() else n))
    counts = np.zeros((len(names), len(names)), dtype=np.int64)
    for (real, guess), count in Counter(found).items():
        counts[names.index(real), names.index(guess)] = count
    return names, counts


def table(found: Sequence[Pair]) -> list[tuple[str, ...]]:
    """A line a class, as `HEAD` says: recall, precision, and the class it is mistaken for most often."""
    names, counts = matrix(found)
    lines: list[tuple[str, ...]] = []
    for i, name in enumerate(names):
        row, called = counts[i], int(counts[:, i].sum())
        wrong = np.where(np.arange(len(names)) == i, -1, row)
        other = f"{names[int(wrong.argmax())]} ({wrong.max()})" if len(names) > 1 and wrong.max() > 0 else ""
        recall = f"{100 * row[i] / row.sum():.1f}" if row.sum() else ""
        precision = f"{100 * row[i] / called:.1f}" if called else ""
        lines.append((name, str(row.sum()), recall, precision, other))
    return lines


def figure(found: Sequence[Pair]) -> Figure:
    """The matrix as a picture: a row a class, in shares of that class, counts written in."""
    import matplotlib.pyplot as plt

    names, counts = matrix(found)
    size = max(4.0, 0.42 * len(names) + 2)
    drawn, axes = plt.subplots(figsize=(size + 0.6, size), layout="constrained")
    shares = counts / counts.sum(1, keepdims=True).clip(min=1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    places = range(len(names))
    axes.set_xticks(places, names, rotation=90, fontsize=8)
    axes.set_yticks(places, names, fontsize=8)
    axes.set(xlabel="called", ylabel="class")
    if len(names) <= 40:
        for i, j in np.argwhere(counts > 0).tolist():
            color = "white" if shares[i, j] > 0.6 else "black"
            axes.text(j, i, str(counts[i, j]), ha="center", va="center", fontsize=7, color=color)
    return drawn
