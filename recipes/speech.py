"""Speech recognition with CTC: features, convolutional subsampling, a recurrent stack; characters, phones or subwords.

Source: Graves et al. 2006 (CTC); the shape of the model follows Amodei et al. 2016 (Deep Speech 2), arXiv:1512.02595.
"""

import logging
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from kernels.ctc import ctc_loss
from trainer.config import Free
from trainer.data import columns
from trainer.data.audio import AudioError
from trainer.data.augment import SpecAugment
from trainer.data.buckets import BucketedConfig
from trainer.data.dataset import Batch, Dataset, Media
from trainer.data.prepare import prepare
from trainer.data.prepared import SpeechDataConfig, build_log_mel, build_tokens, open_prepared, vocabulary
from trainer.data.speech import SpeechDataset
from trainer.data.text import BLANK, PhonesConfig, Tokens, UnknownCharacterError
from trainer.decoding import Decoder, DecoderConfig, GreedyConfig
from trainer.decoding.alignment import words
from trainer.decoding.language_models import Source
from trainer.metrics import Loss, Mean, add, edits
from trainer.models.acoustic import AcousticConfig, AcousticModel
from trainer.recipe import Inputs, Recipe, Row, RunConfig, Split, State, StepOutput, wants_scores
from trainer.recogniser import Recogniser

log = logging.getLogger(__name__)


class SpeechRunConfig(RunConfig):
    """A run of the speech recipe."""

    data: SpeechDataConfig = SpeechDataConfig()
    plan: BucketedConfig = BucketedConfig()
    model: AcousticConfig = AcousticConfig()
    decoder: Free[DecoderConfig] = GreedyConfig()
    """How validation and evaluation get from probabilities to text."""


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
        decoder = None if self.config.decoder.kind == "greedy" else self._build_decoder(tokens)
        return Recogniser(model, tokens, data.sample_rate_hz, decoder)

    @torch.inference_mode()
    def media(self, model: nn.Module, dataset: Dataset, key: str) -> Media:
        assert isinstance(dataset, SpeechDataset)
        sound = dataset.clip(key).to(next(model.parameters()).device)
        log_probs, _, _ = model(sound[None], torch.tensor([len(sound)], device=sound.device))
        return replace(dataset.media(key), outputs=log_probs[0].exp().T.cpu().numpy(), classes=tuple(self.tokens.names))

    def utterances(self, split: Split, count: int) -> list[tuple[Tensor, str]]:
        dataset = self.build_dataset(split)
        found = []
        for row in range(0, len(dataset), max(1, len(dataset) // count))[:count]:
            try:
                found.append((torch.from_numpy(dataset.waveform(row)), dataset.text(row)))
            except (AudioError, UnknownCharacterError) as error:
                log.warning("%s (%s) is left out: %s", dataset.index.keys[row], split, error)
        return found

    def inputs(self) -> Inputs:
        data = self.config.data
        return Inputs("audio") if data.features.kind == "precomputed" else Inputs.sound(data.hop_samples)

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

    @cached_property
    def decoder(self) -> Decoder:
        """What the configuration says of decoding; may be replaced.

        Raises:
            UserError: its language model cannot be had, or does not fit.
        """
        return self._build_decoder(self.tokens)

    def _build_decoder(self, tokens: Tokens) -> Decoder:
        """The corpus is opened only where the language model is made from its transcripts."""
        folder = columns.folder_for(self.config.data.path / "train")
        return self.config.decoder.build(Source(tokens, lambda: self.build_dataset("train"), folder))

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        log_probs, lengths, middle = model(batch["audio"], batch["lengths"], batch["noise_keys"], batch["valid"])
        tokens = float((batch["label_lengths"] * batch["valid"]).sum())
        share = self.config.model.intermediate_ctc if middle is not None else 0.0
        loss = Loss(ctc(log_probs, lengths, batch), tokens, "tokens", 1 - share)
        output = StepOutput({"ctc": loss})
        if middle is not None:
            output.losses["middle_ctc"] = Loss(ctc(middle, lengths, batch), tokens, "tokens", share)
        if wants_scores(model):
            self._score(output, batch, log_probs, lengths)
        return output

    def _score(self, output: StepOutput, batch: Batch, log_probs: Tensor, lengths: Tensor) -> None:
        """Phone error rate where the tokens are phones, else character and word error rates."""
        kind = self.config.data.text.tokens
        references = transcripts(batch, self.tokens)
        frame_seconds = self.config.data.features.hop_ms * self.config.model.subsampling.stride / 1000
        valid = batch["valid"].nonzero()[:, 0].tolist()
        for b, labels in zip(valid, self.decoder(log_probs[valid], lengths[valid]), strict=True):
            reference, text = self.scored(references[b]), self.scored(self.tokens.decode(labels))
            if isinstance(kind, PhonesConfig):
                errors = edits(reference.split(), text.split())
                add(output.metrics, errors.metrics("per"))
            else:
                errors = edits(list(reference), list(text))
                add(output.metrics, errors.metrics("cer"))
                add(output.metrics, edits(reference.split(), text.split()).metrics("wer"))
            add(output.metrics, {"sentence_errors": Mean(float(reference != text), 1.0)})
            heard = words(log_probs[b, : lengths[b]], labels, self.tokens, frame_seconds)
            facts = {"seconds": round(float(batch["seconds"][b]), 3), "words": [asdict(word) for word in heard]}
            if (speaker := batch["speakers"][b]) is not None:
                facts["speaker"] = speaker
            output.rows.append(
                Row(
                    batch["keys"][b],
                    errors.total,
                    errors.length,
                    {"reference": reference, "hypothesis": text},
                    aligned_by="word" if isinstance(kind, PhonesConfig) else "character",
                    facts=facts,
                )
            )

    def scored(self, text: str) -> str:
        """A text as errors are counted in it."""
        kind = self.config.data.text.tokens
        return " ".join(kind.scored(text)) if isinstance(kind, PhonesConfig) else text


def ctc(log_probs: Tensor, lengths: Tensor, batch: Batch) -> Tensor:
    """Sum of the CTC losses of the valid places, in nats (Graves et al. 2006).

    Shape:
        log_probs: (B, T, V), lengths: (B,)
    """
    lengths = lengths.clamp(min=1)  # a place that is not valid has none, which not every CTC takes
    nats = ctc_loss(log_probs, batch["labels"], lengths, batch["label_lengths"], BLANK)
    return torch.where(batch["valid"], nats, 0.0).sum()


def transcripts(batch: Batch, tokens: Tokens) -> list[str]:
    """The reference text of each place of a batch."""
    labels = batch["labels"].cpu().split(batch["label_lengths"].tolist())
    return [tokens.decode(row.tolist()) for row in labels]


recipe = Speech
