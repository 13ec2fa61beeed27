"""LibriSpeech: 960 hours of read English books (Panayotov et al. 2015), https://www.openslr.org/12, CC BY 4.0.

Layout: `LibriSpeech/SUBSET/SPEAKER/CHAPTER/` with `SPEAKER-CHAPTER-0000.flac` and `SPEAKER-CHAPTER.trans.txt`. LibriTTS
and others of another layout are not read.
"""

import shutil
import tarfile
from pathlib import Path
from typing import Literal

from trainer.config import Config, Free, show
from trainer.data.corpora.base import SPLITS, Progress, Reading, SplitName, Utterance, make_key, read_text
from trainer.errors import UserError

Subset = Literal[
    "train-clean-100",
    "train-clean-360",
    "train-other-500",
    "dev-clean",
    "dev-other",
    "test-clean",
    "test-other",
]


class LibriSpeechConfig(Config):
    """Subsets of LibriSpeech, as training, validation and test."""

    kind: Literal["librispeech"] = "librispeech"
    path: Free[Path | None] = None
    """Folder that holds the subsets, or `LibriSpeech/` with them; null: `raw/` of data.path."""
    train: tuple[Subset, ...] = ("train-clean-100",)
    valid: tuple[Subset, ...] = ("dev-clean",)
    test: tuple[Subset, ...] = ("test-clean",)
    download: Free[bool] = False
    """Fetch the subsets that are missing, through torchaudio: 6.3 GB for train-clean-100, 60 GB for all."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Read the transcripts of every subset.

        Args:
            folder: of the prepared corpus; a download goes to `raw/` below it, unless `path` is set.
            progress: told the chapters that were read.

        Raises:
            UserError: a subset is missing or cannot be fetched, or what is wrong with it, all in one message.
        """
        subsets = [subset for split in SPLITS for subset in getattr(self, split)]
        if twice := sorted({subset for subset in subsets if subsets.count(subset) > 1}):
            raise UserError(f"data.corpus: {', '.join(twice)}: is named twice in train, valid and test; name it once")
        root = self.path or folder / "raw"
        missing = [subset for subset in subsets if _find(root, subset) is None]
        if missing and not self.download:
            raise UserError(
                f"data.corpus.path = {show(root)}: holds no {', '.join(missing)}; name the folder that LibriSpeech was "
                "unpacked into, fetch them from https://www.openslr.org/12, or set data.corpus.download=true"
            )
        for subset in missing:
            download(root, subset)
        reading = Reading()
        for split in SPLITS:
            for subset in getattr(self, split):
                place = _find(root, subset)
                assert place is not None
                chapters = sorted(place.glob("*/*/*.trans.txt"))
                for number, chapter in enumerate(chapters, 1):
                    _read_chapter(reading, chapter, split)
                    progress(f"reading {subset} (chapters)", number, len(chapters))
        return reading.result(f"data.corpus.path = {show(root)}")


def _find(root: Path, subset: str) -> Path | None:
    """The folder of a subset, or None."""
    return next((place for place in (root / subset, root / "LibriSpeech" / subset) if place.is_dir()), None)


def _read_chapter(reading: Reading, transcripts: Path, split: SplitName) -> None:
    """Take the lines `KEY TEXT` of a chapter."""
    folder = transcripts.parent
    for number, line in enumerate(read_text(transcripts, "unpack the subset again"), 1):
        if not line.strip():
            continue
        where = f"{show(transcripts)} line {number}"
        key, _, text = line.partition(" ")
        if make_key(key) != key:
            reading.problems.append(f"{where}: key = {key!r}: wanted SPEAKER-CHAPTER-NUMBER; unpack the subset again")
        else:
            reading.add(Utterance(key, text, folder / f"{key}.flac", split, where, folder.parent.name))


def download(root: Path, subset: str) -> None:
    """Fetch a subset with torchaudio; it appears in `root` when it is whole.

    Raises:
        UserError: it could not be fetched.
    """
    from torchaudio.datasets import LIBRISPEECH

    partial = root / "download.partial"
    partial.mkdir(parents=True, exist_ok=True)  # an archive that is there already is not fetched again
    shutil.rmtree(partial / "LibriSpeech", ignore_errors=True)  # it may be half unpacked
    print(f"LibriSpeech {subset}: fetching from openslr.org and unpacking", flush=True)
    try:
        LIBRISPEECH(str(partial), url=subset, download=True)
        (root / "LibriSpeech").mkdir(exist_ok=True)
        (partial / "LibriSpeech" / subset).replace(root / "LibriSpeech" / subset)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:  # RuntimeError: the checksum
        raise UserError(
            f"data.corpus.download: {subset} cannot be fetched: {error}\nFetch "
            f"https://www.openslr.org/resources/12/{subset}.tar.gz by hand, unpack it into {show(root)}/, and run the "
            f"command again. What came so far lies in {show(partial)}; delete it if it is damaged."
        ) from error
    shutil.rmtree(partial)
