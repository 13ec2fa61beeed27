"""The CTC loss of a batch (Graves et al. 2006): torch's, and an operator that computes the same, fast on a CPU.

`reference` is `torch.nn.functional.ctc_loss`. `ctc_loss` is `ostinato::ctc` where the C++ of `ctc.cpp` can take the
call, and the reference where it cannot (other devices and types, no compiler at install time), and for rows whose sums
leave the range of a double.
"""

import ctypes
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cpu
from kernels.say import say_once

_LIBRARY = torch.library.Library("ostinato", "FRAGMENT")
_LIBRARY.define(
    "ctc(Tensor log_probs, Tensor labels, Tensor lengths, Tensor label_lengths, int blank, bool differentiate)"
    " -> (Tensor, Tensor)"
)

SELFTEST_TOLERANCE = 1e-5


def reference(log_probs: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor, blank: int = 0) -> Tensor:
    """The definition; arguments as of `ctc_loss`."""
    if not len(log_probs):  # which torch does not take
        return log_probs.sum((1, 2))
    return F.ctc_loss(log_probs.transpose(0, 1), labels, lengths, label_lengths, blank=blank, reduction="none")


def ctc_loss(log_probs: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor, blank: int = 0) -> Tensor:
    """Negative logarithm of the probability of each row's labels, in nats: infinite where its frames are too few.

    The gradient is that of the definition as it stands, minus the share of all paths that is at a label: torch adds
    the probability, so that the two are equal only behind a log-softmax. It is computed along with the loss. It has no
    gradient in its turn. The CPU kernel works on one thread and lets other Python threads run meanwhile.

    Args:
        log_probs: logarithms of probabilities, as `log_softmax` gives them.
        labels: those of all rows, one after the other, int64, none of them the blank.
        lengths, label_lengths: of the rows, int64.
        blank: the label that stands for none.

    Shape:
        log_probs: (B, T, V), labels: (sum of label_lengths,), lengths, label_lengths: (B,) -> (B,)

    Raises:
        ValueError: an argument has another shape, type, device or range than it should; the message names both.
    """
    _check(log_probs, labels, lengths, label_lengths, blank)
    path = explain(log_probs)
    if not path.startswith("C++"):
        if log_probs.device.type == "cpu":
            say_once(f"CTC by {path}")
        return reference(log_probs, labels, lengths, label_lengths, blank)
    differentiate = log_probs.requires_grad and torch.is_grad_enabled()
    nats: Tensor = torch.ops.ostinato.ctc(log_probs, labels, lengths, label_lengths, blank, differentiate)[0]
    if not bool((lost := nats.isnan()).any()):
        return nats
    rows = lost.nonzero()[:, 0]
    own = [part for part, is_lost in zip(labels.split(label_lengths.tolist()), lost.tolist(), strict=True) if is_lost]
    again = reference(log_probs[rows], torch.cat(own), lengths[rows], label_lengths[rows], blank)
    return nats.masked_fill(lost, 0.0).index_add(0, rows, again)


def explain(log_probs: Tensor) -> str:
    """Which path a batch takes, and why."""
    return cpu.explain(log_probs, "torch's ctc_loss", MISSING)


def selftest() -> int:
    """Compare the kernel with torch's in float64 on this machine, losses and gradients.

    Returns:
        number of cases that agreed.

    Raises:
        AssertionError: one did not; the message names it and the error.
    """
    cases = ((1, 1, 2, 0), (3, 5, 4, 2), (4, 60, 30, 25), (2, 200, 500, 40))
    for batch, frames, classes, longest in cases:
        generator = torch.Generator().manual_seed(frames)
        scores = 3 * torch.randn(batch, frames, classes, generator=generator)
        label_lengths = torch.randint(0, longest + 1, (batch,), generator=generator)
        labels = torch.randint(1, classes, (int(label_lengths.sum()),), generator=generator)
        rest = labels, torch.full((batch,), frames), label_lengths
        found = []
        for dtype, loss in ((torch.float32, ctc_loss), (torch.float64, reference)):
            x = scores.to(dtype).requires_grad_()
            nats = loss(x.log_softmax(-1), *rest)
            nats = nats[nats.isfinite()]
            found.append((nats.detach().double(), torch.autograd.grad(nats.sum(), x)[0].double()))
        (nats, gradient), (want, want_gradient) = found
        error = max(float((nats / want - 1).abs().max()), float((gradient - want_gradient).abs().max()))
        if not error <= SELFTEST_TOLERANCE:
            raise AssertionError(f"ctc, {batch} x {frames} x {classes}, {explain(scores)}: differs by {error:.1e}")
    return len(cases)


def _wrong(name: str, met: object, wanted: object) -> NoReturn:
    raise ValueError(f"{name} is {met}, wanted {wanted}")


def _check(log_probs: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor, blank: int) -> None:
    if log_probs.ndim != 3 or not log_probs.is_floating_point():
        _wrong("log_probs", f"of shape {tuple(log_probs.shape)}, {log_probs.dtype}", "(B, T, V), floating point")
    batch, frames, classes = log_probs.shape
    if not 0 <= blank < classes:
        _wrong("blank", blank, f"0 to V - 1 = {classes - 1}")
    if labels.ndim != 1 or labels.dtype != torch.int64:
        _wrong("labels", f"of shape {tuple(labels.shape)}, {labels.dtype}", "(N,) of torch.int64, row after row")
    for name, x in (("lengths", lengths), ("label_lengths", label_lengths)):
        if x.shape != (batch,) or x.dtype != torch.int64:
            _wrong(name, f"of shape {tuple(x.shape)}, {x.dtype}", f"({batch},) of torch.int64")
        if x.device.type == "cpu" and batch and not (int(x.min()) >= 0 and int(x.max()) <= max(frames, len(labels))):
            _wrong(name, f"from {int(x.min())} to {int(x.max())}", "none below 0 or above what there is")
    if log_probs.device.type != "cpu":
        return  # to look there would wait for the device
    if batch and int(lengths.max()) > frames:
        _wrong("lengths", f"up to {int(lengths.max())}", f"at most T = {frames}")
    if int(label_lengths.sum()) != len(labels):
        _wrong("labels", f"{len(labels)} of them", f"{int(label_lengths.sum())}, the sum of label_lengths")
    if len(labels) and not (int(labels.min()) >= 0 and int(labels.max()) < classes):
        _wrong("labels", f"from {int(labels.min())} to {int(labels.max())}", f"0 to V - 1 = {classes - 1}")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("B", "T", "V", "blank", "N")),
        *((name, ctypes.c_void_p) for name in ("log_probs", "labels", "lengths", "label_lengths", "nats", "gradient")),
    ]


def _on_cpu(
    log_probs: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor, blank: int, differentiate: bool
) -> tuple[Tensor, Tensor]:
    inputs = [x.contiguous() for x in (log_probs, labels, lengths, label_lengths)]  # alive until the call returns
    nats = log_probs.new_empty(len(log_probs))
    gradient = torch.zeros_like(inputs[0]) if differentiate else log_probs.new_empty(0)
    pointers = [x.data_ptr() for x in (*inputs, nats)]
    call = _Call(*log_probs.shape, blank, len(labels), *pointers, gradient.data_ptr() if differentiate else None)
    if _FUNCTION(ctypes.byref(call)):
        raise MemoryError(f"no memory for the sums of a CTC loss over {log_probs.shape[1]} frames")
    return nats, gradient


def _remember(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)


@torch.autograd.function.once_differentiable
def _differentiate(ctx: Any, of_nats: Tensor, _: Any) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    return gradient * of_nats[:, None, None], None, None, None, None, None


_LIBRARY.impl("ctc", _on_cpu, "CPU")


@torch.library.register_fake("ostinato::ctc", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(
    log_probs: Tensor, labels: Tensor, lengths: Tensor, label_lengths: Tensor, blank: int, differentiate: bool
) -> tuple[Tensor, Tensor]:
    return log_probs.new_empty(len(log_probs)), log_probs.new_empty(log_probs.shape if differentiate else (0,))


torch.library.register_autograd("ostinato::ctc", _differentiate, setup_context=_remember, lib=_LIBRARY)
_FUNCTION, MISSING = cpu.function("ctc")
