"""The index beside each shard: where every sample lies and how long it is.

A shard is a plain webdataset tar, `KEY.flac KEY.txt KEY.json`, that anyone's loader can read. Its index,
`shard-000000.index.jsonl` beside `shard-000000.tar`, starts with a header line {"format", "shard", "bytes", "samples"}
and has one line a sample, an `Entry`. Planning reads indexes only; reading a sample is one `pread`.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.config import show
from trainer.errors import UserError
from trainer.keyed import key as make_key

FORMAT = 1


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample of a shard. Offsets and sizes are bytes of the members' contents inside the tar."""

    key: str
    audio_offset: int
    audio_size: int
    audio_crc32: int
    text_offset: int
    text_size: int
    num_samples: int
    """Length of the waveform."""
    label_length: int
    """Characters of the normalised transcript."""
    ctc_frames: int
    """Output frames that CTC needs at least: labels plus repeats."""


def index_path(shard: Path) -> Path:
    """The index file of a shard."""
    return shard.with_suffix(".index.jsonl")


def write_index(shard: Path, entries: list[Entry]) -> None:
    """Write a shard's index, whole or not at all."""
    header = {"format": FORMAT, "shard": shard.name, "bytes": shard.stat().st_size, "samples": len(entries)}
    lines = [json.dumps(header)] + [json.dumps(asdict(e), ensure_ascii=False) for e in entries]
    temporary = index_path(shard).with_suffix(".tmp")
    temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    temporary.replace(index_path(shard))


class Index:
    """All samples of one split, as columns: what a plan is made from.

    Attributes:
        keys: name of each sample, unique.
        shard: (N,) number of the tar in `shards`.
        num_samples, label_length, ctc_frames: (N,) see `Entry`.
        sample_keys: (N,) uint64, the hash of each name, for keyed randomness.
        sample_rate_hz: of every waveform.
    """

    def __init__(self, shards: list[Path], entries: list[list[Entry]], sample_rate_hz: int) -> None:
        self.shards = shards
        self.sample_rate_hz = sample_rate_hz
        flat = [(s, e) for s, rows in enumerate(entries) for e in rows]
        self.entries = [e for _, e in flat]
        self.keys = [e.key for e in self.entries]
        if len(set(self.keys)) != len(self.keys):
            twice = sorted({k for k in self.keys if self.keys.count(k) > 1})[:3]
            raise UserError(f"{show(shards[0].parent)}: the keys {', '.join(twice)} occur twice; prepare it anew")
        self.shard = np.array([s for s, _ in flat], dtype=np.int32)
        self.num_samples = self._column("num_samples")
        self.label_length = self._column("label_length")
        self.ctc_frames = self._column("ctc_frames")
        self.sample_keys = np.array([make_key(k) for k in self.keys], dtype=np.uint64)

    def _column(self, name: str) -> NDArray[np.int64]:
        return np.array([getattr(e, name) for e in self.entries], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.entries)

    @property
    def digest(self) -> str:
        """Hash of all that a plan or a batch depends on."""
        columns = [[e.num_samples, e.label_length, e.ctc_frames, e.audio_crc32] for e in self.entries]
        text = json.dumps([self.sample_rate_hz, self.keys, self.shard.tolist(), columns])
        return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()

    @property
    def hours(self) -> float:
        return float(self.num_samples.sum()) / self.sample_rate_hz / 3600

    @classmethod
    def load(cls, folder: Path, sample_rate_hz: int) -> "Index":
        """Read the indexes of every shard in a folder.

        Raises:
            UserError: no shards, a shard without index or an index without shard, an index that is damaged or of
                another format. A shard that was cut short is no error here: what is missing is found, and left out,
                where it is read.
        """
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            raise UserError(f"{show(folder)}: holds no shards (*.tar); run `./launch.sh prepare CONFIG` first")
        lost = sorted(folder.glob("*.index.jsonl")) if shards else []
        lost = [path for path in lost if not path.with_name(path.name.replace(".index.jsonl", ".tar")).is_file()]
        if lost:
            raise UserError(
                f"{show(lost[0])}: the shard of this index is missing (one of {len(lost)}); put it back, or run "
                "`./launch.sh prepare CONFIG` again"
            )
        entries = []
        for shard in shards:
            path = index_path(shard)
            if not path.is_file():
                raise UserError(f"{show(shard)}: has no index beside it ({path.name}); run `./launch.sh prepare` again")
            try:
                head, *rows = (json.loads(line) for line in path.read_text(encoding="utf-8").splitlines())
                if head["format"] != FORMAT:
                    raise ValueError(f"format {head['format']!r}, wanted {FORMAT}")
                if len(rows) != head["samples"]:
                    raise ValueError(f"holds {len(rows)} samples, wanted {head['samples']}")
                entries.append([Entry(**row) for row in rows])
            except (ValueError, KeyError, TypeError) as error:
                cure = "delete the folder and run `./launch.sh prepare` again"
                raise UserError(f"{show(path)}: is damaged or of another format ({error}); {cure}") from error
        return cls(shards, entries, sample_rate_hz)
