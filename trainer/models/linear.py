"""Products of frames and weights, time-major, and frames turned round."""

from typing import Any

import torch
from torch import Tensor, nn

from kernels import products


def recurrent_term(matrix: Tensor, h: Tensor) -> Tensor:
    """W h of all frames at once.

    Shape:
        matrix: as `Structure.blocks` gives it, h: (T, B, H) -> (T, B, G H)
    """
    if matrix.ndim == 2:
        return (matrix * h[..., None, :]).flatten(-2)
    if matrix.shape[1] == 1:
        return products.linear(h.flatten(0, 1), matrix.flatten(0, 2)).unflatten(0, h.shape[:2])
    blocks = h.unflatten(-1, (matrix.shape[1], -1))
    return torch.einsum("gkpq,tbkq->tbgkp", matrix, blocks).flatten(2)


THIN = 16
"""Sizes of an input or output up to which `linear` takes a product a frame."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x W^T + b, where x or the result is thin by way of a small product for each frame: for one that is tall and thin
    the CPU's matrix library takes two to four times as long (docs/results.md).

    Shape:
        x: (T, B, D), weight: (V, D), bias: (V,) -> (T, B, V)
    """
    if not x.is_cuda:
        if 1 < x.shape[-1] <= THIN:
            matrices = weight.T.expand(len(x), -1, -1)
            return torch.bmm(x, matrices) if bias is None else torch.baddbmm(bias, x, matrices)
        if 1 < len(weight) <= THIN and bias is not None and not torch.is_autocast_enabled(x.device.type):
            thin: Tensor = _ThinOutput.apply(x, weight, bias)
            return thin
    return products.linear(x.flatten(0, 1), weight, bias).unflatten(0, x.shape[:2])


class _ThinOutput(torch.autograd.Function):
    """A linear map to few numbers: only the gradient that goes back through it is thin, and taken frame by frame."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        dx = torch.bmm(grad, weight.expand(len(grad), -1, -1))
        return dx, grad.flatten(0, 1).T @ x.flatten(0, 1), grad.sum((0, 1))


class Linear(nn.Linear):
    """`torch.nn.Linear`, by whichever of torch's libraries is faster on this processor: `kernels.products`."""

    def forward(self, x: Tensor) -> Tensor:
        if not products.takes(x, self.weight):
            return super().forward(x)
        return products.linear(x.flatten(0, -2), self.weight, self.bias).unflatten(0, x.shape[:-1])


def reverse_rows(x: Tensor, lengths: Tensor | None) -> Tensor:
    """Turn each row of (T, B, D) round inside its own length; what is past it stays where it is."""
    if lengths is None:
        return x.flip(0)
    t = torch.arange(x.shape[0], device=x.device)[:, None]
    index = torch.where(t < lengths, lengths - 1 - t, t)  # (T, B)
    return x.gather(0, index[..., None].expand_as(x))
