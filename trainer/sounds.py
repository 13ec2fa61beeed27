"""Sound for recognition, in blocks: files, standard input, a microphone, at whatever rate, as the model hears it."""

import math
import queue
import sys
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio
from torch import Tensor

from trainer.config import show
from trainer.errors import UserError

BLOCK_SECONDS = 1.0
NO_SAMPLES = {b"fLaC": "FLAC", b"OggS": "OGG", b"ID3": "MP3", b"RF64": "a WAV of more than 4 GB"}
"""By how they begin: what would be noise if it were taken for samples."""
WIDTH = 6
"""Zero crossings of the low pass of a conversion, as torchaudio has it."""


class Resampler:
    """Samples from one rate to another, piece by piece, as `torchaudio.functional.resample` does it with all at once.

    Args:
        rate_hz: of what comes.
        wanted_hz: of what goes.
    """

    def __init__(self, rate_hz: int, wanted_hz: int) -> None:
        self.rate_hz, self.wanted_hz = rate_hz, wanted_hz
        common = math.gcd(rate_hz, wanted_hz)
        self._step, self._steps = rate_hz // common, wanted_hz // common  # so many samples become so many
        reach = math.ceil(WIDTH * self._step / (min(self._step, self._steps) * 0.99)) + self._step
        self._margin = math.ceil(reach / self._step) * self._step
        self._waiting, self._before = torch.zeros(0), 0

    def push(self, samples: Tensor, last: bool = False) -> Tensor:
        """Samples (N,) -> those (M,) of the wanted rate that are known now."""
        if self.rate_hz == self.wanted_hz:
            return samples
        x = torch.cat([self._waiting, samples])
        end = len(x) if last else max(0, len(x) - self._margin) // self._step * self._step
        if end <= self._before:
            self._waiting = x
            return x.new_zeros(0)
        y = torchaudio.functional.resample(x, self.rate_hz, self.wanted_hz, lowpass_filter_width=WIDTH)
        first = self._before // self._step * self._steps
        y = y[first:] if last else y[first : end // self._step * self._steps]
        keep = max(0, end - self._margin)
        self._waiting, self._before = x[keep:], end - keep
        return y


def _converted(blocks: Iterator[Tensor], rate_hz: int, wanted_hz: int) -> Iterator[Tensor]:
    resampler = Resampler(rate_hz, wanted_hz)
    for block in blocks:
        yield resampler.push(block)
    yield resampler.push(torch.zeros(0), last=True)


def of_samples(samples: Tensor, rate_hz: int, wanted_hz: int) -> Iterator[Tensor]:
    """Blocks of samples (N,) at the wanted rate."""
    return _converted(iter(samples.split(max(1, round(BLOCK_SECONDS * rate_hz)))), rate_hz, wanted_hz)


def of_file(path: Path, wanted_hz: int, seconds: float = BLOCK_SECONDS) -> Iterator[Tensor]:
    """Blocks of a file that libsndfile reads (WAV, FLAC, OGG, MP3), its channels averaged.

    Raises:
        UserError: there is no such file, or it is no sound.
    """
    try:
        with soundfile.SoundFile(path) as file:
            rate = file.samplerate
            blocks = (torch.from_numpy(b.mean(1)) for b in _blocks(file, max(1, round(seconds * rate))))
            yield from _converted(_finite(blocks, path), rate, wanted_hz)
    except (soundfile.SoundFileError, OSError) as error:
        reason = "there is no such file" if not path.exists() else f"is no sound that can be read ({error})"
        raise UserError(f"{show(path)}: {reason}; give WAV, FLAC, OGG or MP3, `-` or `microphone`") from error


def _finite(blocks: Iterator[Tensor], path: Path) -> Iterator[Tensor]:
    for block in blocks:
        if not block.isfinite().all():
            raise UserError(f"{show(path)}: holds samples that are no finite numbers; write the file anew")
        yield block


def _blocks(file: Any, size: int) -> Iterator[Any]:
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        yield block


def of_stream(stream: BinaryIO, wanted_hz: int, seconds: float, raw_hz: int | None) -> Iterator[Tensor]:
    """Blocks of a pipe: WAV of 16-bit samples, or such samples without a header, of one channel.

    Args:
        raw_hz: the rate of samples without a header; None: the wanted one.

    Raises:
        UserError: a WAV of another kind, or a file that is no WAV.
    """
    first = stream.peek(4)[:4]  # type: ignore[attr-defined]
    if (kind := next((name for magic, name in NO_SAMPLES.items() if first.startswith(magic)), None)) is not None:
        raise UserError(f"standard input: is {kind}, not samples; give the file by its name, or send WAV")
    if first == b"RIFF":
        try:
            file = wave.open(stream, "rb")  # noqa: SIM115
        except (wave.Error, EOFError) as error:
            raise UserError(f"standard input: is a WAV that cannot be read ({error}); send 16-bit samples") from error
        if file.getsampwidth() != 2:
            raise UserError(f"standard input: samples of {8 * file.getsampwidth()} bits; send 16-bit samples")
        channels, rate = file.getnchannels(), file.getframerate()
        contents = iter(lambda: file.readframes(max(1, round(seconds * rate))), b"")
    else:
        channels, rate = 1, raw_hz or wanted_hz
        contents = iter(lambda: stream.read(2 * max(1, round(seconds * rate))), b"")
    blocks = (_from_bytes(content, channels) for content in contents)
    return _converted(blocks, rate, wanted_hz)


def _from_bytes(content: bytes, channels: int) -> Tensor:
    whole = len(content) // (2 * channels) * 2 * channels
    samples = np.frombuffer(content[:whole], "<i2").astype(np.float32) / 32768
    return torch.from_numpy(samples.reshape(-1, channels).mean(1))


def of_microphone(wanted_hz: int, seconds: float) -> Iterator[Tensor]:
    """Blocks from the default microphone, without an end.

    Raises:
        UserError: the extra is not installed, or there is no microphone.
    """
    try:
        import sounddevice
    except (ImportError, OSError) as error:
        raise UserError(
            f"microphone: needs the package sounddevice and the system's PortAudio ({error}); pip install "
            "'ostinato[microphone]', and apt-get install libportaudio2"
        ) from error
    arrived: queue.Queue[Any] = queue.Queue()
    size = max(1, round(seconds * wanted_hz))

    def take(data: Any, *_: Any) -> None:
        arrived.put(data[:, 0].copy())

    try:
        with sounddevice.InputStream(wanted_hz, size, channels=1, dtype="float32", callback=take):
            print("listening; Ctrl-C ends it", file=sys.stderr)
            while True:
                yield torch.from_numpy(arrived.get())
    except sounddevice.PortAudioError as error:
        raise UserError(f"microphone: {error}; send sound to standard input instead (`-`)") from error
