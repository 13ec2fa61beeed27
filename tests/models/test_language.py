"""Softmaxes equal torch's, gradients too; a language model carries its state, and a scorer follows it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from trainer.data.vocabulary import WordsConfig
from trainer.errors import UserError
from trainer.models import softmax
from trainer.models.cells import ElmanConfig, GRUConfig, LSTMConfig
from trainer.models.convert import to_torch
from trainer.models.language import LanguageModel, LanguageModelConfig
from trainer.models.rnn import RNNConfig
from trainer.models.softmax import AdaptiveConfig, FullConfig, linear_nats
from trainer.models.structure import BlockDiagonalConfig, DiagonalConfig
from trainer.scoring import Scorer

V, D, N = 30, 8, 23


def numbers(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw(module: nn.Module) -> nn.Module:
    """Numbers everywhere, so that a bias that is forgotten shows."""
    for i, p in enumerate(module.parameters()):
        p.data.copy_(numbers(*p.shape, seed=i))
    return module


TARGETS = torch.randint(0, V, (N,), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("buffer", [softmax.BUFFER, 5 * V])
def test_the_loss_and_its_gradient_are_those_of_cross_entropy(monkeypatch: pytest.MonkeyPatch, buffer: int) -> None:
    monkeypatch.setattr(softmax, "BUFFER", buffer)
    leaves = [numbers(N, D).requires_grad_(), numbers(V, D).requires_grad_(), numbers(V).requires_grad_()]
    targets = TARGETS.clone()
    targets[3:5] = -100
    want = F.cross_entropy(F.linear(*leaves), targets, reduction="sum")
    got = linear_nats(*leaves, targets)
    torch.testing.assert_close(got, want)
    grads = [torch.autograd.grad(2.5 * loss, leaves) for loss in (got, want)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    nothing = linear_nats(*leaves, torch.full_like(targets, -100))
    assert float(nothing.detach()) == 0
    assert not any(g.any() for g in torch.autograd.grad(nothing, leaves))
    far = linear_nats(1e4 * leaves[0], *leaves[1:], targets)
    assert far.isfinite()
    assert linear_nats(leaves[0] * float("nan"), *leaves[1:], targets).isnan()


def test_bfloat16_products_are_near() -> None:
    leaves = [numbers(N, D).requires_grad_(), numbers(V, D).requires_grad_(), numbers(V).requires_grad_()]
    exact = torch.autograd.grad(linear_nats(*leaves, TARGETS), leaves)
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_nats(*leaves, TARGETS)
    near = torch.autograd.grad(loss, leaves)
    for a, b in zip(near, exact, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).norm() / b.norm()) < 0.02  # bfloat16 has 8 bits


CHOICES = [
    (FullConfig(), False),
    (FullConfig(), True),
    (AdaptiveConfig(cutoffs=(5, 12)), False),
    (AdaptiveConfig(cutoffs=(5, 12), divide_by=2), True),
    (AdaptiveConfig(cutoffs=(29,)), False),
]


@pytest.mark.parametrize(("config", "tied"), CHOICES, ids=str)
def test_the_loss_is_that_of_the_log_probabilities_and_they_are_a_distribution(config, tied: bool) -> None:
    weight = nn.Parameter(numbers(V, D, seed=9)) if tied else None
    built = draw(config.build(V, D, weight))
    x = numbers(N, D).requires_grad_()
    log_p = built(x)
    torch.testing.assert_close(log_p.exp().sum(1), torch.ones(N))
    want = -log_p.gather(1, TARGETS[:, None]).sum()
    leaves = [x, *built.parameters()]
    torch.testing.assert_close(built(x, TARGETS), want)
    for a, b in zip(torch.autograd.grad(built(x, TARGETS), leaves), torch.autograd.grad(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    for few in (torch.full((N,), 3), torch.full((N,), V - 1)):  # a cluster that nothing falls into
        torch.testing.assert_close(built(x, few), -log_p.gather(1, few[:, None]).sum())


def test_the_adaptive_softmax_is_torchs() -> None:
    ours = draw(AdaptiveConfig(cutoffs=(5, 12), divide_by=2).build(V, D, None))
    theirs = nn.AdaptiveLogSoftmaxWithLoss(D, V, [5, 12], div_value=2.0, head_bias=True)
    with torch.no_grad():
        ours.bias[7:] = 0  # torch's clusters have none
        theirs.head.weight.copy_(ours.head)
        theirs.head.bias.copy_(ours.bias[:7])
        for i, (down, tail) in enumerate(theirs.tail):
            down.weight.copy_(getattr(ours, f"down_{i}"))
            tail.weight.copy_(getattr(ours, f"tail_{i}"))
    x = numbers(N, D)
    torch.testing.assert_close(ours(x), theirs.log_prob(x))
    torch.testing.assert_close(ours(x, TARGETS), N * theirs(x, TARGETS).loss)


@pytest.mark.parametrize("cutoffs", [(), (0, 3), (5, 5)])
def test_cutoffs_must_rise(cutoffs: tuple) -> None:
    with pytest.raises(ValidationError, match="numbers above 0 that rise"):
        AdaptiveConfig(cutoffs=cutoffs)
    with pytest.raises(ValueError, match="wanted all below the 30 classes"):
        AdaptiveConfig(cutoffs=(5, 30)).build(V, D, None)


MODELS = {
    "lstm": {},
    "gru": {"cell": GRUConfig()},
    "blocks": {"structure": BlockDiagonalConfig(num_blocks=4)},
    "diagonal": {"cell": ElmanConfig(activation="relu"), "structure": DiagonalConfig(), "norm": "layer"},
    "narrow": {"hidden_size": 12, "last_size": 4, "structure": BlockDiagonalConfig(num_blocks=2)},
}


def model(name: str = "lstm", **options) -> LanguageModel:
    choices = {"hidden_size": 8, "num_layers": 2, "norm": "none", "cell": LSTMConfig(), **MODELS[name]}
    config = LanguageModelConfig(embedding_size=8, rnn=RNNConfig(**choices), **options)
    return draw(config.build(V)).eval()


TOKENS = torch.randint(0, V, (3, 11), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("name", MODELS)
def test_two_windows_with_the_state_between_them_are_one(name: str) -> None:
    net = model(name)
    targets = TOKENS.roll(-1, 1)
    whole, last = net(TOKENS, targets)
    first, state = net(TOKENS[:, :4], targets[:, :4])
    second, end = net(TOKENS[:, 4:], targets[:, 4:], state)
    torch.testing.assert_close(first + second, whole)
    assert float(net(TOKENS[:, 4:], targets[:, 4:])[0].detach()) != pytest.approx(float(second.detach()), rel=1e-4)
    assert end.keys() == last.keys()
    for part in end:
        torch.testing.assert_close(end[part], last[part])
    log_p, _ = net(TOKENS)
    torch.testing.assert_close(-log_p.gather(-1, targets[..., None]).sum(), whole)


def test_a_narrow_last_layer_and_a_projection_have_the_right_sizes() -> None:
    net = model("narrow")
    assert [layer[0].hidden_size for layer in net.rnn.layers] == [12, 4]
    assert net.output.weight is net.embedding.weight
    assert net.projection.weight.shape == (8, 4)
    assert model("narrow", tied=False).projection is None
    with pytest.raises(UserError, match="last_size = 4: a module of torch has equal layers"):
        to_torch(net.rnn)
    with pytest.raises(ValidationError, match=r"num_blocks = 2 does not divide last_size = 5"):
        RNNConfig(hidden_size=8, last_size=5, structure=BlockDiagonalConfig(num_blocks=2))
    with pytest.raises(ValidationError, match="sees what it is to predict"):
        LanguageModelConfig(rnn=RNNConfig(directions="concat"))


def test_a_word_is_dropped_in_all_its_places_of_a_row_or_in_none() -> None:
    net = model(embedding_dropout=0.5).train()
    tokens = torch.arange(V).repeat(2, 3)
    keys = torch.tensor([11, 12])
    x = net.embedding(tokens, keys)
    missing = (x == 0).all(-1).unflatten(1, (3, V))
    assert (missing == missing[:, :1]).all()
    assert 0.2 < missing.float().mean() < 0.8
    assert not torch.equal(missing[0], missing[1])
    torch.testing.assert_close(x[~missing.flatten(1)], 2 * net.embedding.weight[tokens][~missing.flatten(1)])
    assert torch.equal(net.embedding(tokens[1:], keys[1:]), x[1:])
    net.eval()
    torch.testing.assert_close(net.embedding(tokens, keys), net.embedding.weight[tokens])


def test_a_scorer_goes_token_by_token_and_its_rows_can_be_chosen() -> None:
    words = WordsConfig().learn({"train": " ".join(f"w{i}" for i in range(V - 1)) + "\n", "valid": "", "test": ""})
    scorer = Scorer(model(), words)
    log_p, state = scorer.start(3)
    total = []
    for token in TOKENS.unbind(1):
        total.append(log_p.gather(1, token[:, None])[:, 0])
        log_p, state = scorer.step(token, state)
    lengths = torch.tensor([11, 7, 1])
    found = scorer.score(TOKENS, lengths)
    past = torch.arange(11) >= lengths[:, None]
    torch.testing.assert_close(found, torch.stack(total, 1).masked_fill(past, 0.0))

    rows = torch.tensor([2, 0, 0])
    token = torch.tensor([1, 2, 3])
    chosen, _ = scorer.step(token, scorer.select(state, rows))
    for i, row in enumerate(rows.tolist()):
        alone, _ = scorer.step(token[i : i + 1], scorer.select(state, torch.tensor([row])))
        torch.testing.assert_close(chosen[i], alone[0])
    assert np.isclose(float(chosen.exp().sum()), 3, atol=1e-4)
