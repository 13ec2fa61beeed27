"""The definition of every recurrence: a plain loop over time that autograd differentiates, twice if asked.

Letters: T time, B batch, H = K P hidden units, K blocks of size P, G gates, R directions.

    u        (T, B, G H) input pre-activation with the input's bias in it; gates one after the other, in torch's order
    weight   (G, K, P, P) blocks on the diagonal, or (G, H) diagonals; v = W h + bias is the recurrent pre-activation
    h0, c0   (B, H) initial state, zeros if None; c0 is an LSTM's
    bias     (G H,) recurrent bias or None; of an Elman cell with modReLU it is the b of that function, (H,)
    lengths  (B,) int64 frames of each row, or None for T. Past its length a row's state stands still and its output is
             zero, and nothing there is read: padding never leaks
    reverse  R flags: the hidden units are R equal groups, and a group whose flag is true runs from each row's last
             frame to its first. So both directions of a layer are one call
    mask     (B, H), multiplies h before the recurrent weights at every step (variational dropout, Gal 2016); here alone
             also (T, B, H), another one at each step
    noise    (T, B, H), added to what the mask left of h, before the recurrent weights; here alone
    update   (T, B, H), multiplies what a GRU or LSTM would write, its n or g (Semeniuta et al. 2016); here alone
    zoneout  (rate of h, rate of c): a unit keeps its old value with that probability (Krueger et al. 2017,
             arXiv:1606.01305)
    keys     (B,) int64 names of the rows, from which zoneout is drawn; None takes the expectation, as evaluation does
    returns  y (T, B, H) outputs, h (B, H) last state, c (B, H) an LSTM's last cell, empty for the others
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

State = tuple[Tensor, ...]

ACTIVATIONS = ("tanh", "relu", "identity", "modrelu")
GATES = {**{f"rnn_{name}": 1 for name in ACTIVATIONS}, "gru": 3, "gru_original": 3, "lstm": 4}
"""Gates of each cell."""
SAVED = {"gru": 4, "gru_original": 3, "lstm": 5}
"""Sections of H that a fast backward needs besides y: lstm i, f, g, o, c; gru r, z, n and the recurrent term of n."""

_GOLDEN = 0x9E3779B97F4A7C15 - (1 << 64)  # int64 arithmetic wraps
_MIX1 = 0xBF58476D1CE4E5B9 - (1 << 64)
_MIX2 = 0x94D049BB133111EB - (1 << 64)


def hash24(keys: Tensor, counters: Tensor) -> Tensor:
    """24 random bits for each (key, counter): splitmix64 in counter mode (Steele, Lea & Flood 2014).

    Shape:
        keys, counters: int64, broadcast together -> int64 in [0, 2^24)
    """

    def shift(x: Tensor, n: int) -> Tensor:  # logical, not arithmetic
        return (x >> n) & ((1 << (64 - n)) - 1)

    z = keys + (counters + 1) * _GOLDEN
    z = (z ^ shift(z, 30)) * _MIX1
    z = (z ^ shift(z, 27)) * _MIX2
    return shift(z ^ shift(z, 31), 40)


def zoneout_mask(keys: Tensor, t: int, units: Tensor, hidden_size: int, rate: float, cell: bool) -> Tensor:
    """Which units keep their old value at frame t.

    Args:
        keys: (B,) int64.
        units: (N,) int64, which of the `hidden_size` units.
        cell: of the cell state, not of h.

    Shape:
        returns (B, N) bool
    """
    counters = (t * hidden_size + units) * 2 + int(cell)
    return hash24(keys[:, None], counters) < round(rate * 2**24)


def mod_relu(z: Tensor, b: Tensor) -> Tensor:
    """sign(z) relu(|z| + b) (Arjovsky et al. 2016 for the real line, Helfrich et al. 2018, arXiv:1707.09520, eq. 5)."""
    return torch.sign(z) * torch.relu(z.abs() + b)


def recurrence(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    keys: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    zoneout: Sequence[float],
    noise: Tensor | None = None,
    update: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Every recurrence, see the module's text. The arguments are taken to be well formed."""
    gates, groups = GATES[cell], len(reverse)
    num_steps, _, width = u.shape
    hidden_size = width // gates
    size = hidden_size // groups
    if lengths is not None:  # a NaN in the padding would reach the weights as 0 * NaN
        alive = torch.arange(num_steps, device=u.device)[:, None] < lengths
        u = torch.where(alive[..., None], u, u.new_zeros(()))
    by_group = u.unflatten(2, (gates, groups, size))
    outputs = []
    for r, backwards in enumerate(reverse):
        units = slice(r * size, (r + 1) * size)
        part = {
            "u": by_group[:, :, :, r].flatten(2),
            "weight": weight.unflatten(1, (groups, -1))[:, r],
            "h0": None if h0 is None else h0[:, units],
            "c0": None if c0 is None else c0[:, units],
            "bias": None if bias is None else bias.unflatten(0, (-1, groups, size))[:, r].flatten(),
            "mask": None if mask is None else mask[..., units],
            "noise": None if noise is None else noise[..., units],
            "update": None if update is None else update[..., units],
        }
        outputs.append(
            _one_way(
                **part,
                lengths=lengths,
                cell=cell,
                backwards=backwards,
                zone=_zoneout(keys, torch.arange(hidden_size, device=u.device)[units], hidden_size, zoneout),
            )
        )
    if groups == 1:
        return outputs[0]
    y, h, c = (torch.cat(parts, -1) for parts in zip(*outputs, strict=True))
    return y, h, c


Zone = Callable[[int, int, Tensor, Tensor], Tensor]


def _zoneout(keys: Tensor | None, units: Tensor, hidden_size: int, rates: Sequence[float]) -> Zone:
    """(t, 0 for h or 1 for c, old, new) -> the state after zoneout."""

    def apply(t: int, which: int, old: Tensor, new: Tensor) -> Tensor:
        rate = rates[which]
        if not rate:
            return new
        if keys is None:
            return rate * old + (1 - rate) * new
        return torch.where(zoneout_mask(keys, t, units, hidden_size, rate, bool(which)), old, new)

    return apply


def _one_way(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    noise: Tensor | None,
    update: Tensor | None,
    cell: str,
    backwards: bool,
    zone: Zone,
) -> tuple[Tensor, Tensor, Tensor]:
    num_steps, batch, width = u.shape
    gates = GATES[cell]
    zeros = u.new_zeros(batch, width // gates)
    h = zeros if h0 is None else h0
    c = (zeros if c0 is None else c0) if cell == "lstm" else u.new_zeros(0)
    added = None if cell == "rnn_modrelu" else bias
    outputs: list[Tensor] = [zeros] * num_steps
    # unbind once: indexing u[t] would allocate a whole gradient of u at every step
    for t, u_t in sorted(enumerate(u.unbind(0)), reverse=backwards):
        mask_t = mask if mask is None or mask.ndim == 2 else mask[t]
        v = _recurrent(weight, added, h, mask_t, None if noise is None else noise[t])
        new_h, new_c = CELLS[cell](u_t, v, h, c, bias, 1.0 if update is None else update[t])
        new_h = zone(t, 0, h, new_h)
        new_c = zone(t, 1, c, new_c) if cell == "lstm" else c
        alive = None if lengths is None else (t < lengths)[:, None]
        outputs[t] = new_h if alive is None else torch.where(alive, new_h, zeros)
        h = new_h if alive is None else torch.where(alive, new_h, h)
        c = new_c if alive is None or cell != "lstm" else torch.where(alive, new_c, c)
    return torch.stack(outputs) if num_steps else u.new_zeros(0, *zeros.shape), h, c


Recurrent = Callable[[Tensor | float, slice], Tensor]


def _recurrent(weight: Tensor, bias: Tensor | None, h: Tensor, mask: Tensor | None, noise: Tensor | None) -> Recurrent:
    """(scale of h, gates) -> those gates of W (scale * (mask * h + noise)) + bias, (B, gates * H)."""
    size = h.shape[1]
    masked = h if mask is None else h * mask
    disturbed = masked if noise is None else masked + noise

    def apply(scale: Tensor | float, gates: slice) -> Tensor:
        x = disturbed * scale
        chosen = weight[gates]
        if weight.ndim == 4:
            v = torch.einsum("gkpq,bkq->bgkp", chosen, x.unflatten(-1, (weight.shape[1], -1))).flatten(1)
        else:
            v = (chosen * x[:, None]).flatten(1)
        return v if bias is None else v + bias.unflatten(0, (-1, size))[gates].flatten()

    return apply


ALL = slice(None)


def _rnn(activation: Callable[[Tensor, Tensor | None], Tensor]) -> Callable[..., State]:
    def step(u: Tensor, v: Recurrent, h: Tensor, c: Tensor, bias: Tensor | None, k: Tensor | float) -> State:
        """Elman 1990."""
        return activation(u + v(1.0, ALL), bias), c

    return step


def _gru(u: Tensor, v: Recurrent, h: Tensor, c: Tensor, bias: Tensor | None, k: Tensor | float) -> State:
    """Cho et al. 2014 in torch's form: the reset gate scales the recurrent term, bias and all."""
    ur, uz, un = u.chunk(3, -1)
    vr, vz, vn = v(1.0, ALL).chunk(3, -1)
    z = torch.sigmoid(uz + vz)
    n = torch.tanh(un + torch.sigmoid(ur + vr) * vn)
    return (1 - z) * (k * n) + z * h, c


def _gru_original(u: Tensor, v: Recurrent, h: Tensor, c: Tensor, bias: Tensor | None, k: Tensor | float) -> State:
    """Cho et al. 2014, arXiv:1406.1078, eq. 8: the reset gate scales the state that goes into the new term."""
    ur, uz, un = u.chunk(3, -1)
    vr, vz = v(1.0, slice(0, 2)).chunk(2, -1)
    z = torch.sigmoid(uz + vz)
    n = torch.tanh(un + v(torch.sigmoid(ur + vr), slice(2, 3)))
    return (1 - z) * (k * n) + z * h, c


def _lstm(u: Tensor, v: Recurrent, h: Tensor, c: Tensor, bias: Tensor | None, k: Tensor | float) -> State:
    """Hochreiter & Schmidhuber 1997 with a forget gate (Gers et al. 2000)."""
    i, f, g, o = (u + v(1.0, ALL)).chunk(4, -1)
    c = torch.sigmoid(f) * c + torch.sigmoid(i) * (k * torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c


CELLS: dict[str, Callable[..., State]] = {
    "rnn_tanh": _rnn(lambda z, _: torch.tanh(z)),
    "rnn_relu": _rnn(lambda z, _: torch.relu(z)),
    "rnn_identity": _rnn(lambda z, _: z),
    "rnn_modrelu": _rnn(lambda z, b: mod_relu(z, z.new_zeros(()) if b is None else b)),
    "gru": _gru,
    "gru_original": _gru_original,
    "lstm": _lstm,
}
"""One step of each cell: (u, recurrent term, h, c, bias of a modReLU, scale of what is written) -> (h, c)."""
