"""Pseudo-spectra: where z I - A is nearly singular, that is, where eigenvalues go if A is changed a little.

The epsilon-pseudo-spectrum is {z : s(z) <= epsilon}, s(z) the smallest singular value of z I - A: the union of the
spectra of all A + E with ||E|| <= epsilon (Trefethen & Embree 2005, chapter 2). For a normal matrix it is the union of
disks of that radius about the eigenvalues; for others it may be far larger, and then eigenvalues say little about
powers up to a length, and about a matrix that is known up to rounding or noise.

s(z) on a grid: one complex Schur form A = Q T Q*, after which z I - T is triangular for all z; then inverse Lanczos on
(z I - T)* (z I - T) (Trefethen 1999, "Computation of pseudospectra", Acta Numerica 8, sections 11 and 12). All z go
through the triangular solves side by side, which makes them products with blocks of T: a step of Lanczos costs n^2
complex multiply-adds a point, at the speed of the matrix library.

Where A is normal up to rounding, s(z) is the distance to the nearest eigenvalue, wrong by at most the norm of what T
has above its diagonal, and is taken as such: there the singular values lie so close that Lanczos would be slow.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from trainer.analysis.matrices import Complex, Matrix, Real, schur

BLOCK = 32
"""Rows of a triangular solve that go one by one; all before them are one product."""
TOGETHER = 512
"""Points that go side by side: what fits a core's cache."""
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
        self._upper, _ = schur(a)
        self.eigenvalues: Complex = np.diag(self._upper).copy()
        departure = float(np.linalg.norm(np.triu(self._upper, 1)))
        self.normal = departure <= NORMAL * float(np.linalg.norm(self._upper))
        self._lower = np.ascontiguousarray(self._upper.conj().T)
        # What a singular z I - T is solved with in place of its zeros: s is 0 there up to rounding anyway.
        self._tiny = np.finfo(float).eps * max(float(np.linalg.norm(self._upper)), np.finfo(float).tiny ** 0.25)

    def smallest(self, points: ArrayLike, tolerance: float = 1e-7, say: Callable[[float], None] | None = None) -> Real:
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
        found = np.zeros(len(z))
        left = np.arange(len(z))  # those that have not converged
        rng = np.random.Generator(np.random.PCG64(0))
        q = rng.standard_normal((self.size, 1)) + 1j * rng.standard_normal((self.size, 1))
        q = np.repeat(q / np.linalg.norm(q), len(z), 1)
        before, off = np.zeros_like(q), np.zeros(len(z))
        pivots = self._pivots(z)
        tri, earlier = np.zeros((len(z), 0, 0)), np.zeros(len(z))
        for step in range(MAX_STEPS):
            w = self._solve(self._upper, pivots, self._solve(self._lower, pivots.conj(), q)) - off * before
            on = np.einsum("ng,ng->g", q.conj(), w).real
            w -= on * q
            norm = np.sqrt(np.einsum("ng,ng->g", w.conj(), w).real)
            tri = np.pad(tri, ((0, 0), (0, 1), (0, 1)))
            tri[:, step, step] = on
            if step:
                tri[:, step, step - 1] = tri[:, step - 1, step] = off
            lost = ~(np.isfinite(on) & np.isfinite(norm))  # overflow: s is below 1e-150
            if step < 2 or step % 2 or lost.any():
                values, vectors = np.linalg.eigh(np.where(lost[:, None, None], 1.0, tri))
                top = np.maximum(values[:, -1], np.finfo(float).tiny)
                near = norm * np.abs(vectors[:, -1, -1]) <= tolerance * top
                # Among singular values that lie close the value settles long before the vector does.
                settled = (top - earlier <= 0.01 * tolerance * top) if step > 4 else np.zeros_like(near)
                done = lost | near | settled | (step == MAX_STEPS - 1)
                earlier = top
                found[left[done]] = np.where(lost, 0.0, top**-0.5)[done]
                if done.all():
                    break
                if done.any():
                    kept = ~done
                    left, tri, earlier, pivots, norm, q, w = (
                        left[kept],
                        tri[kept],
                        earlier[kept],
                        pivots[:, kept],
                        norm[kept],
                        q[:, kept],
                        w[:, kept],
                    )
            before, off, q = q, norm, w / norm
        return found

    def _pivots(self, z: Complex) -> Complex:
        """1 / (z - T_ii): (n, G)."""
        d = z - self.eigenvalues[:, None]
        shifted: Complex = np.where(np.abs(d) < self._tiny, self._tiny, d)
        found: Complex = np.reciprocal(shifted)
        return found

    def _solve(self, triangle: Complex, pivots: Complex, b: Complex) -> Complex:
        """(z I - T)^-1 b, or of its adjoint where the triangle is the lower one: (n, G)."""
        x, n = b.copy(), self.size
        backwards = triangle is self._upper
        starts = range(0, n, BLOCK)
        for first in reversed(starts) if backwards else starts:
            last = min(first + BLOCK, n)
            known = slice(last, n) if backwards else slice(0, first)
            x[first:last] += triangle[first:last, known] @ x[known]
            for i in reversed(range(first, last)) if backwards else range(first, last):
                inside = slice(i + 1, last) if backwards else slice(first, i)
                x[i] = (x[i] + triangle[i, inside] @ x[inside]) * pivots[i]
        return x


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
        inside = middles[resolvent.smallest(found + 1j * middles) < epsilon * (1 - 1e-7)] if len(middles) else middles
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
        inside = middles[resolvent.smallest(points) < epsilon * (1 - 1e-7)] if len(middles) else middles
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
