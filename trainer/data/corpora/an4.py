"""AN4, also called Census: names and addresses spelled, digits, commands; 48 minutes of 84 speakers (Acero 1993).

http://www.speech.cs.cmu.edu/databases/an4/, given away by Carnegie Mellon University. Layout: `etc/an4_train.fileids`
lists `an4_clstk/fash/an251-fash-b`, the folder of which is the speaker; `etc/an4_train.transcription` has lines
`YES (an251-fash-b)`; the recordings are in `wav/` (.sph, .wav, or .raw without a header: 16 kHz, 16 bits), cepstra in
`feat/` (.mfc). There is no validation part: about a tenth of the training speakers make it up.
"""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from trainer.config import Config, Free, show
from trainer.data.corpora.base import Progress, Reading, SplitName, Utterance, percentile, read_text
from trainer.errors import UserError

RAW_RATE_HZ = 16000
LINE = re.compile(r"(.*?)\s*\(([^()\s]+)\)\s*")
VALID_PERCENT = 10
"""Of the training speakers; a hash of the name decides."""


class An4Config(Config):
    """AN4 as sound, or as the cepstra that its authors computed."""

    kind: Literal["an4"] = "an4"
    path: Free[Path | None] = None
    """The folder an4/, with etc/ in it."""
    signal: Literal["sound", "cepstra"] = "sound"
    """Read wav/, or feat/; for the latter set data.features to {kind: precomputed, num_bands: 13}."""
    byte_order: Literal["big", "little"] = "big"
    """Of .raw files: the name of the archive says it."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Read the lists of both parts.

        Args:
            folder: of the prepared corpus; not used.
            progress: not used, reading takes a second.

        Raises:
            UserError: this is not AN4, or what is wrong with it, all in one message.
        """
        cure = "set data.corpus.path to the folder an4/ that holds etc/"
        if self.path is None:
            raise UserError(f"data.corpus.path: is missing; {cure}")
        reading = Reading()
        for part in ("train", "test"):
            self._read_part(reading, self.path, part, cure)
        return reading.result(f"data.corpus.path = {show(self.path)}")

    def _read_part(self, reading: Reading, root: Path, part: str, cure: str) -> None:
        list_ = root / f"etc/an4_{part}.fileids"
        places = {Path(line.strip()).name: Path(line.strip()) for line in read_text(list_, cure) if line.strip()}
        transcripts = root / f"etc/an4_{part}.transcription"
        for number, line in enumerate(read_text(transcripts, cure), 1):
            if not line.strip():
                continue
            where = f"{show(transcripts)} line {number}"
            match = LINE.fullmatch(line)
            if match is None:
                reading.problems.append(f"{where}: {line.strip()[:60]!r}: wanted WORDS (KEY); mend it or remove it")
                continue
            text, key = re.sub(r"</?s>|<sil>", " ", match[1]), match[2]
            place = places.pop(key, None)
            if place is None or ".." in place.parts or place.is_absolute():
                reading.problems.append(f"{where}: key {key}: {show(list_)} names no file for it; add it")
                continue
            speaker = place.parent.name
            reading.add(
                Utterance(key, " ".join(text.split()), self._audio(root, place), _split(part, speaker), where, speaker)
            )
        if places:
            named = ", ".join(list(places)[:5])
            reading.problems.append(f"{show(list_)}: {len(places)} files have no line in {show(transcripts)}: {named}")

    def _audio(self, root: Path, place: Path) -> "Path | RawAudio":
        if self.signal == "cepstra":
            return root / "feat" / place.with_name(f"{place.name}.mfc")
        found = [root / "wav" / place.with_name(f"{place.name}{ending}") for ending in (".sph", ".wav", ".raw")]
        path = next((p for p in found if p.is_file()), found[0])
        if path.suffix != ".raw":
            return path
        status = os.stat(path)
        return RawAudio(path, self.byte_order, status.st_size, status.st_mtime_ns)


def _split(part: str, speaker: str) -> SplitName:
    if part == "test":
        return "test"
    person = speaker.rstrip("0123456789")  # mdcs2 is mdcs, who came again
    return "valid" if percentile(person) < VALID_PERCENT else "train"


@dataclass(frozen=True)
class RawAudio:
    """16-bit samples without a header; calling it gives samples (N,) and their rate."""

    path: Path
    byte_order: str
    size: int
    mtime_ns: int
    """Size and time are what the samples depend on, see `Utterance.audio`."""

    def __call__(self) -> tuple[NDArray[np.float32], int]:
        samples = np.fromfile(self.path, dtype=">i2" if self.byte_order == "big" else "<i2")
        return samples.astype(np.float32) / np.float32(32768), RAW_RATE_HZ
