"""Seconds and error of a pseudo-spectrum of 512 units on 200 x 200 points, beside a direct decomposition of some.

Two matrices that are far from normal in different ways: Grcar's, whose pseudo-spectra are famous for lying far from its
eigenvalues, and a random one, as a net begins with. A rectangle that holds much beyond the spectrum is the slow case:
singular values of z I - A lie close there.
"""

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trainer.analysis.matrices import Matrix
from trainer.analysis.pseudospectrum import CONTOUR, Resolvent, grid

SIZE, POINTS = 512, 200
SECONDS, ERROR = 60.0, 1e-6
"""Wanted of one core: no more than these."""
TOLERANCES = {"exact": 1e-6, "of a picture": CONTOUR}
CHECKED = 60
CLEAR = 1e-8
"""A direct decomposition of numbers of order one has no six digits of smaller singular values."""

Box = tuple[float, float, float, float]


def grcar(n: int) -> Matrix:
    """Ones on the diagonal and on three above it, -1 below it (Grcar 1989)."""
    return np.triu(np.tril(np.ones((n, n)), 3)) - np.eye(n, k=-1)


def cases(size: int) -> Iterator[tuple[str, Matrix, Box]]:
    """What is measured: a name, the matrix and the rectangle (left, right, bottom, top)."""
    yield "Grcar, around its pseudo-spectra", grcar(size), (-1.5, 3.5, -3.5, 3.5)
    yield "Grcar, far beyond them", grcar(size), (-4.0, 4.0, -4.0, 4.0)
    numbers = np.random.default_rng(0).standard_normal((size, size))
    yield "random", numbers / size**0.5, (-1.5, 1.5, -1.5, 1.5)


def measure(size: int, num_points: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Seconds of the whole grid, Schur form included, and the largest relative error of some points, case by case.

    Args:
        num_points: on each side of the rectangle.
        say: told what was found, case by case.
    """
    rows = []
    for name, a, box in cases(size):
        some = np.random.default_rng(1).choice(num_points**2, min(CHECKED, num_points**2), replace=False)
        y, x = np.divmod(some, num_points)
        direct: list[float] = []
        for kind, tolerance in TOLERANCES.items():
            start, cpu_start = time.perf_counter(), time.process_time()
            found = grid(Resolvent(a), box, num_points, tolerance=tolerance)
            seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
            if not direct:
                z = found.x[x] + 1j * found.y[y]
                direct = [float(np.linalg.svd(p * np.eye(size) - a, compute_uv=False)[-1]) for p in z]
            want = np.array(direct)
            clear = want > CLEAR
            error = float(np.abs(found.smallest[y, x] / want - 1)[clear].max()) if clear.any() else 0.0
            rows.append(
                {"matrix": name, "kind": kind, "tolerance": tolerance, "seconds": seconds, "cpu_seconds": cpu_seconds}
                | {"error": error, "checked": int(clear.sum())}
            )
            say(f"{name}, {kind}: {seconds:.1f} s, error {error:.1e}")
    return rows
