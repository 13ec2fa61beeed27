"""A bound that no perturbation can exceed: the product of the norms along the way, for plain recurrent nets.

A layer h_t = f(W x_t + U h_{t-1} + b) whose f lengthens nothing answers to a change d of its input by at most
||dh_t|| <= w sum_k u^(t - k) ||d_k||, w and u the spectral norms of W and U. Over T frames the whole output moves by
at most w (1 + u + ... + u^(T-1)) ||d||, the last frame by w sqrt(1 + u^2 + ... + u^(2T-2)) ||d||, and layers multiply.
Such bounds are cheap, hold for certain, and are far from tight: what they say beside an attack is the point.

Sources: Szegedy et al. 2014, arXiv:1312.6199, section 4.3 (products of norms); Tsuzuku, Sato & Sugiyama 2018,
arXiv:1802.04034, proposition 1 (margins).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from trainer.analysis.perturbations import Judge
from trainer.models.cells import ElmanConfig
from trainer.models.normalization import LayerScale
from trainer.models.readout import Readout
from trainer.models.recurrence import RecurrentLayer
from trainer.models.rnn import RNN
from trainer.recipe import Inputs


def gain(layer: RecurrentLayer, num_frames: int, last: bool) -> float:
    """How much a change of an Elman layer's input may grow over so many frames, in the 2-norm, to its output or to the
    last frame of it."""
    w, u = (float(torch.linalg.matrix_norm(m.double(), 2)) for m in (layer.weight_ih, layer.weight_hh.dense()))
    logs = torch.arange(num_frames, dtype=torch.float64) * math.log(max(u, 1e-30))
    total = float(torch.logsumexp(2 * logs, 0)) / 2 if last else float(torch.logsumexp(logs, 0))
    return w * math.exp(total) if total < 700 else math.inf


@torch.no_grad()
def bound(model: nn.Module, num_frames: int) -> tuple[float, str]:
    """Lipschitz constant from input to output in the 2-norm, or infinity and why there is no cheap one."""
    rnn, output = getattr(model, "rnn", None), getattr(model, "output", None)
    if not isinstance(rnn, RNN) or not isinstance(output, nn.Linear) or _others(model):
        return math.inf, "only a recurrent stack with a linear readout of its input has a cheap bound"
    config = rnn.config
    if not isinstance(config.cell, ElmanConfig):
        return math.inf, f"the gates of {config.cell.name} multiply: no product of norms bounds them"
    if config.norm != "none" or config.directions != "forward":
        return math.inf, f"norm = {config.norm}, directions = {config.directions}: wanted none and forward"
    if config.regularizers.fast_dropout is not None:
        return math.inf, "fast dropout carries means and variances on, which no product of norms bounds"
    layers = list(rnn.recurrent_layers())
    if config.cell.activation == "modrelu" and any(bool((layer.bias_hh > 0).any()) for layer in layers):
        return math.inf, "modReLU with a positive b jumps at 0: it has no Lipschitz constant"
    product = float(torch.linalg.matrix_norm(output.weight.double(), 2))
    for i, layer in enumerate(layers):
        skipped = config.residual and layer.weight_ih.shape[1] == config.output_size
        added = gain(layer, num_frames, getattr(model, "last", False) and i == len(layers) - 1)
        if isinstance(scale := rnn.scales[i], LayerScale):
            added *= float(scale.weight.abs().max())
        product *= added + skipped
    return product, ""


def _others(model: nn.Module) -> bool:
    """Whether a model has weights beside those of its `rnn` and its `output`."""
    return any(name.split(".")[0] not in ("rnn", "output") for name, _ in model.named_parameters())


@torch.no_grad()
def certified_errors(judge: Judge, inputs: Inputs, sizes: Sequence[float]) -> list[float] | None:
    """Of a classifier that reads the last frame, the share of samples that could be wrong at each size in the 2-norm.

    One that is right by a margin m of its logits stays so while sqrt(2) L ||d|| < m. None where no bound exists.
    """
    model = judge.model
    if not isinstance(model, Readout) or not model.last or model.output.out_features < 2:
        return None
    logits: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, given, output: logits.append(output))
    reach: list[Tensor] = []  # the size up to which each sample is safe; below 0 where it is wrong already
    try:
        for batch in judge.batches:
            rows = judge.step(batch).rows
            x = batch[inputs.name]
            constant, _ = bound(model, x.shape[1])
            if math.isinf(constant) or inputs.relative or len(rows) != int(batch["valid"].sum()):
                return None
            top = logits.pop()[batch["valid"]].topk(2, -1).values.double()
            safe = (top[:, 0] - top[:, 1]) / (2**0.5 * constant * x[0].numel() ** 0.5)
            wrong = torch.tensor([row.errors > 0 for row in rows])
            reach.append(torch.where(wrong, -1.0, safe))
    finally:
        hook.remove()
    return [
        float((torch.cat(reach) <= size).double().mean()) if size else float((torch.cat(reach) < 0).double().mean())
        for size in sizes
    ]
