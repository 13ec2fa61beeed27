"""A stack and a module of torch with its weights give the same outputs, and weights go both ways unchanged."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from tests.models.test_models import CELLS, LENGTHS, STRUCTURES, inputs, kind
from trainer.errors import UserError
from trainer.models.cells import TORCH, ElmanConfig, GRUConfig, LSTMConfig
from trainer.models.convert import MODULES, load_torch, to_torch
from trainer.models.parametrizations import CayleyConfig
from trainer.models.rnn import RNN, RNNConfig
from trainer.models.structure import BlockDiagonalConfig, DiagonalConfig, LowRankConfig


def build(**options) -> RNN:
    return RNNConfig(**{"hidden_size": 8, "num_layers": 2, "norm": "none", **options}).build(5)


def outputs(module: nn.RNNBase, x: torch.Tensor) -> torch.Tensor:
    packed = pack_padded_sequence(x, LENGTHS, batch_first=True, enforce_sorted=False)
    return pad_packed_sequence(module(packed)[0], batch_first=True)[0]


@pytest.mark.parametrize("directions", ["forward", "concat", "sum"])
@pytest.mark.parametrize(("structure", "cell"), list(itertools.product(STRUCTURES, CELLS)), ids=kind)
def test_torch_computes_the_same_and_weights_come_back(structure, cell, directions: str) -> None:
    rnn = build(cell=cell, structure=structure, directions=directions)
    module, lacks = to_torch(rnn)
    lacking = {"rnn_identity": ["cell.activation"], "gru_original": ["cell.reset"]}.get(cell.name, [])
    assert [text.split(" ")[0] for text in lacks] == lacking + ["directions"] * (directions == "sum")
    if cell.name in TORCH:
        x = inputs(5)
        wanted, got = rnn(x, LENGTHS)[0], outputs(module, x)
        if directions == "sum":
            got = got.unflatten(-1, (2, 8)).sum(-2)
        torch.testing.assert_close(got, wanted)
    other = build(cell=cell, structure=structure, directions=directions)
    load_torch(other, module.state_dict())
    for name, weight in rnn.state_dict().items():
        assert torch.equal(other.state_dict()[name], weight), name


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("cell", [ElmanConfig(activation="relu"), GRUConfig(), LSTMConfig()], ids=kind)
def test_a_module_of_torch_becomes_a_stack(cell, bias: bool) -> None:
    options = {"nonlinearity": "relu"} if isinstance(cell, ElmanConfig) else {}
    module = MODULES[cell.kind](5, 8, 3, bidirectional=True, batch_first=True, bias=bias, **options)
    rnn = build(cell=cell, num_layers=3, directions="concat")
    load_torch(rnn, module.state_dict())
    torch.testing.assert_close(rnn(inputs(5), LENGTHS)[0], outputs(module, inputs(5)))
    back = to_torch(rnn)[0].state_dict()
    assert all(torch.equal(back[name], weight) for name, weight in module.state_dict().items())
    assert not any(back[name].any() for name in back.keys() - module.state_dict().keys())


def test_type_mode_and_normalisation_stay() -> None:
    rnn = build(norm="layer", residual=True, dropout=0.1).double().eval()
    module, lacks = to_torch(rnn)
    assert not module.training
    assert module.weight_hh_l0.dtype == torch.float64
    assert [text.split(" ")[0] for text in lacks] == ["norm", "residual", "dropout"]
    nn.init.constant_(rnn.norms[0].weight, 3.0)
    load_torch(rnn, nn.LSTM(5, 8, 2).state_dict())
    assert (rnn.norms[0].weight == 3).all()


LSTM = nn.LSTM(5, 8, 2, bidirectional=True).state_dict()


def changed(name: str, row: int, column: int, number: float) -> dict[str, torch.Tensor]:
    """A module that fits every structure, but for one number."""
    state = {k: torch.zeros_like(v) if k.startswith("weight_hh") else v for k, v in LSTM.items()}
    state[name][row, column] = number
    return state


@pytest.mark.parametrize(
    ("options", "state", "message"),
    [
        (
            {"structure": BlockDiagonalConfig(num_blocks=4)},
            changed("weight_hh_l1_reverse", 8, 2, -0.25),
            r"weight_hh_l1_reverse has numbers up to 0\.25 off the structure.* instead of block_diagonal",
        ),
        (
            {"structure": DiagonalConfig()},
            changed("weight_hh_l0", 31, 6, 0.5),
            r"weight_hh_l0 has numbers up to 0\.5 off the structure.* instead of diagonal",
        ),
        ({"structure": LowRankConfig()}, LSTM, "low_rank: a matrix of torch has no factors"),
        ({"parametrization": CayleyConfig()}, LSTM, "parametrization.kind = cayley: .* take free"),
        ({"cell": ElmanConfig(activation="modrelu")}, LSTM, "modrelu: torch has no such cell"),
        ({"directions": "sum"}, LSTM, "weight_ih_l1 differs by up to .* take directions = concat"),
        ({"directions": "forward"}, LSTM, r"weight_ih_l1 is of shape \(32, 16\), wanted of shape \(32, 8\)"),
        ({"num_layers": 1}, LSTM, r"weight_ih_l1 is of shape .* wanted no such weight"),
        ({"num_layers": 3}, LSTM, r"weight_ih_l2 is missing, wanted of shape \(32, 16\)"),
        ({"cell": GRUConfig()}, LSTM, r"weight_ih_l0 is of shape \(32, 5\), wanted of shape \(24, 5\)"),
    ],
)
def test_what_does_not_fit_is_named_and_changes_nothing(options, state, message: str) -> None:
    rnn = build(**{"directions": "concat", **options})
    before = {name: weight.clone() for name, weight in rnn.state_dict().items()}
    with pytest.raises(UserError, match=message):
        load_torch(rnn, state)
    assert all(torch.equal(rnn.state_dict()[name], weight) for name, weight in before.items())
