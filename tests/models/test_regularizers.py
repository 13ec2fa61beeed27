"""Each regulariser does what its formula says, is gone in evaluation, and depends on keys alone; all combine."""

import copy
import math
import operator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kernels import moments as recurrent_moments
from kernels import reference
from kernels.say import say_once
from tests.helpers import fit, run_ranks
from tests.models.test_models import kind
from trainer import recipe
from trainer.analysis.recurrences import gate_matrices, logged
from trainer.config import PROJECT
from trainer.engine import initialise
from trainer.errors import UserError
from trainer.models.cells import ElmanConfig, GRUConfig, LSTMConfig
from trainer.models.initialization import GaussianConfig, GlorotConfig, SparseConfig
from trainer.models.regularizers import RegularizersConfig, activation_losses, at_step, fast_dropout, weight_penalty
from trainer.models.regularizers.noise import (
    ExponentialDecayConfig,
    LinearDecayConfig,
    PowerDecayConfig,
    gaussian,
    of_step,
    uniform,
)
from trainer.models.rnn import RNN, RNNConfig
from trainer.models.structure import (
    BandedConfig,
    BlockDiagonalConfig,
    DenseConfig,
    DiagonalConfig,
    LowRankConfig,
    PermutedBlockDiagonalConfig,
    Structure,
)
from trainer.models.structure import (
    SparseConfig as SparseStructureConfig,
)
from trainer.run import read_ledger, read_lines

SIZE, FRAMES = 12, 9
LENGTHS = torch.tensor([9, 4, 7])
KEYS = torch.tensor([11, 22, 33])

SAMPLED: dict[str, dict[str, Any]] = {
    "input noise": {"noise": {"input": 0.3}},
    "hidden noise": {"noise": {"hidden": 0.3}},
    "weight noise": {"noise": {"weights": 0.3}},
    "input dropout": {"dropout": {"input": 0.4}},
    "hidden dropout": {"dropout": {"hidden": 0.4}},
    "DropConnect": {"dropout": {"connections": 0.4}},
    "variational input": {"later": {"variational": {"input": 0.4}}},
    "variational hidden": {"later": {"variational": {"hidden": 0.4}}},
    "variational output": {"later": {"variational": {"output": 0.4}}},
    "recurrent dropout": {"later": {"recurrent_dropout": 0.4}},
}
PENALTIES: dict[str, dict[str, Any]] = {
    "norm stabiliser": {"later": {"norm_stabilizer": 0.3}},
    "activation": {"later": {"activation": 0.3}},
    "temporal activation": {"later": {"temporal_activation": 0.3}},
    "l1": {"norms": {"l1": 0.3}},
    "soft l1": {"norms": {"soft_l1": 0.3}},
    "l2": {"norms": {"l2": 0.3}},
    "nuclear": {"norms": {"nuclear": 0.3}},
    "spectral": {"later": {"spectral": 0.3}},
    "orthogonality": {"later": {"orthogonality": 0.3}},
    "gradient noise": {"later": {"gradient_noise": 0.3}},
}
LOOPS = (LSTMConfig(), GRUConfig(), ElmanConfig())


def merge(*parts: dict[str, Any]) -> dict[str, Any]:
    whole: dict[str, Any] = {}
    for part in parts:
        for name, value in part.items():
            whole[name] = merge(whole.get(name, {}), value) if isinstance(value, dict) else value
    return whole


def stack(regularizers: dict[str, Any] | None = None, cell: Any = None, **options: Any) -> RNN:
    """A stack with weights drawn from seed 0, in training, at step 3."""
    given = {"hidden_size": SIZE, "num_layers": 1, "norm": "none", "cell": cell or LSTMConfig(), **options}
    rnn = RNNConfig(**given, regularizers=RegularizersConfig(**(regularizers or {}))).build(5)
    initialise(rnn, 0)
    at_step(rnn, 7, 3)
    return rnn.train()


def frames(batch: int = 3) -> torch.Tensor:
    return torch.randn(batch, FRAMES, 5, generator=torch.Generator().manual_seed(1))


def forward(rnn: RNN, rows: slice = slice(None)) -> torch.Tensor:
    return rnn(frames()[rows], LENGTHS[rows], KEYS[rows])[0]


@pytest.mark.parametrize("name", SAMPLED)
def test_what_is_sampled_follows_from_keys_and_is_gone_in_evaluation(name: str) -> None:
    rnn, plain = stack(SAMPLED[name], num_layers=2), stack(num_layers=2)
    first = forward(rnn)
    assert not torch.equal(first, forward(plain))
    assert torch.equal(first, forward(rnn))
    for row in range(3):  # alone, as another rank would have it, and with less padding
        alone = rnn(frames()[row : row + 1, : LENGTHS[row]], LENGTHS[row : row + 1], KEYS[row : row + 1])[0]
        torch.testing.assert_close(alone[0], first[row, : LENGTHS[row]], rtol=1e-5, atol=1e-6)
    if "weights" in str(SAMPLED[name]) or "connections" in str(SAMPLED[name]):
        at_step(rnn, 7, 4)
    else:
        KEYS[:] += 1
    again = forward(rnn)
    KEYS[:] = torch.tensor([11, 22, 33])
    assert not torch.equal(first, again)
    assert torch.equal(forward(rnn.eval()), forward(plain.eval()))


@pytest.mark.parametrize("name", PENALTIES)
def test_penalties_change_no_output_and_are_gone_in_evaluation(name: str) -> None:
    rnn = stack(PENALTIES[name])
    assert torch.equal(forward(rnn), forward(stack()))
    assert (weight_penalty(rnn) is None) != (not activation_losses(rnn, LENGTHS > 0))
    assert torch.equal(forward(rnn.eval()), forward(stack().eval()))
    assert weight_penalty(rnn) is None
    assert not activation_losses(rnn, LENGTHS > 0)


# Noise


def test_noise_is_normal_and_a_longer_row_begins_alike() -> None:
    e = gaussian(range(200), 500)
    assert abs(float(e.mean())) < 0.01
    assert abs(float(e.std()) - 1) < 0.01
    assert 4 < float(e.abs().max()) < 7
    assert abs(float((e > 1).float().mean()) - 0.1587) < 0.005
    assert torch.equal(gaussian([3], 7, 2)[0], gaussian([3], 90, 2)[0, :7])
    assert uniform([3], 100).min() >= 0


def test_noise_decays() -> None:
    assert LinearDecayConfig(steps=4).factor(1) == 0.75
    assert LinearDecayConfig(steps=4).factor(9) == 0
    assert ExponentialDecayConfig(half_life_steps=10).factor(20) == 0.25
    assert PowerDecayConfig(power=0.55).factor(99) ** 2 == pytest.approx(100**-0.55)
    rnn = stack({"noise": {"input": 0.3, "weights": 0.3, "hidden": 0.3, "decay": {"kind": "linear", "steps": 3}}})
    assert torch.equal(forward(rnn), forward(stack()))  # at step 3
    at_step(rnn, 7, 2)
    assert not torch.equal(forward(rnn), forward(stack()))


def test_input_noise_is_added_to_the_input() -> None:
    rnn = stack(SAMPLED["input noise"])
    x = torch.zeros(3, 400, 5)
    noise = rnn.regularizer.input(x, KEYS)
    assert float(noise.std()) == pytest.approx(0.3, rel=0.03)
    torch.testing.assert_close(forward(rnn), stack()(rnn.regularizer.input(frames(), KEYS), LENGTHS)[0])


@pytest.mark.parametrize("structure", [DenseConfig(), BlockDiagonalConfig(num_blocks=3), DiagonalConfig()], ids=kind)
@pytest.mark.parametrize("cell", LOOPS, ids=kind)
@pytest.mark.parametrize("directions", ["forward", "concat"])
def test_what_disturbs_the_state_is_that_of_the_definition(cell: Any, structure: Any, directions: str) -> None:
    """Noise as a part of the pre-activation, masks and zoneout in the kernel: outputs and gradients of the loop."""
    more = [SAMPLED["hidden noise"], SAMPLED["variational hidden"], {"later": {"zoneout": 0.2}}]
    rnn = stack(merge(*more), cell, structure=structure, directions=directions)
    got = forward(rnn)
    x = frames().transpose(0, 1)
    ways = list(rnn.layers[0])
    drawn = rnn.regularizer.draw(0, x, SIZE * len(ways), KEYS, gated=True)
    assert drawn.mask is not None
    assert drawn.mask.shape == (3, SIZE * len(ways))
    outputs = []
    for r, way in enumerate(ways):
        units = slice(r * SIZE, (r + 1) * SIZE)
        w_ih, w_hh = way.weights()
        u = x @ w_ih.T + way.bias_ih
        full = len(ways) * SIZE
        zone = reference._zoneout(drawn.keys, torch.arange(full)[units], full, drawn.zoneout)
        y, _, _ = reference._one_way(
            u, w_hh, None, None, way.bias_hh, LENGTHS, drawn.mask[:, units], drawn.noise[..., units], None,
            cell.name, way.reverse, zone,
        )  # fmt: skip
        outputs.append(y)
    want = torch.cat(outputs, -1).transpose(0, 1)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    weights = list(rnn.parameters())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), weights) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["weight noise", "DropConnect"])
def test_weights_are_disturbed_once_a_step(name: str) -> None:
    """The net is that of the disturbed weights; off a band nothing appears."""
    rnn, changed = stack(SAMPLED[name], structure=BandedConfig(half_width=2)), stack()
    (way,), (other,) = rnn.layers[0], changed.layers[0]
    w_ih, w_hh = way.weight_ih.detach(), way.weight_hh.blocks().detach()
    seen_ih, seen_hh = (w.detach() for w in way.weights())
    assert not seen_hh[w_hh == 0].any()
    if name == "weight noise":
        torch.testing.assert_close(seen_ih, w_ih + 0.3 * of_step(rnn.regularizer.clock, "0.0.weight_ih", w_ih))
        noise = (seen_hh - w_hh)[w_hh != 0]
        assert float(noise.std()) == pytest.approx(0.3, rel=0.2)
    else:
        assert torch.equal(seen_ih, w_ih)
        kept = seen_hh != 0
        torch.testing.assert_close(seen_hh[kept], w_hh[kept] / 0.6)
    with torch.no_grad():
        for mine, theirs in ((other.bias_ih, way.bias_ih), (other.bias_hh, way.bias_hh), (other.weight_ih, seen_ih)):
            mine.copy_(theirs)
        other.weight_hh.weight.copy_(seen_hh.view(4 * SIZE, SIZE))
    torch.testing.assert_close(forward(rnn), forward(changed), rtol=1e-5, atol=1e-6)


def test_gradient_noise_is_the_gradient_of_a_penalty() -> None:
    rnn = stack(merge(PENALTIES["gradient noise"], {"later": {"decay": {"kind": "power", "power": 0.55}}}))
    for step in (3, 4):
        at_step(rnn, 7, step)
        gradients = torch.autograd.grad(weight_penalty(rnn), list(rnn.parameters()))
        for (name, p), gradient in zip(rnn.named_parameters(), gradients, strict=True):
            std = 0.3 * (1 + step) ** (-0.275)
            torch.testing.assert_close(gradient, std * of_step(rnn.regularizer.clock, name, p))


# Dropout


@pytest.mark.parametrize("name", [n for n in SAMPLED if "noise" not in n])
def test_a_mask_keeps_what_it_should(name: str) -> None:
    """Zeros at the rate, the rest divided by what is kept; the same in each frame where it should be."""
    rnn = stack(SAMPLED[name], hidden_size=64)
    keys = torch.arange(40)
    if "input" in name:
        mask = rnn.regularizer.input(torch.ones(40, 30, 64), keys)
    elif "output" in name:
        mask = rnn.regularizer.output(0, torch.ones(40, 30, 64), keys)
    elif name == "DropConnect":
        (way,) = rnn.layers[0]
        mask = way.weights()[1] / way.weight_hh.blocks()
    else:
        drawn = rnn.regularizer.draw(0, torch.ones(30, 40, 5), 64, keys, gated=True)
        mask = drawn.update if name == "recurrent dropout" else drawn.mask
    assert torch.allclose(mask[mask != 0], torch.tensor(1 / 0.6))
    assert float((mask == 0).float().mean()) == pytest.approx(0.4, abs=0.03)
    if "variational" in name and mask.ndim == 3:
        assert torch.equal(mask, mask[:, :1].expand_as(mask))
    elif mask.ndim == 3:
        assert not torch.equal(mask[:, :1], mask[:, 1:2])


@pytest.mark.parametrize("cell", [LSTMConfig(), GRUConfig()], ids=kind)
def test_dropout_of_the_update_spares_the_state(cell: Any) -> None:
    rnn = stack(SAMPLED["recurrent dropout"], cell)
    (way,), x = rnn.layers[0], frames().transpose(0, 1)
    k = rnn.regularizer.draw(0, x, SIZE, KEYS, gated=True).update
    h = c = torch.zeros(3, SIZE)
    states = []
    for t in range(FRAMES):
        u, v = x[t] @ way.weight_ih.T + way.bias_ih, h @ way.weight_hh.dense().T + way.bias_hh
        if cell.kind == "lstm":
            i, f, g, o = (u + v).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * k[t] * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (ur, uz, un), (vr, vz, vn) = u.chunk(3, -1), v.chunk(3, -1)
            z = (uz + vz).sigmoid()
            h = (1 - z) * k[t] * (un + (ur + vr).sigmoid() * vn).tanh() + z * h
        states.append(h)
    torch.testing.assert_close(rnn(frames(), None, KEYS)[0], torch.stack(states, 1), rtol=1e-5, atol=1e-6)


def test_zoneout_keeps_old_states_in_training_and_takes_the_mean_in_evaluation() -> None:
    rnn = stack({"later": {"zoneout": 0.5, "zoneout_cell": 0.1}})
    y = forward(rnn)[0]
    share = float((y[1:] == y[:-1]).float().mean())
    assert 0.35 < share < 0.65
    rnn.eval()
    (way,) = rnn.layers[0]
    u = frames().transpose(0, 1) @ way.weight_ih.T + way.bias_ih
    want, _, _ = reference.recurrence(
        u, way.weight_hh.blocks(), None, None, way.bias_hh, LENGTHS, None, None, "lstm", [False], (0.5, 0.1)
    )
    torch.testing.assert_close(forward(rnn), want.transpose(0, 1), rtol=1e-5, atol=1e-6)


# Norms


def squares(rnn: RNN) -> torch.Tensor:
    return next(m for m in rnn.modules() if isinstance(m, Structure)).dense().view(4, SIZE, SIZE)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("l1", lambda rnn: sum(p.abs().sum() for p in rnn.parameters() if p.ndim > 1)),
        ("soft l1", lambda rnn: sum((p**2 + 1e-8).sqrt().sum() for p in rnn.parameters() if p.ndim > 1)),
        ("l2", lambda rnn: sum((p**2).sum() for p in rnn.parameters() if p.ndim > 1)),
        ("nuclear", lambda rnn: torch.linalg.svdvals(squares(rnn)).sum()),
        ("spectral", lambda rnn: torch.linalg.svdvals(squares(rnn))[:, 0].square().sum() / 2),
        ("orthogonality", lambda rnn: (squares(rnn).mT @ squares(rnn) - torch.eye(SIZE)).square().sum()),
    ],
)
@pytest.mark.parametrize("structure", [DenseConfig(), BandedConfig(half_width=2)], ids=kind)
def test_a_norm_is_its_formula(name: str, formula: Any, structure: Any) -> None:
    rnn = stack(PENALTIES[name], structure=structure)
    weights = list(rnn.parameters())
    got, want = weight_penalty(rnn), 0.3 * formula(rnn)
    if name in ("l1", "soft l1", "l2") and structure.kind == "banded":
        want = want + 0.3 * 0  # a band's numbers are one vector a gate, which is a matrix of the model all the same
    torch.testing.assert_close(got, want)
    gradients = [torch.autograd.grad(x, weights, allow_unused=True) for x in (got, want)]
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", ["l1", "soft l1", "l2", "nuclear", "spectral", "orthogonality", "gradient noise"])
def test_what_is_of_the_whole_model_is_there_once(name: str) -> None:
    """Where two stacks of a model ask for it, as a transducer's encoder and predictor may; the stronger counts."""
    ((group, given),) = PENALTIES[name].items()
    weak = {group: {key: value / 2 for key, value in given.items()}}
    one, two = (nn.ModuleList([stack(PENALTIES[name]), stack(more)]) for more in (None, weak))
    torch.testing.assert_close(weight_penalty(one), weight_penalty(two))


def test_penalties_of_states_are_means_over_real_frames() -> None:
    for name, formula in (
        ("norm stabiliser", lambda h: (h.norm(dim=1).diff() ** 2).mean()),
        ("activation", lambda h: (h**2).mean()),
        ("temporal activation", lambda h: (h.diff(dim=0) ** 2).mean()),
    ):
        rnn = stack(PENALTIES[name])
        y = forward(rnn)
        valid = torch.tensor([True, False, True])
        (loss,) = activation_losses(rnn, valid).values()
        want = 0.3 * sum(formula(row[:n]) for row, n, v in zip(y, LENGTHS, valid, strict=True) if v)
        torch.testing.assert_close(loss.sum, want)
        assert (loss.count, loss.unit) == (2.0, "samples")
        assert all(g.isfinite().all() for g in torch.autograd.grad(loss.sum, list(rnn.parameters())))
    every, two = stack(PENALTIES["norm stabiliser"], num_layers=2), stack(PENALTIES["activation"], num_layers=2)
    outputs = [every(frames(), None, KEYS, all_layers=True), two(frames(), None, KEYS, all_layers=True)]
    stabilised, last = (next(iter(activation_losses(rnn, LENGTHS > 0).values())).sum for rnn in (every, two))
    want = sum(0.3 * (h.norm(dim=2).diff() ** 2).mean(1).sum() for h in outputs[0][1])
    torch.testing.assert_close(stabilised, want)
    torch.testing.assert_close(last, 0.3 * (outputs[1][1][1] ** 2).mean((1, 2)).sum())


@pytest.mark.parametrize("structure", [DenseConfig(), BlockDiagonalConfig(num_blocks=3), DiagonalConfig()], ids=kind)
def test_max_norm_is_a_parametrisation(structure: Any) -> None:
    """The forward pass sees bounded rows, in evaluation too; the parameters are what they were."""
    rnn = stack({"max_norm": 0.4}, structure=structure)
    before = copy.deepcopy(rnn.state_dict())
    (way,) = rnn.layers[0]
    for mode in (rnn.train(), rnn.eval()):
        forward(mode)
        w_ih, w_hh = way.weights()
        rows = w_hh.abs() if w_hh.ndim == 2 else w_hh.norm(dim=-1)
        assert w_ih.norm(dim=1).max() <= 0.4 + 1e-6
        assert rows.max() <= 0.4 + 1e-6
    free = way.weight_hh.blocks()
    inside = free.abs() < 0.4 if free.ndim == 2 else (free.norm(dim=-1) < 0.4)[..., None].expand_as(free)
    assert torch.equal(w_hh[inside], free[inside])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), rnn.state_dict().values(), strict=True))
    for gate, matrix in enumerate(gate_matrices(way).values()):  # what `analyze` looks at is what the net does
        bounded = w_hh[gate].detach().double()
        want = torch.diag(bounded) if bounded.ndim == 1 else torch.block_diag(*bounded)
        torch.testing.assert_close(torch.from_numpy(matrix), want)
    norms = [float(torch.linalg.matrix_norm(torch.from_numpy(m), 2)) for m in gate_matrices(way).values()]
    assert logged(rnn)["norm/layers.0.0"] == pytest.approx(max(norms), rel=1e-5)
    forward(rnn.train()).square().sum().backward()
    assert way.weight_ih.grad.abs().sum() > 0


@pytest.mark.parametrize(
    "structure",
    [
        DenseConfig(),
        BlockDiagonalConfig(num_blocks=3),
        PermutedBlockDiagonalConfig(num_blocks=3),
        DiagonalConfig(),
        BandedConfig(half_width=2),
        LowRankConfig(rank=2),
        SparseStructureConfig(density=0.5),
    ],
    ids=kind,
)
def test_plain_weights_are_those_within_the_largest_norm(structure: Any) -> None:
    """What is analysed, disturbed and exported is what an evaluation computes with, of any structure."""
    rnn = stack({"max_norm": 0.2}, structure=structure).eval()
    want = forward(rnn)
    (way,) = rnn.layers[0]
    free = way.weight_hh.dense().detach().clone()
    way.make_plain()
    torch.testing.assert_close(forward(rnn), want)
    assert way.weight_hh.dense().norm(dim=1).max() <= 0.2 + 1e-6 < free.norm(dim=1).max()
    assert way.weight_ih.norm(dim=1).max() <= 0.2 + 1e-6


# Fast dropout


def exact(function: Any, m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Moments by a sum over 8,001 places within nine deviations."""
    z = torch.linspace(-9, 9, 8001, dtype=torch.float64)
    w = torch.exp(-z.square() / 2)
    w = w / w.sum()
    y = function(m[..., None] + v.sqrt()[..., None] * z)
    mean = y @ w
    return mean, (y - mean[..., None]).square() @ w


GRID = torch.meshgrid(
    torch.linspace(-4, 4, 33, dtype=torch.float64), torch.linspace(0.05, 4, 40, dtype=torch.float64), indexing="ij"
)


@pytest.mark.parametrize(
    ("closed", "function", "mean_error", "variance_error"),
    [
        (recurrent_moments.sigmoid, torch.sigmoid, 0.009, 0.0275),
        (recurrent_moments.tanh, torch.tanh, 0.032, 0.13),
        (fast_dropout.relu, torch.relu, 1e-5, 1e-5),
    ],
    ids=["sigmoid", "tanh", "relu"],
)
def test_closed_moments_are_as_good_as_they_are(
    closed: Any, function: Any, mean_error: float, variance_error: float
) -> None:
    (mean, variance), (m, v) = closed(*GRID), exact(function, *GRID)
    assert (mean - m).abs().max() <= mean_error
    assert (variance - v).abs().max() <= variance_error
    assert variance.min() >= 0


@pytest.mark.parametrize("function", [torch.sigmoid, torch.tanh])
def test_moments_by_quadrature_are_exact(function: Any) -> None:
    for got, want in zip(fast_dropout.quadrature(function, *GRID), exact(function, *GRID), strict=True):
        assert (got - want).abs().max() <= 1e-4
    output = fast_dropout.sigmoid_mean_by_quadrature(*GRID).sigmoid()
    assert (output - exact(torch.sigmoid, *GRID)[0]).abs().max() <= 1e-4
    assert fast_dropout.sigmoid_mean_by_quadrature(torch.tensor([90.0, -90.0]), torch.ones(2)).isfinite().all()


def test_dropout_and_affine_moments_are_those_of_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    m, v = torch.randn(6, generator=generator), torch.rand(6, generator=generator)
    weight, bias = torch.randn(4, 6, generator=generator), torch.randn(4, generator=generator)
    x = m + v.sqrt() * torch.randn(100_000, 6, generator=generator)
    kept = x * (torch.rand(100_000, 6, generator=generator) >= 0.3)
    mean, variance = recurrent_moments.dropout(m, v, 0.3)
    scale = float(variance.sqrt().mean())
    torch.testing.assert_close(kept.mean(0), mean, rtol=0.01, atol=0.01 * scale)
    torch.testing.assert_close(kept.var(0), variance, rtol=0.02, atol=0)
    mean, variance = fast_dropout.affine(mean, variance, weight, bias)
    samples = kept @ weight.T + bias
    torch.testing.assert_close(samples.mean(0), mean, rtol=0.01, atol=0.01 * float(variance.sqrt().mean()))
    torch.testing.assert_close(samples.var(0), variance, rtol=0.02, atol=0)


FAST = {"fast_dropout": {"input": 0.1, "hidden": 0.2, "output": 0.5}}


@pytest.mark.parametrize("moments", ["closed", "quadrature"])
@pytest.mark.parametrize("structure", [DenseConfig(), BlockDiagonalConfig(num_blocks=3), DiagonalConfig()], ids=kind)
def test_a_fast_dropout_net_is_the_mean_of_sampled_ones(moments: str, structure: Any) -> None:
    given = merge(FAST, {"fast_dropout": {"moments": moments}})
    rnn = stack(given, ElmanConfig(), hidden_size=48, structure=structure)
    got = rnn(frames(), LENGTHS, KEYS)[0]
    assert torch.equal(got, rnn.eval()(frames(), LENGTHS)[0])  # nothing is sampled
    (way,), generator = rnn.layers[0], torch.Generator().manual_seed(0)

    def dropped(x: torch.Tensor, rate: float) -> torch.Tensor:
        return x * (torch.rand(x.shape, generator=generator) >= rate)

    x, h = frames()[:1].expand(20_000, -1, -1), torch.zeros(20_000, 48)
    with torch.no_grad():
        for t in range(FRAMES):
            pre = dropped(x[:, t], 0.1) @ way.weight_ih.T + way.bias_ih + way.bias_hh
            h = torch.tanh(pre + way.weight_hh(dropped(h, 0.2)))
        last = dropped(h, 0.5)
    assert (last.mean(0) - got[0, -1]).abs().max() < (0.015 if moments == "quadrature" else 0.08)
    if moments == "quadrature":  # the closed variance of a tanh is too large by up to 0.12
        assert (last.var(0) - rnn.variance[0, -1]).abs().max() < 0.01
    assert not got[1, LENGTHS[1] :].any()


def test_the_log_says_where_fast_dropout_is_a_loop(caplog: pytest.LogCaptureFixture) -> None:
    for cell, said in ((ElmanConfig(), not kernel_takes_fast_dropout()), (ElmanConfig(activation="relu"), True)):
        say_once.cache_clear()
        caplog.clear()
        with caplog.at_level("INFO", "kernels"):
            forward(stack(FAST, cell))
        assert ("fast_dropout: the reference loop" in caplog.text) == said


def kernel_takes_fast_dropout() -> bool:
    return recurrent_moments.explain(torch.zeros(1)).startswith("C++")


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ({"cell": LSTMConfig()}, "moments are known for cell"),
        ({"norm": "layer"}, "take norm = none"),
        ({"regularizers": merge(FAST, {"noise": {"hidden": 0.1}})}, "noise.hidden: the state is a distribution"),
        ({"regularizers": {"later": {"recurrent_dropout": 0.1}}}, "cell without gates"),
        ({"regularizers": {"later": {"zoneout_cell": 0.1}}}, "only an lstm has a c"),
        ({"input_range": 0.1, "input_initialization": GlorotConfig()}, "input_initialization.kind = glorot: take one"),
    ],
)
def test_what_does_not_go_together_is_refused(more: dict[str, Any], wanted: str) -> None:
    with pytest.raises(ValueError, match=wanted):
        RNNConfig(**{"cell": ElmanConfig(), "norm": "none", "regularizers": FAST, **more})


# Every recipe, any number of ranks

EVERYTHING = merge(
    {"later": {"zoneout": 0.1, "zoneout_cell": 0.1}, "max_norm": 1.0}, *SAMPLED.values(), *PENALTIES.values()
)
WEAK = {"norms": {"nuclear": 1e-3, "l1": 1e-3}, "later": {"orthogonality": 1e-3, "gradient_noise": 0.05}}


@pytest.mark.parametrize("name", SAMPLED)
def test_half_precision_meets_the_same_noise(name: str) -> None:
    rnn = stack(SAMPLED[name], num_layers=2)
    with torch.autocast("cpu", torch.bfloat16):
        got = forward(rnn)
    torch.testing.assert_close(got.float(), forward(rnn), rtol=0.05, atol=0.03)


def off(given: dict[str, Any]) -> dict[str, Any]:
    return {name: off(value) if isinstance(value, dict) else 0.0 for name, value in given.items()}


def test_everything_combines() -> None:
    rnn = stack(EVERYTHING, num_layers=2)
    y = forward(rnn)
    loss = y.square().sum() + weight_penalty(rnn) + activation_losses(rnn, LENGTHS > 0)["activations"].sum
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, list(rnn.parameters())))
    for name, given in (SAMPLED | PENALTIES).items():  # none is lost among the others
        without = stack(merge(EVERYTHING, off(given)), num_layers=2)
        less = forward(without).square().sum() + weight_penalty(without)
        if states := activation_losses(without, LENGTHS > 0):
            less = less + states["activations"].sum
        assert less != loss, name
    told = rnn.describe()["regularizers"]
    assert "noise.hidden 0.3" in told
    assert "later.variational.input 0.4" in told


def regularised(
    folder: Path, ranks: int, stage: int, chosen: dict[str, Any] | None = None, cell: str = "{kind: lstm}"
) -> dict[str, Any]:
    chosen = chosen or merge(EVERYTHING, WEAK)
    arguments = [
        "tracking.wandb=disabled", "validation.table_rows=0", "data.delay_steps=12", "data.num_train=90",
        "data.num_valid=10", "plan={micro_batch_samples: 3, micro_batches_per_step: 3}", "model.hidden_size=64",
        f"model.cell={cell}", "model.parametrization.kind=free", "optimizer.kind=adamw", "max_steps=4",
        f"zero.stage={stage}", f"model.regularizers={chosen}", "name=run", f"runs_dir={folder}",
    ]  # fmt: skip
    return run_ranks(ranks, fit, arguments, "copying/t1000")[0]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of one process that is regularised in every way."""
    return regularised(tmp_path_factory.mktemp("alone"), 1, 0)


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_a_regularised_run_is_the_same_on_any_number_of_ranks(
    stage: int, alone: dict[str, Any], tmp_path: Path
) -> None:
    """All of them at once, gradient noise among them; at stage 3 the recurrent matrices are really partitioned."""
    two = regularised(tmp_path, 2, stage)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=2e-5, msg=name)
    assert read_ledger(two["run"] / "ledger") == read_ledger(alone["run"] / "ledger")


@pytest.mark.distributed
def test_fast_dropout_is_the_same_on_two_ranks(tmp_path: Path) -> None:
    """Beside gradient noise and penalties, at the stage whose gradients are partitioned."""
    chosen = merge(FAST, WEAK)
    one, two = (regularised(tmp_path / str(n), n, 2, chosen, "{kind: rnn, activation: tanh}") for n in (1, 2))
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, rtol=1e-4, atol=2e-5, msg=name)


def test_the_engine_adds_what_they_ask_for(alone: dict[str, Any], tmp_path: Path) -> None:
    """Penalties of states are a loss on record, and weights that cost much are driven to zero."""
    rows = [row for row in read_lines(alone["run"] / "metrics.jsonl") if row["kind"] == "train"]
    assert all(row["activations"] > 0 for row in rows)
    plain, decayed = (
        regularised(tmp_path / name, 1, 0, {"norms": {"l2": strength}})["weights"]
        for name, strength in (("plain", 0.0), ("decayed", 10.0))
    )
    lower = [decayed[n].abs().sum() < plain[n].abs().sum() for n in plain if plain[n].ndim > 1]
    assert lower
    assert all(lower)


def test_the_engine_tells_the_step(tmp_path: Path) -> None:
    """Noise that is gone after the first step leads elsewhere than noise that stays."""
    decays = ({"kind": "linear", "steps": 1}, {"kind": "constant"})
    chosen = [{"noise": {"weights": 0.1, "decay": decay}} for decay in decays]
    gone, stays = (regularised(tmp_path / str(i), 1, 0, c)["weights"] for i, c in enumerate(chosen))
    assert any(not torch.equal(gone[name], stays[name]) for name in gone)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        ("copying/t1000", "model"),
        ("adding/t200", "model"),
        ("pixels/sequential", "model"),
        ("speech/tones", "model.rnn"),
        ("timit_frames/read_ru", "model"),
        ("music/chorales", "model"),
        ("language_model/austen_characters", "model.rnn"),
        ("transducer/tones", "model.encoder.rnn"),
        ("transducer/tones", "model.predictor"),
        ("video_action/watch", "model.rnn"),
    ],
)
def test_every_recipe_takes_them(config: str, key: str) -> None:
    loaded = recipe.load(config, [f"{key}.regularizers.noise.hidden=0.1"])
    model = operator.attrgetter(key)(loaded.config)
    assert model.regularizers.noise.hidden == 0.1
    with pytest.raises(UserError, match="did you mean"):
        recipe.load(config, [f"{key}.regularizers.noise.hiden=0.1"])


def test_every_key_is_in_the_documents() -> None:
    text = (PROJECT / "docs/regularizers.md").read_text(encoding="utf-8")

    def names(values: dict[str, Any], at: str) -> list[str]:
        nested = [
            names(v, f"{at}{n}.") if isinstance(v, dict) and n != "decay" else [at + n] for n, v in values.items()
        ]
        return [name for part in nested for name in part]

    for name in names(RegularizersConfig().model_dump(), ""):
        group, _, last = name.rpartition(".")
        assert f"`{name}`" in text or (f"`{group}." in text and f"`.{last}`" in text), name


# Starts


def test_starts_of_input_and_recurrence() -> None:
    rnn = stack(
        None,
        hidden_size=200,
        initialization=GaussianConfig(std=0.02),
        input_initialization=SparseConfig(nonzero=15, std=0.5),
    )
    (way,) = rnn.layers[0]
    assert float(way.weight_hh.dense().std()) == pytest.approx(0.02, rel=0.02)
    gates = way.weight_ih.unflatten(0, (4, 200))
    assert ((gates != 0).sum(1) == 15).all()
    assert float(gates[gates != 0].std()) == pytest.approx(0.5, rel=0.15)
    glorot = stack(None, hidden_size=200, input_initialization=GlorotConfig(), initialization=GlorotConfig(gain=2.0))
    (way,) = glorot.layers[0]
    assert float(way.weight_ih.abs().max()) == pytest.approx(math.sqrt(6 / 205), rel=0.02)
    assert float(way.weight_hh.dense().abs().max()) == pytest.approx(2 * math.sqrt(6 / 400), rel=0.01)


def test_a_plain_stack_has_no_more_parameters_than_before() -> None:
    names = [name for name, _ in stack().named_parameters()]
    assert names == [f"layers.0.0.{n}" for n in ("weight_ih", "bias_ih", "bias_hh", "weight_hh.weight")]
    assert isinstance(stack().regularizer, nn.Module)
    assert not stack().regularizer.state_dict()
