"""Noise and attacks on inputs: of their size, inside the bounds, by the seed; what is binary stays so or between."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from tests.analysis.test_robustness import judge
from trainer import recipe
from trainer.analysis import inputs
from trainer.analysis.perturbations import Judge
from trainer.metrics import Loss
from trainer.recipe import StepOutput

BITS = recipe.Inputs("x", low=0.0, high=1.0, binary=True)


def linear_task(weight: Tensor) -> Judge:
    """Two samples of zeros and ones (2, T, D), the second shorter, whose loss is a weighted sum of them."""
    x = (torch.rand(2, *weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3).float()
    batch = {"keys": ["a", "b"], "valid": torch.ones(2, dtype=torch.bool), "x": x}
    batch["lengths"] = torch.tensor([len(weight), len(weight) - 3])

    def step(model: nn.Module, batch: dict, state: None) -> StepOutput:
        return StepOutput({"loss": Loss((batch["x"] * weight).sum(), 2.0, "samples")})

    return Judge(SimpleNamespace(step=step, monitor="loss"), nn.Identity(), [batch])


def test_noise_has_its_size_stays_inside_and_follows_its_seed(tmp_path: Path) -> None:
    judged = judge(tmp_path, "model.cell.activation=tanh")
    batch, bounds = judged.batches[0], judged.recipe.inputs()
    for kind in inputs.NOISES:
        assert inputs.noisy(batch, bounds, kind, 0.0, 0) is batch
        one, same, other = (inputs.noisy(batch, bounds, kind, 0.2, seed)["inputs"] for seed in (0, 0, 1))
        assert torch.equal(one, same)
        assert 0 <= float(one.min()) <= float(one.max()) <= 1
        assert kind == "clip" or not torch.equal(one, other)
    free = recipe.Inputs("inputs", relative=True)
    sound = {"keys": ["a"], "valid": torch.ones(1, dtype=torch.bool), "inputs": torch.randn(1, 9000)}
    sound["lengths"] = torch.tensor([8000])
    noise = inputs.noisy(sound, free, "gaussian", 0.1, 0)["inputs"] - sound["inputs"]
    assert not noise[0, 8000:].any()
    snr_db = 10 * torch.log10(sound["inputs"][0, :8000].square().mean() / noise[0, :8000].square().mean())
    assert float(snr_db) == pytest.approx(20.0, abs=0.3)


def test_the_worst_flips_of_a_linear_loss_are_those_that_gain_most() -> None:
    weight = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    judged = linear_task(weight)
    x, sizes = judged.batches[0]["x"], (0.0, 0.05, 0.1, 1.0)
    gains = (weight * (1 - 2 * x)).clamp_min(0)  # of each flip
    gains[1, 7:] = 0
    clean = float((x * weight).sum())
    for size, score in zip(sizes, inputs.attack_curve(judged, BITS, "flips_worst", sizes), strict=True):
        most = [int(size * count) for count in (80, 56)]
        best = sum(
            float(row.flatten().sort(descending=True).values[:n].sum()) for row, n in zip(gains, most, strict=True)
        )
        assert 2 * score["loss"] == pytest.approx(clean + best, rel=1e-5)


def test_random_flips_are_that_share_of_what_is_real() -> None:
    batch = linear_task(torch.ones(400, 8)).batches[0]
    x, turned = batch["x"], inputs.noisy(batch, BITS, "flips", 0.1, 0)["x"]
    assert set(turned.unique().tolist()) == {0.0, 1.0}
    assert not (turned != x)[1, 397:].any()
    assert float((turned != x)[0].float().mean()) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("kind", inputs.ATTACKS)
def test_attacks_leave_the_bounds_on_which_binary_inputs_lie(kind: str) -> None:
    """Where torch's clamp has no gradient, an attack would stand still and call the net robust."""
    weight = torch.randn(10, 8, generator=torch.Generator().manual_seed(0))
    judged = linear_task(weight)
    losses = [score["loss"] for score in inputs.attack_curve(judged, BITS, kind, (0.0, 0.1, 0.2))]
    assert losses[0] + 0.1 < losses[1] < losses[2]
    if kind == "fgsm":  # the best there is, by 0.1 wherever there is room
        x = judged.batches[0]["x"]
        gains = 0.1 * weight.abs() * (x == (weight < 0))
        gains[1, 7:] = 0
        assert 2 * (losses[1] - losses[0]) == pytest.approx(float(gains.sum()), rel=1e-4)
