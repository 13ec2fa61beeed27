"""Dense recurrence: every hidden unit sees every other."""

from typing import Literal

import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.models.structure.base import Structure


class DenseConfig(Config):
    kind: Literal["dense"] = "dense"

    def build(self, hidden_size: int, num_gates: int) -> "Dense":
        return Dense(hidden_size, num_gates)


class Dense(Structure):
    """Map h to W h with a full matrix a gate; starts uniform in +-1/sqrt(H), as torch's cells do.

    Args:
        hidden_size: H.
        num_gates: G.
    """

    def __init__(self, hidden_size: int, num_gates: int) -> None:
        super().__init__()
        self.hidden_size, self.num_gates = hidden_size, num_gates
        self.weight = nn.Parameter(torch.empty(num_gates * hidden_size, hidden_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.hidden_size**-0.5), self.hidden_size**-0.5)

    def forward(self, h: Tensor) -> Tensor:
        return h @ self.weight.T

    def dense(self) -> Tensor:
        return self.weight

    def blocks(self) -> Tensor:
        return self.weight.view(self.num_gates, 1, self.hidden_size, self.hidden_size)

    def part_of(self, matrix: Tensor) -> Tensor:
        return matrix
