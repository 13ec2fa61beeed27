"""Shards from elsewhere: what is in them, what is wrong with them, and the indexes by which they are trained on.

A shard is looked at whole, by a worker process of its own: every sound is decoded, every text read. What comes back
is a line of facts a sample and a list of problems, from which `make_indexes` writes indexes and `corpus.json`, and
`lint` a verdict.
"""

import hashlib
import io
import json
import os
import statistics
import struct
import zlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
import torch
from numpy.typing import NDArray
from pydantic import TypeAdapter

from trainer.config import show
from trainer.data.audio import AudioError, FeaturesConfig, LogMel, Precomputed, decode_matrix
from trainer.data.corpora.base import SPLITS, SplitName, split_by_text
from trainer.data.index import Entry, index_path, write_index
from trainer.data.packing import NOTES, Note, missing_sound
from trainer.data.parallel import Display, results, stop_by_exception
from trainer.data.prepare import band_statistics
from trainer.data.remote import STATE
from trainer.data.speech import (
    FOREIGN,
    Prepared,
    SpeechDataConfig,
    SplitInfo,
    build_tokens,
    label_settings,
    shard_file,
    write_prepared,
)
from trainer.data.tars import Pair, Problem, read_contents, transcript
from trainer.data.text import (
    SUBWORDS_FILE,
    Subwords,
    SubwordsConfig,
    TextConfig,
    Tokens,
    TokensConfig,
    UnknownCharacterError,
    ctc_frames,
    not_text,
)
from trainer.errors import UserError

SPLIT_NAMES: dict[str, SplitName] = {
    "train": "train",
    "training": "train",
    "valid": "valid",
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "test": "test",
    "eval": "test",
}
READ_SAMPLES = 1 << 20
LONGEST_SECONDS = 4 * 3600
"""A sound that goes on for longer is not decoded to its end: its header lies, or it is no utterance."""
UNITS_A_SECOND = (0.3, 40.0)
"""Characters or phones; outside of these a text is hardly that of its sound: quick speech has about 25 characters."""


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
    if (path / STATE).is_dir():
        url = (path / STATE / "url").read_text(encoding="utf-8")
        raise UserError(
            f"{show(path)}: is the local copy of {url}, where not all is; look at the shards where they lie"
        )
    found = sorted(
        p for p in path.rglob("*.tar") if not any(part.startswith(".") for part in p.relative_to(path).parts)
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
                audio = _read(file, pair.audio.offset, pair.audio.size)
                try:
                    transcribed = _read(file, pair.text.offset, pair.text.size)
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


def _read(file: io.BufferedReader, offset: int, size: int) -> bytes:
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
        raise _UnusableError("label", f"holds {_named(outside)}, which the alphabet has not")
    if not normalised:
        raise _UnusableError("label", f"{text[:40]!r} is empty once it is normalised")
    return normalised, outside


def _named(outside: Counter[str]) -> str:
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


# --- index -----------------------------------------------------------------------------------------------------------


@dataclass
class Indexed:
    """What `make_indexes` has made."""

    prepared: Prepared | None
    """None: of a single tar there is no corpus."""
    written: list[Path]
    examined: list[Examined]


def make_indexes(path: Path, into: Path | None, config: SpeechDataConfig, any_rate: bool = False) -> Indexed:
    """Write the indexes of shards that were made elsewhere and, for a folder of them, `corpus.json`.

    A folder with train/ valid/ test/ gets them beside its shards. In any other folder the names of the tars or of the
    folders they lie in say the split (train-000.tar, dev/000.tar); where they say nothing, the text of each sample
    does, as in `prepare`. Then, and where `into` is given, the corpus is a folder of links to the tars, with the
    indexes beside them; a tar whose samples go to several splits is linked to in each.

    Args:
        path: a tar, or a folder of them.
        into: for the indexes, if not beside the shards.
        config: rate, text, features.
        any_rate: take the rate of the first sound instead of the configured one.

    Raises:
        UserError: nothing can be used, or written, or it would be mixed with something else.
    """
    path, into = path.absolute(), into.absolute() if into else None
    single = path.is_file()
    root = into or (path.parent if single else path)
    _refuse_others(root, single and not into)
    linked = find_shards(path)
    if into is None and not single:  # links of an earlier call lead to the tars that are found anyway
        linked = [shard for shard in linked if not shard.is_symlink()] or linked
    splits = {shard: None if single else _split_of(shard, path) for shard in linked}
    in_place = into is None and all((split := splits[s]) and s.parent == path / split for s in linked)
    rate = _rate(linked, config, any_rate)
    looks = [
        Look(shard, config.text, config.features, rate, not single, "train" if single else splits[shard])
        for shard in linked
    ]
    examined = examine_all(looks, "shards index")
    alphabet = _keep_to_alphabet(config.text, examined)
    if not any(e.samples for e in examined):
        raise UserError(f"{show(path)}: no sample can be used: {_summary(examined)}")
    if not single:
        _refuse_empty(path, examined)
    model = None if single else _learn_subwords(config.text, examined)
    tokens = Subwords(model) if model is not None else config.text.tokens.build(alphabet, root)
    _count_labels(tokens, examined)
    if single:
        shard = _link(linked[0], into) if into else linked[0]
        _write(shard, [facts.entry(facts.pair.key) for facts in examined[0].samples])
        return Indexed(None, [index_path(shard)], examined)
    _refuse_empty(path, examined)  # what has no label is gone now
    written: dict[SplitName, list[tuple[Path, list[Facts]]]] = {split: [] for split in SPLITS}
    keys = _unique_keys(examined)
    (root / "corpus.json").unlink(missing_ok=True)  # until all is there
    if not in_place:
        _clear_links(root)
    if model is not None:
        _write_vocabulary(model, root)
    for e in examined:
        for split in SPLITS:
            chosen = [f for f in e.samples if f.split == split]
            if chosen:
                shard = e.shard if in_place else _link(e.shard, root / split, path)
                _write(shard, [f.entry(keys[e.shard, f.pair.key]) for f in chosen])
                written[split].append((shard, chosen))
        if in_place and not e.samples:
            raise UserError(
                f"{show(e.shard)}: no sample in it can be used: {_summary([e])}; move it away, or name another folder "
                "for the indexes with --into"
            )
    outside = Counter(unit for e in examined for f in e.samples for unit in f.outside.elements())
    prepared = Prepared(
        corpus=FOREIGN,
        sample_rate_hz=rate,
        alphabet=alphabet,
        tokens=label_settings(config.text),
        subwords_sha256=hashlib.sha256(model).hexdigest() if model is not None else None,
        outside_alphabet=dict(outside.most_common()),
        splits={
            split: SplitInfo(
                samples=sum(len(chosen) for _, chosen in group),
                hours=sum(f.num_samples for _, chosen in group for f in chosen) / rate / 3600,
                shards=len(group),
                files={shard.name: shard_file(shard) for shard, _ in group},
            )
            for split, group in written.items()
        },
        statistics=band_statistics(config.features, [e.note for e in examined if e.note]),
    )
    write_prepared(prepared, root)
    return Indexed(prepared, [index_path(shard) for group in written.values() for shard, _ in group], examined)


def _refuse_empty(path: Path, examined: list[Examined]) -> None:
    """See to it that there is something in each split."""
    counts = Counter(f.split for e in examined for f in e.samples)
    if empty := [split for split in SPLITS if not counts[split]]:
        raise UserError(
            f"{show(path)}: the split {' and '.join(empty)} would be empty ({len(examined)} tars); put the tars of "
            "each into a folder train/, valid/, test/, or leave it to the texts: take these words out of the names"
            + (f"\nleft out: {_summary(examined)}" if any(e.problems for e in examined) else "")
        )


def _refuse_others(root: Path, single: bool) -> None:
    """See to it that nothing of `prepare` is lost."""
    if not single and (root / NOTES).is_dir():
        raise UserError(
            f"{show(root)}: its shards were made by `prepare`, and have their indexes; if one was lost, run "
            "`./launch.sh prepare CONFIG` again"
        )


def _split_of(shard: Path, root: Path) -> SplitName | None:
    """The split that the name of a tar, or of a folder it lies in, begins with."""
    for part in reversed(shard.relative_to(root).parts):
        word = "".join(c if c.isalpha() else " " for c in part.lower()).split(maxsplit=1)[:1]
        if word and word[0] in SPLIT_NAMES:
            return SPLIT_NAMES[word[0]]
    return None


def _rate(shards: list[Path], config: SpeechDataConfig, any_rate: bool) -> int:
    """The wanted rate; if any will do, that of the first sound that can be read."""
    if not any_rate or config.features.kind != "log_mel":
        return config.rate_hz
    for shard in shards:
        with shard.open("rb") as file:
            for pair in read_contents(shard).pairs:
                try:
                    return read_sound(_read(file, pair.audio.offset, pair.audio.size), decode=False)[2]
                except AudioError:
                    continue
    return config.rate_hz


def _training_texts(examined: list[Examined]) -> list[str]:
    return [f.text for e in examined for f in e.samples if f.split == "train"]


def _keep_to_alphabet(text: TextConfig, examined: list[Examined]) -> str:
    """The alphabet. Where it is that of the training texts, the other texts are held to it as the settings say."""
    if text.alphabet is not None:
        return text.alphabet
    alphabet = text.alphabet_of(_training_texts(examined))
    rules = text.model_copy(update={"lowercase": False, "map": {}})  # that is done
    for e in examined:
        kept = []
        for f in e.samples:
            f.text, f.outside = rules.normalise(f.text, alphabet)
            if f.outside and rules.unknown == "error":
                detail = f"holds {_named(f.outside)}, which no training text does"
                e.problems.append(Problem("label", detail, f.pair.key))
            elif not f.text:
                detail = f"holds only {_named(f.outside)}, which no training text does"
                e.problems.append(Problem("label", detail, f.pair.key))
            else:
                kept.append(f)
        e.samples = kept
    return alphabet


def _learn_subwords(text: TextConfig, examined: list[Examined]) -> bytes | None:
    """The vocabulary of the training texts, where labels are subwords.

    Raises:
        UserError: it cannot be learnt.
    """
    return text.tokens.train(_training_texts(examined)) if isinstance(text.tokens, SubwordsConfig) else None


def _write_vocabulary(model: bytes, root: Path) -> None:
    path = root / SUBWORDS_FILE
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(model)
        temporary.replace(path)
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error


def _count_labels(tokens: Tokens, examined: list[Examined]) -> None:
    """Fill in what the labels of each text take."""
    for e in examined:
        kept = []
        for f in e.samples:
            try:
                labels = tokens.encode(f.text)
            except UnknownCharacterError as error:
                e.problems.append(Problem("label", f"holds {error}, which has no label", f.pair.key))
                continue
            f.label_length, f.ctc_frames = len(labels), ctc_frames(labels)
            kept.append(f)
        e.samples = kept


def _unique_keys(examined: list[Examined]) -> dict[tuple[Path, str], str]:
    """Names of the samples: their keys; where several tars have the same, with the tar in front."""
    count = Counter(f.pair.key for e in examined for f in e.samples)
    stems = Counter(e.shard.stem for e in examined)
    names = {
        (e.shard, f.pair.key): f.pair.key
        if count[f.pair.key] == 1
        else f"{e.shard.stem if stems[e.shard.stem] == 1 else f'{e.shard.parent.name}-{e.shard.stem}'}/{f.pair.key}"
        for e in examined
        for f in e.samples
    }
    if len(set(names.values())) < len(names):
        name = Counter(names.values()).most_common(1)[0][0]
        raise UserError(f"the key {name!r} is that of several samples in tars of the same name; rename the tars")
    return names


def _link(shard: Path, folder: Path, root: Path | None = None) -> Path:
    """A link to a tar, by a name of its own in the folder."""
    name = "-".join(shard.relative_to(root).parts) if root and root in shard.parents else shard.name
    link = folder / name
    if link == shard:
        return shard
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if link.is_symlink():
            link.unlink()
        inside = root is not None and root in folder.parents
        link.symlink_to(os.path.relpath(shard, folder) if inside else shard)
    except OSError as error:
        raise UserError(_unwritable(link, error)) from error
    return link


def _clear_links(root: Path) -> None:
    """Remove the links and indexes of an earlier call."""
    for split in SPLITS:
        for link in (root / split).glob("*.tar"):
            if link.is_symlink():
                index_path(link).unlink(missing_ok=True)
                link.unlink()


def _write(shard: Path, entries: list[Entry]) -> None:
    try:
        write_index(shard, entries)
    except OSError as error:
        raise UserError(_unwritable(index_path(shard), error)) from error


def _unwritable(path: Path, error: OSError) -> str:
    return f"{show(path)}: cannot be written: {error.strerror}; name a folder where it can, with --into FOLDER"


def _summary(examined: list[Examined]) -> str:
    """Problems as counts, the most frequent first, each with an example."""
    count = Counter(f"{p.check}: {p.detail}" for e in examined for p in e.problems)
    shown = [f"{text} ({n} times)" if n > 1 else text for text, n in count.most_common(3)]
    return "; ".join(shown) + (f"; and {len(count) - 3} more" if len(count) > 3 else "")


# --- lint ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """Something that `lint` has found."""

    shard: Path
    problem: Problem


def lint(
    path: Path,
    config: SpeechDataConfig,
    seconds: tuple[float, float],
    num_output_frames: Callable[[NDArray[np.int64]], NDArray[np.int64]],
    any_rate: bool = False,
) -> tuple[list[Finding], list[Examined]]:
    """Check every byte and every label of shards.

    Args:
        path: a tar, or a folder of them.
        config: rate, text, features; labels, alphabet and features are those of a `corpus.json` in the folder.
        seconds: shortest and longest plausible length.
        num_output_frames: feature frames (N,) -> output frames (N,) of the model, for CTC feasibility.
        any_rate: take the rate of the first sound instead of the configured one.

    Returns:
        what is wrong, and all that was seen.

    Raises:
        UserError: there are no shards.
    """
    shards = find_shards(path)
    prepared = prepared_at(path)
    config = as_prepared(config, prepared)
    rate = prepared.sample_rate_hz if any_rate and prepared else _rate(shards, config, any_rate)
    text = config.text
    # Each tar once, whatever links lead to it, but each link's own index.
    unique = {shard.resolve(): shard for shard in reversed(shards)}
    looks = [Look(shard, text, config.features, rate, split="train") for shard in sorted(unique.values())]
    examined = examine_all(looks, "shards lint")
    _count_labels(_tokens(path, config, prepared, examined), examined)
    found = [Finding(e.shard, p) for e in examined for p in e.problems]
    log_mel = config.features.build(rate)
    keys: dict[str, Path] = {}
    sounds: dict[str, tuple[Path, Facts]] = {}
    for e in examined:
        lengths = np.array([f.num_samples for f in e.samples], dtype=np.int64)
        frames = num_output_frames(log_mel.num_frames(lengths)) if len(lengths) else lengths
        for f, available in zip(e.samples, frames.tolist(), strict=True):
            problems = [*_implausible(f, seconds, text)]
            if available < f.ctc_frames:
                detail = f"{f.label_length} labels need {f.ctc_frames} output frames, it has {available}"
                problems.append(Problem("ctc", detail))
            if (first := keys.setdefault(f.pair.key, e.shard)) != e.shard:
                problems.append(Problem("duplicate", f"the key is in {show(first)} too"))
            other, same = sounds.setdefault(f.sound, (e.shard, f))
            if same is not f:
                told = "and text" if same.text == f.text else f"but another text, {same.text[:40]!r}"
                problems.append(Problem("duplicate", f"the same sound {told}: {same.pair.key} of {show(other)}"))
            found += [Finding(e.shard, Problem(p.check, p.detail, f.pair.key)) for p in problems]
    indexes = {(index_path(shard), shard) for shard in shards if index_path(shard).is_file()}
    by_file = {e.shard.resolve(): e for e in examined}
    for index, shard in sorted(indexes):
        found += [Finding(shard, p) for p in _against_index(index, by_file[shard.resolve()])]
    return found, examined


def prepared_at(path: Path) -> Prepared | None:
    """What `corpus.json` in a folder says, if there is one."""
    return Prepared.load(path) if path.is_dir() and (path / "corpus.json").is_file() else None


def as_prepared(config: SpeechDataConfig, prepared: Prepared | None) -> SpeechDataConfig:
    """The settings with what `corpus.json` says of alphabet, labels and features."""
    if prepared is None:
        return config
    tokens: TokensConfig = TypeAdapter(TokensConfig).validate_python(prepared.tokens)
    text = prepared.reading(config.text).model_copy(
        update={"tokens": tokens, "alphabet": config.text.alphabet or prepared.alphabet}
    )
    features = config.features.model_copy(update=prepared.statistics.model_dump(exclude={"mean", "deviation"}))
    return config.model_copy(update={"text": text, "features": features})


def _tokens(path: Path, config: SpeechDataConfig, prepared: Prepared | None, examined: list[Examined]) -> Tokens:
    """The labels by which shards are checked; subwords that nobody has learnt yet are learnt.

    Raises:
        UserError: they cannot be learnt, or the vocabulary is not that of `corpus.json`.
    """
    if prepared is not None:
        return build_tokens(config.model_copy(update={"path": path}), prepared)
    model = _learn_subwords(config.text, examined)
    if model is not None:
        return Subwords(model)
    return config.text.tokens.build(config.text.alphabet or config.text.alphabet_of(_training_texts(examined)), path)


def _implausible(f: Facts, seconds: tuple[float, float], text: TextConfig) -> list[Problem]:
    problems = []
    if not seconds[0] <= f.seconds <= seconds[1]:
        problems.append(Problem("length", f"{f.seconds:.2f} s, wanted {seconds[0]:g} to {seconds[1]:g}"))
    number = len(units(f.text, text))
    if not UNITS_A_SECOND[0] <= number / f.seconds <= UNITS_A_SECOND[1]:
        what = "phones" if text.phones else "characters"
        problems.append(Problem("pace", f"suspicious: {number} {what} in {f.seconds:.2f} s"))
    return problems


def units(text: str, rules: TextConfig) -> Sequence[str]:
    """The characters of a text, or its phones."""
    return text.split() if rules.phones else text


def _against_index(index: Path, examined: Examined) -> list[Problem]:
    """What an index says that is not so."""
    try:
        head, *rows = (json.loads(line) for line in index.read_text(encoding="utf-8").splitlines())
        entries = [Entry(**row) for row in rows]
        if len(entries) != head["samples"]:
            return [Problem("index", f"{index.name}: ends after {len(entries)} of {head['samples']} samples")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Problem("index", f"{index.name}: is damaged: {error}")]
    places = {(f.pair.audio.offset, f.pair.text.offset): f for f in examined.samples}
    problems = []
    for entry in entries:
        f = places.get((entry.audio_offset, entry.text_offset))
        if f is None:
            problems.append(Problem("index", f"{index.name}: names a sample that cannot be used", entry.key))
        elif f.entry(entry.key) != entry:
            problems.append(Problem("index", f"{index.name}: is not that of this shard; run `shards index`", entry.key))
    return problems


# --- stats -----------------------------------------------------------------------------------------------------------


@dataclass
class Statistics:
    """Sizes of some shards."""

    samples: int
    hours: float
    seconds: list[float]
    """Length of each sample."""
    units: Counter[str]
    """Characters, or phones."""
    problems: int

    @property
    def pace(self) -> float:
        """Characters or phones a second."""
        return sum(self.units.values()) / max(sum(self.seconds), 1e-9)

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds) if self.seconds else 0.0


def collect(path: Path, config: SpeechDataConfig) -> tuple[dict[str, Statistics], str]:
    """Hours, lengths and characters of shards, by the folder they lie in, as the headers of the sounds have it.

    Returns:
        the sizes, and what was counted of the texts: "characters" or "phones".
    """
    shards = find_shards(path)
    linked = {shard.resolve() for shard in shards if shard.is_symlink()}
    shards = [shard for shard in shards if shard.is_symlink() or shard.resolve() not in linked]  # each sample once
    config = as_prepared(config, prepared_at(path))
    text = config.text.model_copy(update={"alphabet": None})  # what is there is counted, not judged
    looks = [Look(shard, text, config.features, split="train", decode=False) for shard in shards]
    groups: dict[str, list[Examined]] = defaultdict(list)
    for e in examine_all(looks, "shards stats"):
        listed = _listed(e)
        e.samples = [f for f in e.samples if listed is None or f.pair.audio.offset in listed]
        groups[str(e.shard.parent.relative_to(path)) if path.is_dir() else e.shard.name].append(e)
    sizes = {
        name: Statistics(
            samples=sum(len(e.samples) for e in group),
            hours=sum(f.seconds for e in group for f in e.samples) / 3600,
            seconds=[f.seconds for e in group for f in e.samples],
            units=Counter(unit for e in group for f in e.samples for unit in units(f.text, text)),
            problems=sum(len(e.problems) for e in group),
        )
        for name, group in groups.items()
    }
    return sizes, "phones" if text.phones else "characters"


def _listed(examined: Examined) -> set[int] | None:
    """Places of the sounds that the index of a link lists: the other samples of the tar are those of other splits."""
    index = index_path(examined.shard)
    if not examined.shard.is_symlink() or not index.is_file():
        return None
    return {json.loads(line)["audio_offset"] for line in index.read_text(encoding="utf-8").splitlines()[1:]}
