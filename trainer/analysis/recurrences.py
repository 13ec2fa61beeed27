"""The recurrent matrices of a model: cheap numbers of each for training, everything for `analyze`."""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from trainer.analysis import estimates, matrices, pseudospectrum
from trainer.analysis.matrices import Matrix
from trainer.analysis.pseudospectrum import Resolvent
from trainer.models.recurrence import RecurrentLayer

LOGGED_SIZE = 512
"""Widest block whose eigenvalues are computed during training: a third of a second for each gate."""
CRISS_CROSS_SIZE = 256
"""Widest matrix that is searched criss-cross: each step takes all eigenvalues of one of twice the width."""
EPSILONS = (1e-3, 1e-2, 1e-1)
GATES = {1: ("W",), 3: ("reset", "update", "new"), 4: ("input", "forget", "cell", "output")}
"""Names of the matrices in torch's order."""


def recurrences(model: nn.Module) -> Iterator[tuple[str, RecurrentLayer]]:
    """Every recurrent layer and direction, by the name of its module."""
    for name, module in model.named_modules():
        if isinstance(module, RecurrentLayer):
            yield name, module


@torch.no_grad()
def gate_matrices(layer: RecurrentLayer) -> dict[str, Matrix]:
    """The matrix (H, H) of each gate in float64."""
    whole = layer.weight_hh.dense().double().cpu().numpy()
    parts = whole.reshape(-1, layer.hidden_size, layer.hidden_size)
    return dict(zip(GATES[len(parts)], parts, strict=True))


@torch.no_grad()
def gate_blocks(layer: RecurrentLayer) -> Matrix:
    """The blocks (G, K, P, P) that the matrix of each gate has on its diagonal, in float64; one where it has none."""
    blocks = layer.weight_hh.blocks().double().cpu().numpy()
    return blocks[..., None, None] if blocks.ndim == 2 else blocks


def logged(model: nn.Module) -> dict[str, float]:
    """Norm, radius and departure from normality of each recurrence, the largest of its gates, for a row of metrics.

    The last is Henrici's number over the Frobenius norm: 0 for a normal matrix, 1 where all eigenvalues are 0. Of
    blocks wider than `LOGGED_SIZE` norm and radius alone, by the power method and by Arnoldi's, and no radius where
    that does not soon converge. Six digits of each, four of Arnoldi's: the last ones of an eigenvalue depend on where
    the matrix lies in memory, and equal runs have equal metrics.
    """
    found: dict[str, float] = {}
    for name, layer in recurrences(model):
        blocks = gate_blocks(layer)
        if not np.isfinite(blocks).all():
            continue
        if blocks.shape[-1] > LOGGED_SIZE:
            every = list(blocks.reshape(-1, *blocks.shape[2:]))
            found[f"norm/{name}"] = max(float(estimates.power_norm(a, 30)[-1]) for a in every)
            radii = [estimates.arnoldi_radius(a, tolerance=1e-7, num_restarts=20) for a in every]
            if not any(map(math.isnan, radii)):
                found[f"radius/{name}"] = float(f"{max(radii):.4g}")
            continue
        values = np.linalg.eigvals(blocks)
        found[f"norm/{name}"] = float(np.linalg.norm(blocks, 2, axis=(-2, -1)).max())
        found[f"radius/{name}"] = float(np.abs(values).max())
        whole = (blocks**2).sum((1, 2, 3))
        departures = np.maximum(whole - (np.abs(values) ** 2).sum((1, 2)), 0.0)
        found[f"nonnormality/{name}"] = float(np.sqrt(departures / np.maximum(whole, 1e-60)).max())
    return {name: float(f"{value:.6g}") for name, value in found.items()}


def gradients(model: nn.Module, norms: Mapping[str, float]) -> dict[str, float]:
    """Norm of the gradient of each layer, all its directions and weights together, for a row of metrics.

    Args:
        norms: of each parameter of the model, by name.
    """
    found: dict[str, float] = {}
    for layer in dict.fromkeys(name.rpartition(".")[0] for name, _ in recurrences(model)):
        squares = [norm**2 for name, norm in norms.items() if name.startswith(f"{layer}.")]
        if squares:
            found[f"gradient/{layer}"] = float(f"{math.sqrt(sum(squares)):.6g}")
    return found


def largest(numbers: dict[str, float]) -> dict[str, float]:
    """Of what `logged` gives, the largest of all recurrences: norm, radius, nonnormality."""
    found: dict[str, float] = {}
    for name, value in numbers.items():
        of = name.split("/")[0]
        found[of] = max(found.get(of, value), value)
    return found


def study(a: Matrix, num_points: int, num_steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """All numbers of one matrix, and the arrays that pictures are drawn from.

    Args:
        num_points: of a side of the grid of the pseudo-spectrum.
        num_steps: powers of the matrix.

    Returns:
        numbers, and arrays: `eigenvalues`, `singular_values`, `range` (numerical), `growth`, `grid`.
    """
    values, singular = matrices.eigenvalues(a), matrices.singular_values(a)
    radius, norm = float(np.abs(values[0])), float(singular[0])
    departure, frobenius = matrices.henrici(a), float(np.linalg.norm(a))
    boundary = matrices.numerical_range(a)
    powers = matrices.growth(a, num_steps)
    resolvent = Resolvent(a)
    reach = 1.1 * max(1.0, float(np.abs(boundary).max())) + 0.1
    grid = pseudospectrum.grid(resolvent, (-reach, reach, -reach, reach), num_points)
    scale = radius if radius > 1 + 1e-6 else 1.0
    numbers: dict[str, Any] = {
        "radius": radius,
        "numerical_radius": float(np.abs(boundary).max()),
        "norm": norm,
        "henrici": departure,
        "nonnormality": departure / max(frobenius, 1e-30),
        "commutator": matrices.commutator(a),
        "eigenvector_condition": matrices.eigenvector_condition(a),
        "largest_power": float(powers.max()),
        "largest_power_at": int(powers.argmax()),
        "kreiss": pseudospectrum.kreiss(Resolvent(a / scale) if scale != 1.0 else resolvent),
        "kreiss_scaled_by": 1 / scale,
        "estimates": {
            of: {method: estimates.size(a, of, method) for method in ("exact", "power", "rayleigh", "arnoldi")}
            for of in ("norm", "radius")
        },
    }
    if len(a) <= CRISS_CROSS_SIZE:
        numbers["pseudospectral"] = {
            f"{epsilon:g}": {
                "radius": pseudospectrum.radius(a, epsilon),
                "abscissa": pseudospectrum.abscissa(a, epsilon),
            }
            for epsilon in EPSILONS
        }
    arrays = {
        "eigenvalues": values,
        "singular_values": singular,
        "range": boundary,
        "growth": powers,
        "grid": grid,
    }
    return numbers, arrays
