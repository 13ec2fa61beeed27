"""TIMIT: 630 speakers of American English, phones by hand (Garofolo et al. 1993), LDC93S1, to be bought from the LDC.

Layout: `TRAIN/DR1/FCJF0/SI1027.WAV` with `.PHN` (lines `FIRST LAST PHONE`, in samples) beside it; upper or lower case.
The audio is NIST SPHERE, or RIFF in copies where it was converted (`SI1027.WAV.wav` goes before `SI1027.WAV` then).
The SA sentences are left out: all speakers read the same two, so they would be in every split.
"""

from pathlib import Path
from typing import Literal

from trainer.config import Config, Free, show
from trainer.data.corpora.base import Progress, Reading, SplitName, Utterance, read_text
from trainer.errors import UserError

CORE_TEST = """
mdab0 mwbt0 felc0 mtas1 mwew0 fpas0 mjmp0 mlnt0 fpkt0 mlll0 mtls0 fjlm0
mbpm0 mklt0 fnlp0 mcmj0 mjdh0 fmgd0 mgrt0 mnjm0 fdhc0 mjln0 mpam0 fmld0
"""
"""Speakers of the core test set that TIMIT's own documentation names: two men and a woman of each region, 192
sentences."""

DEVELOPMENT = """
faks0 fdac1 fjem0 mgwt0 mjar0 mmdb1 mmdm2 mpdf0 fcmh0 fkms0 mbdg0 mbwm0 mcsh0 fadg0 fdms0 fedw0 mgjf0 mglb0 mrtk0
mtaa0 mtdt0 mthc0 mwjg0 fnmr0 frew0 fsem0 mbns0 mmjr0 mdls0 mdlf0 mdvc0 mers0 fmah0 fdrw0 mrcs0 mrjm4 fcal1 mmwh0
fjsj0 majc0 mjsw0 mreb0 fgjd0 fjmg0 mroa0 mteb0 mjfc0 mrjr0 fmml0 mrws1
"""
"""50 other speakers of the test part, 400 sentences: the development set of Halberstadt (1998)."""

PHONES = """
aa ae ah ao aw ax ax-h axr ay b bcl ch d dcl dh dx eh el em en eng epi er ey f g gcl h# hh hv ih ix iy jh k kcl l m
n ng nx ow oy p pau pcl q r s sh t tcl th uh uw ux v w y z zh
"""
"""The 61 that are transcribed."""

TO_48 = {
    "ax-h": "ax",
    "axr": "er",
    "bcl": "vcl",
    "dcl": "vcl",
    "gcl": "vcl",
    "kcl": "cl",
    "pcl": "cl",
    "tcl": "cl",
    "em": "m",
    "eng": "ng",
    "h#": "sil",
    "pau": "sil",
    "hv": "hh",
    "nx": "n",
    "ux": "uw",
    "q": "",
}
"""Of the 61, those that Lee & Hon (1989, table I) fold into another; q is dropped."""

TO_39 = {
    "cl": "sil",
    "vcl": "sil",
    "epi": "sil",
    "el": "l",
    "en": "n",
    "zh": "sh",
    "ao": "aa",
    "ix": "ih",
    "ax": "ah",
}
"""Of these 48, those that count as another when errors are counted (Lee & Hon 1989)."""


def fold(phone: str, num_phones: int) -> str:
    """A phone of the 61 as one of 61, 48 or 39; "" where it is dropped.

    Source: Lee & Hon 1989, Speaker-independent phone recognition using hidden Markov models, IEEE Trans. ASSP 37(11).
    """
    if num_phones < 61:
        phone = TO_48.get(phone, phone)
    return TO_39.get(phone, phone) if num_phones < 48 else phone


class TimitConfig(Config):
    """Phones of TIMIT: its training speakers, the development set of 50 speakers, the core test set of 24."""

    kind: Literal["timit"] = "timit"
    path: Free[Path | None] = None
    """Folder that holds TRAIN and TEST."""
    num_phones: Literal[61, 48, 39] = 48
    """The set to train on. Results are compared on 39: with 48 set data.text.tokens.scored_as as configs/speech/timit
    does."""

    def utterances(self, folder: Path, progress: Progress) -> list[Utterance]:
        """Read the phone files.

        Args:
            folder: of the prepared corpus; not used.
            progress: told the speakers that were read.

        Raises:
            UserError: this is not TIMIT, or what is wrong with it, all in one message.
        """
        if self.path is None:
            raise UserError("data.corpus.path: is missing; set it to the folder that holds TIMIT's TRAIN and TEST")
        parts = [(p.name.lower(), p) for p in _children(self.path) if p.name.lower() in ("train", "test")]
        if len(parts) < 2:
            raise UserError(
                f"data.corpus.path = {show(self.path)}: wanted the folder that holds TIMIT's TRAIN and TEST"
            )
        speakers = [
            (part, speaker) for part, place in parts for region in _children(place) for speaker in _children(region)
        ]
        reading = Reading()
        for number, (part, speaker) in enumerate(speakers, 1):
            split = _split(part, speaker.name.lower())
            if split is not None:
                self._read_speaker(reading, speaker, split)
            progress("reading TIMIT (speakers)", number, len(speakers))
        return reading.result(f"data.corpus.path = {show(self.path)}")

    def _read_speaker(self, reading: Reading, folder: Path, split: SplitName) -> None:
        files = {path.name.lower(): path for path in _children(folder)}
        for name, path in files.items():
            sentence = name.removesuffix(".phn")
            if name == sentence or sentence.startswith("sa"):
                continue
            audio = files.get(f"{sentence}.wav.wav") or files.get(f"{sentence}.wav") or path.with_suffix(".WAV")
            phones = self._read_phones(reading, path)
            if phones is not None:
                speaker = folder.name.lower()
                reading.add(Utterance(f"{speaker}_{sentence}", phones, audio, split, show(path), speaker))

    def _read_phones(self, reading: Reading, path: Path) -> str | None:
        """The phones of a sentence, folded, with spaces between."""
        phones = []
        for number, line in enumerate(read_text(path, "put it back"), 1):
            fields = line.split()
            if len(fields) == 3 and fields[2] in PHONES.split():
                phones.append(fold(fields[2], self.num_phones))
            elif fields:
                reading.problems.append(
                    f"{show(path)} line {number}: {line.strip()[:60]!r}: wanted FIRST LAST PHONE, with one of "
                    "TIMIT's 61 phones; mend the line"
                )
                return None
        return " ".join(filter(None, phones))


def _split(part: str, speaker: str) -> SplitName | None:
    """Which split a speaker belongs to; None: none, as the rest of the test part."""
    if part == "train":
        return "train"
    return "test" if speaker in CORE_TEST.split() else "valid" if speaker in DEVELOPMENT.split() else None


def _children(folder: Path) -> list[Path]:
    """What a folder holds, by name; nothing if it is none."""
    return sorted(folder.iterdir(), key=lambda path: path.name.lower()) if folder.is_dir() else []
