"""A dense LSTM layer as models run it beside torch's own, each at its best: by our rule of who computes it.

The lines of `bench kernels` that measure an operator say what our kernel does; these say what a user gets, who would
otherwise take `nn.LSTM`, and where rows differ in length, packed sequences.
"""

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from kernels.bench import Bench
from trainer.models.convert import to_torch
from trainer.models.rnn import RNNConfig

WANTED = (0.95, 1.0)
"""At least so many times as fast as torch, forward (in evaluation) and forward + backward (in training)."""
STEPS = 100


def layer_bench(hidden: int, batch: int, ragged: bool) -> Bench:
    """One layer of 100 steps.

    Args:
        ragged: rows of 1 to 100 steps, both directions; else rows of 100, forwards.
    """
    directions = "concat" if ragged else "forward"
    config = RNNConfig(num_layers=1, hidden_size=hidden, cell={"kind": "lstm"}, norm="none", directions=directions)
    stack = config.build(hidden)
    (layer,) = stack.layers
    net, _ = to_torch(stack)
    net.batch_first = False  # like ours
    lengths = torch.linspace(1, STEPS, batch).round().long() if ragged else None
    x = torch.randn(STEPS, batch, hidden).requires_grad_()

    def ours(x: Tensor, *parameters: Tensor) -> Tensor:
        y: Tensor = layer.train(torch.is_grad_enabled())(x, lengths)[0]
        return y

    def exact(x: Tensor, *parameters: Tensor) -> Tensor:
        named = dict(zip(dict(layer.named_parameters()), parameters, strict=True))
        y: Tensor = functional_call(copy.deepcopy(layer).double(), named, (x, lengths))[0]
        return y

    def torchs() -> Tensor:
        if lengths is None:
            y: Tensor = net(x)[0]
            return y
        packed = net(pack_padded_sequence(x, lengths, enforce_sorted=False))[0]
        return pad_packed_sequence(packed, total_length=STEPS)[0]

    kind = "lengths uniform in 1..T, both ways" if ragged else "rows of T"
    return Bench(
        f"layer lstm, H={hidden}, B={batch}, {kind}",
        ours,
        exact,
        [x, *layer.parameters()],
        {"torch": (torchs, [x, *net.parameters()], True)},
        wanted={"torch": WANTED},
    )


def benches() -> Iterator[Bench]:
    """Lines for `bench kernels`."""
    for hidden in (192, 256, 512, 1024):
        for batch in (1, 4, 16, 32):
            yield layer_bench(hidden, batch, ragged=False)
    for hidden in (192, 512, 1024):
        yield layer_bench(hidden, 16, ragged=True)
