"""Copy memory: after a long delay, write out the symbols shown at the start.

A net without memory reaches a loss of K log(S) / (delay + 2 K) nats a step for K symbols drawn from S; anything below
that line is remembered.

Source: Arjovsky, Shah & Bengio 2016, arXiv:1511.06464; settings of Helfrich, Willmott & Ye 2018, arXiv:1707.09520.
"""

import torch.nn.functional as F
from torch import nn

from trainer.data.dataset import Batch
from trainer.data.generated import GeneratedConfig
from trainer.data.synthetic import CopyingConfig, CopyingDataset
from trainer.metrics import Loss, Mean
from trainer.models.readout import Readout
from trainer.models.rnn import RNNConfig
from trainer.recipe import Recipe, RunConfig, Split, State, StepOutput, wants_scores


class CopyingRunConfig(RunConfig):
    """A run of the copying recipe."""

    data: CopyingConfig = CopyingConfig()
    plan: GeneratedConfig = GeneratedConfig()
    model: RNNConfig = RNNConfig()


class Copying(Recipe[CopyingRunConfig]):
    """Symbols from symbols; the best checkpoint is that of the lowest cross-entropy."""

    monitor = "loss"

    def build_model(self) -> Readout:
        num_symbols = self.config.data.num_symbols
        return Readout(self.config.model, num_symbols + 2, num_symbols + 1)

    def build_dataset(self, split: Split) -> CopyingDataset:
        config = self.config
        return CopyingDataset(config.data, split, config.plan, config.seed)

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, Readout)
        chance = f"{self.config.data.chance:.4f} nats a step without memory"
        return {**model.rnn.describe(), "chance": chance}

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        config, valid = self.config.data, batch["valid"]
        x = F.one_hot(batch["inputs"], config.num_symbols + 2).float()  # (B, T, D)
        logits = model(x, batch["noise_keys"])  # (B, T, V)
        targets = batch["targets"].masked_fill(~valid[:, None], -100)  # what cross_entropy leaves out
        nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
        output = StepOutput({"copy": Loss(nats, float(valid.sum() * config.frames), "frames")})
        if wants_scores(model):
            asked = targets[:, -config.num_recalled :]
            right = (logits[:, -config.num_recalled :].argmax(-1) == asked).sum()
            output.metrics["recalled"] = Mean(float(right), float(valid.sum() * config.num_recalled))
        return output


recipe = Copying
