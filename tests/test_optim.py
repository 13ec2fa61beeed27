"""Schedules have the shape they say, validation decides as it says, and a non-finite gradient moves nothing."""

import math

import pytest
import torch
from pydantic import ValidationError

from trainer.models.cells import ElmanConfig
from trainer.models.parametrizations import CayleyConfig
from trainer.models.rnn import RNNConfig
from trainer.optim import (
    AdamWConfig,
    ConstantConfig,
    CosineConfig,
    Plateau,
    PlateauConfig,
    RMSpropConfig,
    SGDConfig,
    build_optimizer,
    set_lr,
)


def test_cosine_rises_falls_and_stays_down() -> None:
    schedule, plateau = CosineConfig(warmup_steps=10, final=0.1), Plateau()
    factors = [schedule.factor(s, 110, plateau) for s in range(150)]
    assert factors[0] == pytest.approx(1 / 11)
    assert factors[:11] == sorted(factors[:11])
    assert factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(0.1 + 0.9 * 0.5)
    assert factors[10:111] == sorted(factors[10:111], reverse=True)
    assert factors[110:] == [pytest.approx(0.1)] * 40  # a run may go on past the length it began with


def test_plateau_cuts_after_patience_and_counts_for_early_stop() -> None:
    schedule, plateau = PlateauConfig(patience=2, cut=0.5), Plateau()
    better = [plateau.observe(v, i, schedule) for i, v in enumerate([3.0, 2.0, 2.5, math.nan, 2.2, 2.1, 1.0])]
    assert better == [True, True, False, False, False, False, True]
    assert plateau.scale == 0.25
    assert (plateau.best, plateau.best_step, plateau.since_best) == (1.0, 6, 0)
    assert schedule.factor(99, 100, plateau) == 0.25
    again = Plateau()
    again.restore(plateau.state())
    assert again.state() == plateau.state()


def test_a_nan_is_never_the_best() -> None:
    plateau = Plateau()
    assert not plateau.observe(math.nan, 1, ConstantConfig())
    assert plateau.observe(5.0, 2, ConstantConfig())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_moves_nothing(bad: float) -> None:
    net = torch.nn.Linear(3, 2)
    optimizer = build_optimizer(AdamWConfig(lr=0.1, average_decay=0.9, clip_norm=1.0), net, guards=True)
    net(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert not optimizer.refused
    assert optimizer.grad_norm == pytest.approx(math.sqrt(8))
    before = [p.clone() for p in net.parameters()] + [optimizer.state[p]["average"].clone() for p in net.parameters()]
    net.weight.grad[0, 0] = bad
    optimizer.step()
    after = [*net.parameters(), *(optimizer.state[p]["average"] for p in net.parameters())]
    assert optimizer.refused
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_weight_without_a_gradient_moves_as_one_whose_gradient_is_zero() -> None:
    """One process does what several do, where DeepSpeed averages zeros for it: the weight decays."""
    nets = [torch.nn.Linear(1, 1, bias=False) for _ in range(2)]
    nets[1].load_state_dict(nets[0].state_dict())
    before = nets[0].weight.detach().clone()
    nets[1].weight.grad = torch.zeros(1, 1)
    for net in nets:
        build_optimizer(AdamWConfig(lr=0.1, weight_decay=0.5), net, guards=True).step()
    assert torch.equal(nets[0].weight, nets[1].weight)
    assert not torch.equal(nets[0].weight, before)


def test_the_average_follows_its_formula() -> None:
    net = torch.nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(AdamWConfig(lr=0.1, average_decay=0.5), net, guards=True)
    values = []
    for _ in range(12):
        net.weight.grad = torch.ones_like(net.weight)
        optimizer.step()
        values.append(float(net.weight))
    want = values[0]
    for t, value in enumerate(values[1:], 2):
        decay = min(0.5, (1 + t) / (10 + t))
        want = decay * want + (1 - decay) * value
    assert float(optimizer.state[net.weight]["average"]) == pytest.approx(want, rel=1e-5)


def test_the_mean_of_all_weights_begins_when_validation_gets_worse() -> None:
    """Merity et al. 2018, algorithm 1: worse than the best of all but the last n validations before."""
    plateau = Plateau()
    values = [5.0, 4.0, 4.5, math.nan, 4.2, 4.1, 4.3, 3.0]
    triggered = []
    for step, value in enumerate(values):
        plateau.observe(value, step, ConstantConfig(), 3)
        triggered.append(plateau.triggered)
    assert triggered == [False] * 6 + [True] * 2  # 4.3 > 4.0, and three came between
    again = Plateau()
    again.restore(plateau.state())
    assert again.triggered

    net = torch.nn.Linear(1, 1, bias=False)
    optimizer = build_optimizer(SGDConfig(lr=0.5, average_trigger=3), net, guards=True)
    seen = []
    for step in range(6):
        optimizer.triggered = step >= 2
        net.weight.grad = torch.full_like(net.weight, float(step))
        before = float(net.weight.detach())
        optimizer.step()
        clipped = min(step, 1)  # to a norm of 1
        assert float(net.weight.detach()) == pytest.approx(before - 0.5 * clipped, abs=1e-5)
        seen.append(float(net.weight.detach()))
        assert ("average" in optimizer.state[net.weight]) == optimizer.triggered
    assert float(optimizer.state[net.weight]["average"]) == pytest.approx(sum(seen[2:]) / 4, abs=1e-5)
    with pytest.raises(ValidationError, match="there is one average"):
        SGDConfig(average_decay=0.9, average_trigger=5)


def test_vectors_do_not_decay() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.LayerNorm(2))
    groups = build_optimizer(AdamWConfig(weight_decay=0.3), net, guards=True).param_groups
    assert [(g["names"], g["weight_decay"]) for g in groups] == [
        (["0.weight"], 0.3),
        (["0.bias", "1.weight", "1.bias"], 0.0),
    ]


def test_numbers_behind_a_parametrised_matrix_have_a_rate_of_their_own_and_do_not_decay() -> None:
    stack = RNNConfig(hidden_size=6, num_layers=1, cell=ElmanConfig(), parametrization=CayleyConfig()).build(3)
    optimizer = build_optimizer(RMSpropConfig(parametrized_lr=0.1, weight_decay=0.5), stack, guards=True)
    set_lr(optimizer, 2e-3)
    rates = {name: (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for name in g["names"]}
    assert rates.keys() == dict(stack.named_parameters()).keys()
    own = {name for name in rates if "parametrizations" in name}
    assert own == {"layers.0.0.weight_hh.parametrizations.weight.original"}
    assert {rates[name] for name in own} == {(2e-4, 0.0)}
    assert rates["layers.0.0.weight_ih"] == (2e-3, 0.5)
    assert rates["layers.0.0.bias_hh"] == (2e-3, 0.0)
