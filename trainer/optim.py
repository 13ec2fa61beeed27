"""Optimizers, averages of weights, schedules.

What belongs to a weight (moments, averages) is a slot of the optimizer's state: so ZeRO partitions it and a checkpoint
saves it by name, whatever it is. After `deepspeed.initialize` nothing else may write into a parameter.
"""

import math
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from trainer.config import Config

AVERAGE = "average"
"""Slot of the average of a weight: the moving one, or that of all steps since it was triggered."""
PARAMETRIZED = ".parametrizations."
"""Part of the names that torch gives to the numbers behind a parametrised weight."""
Decay = Annotated[float, Field(ge=0, lt=1)]


class _OptimizerConfig(Config):
    lr: float = Field(1e-3, gt=0)
    """Learning rate at the top of the schedule."""
    weight_decay: float = Field(0.0, ge=0)
    """Applied to matrices only: biases, gains of normalisation and what parametrises a matrix are left alone."""
    parametrized_lr: float = Field(1.0, gt=0)
    """Learning rate of the numbers behind parametrised matrices, as a share of `lr`; 0.1 is usual for orthogonal."""
    clip_norm: float = Field(1.0, ge=0)
    """Largest norm of the whole gradient; 0 does not clip."""
    average_decay: float = Field(0.0, ge=0, lt=1)
    """Decay of the moving average of the weights that evaluation uses; 0 keeps none. It warms up: at step t it is at
    most (1 + t) / (10 + t)."""
    average_trigger: int | None = Field(None, ge=1)
    """From the validation on that is worse than the best of those more than so many validations before it, evaluation
    uses the mean of all weights since then (Merity et al. 2018, arXiv:1708.02182, algorithm 1); null: never."""

    @model_validator(mode="after")
    def _one_average(self) -> "_OptimizerConfig":
        if self.average_decay and self.average_trigger:
            raise ValueError(
                f"average_decay = {self.average_decay:g} with average_trigger = {self.average_trigger}: there is one "
                "average; set average_decay to 0, or average_trigger to null"
            )
        return self


class AdamWConfig(_OptimizerConfig):
    """Loshchilov & Hutter 2019, arXiv:1711.05101."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)

    def make(self, groups: list[dict[str, Any]]) -> "Guarded":
        """The optimizer of these parameter groups."""
        # In one pass over the memory: on a CPU that is what a step of large weights takes. A GPU would have to hold the
        # number of steps.
        fused = all(p.device.type == "cpu" for group in groups for p in group["params"]) or None
        return AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=fused)


class RMSpropConfig(_OptimizerConfig):
    """Tieleman & Hinton 2012."""

    kind: Literal["rmsprop"] = "rmsprop"
    alpha: float = Field(0.99, gt=0, lt=1)
    momentum: float = Field(0.0, ge=0, lt=1)
    eps: float = Field(1e-8, gt=0)

    def make(self, groups: list[dict[str, Any]]) -> "Guarded":
        """The optimizer of these parameter groups."""
        return RMSprop(groups, lr=self.lr, alpha=self.alpha, momentum=self.momentum, eps=self.eps)


class SGDConfig(_OptimizerConfig):
    """Stochastic gradient descent (Robbins & Monro 1951), with momentum where it is asked for."""

    kind: Literal["sgd"] = "sgd"
    momentum: float = Field(0.0, ge=0, lt=1)

    def make(self, groups: list[dict[str, Any]]) -> "Guarded":
        """The optimizer of these parameter groups."""
        return SGD(groups, lr=self.lr, momentum=self.momentum)


AnyOptimizerConfig = AdamWConfig | RMSpropConfig | SGDConfig
OptimizerConfig = Annotated[AnyOptimizerConfig, Field(discriminator="kind")]


class Guarded(torch.optim.Optimizer):
    """Mixin in front of an optimizer: refuses a non-finite step, clips, keeps the moving average.

    At ZeRO 0 the optimizer sees every gradient, and DeepSpeed neither refuses NaN nor reports a norm: `guards` is true
    and it is done here. At ZeRO 1 and above the optimizer sees flat partitions, one group at a time, and DeepSpeed
    looks at the whole gradient itself.

    Attributes:
        guards: whether to check and clip.
        clip_norm, average_decay: see the config.
        triggered: whether the mean of all weights is kept from now on.
        scale: what the gradients have been multiplied by (only where `guards`).
        refused: whether the last step was refused.
        grad_norm: of the last step, before clipping (only where `guards`).
        norms: the same of each parameter.
    """

    guards = True
    clip_norm = 0.0
    average_decay = 0.0
    triggered = False
    scale = 1.0
    refused = False
    grad_norm = 0.0
    norms: dict[torch.Tensor, torch.Tensor]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.guards:
            moved = [p for group in self.param_groups for p in group["params"]]
            for p in moved:
                if p.grad is None:  # as DeepSpeed does where it averages over ranks, so that one process does the same
                    p.grad = torch.zeros_like(p)
            grads = [p.grad for p in moved]
            if self.scale != 1:
                torch._foreach_div_(grads, self.scale)
            norms = torch._foreach_norm(grads)
            self.norms = dict(zip(moved, norms, strict=True))
            self.grad_norm = float(torch.linalg.vector_norm(torch.stack(norms)))
            self.refused = not math.isfinite(self.grad_norm)
            if self.refused:
                return
            if self.clip_norm and (scale := self.clip_norm / (self.grad_norm + 1e-6)) < 1:
                torch._foreach_mul_(grads, scale)
        super().step(closure)
        if self.average_decay or self.triggered:
            for group in filter(lambda group: group["params"], self.param_groups):  # ZeRO 3 shows one at a time
                group["steps"] += 1
                decay = min(self.average_decay, (1 + group["steps"]) / (10 + group["steps"]))
                if self.triggered:
                    decay = 1 - 1 / group["steps"]
                for p in group["params"]:
                    if AVERAGE in self.state[p]:
                        self.state[p][AVERAGE].lerp_(p, 1 - decay)
                    else:
                        self.state[p][AVERAGE] = p.clone()


class AdamW(Guarded, torch.optim.AdamW):
    """AdamW with the guard and the average."""


class RMSprop(Guarded, torch.optim.RMSprop):
    """RMSprop with the guard and the average."""


class SGD(Guarded, torch.optim.SGD):
    """SGD with the guard and the average."""


def parameter_groups(model: nn.Module, weight_decay: float, parametrized_lr: float) -> list[dict[str, Any]]:
    """Matrices, which decay; vectors; and what parametrises matrices, with a learning rate of its own. Frozen
    parameters are in none."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    plain = [(name, p) for name, p in named if PARAMETRIZED not in name]
    groups: list[dict[str, Any]] = [
        {"names": [n for n, p in plain if p.ndim > 1], "weight_decay": weight_decay, "lr_share": 1.0},
        {"names": [n for n, p in plain if p.ndim <= 1], "weight_decay": 0.0, "lr_share": 1.0},
        {"names": [n for n, p in named if PARAMETRIZED in n], "weight_decay": 0.0, "lr_share": parametrized_lr},
    ]
    by_name = dict(named)
    return [{**g, "params": [by_name[n] for n in g["names"]], "steps": 0} for g in groups if g["names"]]


def build_optimizer(config: AnyOptimizerConfig, model: nn.Module, guards: bool) -> Guarded:
    """The optimizer of a model; `guards`: whether it sees whole gradients (ZeRO 0)."""
    optimizer = config.make(parameter_groups(model, config.weight_decay, config.parametrized_lr))
    optimizer.guards = guards
    optimizer.clip_norm = config.clip_norm
    optimizer.average_decay = config.average_decay
    return optimizer


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group to its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_share"]


class _ScheduleConfig(Config):
    warmup_steps: int = Field(0, ge=0)
    """The rate rises linearly over these steps."""

    def _warmup(self, step: int) -> float:
        return min(1.0, (step + 1) / (self.warmup_steps + 1))


class CosineConfig(_ScheduleConfig):
    """Warm-up, then half a cosine down to `final` at the end of the run (Loshchilov & Hutter 2017)."""

    kind: Literal["cosine"] = "cosine"
    final: float = Field(0.0, ge=0, le=1)
    """Share of the learning rate at the end."""

    def factor(self, step: int, total_steps: int, plateau: "Plateau") -> float:
        """Share of the top rate at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return self._warmup(step)
        done = min(1.0, (step - self.warmup_steps) / max(1, total_steps - self.warmup_steps))
        return self.final + (1 - self.final) * 0.5 * (1 + math.cos(math.pi * done))


class PlateauConfig(_ScheduleConfig):
    """Warm-up, then constant; cut when validation stops getting better."""

    kind: Literal["plateau"] = "plateau"
    patience: int = Field(2, ge=1)
    """Cut after so many validations without a new best."""
    cut: float = Field(0.5, gt=0, lt=1)
    """Factor of a cut."""

    def factor(self, step: int, total_steps: int, plateau: "Plateau") -> float:
        """Share of the top rate at optimizer step `step`, counted from 0."""
        return self._warmup(step) * plateau.scale


class ConstantConfig(_ScheduleConfig):
    """Warm-up, then constant."""

    kind: Literal["constant"] = "constant"

    def factor(self, step: int, total_steps: int, plateau: "Plateau") -> float:
        """Share of the top rate at optimizer step `step`, counted from 0."""
        return self._warmup(step)


ScheduleConfig = Annotated[CosineConfig | PlateauConfig | ConstantConfig, Field(discriminator="kind")]


class Plateau:
    """What validation has shown so far: the best value, how long ago, and the cuts that followed. Lower is better."""

    def __init__(self) -> None:
        self.best: float | None = None
        self.best_step = 0
        self.since_best = 0
        self.since_cut = 0
        self.scale = 1.0
        self.values: list[float] = []
        self.triggered = False

    def observe(
        self,
        value: float,
        step: int,
        schedule: CosineConfig | PlateauConfig | ConstantConfig,
        trigger: int | None = None,
    ) -> bool:
        """Take in a validation; true if it is the best so far. A NaN never is.

        Args:
            trigger: see `average_trigger` of the optimizers.
        """
        if trigger is not None and not math.isnan(value):
            self.triggered |= len(self.values) > trigger and value > min(self.values[:-trigger])
            self.values.append(value)
        if not math.isnan(value) and (self.best is None or value < self.best):
            self.best, self.best_step, self.since_best, self.since_cut = value, step, 0, 0
            return True
        self.since_best += 1
        self.since_cut += 1
        if isinstance(schedule, PlateauConfig) and self.since_cut >= schedule.patience:
            self.scale *= schedule.cut
            self.since_cut = 0
        return False

    def state(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def restore(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
