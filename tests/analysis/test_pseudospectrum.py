"""Spectra, pseudo-spectra and estimates against known answers and direct singular value decompositions."""

from collections.abc import Callable

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from trainer.analysis import estimates, matrices, pseudospectrum
from trainer.analysis.pseudospectrum import Resolvent


def grcar(n: int) -> np.ndarray:
    a = np.triu(np.tril(np.ones((n, n)), 3))
    return a - np.eye(n, k=-1)


RNG = np.random.default_rng(0)
ORTHOGONAL = np.linalg.qr(RNG.standard_normal((48, 48)))[0]
MATRICES = {
    "Grcar": grcar(48),
    "Jordan": 0.5 * np.eye(24, k=1) + 0.3 * np.eye(24),
    "Toeplitz": np.eye(20, k=1) + 0.25j * np.eye(20, k=-1),
    "normal": 0.9 * ORTHOGONAL,
    "random": RNG.standard_normal((50, 50)) / 7,
    "one": np.array([[0.5]]),
}
NAMES = list(MATRICES)


def direct(a: np.ndarray, z: np.ndarray) -> np.ndarray:
    found = [np.linalg.svd(x * np.eye(len(a)) - a, compute_uv=False)[-1] for x in z.flat]
    return np.array(found).reshape(z.shape)


@pytest.mark.parametrize("name", NAMES)
def test_the_grid_is_that_of_a_direct_decomposition(name: str) -> None:
    a = MATRICES[name]
    found = pseudospectrum.grid(Resolvent(a), (-3, 3, -2, 2), 15, tolerance=1e-7)
    want = direct(a, found.x + 1j * found.y[:, None])
    clear = want > 1e-8  # below, a direct decomposition has no digits left
    np.testing.assert_allclose(found.smallest[clear], want[clear], rtol=1e-6)
    np.testing.assert_allclose(found.smallest, want, atol=1e-9)
    picture = pseudospectrum.grid(Resolvent(a), (-3, 3, -2, 2), 15)
    np.testing.assert_allclose(picture.smallest[clear], want[clear], rtol=1e-3)


def test_far_from_a_large_spectrum_where_singular_values_lie_close() -> None:
    a = grcar(400)
    points = np.array([-2.5 + 3j, 4 - 3.5j, 3.8j, 4 + 0j])
    np.testing.assert_allclose(Resolvent(a).smallest(points), direct(a, points), rtol=1e-6)


@pytest.mark.parametrize("epsilon", [1e-3, 1e-1])
@pytest.mark.parametrize("name", ["Grcar", "Jordan", "Toeplitz", "normal", "random"])
def test_criss_cross_ends_on_the_boundary_and_nothing_lies_beyond(name: str, epsilon: float) -> None:
    a = MATRICES[name]
    radius, abscissa = pseudospectrum.radius(a, epsilon), pseudospectrum.abscissa(a, epsilon)
    resolvent = Resolvent(a)
    values = resolvent.eigenvalues
    far = np.exp(1j * np.append(np.linspace(0, 2 * np.pi, 181), np.angle(values)))
    line = 1j * np.append(np.linspace(-4, 4, 201), values.imag)
    for inside, outside in (
        (0.9995 * radius * far, (radius + 1e-6) * far),
        (abscissa - 1e-3 + line, abscissa + 1e-6 + line),
    ):
        assert resolvent.smallest(inside).min() < epsilon < resolvent.smallest(outside).min()

    def lowest(at: Callable[[float], complex], places: np.ndarray) -> float:
        """The smallest s(z) on the circle or line found, by direct decompositions."""
        best = places[np.argmin(direct(a, np.array([at(p) for p in places])))]
        step = float(np.diff(places)[0])
        climbed = minimize_scalar(
            lambda p: direct(a, np.array([at(p)]))[0], (best - step, best, best + step), tol=1e-12
        )
        return float(climbed.fun)

    assert lowest(lambda t: radius * np.exp(1j * t), np.linspace(0, 2 * np.pi, 91)) == pytest.approx(epsilon, rel=1e-6)
    assert lowest(lambda y: abscissa + 1j * y, np.linspace(-4, 4, 161)) == pytest.approx(epsilon, rel=1e-6)


def test_a_normal_matrix_has_disks_and_a_jordan_block_has_not() -> None:
    a, epsilon = MATRICES["normal"], 0.05
    assert matrices.henrici(a) < 1e-12
    assert pseudospectrum.radius(a, epsilon) == pytest.approx(0.9 + epsilon, abs=1e-8)
    assert pseudospectrum.kreiss(Resolvent(ORTHOGONAL)) == pytest.approx(1.0, abs=1e-6)
    block = np.eye(16, k=1)
    assert matrices.spectral_radius(block) == 0
    assert pseudospectrum.radius(block, 1e-4) > 0.5  # about epsilon^(1/n)
    assert matrices.henrici(block) == pytest.approx(15**0.5)


def test_radius_numerical_radius_and_norm_are_ordered_and_kreiss_frames_the_powers() -> None:
    a = 0.9 * MATRICES["random"] / matrices.spectral_radius(MATRICES["random"])
    radius, norm = matrices.spectral_radius(a), matrices.spectral_norm(a)
    assert radius < matrices.numerical_radius(a) < norm
    assert np.abs(matrices.numerical_range(a)).max() == pytest.approx(matrices.numerical_radius(a), rel=1e-3)
    kreiss, largest = pseudospectrum.kreiss(Resolvent(a)), matrices.growth(a, 200).max()
    assert 1 < kreiss <= largest <= np.e * len(a) * kreiss
    assert pseudospectrum.kreiss(Resolvent(2 * a)) == np.inf


def test_norm_and_radius_differ_and_plain_power_iteration_misses_a_complex_pair() -> None:
    turn = 0.9 * np.array([[np.cos(1), -3 * np.sin(1)], [np.sin(1) / 3, np.cos(1)]])
    a = np.block([[turn, np.zeros((2, 38))], [np.zeros((38, 2)), 0.5 * np.eye(38, k=1)]])
    radius, norm = matrices.spectral_radius(a), matrices.spectral_norm(a)
    assert norm > 2 * radius
    assert estimates.power_norm(a)[-1] == pytest.approx(norm)
    swings = estimates.power_radius(a, 300)[-50:]
    assert swings.max() - swings.min() > 0.3  # for ever
    assert estimates.rayleigh_radius(a) == pytest.approx(radius)
    assert estimates.arnoldi_radius(a) == pytest.approx(radius)
    for of in ("norm", "radius"):
        for method in ("power", "rayleigh", "arnoldi"):
            if (of, method) != ("radius", "power"):
                scaled = 3 * a * estimates.scale(3 * a, of, method)
                assert estimates.size(scaled, of, "exact") == pytest.approx(1.0), (of, method)
        assert estimates.scale(a / 9, of) == 1.0
