"""Loss spikes: a step whose loss is far above what is usual, after which a run goes back to an older checkpoint."""

import statistics

from pydantic import Field, PositiveInt

from trainer.config import Config


class SpikeConfig(Config):
    """When a run takes back what it has learnt. It does not see the samples since that checkpoint again: the plan goes
    on after the spike (Chowdhery et al. 2022, arXiv:2204.02311, section 5.1)."""

    factor: float | None = Field(None, gt=1)
    """A loss so many times the usual one is a spike; null: none is. The usual one is the median of the last steps."""
    window_steps: PositiveInt = 100
    """Steps of that median; before there were so many, nothing is a spike."""
    checkpoints_back: PositiveInt = 1
    """1: to the newest checkpoint, 2: to the one before, ..."""
    max_rollbacks: int = Field(5, ge=0)
    """Stop at the next spike after so many."""


class Spikes:
    """What was usual so far.

    Args:
        config: see there.

    Attributes:
        losses: of the last steps that were no spike; a checkpoint keeps them.
    """

    def __init__(self, config: SpikeConfig) -> None:
        self.config = config
        self.losses: list[float] = []

    @property
    def usual(self) -> float:
        """Median of the last losses."""
        return statistics.median(self.losses)

    def observe(self, loss: float) -> bool:
        """Take in the loss of a step; whether it is a spike."""
        factor, window = self.config.factor, self.config.window_steps
        if factor is None:
            return False
        if len(self.losses) >= window and loss > factor * self.usual:
            return True
        self.losses = [*self.losses, loss][-window:]
        return False
