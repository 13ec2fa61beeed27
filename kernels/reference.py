"""The definition of every recurrent operator: a plain loop over time that autograd differentiates.

Letters: T time, B batch, H = K P hidden, K blocks of size P, G gates.

Common to all operators:
    u: (T, B, G H) input pre-activation, with the input's bias in it; gates in torch's order
    weight: (G, K, P, P) blocks, or (G, H) diagonals
    h0 (and c0): (B, H) initial state, zeros if None
    bias: (G H,) recurrent bias, or None
    lengths: (B,) int64 frames of each row, or None for T. Past its length a row's state stands still and its output
        is zero, so padding never leaks
    reverse: run from each row's last frame to its first
    returns: (T, B, H) outputs, and the last state (B, H), or a pair of them for an LSTM
"""

from collections.abc import Callable

import torch
from torch import Tensor

State = tuple[Tensor, ...]
Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {"tanh": torch.tanh, "relu": torch.relu, "identity": lambda x: x}


def _blocks(weight: Tensor, bias: Tensor | None) -> Activation:
    _, num_blocks, size, other = weight.shape
    if size != other:
        raise ValueError(f"weight has blocks of {size} x {other}, wanted square ones")

    def apply(h: Tensor) -> Tensor:
        y = torch.einsum("gkpq,bkq->bgkp", weight, h.unflatten(-1, (num_blocks, size))).flatten(1)
        return y if bias is None else y + bias

    return apply


def _diagonal(weight: Tensor, bias: Tensor | None) -> Activation:
    def apply(h: Tensor) -> Tensor:
        y = (weight * h[:, None]).flatten(1)
        return y if bias is None else y + bias

    return apply


def _rnn(u: Tensor, v: Tensor, state: State, activation: str) -> State:
    return (ACTIVATIONS[activation](u + v),)


def _gru(u: Tensor, v: Tensor, state: State, _: str) -> State:
    """Cho et al. 2014 in torch's form: the reset gate scales the recurrent term, not the state."""
    (h,) = state
    ur, uz, un = u.chunk(3, -1)
    vr, vz, vn = v.chunk(3, -1)
    update = torch.sigmoid(uz + vz)
    new = torch.tanh(un + torch.sigmoid(ur + vr) * vn)
    return ((1 - update) * new + update * h,)


def _lstm(u: Tensor, v: Tensor, state: State, _: str) -> State:
    """Hochreiter & Schmidhuber 1997 with a forget gate (Gers et al. 2000)."""
    i, f, g, o = (u + v).chunk(4, -1)
    c = torch.sigmoid(f) * state[1] + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(c), c


GATES = {"rnn": 1, "gru": 3, "lstm": 4}
_CELLS = {"rnn": _rnn, "gru": _gru, "lstm": _lstm}


def _loop(
    cell: str,
    recurrent: Activation,
    u: Tensor,
    hidden_size: int,
    initial: State | None,
    lengths: Tensor | None,
    reverse: bool,
    activation: str = "",
) -> tuple[Tensor, State]:
    num_steps, batch, width = u.shape
    if width != GATES[cell] * hidden_size:
        raise ValueError(f"u has {width} columns, wanted {GATES[cell]} gates x {hidden_size} units")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, wanted ({batch},)")
    zeros = u.new_zeros(batch, hidden_size)
    state: State = initial if initial is not None else (zeros,) * (2 if cell == "lstm" else 1)
    outputs: list[Tensor] = [zeros] * num_steps
    # unbind once: indexing u[t] would allocate a whole gradient of u at every step
    for t, u_t in sorted(enumerate(u.unbind(0)), reverse=reverse):
        new = _CELLS[cell](u_t, recurrent(state[0]), state, activation)
        if lengths is None:
            state, outputs[t] = new, new[0]
        else:
            alive = (t < lengths)[:, None]
            state = tuple(torch.where(alive, a, b) for a, b in zip(new, state, strict=True))
            outputs[t] = torch.where(alive, new[0], zeros)
    return torch.stack(outputs) if num_steps else u.new_zeros(0, batch, hidden_size), state


def block_rnn(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    activation: str = "tanh",
) -> tuple[Tensor, Tensor]:
    """Elman recurrence h_t = f(u_t + W h_{t-1}); `activation`: tanh, relu or identity."""
    size = weight.shape[1] * weight.shape[2]
    initial = None if h0 is None else (h0,)
    y, (h,) = _loop("rnn", _blocks(weight, bias), u, size, initial, lengths, reverse, activation)
    return y, h


def block_gru(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Gated recurrent unit; gates reset, update, new."""
    size = weight.shape[1] * weight.shape[2]
    y, (h,) = _loop("gru", _blocks(weight, bias), u, size, None if h0 is None else (h0,), lengths, reverse)
    return y, h


def block_lstm(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Long short-term memory; gates input, forget, cell, output."""
    size = weight.shape[1] * weight.shape[2]
    initial = None if h0 is None or c0 is None else (h0, c0)
    y, (h, c) = _loop("lstm", _blocks(weight, bias), u, size, initial, lengths, reverse)
    return y, (h, c)


def diagonal_rnn(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
    activation: str = "relu",
) -> tuple[Tensor, Tensor]:
    """IndRNN (Li et al. 2018, arXiv:1803.04831): h_t = f(u_t + w * h_{t-1})."""
    initial = None if h0 is None else (h0,)
    y, (h,) = _loop("rnn", _diagonal(weight, bias), u, weight.shape[1], initial, lengths, reverse, activation)
    return y, h


def diagonal_gru(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """GRU whose recurrent matrices are diagonal."""
    initial = None if h0 is None else (h0,)
    y, (h,) = _loop("gru", _diagonal(weight, bias), u, weight.shape[1], initial, lengths, reverse)
    return y, h


def diagonal_lstm(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """LSTM whose recurrent matrices are diagonal."""
    initial = None if h0 is None or c0 is None else (h0, c0)
    y, (h, c) = _loop("lstm", _diagonal(weight, bias), u, weight.shape[1], initial, lengths, reverse)
    return y, (h, c)
