"""Gaussian noise whose every number is named: by the sample it disturbs, or by the step and the weight.

So a sample meets the same noise on any rank, in any batch and when it is computed again; a weight meets the same noise
on all ranks and in all micro-batches of a step.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor

from trainer import keyed
from trainer.config import Config


class ConstantDecayConfig(Config):
    """The same at every step."""

    kind: Literal["constant"] = "constant"

    def factor(self, step: int) -> float:
        return 1.0


class LinearDecayConfig(Config):
    """Straight down to nothing."""

    kind: Literal["linear"] = "linear"
    steps: PositiveInt = 1000
    """After which there is no noise."""

    def factor(self, step: int) -> float:
        return max(0.0, 1 - step / self.steps)


class ExponentialDecayConfig(Config):
    """Halved again and again."""

    kind: Literal["exponential"] = "exponential"
    half_life_steps: PositiveFloat = 1000.0

    def factor(self, step: int) -> float:
        return 0.5 ** (step / self.half_life_steps)


class PowerDecayConfig(Config):
    """The variance falls as 1 / (1 + step)^power (Welling & Teh 2011; Neelakantan et al. 2015, arXiv:1511.06807)."""

    kind: Literal["power"] = "power"
    power: PositiveFloat = 0.55

    def factor(self, step: int) -> float:
        return (1 + step) ** (-self.power / 2)


DecayConfig = Annotated[
    ConstantDecayConfig | LinearDecayConfig | ExponentialDecayConfig | PowerDecayConfig, Field(discriminator="kind")
]
"""A factor of the noise's standard deviation, by the optimizer's steps."""

Std = Annotated[float, Field(ge=0)]


class NoiseConfig(Config):
    """Standard deviations of injected noise; 0 is none (Jim, Giles & Horne 1996 compare the places)."""

    input: Std = 0.0
    """On the stack's input, after its normalisation (Bishop 1995)."""
    hidden: Std = 0.0
    """On the state that goes into the recurrent weights, anew at each frame; the state itself stays clean."""
    weights: Std = 0.0
    """On input and recurrent weights, one draw a step (Murray & Edwards 1994; Graves, Mohamed & Hinton 2013)."""
    decay: DecayConfig = ConstantDecayConfig()


@dataclass
class Clock:
    """The step that a model is in: the engine sets it before each, see `at_step`."""

    seed: int = 0
    step: int = 0


def uniform(seeds: Sequence[int], *shape: int) -> Tensor:
    """(len(seeds), *shape) numbers in [0, 1), a row from each seed: a longer row begins with the same numbers."""
    rows = torch.empty(len(seeds), *shape)
    generator = torch.Generator()
    for row, seed in zip(rows, seeds, strict=True):
        generator.manual_seed(seed)
        row.uniform_(generator=generator)
    return rows


def gaussian(seeds: Sequence[int], *shape: int) -> Tensor:
    """The same with standard normal numbers, by the inverse of their distribution."""
    half = 2.0**-24  # a uniform number is a multiple of 2^-24: the middle of its cell is never 0 or 1
    return torch.erfinv(uniform(seeds, *shape).mul_(2).add_(half - 1)).mul_(math.sqrt(2))


def of_step(clock: Clock, name: str, like: Tensor) -> Tensor:
    """Standard normal noise of a weight in this step, in the weight's shape and on its device."""
    noise = gaussian([keyed.key(clock.seed, clock.step, name, "noise")], *like.shape)[0]
    return noise.to(like.device, like.dtype)
