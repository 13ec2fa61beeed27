"""Diagonal recurrence: every hidden unit sees itself alone."""

from typing import Literal

import torch
from torch import Tensor

from trainer.config import Config
from trainer.models.structure.base import Structure


class DiagonalConfig(Config):
    """With a relu cell and the parametrisation `bounded` it is IndRNN (Li et al. 2018, arXiv:1803.04831)."""

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
        super().__init__(hidden_size, num_gates, (num_gates, hidden_size))
        self.reset_parameters()

    @property
    def square_shape(self) -> tuple[int, ...]:
        return (self.num_gates, self.hidden_size, 1, 1)

    def own_start(self) -> Tensor:
        return torch.rand(self.weight.shape)

    def places(self) -> Tensor:
        size = self.hidden_size
        return (torch.arange(self.num_gates)[:, None] * size * size + torch.arange(size) * (size + 1)).flatten()

    def forward(self, h: Tensor) -> Tensor:
        return (self.weight * h.unsqueeze(-2)).flatten(-2)

    def blocks(self) -> Tensor:
        return self.weight
