"""One step of any cell, linearised where a real sequence leads it: spectra of Jacobians and Lyapunov exponents.

For a gated cell no single matrix says how a state's error grows: gates multiply. The Jacobian d s_t / d s_{t-1} does,
s being h, or h and c of an LSTM; it differs from step to step, so what counts is the product along a trajectory. Its
growth rates are the Lyapunov exponents: positive ones say that trajectories part (exploding gradients), all far below
zero that the past is lost (vanishing ones). A stack of layers has those of its layers, since its whole Jacobian is
block triangular.

Sources: Benettin et al. 1980 (products by repeated QR); Engelken, Wolf & Abbott 2023, arXiv:2006.02427 (of recurrent
nets); Vogt et al. 2022, arXiv:2006.14123.
"""

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kernels import reference
from trainer.analysis.recurrences import recurrences
from trainer.models.linear import reverse_rows
from trainer.models.recurrence import Layer, RecurrentLayer

# torch's forward derivatives script some functions of its own when they are first asked for.
warnings.filterwarnings("ignore", "`torch.jit.script` is deprecated", FutureWarning)

Step = Callable[[Tensor, Tensor], Tensor]

MAX_EXPONENTS = 64
"""The leading ones; all of them where the state is no wider."""
SPECTRA = 6
"""Frames of each trajectory whose Jacobian's eigenvalues are computed, evenly spread."""


def one_step(layer: RecurrentLayer) -> Step:
    """The map (input u_t of the gates, state s_{t-1}) -> s_t of a layer, in float64, that torch.func differentiates.

    Shape:
        u: (G H,) what the input's weights and bias give, s: (S,) with S = H, or 2 H of an LSTM -> (S,)
    """
    weight, bias = layer.weights()[1].detach().double(), layer.bias_hh.detach().double()
    lstm, size, cell = layer.cell.kind == "lstm", layer.hidden_size, layer.cell.name

    def step(u: Tensor, s: Tensor) -> Tensor:
        h, c = s[None, :size], s[None, size:] if lstm else None
        _, h, last_c = reference.recurrence(
            u[None, None], weight, h, c, bias, None, None, None, cell, (False,), (0.0, 0.0)
        )
        return torch.cat([h, last_c], -1)[0] if lstm else h[0]

    return step


def state_size(layer: RecurrentLayer) -> int:
    """S: H, or 2 H of an LSTM."""
    return layer.hidden_size * (2 if layer.cell.kind == "lstm" else 1)


def gate_inputs(layer: RecurrentLayer, x: Tensor) -> Tensor:
    """(N, T, D) inputs of a layer -> (N, T, G H) in float64."""
    bias = None if layer.bias_ih is None else layer.bias_ih.detach().double()
    return nn.functional.linear(x.double(), layer.weights()[0].detach().double(), bias)


@dataclass(frozen=True)
class Dynamics:
    """What a layer does along some trajectories."""

    exponents: Tensor
    """(N, M) of each trajectory, the largest first, in nats a step."""
    eigenvalues: Tensor
    """(N, K, S) complex, of Jacobians at `frames` of each trajectory."""
    frames: list[int]
    jacobian: Tensor
    """(S, S) half way along the first trajectory."""
    steps: int
    """Length of the trajectories."""


@torch.no_grad()
def dynamics(step: Step, u: Tensor, state_size: int, num_exponents: int = MAX_EXPONENTS) -> Dynamics:
    """Follow trajectories from a state of zeros.

    A frame of orthonormal vectors is carried along by the Jacobians and made orthonormal again after each step; the
    logarithms of what it had grown by, averaged, are the exponents.

    Args:
        step: see `one_step`.
        num_exponents: M at most.

    Shape:
        u: (N, T, G H)
    """
    count, steps = u.shape[:2]
    m = min(num_exponents, state_size)
    generator = torch.Generator().manual_seed(0)
    s = u.new_zeros(count, state_size)
    q, _ = torch.linalg.qr(torch.randn(count, state_size, m, generator=generator, dtype=u.dtype))
    frames = sorted({round((i + 1) * steps / SPECTRA) - 1 for i in range(SPECTRA)} & set(range(steps)))
    logs, spectra, middle = u.new_zeros(count, m), [], u.new_zeros(state_size, state_size)

    def along(u_t: Tensor, state: Tensor, vector: Tensor) -> Tensor:
        changed: Tensor = torch.func.jvp(lambda x: step(u_t, x), (state,), (vector,))[1]
        return changed

    push = torch.func.vmap(torch.func.vmap(along, (None, None, 1), 1))
    follow = torch.func.vmap(step)
    whole = torch.func.vmap(torch.func.jacfwd(step, 1))
    for t in range(steps):
        if t in frames or t == steps // 2:
            jacobians = whole(u[:, t], s)
            if t in frames:
                spectra.append(torch.linalg.eigvals(jacobians))
            if t == steps // 2:
                middle = jacobians[0]
        q, r = torch.linalg.qr(push(u[:, t], s, q))
        s = follow(u[:, t], s)
        logs += r.diagonal(dim1=-2, dim2=-1).abs().clamp_min(1e-300).log()
    exponents = (logs / steps).sort(-1, descending=True).values
    return Dynamics(exponents, torch.stack(spectra, 1), frames, middle, steps)


def inputs_of_layers(model: nn.Module, run: Callable[[], object]) -> dict[str, tuple[Tensor, Tensor | None]]:
    """What each recurrent layer got in a forward pass: (x (B, T, D) in its own direction, lengths) by its name.

    Args:
        run: makes the pass.
    """
    names = {module: name for name, module in recurrences(model)}
    found: dict[str, tuple[Tensor, Tensor | None]] = {}

    def keep(layer: nn.Module, inputs: tuple[Tensor, Tensor | None]) -> None:
        x, lengths = inputs[0].detach(), inputs[1]
        for way in layer:  # type: ignore[attr-defined]
            own = reverse_rows(x, lengths) if way.reverse else x
            found[names[way]] = (own.transpose(0, 1), lengths)

    hooks = [m.register_forward_pre_hook(keep) for m in model.modules() if isinstance(m, Layer)]
    try:
        with torch.no_grad():
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found
