"""Noise and attacks of a size on inputs, and what the task's metric becomes.

Sizes are per number, so that long and short samples bear the same: of Gaussian noise and of attacks in the 2-norm it is
the root mean square of what is added, of uniform noise and of attacks in the largest norm its largest value. Where a
recipe says so (sound) they are shares of each sample's own root mean square r: a size s of the first two is a
signal-to-noise ratio of -20 log10 s dB, of uniform noise one of 4.8 dB more. Of frames dropped and of zeros and ones
flipped it is the share. What is added stays within the recipe's bounds: a binary number bears
what lies between 0 and 1.

Sources: Goodfellow, Shlens & Szegedy 2015, arXiv:1412.6572 (FGSM); Madry et al. 2018, arXiv:1706.06083 (PGD); Papernot
et al. 2016, arXiv:1604.08275 (words given to a recurrent net exchanged one by one, by the gradient: so are bits here).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.analysis.perturbations import STEPS, Judge, Norm, Score, ascend, drawn, rms, steepest
from trainer.data.dataset import Batch
from trainer.models.normalization import frame_mask
from trainer.recipe import Inputs

FLIPS, WORST_FLIPS = "flips", "flips_worst"
ROUNDS = 4
"""In which the worst flips of a size are found: each changes what others would do."""


def mask_of(batch: Batch, inputs: Inputs) -> Tensor:
    """1.0 on the numbers that are real, in the shape of the entry."""
    x: Tensor = batch[inputs.name]
    valid = batch["valid"].repeat_interleave(len(x) // len(batch["valid"]))  # a sample may be several rows
    real = valid.view(-1, 1).expand(-1, x.shape[1])
    if "lengths" in batch:
        real = real & frame_mask(batch["lengths"], x.shape[1])
    return real.reshape(*real.shape, *[1] * (x.ndim - 2)).expand_as(x).to(x.dtype)


def scale_of(batch: Batch, inputs: Inputs) -> Tensor:
    """What a size is a multiple of, for each row: (B, 1, ...)."""
    x: Tensor = batch[inputs.name]
    return rms(x, mask_of(batch, inputs)) if inputs.relative else x.new_ones(len(x), *[1] * (x.ndim - 1))


NOISES = ("gaussian", "uniform", "drop", "clip")
ATTACKS: dict[str, tuple[Norm, int]] = {
    "fgsm": ("largest", 0),
    "pgd_largest": ("largest", STEPS),
    "pgd_l2": ("l2", STEPS),
}
"""Norm, and the number of steps; 0: one step of the whole size (Goodfellow et al. 2015)."""


def noises(inputs: Inputs) -> tuple[str, ...]:
    """Kinds that such inputs bear."""
    return (*NOISES, FLIPS) if inputs.binary else NOISES


def attacks(inputs: Inputs) -> tuple[str, ...]:
    """The same of attacks."""
    return (*ATTACKS, WORST_FLIPS) if inputs.binary else tuple(ATTACKS)


def noisy(batch: Batch, inputs: Inputs, kind: str, size: float, seed: int) -> Batch:
    """A batch with noise in it.

    Args:
        kind: gaussian; uniform within +- size; drop, that share of the frames set to 0; clip, to 1 - size of each
            sample's largest absolute value; flips, that share of zeros and ones turned into the other.
    """
    if not size:
        return batch
    x: Tensor = batch[inputs.name]
    mask = mask_of(batch, inputs)
    if kind == "drop":
        frames = -(-x.shape[1] // inputs.frame)
        kept = _drawn(batch, len(x), (frames,), kind, seed, normal=False) >= size
        kept = kept.repeat_interleave(inputs.frame, 1)[:, : x.shape[1]]
        return batch | {inputs.name: x * kept.view(*kept.shape, *[1] * (x.ndim - 2))}
    if kind == "clip":
        top = (x * mask).flatten(1).abs().amax(1).view(-1, *[1] * (x.ndim - 1)) * (1 - size)
        return batch | {inputs.name: torch.where(mask > 0, torch.minimum(torch.maximum(x, -top), top), x)}
    if kind == FLIPS:
        turned = _drawn(batch, len(x), x.shape[1:], kind, seed, normal=False) < size
        return batch | {inputs.name: flipped(x, turned * mask)}
    added = _drawn(batch, len(x), x.shape[1:], kind, seed, normal=kind == "gaussian")
    added = added if kind == "gaussian" else 2 * added - 1
    return batch | {inputs.name: _within(x, added * scale_of(batch, inputs) * size, mask, inputs)}


def _drawn(batch: Batch, rows: int, shape: Sequence[int], kind: str, seed: int, normal: bool) -> Tensor:
    """Numbers for each of so many rows, by the key of the sample that it is a part of."""
    return drawn(batch, (rows // len(batch["keys"]), *shape), kind, seed, normal).flatten(0, 1)


class _Bounded(torch.autograd.Function):
    """Clamp whose gradient is stopped only where a step up it would lead further out.

    Torch's own is zero on the bounds themselves, where black pixels and all of a piano roll lie.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, low: float, high: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.bounds = low, high
        return x.clamp(low, high)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,), (low, high) = ctx.saved_tensors, ctx.bounds
        return grad.masked_fill(((x <= low) & (grad < 0)) | ((x >= high) & (grad > 0)), 0.0), None, None


def _within(x: Tensor, delta: Tensor, mask: Tensor, inputs: Inputs) -> Tensor:
    """x + delta inside the bounds, where the mask is; its gradient is one to climb by."""
    bounded: Tensor = _Bounded.apply(x + delta, inputs.low, inputs.high)
    return torch.where(mask > 0, bounded, x)


def noise_curve(judge: Judge, inputs: Inputs, kind: str, sizes: Sequence[float], seed: int) -> list[Score]:
    """The score at each size."""
    return [judge.score([noisy(batch, inputs, kind, size, seed) for batch in judge.batches]) for size in sizes]


def attack_curve(judge: Judge, inputs: Inputs, kind: str, sizes: Sequence[float]) -> list[Score]:
    """The score at each size, rising, of batches that were changed so that their loss rises most."""
    if kind == WORST_FLIPS:
        return _flip_curve(judge, inputs, sizes)
    norm, num_steps = ATTACKS[kind]
    found = []
    masks = [mask_of(batch, inputs) for batch in judge.batches]
    scales = [scale_of(batch, inputs) for batch in judge.batches]
    deltas = [torch.zeros_like(mask) for mask in masks]
    for size in sizes:
        attacked = []
        for b, (batch, mask, scale) in enumerate(zip(judge.batches, masks, scales, strict=True)):
            x = batch[inputs.name]

            def loss_of(delta: Tensor, batch: Batch = batch, x: Tensor = x, mask: Tensor = mask) -> Tensor:
                return judge.loss(batch | {inputs.name: _within(x, delta, mask, inputs)})

            def inside(delta: Tensor, x: Tensor = x) -> Tensor:
                return (x + delta).clamp(inputs.low, inputs.high) - x

            if size and num_steps:
                deltas[b] = ascend(loss_of, deltas[b], norm, mask, size * scale, num_steps, inside)
            elif size:
                zero = torch.zeros_like(x).requires_grad_()
                (gradient,) = torch.autograd.grad(loss_of(zero), zero)
                deltas[b] = steepest(gradient, norm, mask) * size * scale
            attacked.append(batch | {inputs.name: _within(x, deltas[b], mask, inputs)} if size else batch)
        found.append(judge.score(attacked))
    return found


def flipped(x: Tensor, turned: Tensor) -> Tensor:
    """Zeros and ones, exchanged where `turned` is 1."""
    return x + turned * (1 - 2 * x)


def _flip_curve(judge: Judge, inputs: Inputs, sizes: Sequence[float]) -> list[Score]:
    turned = [torch.zeros_like(batch[inputs.name]) for batch in judge.batches]
    found = []
    for size in sizes:
        if size:
            turned = [_turn(judge, batch, inputs, t, size) for batch, t in zip(judge.batches, turned, strict=True)]
        pairs = zip(judge.batches, turned, strict=True)
        found.append(judge.score([b | {inputs.name: flipped(b[inputs.name], t)} if size else b for b, t in pairs]))
    return found


def _turn(judge: Judge, batch: Batch, inputs: Inputs, turned: Tensor, size: float) -> Tensor:
    """Numbers to flip, so that with those flipped already they are at most that share of each sample.

    By the gradient g, flipping x gains g (1 - 2 x); the largest gains are taken, some a round.
    """
    x, mask = batch[inputs.name], mask_of(batch, inputs)
    most = (mask.flatten(1).sum(1) * size).floor()
    best, kept = -float("inf"), turned
    for i in range(ROUNDS + 1):
        changed = flipped(x, turned).requires_grad_()
        loss = judge.loss(batch | {inputs.name: changed})
        (gradient,) = torch.autograd.grad(loss, changed)
        if float(loss.detach()) > best:
            best, kept = float(loss.detach()), turned
        if i == ROUNDS:
            break
        gains = torch.where((mask > 0) & (turned == 0), gradient * (1 - 2 * changed.detach()), -1.0).flatten(1)
        room = ((most - turned.flatten(1).sum(1)) / (ROUNDS - i)).ceil()
        places = gains.argsort(1, descending=True).argsort(1)
        turned = turned + ((places < room[:, None]) & (gains > 0)).view_as(x)
    return kept
