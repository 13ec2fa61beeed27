"""What a structure of recurrence answers."""

from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainer.models.initialization import DefaultConfig, InitializationConfig


class Structure(nn.Module):
    """The recurrent matrices of a cell, one for each gate, all of the same structure.

    `weight` holds what lies on the structure and nothing else: the rest has no parameter. It may be parametrised (see
    `trainer.models.parametrizations`); then each look at it forms it anew, so a forward pass looks once.

    Args:
        hidden_size: H.
        num_gates: G.
        weight_shape: of `weight`.

    Shape:
        h: (..., H) -> (..., G H), the gates one after the other

    Attributes:
        has_kernel: whether `kernels.recurrence` knows the structure; if not, it gets the dense matrix.
        initialization: where `weight` starts.
    """

    weight: Tensor
    has_kernel = True
    initialization: InitializationConfig = DefaultConfig()

    def __init__(self, hidden_size: int, num_gates: int, weight_shape: tuple[int, ...]) -> None:
        super().__init__()
        self.hidden_size, self.num_gates = hidden_size, num_gates
        self.weight = nn.Parameter(torch.empty(weight_shape))

    @property
    def square_shape(self) -> tuple[int, ...] | None:
        """`weight` as square matrices, (..., P, P), if it is made of such: what a parametrisation works on."""
        return None

    def own_start(self) -> Tensor:
        """Values of `weight` to start from where the configuration does not say others."""
        raise TypeError(f"{type(self).__name__} lacks own_start")

    def places(self) -> Tensor:
        """Where each number of `weight` stands in the flattened `dense()`: (N,) int64."""
        raise TypeError(f"{type(self).__name__} lacks places")

    @cached_property
    def _places(self) -> Tensor:
        return self.places()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the weights anew."""
        start = self.initialization.draw(self)
        if parametrize.is_parametrized(self, "weight"):
            self.weight = start  # by way of the parametrisation's inverse
        else:
            self.weight.copy_(start)

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.dense().T

    def dense(self) -> Tensor:
        """The matrices as one of (G H, H), so that `forward(h)` equals `h @ dense().T`."""
        return self.whole(self.weight)

    def whole(self, weight: Tensor) -> Tensor:
        """The same of other values of `weight`."""
        zeros = weight.new_zeros(self.num_gates * self.hidden_size * self.hidden_size)
        flat = zeros.index_copy(0, self._places.to(weight.device), weight.reshape(-1))
        return flat.view(self.num_gates * self.hidden_size, self.hidden_size)

    def blocks(self) -> Tensor:
        """The matrices as `kernels.recurrence` takes them: (G, K, P, P), or (G, H) diagonals."""
        return self.dense().view(self.num_gates, 1, self.hidden_size, self.hidden_size)

    def part_of(self, matrix: Tensor) -> Tensor:
        """What of (G H, H) matrices lies on the structure, in the shape of `weight`."""
        return matrix.reshape(-1)[self._places.to(matrix.device)].view(self.weight.shape)

    def rest_of(self, matrix: Tensor) -> Tensor:
        """(G H, H) matrices with zeros on the structure."""
        return matrix.reshape(-1).index_fill(0, self._places.to(matrix.device), 0.0).view(matrix.shape)

    def scaled(self, factors: Tensor) -> Tensor:
        """`weight` with each row of the matrices multiplied by a number of `factors`, (G, H) or (G, 1)."""
        return self.part_of(self.dense() * factors.expand(-1, self.hidden_size).reshape(-1, 1))

    def num_weights(self) -> int:
        """Free numbers: what is trained and saved."""
        return sum(p.numel() for p in self.parameters())

    def multiply_adds(self) -> int:
        """Multiplications of one step of one row that the structure asks for."""
        return self.weight.numel()


def uniform(shape: torch.Size, bound: float) -> Tensor:
    """Numbers in [-bound, bound], as torch's own cells start."""
    return torch.empty(shape).uniform_(-bound, bound)
