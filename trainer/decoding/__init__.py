"""From log-probabilities of labels to text: best path or beam search, with n-gram or recurrent language models."""

from typing import Annotated

from pydantic import Field

from trainer.decoding.base import Decoder, GreedyConfig, greedy
from trainer.decoding.beam import Beam, BeamConfig

__all__ = ["Beam", "BeamConfig", "Decoder", "DecoderConfig", "GreedyConfig", "greedy"]

DecoderConfig = Annotated[GreedyConfig | BeamConfig, Field(discriminator="kind")]
