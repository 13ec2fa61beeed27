"""Raw corpus to shards: reads every recording once, in parallel, and can be stopped and started at any time.

What it leaves in `data.path`: train/ valid/ test/ with `shard-000000.tar` (webdataset's KEY.flac KEY.json KEY.txt, or
KEY.npy for precomputed features) and an index beside each, `corpus.json`, written last, where labels are subwords their
vocabulary, and `.prepare/` with a note a shard: the fingerprint of what went
into it and the sums for the band statistics. A shard whose fingerprint is still that of its inputs is kept. The same
corpus gives the same bytes, whatever the number of processes.
"""

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import rich.console
import rich.table

from trainer.config import plain, show
from trainer.data.audio import FeaturesConfig
from trainer.data.corpora.base import MAX_SHOWN, SPLITS, BadLinesError, SplitName, Utterance, listing, split_by_text
from trainer.data.index import index_path
from trainer.data.mirror import bundle_name
from trainer.data.packing import NOTES, Note, Sample, Task, feature_settings, is_done, note_path, read_note, write_shard
from trainer.data.parallel import Display, results, stop_by_exception
from trainer.data.prepared import (
    BandStatistics,
    Prepared,
    SpeechDataConfig,
    SplitInfo,
    label_settings,
    shard_file,
    write_prepared,
)
from trainer.data.text import SUBWORDS_FILE, SubwordsConfig, ctc_frames
from trainer.errors import UserError

MIN_DEVIATION = 1e-3
"""Of a band: one that is silent everywhere must not be divided by zero."""


def prepare(config: SpeechDataConfig, processes: int | None = None) -> Prepared:
    """Make the shards of a corpus, as far as they are not there yet.

    Args:
        config: the corpus, and what to make of it.
        processes: to work with; None takes one a core.

    Returns:
        what `corpus.json` says.

    Raises:
        UserError: the corpus cannot be had, or some of it is unusable: all of that in one message, after
            the shards of the rest were written.
        RequeueError: SIGTERM or SIGUSR1 came; what was finished is kept.
    """
    started = time.monotonic()
    console = rich.console.Console()
    root = config.path
    if config.remote.url:
        raise UserError(
            "data.remote.url: the corpus is prepared where it lies, and data.path is only a copy of it; leave "
            "data.remote.url out to prepare one here"
        )
    try:
        (root / NOTES).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"data.path = {root}: cannot be made: {error.strerror}; choose another folder") from error
    with _only_one(root), stop_by_exception("prepare"), Display(console) as display:
        _refuse_another_corpus(config)
        problems: list[str] = []
        try:
            utterances = config.corpus.utterances(root, display)
        except BadLinesError as error:
            utterances, problems = error.usable, error.problems
        allowed = int(config.max_unusable_share * (len(utterances) + len(problems)))
        cleaned = _clean(config, utterances, problems)
        outside = cleaned.outside_line(config)
        for line in (_shared_texts(cleaned.texts), None if config.text.unknown == "error" else outside):
            if line:
                console.print(line, highlight=False, markup=False, soft_wrap=True)
        _refuse_empty_splits(root, cleaned, problems, allowed)
        try:
            vocabulary = _vocabulary(config, cleaned)
        except UserError as error:
            raise UserError(_listed(root, [*problems, str(error)])) from error
        tasks = _plan(config, cleaned)
        stale = _stale(root, tasks)
        todo = [task for task in tasks if not is_done(task)]
        if todo or stale:
            (root / "corpus.json").unlink(missing_ok=True)  # until it is whole again
        if todo:
            if problems:
                console.print(f"{len(problems)} lines are unusable; everything that is, is listed at the end")
            problems += _write_all(todo, processes or len(os.sched_getaffinity(0)), display)
        written = {task.shard for task in todo}
        problems += [line for task in tasks if task.shard not in written for line in _left_out(task)]
        if len(problems) > allowed:
            cure = (
                "The shards without these are kept: mend this and run the command again, or let it leave out such a "
                "share of the corpus: data.max_unusable_share=0.01, say"
            )
            counts = outside if config.text.unknown == "error" else None  # else it was printed
            raise UserError("\n".join(filter(None, (_listed(root, problems), counts, cure))))
        _tell_left_out(root, problems, console)
        for shard in stale:
            _remove(shard)
        if stale:
            console.print(f"{len(stale)} shards of an earlier preparation were removed", highlight=False)
        prepared = _summary(config, cleaned, vocabulary, tasks)
        if not _is_written(prepared, root):
            write_prepared(prepared, root)

    done = f"{len(todo)} of {len(tasks)} shards written in {time.monotonic() - started:.0f} s" if todo else "up to date"
    console.print(f"{show(root)}: {done}", highlight=False, markup=False, soft_wrap=True)
    console.print(size_table(prepared))
    return prepared


# --- what goes where -------------------------------------------------------------------------------------------------


@dataclass
class Cleaned:
    """The utterances that can be used."""

    texts: dict[SplitName, list[tuple[Utterance, str]]] = field(default_factory=lambda: {split: [] for split in SPLITS})
    """By split: each with its normalised transcript."""
    alphabet: str = ""
    outside: Counter[str] = field(default_factory=Counter)
    """Occurrences of each character (or phone) outside the alphabet."""
    utterances_outside: Counter[str] = field(default_factory=Counter)
    """... and the utterances with it."""

    def outside_line(self, config: SpeechDataConfig) -> str | None:
        """What was found outside the alphabet, and what becomes of it; None if nothing was."""
        if not self.outside:
            return None
        counts = [
            f"{c!r} {n:,} in {self.utterances_outside[c]:,} utterances" for c, n in self.outside.most_common(MAX_SHOWN)
        ]
        if len(self.outside) > MAX_SHOWN:
            counts.append(f"and {len(self.outside) - MAX_SHOWN} more")
        rule = {"error": "an error", "space": "a space instead", "drop": "dropped"}[config.text.unknown]
        return f"outside the alphabet ({rule}): {', '.join(counts)}"


def _clean(config: SpeechDataConfig, utterances: list[Utterance], problems: list[str]) -> Cleaned:
    """Utterances with usable text; adds what is wrong with the others to `problems`."""
    cleaned = Cleaned()
    places: dict[str, str] = {}

    def usable(utterance: Utterance, transcript: str, alphabet: str | None) -> str | None:
        text, outside = config.text.normalise(transcript, alphabet)
        cleaned.outside.update(outside)
        cleaned.utterances_outside.update(outside.keys())
        if outside and config.text.unknown == "error":
            problems.append(_outside(utterance, sorted(outside)))
        elif not text:
            problems.append(
                _problem(utterance, "is empty once it is normalised", "write what is said or remove the line")
            )
        else:
            return text
        return None

    for utterance in utterances:
        if places.setdefault(utterance.key, utterance.where) != utterance.where:
            first = places[utterance.key]
            problems.append(f"{utterance.where}: key = {utterance.key!r}: is that of {first} too; rename one")
        elif (text := usable(utterance, utterance.text, config.text.alphabet)) is not None:
            cleaned.texts[utterance.split or split_by_text(text)].append((utterance, text))

    if config.text.alphabet is not None:
        cleaned.alphabet = config.text.alphabet
        return cleaned
    cleaned.alphabet = config.text.alphabet_of(text for _, text in cleaned.texts["train"])
    for split in ("valid", "test"):
        again = [(u, usable(u, u.text, cleaned.alphabet)) for u, _ in cleaned.texts[split]]
        cleaned.texts[split] = [(u, text) for u, text in again if text is not None]
    return cleaned


def _vocabulary(config: SpeechDataConfig, cleaned: Cleaned) -> str | None:
    """Learn the subwords of the training transcripts, unless that was done; the SHA-256 of the file.

    Raises:
        UserError: they cannot be learnt.
    """
    if not isinstance(config.text.tokens, SubwordsConfig):
        return None
    path, note = config.path / SUBWORDS_FILE, config.path / NOTES / "subwords.json"
    texts = [text for _, text in cleaned.texts["train"]]
    made_from = hashlib.sha256(json.dumps([label_settings(config.text), texts]).encode()).hexdigest()
    with contextlib.suppress(OSError, ValueError):
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        if json.loads(note.read_text(encoding="utf-8")) == [made_from, digest]:
            return digest
    model = config.text.tokens.train(texts)
    digest = hashlib.sha256(model).hexdigest()
    (config.path / "corpus.json").unlink(missing_ok=True)  # until its shards are there again
    for target, content in ((path, model), (note, json.dumps([made_from, digest]).encode())):
        temporary = (config.path / NOTES / target.name).with_suffix(".tmp")
        temporary.write_bytes(content)
        temporary.replace(target)
    return digest


def _shared_texts(samples: dict[SplitName, list[tuple[Utterance, str]]]) -> str | None:
    """A warning where splits that the corpus gives share sentences: an error rate then tells what was learnt by
    heart."""
    texts = {split: {text for _, text in group} for split, group in samples.items()}
    counts = {f"{a} and {b}": len(texts[a] & texts[b]) for a, b in itertools.combinations(SPLITS, 2)}
    shared = ", ".join(f"{number} in {both}" for both, number in counts.items() if number)
    return f"warning: splits share texts ({shared}), so an error rate tells less of new ones" if shared else None


def _problem(utterance: Utterance, reason: str, cure: str) -> str:
    text = utterance.text if len(utterance.text) <= 60 else f"{utterance.text[:60]}..."
    return f"{utterance.where}: key {utterance.key}: text = {text!r}: {reason}; {cure}"


def _outside(utterance: Utterance, units: list[str]) -> str:
    named = " ".join(map(repr, units))
    cure = (
        "correct or remove the line, or set data.text.alphabet with what you want in it, data.text.map for what stands "
        "for something in it and, for the rest, data.text.unknown to space or drop"
    )
    return _problem(utterance, f"holds {named}, which the alphabet of the training texts has not", cure)


def _listed(root: Path, problems: list[str]) -> str:
    """The first problems as a message, and where all of them are, if they are many."""
    if len(problems) <= MAX_SHOWN:
        return listing(problems)
    path = root / NOTES / "problems.txt"
    path.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8", errors="replace")
    return f"{listing(problems)}: all {len(problems)} are in {show(path)}"


def _left_out(task: Task) -> list[str]:
    """What an earlier call left out of a shard that it wrote."""
    note = read_note(task.note)
    return [] if note is None else note.left_out


def _tell_left_out(root: Path, problems: list[str], console: rich.console.Console) -> None:
    """Keep what was left out in PATH/left_out.txt, a line each; no such file where nothing was."""
    path = root / "left_out.txt"
    if not problems:
        path.unlink(missing_ok=True)
        return
    path.write_text("".join(f"{problem}\n" for problem in problems), encoding="utf-8", errors="replace")
    told = (
        f"warning: {len(problems)} lines are unusable and left out, as data.max_unusable_share allows: see {show(path)}"
    )
    console.print(told, highlight=False, markup=False, soft_wrap=True)


def _refuse_empty_splits(root: Path, cleaned: Cleaned, problems: list[str], allowed: int) -> None:
    """Every split is needed; where lines are unusable the cause may be these, and they are told first.

    Raises:
        UserError: one is empty, and nothing was wrong; or there is nothing to train on.
    """
    empty = [split for split in SPLITS if not cleaned.texts[split]]
    if empty and len(problems) <= allowed:
        counts = ", ".join(f"{split} {len(cleaned.texts[split])}" for split in SPLITS)
        raise UserError(
            f"data.corpus: the split {' and '.join(empty)} would be empty ({counts} utterances); add utterances, or "
            "say `split` of each in a manifest"
        )
    if "train" in empty:
        raise UserError(_listed(root, problems))


def _plan(config: SpeechDataConfig, cleaned: Cleaned) -> list[Task]:
    """The shards, in the corpus's own order: a corpus that grows at its end keeps its first shards."""
    tokens = config.text.tokens.build(cleaned.alphabet, config.path)

    def sample(utterance: Utterance, text: str) -> Sample:
        labels = tokens.encode(text)
        return Sample(utterance, text, len(labels), ctc_frames(labels))

    size = config.samples_per_shard
    return [
        Task(
            config.path,
            split,
            number,
            tuple(sample(*pair) for pair in cleaned.texts[split][start : start + size]),
            config.rate_hz,
            config.features,
            lenient=config.max_unusable_share > 0,
        )
        for split in SPLITS
        for number, start in enumerate(range(0, len(cleaned.texts[split]), size))
    ]


def _refuse_another_corpus(config: SpeechDataConfig) -> None:
    """Look at what the folder holds before anything in it is replaced.

    Raises:
        UserError: a corpus of another kind, whose shards would be lost.
    """
    try:
        made = Prepared.load(config.path).corpus
    except UserError:  # nothing is made yet, or only half
        return
    if made != config.corpus.kind:
        raise UserError(
            f"{show(config.path / 'corpus.json')}: the folder holds the corpus {made}, not data.corpus.kind = "
            f"{config.corpus.kind}, and its shards would be lost; choose another data.path, or delete the folder"
        )


def _stale(root: Path, tasks: list[Task]) -> list[Path]:
    """Shards of an earlier preparation that this one does not have.

    Raises:
        UserError: shards that were not made here would be lost or mixed with ours.
    """
    wanted = {task.shard for task in tasks}
    there = {shard for split in SPLITS for shard in (root / split).glob("*.tar")}
    foreign = sorted(shard for shard in there if not note_path(shard).exists())
    if foreign:
        raise UserError(
            f"{show(foreign[0])}: is a shard that `prepare` has not made (one of {len(foreign)}); choose another "
            "data.path, or move it away"
        )
    return sorted(there - wanted)


def _remove(shard: Path) -> None:
    index_path(shard).unlink(missing_ok=True)
    shard.unlink(missing_ok=True)
    note_path(shard).unlink(missing_ok=True)


# --- all shards, in parallel -----------------------------------------------------------------------------------------


def _write_all(tasks: list[Task], processes: int, display: Display) -> list[str]:
    """Write shards; returns what is wrong with their samples, in the order of the corpus."""
    total = sum(len(task.samples) for task in tasks)
    problems: dict[int, list[str]] = {}
    done = 0
    with contextlib.closing(results(write_shard, tasks, min(processes, len(tasks)))) as finished:
        for number, found in finished:
            problems[number] = found
            done += len(tasks[number].samples)
            display("writing shards (utterances)", done, total)
    return [line for number in sorted(problems) for line in problems[number]]


@contextlib.contextmanager
def _only_one(root: Path) -> Iterator[None]:
    """Keep a second `prepare` out of the folder, and clear up after one that was killed."""
    with (root / NOTES / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"data.path = {root}: another `prepare` is at work in it; wait for it or stop it"
            ) from error
        for left in (root / NOTES).glob("*.tmp"):
            left.unlink(missing_ok=True)
        try:
            yield
        finally:
            for left in (root / NOTES).glob("*.tmp"):
                left.unlink(missing_ok=True)


# --- what was made ---------------------------------------------------------------------------------------------------


def _summary(config: SpeechDataConfig, cleaned: Cleaned, vocabulary: str | None, tasks: list[Task]) -> Prepared:
    """`corpus.json` from the notes of all shards, added up in their order."""
    notes: dict[SplitName, list[Note]] = {split: [] for split in SPLITS}
    for task in tasks:
        note = read_note(task.note)
        assert note is not None, f"{task.note} vanished"
        notes[task.split].append(note)
    return Prepared(
        corpus=plain(config.corpus)["kind"],
        sample_rate_hz=config.rate_hz,
        alphabet=cleaned.alphabet,
        tokens=label_settings(config.text),
        subwords_sha256=vocabulary,
        outside_alphabet=dict(cleaned.outside.most_common()),
        splits={
            split: SplitInfo(
                samples=sum(note.samples for note in group),
                hours=sum(note.waveform_samples for note in group) / config.rate_hz / 3600,
                shards=len(group),
                files={task.shard.name: shard_file(task.shard) for task in tasks if task.split == split},
            )
            for split, group in notes.items()
        },
        statistics=band_statistics(config.features, notes["train"]),
    )


def band_statistics(features: FeaturesConfig, notes: Sequence[Note]) -> BandStatistics:
    """Mean and deviation of each band over all shards, from the sums of each."""
    frames = sum(note.frames for note in notes)
    mean = np.sum([note.sums for note in notes], axis=0) / frames
    variance = np.sum([note.squares for note in notes], axis=0) / frames - mean**2
    deviation = np.sqrt(variance.clip(min=MIN_DEVIATION**2))
    return BandStatistics(**feature_settings(features), mean=mean.tolist(), deviation=deviation.tolist())


def _is_written(prepared: Prepared, root: Path) -> bool:
    try:
        return Prepared.load(root) == prepared and (root / bundle_name(prepared.files)).is_file()
    except UserError:
        return False


def size_table(prepared: Prepared) -> rich.table.Table:
    table = rich.table.Table()
    for heading in ("split", "utterances", "hours", "shards"):
        table.add_column(heading, justify="left" if heading == "split" else "right")
    for split, info in prepared.splits.items():
        table.add_row(split, f"{info.samples:,}", f"{info.hours:.3f}", str(info.shards))
    return table
