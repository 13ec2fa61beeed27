"""A recurrent net whose state is a distribution: a loop in plain PyTorch, and an operator that computes the same.

Under dropout each pre-activation is a sum of many independent terms, so nearly Gaussian: its mean and variance are
enough (fast dropout, Wang & Manning 2013; for recurrent nets Bayer et al. 2013, arXiv:1311.0701). `reference` is the
definition. `moments` is `ostinato::moments` where the C++ of `moments.cpp` can take the call, and the reference where
it cannot (other devices and types, no compiler at install time).
"""

import ctypes
import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from torch import Tensor

from kernels import cpu, products
from kernels.say import say_once

Moments = tuple[Tensor, Tensor]
"""Mean and variance, of one shape."""

_LIBRARY = torch.library.Library("ostinato", "FRAGMENT")
_LIBRARY.define(
    "moments(Tensor um, Tensor uv, Tensor weight, Tensor m0, Tensor v0, float rate, bool save)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "moments_backward(Tensor dm, Tensor dv, Tensor m, Tensor am, Tensor av, Tensor weight, Tensor m0, float rate)"
    " -> (Tensor, Tensor, Tensor, Tensor)"
)

SELFTEST_TOLERANCE = 1e-5


def dropout(mean: Tensor, variance: Tensor, rate: float) -> Moments:
    """x z with z Bernoulli(q), q = 1 - rate, not divided by q: (q m, q (1 - q) m^2 + q v)."""
    q = 1 - rate
    return q * mean, q * (1 - q) * mean.square() + q * variance


def sigmoid_mean(mean: Tensor, variance: Tensor) -> Tensor:
    """The number whose sigmoid is the expected sigmoid: m / sqrt(1 + pi v / 8) (MacKay 1992)."""
    return mean * torch.rsqrt(1 + math.pi / 8 * variance)


def sigmoid(mean: Tensor, variance: Tensor) -> Moments:
    """s(x): E = s(m / sqrt(1 + pi v / 8)); E s^2 by s(x)^2 ~ s(a (x - b)), a = 4 - 2 sqrt 2, b = -ln(sqrt 2 - 1)."""
    a, b = 4 - 2 * math.sqrt(2), -math.log(math.sqrt(2) - 1)
    expected = torch.sigmoid(sigmoid_mean(mean, variance))
    square = torch.sigmoid(sigmoid_mean(a * (mean - b), a * a * variance))
    return expected, (square - expected.square()).clamp_min(0.0)


def tanh(mean: Tensor, variance: Tensor) -> Moments:
    """tanh x = 2 s(2 x) - 1."""
    expected, spread = sigmoid(2 * mean, 4 * variance)
    return 2 * expected - 1, 4 * spread


def reference(
    um: Tensor,
    uv: Tensor,
    weight: Tensor,
    m0: Tensor,
    v0: Tensor,
    rate: float,
    squash: Callable[[Tensor, Tensor], Moments] = tanh,
) -> Moments:
    """The definition; arguments as of `moments`, and `squash`: moments of the cell's function of a Gaussian."""
    squared, m, v, states = weight.square(), m0, v0, []
    for mean, variance in zip(um.unbind(0), uv.unbind(0), strict=True):
        m, v = dropout(m, v, rate)
        m, v = squash(mean + m @ weight.T, variance + v @ squared.T)
        states.append((m, v))
    if not states:
        return um.clone(), uv.clone()
    means, variances = zip(*states, strict=True)
    return torch.stack(means), torch.stack(variances)


def moments(um: Tensor, uv: Tensor, weight: Tensor, m0: Tensor, v0: Tensor, rate: float) -> Moments:
    """Means and variances of a dense tanh net's state after each frame, closed formulae as in `tanh`.

    m', v' = dropout(m, v, rate); m, v = tanh(um + m' W^T, uv + v' (W o W)^T). The CPU kernel works on one thread and
    has no second derivative.

    Args:
        um, uv: mean and variance of what the inputs give to the pre-activations, biases included.
        m0, v0: of the state before the first frame.
        rate: of the dropout of the state.

    Shape:
        um, uv: (T, B, H), weight: (H, H), m0, v0: (B, H) -> twice (T, B, H)

    Raises:
        ValueError: an argument has another shape, type or device than it should; the message names both.
    """
    _check(um, uv, weight, m0, v0, rate)
    path = explain(um)
    if not path.startswith("C++"):
        say_once(f"fast_dropout: {path}")
        return reference(um, uv, weight, m0, v0, rate)
    differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (um, uv, weight, m0, v0))
    m, v, _, _ = torch.ops.ostinato.moments(um, uv, weight, m0, v0, rate, differentiated)
    return m, v


def explain(um: Tensor) -> str:
    """Which path a call takes, and why."""
    return cpu.explain(um, "the reference loop (plain PyTorch, slow)", MISSING)


def selftest() -> int:
    """Compare the kernel with the reference in float64 on this machine, outputs and every gradient.

    Returns:
        number of cases that agreed.

    Raises:
        AssertionError: one did not; the message names it and the error.
    """
    cases = ((1, 1, 1), (3, 2, 7), (20, 17, 33), (40, 5, 64), (7, 33, 100))
    for steps, batch, size in cases:
        generator = torch.Generator().manual_seed(size)
        shapes = (steps, batch, size), (steps, batch, size), (size, size), (batch, size), (batch, size)
        given = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
        given[1], given[2], given[4] = given[1].square(), given[2] / size**0.5, given[4].square()
        directions = [torch.randn(shapes[0], generator=generator, dtype=torch.float64) for _ in range(2)]
        found = []
        for dtype, function in ((torch.float32, moments), (torch.float64, reference)):
            um, uv, weight, m0, v0 = own = [x.to(dtype).requires_grad_() for x in given]
            out = function(um, uv, weight, m0, v0, 0.3)
            gradients = torch.autograd.grad(out, own, [d.to(dtype) for d in directions])
            found.append([x.detach().double() for x in (*out, *gradients)])
        error = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in zip(*found, strict=True))
        if not error <= SELFTEST_TOLERANCE:
            path = explain(given[0].float())
            raise AssertionError(f"moments, {steps} x {batch} x {size}, {path}: differs by {error:.1e}")
    return len(cases)


def _wrong(name: str, met: object, wanted: object) -> NoReturn:
    raise ValueError(f"{name} is {met}, wanted {wanted}")


def _check(um: Tensor, uv: Tensor, weight: Tensor, m0: Tensor, v0: Tensor, rate: float) -> None:
    if um.ndim != 3 or not um.is_floating_point():
        _wrong("um", f"of shape {tuple(um.shape)}, {um.dtype}", "(T, B, H), floating point")
    _, batch, size = um.shape
    shapes = {"uv": (uv, um.shape), "weight": (weight, (size, size)), "m0": (m0, (batch, size))}
    for name, (x, shape) in (shapes | {"v0": (v0, (batch, size))}).items():
        if x.shape != torch.Size(shape):
            _wrong(name, f"of shape {tuple(x.shape)}", tuple(shape))
        if x.dtype != um.dtype or x.device != um.device:
            _wrong(name, f"of {x.dtype} on {x.device}", f"{um.dtype} on {um.device}, as um")
    if not 0 <= rate < 1:
        _wrong("rate", rate, "0 or more, and below 1")


# The operator

_GIVEN = ("um", "uv", "weight", "m0", "v0")
_MADE = ("m", "v", "am", "av", "dm", "dv", "dum", "duv", "dm0", "dv0")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("T", "B", "H")),
        ("rate", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in (*_GIVEN, *_MADE)),
    ]


def _run(backward: bool, rate: float, shape: torch.Size, **tensors: Tensor) -> None:
    kept = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor.numel()}  # until the call returns
    call = _Call(*shape, rate, **{name: tensor.data_ptr() for name, tensor in kept.items()})
    if shape.numel() and _FUNCTION(ctypes.byref(call), int(backward)):
        raise MemoryError(f"no memory for the workspace of moments: (T, B, H) = {tuple(shape)}")


def _empty(um: Tensor, save: bool) -> tuple[Tensor, ...]:
    saved = um.shape if save else torch.Size((0,))
    return tuple(um.new_empty(shape) for shape in (um.shape, um.shape, saved, saved))


def _forward(
    um: Tensor, uv: Tensor, weight: Tensor, m0: Tensor, v0: Tensor, rate: float, save: bool
) -> tuple[Tensor, ...]:
    m, v, am, av = _empty(um, save)
    _run(False, rate, um.shape, um=um, uv=uv, weight=weight, m0=m0, v0=v0, m=m, v=v, am=am, av=av)
    return m, v, am, av


def _backward(
    dm: Tensor, dv: Tensor, m: Tensor, am: Tensor, av: Tensor, weight: Tensor, m0: Tensor, rate: float
) -> tuple[Tensor, ...]:
    dum, duv, dm0, dv0 = m.new_empty(m.shape), m.new_empty(m.shape), m0.new_zeros(m0.shape), m0.new_zeros(m0.shape)
    given = {"dm": dm, "dv": dv, "m": m, "am": am, "av": av, "weight": weight, "m0": m0}
    _run(True, rate, m.shape, **given, dum=dum, duv=duv, dm0=dm0, dv0=dv0)
    return dum, duv, dm0, dv0


_LIBRARY.impl("moments", _forward, "CPU")
_LIBRARY.impl("moments_backward", _backward, "CPU")


@torch.library.register_fake("ostinato::moments", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(um: Tensor, uv: Tensor, weight: Tensor, m0: Tensor, v0: Tensor, rate: float, save: bool) -> tuple[Tensor, ...]:
    return _empty(um, save)


@torch.library.register_fake("ostinato::moments_backward", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(dm: Tensor, dv: Tensor, m: Tensor, am: Tensor, av: Tensor, weight: Tensor, m0: Tensor, rate: float) -> Any:
    return m.new_empty(m.shape), m.new_empty(m.shape), m0.new_empty(m0.shape), m0.new_empty(m0.shape)


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, m0, v0, ctx.rate, save = inputs
    if not save:
        raise RuntimeError("ostinato::moments was called with save=False, and a gradient through it is asked for")
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(*output, weight, m0, v0)


@torch.autograd.function.once_differentiable
def _differentiate(ctx: Any, dm: Tensor, dv: Tensor, *_: Any) -> tuple[Any, ...]:
    m, v, am, av, weight, m0, v0 = ctx.saved_tensors
    dum, duv, dm0, dv0 = torch.ops.ostinato.moments_backward(dm, dv, m, am, av, weight, m0, ctx.rate)
    means, variances = (torch.cat([first[None], states])[:-1] for first, states in ((m0, m), (v0, v)))
    means, variances = dropout(means, variances, ctx.rate)  # what the matrices were multiplied by
    of_mean, of_variance = (
        products.outer(gradient.flatten(0, 1), x.flatten(0, 1)) for gradient, x in ((dum, means), (duv, variances))
    )
    return dum, duv, of_mean + 2 * weight * of_variance, dm0, dv0, None, None


torch.library.register_autograd("ostinato::moments", _differentiate, setup_context=_remember, lib=_LIBRARY)
_FUNCTION, MISSING = cpu.function("moments")
