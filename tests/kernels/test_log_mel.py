"""The fast log-mel agrees with the definition, is no worse than torchaudio's, and a well-formed operator."""

import ctypes
from typing import Any

import pytest
import torch
import torchaudio
from torch import Tensor

from kernels import log_mel as module
from kernels.log_mel import NormalisedLogMel, explain, log_mel, reference
from kernels.say import say_once
from tests.kernels.builds import LESSER, run_in
from trainer.config import PROJECT

needs_kernel = pytest.mark.skipif(module.MISSING is not None, reason=f"no C++ kernels: {module.MISSING}")
FLOOR = 1e-6

# n_fft, window, hop, samples: powers of two and not, odd, prime, fewer frames than a vector has lanes, no whole vector.
SHAPES = [
    (1, 1, 1, 40),
    (2, 2, 1, 9),
    (3, 3, 2, 100),
    (4, 4, 4, 4),
    (12, 9, 5, 333),
    (201, 150, 80, 4000),
    (334, 300, 100, 4000),
    (400, 400, 160, 8000),
    (480, 480, 160, 8000),
    (512, 400, 160, 512),
    (512, 400, 160, 16001),
    (1001, 1001, 300, 9999),
    (1024, 800, 1100, 9999),
    (1764, 1102, 441, 20000),
]


def tools(n_fft: int, window: int, num_bands: int = 23) -> tuple[Tensor, Tensor]:
    """A Hann window in the middle of n_fft samples, and triangles; the smallest n_fft leave some of them empty."""
    left = (n_fft - window) // 2
    hann = torch.nn.functional.pad(torch.hann_window(window) + 0.01, (left, n_fft - window - left))
    centres = torch.linspace(-1, n_fft // 2 + 1, num_bands + 2)
    bins = torch.arange(n_fft // 2 + 1.0)[:, None]
    rise = (bins - centres[:-2]) / (centres[1:-1] - centres[:-2])
    fall = (centres[2:] - bins) / (centres[2:] - centres[1:-1])
    return hann, torch.minimum(rise, fall).clamp(min=0)


def sound(samples: int, seed: int = 0) -> Tensor:
    """Noise that falls by 80 dB towards high frequencies and swells: loud and quiet bands and frames, like speech."""
    generator = torch.Generator().manual_seed(seed)
    spectrum = torch.fft.rfft(torch.randn(samples, generator=generator, dtype=torch.float64))
    spectrum *= torch.logspace(0, -4, len(spectrum), dtype=torch.float64)
    swell = 0.02 + torch.sin(torch.arange(samples, dtype=torch.float64) / 3000).square()
    wave = torch.fft.irfft(spectrum, samples) * swell
    return (wave / wave.abs().max().clamp(min=1e-9) / 2).float()


def error(got: Tensor, wave: Tensor, window: Tensor, mel: Tensor, hop: int) -> Tensor:
    """Absolute error to the definition in float64."""
    return (got - reference(wave.double(), window.double(), mel.double(), hop, FLOOR)).abs()


@pytest.mark.parametrize("shape", [(400, 400, 160, 400), (512, 400, 160, 16001)], ids=str)
def test_normalised_in_one_pass_is_normalised_after_it(
    shape: tuple[int, int, int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    n_fft, width, hop, samples = shape
    wave, (window, mel) = sound(samples), tools(n_fft, width)
    generator = torch.Generator().manual_seed(3)
    mean, deviation = torch.randn(23, generator=generator), 0.5 + torch.rand(23, generator=generator)
    want = (log_mel(wave, window, mel, hop, FLOOR) - mean) / deviation
    compute = NormalisedLogMel(window, mel, hop, FLOOR, mean, deviation)
    assert torch.equal(compute(wave), want)
    room = torch.full((len(want) + 1, 23), 7.0)
    assert compute(wave, room[: len(want)]).data_ptr() == room.data_ptr()
    assert torch.equal(room[:-1], want)
    assert (room[-1] == 7.0).all()
    mean += 1  # what it was given is looked at anew
    assert torch.equal(compute(wave), (log_mel(wave, window, mel, hop, FLOOR) - mean) / deviation)
    with pytest.raises(ValueError, match=r"out is \(2, 23\)"):
        compute(wave, torch.empty(2, 23) if len(want) != 2 else torch.empty(3, 23))
    with pytest.raises(ValueError, match="waveform is"):
        compute(wave[: n_fft - 1])
    with pytest.raises(ValueError, match="deviation is"):
        NormalisedLogMel(window, mel, hop, FLOOR, mean, deviation[:-1])
    monkeypatch.setattr(module, "MISSING", "none here")
    torch.testing.assert_close(compute(wave), (want * deviation - 1) / deviation, atol=2e-2, rtol=0)


@needs_kernel
def test_filters_that_are_kept_are_those_of_the_call() -> None:
    wave, (window, mel) = sound(4000), tools(400, 400)
    other = mel.flip(1).contiguous()
    for _ in range(2):
        assert torch.equal(log_mel(wave, window, other, 160, FLOOR), log_mel(wave, window, mel, 160, FLOOR).flip(1))
    mel *= 2  # in place
    torch.testing.assert_close(
        log_mel(wave, window, mel, 160, FLOOR), (log_mel(wave, window, mel / 2, 160, FLOOR).exp() * 2 - FLOOR).log()
    )


@needs_kernel
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_agrees_with_the_definition(shape: tuple[int, int, int, int]) -> None:
    n_fft, width, hop, samples = shape
    wave, (window, mel) = sound(samples), tools(n_fft, width)
    assert explain(wave).startswith("C++")
    got = log_mel(wave, window, mel, hop, FLOOR)
    assert got.shape == (1 + (samples - n_fft) // hop, mel.shape[1])
    wrong = error(got, wave, window, mel, hop)
    # Quiet bands beside loud ones: the rounding of the loud ones is most of what is in them.
    assert wrong.max() < 2e-2
    assert wrong.mean() < 2e-5


CHECK = """
import torch
from tests.kernels.test_log_mel import *
for shape in SHAPES:
    test_it_agrees_with_the_definition(shape)
test_the_error_is_no_larger_than_torchaudios()
test_a_frame_has_the_same_bits_wherever_it_stands()
"""


@needs_kernel
@LESSER
def test_every_build_agrees_with_the_definition(isa: str) -> None:
    run_in(isa, CHECK)


@needs_kernel
def test_the_error_is_no_larger_than_torchaudios() -> None:
    """Largest of a clip, root mean square and mean, over two minutes of sound, with the speech recipe's features."""
    settings: dict[str, Any] = {"n_fft": 512, "win_length": 400, "hop_length": 160, "f_min": 20.0, "n_mels": 80}
    theirs = torchaudio.transforms.MelSpectrogram(16000, **settings, center=False)
    window = torch.nn.functional.pad(torch.hann_window(400), (56, 56))
    mel = theirs.mel_scale.fb
    errors: dict[str, list[Tensor]] = {"ours": [], "torchaudio": []}
    for seed in range(12):
        wave = sound(160000, seed)
        errors["ours"].append(error(log_mel(wave, window, mel, 160, FLOOR), wave, window, mel, 160))
        errors["torchaudio"].append(error((theirs(wave) + FLOOR).log().T, wave, window, mel, 160))
    ours, others = (torch.stack(e) for e in errors.values())
    assert ours.amax((1, 2)).mean() <= others.amax((1, 2)).mean()
    assert ours.square().mean() <= others.square().mean()
    assert ours.mean() <= others.mean()


@needs_kernel
def test_a_frame_has_the_same_bits_wherever_it_stands() -> None:
    """Cut into a stream, or in a batch of clips, the numbers are the same to the last bit."""
    wave, (window, mel) = sound(9000), tools(512, 400)
    whole = log_mel(wave, window, mel, 160, FLOOR)
    for start, end in [(0, 1), (3, 20), (17, 53)]:
        part = wave[160 * start : 160 * (end - 1) + 512]
        assert torch.equal(log_mel(part, window, mel, 160, FLOOR), whole[start:end])
    both = torch.stack([wave.flip(0), wave])[:, None]
    assert torch.equal(log_mel(both, window, mel, 160, FLOOR)[1, 0], whole)


@needs_kernel
def test_silence_noise_and_what_is_not_finite() -> None:
    window, mel = tools(512, 400)
    silent = log_mel(torch.zeros(2000), window, mel, 160, FLOOR)
    torch.testing.assert_close(silent, torch.full_like(silent, FLOOR).log())
    wave = sound(2000)
    wave[:40] *= 1e20
    wave[1990] = torch.nan
    got, want = log_mel(wave, window, mel, 160, FLOOR), reference(wave, window, mel, 160, FLOOR)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got == torch.inf, want == torch.inf)


@needs_kernel
def test_the_logarithm_is_good_to_the_last_places() -> None:
    """One sample a frame: what comes out is log(x^2 + floor), over the whole range of float32."""
    x = torch.logspace(-18, 18, 100_001)
    got = log_mel(x, torch.ones(1), torch.ones(1, 1), 1, 1.2e-38)[:, 0]
    exact = (x.square() + 1.2e-38).double().log()
    unit = torch.finfo(torch.float32).eps * exact.abs().clamp(min=0.5)
    assert ((got - exact).abs() / unit).max() < 1.01


@needs_kernel
def test_an_unwritten_output_would_show() -> None:
    """New memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        window, mel = tools(512, 400, 19)
        assert log_mel(torch.zeros(3, 5000), window, mel, 160, FLOOR).isfinite().all()
    finally:
        torch.use_deterministic_algorithms(False)


@needs_kernel
def test_the_operator_is_well_formed() -> None:
    window, mel = tools(12, 9, 4)
    wave = sound(60).reshape(2, 30)
    torch.library.opcheck(torch.ops.ostinato.log_mel, (wave, window, mel, 5, FLOOR))
    inputs = (wave.requires_grad_(), window.requires_grad_(), mel, 5, FLOOR)
    torch.library.opcheck(torch.ops.ostinato.log_mel, inputs)


@needs_kernel
def test_gradients_are_those_of_the_definition() -> None:
    wave, (window, mel) = sound(700).requires_grad_(), tools(64, 50, 9)
    weights = torch.randn(1 + (700 - 64) // 20, 9, generator=torch.Generator().manual_seed(0))
    want, got = (
        torch.autograd.grad((f(wave, window, mel, 20, FLOOR) * weights).sum(), wave)[0] for f in (reference, log_mel)
    )
    torch.testing.assert_close(got, want)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"waveform": torch.zeros(7)}, r"waveform is of shape \(7,\), wanted \(..., N\) with N at least n_fft = 8"),
    ({"waveform": torch.zeros(20, dtype=torch.int16)}, "waveform is of torch.int16, wanted floating point"),
    ({"waveform": torch.zeros(20, dtype=torch.float64)}, "window is of torch.float32, wanted torch.float64"),
    ({"window": torch.ones(2, 4)}, r"window is of shape \(2, 4\), wanted \(n_fft,\)"),
    ({"mel": torch.ones(4, 3)}, r"mel is of shape \(4, 3\), wanted \(5, F\) for n_fft = 8"),
    ({"mel": torch.ones(5, 3, device="meta")}, "mel is on meta, wanted cpu"),
    ({"hop": 0}, "hop is 0, wanted 1 or more"),
    ({"floor": 0.0}, "floor is 0.0, wanted more than 0"),
]


@pytest.mark.parametrize(("changed", "wanted"), WRONG, ids=[w for _, w in WRONG])
def test_a_wrong_argument_is_named(changed: dict[str, Any], wanted: str) -> None:
    right: dict[str, Any] = {"waveform": torch.zeros(20), "window": torch.ones(8), "mel": torch.ones(5, 3)}
    right |= {"hop": 4, "floor": FLOOR}
    log_mel(**right)
    with pytest.raises(ValueError, match=wanted):
        log_mel(**(right | changed))


@needs_kernel
def test_the_self_test_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    assert module.selftest() == 8
    right = module.log_mel
    monkeypatch.setattr(module, "log_mel", lambda *arguments: right(*arguments) + 1e-4)
    with pytest.raises(AssertionError, match=r"n_fft = 1, C.*differs by 1\.0e-04"):
        module.selftest()


def test_without_the_library_the_reference_serves(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Everything still works, and one line says why it is slow."""
    wave, (window, mel) = sound(4000), tools(512, 400)
    before = log_mel(wave, window, mel, 160, FLOOR)
    monkeypatch.setattr(module, "MISSING", "the C++ kernels were not built")
    assert explain(wave) == "plain PyTorch: the C++ kernels were not built"
    say_once.cache_clear()
    with caplog.at_level("INFO", logger="kernels"):
        for _ in range(2):
            after = log_mel(wave, window, mel, 160, FLOOR)
    assert [r.message for r in caplog.records] == ["log-mel by plain PyTorch: the C++ kernels were not built"]
    assert torch.equal(after, reference(wave, window, mel, 160, FLOOR))
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)


def test_the_interface_has_the_fields_of_the_source() -> None:
    """A field more or less on one side would shift all that follow."""
    source = (PROJECT / "kernels/log_mel.cpp").read_text(encoding="utf-8")
    body = source.partition("struct LogMelCall {")[2].partition("};")[0]
    names = []
    for line in body.splitlines():
        declaration = line.partition("//")[0].strip().rstrip(";")
        names += [part.split()[-1].lstrip("*") for part in declaration.split(",") if part.strip()]
    assert names == [field[0] for field in module._Call._fields_]
    assert ctypes.sizeof(module._Call) == 8 * len(names)
