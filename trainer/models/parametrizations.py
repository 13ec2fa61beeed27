"""Parametrisations of recurrent matrices, on `torch.nn.utils.parametrize`: what is trained, and the matrix made of it.

Each works on any number of square matrices side by side, so on a dense matrix as on every block of a block-diagonal
one. What is trained and saved is `original`, the free numbers; the matrix is formed anew at each look, which a forward
pass takes once, in float32 whatever the surroundings compute in.
"""

import contextlib
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn
from torch.nn.utils import parametrize

from kernels import products
from trainer.config import Config
from trainer.models.initialization import InitializationConfig, OrthogonalConfig, RotationsConfig
from trainer.models.structure.base import Structure


class FreeConfig(Config):
    """The numbers of the matrix are what is trained."""

    kind: Literal["free"] = "free"

    def build(self, structure: Structure) -> "Parametrization | None":
        return None


class CayleyConfig(Config):
    """Orthogonal by the scaled Cayley transform (Helfrich, Willmott & Ye 2018, arXiv:1707.09520)."""

    kind: Literal["cayley"] = "cayley"
    negative_share: float = Field(0.5, ge=0, le=1)
    """Share of the entries of D that are -1: the paper's rho over the size of a matrix, rounded."""

    def build(self, structure: Structure) -> "Cayley":
        return Cayley(structure, self.negative_share)


class ExponentialConfig(Config):
    """Orthogonal with determinant 1, by the matrix exponential (Lezcano-Casado & Martinez-Rubio 2019)."""

    kind: Literal["exponential"] = "exponential"

    def build(self, structure: Structure) -> "Exponential":
        return Exponential(structure)


class HouseholderConfig(Config):
    """Orthogonal as a product of reflections (Mhammedi et al. 2017, arXiv:1612.00188)."""

    kind: Literal["householder"] = "householder"

    def build(self, structure: Structure) -> "Householder":
        return Householder(structure)


class SoftOrthogonalConfig(Config):
    """Pulled towards orthogonality by a penalty: strength * sum of (W^T W - I)^2 (Vorontsov et al. 2017)."""

    kind: Literal["soft_orthogonal"] = "soft_orthogonal"
    strength: PositiveFloat = 1e-2

    def build(self, structure: Structure) -> "SoftOrthogonal":
        return SoftOrthogonal(structure, self.strength)


class SpectralNormConfig(Config):
    """Scaled down to a largest singular value, so that no step can lengthen the state."""

    kind: Literal["spectral_norm"] = "spectral_norm"
    bound: PositiveFloat = 1.0

    def build(self, structure: Structure) -> "SpectralNorm":
        return SpectralNorm(structure, self.bound)


class SpectralRadiusConfig(Config):
    """Scaled down to a largest absolute eigenvalue: stable in the long run, though a non-normal matrix may lengthen the
    state for a while."""

    kind: Literal["spectral_radius"] = "spectral_radius"
    bound: PositiveFloat = 1.0

    def build(self, structure: Structure) -> "SpectralRadius":
        return SpectralRadius(structure, self.bound)


class BoundedConfig(Config):
    """Each number bounded: |u| <= memory^(1 / steps), so that an input grows at most `memory` times over the steps.

    Source: Li et al. 2018, arXiv:1803.04831, section 3.
    """

    kind: Literal["bounded"] = "bounded"
    memory: PositiveFloat = 2.0
    steps: PositiveInt = 1000

    def build(self, structure: Structure) -> "Bounded":
        return Bounded(structure, self.memory ** (1 / self.steps))


ParametrizationConfig = Annotated[
    FreeConfig
    | CayleyConfig
    | ExponentialConfig
    | HouseholderConfig
    | SoftOrthogonalConfig
    | SpectralNormConfig
    | SpectralRadiusConfig
    | BoundedConfig,
    Field(discriminator="kind"),
]
ORTHOGONAL = ("cayley", "exponential", "householder")
"""Kinds whose every matrix is orthogonal."""


class Parametrization(nn.Module):
    """Free numbers -> the weight of a structure.

    Args:
        structure: whose `weight` it is to make.

    Attributes:
        start: where it starts if the configuration says nothing; None leaves that to the structure.
    """

    start: InitializationConfig | None = None

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        assert structure.square_shape is not None
        self.weight_shape, self.square_shape = structure.weight.shape, structure.square_shape

    def forward(self, original: Tensor) -> Tensor:
        with exact(original):
            if original.dtype in (torch.bfloat16, torch.float16):
                original = original.float()
            return self.matrices(original).reshape(self.weight_shape)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Free numbers whose weight this is, or one near it."""
        return self.free_numbers(weight.reshape(self.square_shape).double()).to(weight.dtype)

    def matrices(self, original: Tensor) -> Tensor:
        """Free numbers -> square matrices (..., P, P)."""
        raise TypeError(f"{type(self).__name__} lacks matrices")

    def free_numbers(self, matrices: Tensor) -> Tensor:
        """Square matrices (..., P, P) -> free numbers."""
        return matrices.reshape(self.weight_shape)


def exact(x: Tensor) -> contextlib.AbstractContextManager[Any]:
    """No autocast: there is no half-precision solver, and an orthogonal matrix of 8 bits is none."""
    return torch.autocast(x.device.type, enabled=False)


class _Triangle(Parametrization):
    """A parametrisation whose free numbers fill a strict triangle: P (P - 1) / 2 of them for each matrix."""

    upper = True
    places: Tensor

    def __init__(self, structure: Structure) -> None:
        super().__init__(structure)
        size = self.square_shape[-1]
        rows, columns = torch.triu_indices(size, size, 1) if self.upper else torch.tril_indices(size, size, -1)
        self.register_buffer("places", rows * size + columns, persistent=False)

    def triangle(self, original: Tensor) -> Tensor:
        """(..., P (P - 1) / 2) -> (..., P, P) with zeros elsewhere."""
        size = self.square_shape[-1]
        flat = original.new_zeros(*original.shape[:-1], size * size)
        return flat.index_copy(-1, self.places, original).unflatten(-1, (size, size))

    def numbers(self, matrices: Tensor) -> Tensor:
        """The inverse of `triangle`."""
        return matrices.flatten(-2)[..., self.places]


class _Inverse(torch.autograd.Function):
    """The inverse, whose gradient -V^T G V^T is two products by the faster library: `kernels.products`."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor) -> Tensor:
        inverse = torch.linalg.inv_ex(matrix).inverse
        ctx.save_for_backward(inverse)
        return inverse

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (inverse,) = ctx.saved_tensors
        if inverse.shape[:-2].numel() == 1:
            v, g = inverse.flatten(0, -2), grad.flatten(0, -2)
            return -products.linear(products.linear(v.T, g.T), v).view_as(grad)
        return -inverse.mT @ grad @ inverse.mT


class Cayley(_Triangle):
    """W = (I + A)^-1 (I - A) D with A skew-symmetric and D diagonal, the last round(share P) of whose entries are -1.

    Every orthogonal matrix has this form with some D, so D, which is fixed, decides which ones are far away. One
    inverse M = (I + A)^-1 serves forward, W = (2 M - I) D, and backward: autograd through it is the paper's
    dL/dA = V^T - V with V = (I + A)^-T dL/dW (D + W^T), as D + W^T = 2 D M^T.

    Assigning a rotation Q gives the weight Q D.

    Source: Helfrich, Willmott & Ye 2018, arXiv:1707.09520, section 3.
    """

    start = RotationsConfig(low=0.0, high=torch.pi / 2)
    signs: Tensor

    def __init__(self, structure: Structure, negative_share: float) -> None:
        super().__init__(structure)
        size = self.square_shape[-1]
        signs = torch.ones(size)
        signs[size - round(negative_share * size) :] = -1
        self.register_buffer("signs", signs, persistent=False)

    def matrices(self, original: Tensor) -> Tensor:
        upper = self.triangle(original)
        identity = torch.eye(upper.shape[-1], dtype=upper.dtype, device=upper.device)
        inverse: Tensor = _Inverse.apply(identity + upper - upper.mT)  # its eigenvalues are 1 + i a: never zero
        return (2 * inverse - identity) * self.signs

    def free_numbers(self, matrices: Tensor) -> Tensor:
        identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype)
        return self.numbers(torch.linalg.solve(identity + matrices, identity - matrices))


class Exponential(_Triangle):
    """W = exp(A) with A skew-symmetric.

    Source: Lezcano-Casado & Martinez-Rubio 2019, arXiv:1901.08428.
    """

    start = RotationsConfig()

    def matrices(self, original: Tensor) -> Tensor:
        upper = self.triangle(original)
        return torch.linalg.matrix_exp(upper - upper.mT)

    def free_numbers(self, matrices: Tensor) -> Tensor:
        values, vectors = torch.linalg.eig(matrices)
        logarithm = torch.linalg.solve(vectors.mT, (vectors * values.log().unsqueeze(-2)).mT).mT.real
        return self.numbers((logarithm - logarithm.mT) / 2)


class Householder(_Triangle):
    """W = H_1 ... H_P, with H_j = I - 2 v v^T / |v|^2, v zero above its j-th number, which is 1, and free below.

    Assigning an orthogonal matrix gives it up to the signs of its columns.

    Source: Mhammedi et al. 2017, arXiv:1612.00188, section 3.
    """

    upper = False
    start = OrthogonalConfig()

    def matrices(self, original: Tensor) -> Tensor:
        lower = self.triangle(original)
        tau = 2 / (1 + lower.square().sum(-2))
        return torch.linalg.householder_product(lower, tau)

    def free_numbers(self, matrices: Tensor) -> Tensor:
        return self.numbers(torch.geqrf(matrices).a)


class SoftOrthogonal(Parametrization):
    """Leaves the matrices alone and answers for a penalty."""

    def __init__(self, structure: Structure, strength: float) -> None:
        super().__init__(structure)
        self.strength = strength

    def matrices(self, original: Tensor) -> Tensor:
        return original

    def penalty(self, weight: Tensor) -> Tensor:
        with exact(weight):
            w = weight.reshape(self.square_shape)
            identity = torch.eye(w.shape[-1], dtype=w.dtype, device=w.device)
            return self.strength * (w.mT @ w - identity).square().sum()


class _Scaled(Parametrization):
    """Divides each matrix by what of its size is above a bound."""

    def __init__(self, structure: Structure, bound: float) -> None:
        super().__init__(structure)
        self.bound = bound

    def size(self, matrices: Tensor) -> Tensor:
        """(..., P, P) -> (...)"""
        raise TypeError(f"{type(self).__name__} lacks size")

    def matrices(self, original: Tensor) -> Tensor:
        w = original.reshape(self.square_shape)
        return w / (self.size(w) / self.bound).clamp_min(1.0)[..., None, None]


class SpectralNorm(_Scaled):
    """By the largest singular value, exact at each look: no running estimate that a resume could miss."""

    def size(self, matrices: Tensor) -> Tensor:
        norm: Tensor = torch.linalg.matrix_norm(matrices, 2)
        return norm


class SpectralRadius(_Scaled):
    """By the largest absolute eigenvalue, exact at each look; meant for some hundred units."""

    def size(self, matrices: Tensor) -> Tensor:
        return torch.linalg.eigvals(matrices).abs().amax(-1)


class Bounded(Parametrization):
    """Clamps each number to [-bound, bound]; see `_Clamp` for the gradient."""

    def __init__(self, structure: Structure, bound: float) -> None:
        super().__init__(structure)
        self.bound = bound

    def matrices(self, original: Tensor) -> Tensor:
        clamped: Tensor = _Clamp.apply(original, self.bound)
        return clamped


class _Clamp(torch.autograd.Function):
    """Clamp whose gradient is stopped only where a step along it would lead further out.

    The usual one is zero outside, so a number that once overshot would never come back. This one does what writing the
    clamped numbers back after each step does, without writing into a parameter.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, bound: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bound = bound
        return x.clamp(-bound, bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        outwards = (x.abs() >= ctx.bound) & (x.sign() * grad < 0)
        return grad.masked_fill(outwards, 0.0), None


def attach(config: ParametrizationConfig, structure: Structure) -> None:
    """Parametrise a structure's weight, and draw it anew."""
    built = config.build(structure)
    if built is not None:
        with torch.no_grad():  # registering takes an inverse, which not every matrix has
            structure.weight.copy_(
                torch.eye(built.square_shape[-1]).expand(built.square_shape).reshape(built.weight_shape)
            )
        parametrize.register_parametrization(structure, "weight", built)
    structure.reset_parameters()
