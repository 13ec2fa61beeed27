"""Adding: the sum of two marked numbers of a long row, read after its last.

A net without memory answers 1 and has a squared error of 1 / 6.

Source: Arjovsky, Shah & Bengio 2016, arXiv:1511.06464; settings of Helfrich, Willmott & Ye 2018, arXiv:1707.09520.
"""

import torch
from torch import nn

from trainer.data.dataset import Batch
from trainer.data.generated import GeneratedConfig
from trainer.data.synthetic import AddingConfig, AddingDataset
from trainer.metrics import Loss
from trainer.models.readout import Readout
from trainer.models.rnn import RNNConfig
from trainer.recipe import Inputs, Recipe, RunConfig, Split, State, StepOutput


class AddingRunConfig(RunConfig):
    """A run of the adding recipe."""

    data: AddingConfig = AddingConfig()
    plan: GeneratedConfig = GeneratedConfig(micro_batch_samples=50)
    model: RNNConfig = RNNConfig()


class Adding(Recipe[AddingRunConfig]):
    """A number from numbers; the best checkpoint is that of the lowest squared error."""

    monitor = "loss"

    def build_model(self) -> Readout:
        return Readout(self.config.model, 2, 1, last=True)

    def build_dataset(self, split: Split) -> AddingDataset:
        config = self.config
        return AddingDataset(config.data, split, config.plan, config.seed)

    def inputs(self) -> Inputs:
        return Inputs("inputs")

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, Readout)
        return {**model.rnn.describe(), "chance": f"squared error {1 / 6:.3f} without memory"}

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        valid = batch["valid"]
        sums = model(batch["inputs"], batch["noise_keys"])[:, 0]  # (B,)
        errors = torch.where(valid, (sums - batch["targets"]).square(), 0.0).sum()
        return StepOutput({"squared_error": Loss(errors, float(valid.sum()), "samples")})


recipe = Adding
