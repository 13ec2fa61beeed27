"""Jacobians, noise and attacks: what is zero changes nothing, what is larger never helps, what is linear is known."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from tests.data.test_generated import write_set
from trainer import recipe
from trainer.analysis import estimates, jacobian, lipschitz, matrices, perturbations
from trainer.analysis import inputs as disturbed
from trainer.analysis.perturbations import Judge
from trainer.analysis.recurrences import gate_matrices, logged, recurrences
from trainer.analysis.run import lines
from trainer.analysis.study import Options, curves_of, judge_of
from trainer.engine import initialise
from trainer.models.rnn import RNNConfig

CELLS = [{"kind": "rnn"}, {"kind": "rnn", "activation": "modrelu"}, {"kind": "gru"}, {"kind": "lstm"}]
SIZES = (0.0, 0.05, 0.2)


def judge(folder: Path, *more: str) -> Judge:
    write_set(folder / "pictures", packed=True)
    sizes = ["data.num_valid=2", "plan.micro_batch_samples=3", "model.hidden_size=12", *more]
    task = recipe.load("pixels/sequential", [f"data.corpus={{kind: mnist, path: {folder / 'pictures'}}}", *sizes])
    model = task.build_model().eval()
    initialise(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2.0)  # a net that listens to its input
    perturbations.plain_weights(model)
    return judge_of(task, model, "test", 6)


def test_the_gradient_of_a_loss_costs_no_scores(tmp_path: Path) -> None:
    judged = judge(tmp_path)
    batch = judged.batches[0]
    climbed = judged.step(batch)
    with torch.no_grad():
        scored = judged.step(batch)
    assert not climbed.rows
    assert not climbed.metrics
    assert len(scored.rows) == int(batch["valid"].sum())
    assert torch.equal(climbed.losses["classes"].sum, scored.losses["classes"].sum)


@pytest.mark.parametrize("cell", CELLS, ids=str)
@pytest.mark.parametrize("structure", ["dense", "diagonal"])
def test_one_step_is_that_of_the_layer_and_its_jacobian_is_the_difference(cell: dict, structure: str) -> None:
    config = RNNConfig(hidden_size=5, num_layers=1, norm="none", cell=cell, structure={"kind": structure})
    rnn = config.build(3)
    ((_, layer),) = recurrences(rnn)
    x = torch.randn(1, 7, 3, generator=torch.Generator().manual_seed(0))
    u = jacobian.gate_inputs(layer, x)[0]
    step, state = jacobian.one_step(layer), torch.zeros(jacobian.state_size(layer), dtype=torch.float64)
    y, _ = rnn(x, None)
    for t in range(7):
        before, state = state, step(u[t], state)
        torch.testing.assert_close(state[:5].float(), y[0, t].detach(), atol=1e-5, rtol=1e-5)
    exact = torch.func.jacfwd(step, 1)(u[6], before)
    e = torch.randn(len(state), dtype=torch.float64) * 1e-6
    torch.testing.assert_close(exact @ e, (step(u[6], before + e) - step(u[6], before - e)) / 2, atol=1e-14, rtol=1e-5)


def test_lyapunov_exponents_of_a_linear_net_are_the_logarithms_of_its_eigenvalues() -> None:
    a = torch.diag(torch.tensor([0.9, 0.5, 0.25], dtype=torch.float64)) + torch.ones(3, 3, dtype=torch.float64).triu(1)
    found = jacobian.dynamics(lambda u, s: a @ s + u, torch.randn(2, 400, 3, dtype=torch.float64), 3)
    want = torch.tensor([0.9, 0.5, 0.25], dtype=torch.float64).log().expand(2, 3)
    torch.testing.assert_close(found.exponents, want, atol=0.02, rtol=0)
    torch.testing.assert_close(found.eigenvalues[0, 0].abs().sort().values, a.diagonal().sort().values)


@pytest.mark.parametrize("kind", ["gru", "rnn"])
def test_size_zero_changes_nothing_and_a_larger_attack_never_helps(kind: str, tmp_path: Path) -> None:
    free = ["model.cell={kind: " + kind + "}", "model.parametrization.kind=free", "model.input_range=1"]
    judged = judge(tmp_path, *free)
    inputs = judged.recipe.inputs()
    clean = judged.score()
    for attack in ("pgd_largest", "pgd_l2", "fgsm"):
        scores = disturbed.attack_curve(judged, inputs, attack, SIZES)
        assert scores[0] == clean
        losses = [score["loss"] for score in scores]
        assert losses == sorted(losses), attack
    weights = perturbations.weight_attack_curve(judged, SIZES)
    states = perturbations.state_curve(judged, SIZES, 0, attack=True)
    for scores in (weights, states):
        assert scores[0] == clean
        losses = [score["loss"] for score in scores]
        assert losses == sorted(losses)
        assert losses[-1] > losses[0]
    random = perturbations.weight_noise_curve(judged, SIZES, 0)
    assert random[0] == clean
    assert random[-1]["loss"] < weights[-1]["loss"]
    assert judged.score() == clean  # all is as it was
    assert {name for name, _ in curves_of(judged, Options(seeds=1))} == {
        *disturbed.NOISES,
        *disturbed.ATTACKS,
        "weights",
        "weights_worst",
        "state",
        "state_worst",
    }


@pytest.mark.parametrize("more", [[], ["model.num_layers=2", "model.residual=true", "model.residual_scale=4"]])
def test_no_attack_passes_the_lipschitz_bound(tmp_path: Path, more: list[str]) -> None:
    judged = judge(tmp_path, "model.cell={kind: rnn, activation: tanh}", "model.parametrization.kind=cayley", *more)
    inputs, batch = judged.recipe.inputs(), judged.batches[0]
    x = batch["inputs"]
    constant, why = lipschitz.bound(judged.model, x.shape[1])
    assert constant < float("inf")
    assert not why
    moved = judged.model(x + 0.01) - judged.model(x)
    assert float((moved.norm(dim=-1) / (0.01 * x[0].numel() ** 0.5)).max()) <= constant
    if more:
        scaled = judged.model.rnn.scales[1].weight
        with torch.no_grad():
            scaled *= 10
            assert lipschitz.bound(judged.model, x.shape[1])[0] > 5 * constant
            scaled /= 10
    certified = lipschitz.certified_errors(judged, inputs, SIZES)
    attacked = disturbed.attack_curve(judged, inputs, "pgd_l2", SIZES)
    assert certified[0] == attacked[0]["monitor"]
    assert all(bound >= score["monitor"] for bound, score in zip(certified, attacked, strict=True))
    values = {"inputs": "inputs", "recurrences": {}, "curves": {}, "monitor": "error", "sizes": SIZES}
    (told,) = lines({**values, "certified": certified})
    assert told.endswith(f"(certified): 0: {certified[0]:.4g}  0.05: {certified[1]:.4g}  0.2: {certified[2]:.4g}")


@pytest.mark.parametrize(("kind", "size"), [("dense", 520), ("block_diagonal", 520), ("diagonal", 520)])
def test_wide_recurrences_are_logged_by_their_blocks(kind: str, size: int) -> None:
    config = RNNConfig(hidden_size=size, num_layers=1, norm="none", cell={"kind": "rnn"}, structure={"kind": kind})
    rnn = config.build(3)
    initialise(rnn, 0)
    ((_, layer),) = recurrences(rnn)
    whole = layer.weight_hh.dense().detach().double().numpy()
    found = {name.split("/")[0]: value for name, value in logged(rnn).items()}
    wanted = {"norm": matrices.spectral_norm(whole), "radius": matrices.spectral_radius(whole)}
    if kind != "dense":
        wanted["nonnormality"] = matrices.henrici(whole) / np.linalg.norm(whole)
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=0.02 if name == "norm" else 1e-3, abs=1e-4), name


STRUCTURES = ["dense", "block_diagonal", "diagonal", "low_rank", "banded"]


@pytest.mark.parametrize("structure", STRUCTURES)
def test_scaled_down_after_training_is_of_norm_or_radius_one(
    structure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    more = {"block_diagonal": ", num_blocks: 2", "low_rank": ", rank: 3", "banded": ", half_width: 2"}
    kind = f"model.structure={{kind: {structure}{more.get(structure, '')}}}"
    judged = judge(tmp_path, kind, "model.cell.kind=gru", "model.parametrization.kind=free")
    ((_, layer),) = recurrences(judged.model)
    with torch.no_grad():
        layer.weight_hh.weight.mul_(4.0)
    before, clean = gate_matrices(layer), judged.score()
    seen: list[dict[str, np.ndarray]] = []
    step = judged.recipe.step
    monkeypatch.setattr(judged.recipe, "step", lambda *a: seen.append(gate_matrices(layer)) or step(*a))
    for of in ("norm", "radius"):
        assert perturbations.normalised_score(judged, of) != clean
        for gate, a in seen[-1].items():
            size = estimates.size(before[gate], of, "exact")
            np.testing.assert_allclose(a, before[gate] / max(size, 1.0), atol=1e-5)
    assert judged.score() == clean


def test_an_orthogonal_recurrence_is_logged_as_normal(tmp_path: Path) -> None:
    model: nn.Module = RNNConfig(hidden_size=16, num_layers=2, parametrization={"kind": "cayley"}).build(3)
    found = logged(model)
    assert len(found) == 6
    for name, value in found.items():
        assert value == pytest.approx(0.0 if name.startswith("nonnormality") else 1.0, abs=1e-5)
