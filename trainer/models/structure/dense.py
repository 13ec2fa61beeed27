"""Dense recurrence: every hidden unit sees every other."""

from typing import Literal

import torch
from torch import Tensor

from trainer.config import Config
from trainer.models.structure.base import Structure, uniform


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
        super().__init__(hidden_size, num_gates, (num_gates * hidden_size, hidden_size))
        self.reset_parameters()

    @property
    def square_shape(self) -> tuple[int, ...]:
        return (self.num_gates, self.hidden_size, self.hidden_size)

    def own_start(self) -> Tensor:
        return uniform(self.weight.shape, self.hidden_size**-0.5)

    def places(self) -> Tensor:
        return torch.arange(self.num_gates * self.hidden_size**2)

    def dense(self) -> Tensor:
        return self.weight
