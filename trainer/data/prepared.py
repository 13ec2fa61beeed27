"""A prepared corpus of speech: its settings, `corpus.json` beside its shards, and what labels and features it has."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError, model_validator
from zlib_ng import zlib_ng

from trainer.config import Config, Free, show
from trainer.data.audio import FeaturesConfig, LogMel, Precomputed
from trainer.data.augment import AugmentConfig
from trainer.data.corpora import CorpusConfig, ManifestConfig
from trainer.data.index import index_path
from trainer.data.mirror import bundle_indexes, mirror
from trainer.data.remote import RemoteConfig
from trainer.data.text import SUBWORDS_FILE, SubwordsConfig, TextConfig, Tokens
from trainer.errors import UserError

FOREIGN = "shards"
"""What `corpus.json` calls a corpus whose shards were made elsewhere."""


class SpeechDataConfig(Config):
    """Where the speech comes from and what is made of it."""

    corpus: CorpusConfig = ManifestConfig()
    """The raw corpus that `prepare` reads."""
    path: Free[Path] = Path("data/speech")
    """Folder of the prepared shards, or of the local copy of those at `remote.url`."""
    remote: Free[RemoteConfig] = RemoteConfig()
    sample_rate_hz: PositiveInt = 16000
    """Audio is resampled to this by `prepare`; not used where the features are precomputed."""
    samples_per_shard: PositiveInt = 64
    max_unusable_share: Free[float] = Field(0.0, ge=0, le=1)
    """Share of the corpus that `prepare` may leave out as unusable, and then lists in PATH/left_out.txt; with 0 any
    such line is an error."""
    text: TextConfig = TextConfig()
    features: FeaturesConfig = FeaturesConfig()
    augment: AugmentConfig = AugmentConfig()

    @model_validator(mode="after")
    def _only_sound_is_augmented_as_sound(self) -> "SpeechDataConfig":
        if self.features.kind == "precomputed":
            for name in ("speeds", "reverberation", "noise", "gain_db"):
                if getattr(self.augment, name) != AugmentConfig.model_fields[name].default:
                    value = self.augment.model_dump(mode="json")[name]
                    raise ValueError(
                        f"augment.{name} = {value} with features.kind = precomputed: there is no sound to "
                        "change; leave the key out"
                    )
        return self

    @property
    def rate_hz(self) -> int:
        """Values a second of what a shard holds: samples, or rows of a feature matrix."""
        return self.features.rate_hz(self.sample_rate_hz)

    @property
    def hop_samples(self) -> int:
        """Samples from one feature frame to the next."""
        return round(self.sample_rate_hz * self.features.hop_ms / 1000)


class ShardFile(BaseModel):
    """What tells whether a shard and its index are the ones that were made."""

    bytes: int
    """Size of the tar."""
    index_crc32: int


class SplitInfo(BaseModel):
    """Size of one prepared split."""

    samples: int
    hours: float
    shards: int
    files: dict[str, ShardFile] = {}
    """The shards by name: elsewhere there may be nothing that lists a folder."""


class BandStatistics(BaseModel):
    """Mean and deviation of each band over the training split, and the features that they are of."""

    kind: str = "log_mel"
    num_bands: int
    window_ms: float
    hop_ms: float
    mean: list[float]
    deviation: list[float]


class Prepared(BaseModel):
    """`corpus.json`: what `prepare` made, beside the folders train/ valid/ test/ of shards and indexes."""

    model_config = ConfigDict(extra="forbid")

    format: int = 1
    corpus: str
    sample_rate_hz: int
    """Of precomputed features: rows a second."""
    alphabet: str
    tokens: dict[str, Any] = {"kind": "characters"}
    """What a label is: the settings that `label_settings` names."""
    subwords_sha256: str | None = None
    """Of the vocabulary beside this file, where labels are subwords."""
    outside_alphabet: dict[str, int] = {}
    """What transcripts held that is not in the alphabet, and was dropped or became a space: how often each."""
    splits: dict[str, SplitInfo]
    statistics: BandStatistics

    @property
    def files(self) -> dict[str, ShardFile]:
        """Every shard by its name below the folder, as in train/shard-000000.tar."""
        return {f"{split}/{name}": file for split, info in self.splits.items() for name, file in info.files.items()}

    @property
    def maker(self) -> str:
        """The command that made it."""
        return "shards index FOLDER CONFIG" if self.corpus == FOREIGN else "prepare CONFIG"

    def reading(self, text: TextConfig) -> TextConfig:
        """How a transcript in the shards is read: what others wrote is normalised, what `prepare` wrote is already."""
        return text if self.corpus == FOREIGN else text.model_copy(update={"lowercase": False, "map": {}})

    @classmethod
    def load(cls, folder: Path) -> "Prepared":
        """Read `corpus.json`.

        Raises:
            UserError: there is none, or it is not one.
        """
        path = folder / "corpus.json"
        if not path.is_file():
            raise UserError(
                f"{show(path)}: is missing, so data.path = {folder} holds no prepared corpus; "
                "run `./launch.sh prepare CONFIG` first"
            )
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            what = f"{'.'.join(map(str, first['loc']))}: {first['msg']}".removeprefix(": ")
            raise UserError(
                f"{show(path)}: is not what `prepare` writes for sound ({what}); name a corpus of sound, or "
                "prepare it anew"
            ) from error
        except ValueError as error:
            raise UserError(f"{show(path)}: is not what `prepare` writes ({error}); prepare the corpus anew") from error


def open_prepared(config: SpeechDataConfig) -> Prepared:
    """What `corpus.json` says, which is brought here first if the corpus lies elsewhere.

    Raises:
        UserError: there is none, or it cannot be had.
    """
    if config.remote.url:
        mirror(config.path, config.remote)
    return Prepared.load(config.path)


def shard_file(shard: Path) -> ShardFile:
    """What `corpus.json` says of a shard that is there with its index."""
    return ShardFile(bytes=shard.stat().st_size, index_crc32=zlib_ng.crc32(index_path(shard).read_bytes()))


def label_settings(text: TextConfig) -> dict[str, Any]:
    """The settings by which a transcript becomes labels, beside the alphabet."""
    return text.tokens.model_dump(mode="json", exclude={"scored_as"})


def build_tokens(config: SpeechDataConfig, prepared: Prepared) -> Tokens:
    """What the labels mean.

    Raises:
        UserError: the vocabulary of subwords is missing, or not the one that the corpus was prepared with.
    """
    tokens = config.text.tokens
    made: Tokens = tokens.build(config.text.alphabet or prepared.alphabet, config.path)
    if isinstance(tokens, SubwordsConfig):
        path = config.path / SUBWORDS_FILE
        if hashlib.sha256(path.read_bytes()).hexdigest() != prepared.subwords_sha256:
            raise UserError(
                f"{show(path)}: is not the vocabulary that corpus.json beside it names; put that back, or run "
                "`./launch.sh prepare CONFIG` again"
            )
    return made


def vocabulary(config: SpeechDataConfig, identity: str, folder: Path) -> Tokens:
    """What the labels mean that a model was trained on, without its corpus.

    Args:
        identity: that of the tokens, as a checkpoint names it.
        folder: where a vocabulary of subwords may lie, else with the data.

    Raises:
        UserError: the vocabulary is missing, or another one.
    """
    place = folder if (folder / SUBWORDS_FILE).is_file() else config.path
    made: Tokens = config.text.tokens.build(identity, place)
    if made.identity != identity:
        raise UserError(
            f"{show(place / SUBWORDS_FILE)}: is another vocabulary ({made.identity}) than the model was trained with "
            f"({identity}); put that there"
        )
    return made


def build_log_mel(config: SpeechDataConfig, prepared: Prepared) -> LogMel | Precomputed:
    """The feature module with the corpus statistics in it."""
    log_mel = config.features.build(config.sample_rate_hz)
    log_mel.mean.copy_(torch.tensor(prepared.statistics.mean))
    log_mel.deviation.copy_(torch.tensor(prepared.statistics.deviation))
    return log_mel


def write_prepared(prepared: Prepared, folder: Path) -> None:
    """Write `corpus.json`, whole or not at all, and the indexes in one file before it."""
    if prepared.files:
        bundle_indexes(folder, prepared.files)
    temporary = folder / "corpus.json.tmp"
    temporary.write_text(json.dumps(prepared.model_dump(), ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / "corpus.json")
