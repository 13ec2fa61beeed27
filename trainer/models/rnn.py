"""A stack of recurrent layers over time: structure x cell, directions, normalisation, residuals, dropout.

The stack takes padded batches with lengths. It transposes to time-major once, and padding never reaches a real frame:
the backward direction starts at each row's own last frame.
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

import kernels
from trainer.config import Config
from trainer.models.block import Block
from trainer.models.normalization import KeyedDropout, NormKind, build_norm, frame_mask
from trainer.models.structure import Dense, DenseConfig, StructureConfig

State = tuple[Tensor, ...]
"""(h,) of shape (B, H), or (h, c) for an LSTM."""
Output = tuple[Tensor, list[State]]


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
    """The weights of one layer in one direction; `run` computes it, alone or with the other direction.

    Names, shapes and order of gates are those of torch's cells, but for `weight_hh`, which is a `Structure`: its
    `dense()` is torch's matrix. `trainer.models.convert` goes from a stack to a module of torch and back.

    Args:
        config: cell and structure.
        input_size: D.
        reverse: run from the last frame to the first.
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
        self.weight_hh = config.structure.build(config.hidden_size, GATES[config.cell.kind])
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.hidden_size**-0.5
        for p in (self.weight_ih, self.bias_ih, self.bias_hh):
            nn.init.uniform_(p, -bound, bound)
        if isinstance(self.cell, LSTMConfig):
            with torch.no_grad():
                self.bias_ih[self.hidden_size : 2 * self.hidden_size] += self.cell.forget_bias


def run(ways: Sequence[RecurrentLayer], x: Tensor, lengths: Tensor, states: Sequence[State | None]) -> Output:
    """One layer: its directions over the same input.

    Args:
        ways: equal in all but weights and direction.
        states: of each direction, None for zeros.

    Shape:
        x: (T, B, D), lengths: (B,)
        returns: (T, B, R H), the directions side by side, with zeros past each length, and the last state of each
    """
    cell, weight_hh = ways[0].cell, ways[0].weight_hh
    if isinstance(weight_hh, Dense) and torch_is_faster(cell, weight_hh.weight):
        outputs = [_torch(way, x, lengths, state) for way, state in zip(ways, states, strict=True)]
        y = outputs[0][0] if len(ways) == 1 else torch.cat([y for y, _ in outputs], -1)
        return y, [last for _, last in outputs]
    return _kernel(ways, x, lengths, states)


def torch_is_faster(cell: CellConfig, weight: Tensor) -> bool:
    """Whether a dense layer is left to torch's own loop.

    On a GPU that is cuDNN. On a CPU it is oneDNN, which torch uses for the LSTM alone and which ours does not beat
    (docs/results.md); torch's RNN and GRU take a call of the matrix library a step, and lose to ours.
    """
    if isinstance(cell, ElmanConfig) and cell.activation == "identity":
        return False
    return weight.is_cuda or isinstance(cell, LSTMConfig) or not kernels.is_fast(weight, cell.kind)


def _torch(way: RecurrentLayer, x: Tensor, lengths: Tensor, state: State | None) -> tuple[Tensor, State]:
    """One direction on a padded batch; causal, so padding comes after. The last state is right for rows of T frames."""
    x = reverse_rows(x, lengths) if way.reverse else x
    zeros = x.new_zeros(x.shape[1], way.hidden_size)
    first = [s[None] for s in state or (zeros, zeros)]
    weights = [way.weight_ih, way.weight_hh.dense(), way.bias_ih, way.bias_hh]
    options = (True, 1, 0.0, way.training, False, False)  # biases, layers, dropout, train, both ways, batch first
    if isinstance(way.cell, LSTMConfig):
        y, *last = torch.lstm(x, first, weights, *options)
    else:
        name = way.cell.kind if isinstance(way.cell, GRUConfig) else f"rnn_{way.cell.activation}"
        y, *last = getattr(torch, name)(x, first[0], weights, *options)
    y = reverse_rows(y, lengths) if way.reverse else y
    return y * frame_mask(lengths, y.shape[0]).T[..., None], tuple(s[0] for s in last)


def _kernel(ways: Sequence[RecurrentLayer], x: Tensor, lengths: Tensor, states: Sequence[State | None]) -> Output:
    """All directions in one call: more units side by side, some of which run backwards."""
    cell = ways[0].cell
    gates, size = GATES[cell.kind], ways[0].hidden_size

    def side_by_side(parts: Sequence[Tensor]) -> Tensor:  # (G H, ...) each -> (G, R, H, ...)
        return (
            parts[0]
            if len(parts) == 1
            else torch.stack([p.unflatten(0, (gates, size)) for p in parts], 1).flatten(0, 2)
        )

    u = nn.functional.linear(
        x, side_by_side([way.weight_ih for way in ways]), side_by_side([way.bias_ih for way in ways])
    )
    weight = torch.cat([way.weight_hh.blocks() for way in ways], 1)
    given = [state for state in states if state is not None]
    first = [torch.cat(parts, -1) for parts in zip(*given, strict=True)] if given else []
    name = f"rnn_{cell.activation}" if isinstance(cell, ElmanConfig) else cell.kind
    y, *last = kernels.recurrence(
        u,
        weight,
        *first,
        cell=name,
        bias=side_by_side([way.bias_hh for way in ways]),
        lengths=lengths,
        reverse=[way.reverse for way in ways],
    )
    by_way = [part.split(size, -1) for part in last if part.numel() or name == "lstm"]
    return y, list(zip(*by_way, strict=True))


def reverse_rows(x: Tensor, lengths: Tensor) -> Tensor:
    """Turn each row of (T, B, D) round inside its own length; what is past it stays where it is."""
    t = torch.arange(x.shape[0], device=x.device)[:, None]
    index = torch.where(t < lengths, lengths - 1 - t, t)  # (T, B)
    return x.gather(0, index[..., None].expand_as(x))


class Layer(Block, nn.ModuleList):
    """The directions of one layer.

    Shape:
        x: (T, B, D), lengths: (B,) -> (T, B, R H), and the last state of each direction
    """

    def compute(self, x: Tensor, lengths: Tensor) -> Output:
        return run(list(self), x, lengths, [None] * len(self))  # type: ignore[arg-type]


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
            self.layers.append(Layer(RecurrentLayer(config, size, reverse) for reverse in ways))
            self.dropouts.append(KeyedDropout(config.dropout, f"rnn.{i}"))
            size = config.output_size
        self.final_norm = build_norm(config.norm, size)

    def forward(
        self, x: Tensor, lengths: Tensor, noise_keys: Tensor | None = None, all_layers: bool = False
    ) -> tuple[Tensor, list[Tensor]]:
        mask = frame_mask(lengths, x.shape[1])
        hidden: list[Tensor] = []
        for norm, layer, dropout in zip(self.norms, self.layers, self.dropouts, strict=True):
            inputs = norm(x, mask).transpose(0, 1).contiguous()  # (T, B, D)
            y, _ = layer(inputs, lengths)
            if self.config.directions == "sum":
                y = y.unflatten(-1, (2, -1)).sum(-2)
            y = y.transpose(0, 1)  # (B, T, H)
            if all_layers:
                hidden.append(y)
            y = dropout(y, noise_keys)
            x = x + y if self.config.residual and x.shape == y.shape else y
        return self.final_norm(x, mask) * mask[..., None], hidden

    def recurrent_layers(self) -> Iterator[RecurrentLayer]:
        """Every layer and direction."""
        return (m for m in self.modules() if isinstance(m, RecurrentLayer))
