"""English prompts of a telephone system, spoken by Allison Smith: 24 minutes, 8 kHz, every one transcribed.

Debian ships the recordings as `asterisk-core-sounds-en-wav` and the transcripts in `asterisk-core-sounds-en` (CC BY-SA
3.0); both are fetched without root, see `debian.py`.
"""

import gzip
import re
import zlib
from pathlib import Path
from typing import Literal

from trainer.config import Config, Free, show
from trainer.data.corpora.base import Progress, Reading, Utterance, make_key
from trainer.data.corpora.debian import Package, fetch, find
from trainer.errors import UserError

SOUNDS = Package(
    name="asterisk-core-sounds-en-wav",
    version="1.6.1-1",
    sha256="2be3ea287d83299d143815fa804f11179a75b7affd4a758b98b55f5afc18a35d",
    size=18_272_864,
    pool="pool/main/a/asterisk-core-sounds",
    holds=Path("usr/share/asterisk/sounds/en_US_f_Allison"),
)
TEXTS = Package(
    name="asterisk-core-sounds-en",
    version="1.6.1-1",
    sha256="973e797d28e37fa6ca3c0a9d6fa717e77cf1268ae916bf09fd3503113cdffa50",
    size=22_844,
    pool="pool/main/a/asterisk-core-sounds",
    holds=Path("usr/share/doc/asterisk-core-sounds-en/core-sounds-en.txt.gz"),
)

REMARK = re.compile(r"\[[^]]*\]|\([^)]*\)|<[^>]*>")
"""What is heard beside speech, or is no speech at all: `[ascending tones]`, `(10 seconds of silence)`."""
SPOKEN = {
    "0": "zero",
    "1": "one",
    "2": "two",
    "3": "three",
    "4": "four",
    "5": "five",
    "6": "six",
    "7": "seven",
    "8": "eight",
    "9": "nine",
    "*": "star",
    "#": "pound",
}
"""How digits and keys are read out; all numbers in the transcripts that are used have one digit."""
LEFT_OUT = {
    "demo-instruct": "numbers such as 8500 and 28.8, and the transcript does not say how they are read",
    "spy-h323": "H.323, likewise",
    "pls-try-call-later": "has a transcript and no recording",
}


class PromptsConfig(Config):
    """The prompts of Debian's `asterisk-core-sounds-en`."""

    kind: Literal["prompts"] = "prompts"
    path: Free[Path | None] = None
    """Folder where both packages were unpacked, into it or into folders of their names; null fetches them into `raw/`
    of data.path."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Fetch both packages, unless they are there, and read the transcripts.

        Args:
            folder: of the prepared corpus; the downloads go to `raw/` below it.
            progress: told the bytes of the downloads.

        Raises:
            UserError: a package cannot be fetched (the message says how to do that by hand), or is not what it should
                be.
        """
        roots = []
        for package in (SOUNDS, TEXTS):
            if self.path is None:
                roots.append(fetch(package, folder / "raw", self.kind, progress))
            elif root := find(package, self.path) or find(package, self.path / package.name):
                roots.append(root)
            else:
                raise UserError(
                    f"data.corpus.path = {self.path}: holds no {package.holds}; name the folder where {SOUNDS.name} "
                    f"and {TEXTS.name} were unpacked, or leave the key out to fetch them"
                )
        return read_prompts(roots[0] / SOUNDS.holds, roots[1] / TEXTS.holds)


def read_prompts(sounds: Path, texts: Path) -> list[Utterance]:
    """The prompts with speech in them."""
    reading = Reading()
    try:
        lines = gzip.decompress(texts.read_bytes()).decode("utf-8").splitlines()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise UserError(f"{show(texts)}: cannot be read ({error}); unpack {TEXTS.name} again") from error
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith(";"):
            continue
        where = f"{show(texts)} line {number}"
        name, colon, text = line.partition(":")
        if not colon or ".." in name:
            reading.problems.append(f"{where}: {line.strip()[:60]!r}: wanted NAME: TEXT; unpack {TEXTS.name} again")
            continue
        text = spoken(text)
        if text and name not in LEFT_OUT:
            reading.add(Utterance(make_key(name), text, sounds / f"{name}.wav", None, where, "allison"))
    return reading.result(show(texts))


def spoken(text: str) -> str:
    """What is said, without remarks, digits and keys as words; empty if nothing is."""
    text = REMARK.sub(" ", text)
    for sign, word in SPOKEN.items():
        text = text.replace(sign, f" {word} ")
    text = " ".join(text.split())
    return text if any(c.isalpha() for c in text) else ""
