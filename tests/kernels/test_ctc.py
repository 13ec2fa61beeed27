"""The fast CTC loss is torch's, gradients too, and a well-formed operator."""

from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import ctc as module
from kernels.ctc import ctc_loss, explain, reference
from tests.kernels.builds import LESSER, run_in

needs_kernel = pytest.mark.skipif(module.MISSING is not None, reason=f"no C++ kernels: {module.MISSING}")

# Batch, frames, classes, most labels of a row: one frame, no labels, more than a vector has lanes, subwords.
SHAPES = [
    (0, 5, 3, 2),
    (1, 1, 2, 1),
    (3, 1, 5, 0),
    (5, 4, 3, 3),
    (33, 20, 30, 12),
    (3, 64, 4, 31),
    (2, 230, 36, 110),
    (2, 90, 900, 30),
]
# How sharp the net's answers are, and what its blank is ahead by: as it begins, mostly blank, sure of what is wrong.
NETS = [(0.1, 0.0), (0.1, 8.0), (10.0, 0.0), (30.0, 30.0)]

Batch = tuple[Tensor, Tensor, Tensor, Tensor]


def batch(shape: tuple[int, int, int, int], net: tuple[float, float] = NETS[0], blank: int = 0) -> Batch:
    """Scores and the rest; rows differ in length, and some have more labels than their frames can say."""
    (rows, frames, classes, most), (sharpness, ahead) = shape, net
    generator = torch.Generator().manual_seed(rows + frames)
    scores = sharpness * torch.randn(rows, frames, classes, generator=generator)
    scores[..., blank] += ahead
    counts = torch.randint(0, most + 1, (rows,), generator=generator)
    labels = torch.randint(0, classes - 1, (int(counts.sum()),), generator=generator)
    lengths = torch.randint((frames + 1) // 2, frames + 1, (rows,), generator=generator)
    return scores, labels + (labels >= blank), lengths, counts


def both(scores: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """Losses, and gradients of the sum of the finite ones by the scores, in float64. Of the others
    ours are 0 and torch's NaN."""
    loss = reference if scores.dtype == torch.float64 else ctc_loss
    x = scores.detach().requires_grad_()
    nats = loss(x.log_softmax(-1), *rest)
    (gradient,) = torch.autograd.grad(nats[nats.isfinite()].sum(), x)
    if loss is reference:
        gradient[nats.isinf()] = 0
    return nats.detach().double(), gradient.double()


@needs_kernel
@pytest.mark.parametrize("net", NETS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_torchs(shape: tuple[int, int, int, int], net: tuple[float, float]) -> None:
    for blank in (0, 1):
        scores, *rest = batch(shape, net, blank)
        assert explain(scores).startswith("C++")
        got, want = both(scores, *rest, blank), both(scores.double(), *rest, blank)
        torch.testing.assert_close(got[0], want[0], rtol=2e-6, atol=2e-5)
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-5)


def test_a_sum_over_all_paths_of_a_few_frames() -> None:
    """By hand: two frames and labels 1, 1 have no path, labels 1 have three."""
    p = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3]]).log()[None]
    one = ctc_loss(p, torch.tensor([1]), torch.tensor([2]), torch.tensor([1]))
    torch.testing.assert_close(one.exp(), 1 / torch.tensor([0.5 * 0.6 + 0.3 * 0.1 + 0.3 * 0.6]))
    assert ctc_loss(p, torch.tensor([1, 1]), torch.tensor([2]), torch.tensor([2])).tolist() == [float("inf")]
    assert ctc_loss(p, torch.tensor([1, 2]), torch.tensor([2]), torch.tensor([2])).exp().item() == pytest.approx(
        1 / 0.09
    )


@needs_kernel
def test_gradients_are_those_of_finite_differences() -> None:
    """Not only behind a log-softmax, and padding has none."""
    scores, labels, lengths, counts = batch((3, 6, 4, 2))
    x, lengths = scores.log_softmax(-1).requires_grad_(), torch.tensor([6, 5, 6])
    (gradient,) = torch.autograd.grad(ctc_loss(x, labels, lengths, counts).sum(), x)
    exact, step = x.detach().double(), 1e-6
    for place in torch.cartesian_prod(*(torch.arange(n) for n in x.shape)).tolist():
        up, down = exact.clone(), exact.clone()
        up[tuple(place)] += step
        down[tuple(place)] -= step
        change = (reference(up, labels, lengths, counts) - reference(down, labels, lengths, counts)).sum() / (2 * step)
        assert float(gradient[tuple(place)]) == pytest.approx(float(change), abs=1e-5)
    assert not gradient[1, 5].any()


@needs_kernel
def test_a_row_whose_sums_leave_the_range_is_torchs() -> None:
    """A label that is never likely, and a number that is none: the others keep what they have."""
    scores, labels, lengths, counts = batch((4, 40, 9, 15))
    counts[:] = torch.tensor([15, 3, 0, 6])
    labels = torch.randint(1, 8, (24,), generator=torch.Generator().manual_seed(0))
    labels[16] = 8
    scores[1, :, 8] = -300.0
    scores[3, 2, 4] = torch.nan
    lengths[:] = 40
    assert torch.ops.ostinato.ctc(scores.log_softmax(-1), labels, lengths, counts, 0, True)[0].isnan().tolist() == [
        False,
        True,
        False,
        True,
    ]
    got, want = both(scores, labels, lengths, counts), both(scores.double(), labels, lengths, counts)
    torch.testing.assert_close(got[0], want[0], equal_nan=True, rtol=2e-6, atol=2e-5)
    torch.testing.assert_close(got[1][:3], want[1][:3], rtol=0, atol=2e-4)  # torch's own rounding, in float32


@needs_kernel
def test_what_is_past_a_row_is_not_looked_at() -> None:
    scores, labels, lengths, counts = batch((6, 30, 9, 8))
    want = both(scores, labels, lengths, counts)
    for row, length in zip(scores, lengths.tolist(), strict=True):
        row[length:] = torch.nan
    x = scores.log_softmax(-1).requires_grad_()
    nats = ctc_loss(x, labels, lengths, counts)
    torch.testing.assert_close(nats.detach().double(), want[0], rtol=0, atol=0)
    (gradient,) = torch.autograd.grad(nats[nats.isfinite()].sum(), x)
    assert gradient.isfinite().all()


CHECK = """
from tests.kernels.test_ctc import *
for shape in SHAPES:
    for net in NETS:
        test_it_is_torchs(shape, net)
"""


@needs_kernel
@LESSER
def test_every_build_is_torchs(isa: str) -> None:
    run_in(isa, CHECK)


@needs_kernel
@pytest.mark.parametrize("differentiate", [False, True])
def test_the_operator_is_well_formed(differentiate: bool) -> None:
    scores, *rest = batch((3, 12, 5, 3))
    x = scores.log_softmax(-1).requires_grad_(differentiate)
    torch.library.opcheck(torch.ops.ostinato.ctc, (x, *rest, 0, differentiate))


def test_other_types_are_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    scores, *rest = batch((3, 12, 5, 3))
    x = scores.log_softmax(-1)
    torch.testing.assert_close(ctc_loss(x.double(), *rest), reference(x.double(), *rest))
    monkeypatch.setattr(module, "MISSING", "none here")
    torch.testing.assert_close(ctc_loss(x, *rest), reference(x, *rest))


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"log_probs": torch.zeros(5, 3)}, r"log_probs is of shape \(5, 3\), torch.float32, wanted \(B, T, V\)"),
    ({"labels": torch.ones(1, 2)}, r"labels is of shape \(1, 2\), torch.float32, wanted \(N,\) of torch.int64"),
    ({"labels": torch.tensor([1, 3])}, "labels is from 1 to 3, wanted 0 to V - 1 = 2"),
    ({"labels": torch.tensor([1])}, "labels is 1 of them, wanted 2, the sum"),
    ({"lengths": torch.tensor([5])}, r"lengths is of shape \(1,\), torch.int64, wanted \(2,\)"),
    ({"lengths": torch.tensor([5, 6])}, "lengths is from 5 to 6"),
    ({"label_lengths": torch.tensor([3, -1])}, "label_lengths is from -1 to 3"),
    ({"blank": 3}, "blank is 3, wanted 0 to V - 1 = 2"),
]


@pytest.mark.parametrize(("changed", "wanted"), WRONG, ids=[w for _, w in WRONG])
def test_a_wrong_argument_is_named(changed: dict[str, Any], wanted: str) -> None:
    right = {
        "log_probs": torch.zeros(2, 5, 3),
        "labels": torch.tensor([1, 2]),
        "lengths": torch.tensor([5, 4]),
        "label_lengths": torch.tensor([1, 1]),
    }
    ctc_loss(**right)
    with pytest.raises(ValueError, match=wanted):
        ctc_loss(**right | changed)
