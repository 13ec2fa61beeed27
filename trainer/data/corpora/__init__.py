"""Raw corpora, one file each: every one yields `Utterance`s and says how it is split."""

from typing import Annotated

from pydantic import Field

from trainer.data.corpora.festvox_ru import FestvoxRuConfig
from trainer.data.corpora.manifest import ManifestConfig
from trainer.data.corpora.tones import TonesConfig

__all__ = ["CorpusConfig", "FestvoxRuConfig", "ManifestConfig", "TonesConfig"]

CorpusConfig = Annotated[FestvoxRuConfig | TonesConfig | ManifestConfig, Field(discriminator="kind")]
