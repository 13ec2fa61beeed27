"""Pictures a pixel or some at a time, line by line or in one random order: the class is read after the last.

Source: Le, Jaitly & Hinton 2015, arXiv:1504.00941; settings of Helfrich, Willmott & Ye 2018, arXiv:1707.09520.
"""

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import nn

from trainer.data.dataset import Batch
from trainer.data.generated import GeneratedConfig
from trainer.data.images import CLASSES, ImagesConfig, ImagesDataset
from trainer.data.parallel import Display
from trainer.metrics import Loss, Mean
from trainer.models.readout import Readout
from trainer.models.rnn import RNNConfig
from trainer.recipe import Inputs, Recipe, Row, RunConfig, Split, State, StepOutput, wants_scores


class PixelsRunConfig(RunConfig):
    """A run of the pixels recipe."""

    data: ImagesConfig = ImagesConfig()
    plan: GeneratedConfig = GeneratedConfig(micro_batch_samples=50)
    model: RNNConfig = RNNConfig()


class Pixels(Recipe[PixelsRunConfig]):
    """Classes from pixels; the best checkpoint is that of the lowest share of errors."""

    monitor = "error"

    def prepare(self) -> None:
        with Display(Console()) as progress:
            self.config.data.corpus.fetch(self.config.data.path, progress)

    def build_model(self) -> Readout:
        return Readout(self.config.model, self.config.data.pixels_per_frame, CLASSES, last=True)

    def build_dataset(self, split: Split) -> ImagesDataset:
        config = self.config
        return ImagesDataset(config.data, split, config.plan, config.seed)

    def inputs(self) -> Inputs:
        return Inputs("inputs", low=0.0, high=1.0)

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, Readout)
        return model.rnn.describe()

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        valid, targets = batch["valid"], batch["targets"]
        logits = model(batch["inputs"], batch["noise_keys"])  # (B, V)
        nats = torch.where(valid, F.cross_entropy(logits, targets, reduction="none"), 0.0).sum()
        count = float(valid.sum())
        output = StepOutput({"classes": Loss(nats, count, "samples")})
        if wants_scores(model):
            guesses = logits.argmax(-1)
            output.metrics["error"] = Mean(float(((guesses != targets) & valid).sum()), count)
            output.rows = [
                Row(key, float(guess != target), 1.0, {"class": str(target), "guess": str(guess)})
                for key, guess, target in zip(batch["keys"], guesses.tolist(), targets.tolist(), strict=True)
                if key
            ]
        return output


recipe = Pixels
