"""Log-mel energies, what a speech recogniser hears of a waveform: the definition, and an operator, fast on a CPU.

`reference` defines them in plain PyTorch. `log_mel` is `ostinato::log_mel` where the C++ of `log_mel.cpp` can take the
call, and the reference where it cannot (other devices and types, no compiler at install time). Gradients are those of
the reference, paid for only when somebody asks.
"""

import ctypes
from typing import Any, NoReturn

import torch
from torch import Tensor

from kernels import cpu
from kernels.say import say_once

_LIBRARY = torch.library.Library("ostinato", "FRAGMENT")
_LIBRARY.define("log_mel(Tensor waveform, Tensor window, Tensor mel, int hop, float floor) -> Tensor")

SMALLEST_FLOOR = torch.finfo(torch.float32).tiny
SELFTEST_TOLERANCE = 1e-5  # logarithms down to that of the floor, in float32


def reference(waveform: Tensor, window: Tensor, mel: Tensor, hop: int, floor: float) -> Tensor:
    """The definition; arguments as of `log_mel`."""
    frames = waveform.unfold(-1, len(window), hop) * window  # (..., T, n_fft)
    spectrum = torch.view_as_real(torch.fft.rfft(frames))
    power = spectrum.square().sum(-1)  # (..., T, n_fft // 2 + 1)
    return (power @ mel + floor).log()


def log_mel(waveform: Tensor, window: Tensor, mel: Tensor, hop: int, floor: float) -> Tensor:
    """Logarithms of the energies in mel bands, a row a frame; frame t sees the samples from t * hop on and no others.

    The CPU kernel works on one thread and lets other Python threads run meanwhile. A frame has the same bits wherever
    in a clip it stands.

    Args:
        waveform: samples, at least n_fft of them.
        window: what each frame is multiplied by.
        mel: filter bank, not negative.
        hop: samples from one frame to the next.
        floor: added to each energy, more than 0.

    Shape:
        waveform: (..., N); window: (n_fft,); mel: (n_fft // 2 + 1, F)
        returns: (..., T, F), T = 1 + (N - n_fft) // hop

    Raises:
        ValueError: an argument has another shape, type, device or range than it should; the message names both.
    """
    _check(waveform, window, mel, hop, floor)
    path = explain(waveform)
    if path.startswith("C++"):
        return torch.ops.ostinato.log_mel(waveform, window, mel, hop, floor)
    if waveform.device.type == "cpu":
        say_once(f"log-mel by {path}")
    return reference(waveform, window, mel, hop, floor)


class NormalisedLogMel:
    """(log_mel(waveform) - mean) / deviation in one pass and without a gradient: what a loader computes of each clip.

    Args:
        window, mel, hop, floor: see `log_mel`.
        mean, deviation: of each band over the corpus.

    Shape:
        mean, deviation: (F,)

    Raises:
        ValueError: an argument has another shape, type, device or range than it should.
    """

    def __init__(self, window: Tensor, mel: Tensor, hop: int, floor: float, mean: Tensor, deviation: Tensor) -> None:
        _check(window.new_empty(len(window)), window, mel, hop, floor)
        for name, x in (("mean", mean), ("deviation", deviation)):
            if x.shape != mel.shape[1:] or x.dtype != mel.dtype or x.device != mel.device:
                _wrong(name, f"{tuple(x.shape)} of {x.dtype} on {x.device}", f"({mel.shape[1]},), alike with mel")
        self.window, self.mel, self.hop, self.floor, self.mean, self.deviation = (
            window,
            mel,
            hop,
            floor,
            mean,
            deviation,
        )

    def num_frames(self, num_samples: int) -> int:
        """T of a clip of N samples, n_fft of them or more."""
        return 1 + (num_samples - len(self.window)) // self.hop

    def __call__(self, waveform: Tensor, out: Tensor | None = None) -> Tensor:
        """Features of one clip.

        Args:
            out: contiguous room for the result.

        Shape:
            waveform: (N,), N at least n_fft; out: (T, F)

        Raises:
            ValueError: see `log_mel`; or `out` is not what the result fits.
        """
        shape = self.num_frames(len(waveform)), self.mel.shape[1]
        if waveform.ndim != 1 or shape[0] < 1 or waveform.dtype != self.mel.dtype:
            _wrong("waveform", f"{tuple(waveform.shape)} of {waveform.dtype}", f"(N,) of {self.mel.dtype}, N >= n_fft")
        if out is None:
            out = waveform.new_empty(shape)
        elif out.shape != shape or out.dtype != waveform.dtype or not out.is_contiguous():
            _wrong("out", f"{tuple(out.shape)} of {out.dtype}", f"{shape} of {waveform.dtype}, contiguous")
        tools = waveform, self.window, self.mel, self.hop, self.floor
        if waveform.is_cpu and waveform.dtype == torch.float32 and MISSING is None:
            _compute(out, *tools, self.mean, self.deviation)
        else:
            with torch.no_grad():
                torch.sub(log_mel(*tools), self.mean, out=out).div_(self.deviation)
        return out


def explain(waveform: Tensor) -> str:
    """Which path a waveform takes, and why."""
    return cpu.explain(waveform, "plain PyTorch", MISSING)


def selftest() -> int:
    """Compare the kernel with the definition in float64 on this machine.

    Returns:
        number of cases that agreed.

    Raises:
        AssertionError: one did not; the message names it and the error.
    """
    sizes = (1, 2, 6, 201, 334, 400, 512, 1024)
    for n_fft in sizes:
        generator = torch.Generator().manual_seed(n_fft)
        wave, window = (torch.rand(n, generator=generator) - 0.5 for n in (20 * n_fft + 7, n_fft))
        mel = torch.rand(n_fft // 2 + 1, 19, generator=generator)
        want = reference(wave.double(), window.double(), mel.double(), max(1, n_fft // 3), 1e-6)
        error = float((log_mel(wave, window, mel, max(1, n_fft // 3), 1e-6) - want).abs().max())
        if not error <= SELFTEST_TOLERANCE:
            raise AssertionError(f"log_mel, n_fft = {n_fft}, {explain(wave)}: differs by {error:.1e}")
    return len(sizes)


def _wrong(name: str, met: object, wanted: object) -> NoReturn:
    raise ValueError(f"{name} is {met}, wanted {wanted}")


def _check(waveform: Tensor, window: Tensor, mel: Tensor, hop: int, floor: float) -> None:
    if window.ndim != 1 or not len(window):
        _wrong("window", f"of shape {tuple(window.shape)}", "(n_fft,)")
    n_fft = len(window)
    if waveform.ndim < 1 or waveform.shape[-1] < n_fft:
        _wrong("waveform", f"of shape {tuple(waveform.shape)}", f"(..., N) with N at least n_fft = {n_fft}")
    if mel.ndim != 2 or mel.shape[0] != n_fft // 2 + 1:
        _wrong("mel", f"of shape {tuple(mel.shape)}", f"({n_fft // 2 + 1}, F) for n_fft = {n_fft}")
    if hop < 1:
        _wrong("hop", hop, "1 or more")
    if not floor >= SMALLEST_FLOOR:
        _wrong("floor", floor, "more than 0, as a float32")
    if not waveform.is_floating_point():
        _wrong("waveform", f"of {waveform.dtype}", "floating point")
    for name, tensor in (("window", window), ("mel", mel)):
        if tensor.dtype != waveform.dtype:
            _wrong(name, f"of {tensor.dtype}", f"{waveform.dtype}, as waveform")
        if tensor.device != waveform.device:
            _wrong(name, f"on {tensor.device}", waveform.device)


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("clips", "samples", "n_fft", "hop", "bands")),
        ("floor", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("waveform", "window", "mel", "mean", "deviation", "out")),
    ]


def _empty(waveform: Tensor, window: Tensor, mel: Tensor, hop: int) -> Tensor:
    frames = 1 + (waveform.shape[-1] - len(window)) // hop
    return waveform.new_empty(*waveform.shape[:-1], frames, mel.shape[1])


def _on_cpu(waveform: Tensor, window: Tensor, mel: Tensor, hop: int, floor: float) -> Tensor:
    out = _empty(waveform, window, mel, hop)
    _compute(out, waveform, window, mel, hop, floor)
    return out


def _compute(out: Tensor, waveform: Tensor, window: Tensor, mel: Tensor, hop: int, floor: float, *norm: Tensor) -> None:
    """To `out`, which is contiguous; `norm`: mean and deviation, or neither."""
    inputs = [x.contiguous() for x in (waveform, window, mel, *norm)]  # alive until the call returns
    samples = waveform.shape[-1]
    sizes = waveform.numel() // samples, samples, len(window), hop, mel.shape[1]
    pointers = [x.data_ptr() for x in inputs] if norm else [*(x.data_ptr() for x in inputs), None, None]
    call = _Call(*sizes, floor, *pointers, out.data_ptr())
    if out.numel() and _FUNCTION(ctypes.byref(call)):
        raise MemoryError(f"no memory for the workspace of log_mel: n_fft = {len(window)}")


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.hop, ctx.floor = inputs
    ctx.save_for_backward(*tensors)


def _differentiate(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
    wanted = ctx.needs_input_grad[:3]
    with torch.enable_grad():
        own = [x.detach().requires_grad_(w) for x, w in zip(ctx.saved_tensors, wanted, strict=True)]
        waveform, window, mel = own
        y = reference(waveform, window, mel, ctx.hop, ctx.floor)
    found = iter(torch.autograd.grad(y, [x for x in own if x.requires_grad], gradient))
    return *(next(found) if w else None for w in wanted), None, None


_LIBRARY.impl("log_mel", _on_cpu, "CPU")


@torch.library.register_fake("ostinato::log_mel", lib=_LIBRARY)  # type: ignore[untyped-decorator]
def _(waveform: Tensor, window: Tensor, mel: Tensor, hop: int, floor: float) -> Tensor:
    return _empty(waveform, window, mel, hop)


torch.library.register_autograd("ostinato::log_mel", _differentiate, setup_context=_remember, lib=_LIBRARY)
_FUNCTION, MISSING = cpu.function("log_mel")
