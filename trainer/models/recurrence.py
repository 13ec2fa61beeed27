"""One recurrent layer over time: the weights of a direction, and the fastest path that computes one or both.

What no kernel covers runs on the reference loop, with one logged line that says so and why.
"""

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import kernels
from kernels import products, reference
from kernels.say import say_once
from trainer.models.block import Block
from trainer.models.cells import GATES, TORCH, CellConfig, LSTMConfig
from trainer.models.initialization import DefaultConfig
from trainer.models.linear import linear, recurrent_term, reverse_rows
from trainer.models.normalization import frame_mask
from trainer.models.parametrizations import attach
from trainer.models.regularizers import Drawn, Regularizer
from trainer.models.regularizers.dropout import bounded_rows
from trainer.models.structure import Structure

if TYPE_CHECKING:
    from trainer.models.rnn import RNNConfig


State = tuple[Tensor, ...]
"""(h,) of shape (B, H), or (h, c) for an LSTM."""
Output = tuple[Tensor, list[State]]


class RecurrentLayer(nn.Module):
    """The weights of one layer in one direction; `run` computes it, alone or with the other direction.

    Names, shapes and order of gates are those of torch's cells, but for `weight_hh`, which is a `Structure`: its
    `dense()` is torch's matrix. `trainer.models.convert` goes from a stack to a module of torch and back. A modReLU
    cell has no `bias_ih`, and its `bias_hh` is the b of that function.

    Args:
        config: cell, structure, parametrisation.
        input_size: D.
        reverse: run from the last frame to the first.
        regularizer: of the stack, None for none.
        name: tells the layer from the others of its stack.

    Attributes:
        packed: the recurrent weights as the kernel reads them, where they stay as they are; None: packed each time.
    """

    packed: Tensor | None = None

    def __init__(
        self,
        config: "RNNConfig",
        input_size: int,
        reverse: bool = False,
        regularizer: Regularizer | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.cell, self.structure = config.cell, config.structure.kind
        self.reverse, self.name = reverse, name
        # In a tuple, as it is the stack's submodule and not this one's.
        self._regularizer: tuple[Regularizer | None] = (regularizer,)
        self.input_initialization = config.input_initialization
        self.hidden_size = config.hidden_size
        self.input_range = config.input_range or config.hidden_size**-0.5
        rows = GATES[config.cell.kind] * config.hidden_size
        self.weight_ih = nn.Parameter(torch.empty(rows, input_size))
        self.bias_ih = None if config.cell.name == "rnn_modrelu" else nn.Parameter(torch.empty(rows))
        self.bias_hh = nn.Parameter(torch.empty(rows))
        self.weight_hh: Structure = config.structure.build(config.hidden_size, GATES[config.cell.kind])
        self.weight_hh.initialization = config.initialization
        attach(config.parametrization, self.weight_hh)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.hidden_size**-0.5
        if isinstance(self.input_initialization, DefaultConfig):
            nn.init.uniform_(self.weight_ih, -self.input_range, self.input_range)
        else:
            gates = self.weight_ih.unflatten(0, (-1, self.hidden_size))
            with torch.no_grad():
                gates.copy_(torch.stack([self.input_initialization.numbers(*gate.shape) for gate in gates]))
        if self.bias_ih is None:
            nn.init.zeros_(self.bias_hh)
            return
        for p in (self.bias_ih, self.bias_hh):
            nn.init.uniform_(p, -bound, bound)
        if isinstance(self.cell, LSTMConfig):
            with torch.no_grad():
                self.bias_ih[self.hidden_size : 2 * self.hidden_size] += self.cell.forget_bias

    def weights(self) -> tuple[Tensor, Tensor]:
        """Weights of input and recurrence as this pass sees them, looked at once: each look forms parametrised ones
        anew. The second is what `Structure.blocks` gives."""
        matrix = self.weight_hh.blocks()
        (regularizer,) = self._regularizer
        if regularizer is None:
            return self.weight_ih, matrix
        return (
            regularizer.weights(self.weight_ih, f"{self.name}.weight_ih", recurrent=False),
            regularizer.weights(matrix, f"{self.name}.weight_hh", recurrent=True, sparse=not self.weight_hh.has_kernel),
        )

    @torch.no_grad()
    def make_plain(self) -> None:
        """Put the weights that an evaluation sees in place of what makes them, parametrisations and largest norms, so
        that anything may be added to them. They are no longer those of a checkpoint by name."""
        structure, (regularizer,) = self.weight_hh, self._regularizer
        if parametrize.is_parametrized(structure, "weight"):
            parametrize.remove_parametrizations(structure, "weight", leave_parametrized=True)
        if regularizer is not None and (largest := regularizer.config.max_norm) is not None:
            rows = structure.dense().norm(dim=1).view(structure.num_gates, -1)
            structure.weight.copy_(structure.scaled((largest / rows).clamp_max(1.0)))
            self.weight_ih.copy_(bounded_rows(self.weight_ih, largest))
        self._regularizer = (None,)


SHORT = 32
"""Frames up to which an LSTM with packed weights is faster in our kernel than in torch, which packs them each time."""


def run(
    ways: Sequence[RecurrentLayer],
    x: Tensor,
    lengths: Tensor | None,
    states: Sequence[State | None],
    drawn: Drawn | None = None,
) -> Output:
    """One layer: its directions over the same input.

    Args:
        ways: equal in all but weights and direction.
        states: of each direction, None for zeros.
        drawn: what disturbs it, None for nothing.

    Shape:
        x: (T, B, D), lengths: (B,), None for T each
        returns: (T, B, R H), the directions side by side, with zeros past each length, and the last state of each
    """
    drawn = drawn or Drawn()
    inputs, matrices = zip(*(way.weights() for way in ways), strict=True)
    if not ways[0].weight_hh.has_kernel:
        say_once(f"structure.kind = {ways[0].structure}: runs as a dense matrix, since no kernel knows the structure")
    short = ways[0].packed is not None and len(ways) == 1 and len(x) <= SHORT
    if (
        not short
        and drawn.calm
        and matrices[0].ndim == 4
        and matrices[0].shape[1] == 1
        and torch_is_faster(ways[0].cell, matrices[0], x.shape[1], lengths is None, ways[0].training)
    ):
        if x.device.type == "cpu" and (reason := kernels.unsupported(matrices[0], ways[0].cell.name)) is not None:
            say_once(f"{ways[0].cell.name}: torch's own loop, slow: {reason}", logging.WARNING)
        given = zip(ways, inputs, matrices, states, strict=True)
        outputs = [_torch(way, w_ih, w_hh.flatten(0, 2), x, lengths, state) for way, w_ih, w_hh, state in given]
        y = outputs[0][0] if len(ways) == 1 else torch.cat([y for y, _ in outputs], -1)
        return y, [last for _, last in outputs]
    return _kernel(ways, inputs, matrices, x, lengths, states, drawn)


def torch_is_faster(cell: CellConfig, weight: Tensor, batch_size: int, equal_rows: bool, training: bool) -> bool:
    """Whether a dense layer is left to torch's own loop.

    On a GPU that is cuDNN. On a CPU torch's RNN and GRU take a call of the matrix library a step, and lose to ours. Its
    LSTM is oneDNN's, which ours beats where our input products are oneDNN's too, on one thread, and with lengths, for
    which torch turns rows round and clears the padding; or forward alone; or where weights are large and rows few, but
    not a single one (docs/results.md).
    """
    if cell.name not in TORCH:
        return False
    if weight.is_cuda:
        return True
    lstm = isinstance(cell, LSTMConfig)
    if lstm and torch.is_autocast_enabled("cpu") and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False  # torch asks oneDNN for an LSTM of half precision all the same, and ends
    if kernels.unsupported(weight, cell.name) is not None:
        return True
    if not lstm:
        return False
    few_on_many = weight.shape[-1] >= 1024 and 1 < batch_size <= 8
    ours = not (equal_rows and training) or few_on_many
    return not (ours and products.prefers_onednn() and torch.get_num_threads() == 1)


def _torch(
    way: RecurrentLayer, weight_ih: Tensor, weight_hh: Tensor, x: Tensor, lengths: Tensor | None, state: State | None
) -> tuple[Tensor, State]:
    """One direction on a padded batch; causal, so padding comes after. The last state is right for rows of T frames."""
    x = reverse_rows(x, lengths) if way.reverse else x
    zeros = x.new_zeros(x.shape[1], way.hidden_size)
    first = [s[None] for s in state or (zeros, zeros)]
    assert way.bias_ih is not None
    weights = [weight_ih, weight_hh, way.bias_ih, way.bias_hh]
    options = (True, 1, 0.0, way.training, False, False)  # biases, layers, dropout, train, both ways, batch first
    if isinstance(way.cell, LSTMConfig):
        y, *last = torch.lstm(x, first, weights, *options)
    else:
        y, *last = getattr(torch, way.cell.name)(x, first[0], weights, *options)
    y = reverse_rows(y, lengths) if way.reverse else y
    if lengths is not None:
        y = y * frame_mask(lengths, y.shape[0]).T[..., None]
    return y, tuple(s[0] for s in last)


def _kernel(
    ways: Sequence[RecurrentLayer],
    inputs: Sequence[Tensor],
    matrices: Sequence[Tensor],
    x: Tensor,
    lengths: Tensor | None,
    states: Sequence[State | None],
    drawn: Drawn,
) -> Output:
    """All directions in one call: more units side by side, some of which run backwards."""
    cell = ways[0].cell
    gates, size = GATES[cell.kind], ways[0].hidden_size

    def side_by_side(parts: Sequence[Tensor]) -> Tensor:  # (G H, ...) each -> (G, R, H, ...)
        return (
            parts[0]
            if len(parts) == 1
            else torch.stack([p.unflatten(0, (gates, size)) for p in parts], 1).flatten(0, 2)
        )

    biases = [way.bias_ih for way in ways if way.bias_ih is not None]
    u = linear(x, side_by_side(inputs), side_by_side(biases) if biases else None)
    matrix = matrices[0] if len(matrices) == 1 else torch.cat(list(matrices), 1)
    given = [state for state in states if state is not None]
    first = [torch.cat(parts, -1) for parts in zip(*given, strict=True)] if given else []
    bias, reverse = side_by_side([way.bias_hh for way in ways]), [way.reverse for way in ways]
    if (reason := drawn.needs_loop(cell.name)) is not None:
        say_once(f"{cell.name}: the reference loop (plain PyTorch, slow) in training, since no kernel knows {reason}")
        h0, c0 = (*first, None, None)[:2]
        keys, rates = drawn.keys, drawn.zoneout
        y, *last = reference.recurrence(
            u, matrix, h0, c0, bias, lengths, drawn.mask, keys, cell.name, reverse, rates, drawn.noise, drawn.update
        )
    else:
        if drawn.noise is not None:  # W (h + e) = W h + W e
            u = u + recurrent_term(matrix, drawn.noise)
        y, *last = kernels.recurrence(
            u,
            matrix,
            *first,
            cell=cell.name,
            bias=bias,
            lengths=lengths,
            reverse=reverse,
            mask=drawn.mask,
            zoneout=drawn.zoneout,
            keys=drawn.keys,
            packed=ways[0].packed if len(ways) == 1 else None,
        )
    by_way = [part.split(size, -1) for part in last if part.numel() or cell.name == "lstm"]
    return y, list(zip(*by_way, strict=True))


class Layer(Block, nn.ModuleList):
    """The directions of one layer.

    Shape:
        x: (T, B, D), lengths: (B,) or None, the first state (of a layer with one direction) or None for zeros
        returns: (T, B, R H), and the last state of each direction
    """

    def compute(
        self, x: Tensor, lengths: Tensor | None, drawn: Drawn | None = None, state: State | None = None
    ) -> Output:
        return run(list(self), x, lengths, [state] * len(self), drawn)  # type: ignore[arg-type]
