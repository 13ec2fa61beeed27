"""A stack of recurrent layers over time: structure x cell, directions, normalisation, residuals, regularisers.

The stack takes padded batches with lengths. It transposes to time-major once, and padding never reaches a real frame:
the backward direction starts at each row's own last frame.
"""

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from kernels.moments import dropout
from trainer.config import Config
from trainer.models.cells import GATES, CellConfig, LSTMConfig
from trainer.models.initialization import (
    ROTATIONS,
    DefaultConfig,
    IdentityConfig,
    InitializationConfig,
    InputInitializationConfig,
)
from trainer.models.normalization import KeyedDropout, LayerScale, NormKind, build_norm, frame_mask
from trainer.models.parametrizations import ORTHOGONAL, FreeConfig, ParametrizationConfig
from trainer.models.recurrence import Layer, RecurrentLayer, State
from trainer.models.regularizers import Regularizer, RegularizersConfig
from trainer.models.regularizers import fast_dropout as moments
from trainer.models.structure import DenseConfig, StructureConfig


class RNNConfig(Config):
    """A stack of equal recurrent layers."""

    hidden_size: PositiveInt = 256
    """H, units a direction."""
    last_size: PositiveInt | None = None
    """Units of the last layer, where they are others; null: H too."""
    num_layers: PositiveInt = 3
    cell: CellConfig = LSTMConfig()
    structure: StructureConfig = DenseConfig()
    """Of the recurrent matrices: which of their entries exist."""
    parametrization: ParametrizationConfig = FreeConfig()
    """Of the recurrent matrices: what is trained, and how they follow from it."""
    initialization: InitializationConfig = DefaultConfig()
    """Of the recurrent matrices."""
    input_range: PositiveFloat | None = None
    """Weights of the input start uniform in +- this; null: 1 / sqrt(hidden_size)."""
    input_initialization: InputInitializationConfig = DefaultConfig()
    """Of the input weights, in place of `input_range`."""
    directions: Literal["forward", "concat", "sum"] = "forward"
    """forward alone, or both: concatenated to 2 H, or added to H."""
    norm: NormKind = "layer"
    """Of each layer's input."""
    residual: bool = False
    """Add a layer's input to its output where their sizes agree."""
    residual_scale: PositiveFloat | None = None
    """Where learned factors on what is added start (LayerScale, Touvron et al. 2021), 0.1 for a hundred layers; null:
    none."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of each layer's output."""
    regularizers: RegularizersConfig = RegularizersConfig()
    """Noise, dropout of other kinds, norms; see docs/regularizers.md."""

    @model_validator(mode="after")
    def _choices_fit(self) -> "RNNConfig":
        kind, size = self.structure.kind, self.hidden_size
        num_blocks = getattr(self.structure, "num_blocks", 1)
        if size % num_blocks:
            raise ValueError(f"structure.num_blocks = {num_blocks} does not divide hidden_size = {size}; change either")
        if self.last_size is not None and self.last_size % num_blocks:
            raise ValueError(
                f"structure.num_blocks = {num_blocks} does not divide last_size = {self.last_size}; change either"
            )
        if (width := getattr(self.structure, "half_width", 0)) >= min(size, self.last_size or size):
            raise ValueError(f"structure.half_width = {width} with hidden_size = {size}: wanted less than that")
        rule, start = self.parametrization.kind, self.initialization.kind
        if rule != "free" and kind in ("banded", "low_rank", "sparse"):
            cure = "take dense, block_diagonal, permuted_block_diagonal or diagonal, or parametrization.kind = free"
            raise ValueError(f"parametrization.kind = {rule} with structure.kind = {kind}: needs whole blocks; {cure}")
        if rule == "spectral_radius" and kind == "permuted_block_diagonal":
            raise ValueError(
                f"parametrization.kind = {rule} with structure.kind = {kind}: the radii of the blocks do not bound "
                "that of the permuted matrix; take spectral_norm, or structure.kind = block_diagonal"
            )
        if rule in ORTHOGONAL:
            if kind == "diagonal" or (kind != "dense" and num_blocks == size):
                raise ValueError(
                    f"parametrization.kind = {rule} with structure.kind = {kind}: one number has nothing to "
                    "rotate; take blocks of at least two units, or parametrization.kind = bounded"
                )
            if start not in ROTATIONS:
                raise ValueError(
                    f"initialization.kind = {start} with parametrization.kind = {rule}: is not orthogonal; take one of "
                    + ", ".join(ROTATIONS)
                )
            if isinstance(self.initialization, IdentityConfig) and self.initialization.scale != 1:
                scale = self.initialization.scale
                raise ValueError(f"initialization.scale = {scale} with parametrization.kind = {rule}: wanted 1")
        if (start, kind) in (("orthogonal", "banded"), ("orthogonal", "sparse"), ("rotations", "sparse")):
            cure = "what lies off the structure is missing, and the rest is no rotation; take sparse_radius"
            raise ValueError(f"initialization.kind = {start} with structure.kind = {kind}: {cure}")
        if start != "default" and kind == "low_rank":
            raise ValueError(f"initialization.kind = {start} with structure.kind = low_rank: take default")
        if self.input_range is not None and self.input_initialization.kind != "default":
            drawn = self.input_initialization.kind
            raise ValueError(f"input_range = {self.input_range} with input_initialization.kind = {drawn}: take one")
        if self.residual_scale is not None and not self.residual:
            raise ValueError(
                f"residual_scale = {self.residual_scale} with residual = false: nothing is added; set it true"
            )
        plain = self.norm == "none" and self.directions == "forward" and not self.residual
        if refusal := self.regularizers.refusal(self.cell.name, plain):
            raise ValueError(f"regularizers.{refusal}")
        return self

    @property
    def output_size(self) -> int:
        """Width of the stack's output."""
        return (self.last_size or self.hidden_size) * (2 if self.directions == "concat" else 1)

    def of_layer(self, number: int) -> "RNNConfig":
        """Of a layer by itself."""
        if self.last_size is None:
            return self
        size = self.last_size if number == self.num_layers - 1 else self.hidden_size
        return self.model_copy(update={"hidden_size": size, "last_size": None})

    def build(self, input_size: int) -> "RNN":
        return RNN(self, input_size)


class RNN(nn.Module):
    """The stack; each layer is norm -> recurrence -> dropout (-> scale) (+ input), disturbed as `config.regularizers`
    says.

    Args:
        config: see there.
        input_size: D.

    Shape:
        x: (B, T, D), lengths: (B,), or None where all rows have T frames; noise_keys: (B,) int64 or None
        returns: (B, T, output_size) with zeros past each length; with `all_layers`, also a list of every layer's
        hidden sequence (B, T, H or 2 H) before residual and dropout

    Attributes:
        variance: with fast dropout, (B, T, H) of the output that was returned last, which then is a mean.
    """

    variance: Tensor | None = None

    def __init__(self, config: RNNConfig, input_size: int) -> None:
        super().__init__()
        self.config = config
        self.regularizer = Regularizer(config.regularizers, config.num_layers)
        fast = config.regularizers.fast_dropout
        self.norms, self.layers, self.dropouts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        self.scales = nn.ModuleList()
        size = input_size
        for i in range(config.num_layers):
            self.norms.append(build_norm(config.norm, size))
            flags = [False] if config.directions == "forward" else [False, True]
            own = config.of_layer(i)
            ways = [RecurrentLayer(own, size, flag, self.regularizer, f"{i}.{w}") for w, flag in enumerate(flags)]
            self.layers.append(Layer(ways) if fast is None else moments.MomentLayer(ways[0], fast))
            self.dropouts.append(KeyedDropout(config.dropout, f"rnn.{i}"))
            before, size = size, own.hidden_size * (len(flags) if config.directions == "concat" else 1)
            scaled = config.residual_scale is not None and before == size
            self.scales.append(LayerScale(size, config.residual_scale or 1.0) if scaled else nn.Identity())
        self.final_norm = build_norm(config.norm, size)

    def forward(
        self, x: Tensor, lengths: Tensor | None, noise_keys: Tensor | None = None, all_layers: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        if self.config.regularizers.fast_dropout is not None:
            return self._propagate(x, lengths, noise_keys)
        x, hidden, _ = self.carry(x, lengths, None, noise_keys, all_layers)
        return x, hidden

    def carry(
        self,
        x: Tensor,
        lengths: Tensor | None,
        states: Sequence[State] | None,
        noise_keys: Tensor | None = None,
        all_layers: bool = False,
    ) -> tuple[Tensor, list[Tensor], list[State]]:
        """The same of a part of a stream: from the last states of the part before, to its own.

        Args:
            states: of each layer, which have one direction; None for zeros.

        Returns:
            also the last state of each layer's first direction.
        """
        mask = None if lengths is None else frame_mask(lengths, x.shape[1])
        hidden: list[Tensor] = []
        carried: list[State] = []
        gated = self.config.cell.kind != "rnn"
        given: Sequence[State | None] = states or [None] * len(self.layers)
        stack = zip(self.norms, self.layers, self.dropouts, given, strict=True)
        frames = None if mask is None else mask.T
        # From here on x lies in memory as (T, B, D), whichever way it is looked at.
        x = x.transpose(0, 1).contiguous().transpose(0, 1)
        for i, (norm, layer, drop, state) in enumerate(stack):
            inputs = norm(x.transpose(0, 1), frames)
            if not i:
                inputs = self.regularizer.input(inputs.transpose(0, 1), noise_keys).transpose(0, 1).contiguous()
            width = self.config.of_layer(i).hidden_size * len(layer)  # type: ignore[arg-type]
            y, last = layer(inputs, lengths, self.regularizer.draw(i, inputs, width, noise_keys, gated), state)
            carried.append(last[0])
            if self.config.directions == "sum":
                y = y.unflatten(-1, (2, -1)).sum(-2)
            y = y.transpose(0, 1)  # (B, T, H)
            if all_layers:
                hidden.append(y)
            clean, y = y, self.regularizer.output(i, drop(y, noise_keys), noise_keys)
            self.regularizer.watch(i, clean, y, lengths)
            y = self.scales[i](y)
            x = x + y if self.config.residual and x.shape == y.shape else y
        x = self.final_norm(x.transpose(0, 1), frames).transpose(0, 1)
        return x if mask is None else x * mask[..., None], hidden, carried

    def _propagate(self, x: Tensor, lengths: Tensor | None, noise_keys: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Means and variances instead of samples; the mean is returned, and for each layer."""
        fast = self.config.regularizers.fast_dropout
        assert fast is not None
        mean = self.regularizer.input(x, noise_keys).transpose(0, 1)
        mean, variance = dropout(mean, torch.zeros_like(mean), fast.input)
        hidden = []
        for i, layer in enumerate(self.layers):
            mean, variance = layer(mean, variance)
            hidden.append(mean.transpose(0, 1))
            rate = fast.hidden if i < len(self.layers) - 1 else fast.output
            mean, variance = dropout(mean, variance, rate)
            self.regularizer.watch(i, hidden[-1], mean.transpose(0, 1), lengths)
        y, self.variance = mean.transpose(0, 1), variance.transpose(0, 1)
        if lengths is not None:
            y = y * frame_mask(lengths, x.shape[1])[..., None]
        return y, hidden

    def recurrent_layers(self) -> Iterator[RecurrentLayer]:
        """Every layer and direction."""
        return (m for m in self.modules() if isinstance(m, RecurrentLayer))

    def describe(self) -> dict[str, str]:
        """Facts for `plan` and the report."""
        config, layers = self.config, list(self.recurrent_layers())
        cell = config.cell.name.replace("_", " ")
        rule = "" if config.parametrization.kind == "free" else f" {config.parametrization.kind}"
        weights = sum(layer.weight_hh.num_weights() for layer in layers)
        adds = sum(layer.weight_hh.multiply_adds() for layer in layers)
        dense = sum(GATES[config.cell.kind] * layer.hidden_size**2 for layer in layers)
        active = config.regularizers.active()
        last = f", the last of {config.last_size}" if config.last_size else ""
        return {
            **({"regularizers": ", ".join(f"{name} {value}" for name, value in active.items())} if active else {}),
            "recurrence": f"{len(layers)} x {config.structure.kind}{rule} {cell} of {config.hidden_size} units{last}",
            "recurrent weights": f"{weights:,}; {adds:,} multiply-adds a step and row, {adds / dense:.2%} of dense",
        }
