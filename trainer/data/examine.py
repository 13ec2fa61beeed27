"""Shards from elsewhere, looked at whole: every sound is decoded, every text read, by a worker process a shard.

What comes back is a line of facts a sample and a list of problems, from which `trainer.data.shards` makes indexes and
`trainer.data.lint` a verdict.
"""

import hashlib
import io
import os
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray

from trainer.config import show
from trainer.data.audio import AudioError, FeaturesConfig, LogMel, Precomputed, decode_matrix
from trainer.data.corpora.base import SplitName, split_by_text
from trainer.data.index import Entry
from trainer.data.packing import Note, missing_sound
from trainer.data.parallel import Display, results, stop_by_exception
from trainer.data.remote import STATE
from trainer.data.tars import Pair, Problem, read_contents, transcript
from trainer.data.text import (
    TextConfig,
    not_text,
)
from trainer.errors import UserError

READ_SAMPLES = 1 << 20
LONGEST_SECONDS = 4 * 3600
"""A sound that goes on for longer is not decoded to its end: its header lies, or it is no utterance."""


@dataclass(frozen=True)
class Look:
    """What a worker must know to look at a shard."""

    shard: Path
    text: TextConfig
    features: FeaturesConfig
    rate_hz: int | None = None
    """Samples a second, or rows of a feature matrix; None: any."""
    statistics: bool = False
    """Add up the bands of the training samples."""
    split: SplitName | None = None
    """None: each sample goes where its text puts it."""
    decode: bool = True
    """False believes the headers of the sounds."""


@dataclass
class Facts:
    """What is known of a sample that can be used."""

    pair: Pair
    text: str
    """Normalised."""
    outside: Counter[str]
    """What was dropped from it, or became a space."""
    num_samples: int
    """Or rows of the feature matrix."""
    rate_hz: int
    audio_crc32: int
    text_crc32: int
    sound: str
    """Hash of the decoded samples; empty if they were not decoded."""
    split: SplitName
    label_length: int = 0
    ctc_frames: int = 0

    @property
    def seconds(self) -> float:
        return self.num_samples / self.rate_hz

    def entry(self, key: str) -> Entry:
        """Its line in an index."""
        return Entry(
            key=key,
            audio_offset=self.pair.audio.offset,
            audio_size=self.pair.audio.size,
            audio_crc32=self.audio_crc32,
            text_offset=self.pair.text.offset,
            text_size=self.pair.text.size,
            text_crc32=self.text_crc32,
            num_samples=self.num_samples,
            label_length=self.label_length,
            ctc_frames=self.ctc_frames,
        )


@dataclass
class Examined:
    """What came of looking at a shard."""

    shard: Path
    samples: list[Facts] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    note: Note | None = None
    """Sums of the bands over its training samples."""


def find_shards(path: Path) -> list[Path]:
    """The tars at a path: itself, or all below it.

    Raises:
        UserError: there are none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"{show(path)}: there is no such file or folder; mend the path")
    if (mirrored := path / STATE / "url").is_file():
        url = mirrored.read_text(encoding="utf-8")
        raise UserError(
            f"{show(path)}: is the local copy of {url}, where not all is; look at the shards where they lie"
        )
    found = sorted(
        p
        for p in path.rglob("*.tar")
        if (p.is_file() or p.is_symlink())  # a link that leads nowhere is a shard that is missing
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    if not found:
        raise UserError(f"{show(path)}: holds no shards (*.tar); compressed ones must be unpacked first")
    return found


def examine_all(looks: Sequence[Look], what: str) -> list[Examined]:
    """Look at shards, as many at a time as there are cores; in their order.

    Raises:
        RequeueError: SIGTERM or SIGUSR1 came.
    """
    from rich.console import Console

    found: dict[int, Examined] = {}
    with stop_by_exception(what), Display(Console(stderr=True)) as display:
        for number, examined in results(examine, looks, min(len(os.sched_getaffinity(0)), len(looks))):
            found[number] = examined
            display(f"{what} (shards)", len(found), len(looks))
    return [found[number] for number in range(len(looks))]


def examine(look: Look) -> Examined:
    """Look at one shard."""
    examined = Examined(look.shard)
    log_mel = _log_mel(look.features, look.rate_hz) if look.statistics and look.rate_hz else None
    num_bands = log_mel.num_bands if log_mel else 0
    frames, waveform_samples, sums, squares = 0, 0, np.zeros(num_bands), np.zeros(num_bands)
    try:
        contents = read_contents(look.shard, look.features.kind)
        examined.problems += contents.problems
        with look.shard.open("rb") as file:
            for pair in contents.pairs:
                audio = read_member(file, pair.audio.offset, pair.audio.size)
                try:
                    transcribed = read_member(file, pair.text.offset, pair.text.size)
                    text, outside = _text(look.text, pair, transcribed)
                    samples, num_samples, rate = _signal(look, audio)
                except _UnusableError as error:
                    examined.problems.append(Problem(error.check, error.detail, pair.key))
                    continue
                split = look.split or split_by_text(text)
                sound = hashlib.blake2b(samples.tobytes(), digest_size=16).hexdigest() if look.decode else ""
                checksums = (zlib.crc32(audio), zlib.crc32(transcribed))
                examined.samples.append(Facts(pair, text, outside, num_samples, rate, *checksums, sound, split))
                if log_mel is not None and split == "train":
                    with torch.inference_mode():
                        bands = log_mel.energies(torch.from_numpy(samples)).double()
                    frames += len(bands)
                    waveform_samples += num_samples
                    sums += bands.sum(0).numpy()
                    squares += bands.square().sum(0).numpy()
    except OSError as error:
        examined.problems.append(Problem("tar", f"cannot be read: {error.strerror}"))
    examined.note = Note("", len(examined.samples), waveform_samples, frames, sums.tolist(), squares.tolist())
    return examined


def read_member(file: io.BufferedReader, offset: int, size: int) -> bytes:
    """Contents of a member, or what there is of them."""
    file.seek(offset)
    return file.read(size)


@lru_cache(maxsize=2)
def _log_mel(features: FeaturesConfig, rate_hz: int) -> LogMel | Precomputed:
    return features.build(rate_hz)


class _UnusableError(Exception):
    """A sample cannot be used."""

    def __init__(self, check: str, detail: str) -> None:
        super().__init__(detail)
        self.check = check
        self.detail = detail


def _text(rules: TextConfig, pair: Pair, content: bytes) -> tuple[str, Counter[str]]:
    """The normalised text of a sample, and what was outside the alphabet."""
    try:
        text = transcript(content)
    except UnicodeDecodeError as error:
        raise _UnusableError("label", f"is not UTF-8: {error.reason} at byte {error.start}") from error
    if pair.text.ending == "json" and text == content.decode("utf-8-sig"):
        raise _UnusableError("label", "the JSON has no field `text` that holds text, and there is no .txt")
    if not text.strip():
        raise _UnusableError("label", "is empty")
    if bad := not_text(text):
        raise _UnusableError("label", f"holds {bad!r}, which is no character of a text")
    normalised, outside = rules.normalise(text, rules.alphabet)
    if outside and rules.unknown == "error":
        raise _UnusableError("label", f"holds {named(outside)}, which the alphabet has not")
    if not normalised:
        raise _UnusableError("label", f"{text[:40]!r} is empty once it is normalised")
    return normalised, outside


def named(outside: Counter[str]) -> str:
    return " ".join(map(repr, sorted(outside)))


def _signal(look: Look, content: bytes) -> tuple[NDArray[np.float32], int, int]:
    """The sound of a sample, (N,), or its feature matrix, (T, F); its length and its rate."""
    if look.features.kind == "log_mel":
        return _sound(look, content)
    try:
        matrix = decode_matrix(content, look.features.num_bands)
    except AudioError as error:
        raise _UnusableError("audio", str(error)) from error
    return matrix, len(matrix), look.features.rate_hz(0)


def _sound(look: Look, content: bytes) -> tuple[NDArray[np.float32], int, int]:
    """The sound of a sample, (N,), its length and its rate."""
    try:
        samples, num_samples, rate, channels = read_sound(content, look.decode)
    except AudioError as error:
        raise _UnusableError("audio", str(error)) from error
    if look.rate_hz and rate != look.rate_hz:
        raise _UnusableError("rate", f"{rate} Hz, wanted {look.rate_hz}")
    if channels != 1:
        raise _UnusableError("rate", f"{channels} channels, wanted 1")
    return samples, num_samples, rate


def read_sound(content: bytes, decode: bool = True) -> tuple[NDArray[np.float32], int, int, int]:
    """An encoded sound: samples (N,) of one channel, or (N, channels); N; the rate in Hz; the channels.

    It is read in pieces, so that a header that lies about the length costs no memory. FLAC is held against the MD5 sum
    of its samples, which it has in its header.

    Args:
        decode: false takes N from the header, and no samples.

    Raises:
        AudioError: it cannot be decoded to its end, or holds no usable samples.
    """
    stated = _flac_md5(content)
    try:
        with soundfile.SoundFile(io.BytesIO(content)) as file:
            rate, channels, stated_frames = file.samplerate, file.channels, file.frames
            if not decode:
                return np.zeros(0, np.float32), stated_frames, rate, channels
            kind = {"PCM_16": "int16", "PCM_24": "int32"}.get(file.subtype) if stated else None
            pieces: list[NDArray[Any]] = []
            total = 0
            while len(piece := file.read(READ_SAMPLES, dtype=kind or "float32", always_2d=True)):
                pieces.append(piece)
                total += len(piece)
                if total > LONGEST_SECONDS * rate:
                    raise AudioError(f"is longer than {LONGEST_SECONDS // 3600} hours")
            missing = missing_sound(file, total, stated_frames)
    except (soundfile.SoundFileError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, AudioError):
            raise
        reason = str(error).rpartition(": ")[2].strip(" .")
        raise AudioError(f"cannot be decoded: {reason or type(error).__name__}") from error
    if not total:
        raise AudioError("no samples")
    if missing and stated_frames < 1 << 40:  # more is libsndfile's word for not known
        raise AudioError(f"ends early, {missing}")
    samples = np.concatenate(pieces)
    if kind == "int16":
        ours = hashlib.md5(samples.astype("<i2").tobytes(), usedforsecurity=False).digest()
        floats = samples.astype(np.float32) / np.float32(32768)
    elif kind == "int32":
        packed = samples.astype("<i4").view(np.uint8).reshape(*samples.shape, 4)[..., 1:]
        ours = hashlib.md5(packed.tobytes(), usedforsecurity=False).digest()
        floats = samples.astype(np.float32) / np.float32(2**31)
    else:
        ours, floats = stated, samples
    if ours != stated:
        raise AudioError("the samples are not those whose MD5 sum is in the FLAC header: some were changed")
    if not np.isfinite(floats).all():
        raise AudioError("NaN or infinite samples")
    return (floats[:, 0] if channels == 1 else floats), total, rate, channels


def _flac_md5(content: bytes) -> bytes:
    """The MD5 sum that a FLAC file states of its samples; empty where there is none."""
    if content[:4] != b"fLaC" or len(content) < 42:
        return b""
    (kind,) = struct.unpack(">B", content[4:5])
    md5 = content[26:42]
    return md5 if kind & 0x7F == 0 and any(md5) else b""
