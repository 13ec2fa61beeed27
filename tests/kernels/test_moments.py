"""The fast recurrence of means and variances is that of the loop, gradients too, and a well-formed operator."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import moments as module
from kernels.moments import explain, moments, reference, selftest
from tests.kernels.builds import LESSER, run_in

needs_kernel = pytest.mark.skipif(module.MISSING is not None, reason=f"no C++ kernels: {module.MISSING}")
NAMES = ("um", "uv", "weight", "m0", "v0")
# Steps, rows, units: none of each, one, not a multiple of a vector, more rows than a tile.
SHAPES = [(0, 2, 5), (3, 0, 5), (1, 1, 1), (4, 3, 19), (9, 33, 16), (2, 7, 100)]


def given(shape: tuple[int, int, int], scale: float = 1.0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(sum(shape))
    steps, batch, size = shape
    shapes = (steps, batch, size), (steps, batch, size), (size, size), (batch, size), (batch, size)
    um, uv, weight, m0, v0 = (scale * torch.randn(s, generator=generator) for s in shapes)
    return [um, uv.square(), weight / (scale * size**0.5), m0, v0.square()]


def computed(function: Any, inputs: list[Tensor], dtype: torch.dtype, rate: float) -> list[Tensor]:
    """Outputs, and the gradient of each input for directions that are no symmetric ones."""
    own = [x.to(dtype).requires_grad_() for x in inputs]
    out = function(*own, rate)
    generator = torch.Generator().manual_seed(0)
    unused = {"allow_unused": True, "materialize_grads": True}  # without steps
    directions = [torch.randn(x.shape, generator=generator).to(dtype) for x in out]
    return [x.detach().double() for x in (*out, *torch.autograd.grad(out, own, directions, **unused))]


@needs_kernel
@pytest.mark.parametrize("scale", [1.0, 8.0], ids=["usual", "saturated"])
@pytest.mark.parametrize("rate", [0.0, 0.7])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_loop(shape: tuple[int, int, int], rate: float, scale: float) -> None:
    inputs = given(shape, scale)
    assert explain(inputs[0]).startswith("C++")
    got, loop = (computed(function, inputs, torch.float32, rate) for function in (moments, reference))
    exact = computed(reference, inputs, torch.float64, rate)
    for name, a, b, c in zip(("m", "v", *NAMES), got, loop, exact, strict=True):
        # A variance near zero is the difference of two numbers, to which rounding is large in the loop too.
        assert (a - c).norm() <= 5e-6 * c.norm() + 4 * (b - c).norm(), name
    assert selftest() > 0


@needs_kernel
def test_a_part_alone_is_the_same() -> None:
    """Rows do not see each other, nor what comes later; a NaN in one stays there."""
    um, uv, weight, m0, v0 = given((6, 20, 33))
    whole = moments(um, uv, weight, m0, v0, 0.3)
    um, uv = um.clone(), uv.clone()
    um[3:, 4], um[:, 19] = torch.nan, torch.nan
    part = moments(um, uv, weight, m0, v0, 0.3)
    for a, b in zip(whole, part, strict=True):
        for rows in ((slice(None), slice(4)), (slice(3), 4), (slice(None), slice(5, 19))):
            assert torch.equal(a[rows], b[rows])
        assert b[3:, 4].isnan().any()


CHECK = """
from tests.kernels.test_moments import *
for shape in SHAPES:
    test_it_is_the_loop(shape, 0.7, 1.0)
"""


@needs_kernel
@LESSER
def test_every_build_is_the_loop(isa: str) -> None:
    run_in(isa, CHECK)


@needs_kernel
@pytest.mark.parametrize("save", [False, True])
def test_the_operators_are_well_formed(save: bool) -> None:
    inputs = [x.requires_grad_(save) for x in given((4, 3, 19))]
    torch.library.opcheck(torch.ops.ostinato.moments, (*inputs, 0.3, save))
    if save:
        um, uv, weight, m0, v0 = (x.detach() for x in inputs)
        m, v, am, av = torch.ops.ostinato.moments(um, uv, weight, m0, v0, 0.3, True)
        given_back = m.clone(), v.clone(), m, am, av, weight, m0, 0.3
        torch.library.opcheck(torch.ops.ostinato.moments_backward, given_back)


def test_what_the_kernel_does_not_know_is_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = given((4, 3, 19))
    double = [x.double() for x in inputs]
    assert "float64" in explain(double[0])
    for a, b in zip(moments(*double, 0.3), reference(*double, 0.3), strict=True):
        assert torch.equal(a, b)
    monkeypatch.setattr(module, "MISSING", "none here")
    for a, b in zip(moments(*inputs, 0.3), reference(*inputs, 0.3), strict=True):
        assert torch.equal(a, b)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"um": torch.zeros(5, 3)}, r"um is of shape \(5, 3\), torch.float32, wanted \(T, B, H\)"),
    ({"uv": torch.zeros(2, 3, 5)}, r"uv is of shape \(2, 3, 5\), wanted \(2, 3, 4\)"),
    ({"weight": torch.zeros(4, 5)}, r"weight is of shape \(4, 5\), wanted \(4, 4\)"),
    ({"m0": torch.zeros(4)}, r"m0 is of shape \(4,\), wanted \(3, 4\)"),
    ({"v0": torch.zeros(3, 4, dtype=torch.float64)}, "v0 is of torch.float64 on cpu, wanted torch.float32 on cpu"),
    ({"rate": 1.0}, "rate is 1.0, wanted 0 or more, and below 1"),
]


@pytest.mark.parametrize(("changed", "wanted"), WRONG, ids=[w for _, w in WRONG])
def test_a_wrong_argument_is_named(changed: dict[str, Any], wanted: str) -> None:
    right = dict(zip((*NAMES, "rate"), (*given((2, 3, 4)), 0.3), strict=True))
    moments(**right)
    with pytest.raises(ValueError, match=wanted):
        moments(**right | changed)
