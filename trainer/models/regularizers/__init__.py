"""Regularisers of a recurrent stack: noise, dropout, norms; all off by default, in any combination, in every recipe.

    noise.py         Gaussian noise on input, state, weights, gradients, and how it decays
    dropout.py       masks a frame, a sequence, a step; zoneout; max-norm
    fast_dropout.py  dropout by moments, without sampling
    penalties.py     what weights and states add to the loss

What is sampled is a function of (seed, epoch, sample, layer) or of (seed, step, weight), never of a running state, and
is there in training only. Kernels take masks of a sequence, zoneout, disturbed weights, and noise of the state as a
part of the pre-activation; the rest runs on the reference loop, which a line in the log says.
"""

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor, nn

from trainer import keyed
from trainer.config import Config
from trainer.models.regularizers.dropout import (
    Drawn,
    DropoutConfig,
    Rate,
    VariationalConfig,
    bounded_rows,
    connections,
    drop,
    keep,
)
from trainer.models.regularizers.fast_dropout import FastDropoutConfig
from trainer.models.regularizers.noise import (
    Clock,
    ConstantDecayConfig,
    DecayConfig,
    NoiseConfig,
    Std,
    gaussian,
    of_step,
)
from trainer.models.regularizers.penalties import (
    LaterPenaltiesConfig,
    NormsConfig,
    activation_losses,
    of_states,
    penalises_weights,
    regularizers_of,
    weight_penalty,
)

__all__ = [
    "Drawn",
    "Regularizer",
    "RegularizersConfig",
    "activation_losses",
    "at_step",
    "penalises_weights",
    "weight_penalty",
]


class LaterConfig(LaterPenaltiesConfig):
    """Regularisers that are younger than the paper of 2014."""

    gradient_noise: Std = 0.0
    """Standard deviation of noise on every gradient before clipping (Neelakantan et al. 2015, arXiv:1511.06807, whose
    decay is {kind: power, power: 0.55})."""
    decay: DecayConfig = ConstantDecayConfig()
    """Of the gradient noise."""
    variational: VariationalConfig = VariationalConfig()
    recurrent_dropout: Rate = 0.0
    """Of what a gated cell would write into its state, anew at each frame (Semeniuta et al. 2016, arXiv:1603.05118)."""
    zoneout: Rate = 0.0
    """Probability that a unit keeps its last h (Krueger et al. 2017, arXiv:1606.01305); evaluation takes the mean."""
    zoneout_cell: Rate = 0.0
    """The same of an LSTM's c."""


class RegularizersConfig(Config):
    """Everything is off by default and goes together with the rest, unless `RNNConfig` says no."""

    noise: NoiseConfig = NoiseConfig()
    dropout: DropoutConfig = DropoutConfig()
    norms: NormsConfig = NormsConfig()
    max_norm: PositiveFloat | None = Field(None)
    """Largest Euclidean norm of the weights into a unit, of input and of each recurrent matrix apart; null: none."""
    fast_dropout: FastDropoutConfig | None = None
    later: LaterConfig = LaterConfig()

    def refusal(self, cell: str, plain: bool) -> str | None:
        """Why a choice cannot go with this cell or stack, with the cure; None if it can.

        Args:
            cell: kind of the cell, "rnn_..." with its activation.
            plain: whether the stack has one direction, no normalisation and no residuals.
        """
        later, gated = self.later, cell in ("gru", "gru_original", "lstm")
        if later.recurrent_dropout and not gated:
            return f"later.recurrent_dropout = {later.recurrent_dropout} with a cell without gates: take a gru or lstm"
        if later.zoneout_cell and cell != "lstm":
            return f"later.zoneout_cell = {later.zoneout_cell} with a {cell}: only an lstm has a c; take later.zoneout"
        if self.fast_dropout is None:
            return None
        if cell not in ("rnn_tanh", "rnn_relu"):
            return f"fast_dropout with a {cell}: moments are known for cell = {{kind: rnn, activation: tanh or relu}}"
        if not plain:
            return "fast_dropout: take norm = none, directions = forward, residual = false: others have no moments here"
        sampled = {
            "noise.hidden": self.noise.hidden,
            "dropout.hidden": self.dropout.hidden,
            "later.variational.hidden": later.variational.hidden,
            "later.variational.output": later.variational.output,
            "later.zoneout": later.zoneout,
        }
        if wrong := [name for name, value in sampled.items() if value]:
            return f"fast_dropout with {' and '.join(wrong)}: the state is a distribution there; leave out either"
        return None

    def active(self) -> dict[str, object]:
        """What is on: values by dotted name."""
        default = RegularizersConfig().model_dump()

        def differing(here: dict[str, object], there: dict[str, object], at: str) -> dict[str, object]:
            found: dict[str, object] = {}
            for name, value in here.items():
                other = there.get(name) if isinstance(there, dict) else None
                if isinstance(value, dict) and name != "decay" and isinstance(other, dict):
                    found |= differing(value, other, f"{at}{name}.")
                elif value != other:
                    found[f"{at}{name}"] = value
            return found

        return differing(self.model_dump(), default, "")


class Regularizer(nn.Module):
    """What one stack draws, and the penalties of its states.

    Attributes:
        clock: set by `at_step`.
    """

    def __init__(self, config: RegularizersConfig, num_layers: int) -> None:
        super().__init__()
        self.config, self.num_layers = config, num_layers
        self.clock = Clock()
        later = config.later
        self.watches = any((later.norm_stabilizer, later.activation, later.temporal_activation))
        self._activations: Tensor | None = None

    @property
    def step(self) -> int:
        return self.clock.step

    def input(self, x: Tensor, noise_keys: Tensor | None) -> Tensor:
        """The stack's input (B, T, D), disturbed."""
        self._activations = None
        if not self.training or noise_keys is None:
            return x
        config = self.config
        x = drop(x, config.dropout.input, "rnn.input", noise_keys)
        x = drop(x, config.later.variational.input, "rnn.input.sequence", noise_keys, per_sequence=True)
        if std := self._std(config.noise.input):
            noise = gaussian(keyed.fold(noise_keys, "rnn.input.noise"), *x.shape[1:])
            x = x + std * noise.to(x.device, x.dtype)
        return x

    def draw(self, layer: int, x: Tensor, width: int, noise_keys: Tensor | None, gated: bool) -> Drawn:
        """What disturbs a layer.

        Args:
            layer: its number.
            width: R H, its units in all directions.

        Shape:
            x: (T, B, D), the layer's input
        """
        config, later = self.config, self.config.later
        zoneout = (later.zoneout, later.zoneout_cell)
        if not self.training or noise_keys is None:
            return Drawn(zoneout=zoneout)

        def seeds(what: str) -> list[int]:
            return keyed.fold(noise_keys, f"rnn.{layer}.{what}")

        frames = (len(x), width)
        drawn = Drawn(zoneout=zoneout)
        if any(zoneout):
            drawn.keys = noise_keys.new_tensor(seeds("zoneout"))
        if rate := later.variational.hidden:
            drawn.mask = keep(rate, seeds("state.sequence"), width)
        if rate := config.dropout.hidden:
            each = keep(rate, seeds("state"), *frames).transpose(0, 1)
            drawn.mask = each if drawn.mask is None else each * drawn.mask
        if std := self._std(config.noise.hidden):
            drawn.noise = std * gaussian(seeds("state.noise"), *frames).transpose(0, 1)
        if (rate := later.recurrent_dropout) and gated:
            drawn.update = keep(rate, seeds("update"), *frames).transpose(0, 1)
        dtype = torch.promote_types(x.dtype, torch.float32)  # kernels carry the state in float32 under any precision
        for name in ("mask", "noise", "update"):
            if (value := getattr(drawn, name)) is not None:
                setattr(drawn, name, value.to(x.device, dtype))
        return drawn

    def output(self, layer: int, y: Tensor, noise_keys: Tensor | None) -> Tensor:
        """A layer's output (B, T, R H), with one mask a sequence."""
        if not self.training or noise_keys is None:
            return y
        rate = self.config.later.variational.output
        return drop(y, rate, f"rnn.{layer}.output.sequence", noise_keys, per_sequence=True)

    def weights(self, weight: Tensor, name: str, recurrent: bool, sparse: bool = False) -> Tensor:
        """A weight as a forward pass sees it: within its largest norm, and disturbed.

        Args:
            name: tells this weight from the others of the stack.
            sparse: what is 0 lies off the structure.
        """
        config = self.config
        if config.max_norm is not None:
            diagonal = recurrent and weight.ndim == 2  # one weight into each unit
            weight = bounded_rows(weight[..., None] if diagonal else weight, config.max_norm).view_as(weight)
        if not self.training:
            return weight
        if std := self._std(config.noise.weights):
            noise = std * of_step(self.clock, name, weight)
            weight = weight + (noise * (weight != 0) if sparse else noise)
        if recurrent and config.dropout.connections:
            weight = connections(weight, config.dropout.connections, self.clock, name)
        return weight

    def watch(self, layer: int, h: Tensor, output: Tensor, lengths: Tensor | None) -> None:
        """Take in a layer's states (B, T, H) and its output after dropout, for their penalties."""
        if self.watches and self.training:
            rows = of_states(self.config.later, h, output, lengths, layer == self.num_layers - 1)
            self._activations = rows if self._activations is None else self._activations + rows

    def take_activations(self) -> Tensor | None:
        """(B,) the penalty of the last forward pass for each row, once."""
        rows, self._activations = self._activations, None
        return rows

    def _std(self, std: float) -> float:
        return std * self.config.noise.decay.factor(self.clock.step)


def at_step(model: nn.Module, seed: int, step: int) -> None:
    """Tell a model which step it is in; every rank, before each step."""
    for regularizer in regularizers_of(model):
        regularizer.clock.seed, regularizer.clock.step = seed, step
