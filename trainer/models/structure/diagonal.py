"""Diagonal recurrence: every hidden unit sees itself alone."""

from typing import Literal

import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.models.structure.base import Structure


class DiagonalConfig(Config):
    kind: Literal["diagonal"] = "diagonal"

    def build(self, hidden_size: int, num_gates: int) -> "Diagonal":
        return Diagonal(hidden_size, num_gates)


class Diagonal(Structure):
    """Map h to w * h for each gate; starts uniform in [0, 1].

    Args:
        hidden_size: H.
        num_gates: G.

    Source: Li et al. 2018, arXiv:1803.04831, section 3.
    """

    def __init__(self, hidden_size: int, num_gates: int) -> None:
        super().__init__()
        self.hidden_size, self.num_gates = hidden_size, num_gates
        self.weight = nn.Parameter(torch.empty(num_gates, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, 0.0, 1.0)

    def forward(self, h: Tensor) -> Tensor:
        return (self.weight * h.unsqueeze(-2)).flatten(-2)

    def dense(self) -> Tensor:
        return torch.cat([torch.diag(gate) for gate in self.weight])

    def blocks(self) -> Tensor:
        return self.weight

    def part_of(self, matrix: Tensor) -> Tensor:
        return matrix.unflatten(0, self.weight.shape).diagonal(dim1=1, dim2=2)
