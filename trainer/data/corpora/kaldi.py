"""Kaldi's data directories: `wav.scp`, `text`, and if there are any `segments` and `utt2spk`.

Nothing that a directory says is executed. Of the commands that `wav.scp` may hold in place of a file, those that only
decode one (`flac -c -d -s FILE |`, `sph2pipe -f wav -p FILE |`) are read as that file; every other one is refused.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from trainer.config import Free, show
from trainer.data.corpora.base import Progress, Reading, SplitFiles, SplitName, Utterance, make_key, read_text
from trainer.errors import UserError

NOT_EXECUTED = "commands are never executed; decode it to a file (wav-copy does) and name that"


class KaldiConfig(SplitFiles):
    """Data directories of Kaldi, as one or more for each split, e.g. train: [data/train_960]."""

    kind: Literal["kaldi"] = "kaldi"
    root: Free[Path] = Path(".")
    """Where relative paths in wav.scp start: the folder that Kaldi's recipe ran in."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Read every directory.

        Args:
            folder: of the prepared corpus; not used.
            progress: told the directories that were read.

        Raises:
            UserError: a directory is none, or the lines that cannot be used, all in one message.
        """
        directories = list(self.by_split())
        if not directories:
            raise UserError(
                "data.corpus.train = []: there is nothing to prepare; name data directories, e.g. "
                "data.corpus.train='[data/train]'"
            )
        reading = Reading()
        for number, (split, directory) in enumerate(directories, 1):
            self._read(reading, directory, split)
            progress("reading data directories", number, len(directories))
        return reading.result(", ".join(show(directory) for _, directory in directories))

    def _read(self, reading: Reading, directory: Path, split: SplitName) -> None:
        recordings = {
            line.key: self._recording(reading, line) for line in _table(reading, directory / "wav.scp", needed=True)
        }
        segments_file = directory / "segments"
        segments = {line.key: line for line in _table(reading, segments_file)} if segments_file.exists() else None
        speakers = {line.key: line.value for line in _table(reading, directory / "utt2spk")}
        for line in _table(reading, directory / "text", needed=True):
            recording, start, end = line.key, 0.0, None
            if segments is not None:
                segment = segments.get(line.key)
                if segment is None:
                    reading.problems.append(f"{line.where}: key {line.key}: {show(segments_file)} has no line for it")
                    continue
                try:
                    recording, first, last = segment.value.split()
                    start, end = float(first), float(last)
                except ValueError:
                    reading.problems.append(f"{segment.where}: {segment.value!r}: wanted KEY RECORDING START END")
                    continue
            if recording not in recordings:
                reading.problems.append(f"{line.where}: key {line.key}: wav.scp has no recording {recording}")
                continue
            audio = recordings[recording]
            if audio is not None:  # else it is told already
                given = self.split_of(split, line.value)
                path, channel = audio
                reading.add(
                    Utterance(
                        make_key(line.key),
                        line.value,
                        path,
                        given,
                        line.where,
                        speakers.get(line.key),
                        start,
                        None if end == -1 else end,  # Kaldi's way to say: to the end of the recording
                        channel,
                    )
                )

    def _recording(self, reading: Reading, line: "_Line") -> tuple[Path, int | None] | None:
        """File and channel of a line of wav.scp."""
        value = line.value
        if value.endswith("|"):
            found = decoded_file(value)
            if found is None:
                reading.problems.append(f"{line.where}: key {line.key}: {value[:100]!r} is a command; {NOT_EXECUTED}")
                return None
            name, channel = found
        else:
            name, channel = value, None
        if name == "-" or ".ark:" in name:
            cure = "archives and standard input are not read; write a file a recording"
            reading.problems.append(f"{line.where}: key {line.key}: {value[:100]!r}: {cure}")
            return None
        return self.root / name, channel


@dataclass(frozen=True)
class _Line:
    key: str
    value: str
    where: str


def _table(reading: Reading, path: Path, needed: bool = False) -> list[_Line]:
    """Lines `KEY VALUE` of a file; none if there is no such file and it is not needed."""
    if not needed and not path.exists():
        return []
    lines, seen = [], set()
    for number, text in enumerate(read_text(path, "name a data directory of Kaldi's, with wav.scp and text in it"), 1):
        if not text.strip():
            continue
        key, *rest = text.split(maxsplit=1)
        value = rest[0].strip() if rest else ""
        where = f"{show(path)} line {number}"
        if key in seen:
            reading.problems.append(f"{where}: key {key}: is there twice; remove one")
        elif not value and path.name != "text":  # an empty text is told with the others
            reading.problems.append(f"{where}: key {key}: names nothing; mend the line or remove it")
        else:
            seen.add(key)
            lines.append(_Line(key, value, where))
    return lines


def decoded_file(command: str) -> tuple[str, int | None] | None:
    """File and channel (from 0 on) of a command that only decodes a file to standard output; None for any other.

    Args:
        command: ends in "|".
    """
    try:
        program, *arguments = shlex.split(command.removesuffix("|").strip())
    except ValueError:  # an open quote, or nothing at all
        return None
    channel, names = None, []
    program = Path(program).name
    while arguments:
        argument = arguments.pop(0)
        if program == "flac" and (re.fullmatch("-[cds]+", argument) or argument == "--silent"):
            continue
        if program == "sph2pipe" and argument in ("-f", "-c") and arguments:
            value = arguments.pop(0)
            if argument == "-c" and value in ("1", "2"):
                channel = int(value) - 1
            elif (argument, value) not in (("-f", "wav"), ("-f", "rif"), ("-f", "riff"), ("-f", "sph")):
                return None
        elif program == "sph2pipe" and argument == "-p":
            continue
        elif argument.startswith("-") or any(c in argument for c in "|;&<>$`"):
            return None
        else:
            names.append(argument)
    return (names[0], channel) if program in ("flac", "sph2pipe") and len(names) == 1 else None
