"""Recurrent operators whose weights persist over time. Imports torch and nothing of ours.

    block_rnn, block_gru, block_lstm    U of shape (gates, K, P, P): K blocks on the diagonal, K = 1 is dense
    diagonal_rnn, diagonal_gru, diagonal_lstm    U of shape (gates, H): every unit sees itself alone

All are time-major and take `lengths`, an initial state, `reverse` and an optional recurrent bias; see
`kernels.reference`, which is the definition and, in this version, the only backend.
"""

from kernels.reference import (
    block_gru,
    block_lstm,
    block_rnn,
    diagonal_gru,
    diagonal_lstm,
    diagonal_rnn,
)
from kernels.selftest import explain, selftest

__all__ = [
    "block_gru",
    "block_lstm",
    "block_rnn",
    "diagonal_gru",
    "diagonal_lstm",
    "diagonal_rnn",
    "explain",
    "selftest",
]
