"""A stack of recurrent layers over time: structure x cell, directions, normalisation, residuals, dropout.

The stack takes padded batches with lengths. It transposes to time-major once, and padding never reaches a real frame:
the backward direction starts at each row's own last frame.
"""

import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

import kernels
from trainer.config import Config
from trainer.models.normalization import KeyedDropout, NormKind, build_norm, frame_mask
from trainer.models.structure import Dense, DenseConfig, Diagonal, StructureConfig

log = logging.getLogger(__name__)

State = tuple[Tensor, ...]
"""(h,) of shape (B, H), or (h, c) for an LSTM."""


class ElmanConfig(Config):
    """h_t = f(W x_t + U h_{t-1} + b) (Elman 1990)."""

    kind: Literal["rnn"] = "rnn"
    activation: Literal["tanh", "relu", "identity"] = "tanh"


class GRUConfig(Config):
    """Gated recurrent unit (Cho et al. 2014), in torch's form."""

    kind: Literal["gru"] = "gru"


class LSTMConfig(Config):
    """Long short-term memory (Hochreiter & Schmidhuber 1997)."""

    kind: Literal["lstm"] = "lstm"
    forget_bias: float = 0.0
    """Added to the forget gate's bias at the start (Jozefowicz et al. 2015 advise 1)."""


CellConfig = Annotated[ElmanConfig | GRUConfig | LSTMConfig, Field(discriminator="kind")]
GATES = {"rnn": 1, "gru": 3, "lstm": 4}


class RNNConfig(Config):
    """A stack of equal recurrent layers."""

    hidden_size: PositiveInt = 256
    """H, units a direction."""
    num_layers: PositiveInt = 3
    cell: CellConfig = LSTMConfig()
    structure: StructureConfig = DenseConfig()
    """Of the recurrent matrices."""
    directions: Literal["forward", "concat", "sum"] = "forward"
    """forward alone, or both: concatenated to 2 H, or added to H."""
    norm: NormKind = "layer"
    """Of each layer's input."""
    residual: bool = False
    """Add a layer's input to its output where their sizes agree."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Of each layer's output."""

    @model_validator(mode="after")
    def _blocks_fit(self) -> "RNNConfig":
        num_blocks = getattr(self.structure, "num_blocks", 1)
        if self.hidden_size % num_blocks:
            raise ValueError(
                f"structure.num_blocks = {num_blocks} does not divide hidden_size = {self.hidden_size}; change either"
            )
        return self

    @property
    def output_size(self) -> int:
        """Width of the stack's output."""
        return self.hidden_size * (2 if self.directions == "concat" else 1)

    def build(self, input_size: int) -> "RNN":
        return RNN(self, input_size)


class RecurrentLayer(nn.Module):
    """One layer in one direction.

    Args:
        config: cell and structure.
        input_size: D.
        reverse: run from the last frame to the first.

    Shape:
        x: (T, B, D), lengths: (B,), state: (B, H) each -> (T, B, H) with zeros past each length, and the last state
        (on torch's own loop that of frame T, so only for rows that fill it)
    """

    def __init__(self, config: RNNConfig, input_size: int, reverse: bool = False) -> None:
        super().__init__()
        self.cell = config.cell
        self.reverse = reverse
        self.hidden_size = config.hidden_size
        rows = GATES[config.cell.kind] * config.hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.bias_ih = nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.recurrence = config.structure.build(config.hidden_size, GATES[config.cell.kind])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.hidden_size**-0.5
        for p in (self.weight_ih, self.bias_ih, self.bias_hh):
            nn.init.uniform_(p, -bound, bound)
        if isinstance(self.cell, LSTMConfig):
            with torch.no_grad():
                self.bias_ih[self.hidden_size : 2 * self.hidden_size] += self.cell.forget_bias

    def forward(self, x: Tensor, lengths: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        torch_has_it = not (isinstance(self.cell, ElmanConfig) and self.cell.activation == "identity")
        if isinstance(self.recurrence, Dense) and torch_has_it:
            return self._torch(x, lengths, state)
        return self._kernel(x, lengths, state)

    def _torch(self, x: Tensor, lengths: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Dense and free: torch's own loop (oneDNN, cuDNN) on a padded batch; causal, so padding comes after."""
        if self.reverse:
            x = reverse_rows(x, lengths)
        if state is None:
            zeros = x.new_zeros(1, x.shape[1], self.hidden_size)
            first: State = (zeros, zeros) if self.cell.kind == "lstm" else (zeros,)
        else:
            first = tuple(s[None] for s in state)
        weights = [self.weight_ih, self.recurrence.dense(), self.bias_ih, self.bias_hh]
        options = (
            True,
            1,
            0.0,
            self.training,
            False,
            False,
        )  # biases, layers, dropout, train, both ways, batch first
        if self.cell.kind == "lstm":
            y, *last = torch.lstm(x, first, weights, *options)
        elif self.cell.kind == "gru":
            y, *last = torch.gru(x, first[0], weights, *options)
        else:
            loop: Callable[..., tuple[Tensor, Tensor]] = (
                torch.rnn_relu if self.cell.activation == "relu" else torch.rnn_tanh
            )
            y, *last = loop(x, first[0], weights, *options)
        y = reverse_rows(y, lengths) if self.reverse else y
        return y * frame_mask(lengths, y.shape[0]).T[..., None], tuple(s[0] for s in last)

    def _kernel(self, x: Tensor, lengths: Tensor, state: State | None) -> tuple[Tensor, State]:
        u = nn.functional.linear(x, self.weight_ih, self.bias_ih)
        family = "diagonal" if isinstance(self.recurrence, Diagonal) else "block"
        op = f"{family}_{self.cell.kind}"
        _say_once(kernels.explain(op))
        weight = self.recurrence.weight
        if isinstance(self.recurrence, Dense):
            weight = weight.view(GATES[self.cell.kind], 1, self.hidden_size, self.hidden_size)
        options = {"activation": self.cell.activation} if isinstance(self.cell, ElmanConfig) else {}
        y, last = getattr(kernels, op)(
            u, weight, *(state or ()), bias=self.bias_hh, lengths=lengths, reverse=self.reverse, **options
        )
        return y, last if isinstance(last, tuple) else (last,)


def reverse_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn each row of (T, B, D) round inside its own length; what is past it stays where it is."""
    t = torch.arange(x.shape[0], device=x.device)[:, None]
    index = torch.where(t < lengths, lengths - 1 - t, t)  # (T, B)
    return x.gather(0, index[..., None].expand_as(x))


@lru_cache(maxsize=64)
def _say_once(text: str) -> None:
    log.info("%s", text)


class RNN(nn.Module):
    """The stack; each layer is norm -> recurrence -> dropout (+ input).

    Args:
        config: see there.
        input_size: D.

    Shape:
        x: (B, T, D), lengths: (B,), noise_keys: (B,) int64 or None
        returns: (B, T, output_size) with zeros past each length; with `all_layers`, also a list of every layer's
        hidden sequence (B, T, H or 2 H) before residual and dropout
    """

    def __init__(self, config: RNNConfig, input_size: int) -> None:
        super().__init__()
        self.config = config
        self.norms, self.layers, self.dropouts = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        size = input_size
        for i in range(config.num_layers):
            self.norms.append(build_norm(config.norm, size))
            ways = [False] if config.directions == "forward" else [False, True]
            self.layers.append(nn.ModuleList(RecurrentLayer(config, size, reverse) for reverse in ways))
            self.dropouts.append(KeyedDropout(config.dropout, f"rnn.{i}"))
            size = config.output_size
        self.final_norm = build_norm(config.norm, size)

    def forward(
        self, x: Tensor, lengths: Tensor, noise_keys: Tensor | None = None, all_layers: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        mask = frame_mask(lengths, x.shape[1])
        hidden: list[Tensor] = []
        for norm, ways, dropout in zip(self.norms, self.layers, self.dropouts, strict=True):
            inputs = norm(x, mask).transpose(0, 1).contiguous()  # (T, B, D)
            outputs = [way(inputs, lengths)[0] for way in ways]  # type: ignore[attr-defined]
            y = sum(outputs[1:], start=outputs[0]) if self.config.directions == "sum" else torch.cat(outputs, -1)
            y = y.transpose(0, 1)  # (B, T, H)
            if all_layers:
                hidden.append(y)
            y = dropout(y, noise_keys)
            x = x + y if self.config.residual and x.shape == y.shape else y
        return self.final_norm(x, mask) * mask[..., None], hidden

    def recurrent_layers(self) -> Iterator[RecurrentLayer]:
        """Every layer and direction."""
        return (m for m in self.modules() if isinstance(m, RecurrentLayer))
