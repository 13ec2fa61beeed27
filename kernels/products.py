"""Products of float32 matrices on a CPU, by whichever of torch's two libraries is faster there.

torch takes MKL, which on AMD's processors leaves AVX-512 alone and so half of what they can do (docs/results.md);
oneDNN, which torch brings too and uses for its LSTM, does not. The choice depends on the processor alone, so a run that
goes on on the same machine computes the same bits.
"""

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.cpu import instruction_set

LARGE = 1 << 20
"""Multiply-adds from which on it matters; below, calling oneDNN takes longer."""


@lru_cache(maxsize=1)
def prefers_onednn() -> bool:
    """Whether this processor's products go to oneDNN."""
    try:
        amd = "AuthenticAMD" in Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return amd and instruction_set() == "avx512" and has_onednn()


def has_onednn() -> bool:
    """Whether this torch can call it."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def takes(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` would hand x W^T to oneDNN, for x (N, D) and W (V, D)."""
    return (
        x.device.type == "cpu"
        and x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LARGE
        and not torch.is_autocast_enabled("cpu")
        and prefers_onednn()
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, as `torch.nn.functional.linear`, with gradients of any order.

    Shape:
        x: (N, D), weight: (V, D), bias: (V,) or None -> (N, V)
    """
    if not takes(x, weight):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        dx = linear(grad, weight.T) if needs_x else None
        dw = outer(grad, x) if needs_weight else None
        return dx, dw, grad.sum(0) if needs_bias else None


def outer(grad: Tensor, x: Tensor) -> Tensor:
    """grad^T x, for grad (N, V) and x (N, D).

    oneDNN wants the rows of the first factor in one piece and takes the second as it lies. So what is copied is either
    grad, or x and the result: whichever is less.
    """
    rows, wide, narrow = len(x), grad.shape[1], x.shape[1]
    if rows * wide > (rows + wide) * narrow:
        return linear(x.T, grad.T).T.contiguous()
    return linear(grad.T, x.T)
