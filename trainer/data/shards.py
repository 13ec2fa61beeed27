"""Indexes for shards from elsewhere, and the `corpus.json` with which they are trained on like those of `prepare`."""

import contextlib
import hashlib
import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from trainer.config import show
from trainer.data.audio import AudioError
from trainer.data.corpora.base import SPLITS, SplitName
from trainer.data.examine import Examined, Facts, Look, examine_all, find_shards, named, read_member, read_sound
from trainer.data.index import Entry, index_path, write_index
from trainer.data.packing import NOTES
from trainer.data.prepare import band_statistics
from trainer.data.prepared import (
    FOREIGN,
    Prepared,
    SpeechDataConfig,
    SplitInfo,
    label_settings,
    shard_file,
    write_prepared,
)
from trainer.data.tars import Problem, read_contents
from trainer.data.text import (
    SUBWORDS_FILE,
    Subwords,
    SubwordsConfig,
    TextConfig,
    Tokens,
    UnknownCharacterError,
    ctc_frames,
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
    splits = {path: None} if single else _each_once(path)
    linked = list(splits)
    in_place = into is None and all((split := splits[s]) and s.parent == path / split for s in linked)
    rate = rate_of(linked, config, any_rate)
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
    model = None if single else learn_subwords(config.text, examined)
    tokens = Subwords(model) if model is not None else config.text.tokens.build(alphabet, root)
    count_labels(tokens, examined)
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


def _each_once(path: Path) -> dict[Path, SplitName | None]:
    """The tars in a folder and their splits, where names say one; each once, however many links lead to it.

    Links of an earlier call share a tar among splits: it is taken by its own name, and the texts say the splits again.
    """
    links: dict[Path, list[Path]] = {}
    for shard in find_shards(path):
        links.setdefault(shard.resolve(), []).append(shard)
    found = {}
    for tar, ways in links.items():
        own = next((way for way in ways if not way.is_symlink()), ways[0] if len(ways) == 1 else tar)
        found[own] = _split_of(own, path) if path in own.parents else None
    return dict(sorted(found.items()))


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


def rate_of(shards: list[Path], config: SpeechDataConfig, any_rate: bool) -> int:
    """The wanted rate; if any will do, that of the first sound that can be read."""
    if not any_rate or config.features.kind != "log_mel":
        return config.rate_hz
    for shard in shards:
        with (
            contextlib.suppress(OSError),
            shard.open("rb") as file,
        ):  # told when all are examined
            for pair in read_contents(shard).pairs:
                with contextlib.suppress(AudioError):
                    return read_sound(read_member(file, pair.audio.offset, pair.audio.size), decode=False)[2]
    return config.rate_hz


def training_texts(examined: list[Examined]) -> list[str]:
    return [f.text for e in examined for f in e.samples if f.split == "train"]


def _keep_to_alphabet(text: TextConfig, examined: list[Examined]) -> str:
    """The alphabet. Where it is that of the training texts, the other texts are held to it as the settings say."""
    if text.alphabet is not None:
        return text.alphabet
    alphabet = text.alphabet_of(training_texts(examined))
    rules = text.model_copy(update={"lowercase": False, "map": {}})  # that is done
    for e in examined:
        kept = []
        for f in e.samples:
            f.text, f.outside = rules.normalise(f.text, alphabet)
            if f.outside and rules.unknown == "error":
                detail = f"holds {named(f.outside)}, which no training text does"
                e.problems.append(Problem("label", detail, f.pair.key))
            elif not f.text:
                detail = f"holds only {named(f.outside)}, which no training text does"
                e.problems.append(Problem("label", detail, f.pair.key))
            else:
                kept.append(f)
        e.samples = kept
    return alphabet


def learn_subwords(text: TextConfig, examined: list[Examined]) -> bytes | None:
    """The vocabulary of the training texts, where labels are subwords.

    Raises:
        UserError: it cannot be learnt.
    """
    return text.tokens.train(training_texts(examined)) if isinstance(text.tokens, SubwordsConfig) else None


def _write_vocabulary(model: bytes, root: Path) -> None:
    path = root / SUBWORDS_FILE
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_bytes(model)
        temporary.replace(path)
    except OSError as error:
        raise UserError(_unwritable(path, error)) from error


def count_labels(tokens: Tokens, examined: list[Examined]) -> None:
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
