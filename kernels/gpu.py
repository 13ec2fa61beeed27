"""Every recurrence on a GPU: what Triton kernels can take, how they are launched, and what torch does after them.

The kernels are two, `gpu_loops.forward` and `gpu_loops.backward`, with the loop over time inside; `gpu_cells` is what
they do at a frame. What is needed again on the way back, `forward` saves:

    lstm          (T, B, 5 H)  i, f, g, o after their activations, c after zoneout
    gru           (T, B, 4 H)  r, z, n, and the recurrent term of n with its bias
    gru_original  (T, B, 3 H)  r, z, n
    rnn_*         (0,)         the derivative follows from y, or from u where zoneout takes its expectation

Nothing is added atomically: two calls give the same bits.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
from torch import Tensor

from kernels import gpu_loops
from kernels.gpu_cells import DRAWN, EXPECTED
from kernels.reference import GATES, SAVED, mod_relu

ROWS = {2: 16, 4: 8}
"""Rows of a program that owns a block, by bytes of an element: what a tensor core takes; what registers hold."""


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
    _launch(gpu_loops.forward, grid, arguments, min(num_warps, 8))
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
    _launch(gpu_loops.backward, grid, arguments, num_warps)
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
