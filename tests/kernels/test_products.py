"""A product by oneDNN is torch's, with its gradients, whatever lies in memory how."""

import pytest
import torch
import torch.nn.functional as F

from kernels import products


@pytest.fixture(autouse=True)
def _chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    if not products.has_onednn():
        pytest.skip("this torch has no oneDNN to call")
    monkeypatch.setattr(products, "prefers_onednn", lambda: True)
    monkeypatch.setattr(products, "LARGE", 0)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 1), (7, 13, 5), (70, 300, 41)], ids=str)
def test_products_are_torchs(shape: tuple[int, int, int], biased: bool, transposed: bool) -> None:
    n, v, d = shape
    generator = torch.Generator().manual_seed(0)

    def numbers(a: int, b: int) -> torch.Tensor:
        drawn = torch.randn(b, a, generator=generator).T if transposed else torch.randn(a, b, generator=generator)
        return drawn.requires_grad_()

    x, w = numbers(n, d), numbers(v, d)
    leaves = [x, w, *([torch.randn(v, generator=generator).requires_grad_()] if biased else [])]
    assert products.takes(x, w)
    got, want = products.linear(*leaves), F.linear(*leaves)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-4)
    grad = torch.randn(n, v, generator=generator)
    first = [torch.autograd.grad(y.tanh(), leaves, grad, create_graph=True) for y in (got, want)]
    second = [torch.autograd.grad(sum(g.square().sum() for g in grads), leaves) for grads in first]
    for ours, theirs in zip([*first[0], *second[0]], [*first[1], *second[1]], strict=True):
        assert float((ours - theirs).detach().norm()) <= 1e-5 * float(theirs.detach().norm()) + 1e-5


def test_small_products_other_types_and_autocast_are_left_to_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = torch.randn(4, 8), torch.randn(6, 8)
    assert not products.takes(x.double(), w.double())
    with torch.autocast("cpu", torch.bfloat16):
        assert not products.takes(x, w)
        assert products.linear(x, w).dtype == torch.bfloat16
    monkeypatch.setattr(products, "LARGE", 1 << 20)
    assert not products.takes(x, w)
