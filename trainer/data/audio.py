"""Waveforms to features: decoding, speed perturbation, log-mel.

Every frame is a function of the samples under its window alone (no centring, no reflection), so a clip has the same
features alone, in a padded batch, and cut into a stream.
"""

import contextlib
import io
import math
from collections.abc import Sequence
from functools import lru_cache
from tokenize import TokenError
from typing import Literal, TypeVar

import miniaudio
import numpy as np
import soundfile
import torch
import torchaudio
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from zlib_ng import zlib_ng

from kernels.log_mel import NormalisedLogMel, log_mel
from trainer.config import Config
from trainer.errors import UserError

LOG_FLOOR = 1e-6
"""Added to a band's energy before the logarithm: about the noise of 16-bit audio."""
MIN_SAMPLE_RATE_HZ = 1000
"""Below it a window of a millisecond would hold no sample."""

MAX_SAMPLES = 2**28
"""Of one clip: more than four hours at 16 kHz."""

DAMAGED = (ValueError, EOFError, OSError, SyntaxError, TypeError, OverflowError, MemoryError, TokenError)
"""What numpy raises over the header of a damaged .npy file: it is Python's text, and may name any size."""


class FeaturesConfig(Config):
    """Log-mel energies, normalised by the mean and deviation of each band over the training corpus."""

    kind: Literal["log_mel", "precomputed"] = "log_mel"
    """Computed from sound; or matrices that the corpus brings, such as cepstra, with `num_bands` columns and a row each
    `hop_ms`."""
    num_bands: PositiveInt = 80
    """F, mel bands from 20 Hz to half the sample rate."""
    window_ms: float = Field(25.0, ge=1, le=1000)
    """Hann window; of log-mel energies only."""
    hop_ms: float = Field(10.0, ge=1, le=1000)
    clip_mean: bool = False
    """Each clip's own mean of every band in place of the corpus': microphones and distances no longer tell (Atal
    1974). For few speakers; such a model needs whole recordings."""
    where: Literal["worker", "model"] = "worker"
    """Computed clip by clip in the loader (best on a CPU) or as the model's first layer (best on a GPU)."""

    def rate_hz(self, sample_rate_hz: int) -> int:
        """Values a second of what a shard holds: samples, or rows of a matrix."""
        return sample_rate_hz if self.kind == "log_mel" else round(1000 / self.hop_ms)

    def build(self, sample_rate_hz: int) -> "LogMel | Precomputed":
        if self.kind == "precomputed":
            return Precomputed(self)
        if sample_rate_hz < MIN_SAMPLE_RATE_HZ:
            raise UserError(f"data.sample_rate_hz = {sample_rate_hz}: wanted {MIN_SAMPLE_RATE_HZ} or more")
        return LogMel(self, sample_rate_hz)


class LogMel(nn.Module):
    """Waveforms to normalised log-mel energies.

    Args:
        config: bands, window, hop.
        sample_rate_hz: of the waveforms.

    Shape:
        waveforms: (B, N) float in [-1, 1]; lengths: (B,) samples
        returns: (B, T, F) with zeros past each length, and lengths (B,) in frames; T = 1 + (N - n_fft) // hop, at
        least 1 (a shorter clip is padded with silence)
    """

    floor = LOG_FLOOR
    window: Tensor
    mel: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, config: FeaturesConfig, sample_rate_hz: int) -> None:
        super().__init__()
        self.sample_rate_hz = sample_rate_hz
        self.clip_mean = config.clip_mean
        self.hop = round(sample_rate_hz * config.hop_ms / 1000)
        window = round(sample_rate_hz * config.window_ms / 1000)
        self.n_fft = 2 ** math.ceil(math.log2(window))
        self.num_bands = config.num_bands
        left = (self.n_fft - window) // 2
        padded = nn.functional.pad(torch.hann_window(window), (left, self.n_fft - window - left))
        mel = torchaudio.functional.melscale_fbanks(
            self.n_fft // 2 + 1, 20.0, float(sample_rate_hz // 2), config.num_bands, sample_rate_hz
        )
        self.register_buffer("window", padded, persistent=False)
        self.register_buffer("mel", mel, persistent=False)
        self.register_buffer("mean", torch.zeros(config.num_bands))
        self.register_buffer("deviation", torch.ones(config.num_bands))
        self._normalised = NormalisedLogMel(padded, mel, self.hop, LOG_FLOOR, self.mean, self.deviation)

    def decode(
        self, content: bytes, intact: bool = False, room: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Samples (N,) of a member of a shard; see `decode`."""
        return decode(content, self.sample_rate_hz, intact, room)

    def silence(self) -> Tensor:
        """The shortest clip, of one frame: (N,)."""
        return torch.zeros(self.n_fft)

    def num_frames(self, num_samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """T of clips of N samples."""
        return 1 + np.maximum(0, num_samples - self.n_fft) // self.hop

    def energies(self, waveform: Tensor) -> Tensor:
        """Log energies before normalisation: (..., N) -> (..., T, F)."""
        if waveform.shape[-1] < self.n_fft:
            waveform = nn.functional.pad(waveform, (0, self.n_fft - waveform.shape[-1]))
        return log_mel(waveform, self.window, self.mel, self.hop, LOG_FLOOR)

    def normalise(self, energies: Tensor) -> Tensor:
        """Zero mean and unit deviation over the corpus: (..., T, F) -> (..., T, F)."""
        return (energies - self.mean) / self.deviation

    def clip(self, wave: Tensor, room: Tensor | None = None) -> Tensor:
        """Normalised features of one clip on the CPU: (N,) -> (T, F), which lie at the beginning of `room` if given.
        They have no gradient."""
        wave = wave.float()
        if len(wave) < self.n_fft:
            wave = nn.functional.pad(wave, (0, self.n_fft - len(wave)))
        compute = self._normalised
        if compute.mean is not self.mean:  # moved to another device and back
            norm = self.mean, self.deviation
            compute = self._normalised = NormalisedLogMel(self.window, self.mel, self.hop, LOG_FLOOR, *norm)
        out = None if room is None else room[: compute.num_frames(len(wave))]
        if not self.clip_mean:
            return compute(wave, out)
        with torch.no_grad(), torch.autocast("cpu", enabled=False):
            energies = self.energies(wave)
            return torch.sub(energies, energies.mean(0), out=energies if out is None else out).div_(self.deviation)

    def stream(self) -> "FeatureStream":
        """Features of one clip that comes piece by piece."""
        return FeatureStream(self)

    def forward(self, waveforms: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        attacked = torch.is_grad_enabled() and waveforms.requires_grad
        if waveforms.device.type == "cpu" and not attacked:  # clip by clip stays in the cache
            return padded([self.clip(wave[:n]) for wave, n in zip(waveforms, lengths.tolist(), strict=True)])
        frames = 1 + (lengths - self.n_fft).clamp(min=0) // self.hop
        with torch.autocast(waveforms.device.type, enabled=False):
            x = self.normalise(self.energies(waveforms.float()))[:, : int(frames.max())]
            return _cut(x, frames, self.clip_mean), frames


class FeatureStream:
    """Normalised features of a clip whose samples come piece by piece: the very frames of `LogMel.clip`.

    Args:
        log_mel: what computes them.
    """

    def __init__(self, log_mel: LogMel) -> None:
        self._log_mel = log_mel
        self._waiting = torch.zeros(0)
        self._begun = False

    def push(self, samples: Tensor, last: bool = False) -> Tensor:
        """Samples (N,) -> the frames (T, F) whose windows are full now; with the last samples one frame at least."""
        log_mel = self._log_mel
        wave = torch.cat([self._waiting, samples.float()])
        frames = max(0, (len(wave) - log_mel.n_fft) // log_mel.hop + 1)
        if last and not self._begun:
            frames = max(frames, 1)
        self._waiting = wave[frames * log_mel.hop :]
        if not frames:
            return wave.new_zeros(0, log_mel.num_bands)
        self._begun = True
        return log_mel.clip(wave[: (frames - 1) * log_mel.hop + log_mel.n_fft])


class Precomputed(nn.Module):
    """Feature matrices, normalised as log-mel energies are; answers what `LogMel` does, with rows in place of samples.

    Args:
        config: its `num_bands` are F, columns of every matrix.

    Shape:
        matrices: (B, T, F); lengths: (B,) rows -> (B, T, F) with zeros past each length, and the same lengths
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: FeaturesConfig) -> None:
        super().__init__()
        self.num_bands, self.clip_mean = config.num_bands, config.clip_mean
        self.register_buffer("mean", torch.zeros(config.num_bands))
        self.register_buffer("deviation", torch.ones(config.num_bands))

    def decode(
        self, content: bytes, intact: bool = False, room: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """The matrix (T, F) of a member of a shard; see `decode_matrix`."""
        return decode_matrix(content, self.num_bands)

    def silence(self) -> Tensor:
        """The shortest matrix: (1, F)."""
        return torch.zeros(1, self.num_bands)

    def num_frames(self, num_rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """T of matrices of so many rows."""
        return num_rows

    def energies(self, matrix: Tensor) -> Tensor:
        """The features before normalisation: (..., T, F) as they are."""
        return matrix

    def normalise(self, features: Tensor) -> Tensor:
        """Zero mean and unit deviation over the corpus: (..., T, F) -> (..., T, F)."""
        return (features - self.mean) / self.deviation

    @torch.no_grad()
    def clip(self, matrix: Tensor, room: Tensor | None = None) -> Tensor:
        """Normalised features of one clip: (T, F) -> (T, F), which lie at the beginning of `room` if given."""
        target = None if room is None else room[: len(matrix)]
        mean = matrix.float().mean(0) if self.clip_mean else self.mean
        return torch.sub(matrix.float(), mean, out=target).div_(self.deviation)

    def forward(self, matrices: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(matrices.device.type, enabled=False):
            return _cut(self.normalise(matrices.float()), lengths, self.clip_mean), lengths


def _cut(x: Tensor, lengths: Tensor, clip_mean: bool) -> Tensor:
    """Normalised features (B, T, F) with zeros past each length, less each clip's mean if asked for."""
    valid = (torch.arange(x.shape[1], device=x.device) < lengths[:, None])[..., None]
    if clip_mean:
        x = x - (x * valid).sum(1, keepdim=True) / lengths.clamp(min=1)[:, None, None]
    return x * valid


def padded(clips: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Clips (T, ...) as one tensor (B, T, ...) with zeros past each length, and lengths (B,).

    As torch's `pad_sequence`, but what a clip fills is written once.
    """
    lengths = [len(clip) for clip in clips]
    x = clips[0].new_empty(len(clips), max(lengths), *clips[0].shape[1:])
    for row, clip, length in zip(x, clips, lengths, strict=True):
        row[:length] = clip
        row[length:] = 0
    return x, torch.tensor(lengths)


Count = TypeVar("Count", int, NDArray[np.int64])


def stretched(num_samples: Count, speed: float, sample_rate_hz: int) -> Count:
    """Length of clips after speed perturbation, exactly as `change_speed` returns them."""
    source = int(speed * sample_rate_hz)
    return -(-num_samples * sample_rate_hz // source)


@lru_cache(maxsize=32)
def _resampler(sample_rate_hz: int, speed: float) -> torchaudio.transforms.Speed:
    return torchaudio.transforms.Speed(sample_rate_hz, speed)


def change_speed(waveform: Tensor, sample_rate_hz: int, speed: float) -> Tensor:
    """Play (N,) samples faster by `speed`: tempo and pitch change together."""
    if speed == 1.0:
        return waveform
    return _resampler(sample_rate_hz, speed)(waveform)[0]


class AudioError(ValueError):
    """Audio that cannot be used.

    Args:
        reason: why; one of few texts, by which errors are counted.
        detail: what is particular to this one.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(
    content: bytes, sample_rate_hz: int, intact: bool = False, room: NDArray[np.float32] | None = None
) -> NDArray[np.float32]:
    """Samples (N,) of an encoded mono clip.

    Args:
        intact: these are bytes that were decoded before, when they were indexed. FLAC goes through dr_flac then, which
            gives the same samples in little more than half the time and says little about what is wrong.
        room: where FLAC that is intact may be decoded to; what is returned is the beginning of it then.

    Raises:
        AudioError: not audio, another sample rate, several channels, nothing in it, NaN.
    """
    if intact and content.startswith(b"fLaC"):
        with contextlib.suppress(miniaudio.DecodeError):
            return _checked(_decode_flac(content, sample_rate_hz, room), finite=True)  # made of integers
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            _check_format(file.samplerate, file.channels, sample_rate_hz)
            if file.frames > MAX_SAMPLES:  # a flipped bit in a header must not ask for the memory of the machine
                raise AudioError("not audio", f"its header names {file.frames:,} samples")
            return _checked(file.read(dtype="float32"), finite=file.subtype.startswith("PCM_"))
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: bytes that look like a raw format
        raise AudioError("not audio", str(error).rpartition(": ")[2].strip(" .")) from error


def _decode_flac(content: bytes, sample_rate_hz: int, room: NDArray[np.float32] | None) -> NDArray[np.float32]:
    """By dr_flac, as `miniaudio.flac_read_f32` does, but straight to where the samples are wanted: two copies less.

    Raises:
        AudioError: another sample rate, or several channels.
        miniaudio.DecodeError: it is no FLAC, or does not say how long it is, or ends too soon.
    """
    stream = miniaudio.lib.ma_dr_flac_open_memory(content, len(content), miniaudio.ffi.NULL)
    if not stream:
        raise miniaudio.DecodeError("not FLAC")
    try:
        # STREAMINFO, always the first block: 20 bits of rate, 3 of channels - 1, 5 of bits a sample - 1, 36 of length.
        facts = int.from_bytes(content[18:26], "big")
        num_samples = facts & (1 << 36) - 1
        _check_format(facts >> 44, (facts >> 41 & 7) + 1, sample_rate_hz)
        if not 0 < num_samples <= MAX_SAMPLES:
            raise miniaudio.DecodeError("no length")
        fits = room is not None and len(room) >= num_samples
        samples = room[:num_samples] if room is not None and fits else np.empty(num_samples, np.float32)
        target = miniaudio.ffi.from_buffer("float[]", samples, require_writable=True)
        decoded = miniaudio.lib.ma_dr_flac_read_pcm_frames_f32(stream, num_samples, target)
    finally:
        miniaudio.lib.ma_dr_flac_close(stream)
    if decoded != num_samples:
        raise miniaudio.DecodeError("ends too soon")
    return samples


def _check_format(rate_hz: int, channels: int, wanted_hz: int) -> None:
    if rate_hz != wanted_hz:
        raise AudioError("wrong sample rate", f"{rate_hz} Hz, wanted {wanted_hz}")
    if channels != 1:
        raise AudioError("several channels", f"{channels}, wanted 1")


def _checked(samples: NDArray[np.float32], finite: bool) -> NDArray[np.float32]:
    if not len(samples):
        raise AudioError("no samples")
    if not finite and not np.isfinite(samples).all():
        raise AudioError("NaN or infinite samples")
    return samples


def checksum(values: NDArray[np.float32]) -> int:
    """CRC-32 of an array's bytes."""
    return int(zlib_ng.crc32(np.ascontiguousarray(values)))


def decode_matrix(content: bytes, num_bands: int) -> NDArray[np.float32]:
    """The matrix (T, F) in the bytes of a .npy file.

    Raises:
        AudioError: it is none, of other numbers or another width, without rows, or holds NaN.
    """
    try:
        matrix = np.load(io.BytesIO(content), allow_pickle=False)
    except DAMAGED as error:
        raise AudioError("not a matrix", str(error).partition("\n")[0]) from error
    if not isinstance(matrix, np.ndarray) or matrix.ndim != 2 or matrix.dtype.kind not in "fiu":
        raise AudioError("not a matrix of numbers")
    if matrix.shape[1] != num_bands:
        raise AudioError("wrong width", f"{matrix.shape[1]} columns, wanted {num_bands} (data.features.num_bands)")
    if not len(matrix):
        raise AudioError("no rows")
    if not np.isfinite(matrix).all():
        raise AudioError("NaN or infinite values")
    return matrix.astype(np.float32, copy=False)
