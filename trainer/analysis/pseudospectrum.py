"""Pseudo-spectra: where z I - A is nearly singular, that is, where eigenvalues go if A is changed a little.

The epsilon-pseudo-spectrum is {z : s(z) <= epsilon}, s(z) the smallest singular value of z I - A: the union of the
spectra of all A + E with ||E|| <= epsilon (Trefethen & Embree 2005, chapter 2). For a normal matrix it is the union of
disks of that radius about the eigenvalues; for others it may be far larger, and then eigenvalues say little about
powers up to a length, and about a matrix that is known up to rounding or noise.

s(z) on a grid: one Schur form A = Q T Q*, after which z I - T is triangular for all z; then inverse Lanczos on
(z I - T)* (z I - T) (Trefethen 1999, "Computation of pseudospectra", Acta Numerica 8, sections 11 and 12). All z go
through the triangular solves side by side, which makes them products with blocks of T, at the speed of the matrix
library: a step of Lanczos costs n^2 multiply-adds of complex numbers a point. Of a real matrix T is real, with blocks
of two rows on its diagonal for complex pairs, and they are half as many: T times real and imaginary parts.

Where A is normal up to rounding, s(z) is the distance to the nearest eigenvalue, wrong by at most the norm of what T
has above its diagonal, and is taken as such: there the singular values lie so close that Lanczos would be slow.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.analysis.matrices import Complex, Matrix, Real, schur

BLOCKS = 16
"""Blocks of a triangular solve that go one by one; what they take from all before them is one product."""
TOGETHER = 2048
"""Points that go side by side: so many that what is done row by row costs little beside the products."""
MAX_NEWTON = 40
MAX_STEPS = 200
"""Of Lanczos; a handful is enough near the spectrum, and far from it, where singular values lie close, a hundred."""
FEW, DIRECT_SIZE = 4, 256
"""So few points of so small a matrix are decomposed directly: a search asks for one after the other, and a step of
Lanczos's method in Python takes as long for one as for a hundred."""
CONTOUR = 1e-3
"""Tolerance of a grid: a hundredth of the distance between contours that anyone can tell apart."""
NORMAL = 1e-6
"""Departure from normality, over ||A||_F, that counts as the rounding of a normal matrix of float32 numbers."""


class Resolvent:
    """The resolvent (z I - A)^-1 of a matrix, by the norm that it has at many points.

    Args:
        a: (n, n).

    Attributes:
        eigenvalues: (n,), the diagonal of the Schur form.
        normal: whether A is, up to rounding.
    """

    def __init__(self, a: Matrix) -> None:
        self.size = len(a)
        self.real = not np.iscomplexobj(a)
        self._upper = upper = schur(a)
        self._lower = np.ascontiguousarray(upper.conj().T)
        self._pairs = np.flatnonzero(np.diag(upper, -1))  # first rows of the blocks of two
        starts = np.setdiff1d(np.arange(self.size + 1), self._pairs + 1).tolist()  # of all blocks, and the end
        self._groups = [starts[i : i + BLOCKS + 1] for i in range(0, len(starts) - 1, BLOCKS)]
        self.eigenvalues: Complex = np.diag(upper).astype(np.complex128)
        strict, i = np.triu(upper, 1), self._pairs
        if len(i):
            b, c = upper[i, i + 1], upper[i + 1, i]
            mean, half = (upper[i, i] + upper[i + 1, i + 1]) / 2, (upper[i, i] - upper[i + 1, i + 1]) / 2
            root = np.sqrt(half**2 + b * c + 0j)
            self.eigenvalues[i], self.eigenvalues[i + 1] = mean + root, mean - root
            strict[i, i + 1] = np.hypot(b + c, 2 * half)  # [[a, b], [-b, a]] is normal
        norm = float(np.linalg.norm(upper))
        self.normal = float(np.linalg.norm(strict)) <= NORMAL * norm
        # What a singular z I - T is solved with in place of its zeros: s is 0 there up to rounding anyway.
        self._tiny = np.finfo(float).eps * max(norm, np.finfo(float).tiny ** 0.25)

    def smallest(self, points: ArrayLike, tolerance: float = 1e-6, say: Callable[[float], None] | None = None) -> Real:
        """s(z), the smallest singular value of z I - A; the norm of the resolvent is 1 / s.

        Args:
            points: any shape.
            tolerance: relative; below about 1e-16 ||A|| rounding decides, as it does for a direct SVD.
            say: told the share that is done.

        Shape:
            returns as points
        """
        z = np.asarray(points, dtype=np.complex128)
        flat, found = z.reshape(-1), np.empty(z.size)
        for first in range(0, z.size, TOGETHER):
            part = slice(first, first + TOGETHER)
            if self.normal:
                found[part] = np.abs(flat[part][:, None] - self.eigenvalues).min(1)
            elif z.size <= FEW and self.size <= DIRECT_SIZE:
                shifted = z.reshape(-1, 1, 1) * np.eye(self.size) - self._upper
                found[part] = np.linalg.svd(shifted, compute_uv=False)[:, -1]
            else:
                with np.errstate(over="ignore", invalid="ignore", divide="ignore"):
                    found[part] = self._lanczos(flat[part], tolerance)
            if say is not None:
                say(min(1.0, (first + TOGETHER) / z.size))
        return found.reshape(z.shape)

    def _lanczos(self, z: Complex, tolerance: float) -> Real:
        """The same for some points: 1 / sqrt of the largest eigenvalue of (z I - T)^-1 (z I - T)^-*."""
        found, places = np.zeros(len(z)), np.arange(len(z))
        rng = np.random.Generator(np.random.PCG64(0))
        q = rng.standard_normal((self.size, 1)) + 1j * rng.standard_normal((self.size, 1))
        q = np.repeat(q / np.linalg.norm(q), len(z), 1)
        before, off = np.zeros_like(q), np.zeros(len(z))
        inverses = self._inverses(z)
        adjoint = inverses.conj()
        diagonal, beside = np.empty((0, len(z))), np.empty((0, len(z)))
        top, rise, done = np.zeros(len(z)), np.full(len(z), np.inf), np.zeros(len(z), dtype=bool)
        for step in range(MAX_STEPS):
            w = self._solve(self._upper, inverses, self._solve(self._lower, adjoint, q)) - off * before
            on = np.einsum("ng,ng->g", q.conj(), w).real
            w -= on * q
            norm = np.sqrt(np.einsum("ng,ng->g", w.conj(), w).real)
            lost = ~(np.isfinite(on) & np.isfinite(norm))  # overflow: s is below 1e-150
            diagonal = np.concatenate([diagonal, np.where(lost, 1.0, on)[None]])
            earlier, (top, last) = top, _top(diagonal, beside, top)
            near = norm * last <= tolerance * top
            # Among singular values that lie close the value settles long before the vector does. What is still to come
            # is a geometric series, if it goes on as it went.
            risen, rise = rise, top - earlier
            coming = rise * np.maximum(1.0, rise / np.maximum(risen - rise, np.finfo(float).tiny))
            settled = (step > 4) & (coming <= 0.02 * tolerance * top)
            new = ~done & (lost | near | settled | (step == MAX_STEPS - 1))
            found[places[new]] = np.where(lost, 0.0, top**-0.5)[new]
            done |= new
            if done.all():
                break
            beside = np.concatenate([beside, norm[None]])
            before, off, q = q, norm, w / norm
            if np.count_nonzero(done) > len(done) // 8:  # the others go on by themselves
                places, top, rise, off = places[~done], top[~done], rise[~done], off[~done]
                diagonal, beside, inverses, adjoint, before, q = (
                    np.compress(~done, x, axis=-1) for x in (diagonal, beside, inverses, adjoint, before, q)
                )
                done = np.zeros(len(places), dtype=bool)
        return found

    def _inverses(self, z: Complex) -> Complex:
        """Inverses of the blocks on the diagonal of z I - T, row under row: (n, 2, G); a block of one has a column."""
        d = z - np.diag(self._upper)[:, None]
        found = np.zeros((self.size, 2, len(z)), np.complex128)
        found[:, 0] = np.reciprocal(np.where(np.abs(d) < self._tiny, self._tiny, d))
        if len(i := self._pairs):
            right, left = self._upper[i, i + 1][:, None], self._upper[i + 1, i][:, None]
            determinant, least = d[i] * d[i + 1] - right * left, self._tiny * np.sqrt(np.abs(right * left))
            inverse = np.reciprocal(np.where(np.abs(determinant) < least, least, determinant))
            found[i, 0], found[i, 1] = d[i + 1] * inverse, right * inverse
            found[i + 1, 0], found[i + 1, 1] = left * inverse, d[i] * inverse
        return found

    def _solve(self, triangle: Matrix, inverses: Complex, b: Complex) -> Complex:
        """(z I - T)^-1 b, or of its adjoint where the triangle is the lower one: (n, G)."""
        x, upper = b.copy(), triangle is self._upper
        for group in reversed(self._groups) if upper else self._groups:
            first, last = group[0], group[-1]
            known = slice(last, self.size) if upper else slice(0, first)
            x[first:last] += _product(triangle[first:last, known], x[known])
            blocks = list(itertools.pairwise(group))
            for start, end in reversed(blocks) if upper else blocks:
                inside = slice(end, last) if upper else slice(first, start)
                if inside.start < inside.stop:
                    x[start:end] += _product(triangle[start:end, inside], x[inside])
                if end - start == 1:
                    x[start] *= inverses[start, 0]
                elif upper:
                    x[start:end] = (inverses[start:end] * x[start:end]).sum(1)
                else:  # the transposed block
                    x[start:end] = (inverses[start:end] * x[start:end, None]).sum(0)
        return x


def _product(a: Matrix, x: Complex) -> Complex:
    """A x; of a real A and a contiguous x in half the time that numpy takes."""
    if np.iscomplexobj(a):
        return a @ x
    found: Complex = (a @ x.view(np.float64)).view(np.complex128)
    return found


def _top(on: Real, off: Real, below: Real) -> tuple[Real, Real]:
    """Largest eigenvalue of symmetric tridiagonal matrices, and the absolute last number of its vector, of length 1.

    d_1 = x - a_1, d_j = x - a_j - b_{j-1}^2 / d_{j-1} are the pivots of x I - A: all are positive above the largest
    eigenvalue, where the last one is 0, and its slope there is 1 / v_k^2. It has a pole where the matrix without the
    last row has its largest eigenvalue; Newton's method goes on (x - pole) d_k, and comes down from above.

    Args:
        on: (k, G) the diagonals, a. off: (k - 1, G) what stands beside them, b.
        below: (G,) the largest eigenvalues without the last row and column.
    """
    if len(on) == 1:
        return np.maximum(on[0], np.finfo(float).tiny), np.ones_like(below)
    squares = off**2
    # With all that couples the last row at the pole: never too low.
    x = (below + on[-1]) / 2 + np.sqrt(((below - on[-1]) / 2) ** 2 + squares[-1])
    slope = np.ones_like(x)
    for _ in range(MAX_NEWTON):
        pivot, slope = x - on[0], np.ones_like(x)
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            for a, b in zip(on[1:], squares, strict=True):
                ratio = b / pivot
                slope = 1 + ratio / pivot * slope
                pivot = x - a - ratio
            room = x - below
            change = room * pivot / (pivot + room * slope)
        change = np.where(np.isfinite(change), np.clip(change, 0, 0.999 * room), 0)
        x = x - change
        if not (change > 1e-14 * x).any():
            break
    with np.errstate(invalid="ignore"):  # at the pole itself the last row has no part in it
        return np.maximum(x, below), np.where(np.isfinite(slope), 1 / np.sqrt(slope), 0.0)


@dataclass(frozen=True)
class Grid:
    """s(z) at the points x + i y."""

    x: Real
    y: Real
    smallest: Real
    """(len(y), len(x))"""


def grid(
    resolvent: Resolvent,
    box: tuple[float, float, float, float],
    num_points: int = 200,
    say: Callable[[float], None] | None = None,
    tolerance: float = CONTOUR,
) -> Grid:
    """s(z) on a rectangle (left, right, bottom, top) of num_points x num_points, as exact as a picture needs.

    The lower half of a real matrix is the mirror of the upper one, where the rectangle is as well.
    """
    left, right, bottom, top = box
    x, y = np.linspace(left, right, num_points), np.linspace(bottom, top, num_points)
    mirror = resolvent.real and bottom == -top
    rows = y[num_points // 2 :] if mirror else y
    upper = resolvent.smallest(x + 1j * rows[:, None], tolerance, say)
    if mirror:
        upper = np.concatenate([upper[::-1][: num_points // 2], upper])
    return Grid(x, y, upper)


def abscissa(a: Matrix, epsilon: float, tolerance: float = 1e-10) -> float:
    """Largest real part in the epsilon-pseudo-spectrum, by criss-cross search (Burke, Lewis & Overton 2003).

    From a point inside, go right to the boundary: the largest real eigenvalue of a matrix of 2 n. There, look up and
    down: the imaginary eigenvalues of a Hamiltonian matrix cut the vertical line into pieces. From the middle of each
    that is inside go right again, until none is. It converges to the global maximum, quadratically at the end.
    """
    values = np.linalg.eigvals(a)
    eye = np.eye(len(a))

    def right_of(y: float) -> float:
        shifted = a - 1j * y * eye
        return _last_real(np.linalg.eigvals(np.block([[shifted, -epsilon * eye], [-epsilon * eye, shifted.conj().T]])))

    def crossings(x: float) -> Real:
        shifted = a - x * eye
        found = np.linalg.eigvals(np.block([[-shifted.conj().T, epsilon * eye], [-epsilon * eye, shifted]]))
        return np.sort(found[np.abs(found.real) <= _near(found)].imag)

    found = right_of(float(values[np.argmax(values.real)].imag))
    resolvent = Resolvent(a)
    while True:
        heights = crossings(found)
        middles = (heights[1:] + heights[:-1]) / 2
        if resolvent.real:
            middles = middles[middles >= 0]
        inside = (
            middles[resolvent.smallest(found + 1j * middles, 1e-9) < epsilon * (1 - 1e-7)] if len(middles) else middles
        )
        further = max((right_of(float(y)) for y in inside), default=found)
        if further <= found + tolerance * max(1.0, abs(found)):
            return max(found, further)
        found = further


def radius(a: Matrix, epsilon: float, tolerance: float = 1e-10) -> float:
    """Largest absolute value in the epsilon-pseudo-spectrum, by criss-cross search (Mengi & Overton 2005).

    As `abscissa`, with circles for the vertical lines: z = r exp(i t) has epsilon among the singular values of z I - A
    where exp(i t) is an eigenvalue of the pencil [[-epsilon I, A], [r I, 0]] - lambda [[0, r I], [A*, -epsilon I]]. It
    is solved as a standard problem after the shift lambda = tau + 1 / mu, several times as fast as by QZ; a root it
    blurs is put right by the search along the ray.
    """
    eye, zero = np.eye(len(a)), np.zeros_like(a)

    def out_along(angle: float) -> float:
        turned = np.exp(-1j * angle) * a
        return _last_real(np.linalg.eigvals(np.block([[turned, -epsilon * eye], [-epsilon * eye, turned.conj().T]])))

    def crossings(r: float) -> Real:
        left = np.block([[-epsilon * eye, a], [r * eye, zero]])
        right = np.block([[zero, r * eye], [a.conj().T, -epsilon * eye]])
        tau = 0.6 * np.exp(0.7j)
        mu = np.linalg.eigvals(np.linalg.solve(left - tau * right, right))
        found = tau + 1 / mu[np.abs(mu) > 1e-8]
        return np.sort(np.angle(found[np.abs(np.abs(found) - 1) <= 1e-5]))

    values = np.linalg.eigvals(a)
    found = out_along(float(np.angle(values[np.argmax(np.abs(values))])))
    resolvent = Resolvent(a)
    while True:
        angles = crossings(found)
        middles = (angles + np.roll(angles, -1)) / 2
        if len(middles):
            middles[-1] += np.pi  # of the piece across the negative axis
        middles = np.mod(middles + np.pi, 2 * np.pi) - np.pi
        if resolvent.real:
            middles = np.unique(np.abs(middles))
        points = found * np.exp(1j * middles)
        inside = middles[resolvent.smallest(points, 1e-9) < epsilon * (1 - 1e-7)] if len(middles) else middles
        further = max((out_along(float(t)) for t in inside), default=found)
        if further <= found + tolerance * max(1.0, abs(found)):
            return max(found, further)
        found = further


def _near(values: NDArray[np.complex128]) -> float:
    """How far from its line a double eigenvalue may be thrown by rounding: its square root."""
    return 1e-7 * max(1.0, float(np.abs(values).max()))


def _last_real(values: NDArray[np.complex128]) -> float:
    """The largest of the real eigenvalues."""
    return float(values[np.abs(values.imag) <= _near(values)].real.max())


def kreiss(resolvent: Resolvent, num_angles: int = 180, num_radii: int = 40) -> float:
    """Kreiss constant K = sup over |z| > 1 of (|z| - 1) ||(z I - A)^-1||; infinite for a radius above 1.

    It frames what powers grow to: K <= sup_k ||A^k|| <= e n K (Kreiss 1962; Spijker 1991), and is 1 for a normal matrix
    of radius 1 or less. On circles of 1 + 1e-4 to 1 + 10, and then uphill from the three best points, so from below.
    """
    if np.abs(resolvent.eigenvalues).max() > 1 + 1e-6:
        return float("inf")
    from scipy.optimize import minimize

    beyond = np.logspace(-4, 1, num_radii)
    angles = np.linspace(0, np.pi if resolvent.real else 2 * np.pi, num_angles, endpoint=resolvent.real)

    def height(log_beyond: Real, angle: Real) -> Real:
        distance = 10.0**log_beyond
        return distance / resolvent.smallest((1 + distance) * np.exp(1j * angle))

    logs, turns = np.meshgrid(np.log10(beyond), angles, indexing="ij")
    heights = height(logs, turns)
    best = float(heights.max())
    for place in np.argsort(-heights, axis=None)[:3]:
        at = np.array([logs.flat[place], turns.flat[place]])
        climbed = minimize(
            lambda x: -float(height(np.clip(x[:1], -4, 1), x[1:])[0]),
            at,
            method="Nelder-Mead",
            options={"xatol": 1e-4, "fatol": 1e-8, "maxfev": 80},
        )
        best = max(best, -float(climbed.fun))
    return max(best, 1.0)
