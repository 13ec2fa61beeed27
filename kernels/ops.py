"""The recurrences as torch operators: checked arguments, schema, shapes, gradients, and the choice of a backend.

Three operators serve every cell and structure: `ostinato::pack`, `ostinato::recurrence` and its derivative
`ostinato::recurrence_backward`, whose own derivative is that of the reference, paid for only when somebody asks.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from kernels import cpu, reference
from kernels.reference import GATES
from kernels.say import say_once

_LIBRARY = torch.library.Library("ostinato", "DEF")
_INPUTS = (
    "Tensor u, Tensor weight, Tensor packed, Tensor? h0, Tensor? c0, Tensor? bias, Tensor? lengths, Tensor? mask, "
    "Tensor? keys, str cell, bool[] reverse, float[] zoneout"
)
_LIBRARY.define("pack(Tensor weight, str cell, bool bfloat16) -> Tensor")
_LIBRARY.define(f"recurrence({_INPUTS}, bool save) -> (Tensor y, Tensor h, Tensor c, Tensor saved)")
_LIBRARY.define(
    f"recurrence_backward(Tensor dy, Tensor dh, Tensor dc, Tensor y, Tensor saved, {_INPUTS}) "
    "-> (Tensor du, Tensor dweight, Tensor dh0, Tensor dc0, Tensor dbias)"
)
_LIBRARY.impl("pack", cpu.pack, "CPU")
_LIBRARY.impl("recurrence", cpu.forward, "CPU")
_LIBRARY.impl("recurrence_backward", cpu.backward, "CPU")


def _on_gpu(name: str) -> Callable[..., Any]:
    def call(*arguments: Any) -> Any:
        from kernels import gpu  # only here: triton is not everywhere

        return getattr(gpu, name)(*arguments)

    return call


_LIBRARY.impl("recurrence", _on_gpu("forward"), "CUDA")
_LIBRARY.impl("recurrence_backward", _on_gpu("backward"), "CUDA")


@torch.library.register_fake("ostinato::pack", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(weight: Tensor, cell: str, bfloat16: bool) -> Tensor:
    return cpu.empty_packed(weight, bfloat16)


@torch.library.register_fake("ostinato::recurrence", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(u: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    keys, cell, _, zoneout, save = inputs[-5:]
    return cpu.empty_outputs(u, cell, zoneout, keys, save)


@torch.library.register_fake("ostinato::recurrence_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(dy: Tensor, dh: Tensor, dc: Tensor, y: Tensor, saved: Tensor, u: Tensor, weight: Tensor, *rest: Any) -> Any:
    bias, cell = rest[3], rest[-3]
    return (
        torch.empty_like(u, memory_format=torch.contiguous_format),
        torch.empty_like(weight, memory_format=torch.contiguous_format),
        torch.empty_like(dh, memory_format=torch.contiguous_format),
        dh.new_empty(dh.shape if cell == "lstm" else 0),
        u.new_empty(0 if bias is None else bias.shape),
    )


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cell, reverse, zoneout, save = inputs
    if not save:
        raise RuntimeError("ostinato::recurrence was called with save=False, and a gradient through it is asked for")
    y, _, _, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)  # else autograd fills a tensor with zeros for `saved`, the largest of them
    ctx.save_for_backward(y, saved, *tensors)
    ctx.options = (cell, reverse, zoneout)


def _differentiate(ctx: Any, dy: Tensor | None, dh: Tensor | None, dc: Tensor | None, _: None) -> tuple[Any, ...]:
    y, saved, *tensors = ctx.saved_tensors
    cell = ctx.options[0]
    dy = torch.zeros_like(y) if dy is None else dy
    last = y.shape[1:]
    dh = y.new_zeros(last) if dh is None else dh
    dc = y.new_zeros(last if cell == "lstm" else 0) if dc is None else dc
    du, dweight, dh0, dc0, dbias = torch.ops.ostinato.recurrence_backward(dy, dh, dc, y, saved, *tensors, *ctx.options)
    h0, c0, bias = tensors[3:6]
    return (
        du,
        dweight,
        None,
        None if h0 is None else dh0,
        None if c0 is None else dc0,
        None if bias is None else dbias,
        *[None] * 7,
    )


def _remember_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, cell, reverse, zoneout = inputs
    ctx.save_for_backward(*tensors)
    ctx.options = (cell, reverse, zoneout)


def _differentiate_backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
    """The second derivative, by autograd through the reference's first."""
    dy, dh, dc, _, _, u, weight, _, h0, c0, bias, lengths, mask, keys = ctx.saved_tensors
    cell, _, _ = ctx.options
    with torch.enable_grad():
        own = [None if x is None else x.detach().requires_grad_() for x in (u, weight, h0, c0, bias)]
        outer = [x.detach().requires_grad_() for x in (dy, dh, dc)]
        y, h, c = reference.recurrence(*own, lengths, mask, keys, *ctx.options)  # type: ignore[call-arg,arg-type]
        number = 3 if cell == "lstm" else 2
        present = [x for x in own if x is not None]
        first = torch.autograd.grad([y, h, c][:number], present, outer[:number], create_graph=True, allow_unused=True)
        found = dict(zip([i for i, x in enumerate(own) if x is not None], first, strict=True))
        pairs = [(found[i], g) for i, g in enumerate(gradients) if found.get(i) is not None and g is not None]
        pairs = [(a, g) for a, g in pairs if a.requires_grad]
        wanted = [*outer, *present]
        second = torch.autograd.grad(
            [a for a, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True, materialize_grads=True
        )
    ddy, ddh, ddc, *inner = second
    by_input = iter(inner)
    du, dweight, dh0, dc0, dbias = (None if x is None else next(by_input) for x in own)
    return ddy, ddh, ddc, None, None, du, dweight, None, dh0, dc0, dbias, *[None] * 6


torch.library.register_autograd("ostinato::recurrence", _differentiate, setup_context=_remember, lib=_LIBRARY)
torch.library.register_autograd(
    "ostinato::recurrence_backward", _differentiate_backward, setup_context=_remember_backward, lib=_LIBRARY
)
# States and sums are float32 whatever the surroundings compute in.
for _device in ("cpu", "cuda"):
    torch.library.register_autocast("ostinato::recurrence", _device, torch.float32, lib=_LIBRARY)


# The choice of a backend


def explain(weight: Tensor, cell: str = "lstm") -> str:
    """Which path a call with these weights takes, and why."""
    reason = unsupported(weight, cell)
    if reason is not None:
        return f"the reference loop (plain PyTorch, slow): {reason}"
    if weight.is_cuda:
        return "Triton"
    build = cpu.instruction_set() if weight.dtype == torch.float32 else "double precision, portable"
    return f"C++ ({build}{'' if cpu.openmp() else '; on one thread, since torch has not loaded the GNU OpenMP'})"


def unsupported(weight: Tensor, cell: str) -> str | None:
    """Why no backend of ours takes these weights, so that a Python loop runs over time; None if one does."""
    if weight.device.type == "cpu":
        return cpu.supports(weight)
    if weight.is_cuda:
        try:
            from kernels import gpu
        except ImportError as error:
            return f"Triton cannot be imported ({error})"
        return gpu.supports(cell, weight.shape, weight.dtype)
    return f"there is no kernel for {weight.device.type}"


def pack(weight: Tensor, cell: str, bfloat16: bool = False) -> Tensor:
    """Weights as the forward kernel reads them, for a caller that uses the same ones many times (streaming).

    Args:
        weight: (G, K, P, P).
        cell: see `recurrence`.
        bfloat16: half the bytes; sums stay in float32, gradients are those of the rounded weights.

    Returns:
        to be given to `recurrence` as `packed`, with the weights themselves.

    Raises:
        ValueError: weights or type are not what they should be.
    """
    _check_weight(weight, cell)
    if weight.ndim != 4 or weight.is_cuda or unsupported(weight, cell) is not None:
        return weight.new_empty(0)
    if bfloat16 and weight.dtype != torch.float32:
        raise ValueError(f"bfloat16 weights go with float32, not with {weight.dtype}")
    return torch.ops.ostinato.pack(weight.detach(), cell, bfloat16)


def recurrence(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None = None,
    c0: Tensor | None = None,
    *,
    cell: str,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    reverse: bool | Sequence[bool] = False,
    mask: Tensor | None = None,
    zoneout: float | tuple[float, float] = 0.0,
    keys: Tensor | None = None,
    packed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Run a recurrence over time on the fastest path that can take it.

    Args:
        u: (T, B, G H) input pre-activation, see `kernels.reference` for this and what follows.
        weight: (G, K, P, P) blocks or (G, H) diagonals.
        h0, c0: (B, H) initial state.
        cell: rnn_tanh, rnn_relu, rnn_identity, rnn_modrelu, gru (torch's), gru_original, lstm.
        bias: (G H,) recurrent bias.
        lengths: (B,) int64.
        reverse: a flag for each of R equal groups of units.
        mask: (B, H), a constant: it gets no gradient.
        zoneout: rate of h, or of h and an LSTM's c.
        keys: (B,) int64.
        packed: what `pack` made of the weights.

    All lie on one device. The floating-point ones are of one type; under autocast of any, and computed in float32.

    Returns:
        y (T, B, H), last h (B, H), last c (B, H) of an LSTM, else empty.

    Raises:
        ValueError: an argument has another shape, type, device or range than it should; the message names both.
    """
    flags = [reverse] if isinstance(reverse, bool) else list(reverse)
    rates = [zoneout, zoneout] if isinstance(zoneout, (int, float)) else list(zoneout)
    _check(u, weight, h0, c0, bias, lengths, mask, keys, cell, flags, rates)
    if torch.is_autocast_enabled(u.device.type):
        u, weight = u.float(), weight.float()
        h0, c0, bias, mask = (None if x is None else x.float() for x in (h0, c0, bias, mask))
    tensors = (h0, c0, bias, lengths, mask, keys)
    reason = unsupported(weight, cell)
    if reason is not None:
        say_once(f"{cell}: {explain(weight, cell)}", logging.WARNING)
        return reference.recurrence(u, weight, *tensors, cell, flags, rates)
    if packed is None:
        packed = pack(weight, cell)
    elif weight.ndim == 4 and not weight.is_cuda:
        of_weight = [cpu.empty_packed(weight, bfloat16) for bfloat16 in (False, True)]
        if not any(packed.shape == x.shape and packed.dtype == x.dtype for x in of_weight):
            met = f"{packed.dtype} of shape {tuple(packed.shape)}"
            _wrong("packed", met, f"what pack makes of these weights, of shape {tuple(of_weight[0].shape)}")
    needed = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (u, weight, h0, c0, bias))
    y, h, c, _ = torch.ops.ostinato.recurrence(u, weight, packed, *tensors, cell, flags, rates, needed)
    return y, h, c


def _wrong(name: str, met: object, wanted: object) -> NoReturn:
    raise ValueError(f"{name} is {met}, wanted {wanted}")


def _check_weight(weight: Tensor, cell: str) -> None:
    if cell not in GATES:
        _wrong("cell", repr(cell), f"one of {', '.join(GATES)}")
    if weight.ndim not in (2, 4):
        _wrong("weight", f"of shape {tuple(weight.shape)}", "(gates, blocks, P, P), or (gates, H) diagonals")
    if weight.shape[0] != GATES[cell]:
        _wrong("weight", f"for {weight.shape[0]} gates", f"{GATES[cell]} for the cell {cell}")
    if weight.ndim == 4 and weight.shape[2] != weight.shape[3]:
        _wrong("weight", f"of blocks {weight.shape[2]} x {weight.shape[3]}", "square ones")
    if not weight.numel():
        _wrong("weight", f"of shape {tuple(weight.shape)}", "one unit or more")


def _check(
    u: Tensor,
    weight: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    keys: Tensor | None,
    cell: str,
    reverse: list[bool],
    zoneout: list[float],
) -> None:
    _check_weight(weight, cell)
    gates = GATES[cell]
    parts = weight.shape[1]
    size = parts * (weight.shape[2] if weight.ndim == 4 else 1)
    if u.ndim != 3 or u.shape[2] != gates * size:
        _wrong("u", f"of shape {tuple(u.shape)}", f"(T, B, {gates} gates x {size} units)")
    if not reverse or parts % len(reverse):
        _wrong("reverse", f"{len(reverse)} flags", f"a number that divides the {parts} blocks or diagonals")
    batch = u.shape[1]
    shapes = {
        "h0": (h0, (batch, size)),
        "c0": (c0, (batch, size)),
        "mask": (mask, (batch, size)),
        "bias": (bias, (gates * size,)),
        "lengths": (lengths, (batch,)),
        "keys": (keys, (batch,)),
    }
    for name, (tensor, shape) in shapes.items():
        if tensor is not None and tensor.shape != shape:
            _wrong(name, f"of shape {tuple(tensor.shape)}", shape)
    if not u.is_floating_point():
        _wrong("u", f"of {u.dtype}", "floating point")
    autocast = torch.is_autocast_enabled(u.device.type)
    for name, tensor in (("weight", weight), *((name, tensor) for name, (tensor, _) in shapes.items())):
        if tensor is None:
            continue
        if name in ("lengths", "keys"):
            if tensor.dtype != torch.int64:
                _wrong(name, f"of {tensor.dtype}", torch.int64)
        elif not tensor.is_floating_point() or (tensor.dtype != u.dtype and not autocast):
            _wrong(name, f"of {tensor.dtype}", "floating point" if autocast else f"{u.dtype}, as u")
        if tensor.device != u.device:
            _wrong(name, f"on {tensor.device}", u.device)
    if mask is not None and mask.requires_grad and torch.is_grad_enabled():
        _wrong("mask", "one that requires a gradient", "a constant: no kernel has its derivative")
    if c0 is not None and cell != "lstm":
        _wrong("c0", "given", f"None: a {cell} has no cell state")
    if len(zoneout) != 2 or not all(0 <= rate < 1 for rate in zoneout):
        _wrong("zoneout", zoneout, "one rate or two, from 0 to less than 1")
    if lengths is not None and not torch.compiler.is_compiling() and lengths.device.type == "cpu" and batch:
        low, high = (int(v) for v in lengths.aminmax())
        if low < 0 or high > u.shape[0]:
            _wrong("lengths", f"from {low} to {high}", f"from 0 to the {u.shape[0]} frames of u")
