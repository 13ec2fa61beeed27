"""Weights to and from the modules of torch: nn.RNN, nn.GRU and nn.LSTM.

Gates have torch's order, so a weight keeps its numbers and takes torch's name: `weight_ih_l0`, `weight_hh_l0`,
`bias_ih_l0`, `bias_hh_l0`, then `_l1` and so on, with `_reverse` behind for the backward direction. A sparse recurrence
becomes a dense matrix with zeros off its structure, and only such a matrix comes back.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.models.cells import TORCH, ElmanConfig, GRUConfig
from trainer.models.recurrence import RecurrentLayer
from trainer.models.rnn import RNN, RNNConfig

MODULES: dict[str, type[nn.RNNBase]] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def to_torch(rnn: RNN) -> tuple[nn.RNNBase, list[str]]:
    """A module of torch with the weights of a stack.

    Rows of different lengths go into it through `nn.utils.rnn.pack_padded_sequence`, so that its backward direction
    starts at each row's own last frame, as ours does.

    Raises:
        UserError: the last layer has another size.

    Returns:
        the module, batch first, of the stack's type and on its device; and what the stack computes and the module does
        not. If that list is empty, both give the same outputs.
    """
    config, first = rnn.config, next(rnn.recurrent_layers())
    if config.last_size not in (None, config.hidden_size):
        raise UserError(f"last_size = {config.last_size}: a module of torch has equal layers; take null")
    options: dict[str, Any] = {"nonlinearity": "relu"} if getattr(config.cell, "activation", None) == "relu" else {}
    module = MODULES[config.cell.kind](
        input_size=first.weight_ih.shape[1],
        hidden_size=config.hidden_size,
        num_layers=config.num_layers,
        bidirectional=config.directions != "forward",
        batch_first=True,
        device=first.weight_ih.device,
        dtype=first.weight_ih.dtype,
        **options,
    )
    module.load_state_dict(_weights(rnn))
    return module.train(rnn.training), _lacks(config)


@torch.no_grad()
def load_torch(rnn: RNN, state: Mapping[str, Tensor]) -> None:
    """Take over the weights of a module of torch; call it before training starts, as ZeRO keeps copies of all weights.

    Args:
        rnn: of the module's sizes. What the module does not have (normalisation) stays as it is.
        state: the module's `state_dict()`. One without biases stands for biases of zero.

    Raises:
        UserError: a weight is missing, left over or of another shape, or is not zero where `rnn` has no weight, or
            `rnn` has parametrised weights or a cell that torch lacks. Then `rnn` is as it was.
    """
    _refuse(rnn.config)
    ours = _weights(rnn)
    if not any(name.startswith("bias") for name in state):
        state = {**state, **{name: torch.zeros_like(x) for name, x in ours.items() if name.startswith("bias")}}
    for name in {**ours, **state}:
        met = f"of shape {tuple(state[name].shape)}" if name in state else "missing"
        wanted = f"of shape {tuple(ours[name].shape)}" if name in ours else "no such weight"
        if met != wanted:
            raise UserError(
                f"{name} is {met}, wanted {wanted}; give the stack the module's cell, hidden_size, num_layers, "
                "directions and input size"
            )
    values: list[tuple[Tensor, Tensor]] = []
    for end, way, copies in _ways(rnn):
        matrix = state[f"weight_hh_{end}"]
        values.append((way.weight_hh.weight, way.weight_hh.part_of(matrix)))
        rest = way.weight_hh.rest_of(matrix)
        if rest.any():
            kind = rnn.config.structure.kind
            raise UserError(
                f"weight_hh_{end} has numbers up to {rest.abs().max():g} off the structure, wanted 0 there; take "
                f"structure.kind = dense instead of {kind}, or set what is off the structure to zero"
            )
        columns, *others = state[f"weight_ih_{end}"].chunk(copies, 1)
        for other in others:
            if not torch.equal(columns, other):
                raise UserError(
                    f"weight_ih_{end} differs by up to {(columns - other).abs().max():g} between its two directions of "
                    "input, which directions = sum adds before it; take directions = concat"
                )
        values.append((way.weight_ih, columns))
        assert way.bias_ih is not None
        values += [(way.bias_ih, state[f"bias_ih_{end}"]), (way.bias_hh, state[f"bias_hh_{end}"])]
    for weight, value in values:
        weight.copy_(value)


def _refuse(config: RNNConfig) -> None:
    """Stacks that cannot take the weights of a module of torch."""
    if config.parametrization.kind != "free":
        raise UserError(
            f"parametrization.kind = {config.parametrization.kind}: its weights follow from other numbers; take free"
        )
    if config.last_size not in (None, config.hidden_size):
        raise UserError(f"last_size = {config.last_size}: a module of torch has equal layers; take null")
    if config.structure.kind == "low_rank":
        raise UserError("structure.kind = low_rank: a matrix of torch has no factors; take another structure")
    if config.cell.name == "rnn_modrelu":
        raise UserError("cell.activation = modrelu: torch has no such cell; take another")


def _ways(rnn: RNN) -> Iterator[tuple[str, RecurrentLayer, int]]:
    """(end of its names, layer in one direction, how many times torch has the columns of its weight_ih).

    Torch's modules put both directions side by side; columns twice there are the same as directions added before.
    """
    for i, ways in enumerate(rnn.layers):
        for way in ways:  # type: ignore[attr-defined]
            yield f"l{i}_reverse" if way.reverse else f"l{i}", way, 2 if i and rnn.config.directions == "sum" else 1


def _weights(rnn: RNN) -> dict[str, Tensor]:
    """The weights of a stack under the names and in the shapes of torch's module."""
    weights: dict[str, Tensor] = {}
    for end, way, copies in _ways(rnn):
        weights[f"weight_ih_{end}"] = way.weight_ih.detach().repeat(1, copies)
        weights[f"weight_hh_{end}"] = way.weight_hh.dense().detach()
        weights[f"bias_hh_{end}"] = way.bias_hh.detach()
        weights[f"bias_ih_{end}"] = torch.zeros_like(way.bias_hh) if way.bias_ih is None else way.bias_ih.detach()
    return weights


def _lacks(config: RNNConfig) -> list[str]:
    """What a stack computes and a module of torch does not."""
    lacks = []
    if config.cell.name not in TORCH:
        if isinstance(config.cell, GRUConfig):
            lacks.append("cell.reset = before: the module's reset gate scales what the recurrent weights gave")
        elif isinstance(config.cell, ElmanConfig):
            lacks.append(f"cell.activation = {config.cell.activation}: the module computes tanh")
    if config.norm != "none":
        lacks.append(f"norm = {config.norm}: the module does not normalise the input of its layers, nor its output")
    if config.residual:
        lacks.append("residual = true: the module does not add a layer's input to its output")
    if config.dropout:
        lacks.append(f"dropout = {config.dropout:g}: the module drops nothing in training")
    if active := ", ".join(config.regularizers.active()):
        lacks.append(f"regularizers ({active}): the module has none")
    if config.directions == "sum":
        lacks.append("directions = sum: the module's output has both directions side by side, to be added")
    return lacks
