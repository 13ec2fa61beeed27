"""From hidden states to log-probabilities of many classes: all at once, or the frequent ones first.

The loss is computed together with its gradient, in the buffer of the logits: for ten thousand words, passes over more
memory than that are felt.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, field_validator
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kernels import products
from trainer.config import Config

BUFFER = 1 << 26
"""Numbers of a buffer of probabilities, at most."""
SMALLEST = 1e-38
"""Probabilities below count as this, so that a loss is finite where float32 has no such number."""


def linear_nats(x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Sum of the cross-entropies, in nats, of softmax(W x + b) at the targets. A target below 0 counts nothing.

    Shape:
        x: (N, D), weight: (V, D), bias: (V,), targets: (N,) int64 -> ()
    """
    needed = torch.is_grad_enabled() and any(t.requires_grad for t in (x, weight, bias))
    nats: Tensor = _LinearNats.apply(x, weight, bias, targets, needed)
    return nats


class _LinearNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, needed: bool) -> Tensor:
        total = torch.zeros((), device=x.device)
        dx, dw, db = torch.empty_like(x), None, None
        rows = max(1, BUFFER // len(weight))
        for start in range(0, len(x), rows):
            some = x[start : start + rows]
            p = products.linear(some, weight, bias).float()
            total += _softmax(p, targets[start : start + rows])
            if needed:
                dx[start : start + rows] = products.linear(p, weight.T)
                part = products.linear(p.T, some.T).to(weight.dtype)
                dw = part if dw is None else dw.add_(part)
                db = p.sum(0) if db is None else db.add_(p.sum(0))
        ctx.gradients = (
            (dx, dw, db) if dw is not None else (dx.zero_(), torch.zeros_like(weight), torch.zeros_like(bias))
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw, db = ctx.gradients
        del ctx.gradients
        return dx.mul_(grad), dw.mul_(grad), db.mul_(grad), None, None


def _softmax(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy of some rows; the logits become its gradient after them."""
    counts, places = targets >= 0, targets.clamp(min=0)[:, None]
    torch.softmax(logits, 1, out=logits)
    at_target = logits.gather(1, places)
    logits.scatter_(1, places, at_target - 1)
    if not bool(counts.all()):
        logits *= counts[:, None]
    return -(at_target[:, 0].clamp(min=SMALLEST).log() * counts).sum()


class FullConfig(Config):
    """All classes at once."""

    kind: Literal["full"] = "full"

    def build(self, num_classes: int, size: int, tied: Tensor | None) -> "FullSoftmax":
        return FullSoftmax(num_classes, size, tied)


class AdaptiveConfig(Config):
    """The frequent classes and the names of clusters of rarer ones first, then one cluster (Grave et al. 2017,
    arXiv:1609.04309). Classes are numbered from the most frequent on.

    Where the weights are those of the embedding, a cluster has their full width, as in Merity et al. 2018,
    arXiv:1803.08240.
    """

    kind: Literal["adaptive"] = "adaptive"
    cutoffs: tuple[int, ...] = (2000,)
    """Where the clusters begin, e.g. [2000, 10000]; the last one ends with the vocabulary."""
    divide_by: PositiveFloat = Field(4.0, ge=1)
    """Each cluster is so many times narrower than the one before it; not where weights are tied."""

    @field_validator("cutoffs")
    @classmethod
    def _rising(cls, cutoffs: tuple[int, ...]) -> tuple[int, ...]:
        if not cutoffs or any(a >= b for a, b in zip((0, *cutoffs), cutoffs, strict=False)):
            raise ValueError("wanted numbers above 0 that rise, e.g. [2000, 10000]")
        return cutoffs

    def build(self, num_classes: int, size: int, tied: Tensor | None) -> "AdaptiveSoftmax":
        return AdaptiveSoftmax(num_classes, size, tied, self.cutoffs, self.divide_by)


SoftmaxConfig = Annotated[FullConfig | AdaptiveConfig, Field(discriminator="kind")]


class FullSoftmax(nn.Module):
    """softmax(W x + b).

    Args:
        num_classes: V.
        size: D.
        tied: (V, D) weights of another module, which draws them; None has its own.

    Shape:
        x: (N, D), targets: (N,) int64, below 0 where nothing counts, or None
        returns: the sum of the cross-entropies in nats, or without targets (N, V) log-probabilities
    """

    def __init__(self, num_classes: int, size: int, tied: Tensor | None) -> None:
        super().__init__()
        self.is_tied = tied is not None
        self.weight = nn.Parameter(torch.empty(num_classes, size)) if tied is None else tied
        self.bias = nn.Parameter(torch.empty(num_classes))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)
        if not self.is_tied:
            nn.init.uniform_(self.weight, -0.1, 0.1)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is not None:
            return linear_nats(x, self.weight, self.bias, targets)
        return products.linear(x, self.weight, self.bias).float().log_softmax(-1)


class AdaptiveSoftmax(nn.Module):
    """See `AdaptiveConfig`; arguments and shapes as of `FullSoftmax`.

    Args:
        cutoffs: where the clusters begin.
        divide_by: how much narrower each is than the one before.

    Raises:
        ValueError: a cluster would begin behind the last class.
    """

    def __init__(
        self, num_classes: int, size: int, tied: Tensor | None, cutoffs: Sequence[int], divide_by: float
    ) -> None:
        super().__init__()
        if cutoffs[-1] >= num_classes:
            raise ValueError(f"cutoffs = {list(cutoffs)}: wanted all below the {num_classes} classes")
        self.is_tied = tied is not None
        self.edges = [*cutoffs, num_classes]
        clusters = len(cutoffs)
        self.head_size = cutoffs[0]
        if tied is not None:
            self.weight = tied
        self.head = nn.Parameter(torch.empty(clusters if self.is_tied else cutoffs[0] + clusters, size))
        """The clusters' names; the frequent classes before them, where weights are not tied."""
        self.bias = nn.Parameter(torch.empty(num_classes + clusters))
        """Of the frequent classes, of the clusters' names, of all other classes."""
        for i in range(clusters if not self.is_tied else 0):
            width = max(1, int(size / divide_by ** (i + 1)))
            setattr(self, f"down_{i}", nn.Parameter(torch.empty(width, size)))
            setattr(self, f"tail_{i}", nn.Parameter(torch.empty(self.edges[i + 1] - self.edges[i], width)))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)
        for name, p in self.named_parameters():
            if name.startswith("down"):
                nn.init.uniform_(p, -(p.shape[1] ** -0.5), p.shape[1] ** -0.5)
            elif name not in ("bias", "weight"):
                nn.init.uniform_(p, -0.1, 0.1)

    def _head(self) -> tuple[Tensor, Tensor]:
        clusters = len(self.edges) - 1
        weight = torch.cat([self.weight[: self.head_size], self.head]) if self.is_tied else self.head
        return weight, self.bias[: self.head_size + clusters]

    def _tail(self, i: int, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Input, weights and bias of cluster i."""
        a, b = self.edges[i], self.edges[i + 1]
        clusters = len(self.edges) - 1
        bias = self.bias[a + clusters : b + clusters]
        if self.is_tied:
            return x, self.weight[a:b], bias
        return products.linear(x, getattr(self, f"down_{i}")), getattr(self, f"tail_{i}"), bias

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        if targets is None:
            return self._log_probabilities(x)
        first, total = targets, []
        for i, (a, b) in enumerate(zip(self.edges, self.edges[1:], strict=False)):
            inside = (targets >= a) & (targets < b)
            first = torch.where(inside, self.head_size + i, first)
            rows = inside.nonzero()[:, 0]
            total.append(linear_nats(*self._tail(i, x.index_select(0, rows)), targets[rows] - a))
        return linear_nats(x, *self._head(), first) + torch.stack(total).sum()

    def _log_probabilities(self, x: Tensor) -> Tensor:
        head = products.linear(x, *self._head()).float().log_softmax(-1)
        parts = [head[:, : self.head_size]]
        for i in range(len(self.edges) - 1):
            tail = products.linear(*self._tail(i, x)).float().log_softmax(-1)
            parts.append(head[:, self.head_size + i, None] + tail)
        return torch.cat(parts, -1)
