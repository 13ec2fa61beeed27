"""Low-rank recurrence: all that a step keeps of the state goes through a few numbers."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from trainer.config import Config
from trainer.models.structure.base import Structure, uniform


class LowRankConfig(Config):
    kind: Literal["low_rank"] = "low_rank"
    rank: PositiveInt = 16

    def build(self, hidden_size: int, num_gates: int) -> "LowRank":
        return LowRank(hidden_size, num_gates, self.rank)


class LowRank(Structure):
    """Map h to A B^T h with A and B of (H, R) for each gate: 2 H R numbers.

    Starts with the variance of a dense matrix's entries.

    Args:
        hidden_size: H.
        num_gates: G.
        rank: R.
    """

    has_kernel = False

    def __init__(self, hidden_size: int, num_gates: int, rank: int) -> None:
        self.rank = rank
        super().__init__(hidden_size, num_gates, (2, num_gates, hidden_size, rank))
        self.reset_parameters()

    def own_start(self) -> Tensor:
        return uniform(self.weight.shape, (3 / (self.rank * self.hidden_size)) ** 0.25)

    def forward(self, h: Tensor) -> Tensor:
        a, b = self.weight
        return torch.einsum("ghr,...gr->...gh", a, torch.einsum("ghr,...h->...gr", b, h)).flatten(-2)

    def scaled(self, factors: Tensor) -> Tensor:
        a, b = self.weight
        return torch.stack([a * factors[..., None], b])

    def dense(self) -> Tensor:
        a, b = self.weight
        return (a @ b.mT).flatten(0, 1)
