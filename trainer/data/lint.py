"""What is wrong with shards from elsewhere, and what is in them."""

import itertools
import json
import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter

from trainer.config import show
from trainer.data.examine import Examined, Facts, Look, examine_all, find_shards
from trainer.data.index import Entry, index_path
from trainer.data.prepared import Prepared, SpeechDataConfig, build_tokens
from trainer.data.shards import count_labels, learn_subwords, rate_of, training_texts
from trainer.data.tars import Problem
from trainer.data.text import (
    Subwords,
    TextConfig,
    Tokens,
    TokensConfig,
)

UNITS_A_SECOND = (0.3, 40.0)
"""Characters or phones; outside of these a text is hardly that of its sound: quick speech has about 25 characters."""


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
    rate = prepared.sample_rate_hz if any_rate and prepared else rate_of(shards, config, any_rate)
    text = config.text
    # Each tar once, whatever links lead to it, but each link's own index.
    unique = {shard.resolve(): shard for shard in reversed(shards)}
    looks = [Look(shard, text, config.features, rate, split="train") for shard in sorted(unique.values())]
    examined = examine_all(looks, "shards lint")
    count_labels(_tokens(path, config, prepared, examined), examined)
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
    splits: dict[tuple[Path, int], Path] = {}  # which link's index has the sample at a place of a tar
    for index, shard in sorted(indexes):
        entries, problems = _read_index(index)
        problems += _against_index(index, entries, by_file[shard.resolve()])
        for entry in entries:
            if (first := splits.setdefault((shard.resolve(), entry.audio_offset), shard)) != shard:
                told = f"the index of {show(first)} has it too: it would be in both; run `shards index` again"
                problems.append(Problem("duplicate", told, entry.key))
        found += [Finding(shard, p) for p in problems]
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
    model = learn_subwords(config.text, examined)
    if model is not None:
        return Subwords(model)
    return config.text.tokens.build(config.text.alphabet or config.text.alphabet_of(training_texts(examined)), path)


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


def _read_index(index: Path) -> tuple[list[Entry], list[Problem]]:
    """The samples that an index names; or none, and why it cannot be read."""
    try:
        with index.open(encoding="utf-8") as lines:
            head, *rows = map(json.loads, lines)
        entries = [Entry(**row) for row in rows]
        if len(entries) != head["samples"]:
            return [], [Problem("index", f"{index.name}: ends after {len(entries)} of {head['samples']} samples")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [], [Problem("index", f"{index.name}: is damaged: {error}")]
    return entries, []


def _against_index(index: Path, entries: list[Entry], examined: Examined) -> list[Problem]:
    """What an index says that is not so."""
    places = {(f.pair.audio.offset, f.pair.text.offset): f for f in examined.samples}
    problems = []
    for entry in entries:
        f = places.get((entry.audio_offset, entry.text_offset))
        if f is None:
            problems.append(Problem("index", f"{index.name}: names a sample that cannot be used", entry.key))
        elif f.entry(entry.key) != entry:
            problems.append(Problem("index", f"{index.name}: is not that of this shard; run `shards index`", entry.key))
    return problems


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
    with index.open(encoding="utf-8") as lines:
        return {json.loads(line)["audio_offset"] for line in itertools.islice(lines, 1, None)}
