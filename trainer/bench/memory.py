"""Memory of a training pass by depth and batch, as resident size of a process of its own.

    python -m trainer.bench.memory '{...}'    one measurement, which `bench memory` starts

A pass is the forward and backward one of an acoustic model on random features, CTC and all. What is told apart: the
gradients, which are as large as the weights whatever the batch, and the rest, activations for the most part.
"""

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kernels.ctc import ctc_loss
from trainer import memory, recipe
from trainer.errors import UserError

SHAPES = ((7, 4), (7, 16), (7, 64), (28, 16), (110, 4), (110, 16))
"""Layers and clips of a batch: the third and the fifth are those of Diamos et al. 2016 (Persistent RNNs)."""
SECONDS = 8.0
"""Of a clip."""
CLASSES, LABELS = 35, 40


def measure(
    config: str,
    overrides: Sequence[str],
    say: Callable[[str], None],
    shapes: Sequence[tuple[int, int]] = SHAPES,
    ways: Sequence[bool] = (False, True),
) -> list[dict[str, Any]]:
    """Measure depths and batches.

    Args:
        shapes: layers and batches.
        ways: whether layers are computed again in the backward pass.

    Returns:
        rows of {"layers", "batch", "recompute", "parameters", "activation_bytes", "gradient_bytes"}.

    Raises:
        UserError: the configuration is not of speech, or the memory of the machine was not enough.
    """
    rows = []
    for recompute in ways:
        for layers, batch in shapes:
            own = [*overrides, f"model.rnn.num_layers={layers}"]
            case: dict[str, Any] = {"config": config, "overrides": own, "batch": batch, "recompute": recompute}
            done = subprocess.run(
                [sys.executable, "-m", "trainer.bench.memory", json.dumps(case)],
                capture_output=True,
                text=True,
                env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"},
            )
            if done.returncode:
                reason = done.stderr.strip().splitlines()[-1:] or ["killed: no memory?"]
                raise UserError(f"{layers} layers at batch {batch}: {reason[0]}")
            rows.append({"layers": layers, **case, **json.loads(done.stdout)})
            say(f"{layers} layers, batch {batch}{', computed again' if recompute else ''}: done")
    return rows


def one(case: dict[str, Any]) -> dict[str, Any]:
    """One measurement, in a process that does nothing else."""
    from trainer.models.acoustic import AcousticConfig, AcousticModel
    from trainer.models.block import recompute_blocks

    loaded = recipe.load(case["config"], case["overrides"]).config
    if not isinstance(getattr(loaded, "model", None), AcousticConfig):
        raise UserError(f"{case['config']}: is no acoustic model; take one of speech/")
    torch.set_num_threads(1)
    features = loaded.data.features
    model = AcousticModel(loaded.model, features.build(loaded.data.sample_rate_hz), CLASSES).train()
    recompute_blocks(model, case["recompute"])

    def work(batch: int = case["batch"], seconds: float = SECONDS) -> None:
        frames = round(1000 * seconds / features.hop_ms)
        x = torch.randn(batch, frames, features.num_bands)
        log_probs, lengths, _ = model(x, torch.full((batch,), frames), torch.arange(batch))
        labels = torch.full((batch, min(LABELS, int(lengths[0]) // 2)), 1)
        ends = torch.full((batch,), labels.shape[1])
        ctc_loss(log_probs, labels.flatten(), lengths, ends).sum().backward()

    work(1, 0.5)  # what libraries set up once
    model.zero_grad(set_to_none=True)
    ctypes.CDLL(None).malloc_trim(0)
    _, _, taken = memory.taken(torch.device("cpu"), work)
    gradients = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "activation_bytes": taken - gradients,
        "gradient_bytes": gradients,
    }


if __name__ == "__main__":
    print(json.dumps(one(json.loads(sys.argv[1]))))
