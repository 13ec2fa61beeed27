"""Which backend a call takes, and whether it computes the right thing on this machine."""

from typing import Any

import torch
from torch import nn

from kernels import reference


def explain(op: str) -> str:
    """The backend of an operator and why."""
    return f"{op}: reference loop (plain PyTorch), the only backend of this version"


def selftest(device: str = "cpu") -> int:
    """Compare one dense block with torch's own cells, on rows of different lengths, both ways.

    Args:
        device: of the tensors.

    Returns:
        number of cases that agreed.

    Raises:
        AssertionError: one did not; the message names it.
    """
    generator = torch.Generator().manual_seed(0)
    lengths = [7, 1, 4]
    cases = 0
    modules: dict[str, Any] = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
    for cell, module in modules.items():
        net = module(5, 6, dtype=torch.float64)
        for p in net.parameters():
            p.data = torch.randn(p.shape, generator=generator, dtype=torch.float64) * 0.5
        x = torch.randn(7, 3, 5, generator=generator, dtype=torch.float64)
        u = x @ net.weight_ih_l0.T + net.bias_ih_l0
        weight = net.weight_hh_l0.view(reference.GATES[cell], 1, 6, 6)
        op = getattr(reference, f"block_{cell}")
        for reverse in (False, True):
            y, _ = op(
                u.to(device),
                weight.to(device),
                bias=net.bias_hh_l0.to(device),
                lengths=torch.tensor(lengths, device=device),
                reverse=reverse,
            )
            for b, n in enumerate(lengths):
                want, _ = net(x[:n, b].flip(0) if reverse else x[:n, b])
                want = want.flip(0) if reverse else want
                error = (y[:n, b].cpu() - want).abs().max().item()
                if error > 1e-9 or (n < 7 and y[n:, b].abs().max().item() > 0):
                    raise AssertionError(f"block_{cell} reverse={reverse} length={n} on {device}: error {error:.1e}")
                cases += 1
    return cases
