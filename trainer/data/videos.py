"""Videos in a folder a class, as webdataset shards of frames or of a net's features of them.

A shard holds `KEY.npy` (frames (T, rows, columns, 3) bytes, or features (T, F) of 16 bits), `KEY.cls` (the number of
the class, as webdataset reads it) and `KEY.json` of each clip; its index lies beside it, as with sound. `corpus.json`
says what they were made of, and the class of each clip.
"""

import contextlib
import hashlib
import io
import json
import os
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt

from trainer.config import Config, Free, show
from trainer.data.corpora.base import SPLITS, Progress, percentile
from trainer.data.frames import CNNConfig, features, read_frames
from trainer.data.index import Entry, Index, index_path, write_index
from trainer.data.motions import ClipError, Clips, Split
from trainer.data.packing import NOTES, shard_writer
from trainer.data.parallel import results
from trainer.data.reader import ShardReader
from trainer.data.video_files import Video, found_videos
from trainer.errors import UserError

FORMAT = 1
CORPUS = "corpus.json"


class VideosConfig(Config):
    """Video files or folders of frames, in a folder a class."""

    kind: Literal["videos"] = "videos"
    path: Free[Path]
    """Folder of the classes, or of train/, valid/ and test/ with the classes in each."""
    lists: Free[Path | None] = None
    """Folder of the split lists of UCF101 (trainlist01.txt, testlist01.txt) or HMDB51 (CLASS_test_split1.txt). Null: by
    the folders train/, valid/ and test/, or else by the name: 70 % train, 15 % each for validation and test."""
    fold: int = Field(1, ge=1, le=3)
    """Number of the lists."""
    valid_percent: int = Field(10, gt=0, lt=100)
    """Of the training clips for validation, where nothing says which. Clips of one recording, whose names differ in
    their last number alone, stay together."""
    every: PositiveInt = 2
    """2 takes every other frame."""
    max_frames: PositiveInt = 32
    """Kept of a clip; of more, so many that are spread evenly over it."""
    size: PositiveInt = 112
    """Rows and columns of the square that is kept."""
    samples_per_shard: Free[PositiveInt] = 128
    cnn: CNNConfig = CNNConfig()

    def made_of(self) -> dict[str, Any]:
        """All that the contents of a shard depend on, beside the videos."""
        cnn = self.cnn.digest() if self.cnn.where == "prepare" else None
        return {"format": FORMAT, "every": self.every, "max_frames": self.max_frames, "size": self.size, "cnn": cnn}

    def prepare(self, folder: Path, progress: Progress) -> str:
        """Write the shards that are not there yet."""
        videos, classes = found_videos(self.path, self.lists, self.fold, self.valid_percent)
        made_of = self.made_of()
        with contextlib.suppress(FileNotFoundError, ValueError):  # one that is damaged is made anew
            _check(folder, json.loads((folder / CORPUS).read_text(encoding="utf-8")))
        tasks = []
        for split in SPLITS:
            own = sorted((v for v in videos if v.split == split), key=lambda v: percentile(v.key))  # classes mixed
            for number, start in enumerate(range(0, len(own), self.samples_per_shard)):
                chosen = tuple(own[start : start + self.samples_per_shard])
                tasks.append(Task(folder, split, number, chosen, self, json.dumps(made_of)))
        todo = [task for task in tasks if not task.done()]
        try:
            for task in todo:
                task.note.parent.mkdir(parents=True, exist_ok=True)
                task.shard.parent.mkdir(parents=True, exist_ok=True)
            (folder / CORPUS).unlink(missing_ok=True)
            for left in _left_over(folder, {task.shard for task in tasks}):
                left.unlink(missing_ok=True)
                index_path(left).unlink(missing_ok=True)
            for done, _ in enumerate(results(write_shard, todo, len(os.sched_getaffinity(0))), 1):
                progress("shards of videos", done, len(todo))
            notes = [json.loads(task.note.read_text(encoding="utf-8")) for task in tasks]
            bad = [line for note in notes for line in note["bad"]]
            labels = _labels(tasks, notes)
            if empty := [split for split, found in labels.items() if not found]:
                reason = f"; left out: {bad[0]}" if bad else ""
                raise UserError(
                    f"data.corpus.path = {self.path}: no clip for {' and '.join(empty)}{reason}; "
                    "put clips there, or name other split lists"
                )
            shape = next(note["shape"] for note in notes if note["keys"])
            made = {"made_of": made_of, "classes": classes, "shape": shape, "labels": labels}
            temporary = folder / f"{CORPUS}.tmp"
            temporary.write_text(json.dumps(made), encoding="utf-8")
            temporary.replace(folder / CORPUS)
        except OSError as error:
            raise UserError(f"{show(folder)}: cannot be written: {error.strerror}; make room or mend it") from error
        counts = ", ".join(f"{split} {len(found):,}" for split, found in labels.items())
        left_out = "".join(f"\nleft out: {line}" for line in bad)
        return f"{len(classes)} classes; clips: {counts}; {len(todo)} of {len(tasks)} shards written{left_out}"

    def clips(self, folder: Path, split: Split, seed: int) -> Clips:
        """One split."""
        made = _corpus(folder)
        if made["made_of"] != self.made_of():
            raise UserError(
                f"{show(folder / CORPUS)}: was made with {made['made_of']}, the configuration says {self.made_of()}; "
                "run `./launch.sh prepare CONFIG` again, or set data.path"
            )
        index = Index.load(folder / split, 1)
        reader = ShardReader(index.shards)
        names = list(index.keys)
        known = made["labels"][split]
        if set(names) != set(known):
            raise UserError(
                f"{show(folder / split)}: its shards are not those that {CORPUS} names; run `./launch.sh prepare` again"
            )

        def read(number: int) -> NDArray[Any]:
            entry = index.entries[number]
            try:
                content = reader.read(int(index.shard[number]), entry.audio_offset, entry.audio_size)
            except OSError as error:
                raise ClipError("shard cannot be read", str(error.strerror)) from error
            if zlib.crc32(content) != entry.audio_crc32:
                raise ClipError("checksum differs from the index", f"{len(content)} of {entry.audio_size} bytes")
            found: NDArray[Any] = np.load(io.BytesIO(content), allow_pickle=False)
            return found

        return Clips(
            names,
            np.array([known[name] for name in names], dtype=np.int64),
            index.num_samples.astype(np.int64),
            tuple(made["classes"]),
            f"{len(names)} clips of index {index.digest}",
            read,
            tuple(made["shape"]),
        )


def _corpus(folder: Path) -> dict[str, Any]:
    path = folder / CORPUS
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{show(path)}: is not there; run `./launch.sh prepare CONFIG` first") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{show(path)}: is damaged ({error}); run `./launch.sh prepare CONFIG` again") from error
    _check(folder, found)
    return found


def _check(folder: Path, found: Any) -> None:
    if not isinstance(found, dict) or not {"made_of", "labels"} <= found.keys():
        raise UserError(f"data.path = {folder}: holds another recipe's corpus; name another folder")


def _left_over(folder: Path, wanted: set[Path]) -> list[Path]:
    """Shards of an earlier preparation that this one does not have.

    Raises:
        UserError: shards that were not made here would be mixed with ours.
    """
    there = {shard for split in SPLITS for shard in (folder / split).glob("*.tar")}
    if foreign := sorted(shard for shard in there if not _note(shard).exists() and shard not in wanted):
        raise UserError(f"{show(foreign[0])}: is a shard that `prepare` has not made; choose another data.path")
    return sorted(there - wanted)


def _labels(tasks: list["Task"], notes: list[dict[str, Any]]) -> dict[str, dict[str, int]]:
    labels: dict[str, dict[str, int]] = {split: {} for split in SPLITS}
    for task, note in zip(tasks, notes, strict=True):
        taken = set(note["keys"])
        labels[task.split] |= {v.key: v.label for v in task.videos if v.key in taken}
    return labels


# Shards


def _note(shard: Path) -> Path:
    return shard.parent.parent / NOTES / f"{shard.parent.name}-{shard.stem}.json"


@dataclass(frozen=True)
class Task:
    """One shard to be written."""

    folder: Path
    split: Split
    number: int
    videos: tuple[Video, ...]
    config: VideosConfig
    made_of: str

    @property
    def shard(self) -> Path:
        return self.folder / self.split / f"shard-{self.number:06d}.tar"

    @property
    def note(self) -> Path:
        return _note(self.shard)

    @property
    def fingerprint(self) -> str:
        """Hash of everything that the shard is made from."""
        files = [(v.key, str(v.path), v.label, *_age(v.path)) for v in self.videos]
        return hashlib.sha256(json.dumps([self.made_of, files]).encode()).hexdigest()

    def done(self) -> bool:
        """Whether the shard is there and made from the same."""
        try:
            note = json.loads(self.note.read_text(encoding="utf-8"))
            same: bool = note["fingerprint"] == self.fingerprint and note["bytes"] == self.shard.stat().st_size
            return same and index_path(self.shard).is_file()
        except (OSError, ValueError, KeyError):
            return False


def _age(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def write_shard(task: Task) -> None:
    """Decode the videos of a shard and pack them; the note, written last, names those that cannot be used."""
    keys, bad, lengths = [], [], []
    index_path(task.shard).unlink(missing_ok=True)
    temporary = task.note.with_suffix(".tar.tmp")
    try:
        with temporary.open("wb") as stream, shard_writer(stream) as tar:
            for video in task.videos:
                try:
                    frames = read_frames(video.path, task.config.size, task.config.every, task.config.max_frames)
                except ClipError as error:
                    bad.append(f"{show(video.path)}: {error}")
                    continue
                kept = features(frames, task.config.cnn) if task.config.cnn.where == "prepare" else frames
                about = {"source": video.path.name, "class": video.path.parent.name, "frames": len(kept)}
                packed = io.BytesIO()
                np.save(packed, kept, allow_pickle=False)
                members = {"npy": packed.getvalue(), "cls": str(video.label).encode()}
                tar.write({"__key__": video.key, **members, "json": json.dumps(about).encode()})
                keys.append(video.key)
                lengths.append(len(kept))
        entries = _entries(temporary, keys, lengths)
        temporary.replace(task.shard)
        write_index(task.shard, entries)
        note = {"fingerprint": task.fingerprint, "bytes": task.shard.stat().st_size, "keys": keys, "bad": bad}
        note["shape"] = kept.shape[1:] if keys else None
        task.note.write_text(json.dumps(note), encoding="utf-8")
    finally:
        temporary.unlink(missing_ok=True)


def _entries(shard: Path, keys: list[str], lengths: list[int]) -> list[Entry]:
    """The index of a tar, read from the tar itself."""
    with tarfile.open(shard) as tar:
        members = {m.name: (m.offset_data, m.size) for m in tar}
    content = shard.read_bytes()

    def place(name: str) -> tuple[int, int, int]:
        offset, size = members[name]
        return offset, size, zlib.crc32(content[offset : offset + size])

    # A class has no length, and no frames that CTC would need.
    return [
        Entry(key, *place(f"{key}.npy"), *place(f"{key}.cls"), length, 1, 1)
        for key, length in zip(keys, lengths, strict=True)
    ]
