"""Corpora of plain text, each as three texts: training, validation, test.

A line is a sentence, a paragraph or whatever the corpus has; spaces at its ends are dropped. Penn Treebank, WikiText,
text8 and enwik8 are read in the layouts in which they are handed round.

Sources: Mikolov et al. 2010 (Penn Treebank); Merity et al. 2017, arXiv:1609.07843 (WikiText); Mahoney 2011 (text8 and
enwik8, split as by Graves 2013, arXiv:1308.0850).
"""

import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from trainer.config import Config, Free, is_file, show
from trainer.data.corpora.base import Progress
from trainer.data.corpora.debian import Package, fetch
from trainer.data.rdata import RDataError, read_package
from trainer.errors import UserError

Split = Literal["train", "valid", "test"]
Texts = dict[Split, str]
SPLITS: tuple[Split, ...] = ("train", "valid", "test")

PACKAGE = Package(
    name="r-cran-janeaustenr",
    version="1.0.0-1",
    sha256="df6bddf211906d1ff404f8ff662c21b34e6660e7f54a311084e749050c019c95",
    size=1_626_392,
    pool="pool/main/r/r-cran-janeaustenr",
    holds=Path("usr/lib/R/site-library/janeaustenr/data/Rdata.rdx"),
)
Novel = Literal["emma", "mansfieldpark", "northangerabbey", "persuasion", "prideprejudice", "sensesensibility"]


class AustenConfig(Config):
    """Jane Austen's six novels, 3.9 million characters; Debian's package r-cran-janeaustenr, fetched without root and
    read without R.

    The lines of a paragraph are joined, as the line breaks of an edition are no language.
    """

    kind: Literal["austen"] = "austen"
    held_out: Novel = "persuasion"
    """The test split: this novel, and nothing of it anywhere else."""
    valid_share: float = Field(0.05, gt=0, lt=1)
    """The end of each other novel, for validation."""

    def sources(self) -> list[Path]:
        """The files that the text is read from, where they are the user's own; here a package of one content."""
        return []

    def read(self, folder: Path, progress: Progress) -> Texts:
        root = fetch(PACKAGE, folder / "raw", self.kind, progress)
        data = (root / PACKAGE.holds).parent
        try:
            novels = {name: _paragraphs(lines) for name, lines in sorted(read_package(data).items())}
        except (RDataError, OSError) as error:
            raise UserError(f"{show(data)}: {error}; delete {show(root)} and run the command again") from error
        test = novels.pop(self.held_out)
        train, valid = [], []
        for novel in novels.values():
            cut = len(novel) - int(self.valid_share * len(novel))
            train += novel[:cut]
            valid += novel[cut:]
        return {"train": _joined(train), "valid": _joined(valid), "test": _joined(test)}


class _FilesConfig(Config):
    """A file a split, all in one folder."""

    path: Free[Path | None] = None
    """Folder with the files."""

    def _names(self) -> dict[Split, Sequence[str]]:
        """What the file of each split may be called."""
        raise TypeError(f"{type(self).__name__} lacks _names")

    def sources(self) -> list[Path]:
        place, found = _place(self.path), []
        for names in self._names().values():
            path = next((p for name in names if is_file(p := place / name)), None)
            if path is None:
                raise UserError(
                    f"data.corpus.path = {place}: holds no {' and no '.join(names)}; name the folder that does"
                )
            found.append(path)
        return found

    def read(self, folder: Path, progress: Progress) -> Texts:
        return {split: _text(path) for split, path in zip(self._names(), self.sources(), strict=True)}


class PennTreebankConfig(_FilesConfig):
    """Penn Treebank as Mikolov prepared it: ptb.train.txt and so on, 10,000 words, numbers as N."""

    kind: Literal["ptb"] = "ptb"

    def _names(self) -> dict[Split, Sequence[str]]:
        return {split: (f"ptb.{split}.txt", f"{split}.txt") for split in SPLITS}


class WikiTextConfig(_FilesConfig):
    """WikiText-2 and WikiText-103 by words: wiki.train.tokens and so on."""

    kind: Literal["wikitext"] = "wikitext"

    def _names(self) -> dict[Split, Sequence[str]]:
        return {split: (f"wiki.{split}.tokens", f"wiki.{split}.raw", f"{split}.txt") for split in SPLITS}


class _MahoneyConfig(Config):
    """One file, packed or not, whose first nine tenths are for training."""

    path: Free[Path | None] = None
    """The file, packed (.zip) or not, or its folder."""
    sizes: tuple[int, int, int] = (90_000_000, 5_000_000, 5_000_000)
    """Characters for training, validation and test."""

    def sources(self) -> list[Path]:
        kind: str = self.kind  # type: ignore[attr-defined]
        place = _place(self.path)
        path = next((p for p in (place, place / kind, place / f"{kind}.zip") if is_file(p)), None)
        if path is None:
            raise UserError(f"data.corpus.path = {place}: is neither {kind}, packed or not, nor its folder")
        return [path]

    def read(self, folder: Path, progress: Progress) -> Texts:
        kind: str = self.kind  # type: ignore[attr-defined]
        (path,) = self.sources()
        try:
            if zipfile.is_zipfile(path):
                with zipfile.ZipFile(path) as archive:
                    content = archive.read(kind)
            else:
                content = path.read_bytes()
        except (OSError, KeyError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"{show(path)}: no {kind} can be read from it ({error}); fetch it again") from error
        if len(content) != sum(self.sizes):
            raise UserError(f"{show(path)}: holds {len(content):,} bytes, wanted {sum(self.sizes):,}; fetch it again")
        text = content.decode("latin-1")
        a, b = self.sizes[0], self.sizes[0] + self.sizes[1]
        return {"train": text[:a], "valid": text[a:b], "test": text[b:]}


class Text8Config(_MahoneyConfig):
    """text8: Wikipedia in 26 letters and spaces."""

    kind: Literal["text8"] = "text8"


class Enwik8Config(_MahoneyConfig):
    """enwik8: Wikipedia as it is, where a byte counts as a character."""

    kind: Literal["enwik8"] = "enwik8"


class PlainConfig(Config):
    """Any text files, UTF-8: one for each split, or one that is cut into three."""

    kind: Literal["files"] = "files"
    train: Free[Path | None] = None
    """Training; the whole text where it is alone."""
    valid: Free[Path | None] = None
    test: Free[Path | None] = None
    shares: tuple[float, float] = (0.05, 0.05)
    """Of a text that is alone, the part before its end that is for validation, and the end, for testing."""

    @model_validator(mode="after")
    def _one_or_three(self) -> "PlainConfig":
        if (self.valid is None) != (self.test is None):
            raise ValueError("one of valid and test is null: name both, or neither to have one text cut into three")
        if min(self.shares) <= 0 or sum(self.shares) >= 1:
            raise ValueError(f"shares = {self.shares}: wanted two shares above 0 that leave something for training")
        return self

    def sources(self) -> list[Path]:
        if self.train is None:
            raise UserError("data.corpus.train: is missing; set it to a text file")
        return [path for path in (self.train, self.valid, self.test) if path is not None]

    def read(self, folder: Path, progress: Progress) -> Texts:
        text, *others = map(_text, self.sources())
        if others:
            valid, test = others
            return {"train": text, "valid": valid, "test": test}
        a, b = _cuts(text, *(round(len(text) * share) for share in (1 - sum(self.shares), 1 - self.shares[1])))
        return {"train": text[:a], "valid": text[a:b], "test": text[b:]}


TextCorpusConfig = Annotated[
    AustenConfig | PennTreebankConfig | WikiTextConfig | Text8Config | Enwik8Config | PlainConfig,
    Field(discriminator="kind"),
]


def _place(path: Path | None) -> Path:
    if path is None:
        raise UserError("data.corpus.path: is missing; set it to the folder that holds the text")
    return path


def _cuts(text: str, *places: int) -> list[int]:
    """Ends of the lines that the places lie in, or, where these do not part the text, of the words."""
    for mark in "\n ":
        ends = [text.find(mark, max(0, place - 1)) + 1 for place in places]
        if 0 < ends[0] < ends[1] < len(text):
            return ends
    return list(places)


def _text(path: Path) -> str:
    """A file as one text."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # some editors put a mark before the text
    except OSError as error:
        raise UserError(f"{show(path)}: cannot be read: {error.strerror}; name another file in data.corpus") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{show(path)}: is not UTF-8 text: {error}; convert it") from error
    return _joined(lines if lines[-1] else lines[:-1])  # a line feed at the end begins no other line


def _joined(lines: Sequence[str]) -> str:
    """Lines as one text: no spaces at their ends, each with a line feed behind it."""
    return "".join(f"{line.strip()}\n" for line in lines)


def _paragraphs(lines: Sequence[str | None]) -> list[str]:
    """Paragraphs of a novel: their lines joined, with nothing where lines were empty."""
    paragraphs: list[list[str]] = [[]]
    for line in lines:
        if text := (line or "").strip():
            paragraphs[-1].append(text)
        elif paragraphs[-1]:
            paragraphs.append([])
    return [" ".join(parts) for parts in paragraphs if parts]
