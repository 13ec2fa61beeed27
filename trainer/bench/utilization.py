"""Model FLOPs utilisation: the arithmetic that a training step needs, over what the device could have done meanwhile.

What a step needs is three times its forward pass, as the gradients of inputs and of weights take a product each for
every one there (Chowdhery et al. 2022, arXiv:2204.02311, appendix B); what is computed a second time to save memory
does not count. What the device could have done is measured here, as the fastest product of two large matrices.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import kernels.ops
import kernels.products
from kernels.products import linear
from trainer import recipe as recipes
from trainer.distributed import Ranks, Trained
from trainer.engine import initialise
from trainer.errors import UserError
from trainer.evaluation import to_device

SIZE = 2048
"""Of the square matrices whose product is the measure."""
FORWARD_AND_BACKWARD = 3

Shape = Sequence[int]


def _recurrence(u: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    """Every recurrent weight once a frame and row; u: (T, B, ...)."""
    return 2 * u[0] * u[1] * torch.Size(weight).numel()


def _onednn_lstm(x: Shape, w_ih: Shape, w_hh: Shape, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * (torch.Size(w_ih).numel() + torch.Size(w_hh).numel())


def _cudnn_rnn(x: Shape, weights: Sequence[Shape], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * sum(torch.Size(w).numel() for w in weights if len(w) == 2)


def _linear(x: Shape, weight: Shape, *_: Any, **__: Any) -> int:
    return 2 * torch.Size(x).numel() * weight[0]


FORMULAE: dict[Any, Callable[..., int]] = {
    torch.ops.ostinato.recurrence: _recurrence,
    torch.ops.aten.mkldnn_rnn_layer: _onednn_lstm,
    torch.ops.aten._cudnn_rnn: _cudnn_rnn,
}
if kernels.products.has_onednn():
    FORMULAE[torch.ops.mkldnn._linear_pointwise] = _linear

NAMES = {
    "ostinato.recurrence": "recurrences (our kernels)",
    "aten.mkldnn_rnn_layer": "LSTM (oneDNN): input and recurrence",
    "aten._cudnn_rnn": "recurrences (cuDNN): input and recurrence",
    "aten.convolution": "convolutions",
}
PRODUCTS = "other products of matrices"


def count(run: Callable[[], object]) -> dict[str, int]:
    """Floating-point operations of a forward pass by kind; a multiply-add is two."""
    with FlopCounterMode(display=False, custom_mapping=FORMULAE) as counter:
        run()
    kinds: dict[str, int] = {}
    for op, flops in counter.get_flop_counts().get("Global", {}).items():
        name = NAMES.get(str(op), PRODUCTS)
        kinds[name] = kinds.get(name, 0) + int(flops)
    return kinds


def fastest_product(device: torch.device, dtype: torch.dtype, repetitions: int = 7) -> float:
    """Operations a second of the fastest product of two square matrices, on this process' threads."""
    a, b = (torch.randn(SIZE, SIZE, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(repetitions + 1):
        _wait(device)
        start = time.perf_counter()
        linear(a, b)
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return float(2 * SIZE**3 / min(seconds))


def measure(config: str, overrides: Sequence[str], ranks: Ranks, repetitions: int) -> dict[str, Any]:
    """Count the first step of a configuration and take it again and again.

    Returns:
        {"flops": by kind, forward and backward, "step_seconds": median, "peak": operations a second, "utilization"}.

    Raises:
        UserError: the training split holds no usable sample.
    """
    recipe = recipes.load(config, overrides)
    settings = recipe.config
    model = recipe.build_model()
    initialise(model, settings.seed)
    dataset = recipe.build_dataset("train")
    steps = dataset.plan.epoch(0)
    if not steps:
        raise UserError(f"{config}: the training split holds no usable sample")
    batches = [to_device(dataset.load(m), ranks.device) for m in steps[0].micro_batches]
    trained = Trained(model.to(ranks.device), settings.zero, settings.optimizer, settings.precision, len(batches))

    def forward(batch: Any) -> Tensor:
        return recipe.step(trained.model, batch).loss()

    def step() -> None:
        for batch in batches:
            trained.backward(forward(batch))
            trained.step()

    step()
    kinds: dict[str, int] = {}
    for batch in batches:
        for name, flops in count(lambda batch=batch: forward(batch)).items():  # type: ignore[misc]
            kinds[name] = kinds.get(name, 0) + FORWARD_AND_BACKWARD * flops
    dtype = torch.bfloat16 if settings.precision == "bf16" else torch.float32
    peaks, seconds = [], []
    for _ in range(repetitions):
        peaks.append(fastest_product(ranks.device, dtype, 2))
        _wait(ranks.device)
        start = time.perf_counter()
        step()
        _wait(ranks.device)
        seconds.append(time.perf_counter() - start)
    median, peak = statistics.median(seconds), max(peaks)
    return {
        "flops": kinds,
        "counts": steps[0].counts,
        "step_seconds": median,
        "peak": peak,
        "utilization": sum(kinds.values()) / median / peak,
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
