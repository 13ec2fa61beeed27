"""Corpora in miniature: each in its true layout, with a fraction of a second of noise for every recording."""

import gzip
import json
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import soundfile

from trainer.data.corpora.an4 import An4Config
from trainer.data.corpora.common_voice import CommonVoiceConfig
from trainer.data.corpora.digits import DigitsConfig
from trainer.data.corpora.kaldi import KaldiConfig
from trainer.data.corpora.lhotse import LhotseConfig
from trainer.data.corpora.librispeech import LibriSpeechConfig
from trainer.data.corpora.manifest import ManifestConfig
from trainer.data.corpora.prompts import SOUNDS, TEXTS, PromptsConfig
from trainer.data.corpora.timit import TimitConfig

SECONDS = 0.5


def noise(path: Path, rate: int = 16000, seconds: float = SECONDS, channels: int = 1, **how: Any) -> None:
    """Write a recording whose samples are a function of its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(list(path.name.encode()))
    samples = random.uniform(-0.3, 0.3, (round(rate * seconds), channels)).astype(np.float32)
    soundfile.write(path, samples, rate, **how)


def lines(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")


def librispeech(root: Path) -> LibriSpeechConfig:
    for subset, chapter in (("train-clean-100", "19-198"), ("dev-clean", "84-121123"), ("test-clean", "61-70968")):
        folder = root / "LibriSpeech" / subset / chapter.replace("-", "/")
        for number in range(2):
            noise(folder / f"{chapter}-{number:04d}.flac", seconds=1.0)
        lines(
            folder / f"{chapter}.trans.txt", f"{chapter}-0000 NORTHANGER ABBEY", f"{chapter}-0001 DON'T ANGER THE ABBEY"
        )
    lines(root / "LibriSpeech/SPEAKERS.TXT", "; a list of readers")
    return LibriSpeechConfig(path=root)


def common_voice(root: Path) -> CommonVoiceConfig:
    heading = "client_id\tpath\tsentence_id\tsentence\tup_votes\taccents"
    for table, speaker in (("train", "a1"), ("dev", "b2"), ("test", "c3")):
        clip = f"common_voice_cy_{table}.mp3"
        noise(root / "clips" / clip, 48000, 1.0)
        lines(root / f"{table}.tsv", heading, f'{speaker}\t{clip}\tx\t"""Ie,"" meddai {table}."\t2\t')
    lines(root / "validated.tsv", heading)
    return CommonVoiceConfig(path=root)


def timit(root: Path) -> TimitConfig:
    phones = ["0 300 h#", "300 500 pcl", "500 700 p", "700 900 q", "900 1200 ux", "1200 8000 h#"]
    speakers = ("TRAIN/DR1/FCJF0", "TRAIN/DR4/MESD0", "TEST/DR1/MDAB0", "TEST/DR1/FAKS0", "TEST/DR1/MREB1")
    for place in speakers:
        for sentence in ("SA1", "SI1027", "SX37"):
            noise(root / place / f"{sentence}.WAV", format="NIST", subtype="PCM_16")
            lines(root / place / f"{sentence}.PHN", *phones)
            lines(root / place / f"{sentence}.TXT", "0 8000 She had your dark suit.")
    return TimitConfig(path=root)


def timit_converted(root: Path) -> TimitConfig:
    """The copy that goes round with lower-case names and RIFF beside the damaged originals."""
    timit(root / "upper")
    for path in sorted((root / "upper").rglob("*.*")):
        lower = root / "timit" / str(path.relative_to(root / "upper")).lower()
        lower.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".WAV":
            noise(lower.with_name(f"{lower.name}.wav"))
            lower.write_bytes(b"shortened, which nobody reads")
        else:
            lower.write_bytes(path.read_bytes())
    return TimitConfig(path=root / "timit", num_phones=39)


AN4 = {
    "train": [("an4_clstk/fash/an251-fash-b", "YES"), ("an4_clstk/mmsh/cen1-mmsh-b", "H I N I C H")],
    "test": [("an4test_clstk/fcaw/an406-fcaw-b", "RUBOUT G M E F THREE NINE")],
}
"""`mmsh` is one of the speakers that validate."""


def an4_lists(root: Path) -> None:
    for part, rows in AN4.items():
        lines(root / f"etc/an4_{part}.fileids", *(place for place, _ in rows))
        texts = [f"<s> {text} </s> ({Path(place).name})" for place, text in rows]
        lines(root / f"etc/an4_{part}.transcription", *texts)


def an4_places(root: Path, folder: str) -> list[Path]:
    return [root / folder / place for rows in AN4.values() for place, _ in rows]


def an4(root: Path) -> An4Config:
    an4_lists(root)
    for place in an4_places(root, "wav"):
        noise(place.with_name(f"{place.name}.sph"), format="NIST", subtype="PCM_16")
    return An4Config(path=root)


def an4_raw(root: Path) -> An4Config:
    an4_lists(root)
    for place in an4_places(root, "wav"):
        raw = place.with_name(f"{place.name}.raw")
        noise(raw, format="RAW", subtype="PCM_16", endian="BIG")
    return An4Config(path=root)


def sphinx(matrix: Any, order: str = ">") -> bytes:
    """A feature file of Sphinx."""
    return struct.pack(f"{order}i", matrix.size) + matrix.astype(f"{order}f4").tobytes()


def an4_cepstra(root: Path) -> An4Config:
    an4_lists(root)
    for place in an4_places(root, "feat"):
        place.parent.mkdir(parents=True, exist_ok=True)
        random = np.random.default_rng(list(place.name.encode()))
        place.with_name(f"{place.name}.mfc").write_bytes(sphinx(random.standard_normal((120, 13))))
    return An4Config(path=root, signal="cepstra")


def digits(root: Path) -> DigitsConfig:
    for speaker in ("jackson", "yweweler"):
        for digit in (0, 7):
            for number in (4, 5, 12):
                noise(root / f"recordings/{digit}_{speaker}_{number}.wav", 8000, subtype="PCM_16")
    return DigitsConfig(path=root)


PROMPTS = [
    "; Core Asterisk Sounds in English",
    "",
    "activated: Activated.",
    "ascending-2tone: [ascending tones]",
    "silence/1: (1 second of silence)",
    "confbridge-join: <beep ascending>",
    "digits/a-m: A.M.",
    "letters/at: at [@]",
    "dictate/both_help: press * to toggle pause, press # to enter",
    "pls-try-call-later: Please try your call later.",
    "spy-h323: H.323",
]


def prompts(root: Path) -> PromptsConfig:
    for line in PROMPTS[2:]:
        name = line.partition(":")[0]
        if name != "pls-try-call-later":
            noise(root / SOUNDS.holds / f"{name}.wav", 8000, subtype="PCM_16")
    (root / TEXTS.holds).parent.mkdir(parents=True)
    (root / TEXTS.holds).write_bytes(gzip.compress("\n".join(PROMPTS).encode()))
    return PromptsConfig(path=root)


def kaldi(root: Path) -> KaldiConfig:
    """With segments, with pipes that only decode, and with neither."""
    noise(root / "sph/long.sph", seconds=2.0, channels=2, format="NIST", subtype="PCM_16")
    lines(root / "data/train/wav.scp", f"long sph2pipe -f wav -p -c 2 {root}/sph/long.sph |")
    lines(root / "data/train/segments", "u-1 long 0.25 0.75", "u-2 long 1.5 2.01")
    lines(root / "data/train/text", "u-1 hello you", "u-2 and you")
    lines(root / "data/train/utt2spk", "u-1 s1", "u-2 s1")
    noise(root / "flac/v.flac")
    lines(root / "data/dev/wav.scp", f"u-3 /usr/bin/flac -c -d -s {root}/flac/v.flac |")
    lines(root / "data/dev/text", "u-3\tgood morning")
    noise(root / "wav/t.wav")
    lines(root / "data/test/wav.scp", "u-4 wav/t.wav")
    lines(root / "data/test/text", "u-4 good night")
    lines(root / "data/test/utt2spk", "u-4 s4")
    parts = {"train": "train", "valid": "dev", "test": "test"}
    return KaldiConfig(root=root, **{split: (root / "data" / part,) for split, part in parts.items()})


def nemo(root: Path) -> ManifestConfig:
    noise(root / "a/long.wav", seconds=2.0)
    for split, text in (("train", "hello you"), ("valid", "good morning"), ("test", "good night")):
        noise(root / f"{split}.wav")
        rows = [{"audio_filepath": f"{split}.wav", "duration": SECONDS, "text": text, "speaker": 7}]
        if split == "train":
            part = {"audio_filepath": "a/long.wav", "offset": 1.0, "duration": SECONDS, "text": "part", "key": "part"}
            rows.append(part)
        lines(root / f"{split}.json", *map(json.dumps, rows))
    return ManifestConfig(**{split: (root / f"{split}.json",) for split in ("train", "valid", "test")})


def table(root: Path) -> ManifestConfig:
    noise(root / "long.wav", seconds=2.0)
    lines(
        root / "all.csv",
        "audio,text,split,key,speaker,offset,duration",
        'long.wav,"hello, you",train,k1,s1,0,0.5',
        "long.wav,good morning,valid,k2,,0.5,0.5",
        "long.wav,good night,test,k3,s3,1.5,",
    )
    return ManifestConfig(files=(root / "all.csv",))


def recording(name: str, file: str, channels: int = 1, **more: Any) -> dict[str, Any]:
    numbers = list(range(channels))
    source = {"type": "file", "channels": numbers, "source": file}
    return {"id": name, "sources": [source], "sampling_rate": 16000, "num_samples": 32000, "duration": 2.0} | more


def supervision(name: str, of: str, start: float, text: str, channel: int = 0) -> dict[str, Any]:
    times = {"start": start, "duration": SECONDS, "channel": channel}
    return {"id": name, "recording_id": of, **times, "text": text, "language": "en", "speaker": "s1"}


def cut(name: str, of: dict[str, Any], start: float, spoken: list[dict[str, Any]]) -> dict[str, Any]:
    times = {"start": start, "duration": SECONDS, "channel": 0}
    return {"id": name, **times, "supervisions": spoken, "recording": of, "type": "MonoCut"}


def write_packed(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def lhotse(root: Path) -> LhotseConfig:
    """Recordings and supervisions of two channels; cuts for the other splits, packed and not."""
    noise(root / "wav/r.wav", seconds=2.0, channels=2)
    noise(root / "wav/c.wav", seconds=2.0)
    write_packed(root / "recordings_train.jsonl.gz", [recording("r", "wav/r.wav", 2)])
    spoken = [supervision("u1", "r", 0.5, "hello"), supervision("u2", "r", 1.0, "you", channel=1)]
    write_packed(root / "supervisions_train.jsonl.gz", spoken)
    at_half_rate = {"name": "Resample", "kwargs": {"source_sampling_rate": 16000, "target_sampling_rate": 8000}}
    of = recording("c", "wav/c.wav", transforms=[at_half_rate])
    write_packed(root / "cuts_dev.jsonl.gz", [cut("c-1", of, 0.5, [supervision("s", "c", 0.0, "good morning")])])
    two = [{**supervision("s2", "c", 0.25, "night"), "duration": 0.25}]
    two.append({**supervision("s1", "c", 0.0, "good"), "duration": 0.25})
    lines(root / "cuts_test.jsonl", json.dumps(cut("c-2", of, 1.5, two)))
    names = {
        "train": ("recordings_train.jsonl.gz", "supervisions_train.jsonl.gz"),
        "valid": ("cuts_dev.jsonl.gz",),
        "test": ("cuts_test.jsonl",),
    }
    return LhotseConfig(root=root, **{split: tuple(root / n for n in files) for split, files in names.items()})


@dataclass(frozen=True)
class Miniature:
    """A corpus, and what must be read from it: (text, split, speaker) by key, in order."""

    make: Callable[[Path], Any]
    wanted: dict[str, tuple[str, str | None, str | None]]


TIMIT_48 = "sil cl p uw sil"
TIMIT_39 = "sil sil p uw sil"


def _timit(phones: str) -> dict[str, tuple[str, str | None, str | None]]:
    speakers = {"faks0": "valid", "mdab0": "test", "fcjf0": "train", "mesd0": "train"}
    return {f"{s}_{x}": (phones, split, s) for s, split in speakers.items() for x in ("si1027", "sx37")}


_AN4: dict[str, tuple[str, str | None, str | None]] = {
    "an251-fash-b": ("YES", "train", "fash"),
    "cen1-mmsh-b": ("H I N I C H", "valid", "mmsh"),
    "an406-fcaw-b": ("RUBOUT G M E F THREE NINE", "test", "fcaw"),
}

MINIATURES = {
    "librispeech": Miniature(
        librispeech,
        {
            "19-198-0000": ("NORTHANGER ABBEY", "train", "19"),
            "19-198-0001": ("DON'T ANGER THE ABBEY", "train", "19"),
            "84-121123-0000": ("NORTHANGER ABBEY", "valid", "84"),
            "84-121123-0001": ("DON'T ANGER THE ABBEY", "valid", "84"),
            "61-70968-0000": ("NORTHANGER ABBEY", "test", "61"),
            "61-70968-0001": ("DON'T ANGER THE ABBEY", "test", "61"),
        },
    ),
    "common_voice": Miniature(
        common_voice,
        {
            "common_voice_cy_train": ('"Ie," meddai train.', "train", "a1"),
            "common_voice_cy_dev": ('"Ie," meddai dev.', "valid", "b2"),
            "common_voice_cy_test": ('"Ie," meddai test.', "test", "c3"),
        },
    ),
    "timit": Miniature(timit, _timit(TIMIT_48)),
    "timit, converted": Miniature(timit_converted, _timit(TIMIT_39)),
    "an4": Miniature(an4, _AN4),
    "an4, raw": Miniature(an4_raw, _AN4),
    "an4, cepstra": Miniature(an4_cepstra, _AN4),
    "digits": Miniature(
        digits,
        {
            "0_jackson_12": ("zero", "train", "jackson"),
            "0_jackson_5": ("zero", "train", "jackson"),
            "7_jackson_12": ("seven", "train", "jackson"),
            "7_jackson_5": ("seven", "train", "jackson"),
            "0_jackson_4": ("zero", "valid", "jackson"),
            "7_jackson_4": ("seven", "valid", "jackson"),
            "0_yweweler_12": ("zero", "test", "yweweler"),
            "0_yweweler_4": ("zero", "test", "yweweler"),
            "0_yweweler_5": ("zero", "test", "yweweler"),
            "7_yweweler_12": ("seven", "test", "yweweler"),
            "7_yweweler_4": ("seven", "test", "yweweler"),
            "7_yweweler_5": ("seven", "test", "yweweler"),
        },
    ),
    "prompts": Miniature(
        prompts,
        {
            "activated": ("Activated.", None, "allison"),
            "digits_a-m": ("A.M.", None, "allison"),
            "letters_at": ("at", None, "allison"),
            "dictate_both_help": ("press star to toggle pause, press pound to enter", None, "allison"),
        },
    ),
    "kaldi": Miniature(
        kaldi,
        {
            "u-1": ("hello you", "train", "s1"),
            "u-2": ("and you", "train", "s1"),
            "u-3": ("good morning", "valid", None),
            "u-4": ("good night", "test", "s4"),
        },
    ),
    "nemo": Miniature(
        nemo,
        {
            "train": ("hello you", "train", "7"),
            "part": ("part", "train", None),
            "valid": ("good morning", "valid", "7"),
            "test": ("good night", "test", "7"),
        },
    ),
    "table": Miniature(
        table,
        {
            "k1": ("hello, you", "train", "s1"),
            "k2": ("good morning", "valid", None),
            "k3": ("good night", "test", "s3"),
        },
    ),
    "lhotse": Miniature(
        lhotse,
        {
            "u1": ("hello", "train", "s1"),
            "u2": ("you", "train", "s1"),
            "c-1": ("good morning", "valid", "s1"),
            "c-2": ("good night", "test", "s1"),
        },
    ),
}
