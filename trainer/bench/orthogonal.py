"""What orthogonality costs, and how fast the copying recipe trains beside what one would write with torch alone.

The rival stands here in full: torch's own orthogonal parametrisation, formed once a forward pass, and a loop over time.
"""

import tempfile
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal

import kernels
from trainer import recipe as recipes
from trainer.bench.timing import Timing, describe, interleaved
from trainer.distributed import Ranks
from trainer.engine import Training
from trainer.models.parametrizations import CayleyConfig, attach
from trainer.models.structure import BlockDiagonalConfig, DenseConfig

FORMED = {"16 blocks of 64": (BlockDiagonalConfig(num_blocks=16), 1024, 0.5), "dense 512": (DenseConfig(), 512, 1.2)}
"""Structure, width, and at most how much of the recurrence's time forming it may take."""
STEPS, BATCH = 100, 16
DRIFT_STEPS = 10_000
DRIFTED = {"dense 190": (DenseConfig(), 190), "8 blocks of 24": (BlockDiagonalConfig(num_blocks=8), 192)}
AT_LEAST = 3.0
"""Times as fast as the rival that training is to be."""


class TorchNet(nn.Module):
    """modReLU with an orthogonal matrix, of torch's parts; as large as the recipe's net, apart from the form of W."""

    def __init__(self, input_size: int, hidden_size: int, output_size: int) -> None:
        super().__init__()
        self.input = nn.Linear(input_size, hidden_size, bias=False)
        self.recurrent = orthogonal(nn.Linear(hidden_size, hidden_size, bias=False), orthogonal_map="cayley")
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        self.output = nn.Linear(hidden_size, output_size)

    def forward(self, x: Tensor) -> Tensor:
        u = self.input(x.transpose(0, 1))  # (T, B, H)
        h = torch.zeros_like(u[0])
        states = []
        with parametrize.cached():  # W is formed once
            for u_t in u.unbind(0):
                z = u_t + self.recurrent(h)
                h = torch.sign(z) * torch.relu(z.abs() + self.bias)
                states.append(h)
        y: Tensor = self.output(torch.stack(states))
        return y.transpose(0, 1)


def forming(repetitions: int) -> dict[str, dict[str, Any]]:
    """Forming W and its gradient, as a share of the forward and backward pass of the recurrence that it is for."""
    rows = {}
    for name, (config, width, most) in FORMED.items():
        structure = config.build(width, 1)  # type: ignore[attr-defined]
        attach(CayleyConfig(), structure)
        original = structure.parametrizations.weight.original
        fixed = structure.blocks().detach().requires_grad_()
        gradient = torch.randn(fixed.shape)
        u = torch.randn(STEPS, BATCH, width).mul_(0.1).requires_grad_()
        b = torch.zeros(width, requires_grad=True)
        dy = torch.randn(STEPS, BATCH, width)

        def form(structure: Any = structure, original: Tensor = original, gradient: Tensor = gradient) -> None:
            torch.autograd.grad(structure.blocks(), original, gradient)

        def recur(u: Tensor = u, fixed: Tensor = fixed, b: Tensor = b, dy: Tensor = dy) -> None:
            y, _ = kernels.block_rnn(u, fixed, activation="modrelu", bias=b)
            torch.autograd.grad(y, [u, fixed, b], dy)

        times = interleaved({"form": form, "recur": recur}, repetitions)
        rows[f"forming {name}, over its recurrence"] = {
            **_row(times["form"], times["recur"]),
            "wanted": f"<= {most:g}",
        }
    return rows


def training(ranks: Ranks, overrides: list[str], repetitions: int) -> dict[str, dict[str, Any]]:
    """A step of the engine on `copying/t1000` beside a bare loop over the rival, on the same batch."""
    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"runs_dir={folder}", "tracking.wandb=disabled", "tracking.log_every_steps=1000"]
        ours = Training(recipes.load("copying/t1000", [*overrides, *quiet]), ranks)
        step = ours.dataset.plan.epoch(0)[0]
        batches = [ours.dataset.load(m) for m in step.micro_batches]
        config = ours.config
        symbols = config.data.num_symbols
        net = TorchNet(symbols + 2, config.model.hidden_size, symbols + 1)
        optimizer = torch.optim.RMSprop(net.parameters(), lr=config.optimizer.lr, alpha=0.9)

        def rival() -> None:
            optimizer.zero_grad(set_to_none=True)
            for batch in batches:
                x = F.one_hot(batch["inputs"], symbols + 2).float()
                loss = F.cross_entropy(net(x).flatten(0, 1), batch["targets"].flatten())
                loss.backward()
            optimizer.step()

        times = interleaved({"ours": lambda: ours.step(step, batches, 0.0), "rival": rival}, repetitions)
        ours.close(0)
    ratio = _row(times["rival"], times["ours"])
    name = f"copying, {config.data.frames} frames of {config.model.hidden_size} units: torch's loop, over the engine"
    return {name: {**ratio, "wanted": f">= {AT_LEAST:g}"}}


def drift(config: Any, width: int, steps: int) -> tuple[float, float]:
    """Train a matrix with RMSprop towards a fixed one under noise of equal size, in float32.

    Returns:
        the largest change of an entry, and the spectral norm of W^T W - I, of the worst block.
    """
    structure = config.build(width, 1)
    attach(CayleyConfig(), structure)
    start = structure.weight.detach().clone()
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(start.shape, generator=generator)
    optimizer = torch.optim.RMSprop(structure.parameters(), lr=1e-3, alpha=0.9)
    for _ in range(steps):
        optimizer.zero_grad(set_to_none=True)
        noise = torch.randn(start.shape, generator=generator)
        (structure.weight * (target + noise)).sum().backward()
        optimizer.step()
    w = structure.weight.detach()
    squares = w.reshape(structure.square_shape)
    off = torch.linalg.matrix_norm(squares.mT @ squares - torch.eye(squares.shape[-1]), 2)
    return float((w - start).abs().max()), float(off.max())


def _row(first: Timing, second: Timing) -> dict[str, Any]:
    return {
        "milliseconds": [1000 * describe(t.seconds)["median"] for t in (first, second)],
        "clock": describe(first.over(second)),
        "processor": describe(first.cpu_over(second)),
    }
