"""What tells how the powers of a matrix behave: its spectrum, its singular values, and how far it is from normal.

A matrix is normal if it commutes with its adjoint. Then its eigenvalues say everything: the spectral norm is the
spectral radius, and powers shrink from the first on where the radius is below 1. Otherwise they say what happens in the
long run alone. Trefethen & Embree 2005, "Spectra and Pseudospectra", is the source of what has no other.

Shape of all arguments: (n, n), real or complex; computed in double precision.
"""

from typing import Any

import numpy as np
import scipy.linalg
from numpy.typing import NDArray

Matrix = NDArray[Any]
Complex = NDArray[np.complex128]
Real = NDArray[np.float64]


def eigenvalues(a: Matrix) -> Complex:
    """(n,), the largest absolute value first."""
    values = np.linalg.eigvals(_double(a)).astype(np.complex128)
    return values[np.argsort(-np.abs(values), kind="stable")]


def singular_values(a: Matrix) -> Real:
    """(n,), the largest first."""
    return np.linalg.svd(_double(a), compute_uv=False)


def spectral_radius(a: Matrix) -> float:
    """Largest absolute value of an eigenvalue."""
    return float(np.abs(eigenvalues(a))[0])


def spectral_norm(a: Matrix) -> float:
    """Largest singular value: the most by which a vector is lengthened."""
    return float(np.linalg.norm(_double(a), 2))


def henrici(a: Matrix, values: Complex | None = None) -> float:
    """Departure from normality: sqrt(||A||_F^2 - sum of |eigenvalues|^2), 0 for a normal matrix.

    It is the Frobenius norm of what lies above the diagonal of a Schur form (Henrici 1962, section 1.2), from which it
    is computed; given the eigenvalues the difference is taken, which is right to about 1e-8 ||A||_F.

    Args:
        values: the eigenvalues, if they are known.
    """
    if values is None:
        triangle = schur(_double(a).astype(np.complex128))
        return float(np.linalg.norm(np.triu(triangle, 1)))
    squared = np.linalg.norm(_double(a)) ** 2 - float(np.sum(np.abs(values) ** 2))
    return float(max(squared, 0.0)) ** 0.5


def commutator(a: Matrix) -> float:
    """||A A* - A* A||_F, another distance from normality."""
    a = _double(a)
    adjoint = a.conj().T
    return float(np.linalg.norm(a @ adjoint - adjoint @ a))


def eigenvector_condition(a: Matrix) -> float:
    """Condition number of the matrix of unit eigenvectors: 1 for a normal matrix, infinite where they span no basis.

    Powers are bounded by it times the radius to that power (Bauer & Fike 1960 for perturbations).
    """
    _, vectors = np.linalg.eig(_double(a))
    return float(np.linalg.cond(vectors))


def schur(a: Matrix) -> Matrix:
    """Upper triangular T of A = Q T Q*, Q unitary. Of a real A it is real, with a block of two rows on the diagonal for
    each pair of complex eigenvalues."""
    a = _double(a)
    triangle, _ = scipy.linalg.schur(a, output="complex" if np.iscomplexobj(a) else "real", check_finite=False)
    found: Matrix = triangle
    return found


def numerical_range(a: Matrix, num_angles: int = 120) -> Complex:
    """Boundary of the field of values {v* A v : |v| = 1}, counter-clockwise.

    In direction theta the furthest point is v* A v with v the top eigenvector of the Hermitian part of exp(-i theta) A
    (Johnson 1978). The set is convex, holds the eigenvalues, and is their convex hull if A is normal.

    Shape:
        returns (num_angles,)
    """
    a = _double(a)
    points = [_furthest(a, angle)[1] for angle in np.linspace(0, 2 * np.pi, num_angles, endpoint=False)]
    return np.array(points, dtype=np.complex128)


def numerical_radius(a: Matrix, num_angles: int = 120) -> float:
    """Largest absolute value in the field of values; between radius and norm.

    From below, over so many directions: at most 1 - cos(pi / num_angles), 0.04 % for 120, too small.
    """
    a = _double(a)
    return max(_furthest(a, angle)[0] for angle in np.linspace(0, 2 * np.pi, num_angles, endpoint=False))


def _furthest(a: Matrix, angle: float) -> tuple[float, complex]:
    """How far the field of values reaches in a direction, and where."""
    turned = np.exp(-1j * angle) * a
    last = len(a) - 1
    value, vector = scipy.linalg.eigh((turned + turned.conj().T) / 2, subset_by_index=[last, last], check_finite=False)
    v = vector[:, 0]
    return float(value[0]), complex(np.vdot(v, a @ v))


def growth(a: Matrix, num_steps: int = 100) -> Real:
    """||A^k||_2 for k = 0 .. num_steps: what the most unlucky state becomes under the linear map.

    Shape:
        returns (num_steps + 1,)
    """
    a = _double(a)
    power, norms = np.eye(len(a), dtype=a.dtype), [1.0]
    for _ in range(num_steps):
        power = power @ a
        if not np.isfinite(power).all():
            return np.array(norms + [np.inf] * (num_steps + 1 - len(norms)))
        norms.append(float(np.linalg.norm(power, 2)))
    return np.array(norms)


def _double(a: Matrix) -> Matrix:
    a = np.asarray(a)
    if a.ndim != 2 or a.shape[0] != a.shape[1]:
        raise ValueError(f"a matrix of shape {a.shape}, wanted (n, n)")
    return a.astype(np.complex128 if np.iscomplexobj(a) else np.float64, copy=False)
