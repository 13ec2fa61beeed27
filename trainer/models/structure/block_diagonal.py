"""Block-diagonal recurrence: hidden units interact only inside their own block, or are dealt anew at each step."""

from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor

from trainer.config import Config
from trainer.models.structure.base import Structure, uniform


class BlockDiagonalConfig(Config):
    kind: Literal["block_diagonal"] = "block_diagonal"
    num_blocks: PositiveInt = 8
    """Equal blocks on the diagonal; must divide the hidden size."""

    def build(self, hidden_size: int, num_gates: int) -> "BlockDiagonal":
        return BlockDiagonal(hidden_size, num_gates, self.num_blocks)


class PermutedBlockDiagonalConfig(Config):
    kind: Literal["permuted_block_diagonal"] = "permuted_block_diagonal"
    num_blocks: PositiveInt = 8
    """Equal blocks; must divide the hidden size."""

    def build(self, hidden_size: int, num_gates: int) -> "PermutedBlockDiagonal":
        return PermutedBlockDiagonal(hidden_size, num_gates, self.num_blocks)


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
        if hidden_size % num_blocks:
            raise ValueError(f"num_blocks={num_blocks} does not divide hidden_size={hidden_size}")
        self.num_blocks, self.block_size = num_blocks, hidden_size // num_blocks
        super().__init__(hidden_size, num_gates, (num_gates, num_blocks, self.block_size, self.block_size))
        self.reset_parameters()

    @property
    def square_shape(self) -> tuple[int, ...]:
        return (self.num_gates, self.num_blocks, self.block_size, self.block_size)

    def own_start(self) -> Tensor:
        return uniform(self.weight.shape, self.block_size**-0.5)

    def places(self) -> Tensor:
        return self._rows(torch.arange(self.hidden_size))

    def _rows(self, row_of: Tensor) -> Tensor:
        """Places of the blocks' numbers, when their row r of all (H,) stands in row `row_of[r]` of the matrix."""
        size = self.hidden_size
        gates = torch.arange(self.num_gates)[:, None, None] * size * size
        columns = torch.arange(size).view(self.num_blocks, 1, -1).expand(-1, self.block_size, -1).flatten(0, 1)
        return (gates + (row_of * size)[:, None] + columns).flatten()

    def forward(self, h: Tensor) -> Tensor:
        return self._gates(h).flatten(-3)

    def _gates(self, h: Tensor) -> Tensor:
        """(..., H) -> (..., G, K, P)"""
        return torch.einsum("gkpq,...kq->...gkp", self.weight, h.unflatten(-1, (self.num_blocks, -1)))

    def blocks(self) -> Tensor:
        return self.weight


class PermutedBlockDiagonal(BlockDiagonal):
    """Map h to S W h: blocks, and then a perfect shuffle S that deals the units of each block to all of them.

    Unit p of block k goes to place p K + k. So what one block knows reaches every other within log H / log P steps, at
    the price of no weight. No kernel keeps blocks in a core's cache whose inputs come from everywhere.
    """

    has_kernel = False

    def places(self) -> Tensor:
        return self._rows(torch.arange(self.hidden_size).view(-1, self.num_blocks).T.flatten())

    def forward(self, h: Tensor) -> Tensor:
        return self._gates(h).transpose(-1, -2).flatten(-3)

    def blocks(self) -> Tensor:
        return Structure.blocks(self)
