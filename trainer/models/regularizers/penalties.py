"""Penalties: terms of the loss that are functions of the weights, or of the hidden states.

Those of the weights are added once a step, whatever its micro-batches and ranks. Those of the states are means over the
frames of each sequence, averaged over the sequences of a step. The engine adds both: a recipe knows nothing of them.
"""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from trainer.config import Config
from trainer.metrics import Loss
from trainer.models.normalization import frame_mask
from trainer.models.parametrizations import SoftOrthogonal, exact
from trainer.models.regularizers.noise import Std, of_step
from trainer.models.structure import Structure
from trainer.optim import PARAMETRIZED

if TYPE_CHECKING:
    from trainer.models.regularizers import Regularizer


class NormsConfig(Config):
    """Strengths of norms of the weights; 0 is none. Sums over every matrix of the model, read-out and all; not over
    biases, gains of normalisation, and numbers behind a parametrised matrix. With `max_norm` they are those that are
    trained, before it scales them."""

    l1: Std = 0.0
    """sum |w| (Tibshirani 1996)."""
    soft_l1: Std = 0.0
    """sum sqrt(w^2 + 1e-8): l1 without its corner, as in breze, the library of the paper's second author."""
    l2: Std = 0.0
    """sum w^2 (Hoerl & Kennard 1970; Krogh & Hertz 1992)."""
    nuclear: Std = 0.0
    """Sum of the singular values of each recurrent matrix (Fazel, Hindi & Boyd 2001)."""


class LaterPenaltiesConfig(Config):
    """Penalties that are younger than the paper; 0 is none."""

    spectral: Std = 0.0
    """Half the squared largest singular value of each recurrent matrix (Yoshida & Miyato 2017, arXiv:1705.10941)."""
    orthogonality: Std = 0.0
    """sum (W^T W - I)^2 of each recurrent matrix (Vorontsov et al. 2017, arXiv:1702.00071); also there as
    `parametrization: {kind: soft_orthogonal}`."""
    norm_stabilizer: Std = 0.0
    """Mean of (|h_t| - |h_{t-1}|)^2 of each layer (Krueger & Memisevic 2015, arXiv:1511.08400)."""
    activation: Std = 0.0
    """Mean square of the last layer's output, after dropout (AR: Merity, McCann & Socher 2017, arXiv:1708.01009)."""
    temporal_activation: Std = 0.0
    """Mean square of h_t - h_{t-1} of the last layer (TAR: the same)."""


def weight_penalty(model: nn.Module) -> Tensor | None:
    """What the weights of a model in training add to the loss of a step; None if nothing.

    Gradient noise is a term of it: the gradient of <n, w> is n, so the noise is exact at any ZeRO stage and number of
    ranks, is clipped with the rest, and no optimizer has to know of it.
    """
    if not model.training:
        return None
    terms, every = [*_parametrizations(model)], list(regularizers_of(model))
    if every:  # each is of the whole model: where several stacks ask for one, the largest strength counts, once
        terms += _norms(model, [max(strengths) for strengths in zip(*map(_of_weights, every), strict=True)])
        if std := max(r.config.later.gradient_noise * r.config.later.decay.factor(r.step) for r in every):
            named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
            terms += [std * (of_step(every[0].clock, name, p) * p).sum() for name, p in named]
    return torch.stack([term.float() for term in terms]).sum() if terms else None


def penalises_weights(model: nn.Module) -> bool:
    """Whether `weight_penalty` looks at weights outside of the forward pass."""
    return any(True for _ in _parametrizations(model)) or any(
        any(strengths)
        for r in regularizers_of(model)
        for strengths in [(r.config.later.gradient_noise, *_of_weights(r))]
    )


def activation_losses(model: nn.Module, valid: Tensor) -> dict[str, Loss]:
    """What the hidden states of the last forward pass add to the loss.

    Shape:
        valid: (B,) bool, which rows count
    """
    found = {}
    for i, regularizer in enumerate(regularizers_of(model)):
        if (rows := regularizer.take_activations()) is not None:
            name = "activations" if not i else f"activations_{i}"
            found[name] = Loss((rows * valid).sum(), float(valid.sum()), "samples")
    return found


def regularizers_of(model: nn.Module) -> "Iterator[Regularizer]":
    """Every recurrent stack's."""
    from trainer.models.regularizers import Regularizer

    return (m for m in model.modules() if isinstance(m, Regularizer))


def _parametrizations(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        if isinstance(module, Structure) and parametrize.is_parametrized(module, "weight"):
            rule = module.parametrizations.weight[0]  # type: ignore[union-attr,index]
            if isinstance(rule, SoftOrthogonal):
                yield rule.penalty(module.weight)


def _of_weights(regularizer: "Regularizer") -> tuple[float, ...]:
    norms, later = regularizer.config.norms, regularizer.config.later
    return (norms.l1, norms.soft_l1, norms.l2, norms.nuclear, later.spectral, later.orthogonality)


def _norms(model: nn.Module, strengths: Sequence[float]) -> list[Tensor]:
    l1, soft_l1, l2, nuclear, spectral, orthogonality = strengths
    terms = []
    if l1 or soft_l1 or l2:
        for name, p in model.named_parameters():
            if p.requires_grad and p.ndim > 1 and PARAMETRIZED not in f".{name}":
                w = p.float()
                terms += [l1 * w.abs().sum()] if l1 else []
                terms += [soft_l1 * (w.square() + 1e-8).sqrt().sum()] if soft_l1 else []
                terms += [l2 * w.square().sum()] if l2 else []
    if nuclear or spectral or orthogonality:
        for structure in (m for m in model.modules() if isinstance(m, Structure)):
            with exact(next(structure.parameters())):
                w = _squares(structure).float()
                terms += [nuclear * torch.linalg.matrix_norm(w, "nuc").sum()] if nuclear else []
                terms += [spectral / 2 * torch.linalg.matrix_norm(w, 2).square().sum()] if spectral else []
                identity = torch.eye(w.shape[-1], device=w.device)
                terms += [orthogonality * (w.mT @ w - identity).square().sum()] if orthogonality else []
    return terms


def _squares(structure: Structure) -> Tensor:
    """Recurrent matrices (..., P, P)."""
    if structure.square_shape is not None:
        return structure.weight.reshape(structure.square_shape)
    return structure.dense().unflatten(0, (structure.num_gates, -1))


def of_states(config: LaterPenaltiesConfig, h: Tensor, output: Tensor, lengths: Tensor | None, last: bool) -> Tensor:
    """The penalty of one layer's states, a number for each row.

    Args:
        last: whether it is the last layer.

    Shape:
        h: (B, T, H), output: (B, T, H) after dropout, lengths: (B,) or None for T -> (B,)
    """
    h, output = h.float(), output.float()
    mask = h.new_ones(h.shape[:2]) if lengths is None else frame_mask(lengths, h.shape[1]).to(h.dtype)
    frames, pairs = mask.sum(1).clamp_min(1), mask[:, 1:].sum(1).clamp_min(1)
    total = h.new_zeros(len(h))
    if config.norm_stabilizer:
        norms = (h.square().sum(-1) + 1e-12).sqrt()  # the root has no slope at a state of zeros
        total = total + config.norm_stabilizer * (norms.diff(dim=1).square() * mask[:, 1:]).sum(1) / pairs
    if last and config.activation:
        total = total + config.activation * (output.square().mean(-1) * mask).sum(1) / frames
    if last and config.temporal_activation:
        total = total + config.temporal_activation * (h.diff(dim=1).square().mean(-1) * mask[:, 1:]).sum(1) / pairs
    return total
