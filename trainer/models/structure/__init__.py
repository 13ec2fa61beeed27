"""Structures of the recurrent matrix: one file each, chosen by `kind`."""

from typing import Annotated

from pydantic import Field

from trainer.models.structure.base import Structure
from trainer.models.structure.block_diagonal import BlockDiagonal, BlockDiagonalConfig
from trainer.models.structure.dense import Dense, DenseConfig
from trainer.models.structure.diagonal import Diagonal, DiagonalConfig

StructureConfig = Annotated[DenseConfig | BlockDiagonalConfig | DiagonalConfig, Field(discriminator="kind")]

__all__ = [
    "BlockDiagonal",
    "BlockDiagonalConfig",
    "Dense",
    "DenseConfig",
    "Diagonal",
    "DiagonalConfig",
    "Structure",
    "StructureConfig",
]
