"""Russian sentences read by one man: the recordings behind Festival's voice `msu_ru_nsh_clunits`, 620 in 1.7 hours.

Debian ships them as the package `festvox-ru`, which is fetched without root, see `debian.py`. The voice holds the
phones of each sentence too, `lab/KEY.lab`, as Festival aligned them: 49 with the reduced and the soft ones, and pauses.
"""

import re
from pathlib import Path
from typing import Literal

from trainer.config import Config, Free, show
from trainer.data.corpora.base import Progress, Reading, Utterance, read_text
from trainer.data.corpora.debian import Package, fetch
from trainer.errors import UserError

VOICE = Path("usr/share/festival/voices/russian/msu_ru_nsh_clunits")
TRANSCRIPTS = Path("etc/txt.done.data")
PACKAGE = Package(
    name="festvox-ru",
    version="0.5+dfsg-6",
    sha256="21ef3f0f2978ecf2e2eddb367cb0ff4a72572196d28dc69feb84f4177af5e6c4",
    size=178_728_512,
    pool="pool/main/f/festvox-ru",
    holds=VOICE / TRANSCRIPTS,
)

LINE = re.compile(r'\(\s*(\S+)\s+"(.*)"\s*\)')
STRESS = "+"  # before a stressed vowel, on some words only
PAUSE = "pau"


class FestvoxRuConfig(Config):
    """The recordings of Debian's `festvox-ru`."""

    kind: Literal["festvox_ru"] = "festvox_ru"
    path: Free[Path | None] = None
    """Folder of the unpacked voice (with etc/ and wav/ in it, or usr/); null fetches it into `raw/` of data.path."""
    labels: Literal["text", "phones"] = "text"
    """What is read out, or its phones with spaces between, without the pauses."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Fetch the voice, unless it is there, and read its list of sentences.

        Args:
            folder: of the prepared corpus; the download goes to `raw/` below it.
            progress: told the bytes of the download.

        Raises:
            UserError: it cannot be fetched (the message says how to do that by hand), or is not what it should be.
        """
        if self.path is None:
            return read_voice(fetch(PACKAGE, folder / "raw", self.kind, progress) / VOICE, self.labels == "phones")
        for voice in (self.path, self.path / VOICE):
            if (voice / TRANSCRIPTS).is_file():
                return read_voice(voice, self.labels == "phones")
        raise UserError(
            f"data.corpus.path = {self.path}: holds neither {TRANSCRIPTS} nor {VOICE / TRANSCRIPTS}; name the "
            f"folder where {PACKAGE.name} was unpacked, or leave the key out to fetch it"
        )


def read_voice(voice: Path, phones: bool = False) -> list[Utterance]:
    """The sentences of an unpacked voice, as text or as phones."""
    reading = Reading()
    for number, line in enumerate((voice / TRANSCRIPTS).read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        where = f"{show(voice / TRANSCRIPTS)} line {number}"
        match = LINE.fullmatch(line.strip())
        if match is None:
            reading.problems.append(
                f'{where}: {line.strip()[:60]!r}: wanted ( KEY "TEXT" ); mend the line or remove it'
            )
            continue
        key, text = match.groups()
        if re.search(r"[./]", key):
            reading.problems.append(f"{where}: key = {key!r}: holds a dot or a slash; rename it")
        else:
            text = read_phones(voice / "lab" / f"{key}.lab", reading.problems) if phones else text.replace(STRESS, "")
            reading.add(Utterance(key, text, voice / "wav" / f"{key}.wav", None, where))
    return reading.result(show(voice / TRANSCRIPTS))


def read_phones(path: Path, problems: list[str]) -> str:
    """The phones of a sentence: after a line `#`, a line `END COLOUR PHONE` each, times in seconds."""
    phones = []
    for number, line in enumerate(read_text(path, "unpack the voice again"), 1):
        fields = line.split()
        if len(fields) == 3:
            phones.append(fields[2])
        elif fields and fields != ["#"]:
            where = f"{show(path)} line {number}"
            problems.append(f"{where}: {line.strip()[:60]!r}: wanted END COLOUR PHONE; mend the line")
    return " ".join(phone for phone in phones if phone != PAUSE)
