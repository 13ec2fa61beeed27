"""What training does to a clip, so that it never sees the same one twice.

A clip's augmentation is a function of (seed, epoch, sample) alone, see `trainer.keyed`: it is the same on any number of
processes and workers, in any batch, and after a resume. In this order: speed, which the plan draws since it changes the
length; then, on the waveform, reverberation, noise, gain; then masks on the features.
"""

import hashlib
import logging
from functools import cached_property, lru_cache
from pathlib import Path

import soundfile
import torch
import torchaudio
from pydantic import Field, field_validator
from torch import Tensor, nn

from trainer import keyed
from trainer.config import Config, Free, show
from trainer.errors import UserError

log = logging.getLogger(__name__)

ENDINGS = {".aif", ".aiff", ".flac", ".mp3", ".oga", ".ogg", ".opus", ".wav"}


def _ordered(limits: tuple[float, float]) -> tuple[float, float]:
    if limits[0] > limits[1]:
        raise ValueError(f"wanted [lowest, highest], as [{limits[1]:g}, {limits[0]:g}]")
    return limits


class NoiseConfig(Config):
    """Background noise."""

    path: Free[Path]
    """Folder of recordings, searched to any depth; of several channels the first is taken, and any sample rate is
    converted. A clip gets any piece of a longer one; a shorter one is repeated."""
    snr_db: tuple[float, float] = (5.0, 20.0)
    """Lowest and highest signal-to-noise ratio: of the energies of clip and noise over the whole clip."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the clips that get it."""

    _limits = field_validator("snr_db")(_ordered)


class ReverberationConfig(Config):
    """The sound of rooms: clips are convolved with recorded or simulated impulse responses (Ko et al. 2017)."""

    path: Free[Path]
    """Folder of impulse responses, searched as that of the noise."""
    share: float = Field(0.5, gt=0, le=1)
    """Share of the clips that get it."""


class AugmentConfig(Config):
    """What training does to a clip; validation and test never see it."""

    speeds: tuple[float, ...] = (1.0,)
    """Speed and pitch factors, one drawn a clip and epoch (Ko et al. 2015), e.g. [0.9, 1.0, 1.1]. A clip that would be
    too short for its labels, or too long, is left at 1."""
    reverberation: ReverberationConfig | None = None
    """Rooms, e.g. {path: rirs}; null: none."""
    noise: NoiseConfig | None = None
    """Noise, e.g. {path: musan, snr_db: [5, 20]}; null: none."""
    gain_db: tuple[float, float] = (0.0, 0.0)
    """Lowest and highest gain, e.g. [-6, 6]."""
    time_masks: int = Field(0, ge=0)
    """SpecAugment (Park et al. 2019, arXiv:1904.08779): masks along time a clip."""
    time_mask_frames: int = Field(30, ge=1)
    """Longest time mask."""
    time_mask_share: float = Field(0.2, gt=0, le=1)
    """... but at most this share of the clip."""
    frequency_masks: int = Field(0, ge=0)
    """Masks along frequency a clip."""
    frequency_mask_bands: int = Field(15, ge=1)
    """Widest frequency mask."""

    _limits = field_validator("gain_db")(_ordered)

    @field_validator("speeds")
    @classmethod
    def _speeds_can_be_played(cls, speeds: tuple[float, ...]) -> tuple[float, ...]:
        if not speeds or not all(0.1 <= speed <= 10 for speed in speeds):
            raise ValueError("wanted one or more factors from 0.1 to 10; take [1.0] for none")
        return speeds

    @property
    def changes_sound(self) -> bool:
        """Whether `WaveAugment` has anything to do."""
        return self.reverberation is not None or self.noise is not None or self.gain_db != (0, 0)

    @property
    def masks(self) -> bool:
        """Whether `SpecAugment` has."""
        return self.time_masks + self.frequency_masks > 0


class WaveAugment:
    """Reverberation, noise and gain; the length of a clip stays.

    Args:
        config: of the run.
        sample_rate_hz: of the clips.

    Raises:
        UserError: a folder is not there or holds no sound.
    """

    def __init__(self, config: AugmentConfig, sample_rate_hz: int) -> None:
        self.config = config
        self.sample_rate_hz = sample_rate_hz
        self.rooms = _sounds("reverberation", config.reverberation)
        self.noises = _sounds("noise", config.noise)

    @cached_property
    def identity(self) -> str:
        """The recordings that it draws from, as a short text; empty if there are none."""
        names = [f"{file.name}:{file.stat().st_size}" for file in (*self.rooms, *self.noises)]
        return hashlib.blake2b("\n".join(names).encode(), digest_size=8).hexdigest() if names else ""

    def __call__(self, wave: Tensor, key: int) -> Tensor:
        """Samples (N,) and the clip's key -> (N,)."""
        rooms, noise, (low, high) = self.config.reverberation, self.config.noise, self.config.gain_db
        if rooms is not None and keyed.number(key, "reverberation") < rooms.share:
            response = _recording(_drawn(self.rooms, key, "room"), self.sample_rate_hz)
            wave = wave if response is None else reverberate(wave, response)
        if noise is not None and keyed.number(key, "noise") < noise.share:
            lowest, highest = noise.snr_db
            piece = self._piece(_drawn(self.noises, key, "noise"), len(wave), keyed.number(key, "noise", "start"))
            snr_db = lowest + (highest - lowest) * keyed.number(key, "noise", "snr")
            wave = wave if piece is None else mix(wave, piece, snr_db)
        if (low, high) != (0, 0):
            wave = wave * 10 ** ((low + (high - low) * keyed.number(key, "gain")) / 20)
        return wave

    def _piece(self, file: Path, num_samples: int, start: float) -> Tensor | None:
        """So many samples of a recording, repeated if it is shorter; None if it cannot be read."""
        try:
            with soundfile.SoundFile(file) as sound:
                wanted = min(sound.frames, -(-num_samples * sound.samplerate // self.sample_rate_hz))
                sound.seek(int(start * (sound.frames - wanted + 1)))
                samples = sound.read(wanted, dtype="float32", always_2d=True)[:, 0]
                piece = _resampled(torch.from_numpy(samples.copy()), sound.samplerate, self.sample_rate_hz)
        except soundfile.SoundFileError as error:
            return _unusable(file, str(error))
        if not len(piece) or not piece.isfinite().all():
            return _unusable(file, "nothing in it, or samples that are not finite")
        first = int(start * len(piece)) if len(piece) < num_samples else 0  # a short one starts anywhere, too
        return piece.repeat(-(-(first + num_samples) // len(piece)))[first : first + num_samples]


def _sounds(name: str, config: NoiseConfig | ReverberationConfig | None) -> list[Path]:
    """The sound files of a folder, in an order that no file system decides."""
    if config is None:
        return []
    where = f"data.augment.{name}.path = {config.path}"
    if not config.path.is_dir():
        raise UserError(f"{where}: there is no such folder ({show(config.path)}); put it there, or set it to null")
    files = sorted(f for f in config.path.rglob("*") if f.suffix.lower() in ENDINGS and f.is_file())
    if not files:
        raise UserError(f"{where}: holds no sound; wanted files that end in {', '.join(sorted(ENDINGS))}")
    return files


def _drawn(files: list[Path], key: int, name: str) -> Path:
    return files[keyed.key(key, name, "file") % len(files)]


@lru_cache(maxsize=1024)
def _unusable(file: Path, reason: str) -> None:
    """Says once that a clip stays as it is."""
    log.warning("%s: cannot be used (%s): clips that draw it stay as they are; replace or remove it", file, reason)


@lru_cache(maxsize=256)
def _recording(file: Path, sample_rate_hz: int) -> Tensor | None:
    """A whole file, its first channel."""
    try:
        samples, rate = soundfile.read(file, dtype="float32", always_2d=True)
    except soundfile.SoundFileError as error:
        return _unusable(file, str(error))
    whole = _resampled(torch.from_numpy(samples[:, 0].copy()), rate, sample_rate_hz)
    if not whole.isfinite().all() or not whole.any():
        return _unusable(file, "silence, or samples that are not finite")
    return whole


def _resampled(wave: Tensor, rate: int, sample_rate_hz: int) -> Tensor:
    return wave if rate == sample_rate_hz else torchaudio.functional.resample(wave, rate, sample_rate_hz)


def mix(wave: Tensor, noise: Tensor, snr_db: float) -> Tensor:
    """Add noise (N,) to samples (N,) so that their energies have this ratio; a silent clip or noise changes nothing."""
    energy, noise_energy = (float(x.double().square().sum()) for x in (wave, noise))
    if not energy or not noise_energy:
        return wave
    return wave + noise * (energy / noise_energy * 10 ** (-snr_db / 10)) ** 0.5


def reverberate(wave: Tensor, response: Tensor) -> Tensor:
    """Convolve samples (N,) with an impulse response (M,).

    The strongest sample of the response, the direct sound, is time zero: what was said stays where it was. Length and
    energy stay too. An FFT whose length has large prime factors takes several times as long, so it is padded.

    Returns:
        (N,)
    """
    n = fast_length(len(wave) + len(response) - 1)
    product = torch.fft.rfft(wave, n) * torch.fft.rfft(response, n)
    delay = int(response.abs().argmax())
    wet = torch.fft.irfft(product, n)[delay : delay + len(wave)]
    energy, wet_energy = (float(x.double().square().sum()) for x in (wave, wet))
    return wet * (energy / wet_energy) ** 0.5 if wet_energy else wave


def fast_length(n: int) -> int:
    """The smallest even number from n on whose prime factors are 2, 3 and 5."""
    best = 2 ** max(1, (n - 1).bit_length())
    fives = 1
    while fives < best:
        odd = fives
        while odd < best:
            best = min(best, odd * 2 ** max(1, (-(-n // odd) - 1).bit_length()))
            odd *= 3
        fives *= 5
    return best


class SpecAugment(nn.Module):
    """Masks stripes of normalised features by zero, which is the corpus mean; each clip by its own key.

    Shape:
        x: (B, T, F); lengths: (B,); seeds: B integers -> (B, T, F), changed in place
    """

    def __init__(self, config: AugmentConfig) -> None:
        super().__init__()
        self.config = config

    def forward(self, x: Tensor, lengths: Tensor, seeds: list[int]) -> Tensor:
        config = self.config
        for clip, frames, seed in zip(x, lengths.tolist(), seeds, strict=True):
            longest = min(config.time_mask_frames, int(frames * config.time_mask_share))
            for i in range(config.time_masks):
                clip[_stripe(frames, longest, seed, "time", i)] = 0
            for i in range(config.frequency_masks):
                clip[:frames, _stripe(x.shape[2], config.frequency_mask_bands, seed, "frequency", i)] = 0
        return x


def _stripe(size: int, widest: int, *name: int | str) -> slice:
    """A part of 0 .. size - 1: 0 to `widest` wide, each width and each place as likely as any other."""
    width = int(keyed.number(*name, "width") * (min(widest, size) + 1))
    start = int(keyed.number(*name, "start") * (size - width + 1))
    return slice(start, start + width)
