"""Speech recognition with a transducer, whose labels depend on each other, and CTC beside it.

Source: Graves 2012, arXiv:1211.3711. The loss is torchaudio's `rnnt_loss`.
"""

from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchaudio.functional import rnnt_loss

from kernels.ctc import ctc_loss
from trainer.data.augment import SpecAugment
from trainer.data.buckets import BucketedConfig
from trainer.data.dataset import Batch
from trainer.data.prepare import prepare
from trainer.data.prepared import SpeechDataConfig, build_log_mel, build_tokens, open_prepared
from trainer.data.speech import SpeechDataset
from trainer.data.text import BLANK, Tokens
from trainer.metrics import Loss, add, edits
from trainer.models.acoustic import AcousticModel
from trainer.models.transducer import Transducer, TransducerConfig
from trainer.recipe import Inputs, Recipe, Row, RunConfig, Split, State, StepOutput, wants_scores


class TransducerRunConfig(RunConfig):
    """A run of the transducer recipe."""

    data: SpeechDataConfig = SpeechDataConfig()
    plan: BucketedConfig = BucketedConfig()
    model: TransducerConfig = TransducerConfig()


class TransducerRecipe(Recipe[TransducerRunConfig]):
    """Text from audio; the best checkpoint is that of the lowest character error rate (of phones: in letters)."""

    monitor = "cer"
    heads = ("output", "embedding", "encoder.output")

    def prepare(self) -> None:
        prepare(self.config.data)

    @cached_property
    def tokens(self) -> Tokens:
        """Labels of the output layer."""
        return build_tokens(self.config.data, open_prepared(self.config.data))

    def build_model(self) -> Transducer:
        data, model = self.config.data, self.config.model
        features = build_log_mel(data, open_prepared(data))
        here = data.features.where == "model"
        encoder = AcousticModel(model.encoder, features, len(self.tokens), here, SpecAugment(data.augment))
        return Transducer(model, encoder, len(self.tokens))

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, Transducer)
        step_ms = self.config.data.features.hop_ms * self.config.model.encoder.subsampling.stride
        return {**model.encoder.rnn.describe(), "output": f"{len(self.tokens)} classes, a frame each {step_ms:g} ms"}

    def build_dataset(self, split: Split) -> SpeechDataset:
        config = self.config
        return SpeechDataset(config.data, split, config.plan, config.seed, self.num_output_frames)

    def inputs(self) -> Inputs:
        data = self.config.data
        return Inputs("audio") if data.features.kind == "precomputed" else Inputs.sound(data.hop_samples)

    def num_output_frames(self, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """Output frames for so many feature frames."""
        return self.config.model.encoder.subsampling.num_frames(frames)

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        ends = batch["label_lengths"]
        rows = batch["labels"].split(ends.tolist())
        labels = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (B, U)
        logits, log_probs, lengths = model(
            batch["audio"], batch["lengths"], labels, batch["noise_keys"], batch["valid"]
        )
        lengths = lengths.clamp(min=1)  # a place that is not valid has none, which no loss takes
        kinds = (labels.int(), lengths.int(), ends.int())
        nats = rnnt_loss(logits, *kinds, blank=BLANK, reduction="none")
        paths = ctc_loss(log_probs, batch["labels"], lengths, ends, BLANK)
        count, share = float((ends * batch["valid"]).sum()), self.config.model.ctc
        output = StepOutput(
            {
                "transducer": Loss(torch.where(batch["valid"], nats, 0.0).sum(), count, "tokens", 1 - share),
                "ctc": Loss(torch.where(batch["valid"], paths, 0.0).sum(), count, "tokens", share),
            }
        )
        if wants_scores(model):
            assert isinstance(model, Transducer)
            self._score(output, batch, rows, model.decode(batch["audio"], batch["lengths"]))
        return output

    def _score(self, output: StepOutput, batch: Batch, rows: tuple[Tensor, ...], found: list[list[int]]) -> None:
        for b in batch["valid"].nonzero()[:, 0].tolist():
            reference, text = self.tokens.decode(rows[b].tolist()), self.tokens.decode(found[b])
            errors = edits(list(reference), list(text))
            add(output.metrics, errors.metrics("cer"))
            add(output.metrics, edits(reference.split(), text.split()).metrics("wer"))
            columns = {"reference": reference, "hypothesis": text}
            facts = {"seconds": round(float(batch["seconds"][b]), 3)}
            if (speaker := batch["speakers"][b]) is not None:
                facts["speaker"] = speaker
            output.rows.append(Row(batch["keys"][b], errors.total, errors.length, columns, facts=facts))


recipe = TransducerRecipe
