"""Text for language models: `prepare` turns a corpus into numbered tokens on the disk, a split is read from there.

data.path/
  raw/              what was fetched
  vocabulary        the tokens, in the form of their kind
  train.npy ...     the tokens of each split, (N,) uint16 or int32
  corpus.json       settings, sizes and times of the files that were read, counts of each split; written last
"""

import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.config import Config, Free, plain, show
from trainer.data.corpora.base import Progress
from trainer.data.stream import StreamConfig, StreamDataset, StreamPlan
from trainer.data.texts import SPLITS, AustenConfig, Split, TextCorpusConfig
from trainer.data.vocabulary import CharactersConfig, Vocabulary, VocabularyConfig
from trainer.errors import UserError

FORMAT = 1


class LanguageDataConfig(Config):
    """A corpus and what its tokens are."""

    path: Free[Path] = Path("data/austen_characters")
    """Folder for what `prepare` makes; another one for other tokens of the same corpus."""
    corpus: TextCorpusConfig = AustenConfig()
    tokens: VocabularyConfig = CharactersConfig()

    def settings(self) -> dict[str, Any]:
        """What the prepared files depend on, but for places on a disk."""
        corpus = {name: value for name, value in plain(self.corpus).items() if name not in ("path", *SPLITS)}
        return {"format": FORMAT, "corpus": corpus, "tokens": plain(self.tokens)}


@dataclass(frozen=True)
class Counts:
    """How much text a split is."""

    tokens: int
    """The ends of lines included, where they are tokens."""
    characters: int
    words: int
    """Separated by spaces, with one for the end of each line."""
    crc32: int
    """Of the tokens as int32."""


def prepare(config: LanguageDataConfig, progress: Progress) -> dict[Split, Counts]:
    """Read a corpus, learn the vocabulary, number everything; nothing if that was done with the files as they are, or
    if they are not there any more.

    Raises:
        UserError: a file is missing, or is not what it should be, or nothing can be written.
    """
    folder, stamps = config.path, _stamps(config.corpus)
    found = _read_facts(folder) or {"settings": None}
    if found["settings"] == config.settings() and stamps in (None, found.get("sources", [])):
        return {split: Counts(**found["splits"][split]) for split in SPLITS}
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "corpus.json").unlink(missing_ok=True)
    texts = config.corpus.read(folder, progress)
    if empty := [split for split in SPLITS if not texts[split].strip()]:
        raise UserError(
            f"data.corpus.kind = {config.corpus.kind}: holds no text for {', '.join(empty)}; "
            "put text there, or name other files in data.corpus"
        )
    progress("vocabulary", 0, 1)
    vocabulary: Vocabulary = config.tokens.learn(texts)
    progress("vocabulary", 1, 1)
    kind = np.uint16 if len(vocabulary) <= 1 << 16 else np.int32
    counts: dict[Split, Counts] = {}
    with _writing(folder):
        _replace(folder / "vocabulary", vocabulary.save())
        for number, split in enumerate(SPLITS, 1):
            text = texts[split]
            tokens = vocabulary.encode(text)
            packed = io.BytesIO()
            np.save(packed, tokens.astype(kind))
            _replace(folder / f"{split}.npy", packed.getbuffer())
            words = sum(len(line.split()) + 1 for line in text.split("\n")) - 1
            counts[split] = Counts(len(tokens), len(text), words, zlib.crc32(tokens.tobytes()))
            progress("splits", number, len(SPLITS))
        splits = {split: c.__dict__ for split, c in counts.items()}
        facts = {"settings": config.settings(), "sources": stamps, "splits": splits}
        _replace(folder / "corpus.json", json.dumps(facts, indent=1).encode())
    return counts


def _stamps(corpus: TextCorpusConfig) -> list[list[int]] | None:
    """Size and time of change of each file that a text is read from; None where one is not there."""
    try:
        return [[s.st_size, s.st_mtime_ns] for s in (path.stat() for path in corpus.sources())]
    except (OSError, UserError):
        return None


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"data.path = {folder}: cannot be written: {error.strerror or error}; make room, or name another folder"
        ) from error


def _replace(path: Path, content: bytes | memoryview) -> None:
    """Write a file whole or not at all: a run may be reading the one before."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _read_facts(folder: Path) -> dict[str, Any] | None:
    try:
        facts: dict[str, Any] = json.loads((folder / "corpus.json").read_text(encoding="utf-8"))
    except OSError:
        return None
    except ValueError as error:
        raise UserError(
            f"{show(folder / 'corpus.json')}: is damaged; delete it and run `./launch.sh prepare`"
        ) from error
    if not isinstance(facts, dict) or not {"settings", "splits"} <= facts.keys():
        raise UserError(f"data.path = {folder}: holds another recipe's corpus; name another folder")
    return facts


@dataclass(frozen=True)
class Prepared:
    """A corpus as `prepare` left it."""

    folder: Path
    counts: dict[Split, Counts]
    config: LanguageDataConfig

    @classmethod
    def open(cls, config: LanguageDataConfig) -> "Prepared":
        """What is in `data.path`.

        Raises:
            UserError: nothing, or something made with other settings.
        """
        facts = _read_facts(config.path)
        cure = "run `./launch.sh prepare CONFIG`"
        if facts is None:
            raise UserError(f"data.path = {config.path}: holds no prepared text yet; {cure}")
        if facts["settings"] != config.settings():
            raise UserError(
                f"data.path = {config.path}: was prepared as {facts['settings']}, wanted {config.settings()}; "
                f"set another data.path, or {cure}"
            )
        return cls(config.path, {split: Counts(**facts["splits"][split]) for split in SPLITS}, config)

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """Its tokens."""
        path = self.folder / "vocabulary"
        try:
            return self.config.tokens.load(path.read_bytes())
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise UserError(
                f"{show(path)}: cannot be read ({error}); delete corpus.json beside it and run `./launch.sh prepare`"
            ) from error

    def tokens(self, split: Split) -> NDArray[np.integer]:
        """The tokens of a split, on the disk."""
        path = self.folder / f"{split}.npy"
        try:
            found: NDArray[np.integer] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise UserError(
                f"{show(path)}: cannot be read ({error}); delete corpus.json beside it and run `./launch.sh prepare`"
            ) from error
        if len(found) != (wanted := self.counts[split].tokens):
            raise UserError(f"{show(path)}: holds {len(found):,} tokens, wanted {wanted:,}; prepare it again")
        return found

    def dataset(self, split: Split, plan: StreamConfig, seed: int) -> StreamDataset:
        """A split in streams."""
        counts, vocabulary = self.counts[split], self.vocabulary
        return StreamDataset(
            StreamPlan(plan, counts.tokens, seed, training=split == "train"),
            self.tokens(split),
            vocabulary.start,
            {"samples": f"{split}: {counts.tokens} tokens {counts.crc32:08x}", "tokens": vocabulary.identity},
            {"characters": counts.characters / counts.tokens, "words": counts.words / counts.tokens},
        )
