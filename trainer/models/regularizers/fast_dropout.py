"""Fast dropout: means and variances go through the net, instead of samples.

Under dropout each pre-activation is a sum of many independent terms, so nearly Gaussian. Its mean and variance are
known without sampling, and so are those of what a sigmoid, tanh or relu makes of it. So the expected output is trained,
and evaluation computes the very same.

Source: Wang & Manning 2013 (ICML); for recurrent nets Bayer et al. 2013, arXiv:1311.0701. Formulae as in the second
author's code, but for tanh, which stands there for tanh(x / 2).
"""

import math
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from kernels import products
from kernels.moments import Moments, moments, reference, tanh
from kernels.say import say_once
from trainer.config import Config
from trainer.models.block import Block
from trainer.models.regularizers.dropout import Rate

SMALLEST = 1e-8
"""Variance that a learnt one does not fall below."""
POINTS = 64
"""Of the quadrature."""


class FastDropoutConfig(Config):
    """Rates of the dropout that is integrated out; a cell that is a tanh or relu net."""

    input: Rate = 0.1
    hidden: Rate = 0.2
    """Of the state, to the next frame and to the next layer."""
    output: Rate = 0.5
    """Of the last layer's state, to what is read from it. Piano rolls take its variance, other recipes the mean."""
    moments: Literal["closed", "quadrature"] = "closed"
    """Of sigmoid and tanh: closed formulae, whose variance is off by up to 0.03, or Gauss-Hermite, exact to 1e-4 and
    slower."""


def affine(mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor | None = None) -> Moments:
    """x W^T + b of independent x: (m W^T + b, v (W o W)^T)."""
    means, variances = (x.reshape(-1, x.shape[-1]) for x in (mean, variance))
    of_mean, of_variance = products.linear(means, weight, bias), products.linear(variances, weight.square())
    shape = *mean.shape[:-1], len(weight)
    return of_mean.view(shape), of_variance.view(shape)


def sigmoid_mean_by_quadrature(mean: Tensor, variance: Tensor) -> Tensor:
    """The same by Gauss-Hermite: ln E s(x) - ln E s(-x), finite where either is next to nothing."""
    x, w = (torch.as_tensor(part, dtype=mean.dtype, device=mean.device) for part in _nodes(POINTS))
    values = mean[..., None] + (variance + SMALLEST).sqrt()[..., None] * x
    on, off = ((nn.functional.logsigmoid(sign * values) + w.log()).logsumexp(-1) for sign in (1, -1))
    return on - off


def relu(mean: Tensor, variance: Tensor) -> Moments:
    """max(x, 0), exactly: E = m Phi + sd phi, E x^2 = (m^2 + v) Phi + m sd phi, at m / sd."""
    sd = (variance + SMALLEST).sqrt()
    z = mean / sd
    density = torch.exp(-z.square() / 2) / math.sqrt(2 * math.pi)
    share = torch.special.ndtr(z)
    expected = mean * share + sd * density
    square = (mean.square() + sd.square()) * share + mean * sd * density
    return expected, (square - expected.square()).clamp_min(0.0)


@lru_cache(maxsize=2)
def _nodes(points: int) -> tuple[Any, Any]:
    x, w = np.polynomial.hermite_e.hermegauss(points)
    return x, w / w.sum()


def quadrature(function: Any, mean: Tensor, variance: Tensor, points: int = POINTS) -> Moments:
    """f(x) of a Gaussian x by Gauss-Hermite quadrature."""
    x, w = (torch.as_tensor(part, dtype=mean.dtype, device=mean.device) for part in _nodes(points))
    values = function(mean[..., None] + (variance + SMALLEST).sqrt()[..., None] * x)
    expected = values @ w
    return expected, (values - expected[..., None]).square() @ w


class MomentLayer(Block, nn.ModuleList):
    """One layer whose state is a distribution.

    Args:
        way: a `RecurrentLayer` of a tanh or relu net.
        config: see there.

    Shape:
        mean, variance: (T, B, D) of the input, lengths are not needed: past them nothing is read
        returns: mean and variance (T, B, H) of the state after each frame
    """

    def __init__(self, way: Any, config: FastDropoutConfig) -> None:
        super().__init__([way])
        self.config = config
        self.start_mean = nn.Parameter(torch.zeros(way.hidden_size))
        self.start_sd = nn.Parameter(torch.zeros(way.hidden_size))

    def compute(self, mean: Tensor, variance: Tensor) -> Moments:
        (way,) = self
        weight_ih, weight_hh = way.weights()  # type: ignore[operator]
        if weight_hh.ndim == 2:
            weight_hh = torch.diag(weight_hh[0])
        elif weight_hh.ndim == 4:
            weight_hh = torch.block_diag(*weight_hh[0])
        u_mean, u_variance = affine(mean, variance, weight_ih, way.bias_ih + way.bias_hh)  # type: ignore[operator]
        shape = u_mean.shape[1:]
        m0, v0 = self.start_mean.expand(shape), (self.start_sd.square() + SMALLEST).expand(shape)
        rate = self.config.hidden
        if way.cell.name == "rnn_tanh" and self.config.moments == "closed":  # type: ignore[union-attr]
            return moments(u_mean, u_variance, weight_hh, m0, v0, rate)
        say_once(
            "fast_dropout: the reference loop (plain PyTorch, slow); the kernel knows closed moments of tanh alone"
        )
        return reference(u_mean, u_variance, weight_hh, m0, v0, rate, self.activation)

    def activation(self, mean: Tensor, variance: Tensor) -> Moments:
        """Moments of the cell's function."""
        (way,) = self
        if way.cell.name == "rnn_relu":  # type: ignore[union-attr]
            return relu(mean, variance)
        return quadrature(torch.tanh, mean, variance) if self.config.moments == "quadrature" else tanh(mean, variance)
