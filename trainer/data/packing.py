"""One shard: when it is up to date, and how it is written."""

import hashlib
import io
import json
import os
import re
import tarfile
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import soundfile
import torch
import torchaudio
from numpy.typing import NDArray
from webdataset import TarWriter

from trainer.config import show
from trainer.data.audio import AudioError, FeaturesConfig, LogMel, Precomputed
from trainer.data.corpora.base import SplitName, Utterance
from trainer.data.index import FORMAT as INDEX_FORMAT
from trainer.data.index import Entry, index_path, write_index
from trainer.data.matrices import ENDINGS, read_matrix
from trainer.errors import UserError

FORMAT = 2
"""Of the shards and the notes about them: another number makes all of them anew."""
NOTES = ".prepare"
UNKNOWN_BYTES = 0x7FFFF000
"""From this size on a WAV header says that its writer, a pipe, did not know it."""
MAX_OVERSHOOT_SECONDS = 0.5
"""A part of a recording may end so long after it: the times in manifests are rounded."""


@dataclass(frozen=True)
class Sample:
    """An utterance with the text it is trained on."""

    utterance: Utterance
    text: str
    label_length: int
    ctc_frames: int
    """Output frames that CTC needs at least."""


@dataclass(frozen=True)
class Task:
    """One shard to be written, and all that a worker must know to do it."""

    root: Path
    split: SplitName
    number: int
    samples: tuple[Sample, ...]
    sample_rate_hz: int
    """Of precomputed features: rows a second."""
    features: FeaturesConfig
    lenient: bool = False
    """Whether a sample that cannot be used is left out, instead of the whole shard."""

    @property
    def counted(self) -> bool:
        """Whether the band statistics are over this shard."""
        return self.split == "train"

    @property
    def member(self) -> str:
        """Ending of what a shard holds of a recording."""
        return "flac" if self.features.kind == "log_mel" else "npy"

    @property
    def shard(self) -> Path:
        return self.root / self.split / f"shard-{self.number:06d}.tar"

    @property
    def note(self) -> Path:
        return note_path(self.shard)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the shard is made from."""
        used = self.counted or self.member == "npy"  # a matrix must have the width that the settings say
        bands = feature_settings(self.features) if used else None
        rows = [[s.utterance.key, s.text, s.label_length, s.ctc_frames, *_describe(s.utterance)] for s in self.samples]
        text = json.dumps([FORMAT, self.sample_rate_hz, bands, rows])
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Note:
    """What is known of a shard that was written."""

    fingerprint: str
    samples: int
    waveform_samples: int
    frames: int
    """Feature frames that the sums are over; 0 outside the training split."""
    sums: list[float]
    """Sum of each band."""
    squares: list[float]
    """Sum of the squares of each band."""
    left_out: list[str] = field(default_factory=list)
    """What was wrong with the samples that it lacks."""


def feature_settings(features: FeaturesConfig) -> dict[str, Any]:
    """The settings that the band statistics depend on."""
    return {name: getattr(features, name) for name in ("kind", "num_bands", "window_ms", "hop_ms")}


def _describe(utterance: Utterance) -> list[Any]:
    """What the members of an utterance depend on; a file that is gone is found out when it is read."""
    facts = [utterance.text, utterance.speaker, utterance.start_seconds, utterance.end_seconds, utterance.channel]
    if not isinstance(utterance.audio, Path):
        return [*facts, repr(utterance.audio)]
    try:
        status = utterance.audio.stat()
    except OSError:
        return [*facts, str(utterance.audio)]
    return [*facts, str(utterance.audio), status.st_size, status.st_mtime_ns]


def note_path(shard: Path) -> Path:
    """Where the note about a shard lies."""
    return shard.parent.parent / NOTES / f"{shard.parent.name}-{shard.stem}.json"


def read_note(path: Path) -> Note | None:
    """A note, or None where there is none that can be read."""
    try:
        return Note(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def is_done(task: Task) -> bool:
    """A shard is done if its note has this fingerprint and its index, written last and as it is written today, says the
    size that it has."""
    note = read_note(task.note)
    if note is None or note.fingerprint != task.fingerprint:
        return False
    try:
        with index_path(task.shard).open(encoding="utf-8") as index:
            header = json.loads(index.readline())
        found = (header["format"], header["bytes"], header["samples"])
        return found == (INDEX_FORMAT, task.shard.stat().st_size, note.samples)
    except (OSError, ValueError, KeyError):
        return False


def shard_writer(stream: BinaryIO) -> Any:
    """webdataset's writer of a tar: `write({"__key__": key, ending: bytes, ...})`.

    Owner, mode and time are fixed, so that the same samples are the same bytes. PAX takes keys of any length; for short
    ones it writes what USTAR does.
    """
    return TarWriter(stream, user="", group="", mode=0o644, mtime=0, format="PAX_FORMAT")


def write_shard(task: Task) -> list[str]:
    """Read, convert and pack the samples of a shard; returns what is wrong with them, and then writes nothing, unless
    the task is lenient."""
    features = _features(task.features, task.sample_rate_hz)
    num_bands = features.num_bands if task.counted else 0
    frames, sums, squares = 0, np.zeros(num_bands), np.zeros(num_bands)
    kept: list[tuple[Sample, int]] = []
    problems: list[str] = []
    temporary = task.note.with_suffix(".tar.tmp")
    try:
        with temporary.open("wb") as stream:
            with shard_writer(stream) as tar:
                for sample in task.samples:
                    try:
                        if task.member == "npy":
                            signal = read_features(sample.utterance, task.features.num_bands)
                            packed, wave = _npy(signal), signal
                        else:
                            pcm = read_audio(sample.utterance, task.sample_rate_hz)
                            packed, wave = _flac(pcm, task.sample_rate_hz), pcm.astype(np.float32) / np.float32(32768)
                    except AudioError as error:
                        problems.append(str(error))
                        continue
                    kept.append((sample, len(wave)))
                    tar.write(_members(sample, task, packed, len(wave)))
                    if task.counted:
                        with torch.inference_mode():
                            bands = features.energies(torch.from_numpy(wave)).double()
                        frames += len(bands)
                        sums += bands.sum(0).numpy()
                        squares += bands.square().sum(0).numpy()
            stream.flush()
            os.fsync(stream.fileno())
        if problems and not (task.lenient and kept):
            return problems
        entries = _entries(temporary, task, kept)
        # The index goes first and comes last: whatever happens in between, the shard does not count as done.
        task.shard.parent.mkdir(exist_ok=True)
        index_path(task.shard).unlink(missing_ok=True)
        length = sum(length for _, length in kept)
        note = Note(task.fingerprint, len(entries), length, frames, sums.tolist(), squares.tolist(), problems)
        _write_whole(task.note, json.dumps(asdict(note)))
        temporary.replace(task.shard)
        write_index(task.shard, entries)
    except OSError as error:
        raise UserError(
            f"{show(task.shard)}: cannot be written: {error.strerror}; make room or mend it, and go on"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return problems


def read_audio(utterance: Utterance, sample_rate_hz: int) -> NDArray[np.int16]:
    """Samples (N,) of an utterance: one channel, at the wanted rate, 16 bits.

    What has one channel of 16 bits at that rate already comes through bit by bit.

    Raises:
        AudioError: it cannot be used; the text names the place, the key, the value and the cure.
    """
    audio, named, cure = utterance.audio, _named(utterance), "replace the file or remove the line"
    if isinstance(audio, Path) and audio.suffix.lower() in ENDINGS:
        raise AudioError(f"{named}: is a feature matrix, not sound; set data.features.kind to precomputed")
    try:
        wave, rate = _read_file(utterance, audio) if isinstance(audio, Path) else audio()
    except AudioError as error:
        raise AudioError(f"{named}: {error}; {cure}") from error
    except (soundfile.SoundFileError, TypeError, OSError) as error:  # TypeError: a name that ends in .raw
        if isinstance(audio, Path) and not os.access(audio, os.R_OK):
            raise AudioError(f"{named}: is missing or may not be read; {cure}") from error
        reason = str(error).rpartition(": ")[2].strip(" .")
        raise AudioError(f"{named}: is not audio that can be read ({reason}); {cure}") from error
    if not len(wave):
        raise AudioError(f"{named}: has no samples in it; {cure}")
    if not np.isfinite(wave).all():
        raise AudioError(f"{named}: holds NaN or infinite samples; {cure}")
    if rate != sample_rate_hz:
        wave = _resampler(rate, sample_rate_hz)(torch.from_numpy(np.ascontiguousarray(wave))).numpy()
    clipped: NDArray[np.int16] = np.clip(np.rint(wave * 32768), -32768, 32767).astype(np.int16)
    return clipped


def _named(utterance: Utterance) -> str:
    audio = utterance.audio
    return f"{utterance.where}: key {utterance.key}: audio = {show(audio) if isinstance(audio, Path) else audio}"


def _read_file(utterance: Utterance, path: Path) -> tuple[NDArray[np.float32], int]:
    """Samples (N,) of an utterance's part and channel of a file, and their rate.

    Raises:
        AudioError: the file is cut short, or has no such part or channel.
    """
    with soundfile.SoundFile(path) as file:
        rate, whole = file.samplerate, file.frames
        start = round(utterance.start_seconds * rate)
        stop = whole if utterance.end_seconds is None else round(utterance.end_seconds * rate)
        if start >= whole > 0 or stop > whole + MAX_OVERSHOOT_SECONDS * rate:
            raise AudioError(f"has {whole / rate:.3f} s, and the part ends at {stop / rate:.3f} s")
        stop = min(stop, whole)
        if start:
            file.seek(start)
        channels = file.read(stop - start if utterance.end_seconds is not None else -1, "float32", always_2d=True)
        if missing := missing_sound(file, len(channels), stop - start):
            raise AudioError(f"ends early, {missing}")
    if utterance.channel is not None:
        if utterance.channel >= channels.shape[1]:
            raise AudioError(f"has {channels.shape[1]} channels, and number {utterance.channel} (from 0) is wanted")
        return channels[:, utterance.channel], rate
    return (channels.mean(axis=1) if channels.shape[1] > 1 else channels[:, 0]), rate


def read_features(utterance: Utterance, num_bands: int) -> NDArray[np.float32]:
    """The precomputed features (T, F) of an utterance.

    Raises:
        AudioError: they cannot be used; the text names the place, the key, the value and the cure.
    """
    named, cure = _named(utterance), "replace the file or remove the line"
    if not isinstance(utterance.audio, Path):
        raise AudioError(f"{named}: is made sound, no feature matrix; set data.features.kind to log_mel")
    if utterance.start_seconds or utterance.end_seconds is not None or utterance.channel is not None:
        raise AudioError(f"{named}: parts and channels of a feature matrix are not read; write one file an utterance")
    try:
        return read_matrix(utterance.audio, num_bands)
    except AudioError as error:
        raise AudioError(f"{named}: {error}; {cure}") from error
    except OSError as error:
        raise AudioError(f"{named}: cannot be read: {error.strerror}; {cure}") from error


def missing_sound(file: soundfile.SoundFile, num_read: int, num_wanted: int) -> str:
    """What a file that was cut short lacks, or nothing."""
    # Of WAV, AIFF and AU, libsndfile corrects the length by the size of the file, and says so here.
    found = re.search(r"^\s*(?:data|SSND|Data Size)\s*: (\d+) \(should be (\d+)\)", file.extra_info, re.M)
    if found and int(found[2]) < int(found[1]) < UNKNOWN_BYTES:
        return f"with {int(found[2]):,} of the {int(found[1]):,} bytes of sound that its header names"
    if num_read < 0.99 * num_wanted:  # of some MP3 the length is an estimate
        return f"with {num_read:,} of the {num_wanted:,} samples that its header names"
    return ""


@lru_cache(maxsize=8)
def _resampler(rate: int, sample_rate_hz: int) -> Callable[[torch.Tensor], torch.Tensor]:
    resampler: Callable[[torch.Tensor], torch.Tensor] = torchaudio.transforms.Resample(rate, sample_rate_hz)
    return resampler


@lru_cache(maxsize=2)
def _features(features: FeaturesConfig, sample_rate_hz: int) -> LogMel | Precomputed:
    return features.build(sample_rate_hz)


def _members(sample: Sample, task: Task, packed: bytes, length: int) -> dict[str, Any]:
    """A sample as webdataset writes it."""
    utterance = sample.utterance
    about = {
        "key": utterance.key,
        "text": utterance.text,
        "source": utterance.audio.name if isinstance(utterance.audio, Path) else utterance.where,
        "seconds": length / task.sample_rate_hz,
        "sample_rate_hz" if task.member == "flac" else "rows_a_second": task.sample_rate_hz,
        "speaker": utterance.speaker,
        "start_seconds": utterance.start_seconds or None,
        "end_seconds": utterance.end_seconds,
        "channel": utterance.channel,
    }
    about = {name: value for name, value in about.items() if value is not None}
    return {
        "__key__": utterance.key,
        task.member: packed,
        "txt": sample.text.encode(),
        "json": json.dumps(about, ensure_ascii=False).encode(),
    }


def _flac(wave: NDArray[np.int16], sample_rate_hz: int) -> bytes:
    stream = io.BytesIO()
    soundfile.write(stream, wave, sample_rate_hz, format="FLAC", subtype="PCM_16")
    return stream.getvalue()


def _npy(matrix: NDArray[np.float32]) -> bytes:
    stream = io.BytesIO()
    np.save(stream, matrix, allow_pickle=False)
    return stream.getvalue()


def _entries(shard: Path, task: Task, kept: list[tuple[Sample, int]]) -> list[Entry]:
    """The index of a finished tar, read from the tar itself."""
    with tarfile.open(shard) as tar:
        members = {member.name: member for member in tar}
    entries = []
    with shard.open("rb") as file:
        for sample, length in kept:
            audio, text = (members[f"{sample.utterance.key}.{ending}"] for ending in (task.member, "txt"))
            file.seek(audio.offset_data)
            audio_crc32 = zlib.crc32(file.read(audio.size))
            file.seek(text.offset_data)
            entries.append(
                Entry(
                    key=sample.utterance.key,
                    audio_offset=audio.offset_data,
                    audio_size=audio.size,
                    audio_crc32=audio_crc32,
                    text_offset=text.offset_data,
                    text_size=text.size,
                    text_crc32=zlib.crc32(file.read(text.size)),
                    num_samples=length,
                    label_length=sample.label_length,
                    ctc_frames=sample.ctc_frames,
                )
            )
    return entries


def _write_whole(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
