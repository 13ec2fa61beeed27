"""Dropout in its kinds, drawn by keys: masks a frame, masks a sequence, masks a step.

Sampled masks divide by what they keep, so that evaluation needs no factor.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from trainer import keyed
from trainer.config import Config
from trainer.models.regularizers.noise import Clock, uniform

Rate = Annotated[float, Field(ge=0, lt=1)]


class DropoutConfig(Config):
    """Shares of numbers that are set to zero, independently in every frame (Srivastava et al. 2014); 0 is none.

    `model.dropout` is the same on each layer's output (Zaremba, Sutskever & Vinyals 2014, arXiv:1409.2329).
    """

    input: Rate = 0.0
    """Of the stack's input."""
    hidden: Rate = 0.0
    """Of the state that goes into the recurrent weights."""
    connections: Rate = 0.0
    """Of the recurrent weights, the same in all frames and samples of a step (DropConnect: Wan et al. 2013; on
    recurrent weights: Merity, Keskar & Socher 2017, arXiv:1708.02182)."""


class VariationalConfig(Config):
    """One mask a sequence, the same in all its frames (Gal & Ghahramani 2016, arXiv:1512.05287)."""

    input: Rate = 0.0
    hidden: Rate = 0.0
    """Of the state that goes into the recurrent weights."""
    output: Rate = 0.0
    """Of each layer's output."""


@dataclass
class Drawn:
    """What disturbs one pass of a layer over T frames of B rows with all its R H units; None or 0 is nothing."""

    mask: Tensor | None = None
    """(B, R H), or (T, B, R H) for another one each frame: times the state, before the recurrent weights."""
    noise: Tensor | None = None
    """(T, B, R H): added to the state, before the recurrent weights."""
    update: Tensor | None = None
    """(T, B, R H): times what a gated cell would write."""
    zoneout: tuple[float, float] = (0.0, 0.0)
    """Rates of h and of an LSTM's c."""
    keys: Tensor | None = None
    """(B,) int64, from which zoneout is drawn; None takes the expectation."""

    @property
    def calm(self) -> bool:
        """Whether nothing is disturbed."""
        return self.mask is self.noise is self.update is None and not any(self.zoneout)

    def needs_loop(self, cell: str) -> str | None:
        """What no kernel can do for this cell, or None."""
        if self.update is not None:
            return "dropout of the update"
        if self.mask is not None and self.mask.ndim == 3:
            return "a mask of the state that changes with the frame"
        if self.noise is not None and cell.startswith("gru"):
            return "noise on a state that a reset gate scales"  # else it is a part of the pre-activation
        return None


def keep(rate: float, seeds: Sequence[int], *shape: int) -> Tensor:
    """(len(seeds), *shape) masks: 0 with probability `rate`, else 1 / (1 - rate)."""
    return (uniform(seeds, *shape) >= rate).float().div_(1 - rate)


def drop(x: Tensor, rate: float, name: str, noise_keys: Tensor, per_sequence: bool = False) -> Tensor:
    """x (B, T, D) with a mask each frame, or one a sequence."""
    if not rate:
        return x
    shape = (1, x.shape[2]) if per_sequence else tuple(x.shape[1:])
    return x * keep(rate, keyed.fold(noise_keys, name), *shape).to(x.device, x.dtype)


def connections(weight: Tensor, rate: float, clock: Clock, name: str) -> Tensor:
    """Weights of which a share is missing in this step."""
    seed = keyed.key(clock.seed, clock.step, name, "connections")
    mask: Tensor = keep(rate, [seed], *weight.shape)[0]
    return weight * mask.to(weight.device, weight.dtype)


def bounded_rows(weight: Tensor, largest: float) -> Tensor:
    """Weights (..., D) with each unit's incoming ones scaled down to a Euclidean norm of `largest`: max-norm as a map
    that a forward pass applies, so that no step writes into a parameter (Srebro & Shraibman 2005; Srivastava et al.
    2014, section 5.1)."""
    norm = torch.linalg.vector_norm(weight, dim=-1, keepdim=True)
    return weight / (norm / largest).clamp_min(1.0)
