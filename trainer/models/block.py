"""A part of a model that is handled as one where memory is short."""

from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """Base of a module whose `compute` may be run again in the backward pass instead of keeping what it computed.

    Noise is drawn by keys, so a second run gives the same values.

    Attributes:
        recompute: whether to run it again; set for a whole model by `recompute_blocks`.
    """

    recompute = False

    def compute(self, *inputs: Any) -> Any:
        raise TypeError(f"{type(self).__name__} lacks compute")

    def forward(self, *inputs: Any) -> Any:
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(self.compute, *inputs, use_reentrant=False, preserve_rng_state=False)
        return self.compute(*inputs)


def recompute_blocks(model: nn.Module, recompute: bool) -> None:
    """Activation checkpointing (Chen et al. 2016, arXiv:1604.06174): keep the inputs of each block alone."""
    for module in model.modules():
        if isinstance(module, Block):
            module.recompute = recompute
