"""Banded recurrence: a hidden unit sees its neighbours."""

from typing import Literal

import torch
from pydantic import NonNegativeInt
from torch import Tensor

from trainer.config import Config
from trainer.models.structure.base import Structure, uniform


class BandedConfig(Config):
    kind: Literal["banded"] = "banded"
    half_width: NonNegativeInt = 8
    """Neighbours seen on each side; 0 is diagonal."""

    def build(self, hidden_size: int, num_gates: int) -> "Banded":
        return Banded(hidden_size, num_gates, self.half_width)


class Banded(Structure):
    """Map h to W h, where W has 2 b + 1 diagonals: H (2 b + 1) - b (b + 1) numbers a gate.

    Args:
        hidden_size: H.
        num_gates: G.
        half_width: b, less than H.

    Raises:
        ValueError: `half_width` reaches beyond the matrix.
    """

    has_kernel = False

    def __init__(self, hidden_size: int, num_gates: int, half_width: int) -> None:
        if half_width >= hidden_size:
            raise ValueError(f"half_width={half_width} is not less than hidden_size={hidden_size}")
        self.offsets = range(-half_width, half_width + 1)
        super().__init__(hidden_size, num_gates, (num_gates, sum(hidden_size - abs(o) for o in self.offsets)))
        self.reset_parameters()

    def own_start(self) -> Tensor:
        return uniform(self.weight.shape, len(self.offsets) ** -0.5)

    def places(self) -> Tensor:
        size = self.hidden_size
        diagonals = [torch.arange(size * size).view(size, size).diagonal(o) for o in self.offsets]
        return (torch.arange(self.num_gates)[:, None] * size * size + torch.cat(diagonals)).flatten()

    def forward(self, h: Tensor) -> Tensor:
        size, outputs = self.hidden_size, []
        for gate in self.weight:
            y = torch.zeros_like(h)
            for o, w in zip(self.offsets, gate.split([size - abs(o) for o in self.offsets]), strict=True):
                rows, columns = slice(max(0, -o), size - max(0, o)), slice(max(0, o), size - max(0, -o))
                y[..., rows] = y[..., rows] + w * h[..., columns]
            outputs.append(y)
        return torch.cat(outputs, -1)
