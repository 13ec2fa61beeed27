"""Every recurrence on a GPU: two Triton kernels, each with the loop over time inside and W loaded before it.

A program owns a tile of rows and one block on the diagonal (or a tile of columns, where W is diagonal) for all frames:
it carries its state and waits for no other. What it needs again on the way back, `forward` saves:

    lstm          (T, B, 5 H)  i, f, g, o after their activations, c after zoneout
    gru           (T, B, 4 H)  r, z, n, and the recurrent term of n with its bias
    gru_original  (T, B, 3 H)  r, z, n
    rnn_*         (0,)         the derivative follows from y, or from u where zoneout takes its expectation

Sums and the carried state are float32. Nothing is added atomically: two calls give the same bits.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RET505 (Triton compiles what follows a constant `if`, returned or not: `else` is not superfluous)

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.reference import GATES, SAVED, mod_relu

ROWS = {2: 16, 4: 8}
"""Rows of a program that owns a block, by bytes of an element: what a tensor core takes; what registers hold."""

DRAWN, EXPECTED = tl.constexpr(1), tl.constexpr(2)  # what zoneout does where its rate is not 0
GOLDEN, MIX1, MIX2 = (tl.constexpr(x) for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


@triton.jit
def _tanh(x):
    """Cephes: a polynomial near zero, where the quotient would cancel."""
    s = x * x
    p = (((-5.70498872745e-3 * s + 2.06390887954e-2) * s - 5.37397155531e-2) * s + 1.33314422036e-1) * s
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    return tl.where(s < 0.390625, x + x * s * (p - 3.33332819422e-1), tl.where(x < 0, -far, far))


@triton.jit
def _times(x, w, DIAGONAL: tl.constexpr):
    if DIAGONAL:
        return x * w
    else:
        return tl.dot(x.to(w.dtype), w, input_precision="ieee")


@triton.jit
def _plus(v, u):
    """v + u, but no `+`: of v = dot(x, w) Triton would make dot(x, w, u), and change the layout of u, behind a barrier,
    when x and w are in registers already, where they then have to wait or spill."""
    return tl.fma(v, 1.0, u)


@triton.jit
def _cell(u, x, h, c, w, b, CELL: tl.constexpr, GATES: tl.constexpr, DIAGONAL: tl.constexpr):
    """One frame: (what to save, new h, new c); x is h behind its mask, w maps it to the recurrent terms."""
    v = ()  # all products before any u, for the same reason
    for g in tl.static_range(2 if CELL == "gru_original" else GATES):
        v += (_times(x, w[g], DIAGONAL) + (0.0 if CELL == "rnn_modrelu" else b[g]),)
    if CELL == "lstm":
        i, f = tl.sigmoid(_plus(v[0], u[0])), tl.sigmoid(_plus(v[1], u[1]))
        g, o = _tanh(_plus(v[2], u[2])), tl.sigmoid(_plus(v[3], u[3]))
        new = f * c + i * g
        return (i, f, g, o), o * _tanh(new), new
    elif CELL == "gru":
        r, z = tl.sigmoid(_plus(v[0], u[0])), tl.sigmoid(_plus(v[1], u[1]))
        n = _tanh(u[2] + r * v[2])
        return (r, z, n, v[2]), (1 - z) * n + z * h, c
    elif CELL == "gru_original":
        r, z = tl.sigmoid(_plus(v[0], u[0])), tl.sigmoid(_plus(v[1], u[1]))
        n = _tanh(_plus(_times(r * x, w[2], DIAGONAL) + b[2], u[2]))
        return (r, z, n), (1 - z) * n + z * h, c
    else:
        new = _plus(v[0], u[0])
        if CELL == "rnn_tanh":
            new = _tanh(new)
        elif CELL == "rnn_relu":
            new = tl.where(new <= 0, 0.0, new)  # as everywhere here, a comparison that lets NaN through
        elif CELL == "rnn_modrelu":
            size = tl.abs(new) + b[0]
            size = tl.where(size <= 0, 0.0, size)
            new = tl.where(new == 0, 0.0, tl.where(new < 0, -size, size))
        return (), new, c


@triton.jit
def _cell_back(d, dc, new, saved, x, h, c, w, CELL: tl.constexpr, DIAGONAL: tl.constexpr):
    """Gradients of one frame, those of its new h and c given; here w maps gradients of recurrent terms to those of x.

    Returns:
        of u, of the recurrent terms, what those terms are W times, of x, of h apart from x, of c.
    """
    zero = tl.zeros_like(d)
    if CELL == "lstm":
        i, f, g, o = saved[0], saved[1], saved[2], saved[3]
        t = _tanh(f * c + i * g)
        dc += d * o * (1 - t * t)
        d_o = d * t * o * (1 - o)
        dx = _times(d_o, w[3], DIAGONAL)  # one by one: fewer registers
        d_i = dc * g * i * (1 - i)
        dx += _times(d_i, w[0], DIAGONAL)
        d_f = dc * c * f * (1 - f)
        dx += _times(d_f, w[1], DIAGONAL)
        d_g = dc * i * (1 - g * g)
        dx += _times(d_g, w[2], DIAGONAL)
        du = (d_i, d_f, d_g, d_o)
        return du, du, (x, x, x, x), dx, zero, dc * f
    elif CELL == "gru":
        r, z, n = saved[0], saved[1], saved[2]
        dn = d * (1 - z) * (1 - n * n)
        du = (dn * saved[3] * r * (1 - r), d * (h - n) * z * (1 - z), dn)
        dv = (du[0], du[1], dn * r)
        dx = _times(dv[0], w[0], DIAGONAL)
        dx += _times(dv[1], w[1], DIAGONAL)
        dx += _times(dv[2], w[2], DIAGONAL)
        return du, dv, (x, x, x), dx, d * z, dc
    elif CELL == "gru_original":
        r, z, n = saved[0], saved[1], saved[2]
        dn = d * (1 - z) * (1 - n * n)
        dq = _times(dn, w[2], DIAGONAL)  # of r x
        du = (dq * x * r * (1 - r), d * (h - n) * z * (1 - z), dn)
        dx = _times(du[0], w[0], DIAGONAL)
        dx += _times(du[1], w[1], DIAGONAL)
        dx += dq * r
        return du, du, (x, x, r * x), dx, d * z, dc
    else:
        if CELL == "rnn_tanh":
            d *= 1 - new * new
        elif CELL == "rnn_relu":
            d = tl.where(new <= 0, 0.0, d)
        elif CELL == "rnn_modrelu":
            d = tl.where(new == 0, 0.0, d)
        return (d,), (d,), (x,), _times(d, w[0], DIAGONAL), zero, dc


@triton.jit
def _keeps(key, t, col, hidden, threshold, CELL_STATE: tl.constexpr):
    """reference.zoneout_mask of a tile."""
    counter = ((t.to(tl.int64) * hidden + col) * 2 + CELL_STATE + 1).to(tl.uint64)
    z = key.to(tl.uint64) + counter * GOLDEN
    z = (z ^ (z >> 30)) * MIX1
    z = (z ^ (z >> 27)) * MIX2
    return ((z ^ (z >> 31)) >> 40).to(tl.int32) < threshold


@triton.jit
def _zoneout(old, new, key, t, col, hidden, rate, threshold, ZONE: tl.constexpr, CELL_STATE: tl.constexpr):
    if ZONE == DRAWN:
        return tl.where(_keeps(key, t, col, hidden, threshold, CELL_STATE), old, new)
    elif ZONE == EXPECTED:
        return rate * old + (1 - rate) * new
    else:
        return new


@triton.jit
def _zoneout_back(d, key, t, col, hidden, rate, threshold, ZONE: tl.constexpr, CELL_STATE: tl.constexpr):
    """Gradients (of the old state, of the new one)."""
    if ZONE == DRAWN:
        keeps = _keeps(key, t, col, hidden, threshold, CELL_STATE)
        return tl.where(keeps, d, 0.0), tl.where(keeps, 0.0, d)
    elif ZONE == EXPECTED:
        return rate * d, (1 - rate) * d
    else:
        return tl.zeros_like(d), d


@triton.jit
def _tile(lengths, num_steps, batch, size, tiles, width, reverse, ROWS: tl.constexpr, COLS: tl.constexpr):
    """What a program owns: rows, columns, which columns exist, frames of each row, the most of them, direction."""
    group = tl.program_id(1) // tiles
    unit = tl.arange(0, COLS)[None, :]
    first = (tl.program_id(1) % tiles) * width
    real = (unit < width) & (first + unit < size)
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    length = tl.where(row < batch, num_steps, 0)
    if lengths is not None:
        length = tl.minimum(length, tl.load(lengths + row, row < batch, other=0).to(tl.int32))
    backwards = (reverse >> group) & 1
    return row, group * size + first + unit, real, length, tl.max(length), backwards != 0


@triton.jit
def _rows(pointer, at, inside):
    """A tile of a (B, H) tensor in float32, zeros for None."""
    if pointer is None:
        return tl.zeros(inside.shape, tl.float32)
    else:
        return tl.load(pointer + at, inside, other=0.0).to(tl.float32)


@triton.jit
def _parts(pointer, at, inside, stride, COUNT: tl.constexpr):
    """The same tile of `COUNT` tensors that lie side by side, in float32, zeros for None."""
    parts = ()
    for i in tl.static_range(COUNT):
        parts += (_rows(pointer, at, inside) if pointer is None else _rows(pointer + i * stride, at, inside),)
    return parts


@triton.jit
def _in_block(gate, hidden, width, COLS: tl.constexpr):
    """Where the matrix of a gate lies in (G, K, P, P), and which of its elements exist."""
    p, q = tl.arange(0, COLS)[:, None], tl.arange(0, COLS)[None, :]
    return ((gate * (hidden // width) + tl.program_id(1)) * width + p) * width + q, (p < width) & (q < width)


@triton.jit
def _weights(
    pointer,
    col,
    real,
    hidden,
    width,
    GATES: tl.constexpr,
    COLS: tl.constexpr,
    TURN: tl.constexpr,
    DIAGONAL: tl.constexpr,
):
    if DIAGONAL:
        return _parts(pointer, col, real, hidden, GATES)
    else:
        w = ()
        for g in tl.static_range(GATES):
            at, inside = _in_block(g, hidden, width, COLS)
            block = tl.load(pointer + at, inside, other=0.0)
            w += (tl.trans(block) if TURN else block,)
        return w


@triton.jit
def _forward(
    u,
    weight,
    h0,
    c0,
    bias,
    lengths,
    mask,
    keys,
    y,
    h_last,
    c_last,
    saved,
    num_steps,
    batch,
    hidden,
    size,
    tiles,
    width,
    reverse,
    rate_h,
    rate_c,
    threshold_h,
    threshold_c,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ZONE_H: tl.constexpr,
    ZONE_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col, real, length, steps, backwards = _tile(lengths, num_steps, batch, size, tiles, width, reverse, ROWS, COLS)
    w = _weights(weight, col, real, hidden, width, GATES, COLS, True, DIAGONAL)
    b = _parts(bias, col, real, hidden, GATES)
    inside = (row < batch) & real
    at = row * hidden + col  # 32 bits inside a frame, 64 from frame to frame: fewer registers
    h, c = _rows(h0, at, inside), _rows(c0, at, inside)
    if mask is not None:
        m = _rows(mask, at, inside)
    key = tl.load(keys + row, row < batch, other=0) if keys is not None else 0
    for s in range(steps):
        t = tl.where(backwards, steps - 1 - s, s)
        alive = (t < length) & real
        frame = t.to(tl.int64) * batch * hidden
        x = h
        if mask is not None:
            x = h * m
        parts, new_h, new_c = _cell(
            _parts(u + frame * GATES, row * (hidden * GATES) + col, alive, hidden, GATES),
            x,
            h,
            c,
            w,
            b,
            CELL,
            GATES,
            DIAGONAL,
        )
        new_h = _zoneout(h, new_h, key, t, col, hidden, rate_h, threshold_h, ZONE_H, 0)
        tl.store(y + frame + at, new_h, alive)
        h = tl.where(alive, new_h, h)
        if CELL == "lstm":
            new_c = _zoneout(c, new_c, key, t, col, hidden, rate_c, threshold_c, ZONE_C, 1)
            c = tl.where(alive, new_c, c)
            parts += (new_c,)
        if saved is not None:
            for i in tl.static_range(len(parts)):
                tl.store(saved + frame * len(parts) + i * hidden + row * (hidden * len(parts)) + col, parts[i], alive)
    tl.store(h_last + at, h, inside)
    if CELL == "lstm":
        tl.store(c_last + at, c, inside)


@triton.jit
def _backward(
    dy,
    dh,
    dc,
    y,
    fresh,
    saved,
    weight,
    h0,
    c0,
    lengths,
    mask,
    keys,
    du,
    dweight,
    dh0,
    dc0,
    dbias,
    num_steps,
    batch,
    hidden,
    size,
    tiles,
    width,
    reverse,
    rate_h,
    rate_c,
    threshold_h,
    threshold_c,
    CELL: tl.constexpr,
    GATES: tl.constexpr,
    SAVED: tl.constexpr,
    DIAGONAL: tl.constexpr,
    ZONE_H: tl.constexpr,
    ZONE_C: tl.constexpr,
    ROWS: tl.constexpr,
    COLS: tl.constexpr,
):
    row, col, real, length, steps, backwards = _tile(lengths, num_steps, batch, size, tiles, width, reverse, ROWS, COLS)
    w = _weights(weight, col, real, hidden, width, GATES, COLS, False, DIAGONAL)
    inside = (row < batch) & real
    at = row * hidden + col  # 32 bits inside a frame, 64 from frame to frame: fewer registers
    carry, carry_c = _rows(dh, at, inside), _rows(dc, at, inside)
    if mask is not None:
        m = _rows(mask, at, inside)
    key = tl.load(keys + row, row < batch, other=0) if keys is not None else 0
    sums_w, sums_b = (), ()
    for _ in tl.static_range(GATES):
        sums_w += (tl.zeros((ROWS if DIAGONAL else COLS, COLS), tl.float32),)
        sums_b += (tl.zeros((ROWS, COLS), tl.float32),)
    for s in range(steps):
        t = tl.where(backwards, s, steps - 1 - s)
        alive = (t < length) & real
        frame = t.to(tl.int64) * batch * hidden
        past = tl.where(backwards, t + 1, t - 1)  # the frame before this one, in its direction
        met = alive & (past >= 0) & (past < length)
        before = past.to(tl.int64) * batch * hidden
        h = _rows(y + before, at, met)
        if h0 is not None:
            h += _rows(h0, at, alive & ~met)
        c = _rows(None, at, alive)
        if CELL == "lstm":
            c = _rows(saved + before * 5 + hidden * 4, row * (hidden * 5) + col, met)
            if c0 is not None:
                c += _rows(c0, at, alive & ~met)
        x = h
        if mask is not None:
            x = h * m
        d = tl.where(alive, carry + _rows(dy + frame, at, alive), 0.0)
        d_c = tl.where(alive, carry_c, 0.0)
        old, d = _zoneout_back(d, key, t, col, hidden, rate_h, threshold_h, ZONE_H, 0)
        old_c, d_c = _zoneout_back(d_c, key, t, col, hidden, rate_c, threshold_c, ZONE_C, 1)
        parts = _parts(saved + frame * SAVED, row * (hidden * SAVED) + col, alive, hidden, SAVED)
        new = d if SAVED else _rows(fresh + frame, at, alive)
        d_u, d_v, xs, d_x, d_h, d_c = _cell_back(d, d_c, new, parts, x, h, c, w, CELL, DIAGONAL)
        if mask is not None:
            d_x *= m
        carry = tl.where(alive, old + d_h + d_x, carry)
        carry_c = tl.where(alive, old_c + d_c, carry_c)
        for g in tl.static_range(GATES):
            tl.store(du + frame * GATES + g * hidden + row * (hidden * GATES) + col, d_u[g], alive)
        if dweight is not None:
            more = ()
            for g in tl.static_range(GATES):
                if DIAGONAL:
                    more += (sums_w[g] + d_v[g] * xs[g],)
                else:
                    left, right = tl.trans(d_v[g].to(w[g].dtype)), xs[g].to(w[g].dtype)
                    more += (tl.dot(left, right, sums_w[g], input_precision="ieee"),)
            sums_w = more
        if dbias is not None:
            more = ()
            for g in tl.static_range(GATES):
                if CELL == "rnn_modrelu":
                    more += (sums_b[g] + tl.where(new < 0, -d_v[g], d_v[g]),)
                else:
                    more += (sums_b[g] + d_v[g],)
            sums_b = more
    tl.store(dh0 + at, carry, inside)
    if CELL == "lstm":
        tl.store(dc0 + at, carry_c, inside)
    for g in tl.static_range(GATES):  # sums over the rows of this tile alone; torch adds the tiles in their order
        ours = (tl.program_id(0).to(tl.int64) * GATES + g) * hidden
        if dbias is not None:
            tl.store(dbias + ours + col, tl.sum(sums_b[g], 0, keep_dims=True), real)
        if dweight is None:
            pass
        elif DIAGONAL:
            tl.store(dweight + ours + col, tl.sum(sums_w[g], 0, keep_dims=True), real)
        else:
            place, exists = _in_block(g, hidden, width, COLS)
            tl.store(dweight + tl.program_id(0).to(tl.int64) * GATES * hidden * width + place, sums_w[g], exists)


def _launch(kernel: Any, grid: tuple[int, int], arguments: dict[str, Any], num_warps: int) -> None:
    with torch.cuda.device_of(arguments["weight"]):
        kernel[grid](**arguments, num_warps=num_warps, num_stages=1)


LIMITS = {1: {2: 256, 4: 128}, 3: {2: 128, 4: 64}, 4: {2: 128, 4: 64}}
"""Largest block by gates and bytes of an element: above it registers spill or an A100's shared memory is full."""

FUSED = 32
"""Largest block of one gate whose gradient is summed inside the kernel, in registers that others would spill."""


def _columns(size: int) -> int:
    """A block's size as a power of two; tl.dot takes no fewer than 16."""
    return max(16, int(triton.next_power_of_2(size)))


def shared_bytes(cell: str, size: int, itemsize: int) -> int:
    """Upper bound of the shared memory of a program: its blocks of W and the tiles that change their layout."""
    cols = _columns(size)
    return GATES[cell] * cols * cols * itemsize + max(2, GATES[cell]) * ROWS[itemsize] * cols * 4 + 1024


def _shared_limit() -> int:
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties().shared_memory_per_block_optin)  # type: ignore[attr-defined]
    return 163 * 1024  # of an A100


def supports(cell: str, weight_shape: Sequence[int], dtype: torch.dtype) -> str | None:
    """Why these kernels cannot take a call, None if they can.

    Args:
        dtype: of weight; that of u is one of the same three.
    """
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"dtype={dtype}, wanted float32, float16 or bfloat16"
    if len(weight_shape) == 2:
        return None
    if weight_shape[1] > 65535:
        return f"{weight_shape[1]} blocks, a grid has at most 65535"
    size, limit = weight_shape[-1], LIMITS[GATES[cell]][dtype.itemsize]
    if size > limit:
        return f"block size {size} of {cell} in {dtype}, at most {limit}"
    if (needed := shared_bytes(cell, size, dtype.itemsize)) > (limit := _shared_limit()):
        return f"block size {size} of {cell} in {dtype} needs {needed} bytes of shared memory, of {limit}"
    return None


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _plan(
    u: Tensor,
    weight: Tensor,
    lengths: Tensor | None,
    mask: Tensor | None,
    keys: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    zoneout: Sequence[float],
) -> tuple[tuple[int, int], dict[str, Any], int]:
    """(grid, arguments of both kernels, warps).

    Raises:
        ValueError: see `supports`.
    """
    if reason := supports(cell, weight.shape, weight.dtype) or supports(cell, (GATES[cell], 1), u.dtype):
        raise ValueError(reason)
    num_steps, batch, width = u.shape
    if batch * width * 2 >= 2**31:  # what is saved is wider by a third at most
        raise ValueError(f"a frame of {batch} x {width} pre-activations is too large for offsets of 32 bits")
    hidden = width // GATES[cell]
    size = hidden // len(reverse)
    diagonal = weight.ndim == 2
    if diagonal:
        rows = 1
        cols = width = min(128, max(32, triton.next_power_of_2(size)))
        num_warps = cols // 32
    else:
        width = weight.shape[-1]
        rows, cols = ROWS[weight.itemsize], _columns(width)
        num_warps = 4 if cols <= 32 else 16 if cols == 128 and GATES[cell] == 4 else 8  # the fewest with no spills
    tiles = triton.cdiv(size, width)
    zone = [0 if not rate else EXPECTED.value if keys is None else DRAWN.value for rate in zoneout]
    arguments = {
        "weight": weight.contiguous(),
        "lengths": _contiguous(lengths),
        "mask": _contiguous(mask),
        "keys": _contiguous(keys),
        "num_steps": num_steps,
        "batch": batch,
        "hidden": hidden,
        "size": size,
        "tiles": tiles,
        "width": width,
        "reverse": sum(bool(flag) << r for r, flag in enumerate(reverse)),
        "rate_h": float(zoneout[0]),
        "rate_c": float(zoneout[1]),
        "threshold_h": round(zoneout[0] * 2**24),
        "threshold_c": round(zoneout[1] * 2**24),
        "CELL": cell,
        "GATES": GATES[cell],
        "DIAGONAL": diagonal,
        "ZONE_H": zone[0],
        "ZONE_C": zone[1] if cell == "lstm" else 0,
        "ROWS": rows,
        "COLS": cols,
    }
    return (triton.cdiv(batch, rows), len(reverse) * tiles), arguments, num_warps


def forward(
    u: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    keys: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    zoneout: Sequence[float],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reference.recurrence, and what `backward` needs of it if `save`.

    Returns:
        y, h, c, saved in the type of u.

    Raises:
        ValueError: see `supports`.
    """
    grid, arguments, num_warps = _plan(u, weight, lengths, mask, keys, cell, reverse, zoneout)
    num_steps, batch, hidden = arguments["num_steps"], arguments["batch"], arguments["hidden"]
    make = u.new_empty if lengths is None else u.new_zeros  # the kernel writes no padding
    y = make(num_steps, batch, hidden)
    h = u.new_empty(batch, hidden)
    c = u.new_empty((batch, hidden) if cell == "lstm" else 0)
    saved = make((num_steps, batch, SAVED[cell] * hidden) if save and cell in SAVED else 0)
    arguments |= {
        "u": u.contiguous(),
        "h0": _contiguous(h0),
        "c0": _contiguous(c0),
        "bias": _contiguous(bias),
        "y": y,
        "h_last": h,
        "c_last": c,
        "saved": saved if save and cell in SAVED else None,
    }
    _launch(_forward, grid, arguments, min(num_warps, 8))
    return y, h, c, saved


def backward(
    dy: Tensor,
    dh: Tensor,
    dc: Tensor,
    y: Tensor,
    saved: Tensor,
    u: Tensor,
    weight: Tensor,
    packed: Tensor | None,
    h0: Tensor | None,
    c0: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    keys: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    zoneout: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients (of u, weight, h0, c0, bias), given those of the results of `forward`.

    A large block's weight gradient, and any bias gradient with it, is one product over all frames after the kernel.
    """
    grid, arguments, num_warps = _plan(u, weight, lengths, mask, keys, cell, reverse, zoneout)
    gates, batch, hidden = GATES[cell], arguments["batch"], arguments["hidden"]
    fused = weight.ndim == 2 or (gates == 1 and weight.shape[-1] <= FUSED)
    fresh = y
    if arguments["ZONE_H"] == EXPECTED.value and cell in _ELMAN:  # y - rate h is no exact zero where the new h was one
        fresh = _elman(u, weight, _previous(y, h0, mask, lengths, reverse), bias, cell)
    du = (u.new_empty if lengths is None else u.new_zeros)(u.shape)
    dh0 = u.new_empty(batch, hidden, dtype=(u if h0 is None else h0).dtype)
    dc0 = u.new_empty((batch, hidden) if cell == "lstm" else 0, dtype=(u if c0 is None else c0).dtype)
    sums_w = u.new_empty(grid[0], *weight.shape, dtype=torch.float32) if fused else None
    inside = bias is not None and (fused or cell == "rnn_modrelu")  # whose gradient does not follow from du
    sums_b = u.new_empty(grid[0], gates * hidden, dtype=torch.float32) if inside else None
    arguments |= {
        "dy": dy.contiguous(),
        "dh": dh.contiguous(),
        "dc": dc.contiguous() if cell == "lstm" else None,
        "y": y.contiguous(),
        "fresh": fresh.contiguous(),
        "saved": saved.contiguous(),
        "h0": _contiguous(h0),
        "c0": _contiguous(c0),
        "du": du,
        "dweight": sums_w,
        "dh0": dh0,
        "dc0": dc0,
        "dbias": sums_b,
        "SAVED": SAVED.get(cell, 0),
    }
    _launch(_backward, grid, arguments, num_warps)
    dweight = None if sums_w is None else sums_w.sum(0)
    dbias = None if sums_b is None else sums_b.sum(0)
    if dweight is None:
        dv, met = _terms(du, _previous(y, h0, mask, lengths, reverse), saved, cell)
        dweight = torch.stack([_outer(*pair, weight) for pair in zip(dv, met, strict=True)])
        if bias is not None and dbias is None:
            dbias = torch.cat([part.sum((0, 1), dtype=torch.float32) for part in dv])
    dbias = u.new_empty(0) if bias is None or dbias is None else dbias.to(bias.dtype)
    return du, dweight.to(weight.dtype), dh0, dc0, dbias


def _previous(
    y: Tensor, h0: Tensor | None, mask: Tensor | None, lengths: Tensor | None, reverse: Sequence[bool]
) -> Tensor:
    """What the recurrent weights met at each frame, (T, B, H)."""
    num_steps, batch, hidden = y.shape
    start = (y.new_zeros(batch, hidden) if h0 is None else h0.to(y.dtype)).expand(1, -1, -1)
    parts = []
    for past, first, backwards in zip(y.chunk(len(reverse), 2), start.chunk(len(reverse), 2), reverse, strict=True):
        part = torch.cat([past[1:], first] if backwards else [first, past[:-1]])[:num_steps]
        if backwards and lengths is not None:
            last = torch.arange(1, num_steps + 1, device=y.device)[:, None] == lengths
            part = torch.where(last[..., None], first, part)
        parts.append(part)
    met = torch.cat(parts, 2)
    return met if mask is None else met * mask


_ELMAN: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "rnn_tanh": lambda v, b: torch.tanh(v + b),
    "rnn_relu": lambda v, b: torch.relu(v + b),
    "rnn_modrelu": mod_relu,
}


def _elman(u: Tensor, weight: Tensor, met: Tensor, bias: Tensor | None, cell: str) -> Tensor:
    """The new h of each frame before zoneout, (T, B, H); what it met is known, so all frames at once."""
    if weight.ndim == 2:
        v = weight[0] * met
    else:
        x = met.to(weight.dtype).unflatten(2, (weight.shape[1], -1))
        v = torch.einsum("kpq,tbkq->tbkp", weight[0], x).flatten(2)
    return _ELMAN[cell](u + v, u.new_zeros(()) if bias is None else bias)


def _terms(du: Tensor, met: Tensor, saved: Tensor, cell: str) -> tuple[list[Tensor], list[Tensor]]:
    """Of each gate: the gradient of its recurrent term, and what W was multiplied with; both (T, B, H)."""
    hidden = met.shape[2]
    dv, x = list(du.split(hidden, 2)), [met] * GATES[cell]
    if cell == "gru":
        dv[2] = dv[2] * saved[..., :hidden]
    elif cell == "gru_original":
        x[2] = x[2] * saved[..., :hidden]
    return dv, x


def _outer(dv: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """Gradient of the blocks of one gate, (K, P, P)."""
    a, b = (part.to(weight.dtype).flatten(0, 1).unflatten(1, (weight.shape[1], -1)) for part in (dv, x))
    return torch.einsum("nkp,nkq->kpq", a, b)
