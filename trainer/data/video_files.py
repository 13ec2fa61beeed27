"""Which videos there are, of which class and split.

Layouts: CLASS/NAME.avi or CLASS/NAME/0001.jpg, below train/, valid/, test/ or not; with the split lists of UCF101
(Soomro, Zamir & Shah 2012, arXiv:1212.0402) or HMDB51 (Kuehne et al. 2011).
"""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config import show
from trainer.data.corpora.base import SPLITS, make_key, percentile
from trainer.data.frames import PICTURES, VIDEOS
from trainer.data.motions import Split
from trainer.errors import UserError


@dataclass(frozen=True)
class Video:
    """One clip of the corpus."""

    key: str
    path: Path
    """A video file, or a folder of pictures."""
    label: int
    split: Split


def found_videos(root: Path, lists: Path | None, fold: int, valid_percent: int) -> tuple[list[Video], list[str]]:
    """All clips, by key, and the names of the classes, sorted; the arguments are keys of `VideosConfig`.

    Raises:
        UserError: there are none, or lists name none of them.
    """
    tops = [split for split in SPLITS if (root / split).is_dir()]
    places = [(split, root / split) for split in tops] if tops and lists is None else [(None, root)]
    found = [(given, folder.name, path) for given, top in places for folder in _folders(top) for path in _clips(folder)]
    if not found:
        raise UserError(
            f"data.corpus.path = {root}: holds no CLASS/NAME.avi and no CLASS/NAME/0001.jpg; name the folder of the "
            "classes"
        )
    classes = sorted({name for _, name, _ in found})
    listed = _listed(lists, fold) if lists is not None else {}
    videos = []
    for given, name, path in found:
        key = make_key(f"{name}--{path.stem if path.is_file() else path.name}")
        split: str | None
        if lists is not None:
            split = listed.get((name, path.stem if path.is_file() else path.name))
        else:
            split = given or _by_name(key)
        if split == "train" and (lists is not None or (given and "valid" not in tops)):
            split = "valid" if percentile(_recording(key, lists is not None)) < valid_percent else "train"
        if split is not None:
            videos.append(Video(key, path, classes.index(name), split))  # type: ignore[arg-type]
    if not videos:
        raise UserError(f"data.corpus.lists = {lists}: name none of the {len(found)} clips of {show(root)}")
    if (most := Counter(v.key for v in videos).most_common(1)[0])[1] > 1:
        raise UserError(f"{show(root)}: {most[1]} clips have the key {most[0]}; rename all but one")
    return videos, classes


def _folders(top: Path) -> Iterator[Path]:
    return iter(sorted(p for p in top.iterdir() if p.is_dir())) if top.is_dir() else iter(())


def _clips(folder: Path) -> Iterator[Path]:
    """Video files, and folders with pictures in them."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if any(p.suffix.lower() in PICTURES for p in path.iterdir()):
                yield path
        elif path.suffix.lower() in VIDEOS:
            yield path


def _recording(key: str, listed: bool) -> str:
    """What the clips of one recording have in common: v_Surfing_g08_c01 and _c02 (UCF101) are parts of g08, and in
    HMDB51 the last number is that of the part."""
    return re.sub(r"_c?\d+$" if listed else r"_c\d+$", "", key)


def _by_name(key: str) -> Split:
    place = percentile(_recording(key, listed=False))
    return "train" if place < 70 else "valid" if place < 85 else "test"


def _listed(folder: Path, fold: int) -> dict[tuple[str, str], str]:
    """Split of (class, name) as the lists say."""
    found: dict[tuple[str, str], str] = {}
    for split in ("train", "test"):
        path = folder / f"{split}list{fold:02d}.txt"
        for given in (Path(words[0]) for words in _lines(path, 1)):  # CLASS/NAME.avi, and the number of the class
            found[given.parent.name, given.stem] = split
    ending = f"_test_split{fold}.txt"
    for path in sorted(folder.glob(f"*{ending}")):
        for name, number, *_ in _lines(path, 2):  # NAME.avi, and 1 for training, 2 for test, 0 for neither
            if number in ("1", "2"):
                found[path.name.removesuffix(ending), Path(name).stem] = "train" if number == "1" else "test"
    if not found:
        raise UserError(
            f"data.corpus.lists = {folder}: holds neither trainlist{fold:02d}.txt and testlist{fold:02d}.txt (UCF101) "
            f"nor CLASS{ending} (HMDB51); name the folder that holds them"
        )
    return found


def _lines(path: Path, num_words: int) -> list[list[str]]:
    """The words of each line that is not empty; no line where there is no such file.

    Raises:
        UserError: the file cannot be read, or a line has fewer words.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{show(path)}: cannot be read: {error}; wanted a split list in UTF-8") from error
    for number, line in enumerate(lines, 1):
        if 0 < len(line.split()) < num_words:
            raise UserError(f"{show(path)} line {number}: {line[:80]!r}: wanted {num_words} words; mend or remove it")
    return [words for line in lines if (words := line.split())]
