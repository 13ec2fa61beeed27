"""Block-diagonal recurrence: hidden units interact only inside their own block."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from trainer.config import Config
from trainer.models.structure.base import Structure


class BlockDiagonalConfig(Config):
    kind: Literal["block_diagonal"] = "block_diagonal"
    num_blocks: PositiveInt = 8
    """Equal blocks on the diagonal; must divide the hidden size."""

    def build(self, hidden_size: int, num_gates: int) -> "BlockDiagonal":
        return BlockDiagonal(hidden_size, num_gates, self.num_blocks)


class BlockDiagonal(Structure):
    """Map h to W h, where each gate's W has K blocks of P x P on its diagonal and H = K P.

    A step costs H P multiply-adds a gate instead of H^2; K = 1 is dense, K = H is diagonal.

    Args:
        hidden_size: H.
        num_gates: G.
        num_blocks: K.

    Raises:
        ValueError: `num_blocks` does not divide `hidden_size`.

    Source: the heads of FlashRNN, Pöppel, Beck & Hochreiter 2024, arXiv:2412.07752.
    """

    def __init__(self, hidden_size: int, num_gates: int, num_blocks: int) -> None:
        super().__init__()
        if hidden_size % num_blocks:
            raise ValueError(f"num_blocks={num_blocks} does not divide hidden_size={hidden_size}")
        self.hidden_size, self.num_gates = hidden_size, num_gates
        size = hidden_size // num_blocks
        self.weight = nn.Parameter(torch.empty(num_gates, num_blocks, size, size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.weight.shape[-1] ** -0.5
        nn.init.uniform_(self.weight, -bound, bound)

    def forward(self, h: Tensor) -> Tensor:
        blocks = h.unflatten(-1, self.weight.shape[1:3])  # (..., K, P)
        return torch.einsum("gkpq,...kq->...gkp", self.weight, blocks).flatten(-3)

    def dense(self) -> Tensor:
        return torch.cat([torch.block_diag(*gate) for gate in self.weight])

    def blocks(self) -> Tensor:
        return self.weight

    def part_of(self, matrix: Tensor) -> Tensor:
        _, num_blocks, size, _ = self.weight.shape
        blocks = matrix.view(self.num_gates, num_blocks, size, num_blocks, size)  # gate, rows' block, row, ...
        return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)  # (G, K, P, P)
