"""Structures of the recurrent matrix, chosen by `kind`."""

from typing import Annotated

from pydantic import Field

from trainer.models.structure.banded import Banded, BandedConfig
from trainer.models.structure.base import Structure
from trainer.models.structure.block_diagonal import (
    BlockDiagonal,
    BlockDiagonalConfig,
    PermutedBlockDiagonal,
    PermutedBlockDiagonalConfig,
)
from trainer.models.structure.dense import Dense, DenseConfig
from trainer.models.structure.diagonal import Diagonal, DiagonalConfig
from trainer.models.structure.low_rank import LowRank, LowRankConfig
from trainer.models.structure.sparse import Sparse, SparseConfig

StructureConfig = Annotated[
    DenseConfig
    | BlockDiagonalConfig
    | PermutedBlockDiagonalConfig
    | DiagonalConfig
    | BandedConfig
    | LowRankConfig
    | SparseConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "Banded",
    "BandedConfig",
    "BlockDiagonal",
    "BlockDiagonalConfig",
    "Dense",
    "DenseConfig",
    "Diagonal",
    "DiagonalConfig",
    "LowRank",
    "LowRankConfig",
    "PermutedBlockDiagonal",
    "PermutedBlockDiagonalConfig",
    "Sparse",
    "SparseConfig",
    "Structure",
    "StructureConfig",
]
