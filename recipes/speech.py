"""Speech recognition with CTC: features, convolutional subsampling, a recurrent stack; characters, phones or subwords.

Source: Graves et al. 2006 (CTC); the shape of the model follows Amodei et al. 2016 (Deep Speech 2), arXiv:1512.02595.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from trainer.data.augment import SpecAugment
from trainer.data.dataset import Batch
from trainer.data.plan import BucketedConfig
from trainer.data.prepare import prepare
from trainer.data.speech import SpeechDataConfig, SpeechDataset, build_log_mel, build_tokens, open_prepared, vocabulary
from trainer.data.text import BLANK, PhonesConfig, Tokens
from trainer.metrics import Loss, Mean, add, edits
from trainer.models.acoustic import AcousticConfig, AcousticModel
from trainer.recipe import Inputs, Recipe, Row, RunConfig, Split, State, StepOutput
from trainer.recogniser import Recogniser


class SpeechRunConfig(RunConfig):
    """A run of the speech recipe."""

    data: SpeechDataConfig = SpeechDataConfig()
    plan: BucketedConfig = BucketedConfig()
    model: AcousticConfig = AcousticConfig()


class Speech(Recipe[SpeechRunConfig]):
    """Text or phones from audio; the best checkpoint is that of the lowest character or phone error rate."""

    monitor = "cer"
    heads = ("output", "middle_output")

    def __init__(self, config: SpeechRunConfig) -> None:
        super().__init__(config)
        if config.data.text.phones:
            self.monitor = "per"

    def prepare(self) -> None:
        prepare(self.config.data)

    @cached_property
    def tokens(self) -> Tokens:
        """Labels of the output layer."""
        return build_tokens(self.config.data, open_prepared(self.config.data))

    def build_model(self) -> AcousticModel:
        data = self.config.data
        features = build_log_mel(data, open_prepared(data))
        here = data.features.where == "model"
        return AcousticModel(self.config.model, features, len(self.tokens), here, SpecAugment(data.augment))

    def recogniser(self, weights: dict[str, Tensor], labels: dict[str, str], folder: Path) -> Recogniser:
        data = self.config.data
        tokens = vocabulary(data, labels["alphabet"], folder)
        model = AcousticModel(self.config.model, data.features.build(data.sample_rate_hz), len(tokens))
        model.load_state_dict(weights)
        return Recogniser(model, tokens, data.sample_rate_hz)

    def utterances(self, split: Split, count: int) -> list[tuple[Tensor, str]]:
        dataset = self.build_dataset(split)
        rows = range(0, len(dataset), max(1, len(dataset) // count))[:count]
        return [(torch.from_numpy(dataset.waveform(row)), dataset.text(row)) for row in rows]

    def inputs(self) -> Inputs:
        features = self.config.data.features
        if features.kind == "precomputed":
            return Inputs("audio")
        hop = round(self.config.data.sample_rate_hz * features.hop_ms / 1000)
        as_sound = ("data.features.where=model",)
        return Inputs("audio", low=-1.0, high=1.0, relative=True, frame=hop, overrides=as_sound)

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, AcousticModel)
        step_ms = self.config.data.features.hop_ms * self.config.model.subsampling.stride
        return {
            **model.rnn.describe(),
            "output": f"{len(self.tokens)} classes ({self.config.data.text.tokens.kind}), a frame each {step_ms:g} ms",
        }

    def num_output_frames(self, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """Output frames for so many feature frames."""
        return self.config.model.subsampling.num_frames(frames)

    def build_dataset(self, split: Split) -> SpeechDataset:
        config = self.config
        return SpeechDataset(config.data, split, config.plan, config.seed, self.num_output_frames)

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        log_probs, lengths, middle = model(batch["audio"], batch["lengths"], batch["noise_keys"], batch["valid"])
        tokens = float((batch["label_lengths"] * batch["valid"]).sum())
        share = self.config.model.intermediate_ctc if middle is not None else 0.0
        loss = Loss(ctc(log_probs, lengths, batch), tokens, "tokens", 1 - share)
        output = StepOutput({"ctc": loss})
        if middle is not None:
            output.losses["middle_ctc"] = Loss(ctc(middle, lengths, batch), tokens, "tokens", share)
        if not model.training:
            self._score(output, batch, log_probs, lengths)
        return output

    def _score(self, output: StepOutput, batch: Batch, log_probs: Tensor, lengths: Tensor) -> None:
        """Phone error rate where the tokens are phones, else character and word error rates."""
        kind = self.config.data.text.tokens
        references = transcripts(batch, self.tokens)
        for b, text in enumerate(greedy(log_probs, lengths, self.tokens)):
            if not batch["valid"][b]:
                continue
            reference = references[b]
            if isinstance(kind, PhonesConfig):
                wanted, got = kind.scored(reference), kind.scored(text)
                errors = edits(wanted, got)
                add(output.metrics, errors.metrics("per"))
                reference, text = " ".join(wanted), " ".join(got)
            else:
                errors = edits(list(reference), list(text))
                add(output.metrics, errors.metrics("cer"))
                add(output.metrics, edits(reference.split(), text.split()).metrics("wer"))
            add(output.metrics, {"sentence_errors": Mean(float(reference != text), 1.0)})
            output.rows.append(
                Row(
                    batch["keys"][b],
                    errors.total,
                    errors.length,
                    {"reference": reference, "hypothesis": text},
                    aligned_by="word" if isinstance(kind, PhonesConfig) else "character",
                )
            )


def ctc(log_probs: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
    """Sum of the CTC losses of the valid places, in nats (Graves et al. 2006).

    Shape:
        log_probs: (B, T, V), lengths: (B,)
    """
    lengths = lengths.clamp(min=1)  # a place that is not valid has none, which not every CTC takes
    nats = F.ctc_loss(
        log_probs.transpose(0, 1), batch["labels"], lengths, batch["label_lengths"], blank=BLANK, reduction="none"
    )
    return torch.where(batch["valid"], nats, 0.0).sum()


def greedy(log_probs: Tensor, lengths: Tensor, tokens: Tokens) -> list[str]:
    """Best path of CTC: the likeliest label of each frame, repeats merged, blanks dropped.

    Shape:
        log_probs: (B, T, V), lengths: (B,)
    """
    texts = []
    for path, n in zip(log_probs.argmax(-1).cpu(), lengths.tolist(), strict=True):
        labels = torch.unique_consecutive(path[:n]).tolist()
        texts.append(tokens.decode(labels))
    return texts


def transcripts(batch: Batch, tokens: Tokens) -> list[str]:
    """The reference text of each place of a batch."""
    labels = batch["labels"].cpu().split(batch["label_lengths"].tolist())
    return [tokens.decode(row.tolist()) for row in labels]


recipe = Speech
