"""Normalisation that padding, dummies and the number of ranks do not change, and dropout drawn by keys."""

from typing import Literal

import torch
from torch import Tensor, nn

from trainer import distributed, keyed


def frame_mask(lengths: Tensor, num_frames: int) -> Tensor:
    """(B,) lengths -> (B, T) bool, true on real frames."""
    return torch.arange(num_frames, device=lengths.device) < lengths[:, None]


class MaskedBatchNorm(nn.Module):
    """Batch normalisation over the real frames of a micro-batch (Ioffe & Szegedy 2015; over sequences, Laurent 2016).

    A micro-batch is the plan's, so its statistics do not depend on the number of ranks. The running ones move once a
    step, by the mean over all micro-batches of all ranks: see `update_statistics`.

    Args:
        size: D.

    Shape:
        x: (B, T, D), mask: (B, T), None for all frames -> (B, T, D); or time before rows in all three
    """

    running_mean: Tensor
    running_variance: Tensor

    def __init__(self, size: int, momentum: float = 0.05, eps: float = 1e-5) -> None:
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_variance", torch.ones(size))
        self.pending = torch.zeros(2 * size + 1)  # sums of means, of variances, number of micro-batches

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mean, variance = self.running_mean, self.running_variance
        if self.training and self.weight.requires_grad and (mask is None or bool(mask.any())):
            # A frozen one keeps its statistics.
            frames = (x.flatten(0, 1) if mask is None else x[mask]).float()
            mean = frames.mean(0)
            variance = frames.var(0, unbiased=False)
            with torch.no_grad():
                self.pending = self.pending.to(x.device)
                self.pending += torch.cat([mean, variance, mean.new_ones(1)])
        y = (x.float() - mean) * torch.rsqrt(variance + self.eps) * self.weight + self.bias
        return y.to(x.dtype)


@torch.no_grad()
def update_statistics(model: nn.Module, applied: bool) -> None:
    """Once a step, on every rank: move the running statistics, unless the step was refused."""
    norms = [m for m in model.modules() if isinstance(m, MaskedBatchNorm)]
    if not norms:
        return
    sums = distributed.sum_over_ranks(torch.cat([m.pending for m in norms]))
    for m, part in zip(norms, sums.split([len(m.pending) for m in norms]), strict=True):
        m.pending.zero_()
        if applied and part[-1] > 0 and bool(part.isfinite().all()):
            mean, variance = (part[:-1] / part[-1]).chunk(2)
            m.running_mean.lerp_(mean, m.momentum)
            m.running_variance.lerp_(variance, m.momentum)


class MaskedLayerNorm(nn.LayerNorm):
    """Layer normalisation (Ba et al. 2016) with the signature of `MaskedBatchNorm`; frames never meet."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:  # type: ignore[override]
        return super().forward(x)


class NoNorm(nn.Module):
    """Leaves its input alone."""

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return x


NormKind = Literal["none", "layer", "batch"]


def build_norm(kind: NormKind, size: int) -> nn.Module:
    """A normalisation of (B, T, size) that takes a mask."""
    if kind == "none":
        return NoNorm()
    return MaskedLayerNorm(size) if kind == "layer" else MaskedBatchNorm(size)


class LayerScale(nn.Module):
    """Learned factors, one a unit, on what a layer adds to its input: at first deep stacks are as shallow ones.

    Args:
        size: D.
        start: of all factors.

    Shape:
        x: (..., D) -> (..., D)

    Source: Touvron et al. 2021, arXiv:2103.17239.
    """

    def __init__(self, size: int, start: float) -> None:
        super().__init__()
        self.start = start
        self.weight = nn.Parameter(torch.full((size,), start))

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.start)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class KeyedDropout(nn.Module):
    """Dropout (Srivastava et al. 2014) whose mask is a function of (seed, epoch, sample) and of the layer's name.

    So a sample meets the same mask in whatever batch, on whatever rank, and when it is computed again.

    Args:
        rate: share of values set to zero.
        name: tells this layer from the others.

    Shape:
        x: (B, T, D), noise_keys: (B,) int64 -> (B, T, D)
    """

    def __init__(self, rate: float, name: str) -> None:
        super().__init__()
        self.rate, self.name = rate, name

    def forward(self, x: Tensor, noise_keys: Tensor | None) -> Tensor:
        if not self.training or not self.rate or noise_keys is None:
            return x
        keep = torch.empty(x.shape)
        generator = torch.Generator()
        for b, seed in enumerate(keyed.fold(noise_keys, self.name)):
            generator.manual_seed(seed)
            keep[b].uniform_(generator=generator)  # row by row: a longer padding only adds rows
        # In a third of the time that bernoulli_ takes.
        return x * keep.ge_(self.rate).to(x.device).mul_(1 / (1 - self.rate)).to(x.dtype)
