"""Tasks that ask for memory and nothing else: copying and adding over long delays.

Sample i is a function of the seed and of i.

Sources: Hochreiter & Schmidhuber 1997, as in Arjovsky, Shah & Bengio 2016, arXiv:1511.06464; where the marker of the
copying task stands follows the code of Helfrich, Willmott & Ye 2018, arXiv:1707.09520.
"""

import math
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from trainer import keyed
from trainer.config import Config
from trainer.data.generated import GeneratedConfig, GeneratedDataset, GeneratedPlan

Split = Literal["train", "valid", "test"]
BLANK = 0


class _SyntheticConfig(Config):
    num_train: PositiveInt = 20_000
    """Samples of the training split, the same in each epoch."""
    num_valid: PositiveInt = 200
    num_test: PositiveInt = 1000

    def plan(self, split: Split, plan: GeneratedConfig, frames: int, seed: int) -> GeneratedPlan:
        """The plan of a split."""
        return GeneratedPlan(plan, getattr(self, f"num_{split}"), frames, seed, shuffle=split == "train")


class CopyingConfig(_SyntheticConfig):
    """Remember some symbols over a delay."""

    delay_steps: PositiveInt = 1000
    """T: steps between the last symbol shown and the first one asked for."""
    num_symbols: PositiveInt = 8
    num_recalled: PositiveInt = 10

    @property
    def frames(self) -> int:
        return self.delay_steps + 2 * self.num_recalled

    @property
    def chance(self) -> float:
        """Cross-entropy, in nats a step, of a net that remembers nothing and knows when it is asked."""
        return self.num_recalled * math.log(self.num_symbols) / self.frames


class CopyingDataset(GeneratedDataset):
    """Batches with `inputs` and `targets` (B, T + 2 K) int64.

    A row shows K symbols from 1 to S, then blanks (0), and the marker S + 1 at the step before the first of the last K.
    The target is blank, and at the last K steps what was shown.
    """

    def __init__(self, config: CopyingConfig, split: Split, plan: GeneratedConfig, seed: int) -> None:
        self.config, self.split, self.seed = config, split, seed
        facts = config.model_dump(exclude={"num_train", "num_valid", "num_test"})
        super().__init__(config.plan(split, plan, config.frames, seed), f"copying {facts}, seed {seed}")

    def tensors(self, samples: NDArray[np.int64]) -> dict[str, Tensor]:
        config = self.config
        drawn = keyed.table(samples, config.num_recalled, self.seed, self.split, "copying")
        symbols = torch.from_numpy((drawn * config.num_symbols).astype(np.int64) + 1)
        inputs = torch.full((len(samples), config.frames), BLANK)
        targets = inputs.clone()
        inputs[:, : config.num_recalled] = symbols
        inputs[:, -config.num_recalled - 1] = config.num_symbols + 1
        targets[:, -config.num_recalled :] = symbols
        return {"inputs": inputs, "targets": targets}


class AddingConfig(_SyntheticConfig):
    """Add two marked numbers of a long row."""

    length_steps: int = Field(200, ge=4)
    num_train: PositiveInt = 100_000


class AddingDataset(GeneratedDataset):
    """Batches with `inputs` (B, T, 2), numbers in [0, 1) and marks 0 or 1, and `targets` (B,), the sum of the marked.

    One mark is in the first half, one in the second. The mean of the targets is 1 and their variance 1 / 6: the error
    of a net that remembers nothing.
    """

    def __init__(self, config: AddingConfig, split: Split, plan: GeneratedConfig, seed: int) -> None:
        self.config, self.split, self.seed = config, split, seed
        super().__init__(
            config.plan(split, plan, config.length_steps, seed), f"adding {config.length_steps}, seed {seed}"
        )

    def tensors(self, samples: NDArray[np.int64]) -> dict[str, Tensor]:
        steps = self.config.length_steps
        half = (steps - 1) // 2
        drawn = keyed.table(samples, steps + 2, self.seed, self.split, "adding")
        numbers, places = drawn[:, :steps].astype(np.float32), drawn[:, steps:]
        first = (places[:, 0] * half).astype(np.int64)
        second = half + (places[:, 1] * (steps - half)).astype(np.int64)
        marks = np.zeros_like(numbers)
        rows = np.arange(len(samples))
        marks[rows, first] = marks[rows, second] = 1
        targets = numbers[rows, first] + numbers[rows, second]
        return {"inputs": torch.from_numpy(np.stack([numbers, marks], -1)), "targets": torch.from_numpy(targets)}
