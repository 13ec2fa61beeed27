"""Noise and attacks of a size on recurrent matrices and initial states, and what the task's metric becomes; inputs are
in `trainer.analysis.inputs`.

What is added to a recurrent matrix has the size as its spectral norm: such matrices make up the pseudo-spectrum of that
epsilon. A start other than zeros has it as its root mean square.

Size 0 changes nothing, bit for bit. What is drawn depends on (seed, kind, sample) and not on the size, so a curve over
sizes follows the same directions outwards; an attack of a larger size begins with the best one of the size before and
returns the best it has met, so its loss never falls.

Sources: Madry et al. 2018, arXiv:1706.06083 (PGD); Trefethen & Embree 2005, chapter 2 (perturbed matrices).
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from trainer import keyed
from trainer.analysis import estimates
from trainer.analysis.jacobian import state_size
from trainer.analysis.recurrences import gate_matrices, recurrences
from trainer.data.dataset import Batch
from trainer.metrics import Mean, add
from trainer.models.recurrence import Layer, run
from trainer.models.regularizers.fast_dropout import MomentLayer
from trainer.recipe import Recipe, StepOutput

STEPS = 8
"""Of an attack at each size; each is 2.5 / STEPS of it long, as Madry et al. have it."""
Norm = Literal["l2", "largest", "spectral"]
Score = dict[str, float]
"""`monitor`, the recipe's metric, and `loss`: lower is better."""
BEFORE = "state_before"
"""Entry of a batch that goes on with a stream: the state there of the model as it was trained."""


@dataclass(frozen=True)
class Judge:
    """Scores a trained model on some batches.

    Args:
        recipe: of the model.
        model: in evaluation mode; none of its weights asks for a gradient.
        batches: held in memory.
    """

    recipe: Recipe[Any]
    model: nn.Module
    batches: Sequence[Batch]

    @torch.no_grad()
    def score(
        self,
        batches: Sequence[Batch] | None = None,
        around: Callable[[int], AbstractContextManager[Any]] = nullcontext,
    ) -> Score:
        """Over all batches.

        Args:
            batches: in their place.
            around: what the batch of a number is scored within.
        """
        totals: dict[str, Mean] = {}
        weights: dict[str, float] = {}
        for b, batch in enumerate(self.batches if batches is None else batches):
            with around(b):
                output = self.step(batch)
            add(totals, {name: Mean(float(x.sum), x.count) for name, x in output.losses.items()})
            add(totals, {name: Mean(float(m.sum), m.count) for name, m in output.metrics.items()})
            weights |= {name: x.weight for name, x in output.losses.items()}
        values = {name: float(m.sum) / max(m.count, 1e-9) for name, m in totals.items()}
        values["loss"] = sum(values[name] * weight for name, weight in weights.items())
        return {"monitor": values[self.recipe.monitor], "loss": values["loss"]}

    def step(self, batch: Batch) -> StepOutput:
        """What comes of a batch, which goes on from what stood before it."""
        return self.recipe.step(self.model, batch, batch.get(BEFORE))

    def loss(self, batch: Batch) -> Tensor:
        """Sum over the samples of a batch, so that each sample's gradient is its own."""
        output = self.step(batch)
        return sum((x.sum * x.weight for x in output.losses.values()), start=torch.zeros(()))


# Balls


def rms(x: Tensor, mask: Tensor) -> Tensor:
    """Root mean square of each sample: (B, 1, ...)."""
    squared, count = ((v.flatten(1).sum(1)) for v in ((x * mask).square(), mask))
    return (squared / count.clamp_min(1.0)).sqrt().view(-1, *[1] * (x.ndim - 1))


def steepest(gradient: Tensor, norm: Norm, mask: Tensor) -> Tensor:
    """What of size 1 the loss rises along most: the dual of the norm."""
    if norm == "largest":
        return gradient.sign() * mask
    if norm == "l2":
        return gradient * mask / rms(gradient, mask).clamp_min(1e-30)
    u, _, v = torch.linalg.svd(gradient, full_matrices=False)
    return u @ v


def project(delta: Tensor, norm: Norm, mask: Tensor, size: Tensor | float) -> Tensor:
    """The nearest of at most some size; `size` is one number, or one a sample."""
    if norm == "largest":
        return torch.minimum(torch.maximum(delta * mask, -size * mask), size * mask)
    if norm == "l2":
        return delta * mask * (size / rms(delta, mask).clamp_min(1e-30)).clamp_max(1.0)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    return (u * s.clamp_max(float(size)).unsqueeze(-2)) @ v


def ascend(
    loss_of: Callable[[Tensor], Tensor],
    first: Tensor,
    norm: Norm,
    mask: Tensor,
    size: Tensor | float,
    num_steps: int = STEPS,
    inside: Callable[[Tensor], Tensor] = lambda delta: delta,
) -> Tensor:
    """Projected gradient ascent; the best perturbation that was met.

    Args:
        loss_of: of a perturbation.
        first: where it begins, within the ball.
        mask: 1 where something may be added.
        size: radius of the ball.
        inside: keeps a perturbation within bounds of other kinds, which hold 0.
    """

    def look(delta: Tensor) -> tuple[float, Tensor]:
        delta = delta.detach().requires_grad_()
        loss = loss_of(delta)
        (gradient,) = torch.autograd.grad(loss, delta)
        value = float(loss.detach())
        return (value if value == value else float("inf")), torch.nan_to_num(gradient)

    delta = kept = first
    best, gradient = look(delta)
    for _ in range(num_steps):
        step = steepest(gradient, norm, mask) * (2.5 / num_steps)
        delta = project(inside(delta + step * size), norm, mask, size).detach()
        value, gradient = look(delta)
        if value > best:
            best, kept = value, delta
    return kept.detach()


def drawn(batch: Batch, shape: Sequence[int], kind: str, seed: int, normal: bool = True) -> Tensor:
    """Numbers for each sample by its key: normal, or uniform in [0, 1)."""
    rows = []
    for key in batch["keys"]:
        generator = torch.Generator().manual_seed(keyed.key(seed, kind, key))
        row = torch.empty(*shape)
        rows.append(row.normal_(generator=generator) if normal else row.uniform_(generator=generator))
    return torch.stack(rows)


# Recurrent matrices


def plain_weights(model: nn.Module) -> None:
    """Give each recurrence its matrix as it is, in place of what it is made of: anything may be added to it then."""
    for _, layer in recurrences(model):
        layer.make_plain()
    model.requires_grad_(False)


@contextmanager
def weights_changed(model: nn.Module, deltas: dict[str, Tensor]) -> Iterator[None]:
    """Add to the recurrent matrices of a model with plain weights, by the layer's name; so do gradients."""
    layers = dict(recurrences(model))
    kept = {name: layers[name].weight_hh.weight for name in deltas}
    try:
        for name, delta in deltas.items():
            structure = layers[name].weight_hh
            del structure.weight
            structure.weight = kept[name].detach() + delta.reshape(kept[name].shape)
        yield
    finally:
        for name, weight in kept.items():
            structure = layers[name].weight_hh
            del structure.weight
            structure.weight = weight


def squares(model: nn.Module) -> dict[str, Tensor]:
    """Of each recurrence its numbers as matrices (..., P, P); a row (1, N) where they are none, so that its
    norm there is Frobenius's."""
    found = {}
    for name, layer in recurrences(model):
        weight, shape = layer.weight_hh.weight.detach(), layer.weight_hh.square_shape
        found[name] = weight.reshape(1, -1) if shape is None else weight.reshape(shape)
    return found


def weight_noise_curve(judge: Judge, sizes: Sequence[float], seed: int) -> list[Score]:
    """Scores with a random matrix of each spectral norm added to every recurrent one."""
    found, unit = [], {}
    for name, weight in squares(judge.model).items():
        generator = torch.Generator().manual_seed(keyed.key(seed, "weights", name))
        e = torch.randn(weight.shape, generator=generator)
        unit[name] = e / torch.linalg.matrix_norm(e, 2)[..., None, None].clamp_min(1e-30)
    for size in sizes:
        with weights_changed(judge.model, {name: e * size for name, e in unit.items()} if size else {}):
            found.append(judge.score())
    return found


def weight_attack_curve(judge: Judge, sizes: Sequence[float]) -> list[Score]:
    """Scores with the matrices of each spectral norm that raise the loss over all batches most, added to every one.

    The steepest direction under that norm is U V^T of the gradient's singular value decomposition.
    """
    found: list[Score] = []
    deltas = {name: torch.zeros_like(weight) for name, weight in squares(judge.model).items()}

    def look() -> tuple[float, dict[str, Tensor]]:
        leaves = {name: delta.detach().requires_grad_() for name, delta in deltas.items()}
        total = 0.0
        gradients = {name: torch.zeros_like(delta) for name, delta in deltas.items()}
        for batch in judge.batches:
            with weights_changed(judge.model, leaves):
                loss = judge.loss(batch)
                for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
                    gradients[name] += torch.nan_to_num(g)
            total += float(loss.detach())
        return (total if total == total else float("inf")), gradients

    for size in sizes:
        if size:
            best, gradients = look()
            kept = deltas
            for _ in range(STEPS):
                ones = torch.ones(())
                steps = {name: steepest(g, "spectral", ones) * (2.5 / STEPS * size) for name, g in gradients.items()}
                deltas = {name: project(deltas[name] + step, "spectral", ones, size) for name, step in steps.items()}
                value, gradients = look()
                if value > best:
                    best, kept = value, deltas
            deltas = kept
        with weights_changed(judge.model, deltas if size else {}):
            found.append(judge.score())
    return found


@torch.no_grad()
def normalised_score(judge: Judge, of: estimates.Size) -> Score:
    """The score with every gate's recurrent matrix scaled down to a norm or radius of 1, where it is above.

    Nothing is trained: it is what the same net would do if its states could not grow, or not for ever.
    """
    deltas = {}
    for name, layer in recurrences(judge.model):
        factors = torch.tensor([estimates.scale(a, of) for a in gate_matrices(layer).values()])
        deltas[name] = layer.weight_hh.scaled(factors[:, None].float()) - layer.weight_hh.weight
    with weights_changed(judge.model, deltas):
        return judge.score()


# Initial states


@contextmanager
def starting_from(model: nn.Module, states: dict[str, Tensor]) -> Iterator[None]:
    """Start every recurrence from another state: what is given is added to zeros, or to what a stream left.

    Args:
        states: (B, S) by the layer's name, S = H, or 2 H of an LSTM, h first; all rows of a sample that has several
            start alike.
    """
    names = {layer: name for name, layer in recurrences(model)}
    layers = [m for m in model.modules() if isinstance(m, Layer)] if states else []

    def compute_of(layer: Layer) -> Callable[..., Any]:
        ways: list[Any] = list(layer)
        given = [states[names[way]] for way in ways]

        def compute(x: Tensor, lengths: Tensor | None, drawn: Any = None, before: Any = None) -> Any:
            rows = [s.repeat_interleave(x.shape[1] // len(s), 0) for s in given]
            if before is not None:
                rows = [s + torch.cat(before, -1) for s in rows]
            return run(ways, x, lengths, [s.split(way.hidden_size, -1) for s, way in zip(rows, ways, strict=True)])

        return compute

    try:
        for layer in layers:
            layer.compute = compute_of(layer)  # type: ignore[method-assign]
        yield
    finally:
        for layer in layers:
            del layer.compute


def bears_states(model: nn.Module) -> bool:
    """Whether its recurrences may start from given states; those of fast dropout are distributions."""
    return not any(isinstance(module, MomentLayer) for module in model.modules())


def state_curve(judge: Judge, sizes: Sequence[float], seed: int, attack: bool) -> list[Score]:
    """The score at each size with initial states that are random, or raise the loss most."""
    layers = dict(recurrences(judge.model))
    widths = [state_size(layer) for layer in layers.values()]
    units = [drawn(batch, (sum(widths),), "state", seed) for batch in judge.batches]
    units = [e / rms(e, torch.ones_like(e)) for e in units]
    deltas = [torch.zeros_like(e) for e in units]

    def starting(delta: Tensor) -> AbstractContextManager[None]:
        return starting_from(judge.model, dict(zip(layers, delta.split(widths, -1), strict=True)))

    found = []
    for size in sizes:
        if not size:
            found.append(judge.score())
            continue
        for b, batch in enumerate(judge.batches):

            def loss_of(delta: Tensor, batch: Batch = batch) -> Tensor:
                with starting(delta):
                    return judge.loss(batch)

            deltas[b] = ascend(loss_of, deltas[b], "l2", torch.ones_like(units[b]), size) if attack else units[b] * size
        found.append(judge.score(around=lambda b: starting(deltas[b])))
    return found
