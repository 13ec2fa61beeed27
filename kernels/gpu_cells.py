"""One frame of every cell in Triton, forward and backward, and zoneout, for a tile of rows and units in registers.

Blocks and diagonals differ in `_times` alone: a product with a matrix, or unit by unit. Sums and states are float32.
"""
# mypy: allow-untyped-defs, allow-untyped-calls, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="assignment, misc"
# ruff: noqa: RET505 (Triton compiles what follows a constant `if`, returned or not: `else` is not superfluous)

import triton
import triton.language as tl

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
def cell_forward(u, x, h, c, w, b, CELL: tl.constexpr, GATES: tl.constexpr, DIAGONAL: tl.constexpr):
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
def cell_back(d, dc, new, saved, x, h, c, w, CELL: tl.constexpr, DIAGONAL: tl.constexpr):
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
def zoneout(old, new, key, t, col, hidden, rate, threshold, ZONE: tl.constexpr, CELL_STATE: tl.constexpr):
    if ZONE == DRAWN:
        return tl.where(_keeps(key, t, col, hidden, threshold, CELL_STATE), old, new)
    elif ZONE == EXPECTED:
        return rate * old + (1 - rate) * new
    else:
        return new


@triton.jit
def zoneout_back(d, key, t, col, hidden, rate, threshold, ZONE: tl.constexpr, CELL_STATE: tl.constexpr):
    """Gradients (of the old state, of the new one)."""
    if ZONE == DRAWN:
        keeps = _keeps(key, t, col, hidden, threshold, CELL_STATE)
        return tl.where(keeps, d, 0.0), tl.where(keeps, 0.0, d)
    elif ZONE == EXPECTED:
        return rate * d, (1 - rate) * d
    else:
        return tl.zeros_like(d), d
