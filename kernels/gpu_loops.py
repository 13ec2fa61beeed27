"""The two Triton kernels, forward and backward: W is loaded, then the loop over time runs.

A program owns a tile of rows and one block on the diagonal (or a tile of columns, where W is diagonal) for all frames:
it carries its state and waits for no other. Blocks and diagonals share both loops; they differ in how W is read
(`_weights`) and in how its gradient is summed.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RET505 (Triton compiles what follows a constant `if`, returned or not: `else` is not superfluous)

import triton
import triton.language as tl

from kernels.gpu_cells import cell_back, cell_forward, zoneout, zoneout_back


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
def forward(
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
        parts, new_h, new_c = cell_forward(
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
        new_h = zoneout(h, new_h, key, t, col, hidden, rate_h, threshold_h, ZONE_H, 0)
        tl.store(y + frame + at, new_h, alive)
        h = tl.where(alive, new_h, h)
        if CELL == "lstm":
            new_c = zoneout(c, new_c, key, t, col, hidden, rate_c, threshold_c, ZONE_C, 1)
            c = tl.where(alive, new_c, c)
            parts += (new_c,)
        if saved is not None:
            for i in tl.static_range(len(parts)):
                tl.store(saved + frame * len(parts) + i * hidden + row * (hidden * len(parts)) + col, parts[i], alive)
    tl.store(h_last + at, h, inside)
    if CELL == "lstm":
        tl.store(c_last + at, c, inside)


@triton.jit
def backward(
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
        old, d = zoneout_back(d, key, t, col, hidden, rate_h, threshold_h, ZONE_H, 0)
        old_c, d_c = zoneout_back(d_c, key, t, col, hidden, rate_c, threshold_c, ZONE_C, 1)
        parts = _parts(saved + frame * SAVED, row * (hidden * SAVED) + col, alive, hidden, SAVED)
        new = d if SAVED else _rows(fresh + frame, at, alive)
        d_u, d_v, xs, d_x, d_h, d_c = cell_back(d, d_c, new, parts, x, h, c, w, CELL, DIAGONAL)
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
