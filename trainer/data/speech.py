"""Transcribed speech: shards of audio and text to padded batches of features and labels."""

import contextlib
import hashlib
import json
import logging
import os
import tarfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from zlib_ng import zlib_ng

from trainer import keyed
from trainer.config import show
from trainer.data.audio import (
    AudioError,
    change_speed,
    checksum,
    stretched,
)
from trainer.data.augment import SpecAugment, WaveAugment
from trainer.data.buckets import BucketedConfig, BucketedPlan, Lengths, Measures
from trainer.data.dataset import MISSING, Batch, Fault, Media
from trainer.data.index import BLOCK, Entry, Index
from trainer.data.plan import MicroBatch
from trainer.data.prepared import (
    Prepared,
    SpeechDataConfig,
    SplitInfo,
    build_log_mel,
    build_tokens,
    label_settings,
    open_prepared,
)
from trainer.data.reader import ShardReader
from trainer.data.remote import GIGABYTE, Ahead, Cache
from trainer.data.tars import transcript
from trainer.data.text import UnknownCharacterError
from trainer.data.transfer import TransferError
from trainer.errors import UserError
from trainer.place import Reading, reading

log = logging.getLogger(__name__)


MAX_ABOUT = 1 << 16
"""Bytes of what a shard says about a sample that are read for its speaker."""


@dataclass(slots=True)
class _Place:
    """A row of a batch."""

    row: int = -1
    """Of the index; none in a dummy."""
    entry: Entry | None = None
    shard: str = ""
    noise_key: int = 0
    labels: list[int] = field(default_factory=list)
    length: int = 0
    """Of what is in it: frames, or samples."""
    checksum: int = 0
    seconds: float = 0.0
    speaker: str | None = None
    fault: AudioError | None = None

    @property
    def key(self) -> str:
        return "" if self.entry is None else self.entry.key


class SpeechDataset:
    """One split of a prepared corpus.

    Args:
        config: data settings.
        split: "train", "valid" or "test"; only "train" is shuffled and augmented.
        plan: batching settings.
        seed: of the run.
        num_output_frames: feature frames (N,) -> output frames (N,) of the model, for CTC feasibility.

    Raises:
        UserError: the corpus is not prepared, not whole, or prepared with other settings.
    """

    def __init__(
        self,
        config: SpeechDataConfig,
        split: str,
        plan: BucketedConfig,
        seed: int,
        num_output_frames: Any,
    ) -> None:
        self.config = config
        self.split = split
        self.seed = seed
        self.prepared = open_prepared(config)
        self._check(config, self.prepared)
        self.tokens = build_tokens(config, self.prepared)
        self._reading = self.prepared.reading(config.text)
        self._alphabet = config.text.alphabet or self.prepared.alphabet
        self.log_mel = build_log_mel(config, self.prepared)
        self._own = threading.local()
        self._shortest = self._clip(self.log_mel.silence())
        self.training = split == "train"
        sound = self.training and config.features.kind == "log_mel" and config.augment.changes_sound
        self.wave_augment = WaveAugment(config.augment, config.sample_rate_hz) if sound else None
        masked = self.training and config.augment.masks and config.features.where == "worker"
        self.spec_augment = SpecAugment(config.augment) if masked else None
        self.index = Index.load(config.path / split, config.rate_hz)
        self._check_size(self.prepared.splits.get(split), len(self.index), len(self.index.shards))
        self._reader = ShardReader(self.index.shards)
        self._num_output_frames = num_output_frames
        cut = self.training and plan.too_long == "cut"
        self._cut_samples = int(plan.longest_seconds * config.rate_hz) if cut else None
        speeds = config.augment.speeds if self.training else (1.0,)
        num_drawn = len(speeds)
        if 1.0 not in speeds:  # to fall back on, see `Lengths`
            speeds = (*speeds, 1.0)
        self._speeds = speeds
        self.plan = BucketedPlan(
            plan,
            Lengths(
                keys=self.index.keys,
                sample_keys=self.index.sample_keys,
                shard_end=self.index.shard_end,
                measure=self._measure,
                speeds=speeds,
                num_drawn=num_drawn,
                identity=self._lengths_identity(),
                folder=self.index.folder,
            ),
            seed,
            shuffle=self.training,
        )
        self._cache = _open_cache(config, split, self.prepared, plan) if config.remote.url else None
        self._names = [f"{split}/{shard.name}" for shard in self.index.shards]
        self._ahead = Ahead(self._names, seed, plan.window_shards if self.training else None)

    @staticmethod
    def _check(config: SpeechDataConfig, prepared: Prepared) -> None:
        where = show(config.path / "corpus.json")
        wanted = {
            "data.features.kind": (config.features.kind, prepared.statistics.kind),
            "data.sample_rate_hz": (config.rate_hz, prepared.sample_rate_hz),
            "data.text.tokens": (label_settings(config.text), prepared.tokens),
            "data.features.num_bands": (config.features.num_bands, prepared.statistics.num_bands),
            "data.features.window_ms": (config.features.window_ms, prepared.statistics.window_ms),
            "data.features.hop_ms": (config.features.hop_ms, prepared.statistics.hop_ms),
        }
        lines = [
            f"{where}: was made with {name} = {made!r}, the configuration says {now!r}; say the same, or run "
            f"`./launch.sh {prepared.maker}` again"
            for name, (now, made) in wanted.items()
            if now != made
        ]
        text = config.text
        made, now = (set(a.split() if text.phones else a) for a in (prepared.alphabet, text.alphabet or ""))
        if text.alphabet is not None and not made <= now:  # more is no harm: a net may know more letters
            lacking = " ".join(map(repr, sorted(made - now)))
            lines.append(
                f"data.text.alphabet = {text.alphabet!r}: lacks {lacking}, which {where} has; add that, or run "
                f"`./launch.sh {prepared.maker}` again"
            )
        if lines:
            raise UserError("\n".join(lines))

    def _check_size(self, made: SplitInfo | None, samples: int, shards: int) -> None:
        if made is None or (made.samples, made.shards) != (samples, shards):
            wanted = f"{made.samples} in {made.shards}" if made else "none"
            raise UserError(
                f"{show(self.config.path / self.split)}: holds {samples} samples in {shards} shards, corpus.json "
                f"beside it says {wanted}; put back what is missing, or run `./launch.sh {self.prepared.maker}` again"
            )

    @property
    def identity(self) -> dict[str, str]:
        samples = f"{len(self)} of index {self.index.digest}"
        if self.wave_augment is not None and (recordings := self.wave_augment.identity):
            samples += f", augmented by recordings {recordings}"
        return {"samples": samples, "alphabet": self.tokens.identity}

    def __len__(self) -> int:
        return len(self.index)

    def _measure(self, rows: NDArray[np.int64]) -> Measures:
        """See `Lengths`."""
        index, rate = self.index, self.config.rate_hz
        num_samples = index.num_samples[rows].astype(np.int64)
        tokens = index.label_length[rows].astype(np.int64)
        ctc_frames = index.ctc_frames[rows].astype(np.int64)
        if self._cut_samples is not None:
            kept = np.minimum(num_samples, self._cut_samples)
            ctc_frames -= tokens  # repeats: those of a part are no more than those of the whole
            tokens = tokens * kept // np.maximum(num_samples, 1)
            ctc_frames += tokens
            num_samples = kept
        stretched_samples = np.stack([stretched(num_samples, s, rate) for s in self._speeds])
        frames = self._num_output_frames(self.log_mel.num_frames(stretched_samples))
        return Measures(stretched_samples / rate, frames >= ctc_frames, tokens)

    def _lengths_identity(self) -> str:
        """Whatever `_measure` depends on: a kept plan is found by it."""
        longest = int(self.index.num_samples.max(initial=0))
        most = max(int(stretched(np.array([longest]), s, self.config.rate_hz)[0]) for s in self._speeds)
        frames = np.arange(int(self.log_mel.num_frames(np.array([most]))[0]) + 1)
        features = self.config.features.model_dump(mode="json", exclude={"where"})
        outputs = np.asarray(self._num_output_frames(frames), dtype=np.int64)  # all that the model does to a length
        digest = hashlib.blake2b(outputs.tobytes(), digest_size=8).hexdigest()
        return json.dumps([self.index.digest, features, self._cut_samples, digest])

    def _read(self, row: int, offset: int, size: int) -> bytes:
        """Contents of a member.

        Raises:
            AudioError: the shard has not all of it, or never came.
        """
        shard = int(self.index.shard[row])
        try:
            if self._cache is None:
                content = self._reader.read(shard, offset, size)
            else:
                content = os.pread(self._cache.open(self._names[shard]).fileno(), size, offset)
        except TransferError as error:
            raise AudioError(MISSING, f"{self._names[shard]} never came: {error}") from error
        except OSError as error:
            raise AudioError("shard cannot be read", str(error.strerror)) from error
        if len(content) < size:
            raise AudioError("shard is cut short", f"{len(content)} of {size} bytes at {offset}")
        return content

    def waveform(
        self, row: int, entry: Entry | None = None, room: NDArray[np.float32] | None = None
    ) -> NDArray[np.float32]:
        """Samples (N,) of one recording, or its feature matrix (T, F).

        Args:
            room: where samples may be decoded to, in place of memory of their own.

        Raises:
            AudioError: it cannot be read; the text is the reason.
        """
        entry = entry or self.index.entries[row]
        content = self._read(row, entry.audio_offset, entry.audio_size)
        intact = zlib_ng.crc32(content) == entry.audio_crc32
        if not intact and not content.strip(b"\0"):
            raise AudioError("zero bytes", f"{len(content)} of them in place of sound")
        try:
            samples = self.log_mel.decode(content, intact, room)
        except AudioError as error:  # says more than the checksum does
            changed = "" if intact else "; its bytes are not those that were indexed"
            raise AudioError(error.reason, error.detail + changed) from error
        if not intact:
            raise AudioError("checksum differs from the index")
        if len(samples) != entry.num_samples:
            raise AudioError("another length than the index says", f"{len(samples)} samples, not {entry.num_samples}")
        return samples

    def text(self, row: int, entry: Entry | None = None) -> str:
        """Normalised transcript of one recording.

        Raises:
            AudioError: it cannot be read; the text is the reason.
            UnknownCharacterError: it holds what the alphabet has not, and no rule says what becomes of that.
        """
        entry = entry or self.index.entries[row]
        content = self._read(row, entry.text_offset, entry.text_size)
        if zlib_ng.crc32(content) != entry.text_crc32:
            raise AudioError("transcript's checksum differs from the index")
        try:
            text, outside = self._reading.normalise(transcript(content), self._alphabet)
        except UnicodeDecodeError as error:
            raise AudioError("transcript is not UTF-8", str(error)) from error
        if outside and self._reading.unknown == "error":
            raise UnknownCharacterError(" ".join(map(repr, sorted(outside))))
        return text

    def transcripts(self) -> list[str]:
        """The normalised transcripts of the split, without those that cannot be read."""
        found = []
        for row in range(len(self)):
            with contextlib.suppress(AudioError, UnknownCharacterError):  # training says so, and leaves them out too
                found.append(self.text(row))
        return found

    def speaker(self, row: int) -> str | None:
        """Who speaks, if `KEY.json` in the tar says so, wherever it stands among the members of the sample."""
        entry = self.index.entries[row]
        ends = [_end(entry.audio_offset, entry.audio_size), _end(entry.text_offset, entry.text_size), 0]
        if row and self.index.shard[row - 1] == self.index.shard[row]:
            before = self.index.entries[row - 1]
            ends[-1] = max(_end(before.audio_offset, before.audio_size), _end(before.text_offset, before.text_size))
        for place in ends:
            try:
                header = tarfile.TarInfo.frombuf(self._read(row, place, BLOCK), "utf-8", "replace")
                if header.isfile() and header.name.rpartition("/")[2] == f"{entry.key.rpartition('/')[2]}.json":
                    about = json.loads(self._read(row, place + BLOCK, min(header.size, MAX_ABOUT)))
                    return None if about.get("speaker") is None else str(about["speaker"])
            except (tarfile.HeaderError, AudioError, ValueError, AttributeError):
                continue
        return None

    def labels(self, row: int, entry: Entry | None = None) -> list[int]:
        """Labels of one recording, or of as much of it as is not cut off.

        Raises:
            AudioError: something is wrong with its transcript.
        """
        entry = entry or self.index.entries[row]
        try:
            labels = self.tokens.encode(self.text(row, entry))
        except UnknownCharacterError as error:
            raise AudioError("transcript holds what is not in the alphabet", str(error)) from error
        if len(labels) != entry.label_length:
            raise AudioError("another number of labels than the index says", f"{len(labels)}, not {entry.label_length}")
        if self._cut_samples is not None and entry.num_samples > self._cut_samples:
            labels = labels[: len(labels) * self._cut_samples // entry.num_samples]
        return labels

    def wave(
        self, row: int, speed: float = 1.0, entry: Entry | None = None, room: NDArray[np.float32] | None = None
    ) -> Tensor:
        """The waveform (N,) as it is augmented, or the feature matrix (T, F): cut, and at some speed.

        Args:
            room: where samples may be decoded to; the waveform may lie there then.

        Raises:
            AudioError: something is wrong with it.
        """
        samples = self.waveform(row, entry, room)
        if self._cut_samples is not None:
            samples = samples[: self._cut_samples]
        return change_speed(torch.from_numpy(samples), self.config.rate_hz, speed)

    def load(self, micro_batch: MicroBatch) -> Batch:
        """A padded batch.

        Returns:
            the keys that `Batch` lists, and
            `audio`: (B, T, F) features, or (B, N) waveforms if `features.where` is "model"; `lengths`: (B,) of it;
            `labels`: (sum of label lengths,), `label_lengths`: (B,); `seconds`: (B,); `speakers`: B names, None where
            nobody says and in training.
        """
        if self._cache is not None:
            shards = {int(self.index.shard[row]) for row in micro_batch.samples}
            if (ahead := self._ahead(micro_batch.epoch, shards)) is not None:
                self._cache.prefetch(ahead)
        audio = self._empty(micro_batch)
        with reading() as now:
            # What is small comes first, of all: by turns with the sound, each would throw the other out of the cache.
            places = [self._place(row, micro_batch.epoch, now) for row in micro_batch.samples]
            for place, speed, out in zip(places, micro_batch.speeds, audio, strict=True):
                now.shard, now.key = place.shard, place.key
                self._fill(out, place, self._sound(place, speed, out))
        return self._finish(audio, places)

    def _place(self, row: int, epoch: int, now: Reading) -> "_Place":
        """A row of a batch with all but its sound."""
        place = _Place(row, self.index.entries[row], self._names[self.index.shard[row]])
        now.shard, now.key = place.shard, place.key
        if self.training:
            place.noise_key = keyed.key(self.seed, epoch, place.key)
        try:
            place.labels = self.labels(row, place.entry)
            if not self.training:
                place.speaker = self.speaker(row)
        except AudioError as error:
            place.fault = error
        return place

    def _sound(self, place: "_Place", speed: float, out: Tensor) -> Tensor:
        """The augmented waveform (N,) of a place, or its feature matrix (T, F); silence where something is wrong."""
        # What is not played faster or slower needs no other room than its own.
        in_place = speed == 1.0 and self.config.features.where == "model"
        room = out.numpy() if in_place else self._room(int(self.index.num_samples[place.row]))
        try:
            wave = self.wave(place.row, speed, place.entry, room)
            if self.wave_augment is not None:
                wave = self.wave_augment(wave, place.noise_key)
        except AudioError as error:  # says more than its transcript's error does
            place.fault = error
        if place.fault is None:
            return wave
        place.labels = []
        return self.log_mel.silence()

    def clip(self, key: str) -> Tensor:
        """One recording as the model gets it, a row of `audio` without padding.

        Raises:
            AudioError: it cannot be read.
        """
        return self._clip(torch.from_numpy(self.waveform(self.index.row(key))))

    def _room(self, num_samples: int) -> NDArray[np.float32]:
        """This thread's place for one clip, used again and again so that it stays in the cache."""
        room: NDArray[np.float32] | None = getattr(self._own, "room", None)
        if room is None or len(room) < num_samples:
            room = self._own.room = np.empty(num_samples, np.float32)
        return room

    def dummy(self) -> Batch:
        """Silence just long enough for one frame, not valid."""
        place, silence = _Place(), self.log_mel.silence()
        audio = self._clip(silence)[None]
        self._fill(audio[0], place, silence)
        return self._finish(audio, [place])

    def _clip(self, wave: Tensor) -> Tensor:
        """A clip as the model gets it."""
        return self.log_mel.clip(wave) if self.config.features.where == "worker" else wave

    def _empty(self, micro_batch: MicroBatch) -> Tensor:
        """Room for a batch, whose lengths the index knows: a clip goes to its row while the cache has it."""
        num_samples = self.index.num_samples[list(micro_batch.samples)].tolist()
        if self._cut_samples is not None:
            num_samples = [min(n, self._cut_samples) for n in num_samples]
        rate, speeds = self.config.rate_hz, micro_batch.speeds
        longest = max(stretched(n, speed, rate) for n, speed in zip(num_samples, speeds, strict=True))
        like = self._shortest
        if self.config.features.where == "worker":
            longest = int(self.log_mel.num_frames(np.array([longest]))[0])
        return like.new_empty(len(num_samples), max(longest, len(like)), *like.shape[1:])

    def _fill(self, row: Tensor, place: "_Place", wave: Tensor) -> None:
        """All that is to be computed of a clip, and zeros after it."""
        samples, numbers = wave.numpy(), row.numpy()
        if self.config.features.where == "worker":
            place.length = len(self.log_mel.clip(wave, row))
        else:
            place.length = len(samples)
            if wave.data_ptr() != row.data_ptr():
                numbers[: len(samples)] = samples
        place.seconds, place.checksum = len(samples) / self.config.rate_hz, checksum(samples)
        numbers[place.length :] = 0

    def _finish(self, audio: Tensor, places: Sequence["_Place"]) -> Batch:
        lengths = torch.tensor([place.length for place in places])
        noise_keys = torch.tensor([place.noise_key for place in places])
        if self.spec_augment is not None:
            audio = self.spec_augment(audio, lengths, keyed.fold(noise_keys, "spec_augment"))
        labels = np.fromiter(chain.from_iterable(place.labels for place in places), np.int64)
        return {
            "keys": [place.key for place in places],
            "valid": torch.tensor([place.entry is not None and place.fault is None for place in places]),
            "noise_keys": noise_keys,
            "checksums": [place.checksum for place in places],
            "faults": [Fault(p.key, p.fault.reason, p.fault.detail) for p in places if p.fault is not None],
            "audio": audio,
            "lengths": lengths,
            "labels": torch.from_numpy(labels),
            "label_lengths": torch.tensor([len(place.labels) for place in places]),
            "seconds": torch.tensor([place.seconds for place in places]),
            "speakers": [place.speaker for place in places],
        }

    def media(self, key: str) -> Media:
        """The recording, if there is sound, and the picture of its normalised features."""
        row = self.index.row(key)
        samples = self.waveform(row)
        features = self.log_mel.clip(torch.from_numpy(samples))
        sound = samples if samples.ndim == 1 else None
        return Media(sound, self.config.rate_hz, features.T.numpy())


def _end(offset: int, size: int) -> int:
    """Where the member after one of so many bytes begins."""
    return offset + -(-size // BLOCK) * BLOCK


def _open_cache(config: SpeechDataConfig, split: str, prepared: Prepared, plan: BucketedConfig) -> Cache:
    """The local copy of the shards.

    Raises:
        UserError: it is to be smaller than what a plan reads at a time.
    """
    assert config.remote.url is not None
    sizes = {name: file.bytes for name, file in prepared.files.items()}
    limit = int(config.remote.cache_gb * GIGABYTE)
    own = sorted((size for name, size in sizes.items() if name.startswith(f"{split}/")), reverse=True)
    wanted = sum(own[: 2 * plan.window_shards])
    if split == "train" and wanted > limit:
        raise UserError(
            f"data.remote.cache_gb = {config.remote.cache_gb:g}: two windows of plan.window_shards = "
            f"{plan.window_shards} shards take {wanted / GIGABYTE:.3g}; make it larger, or the window smaller"
        )
    if split != "train" and sum(own) > limit:
        log.warning(
            "%s: takes %.3g GB and is read in order of length, from all shards at a time; with data.remote.cache_gb = "
            "%g its shards will be fetched again and again",
            split,
            sum(own) / GIGABYTE,
            config.remote.cache_gb,
        )
    return Cache(config.path, config.remote.url, sizes, limit, max_open=2 * plan.window_shards)
