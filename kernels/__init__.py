"""Recurrent operators whose weights persist over time. Imports torch and nothing of ours.

    recurrence(u, weight, ..., cell=...)         every cell and structure; the others are short names of it
    block_rnn, block_gru, block_lstm             weights (gates, K, P, P): K blocks on the diagonal, K = 1 is dense
    diagonal_rnn, diagonal_gru, diagonal_lstm    weights (gates, H): every unit sees itself alone

All are time-major. `kernels.reference` is the definition, `kernels.cpu` (C++) and `kernels.gpu` (Triton) are the fast
paths. `explain` says which one a call takes, `selftest` proves it on this machine, `pack` keeps packed weights over
many calls. `kernels.moments` is a recurrence of means and variances; `kernels.log_mel` (features of sound) and
`kernels.ctc` (the loss of a recogniser) are none.
"""

from typing import Any

from torch import Tensor

from kernels.cases import selftest
from kernels.cpu import keep_pages
from kernels.ops import explain, pack, recurrence, unsupported

__all__ = [
    "block_gru",
    "block_lstm",
    "block_rnn",
    "diagonal_gru",
    "diagonal_lstm",
    "diagonal_rnn",
    "explain",
    "keep_pages",
    "pack",
    "recurrence",
    "selftest",
    "unsupported",
]


def block_rnn(
    u: Tensor, weight: Tensor, h0: Tensor | None = None, *, activation: str = "tanh", **options: Any
) -> tuple[Tensor, Tensor]:
    """h_t = f(u_t + W h_{t-1}): (y, last h). Activations: tanh, relu, identity, modrelu; options as of `recurrence`."""
    y, h, _ = recurrence(u, weight, h0, cell=f"rnn_{activation}", **options)
    return y, h


def block_gru(
    u: Tensor, weight: Tensor, h0: Tensor | None = None, *, reset: str = "after", **options: Any
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit: (y, last h). `reset`: "after" the recurrent weights, as torch does, or "before" them."""
    if reset not in ("after", "before"):
        raise ValueError(f"reset is {reset!r}, wanted 'after' or 'before'")
    y, h, _ = recurrence(u, weight, h0, cell="gru" if reset == "after" else "gru_original", **options)
    return y, h


def block_lstm(
    u: Tensor, weight: Tensor, h0: Tensor | None = None, c0: Tensor | None = None, **options: Any
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Long short-term memory: (y, (last h, last c))."""
    y, h, c = recurrence(u, weight, h0, c0, cell="lstm", **options)
    return y, (h, c)


# The structure is a matter of the weights' shape alone.
diagonal_rnn, diagonal_gru, diagonal_lstm = block_rnn, block_gru, block_lstm
