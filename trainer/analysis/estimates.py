"""Spectral norm and radius from products with a matrix alone: power method, Rayleigh quotients, Arnoldi.

They are two numbers, equal for normal matrices only, and not every method finds both:

- the power method on A^T A finds the norm of any matrix, in as many steps as its two largest singular values are near;
- on A itself it finds the radius only where one real eigenvalue is the largest. Mostly the largest of a recurrent
  matrix are a complex pair: a real vector turns in their plane for ever, and its Rayleigh quotient swings;
- Rayleigh quotient iteration with complex shifts takes over where the power method has come near, and converges to an
  eigenvalue of the pair;
- Arnoldi keeps the whole space that the products span and finds the pair at once.

Sources: Golub & Van Loan 2013, sections 7.3, 8.2, 10.5; torch's spectral_norm runs the first.
"""

import math
import warnings
from typing import Literal

import numpy as np
import scipy.linalg
from scipy.sparse.linalg import ArpackNoConvergence, eigs

from trainer.analysis.matrices import Matrix, Real, spectral_norm, spectral_radius

Size = Literal["norm", "radius"]
Method = Literal["exact", "power", "rayleigh", "arnoldi"]


def start(n: int) -> Real:
    """The unit vector (n,) from which all methods start."""
    v = np.random.Generator(np.random.PCG64(0)).standard_normal(n)
    return np.asarray(v / np.linalg.norm(v))


def power_norm(a: Matrix, num_steps: int = 100) -> Real:
    """Estimates of the spectral norm after each step of the power method on A^T A; they never fall, and stay below it.

    Shape:
        returns (num_steps,)
    """
    v, found = start(len(a)), []
    for _ in range(num_steps):
        u = a @ v
        found.append(np.linalg.norm(u))
        v = a.conj().T @ u
        v = v / max(float(np.linalg.norm(v)), np.finfo(float).tiny)
    return np.array(found)


def power_radius(a: Matrix, num_steps: int = 100) -> Real:
    """|Rayleigh quotient| after each step of the power method on A: the radius only if one eigenvalue is the largest.

    Shape:
        returns (num_steps,)
    """
    v, found = start(len(a)), []
    for _ in range(num_steps):
        w = a @ v
        found.append(abs(np.vdot(v, w)))
        v = w / max(float(np.linalg.norm(w)), np.finfo(float).tiny)
    return np.array(found)


def rayleigh_radius(a: Matrix, num_power_steps: int = 50, num_steps: int = 10) -> float:
    """|eigenvalue| to which Rayleigh quotient iteration converges from where `num_power_steps` have come.

    It is the radius if that was near enough, and some other eigenvalue's size if not. It starts from a complex vector:
    a real one would meet real shifts alone.
    """
    v = start(len(a)) + 1j * start(len(a))[::-1]
    for _ in range(num_power_steps):
        v = a @ v
        v = v / max(float(np.linalg.norm(v)), np.finfo(float).tiny)
    shift = complex(np.vdot(v, a @ v))
    for _ in range(num_steps):
        with warnings.catch_warnings():  # near an eigenvalue the system is singular, which is the point
            warnings.simplefilter("ignore", scipy.linalg.LinAlgWarning)
            try:
                w = scipy.linalg.solve(a - shift * np.eye(len(a)), v, check_finite=False)
            except np.linalg.LinAlgError:  # the shift is an eigenvalue
                break
        if not np.isfinite(w).all() or not w.any():
            break
        v = w / np.linalg.norm(w)
        last, shift = shift, complex(np.vdot(v, a @ v))
        if abs(shift - last) <= 1e-14 * abs(shift):
            break
    return abs(shift)


SPACE = 60
"""Dimensions of what Arnoldi's method keeps between restarts: eigenvalues of a random matrix lie close."""


def arnoldi_radius(a: Matrix, num_values: int = 4, tolerance: float = 0.0, num_restarts: int | None = None) -> float:
    """Spectral radius by ARPACK's restarted Arnoldi method; nan where it does not converge.

    Args:
        num_values: that are looked for: the pair wanted, and those that lie near it.
        tolerance: relative; 0 for all digits.
        num_restarts: at most; None for ten times the width.
    """
    if len(a) < num_values + 3:
        return spectral_radius(a)
    rest = {"ncv": min(len(a), SPACE), "tol": tolerance, "maxiter": num_restarts}
    try:
        values = eigs(a, num_values, which="LM", v0=start(len(a)), return_eigenvectors=False, **rest)
    except ArpackNoConvergence as error:
        values = error.eigenvalues
    return float(np.abs(values).max()) if len(values) else float("nan")


def arnoldi_norm(a: Matrix) -> float:
    """Spectral norm by the same on A^T A, where it is Lanczos's."""
    return arnoldi_radius(a.conj().T @ a, 1) ** 0.5


def size(a: Matrix, of: Size, method: Method) -> float:
    """Spectral norm or radius by a method; the Rayleigh quotient of A^T A is what its power method ends with."""
    if method == "exact":
        return spectral_norm(a) if of == "norm" else spectral_radius(a)
    if of == "norm":
        return arnoldi_norm(a) if method == "arnoldi" else float(power_norm(a)[-1])
    if method == "power":
        return float(power_radius(a)[-1])
    return rayleigh_radius(a) if method == "rayleigh" else arnoldi_radius(a)


def scale(a: Matrix, of: Size, method: Method = "arnoldi") -> float:
    """By what A is to be multiplied for a norm or radius of 1: 1 where it is no larger.

    Of norm 1 no step lengthens a state; of radius 1 states may grow for a while, by as much as ||A|| a step. Where the
    method does not converge, the exact size is taken.
    """
    found = size(a, of, method)
    return 1 / max(1.0, size(a, of, "exact") if math.isnan(found) else found)
