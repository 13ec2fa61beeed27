"""Raw corpora, one file each: every one yields `Utterance`s and says how it is split."""

from typing import Annotated

from pydantic import Field

from trainer.data.corpora.an4 import An4Config
from trainer.data.corpora.common_voice import CommonVoiceConfig
from trainer.data.corpora.digits import DigitsConfig
from trainer.data.corpora.festvox_ru import FestvoxRuConfig
from trainer.data.corpora.kaldi import KaldiConfig
from trainer.data.corpora.lhotse import LhotseConfig
from trainer.data.corpora.librispeech import LibriSpeechConfig
from trainer.data.corpora.manifest import ManifestConfig
from trainer.data.corpora.prompts import PromptsConfig
from trainer.data.corpora.timit import TimitConfig
from trainer.data.corpora.tones import TonesConfig

CorpusConfig = Annotated[
    FestvoxRuConfig
    | TonesConfig
    | PromptsConfig
    | ManifestConfig
    | LibriSpeechConfig
    | CommonVoiceConfig
    | TimitConfig
    | An4Config
    | DigitsConfig
    | KaldiConfig
    | LhotseConfig,
    Field(discriminator="kind"),
]

__all__ = [
    "An4Config",
    "CommonVoiceConfig",
    "CorpusConfig",
    "DigitsConfig",
    "FestvoxRuConfig",
    "KaldiConfig",
    "LhotseConfig",
    "LibriSpeechConfig",
    "ManifestConfig",
    "PromptsConfig",
    "TimitConfig",
    "TonesConfig",
]
