"""Where a run stands."""

from dataclasses import dataclass, field


@dataclass
class Position:
    """Where a run stands: what a checkpoint holds besides tensors."""

    step: int = 0
    """Steps of the plan that are done; also the name of the checkpoint."""
    epoch: int = 0
    step_in_epoch: int = 0
    applied_steps: int = 0
    """Optimizer steps that were not refused: the clock of the schedule."""
    refused_steps: int = 0
    rescaled_steps: int = 0
    """Steps that were refused because the loss was scaled up too much (fp16): nobody's fault."""
    taken_back: list[list[int]] = field(default_factory=list)
    """Steps whose effect was taken back after a spike, as [first, last] of each time."""
    total_steps: int = 0
    """Length of the schedule, fixed when the run began."""
    excluded: list[str] = field(default_factory=list)
    """Keys left out of this epoch."""
    bad: list[str] = field(default_factory=list)
    """Keys found to be bad: left out from the next epoch on."""
    known: list[str] = field(default_factory=list)
    """Keys that were bad before this run (`RunConfig.quarantine`): left out like those, but no part of the budget."""
    missing: int = 0
    """Samples of this epoch that did not come from where they lie."""
    audio_seconds: float = 0.0
    """Sound trained on so far."""
    train_seconds: float = 0.0
    """Wall time of all steps so far."""
    validation_due: int | None = None
    """Epoch that the validation of this step belongs to, which a signal came before: the run begins with it."""

    def left_out_later(self) -> list[str]:
        """Keys left out of the next epoch, as far as is known now."""
        return sorted({*self.bad, *self.known})
