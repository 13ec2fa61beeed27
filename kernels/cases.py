"""The correctness matrix: every cell, structure and option of this machine's backend against the float64 definition.

The tests of the project run the same cases; a user with another processor or GPU runs them by `kernels.selftest()`.
"""

import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kernels import reference
from kernels.ops import explain, recurrence
from kernels.reference import GATES

TOLERANCE = 2e-6
"""Relative L2 error of float32, with recurrent weights of spectral norm 1 at most: a chaotic net amplifies rounding."""
TOLERANCES = {torch.float32: TOLERANCE, torch.bfloat16: 4 * torch.finfo(torch.bfloat16).eps}
"""On a GPU. Of 16 bits: a few roundings, of y, of what is saved and of factors."""
SMOOTH = ("rnn_tanh", "rnn_identity", "gru", "gru_original", "lstm")
"""Cells whose gradients survive the rounding of y to 16 bits: one that makes y zero or not moves a kink's by more."""


@dataclass(frozen=True)
class Case:
    """One call. `size` P is None for a diagonal structure, whose `blocks` are its units."""

    cell: str
    steps: int
    batch: int
    blocks: int
    size: int | None
    reverse: tuple[bool, ...] = (False,)
    state: bool = False
    bias: bool = False
    lengths: bool = False
    mask: bool = False
    zoneout: tuple[float, float] = (0.0, 0.0)
    drawn: bool = False

    def __str__(self) -> str:
        shape = f"T{self.steps}-B{self.batch}-" + (f"{self.blocks}x{self.size}" if self.size else f"H{self.blocks}")
        flags = [name for name in ("state", "bias", "lengths", "mask", "drawn") if getattr(self, name)]
        flags += [f"zoneout{max(self.zoneout):g}"] if any(self.zoneout) else []
        way = "".join("b" if r else "f" for r in self.reverse)
        return "-".join([self.cell, shape, way, *flags])

    def inputs(self) -> dict[str, Tensor | None]:
        """The tensors of the call in float64; what lies in the padding is NaN."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, dtype=torch.float64)

        gates, hidden = GATES[self.cell], self.blocks * (self.size or 1)
        if self.size is None:
            weight = torch.rand(gates, self.blocks, generator=generator, dtype=torch.float64) * 2 - 1
        else:
            weight = normal(gates, self.blocks, self.size, self.size)
            weight /= torch.linalg.matrix_norm(weight, 2).clamp_min(1e-9)[..., None, None]
        u = normal(self.steps, self.batch, gates * hidden)
        lengths = None
        if self.lengths:
            lengths = torch.randint(0, self.steps + 1, (self.batch,), generator=generator)
            lengths[:3] = torch.tensor([self.steps, 0, 1])[: self.batch]
            u[torch.arange(self.steps)[:, None] >= lengths] = torch.nan
        mask = (torch.rand(self.batch, hidden, generator=generator) < 0.7).double() / 0.7 if self.mask else None
        keys = torch.randint(-(2**63), 2**63 - 1, (self.batch,), generator=generator) if self.drawn else None
        return {
            "u": u,
            "weight": weight,
            "h0": normal(self.batch, hidden) if self.state else None,
            "c0": normal(self.batch, hidden) if self.state and self.cell == "lstm" else None,
            "bias": normal(gates * hidden) * 0.3 if self.bias else None,
            "lengths": lengths,
            "mask": mask,
            "keys": keys,
        }


def cases() -> Iterator[Case]:
    """Every cell with awkward shapes, and every option alone and all together."""
    # The smallest, sizes no vector or tile divides, more rows than a tile has, many small blocks, no rows, no steps.
    shapes = [(1, 1, 1, 1), (7, 3, 2, 13), (6, 33, 3, 16), (5, 5, 1, 70), (20, 17, 2, 32), (9, 1, 5, 64)]
    shapes += [(4, 1, 24, 16)]
    empty = [(3, 0, 2, 16), (0, 2, 2, 16)]
    diagonal = [(1, 1, 1, None), (7, 3, 13, None), (9, 9, 530, None), (3, 0, 4, None), (0, 2, 4, None)]
    for cell in GATES:
        for steps, batch, blocks, size in [*shapes, *empty, *diagonal]:
            yield Case(cell, steps, batch, blocks, size)
            if steps and batch:
                yield Case(cell, steps, batch, blocks, size, state=True, bias=True, lengths=True, reverse=(True,))
        for blocks, size in ((4, 19), (40, None)):
            for reverse, drawn in itertools.product([(False,), (True,), (False, True)], [False, True]):
                full = {"state": True, "bias": True, "lengths": True, "mask": True, "zoneout": (0.3, 0.2)}
                yield Case(cell, 12, 7, blocks, size, reverse, drawn=drawn, **full)  # type: ignore[arg-type]
            yield Case(cell, 12, 7, blocks, size, mask=True, lengths=True)
            yield Case(cell, 12, 7, blocks, size, zoneout=(0.5, 0.5), drawn=True)


def run(case: Case, device: str, dtype: torch.dtype, exact: bool) -> dict[str, Tensor]:
    """Outputs and gradients of a case with values that `dtype` holds; `exact` takes the reference in float64."""
    tensors: dict[str, Any] = {}
    for name, x in case.inputs().items():
        moved = None if x is None else x.to(dtype if x.is_floating_point() else x.dtype)
        tensors[name] = moved.double() if exact and moved is not None and moved.is_floating_point() else moved
    tensors = {name: None if x is None else x.to(device) for name, x in tensors.items()}
    own = {name: tensors[name] for name in ("u", "weight", "h0", "c0", "bias")}
    present = {name: x.requires_grad_() for name, x in own.items() if x is not None}
    options: dict[str, Any] = {"cell": case.cell, "reverse": case.reverse, "zoneout": case.zoneout}
    outputs = (reference.recurrence if exact else recurrence)(**tensors, **options)
    found = dict(zip(("y", "h", "c"), outputs, strict=True))
    generator = torch.Generator().manual_seed(1)
    used = {k: v for k, v in found.items() if v.numel() and v.requires_grad}
    weights = [torch.randn(v.shape, generator=generator, dtype=torch.float64).to(dtype).to(v) for v in used.values()]
    if used:
        gradients = torch.autograd.grad(list(used.values()), list(present.values()), weights, materialize_grads=True)
        found |= {f"d{name}": g for name, g in zip(present, gradients, strict=True)}
    return {name: x.detach() for name, x in found.items()}


def errors(case: Case, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, float]:
    """Relative L2 error of every output and gradient; infinite where one is not finite."""
    want, got = run(case, "cpu", dtype, exact=True), run(case, device, dtype, exact=False)
    result = {}
    for name, w in want.items():
        g = got[name].double().cpu()
        if g.shape != w.shape:
            raise AssertionError(f"{case}: {name} has shape {tuple(g.shape)}, wanted {tuple(w.shape)}")
        error = float((g - w).norm() / w.norm().clamp_min(1e-12))
        result[name] = error if torch.isfinite(g).all() else float("inf")
    return result


def selftest(device: str = "cpu", say: Callable[[str], None] | None = None) -> dict[str, int]:
    """Run every case on a device: in float32, and on a GPU those of smooth cells in bfloat16 too.

    Args:
        device: "cpu", or "cuda" on the first GPU that nobody has proved yet.
        say: told which cell is next; on a GPU every case is compiled first, which takes minutes.

    Returns:
        number of cases that agreed, by the path they took (see `explain`) and their type. A case on the reference loop
        proves nothing: no kernel takes a block of its size.

    Raises:
        AssertionError: a case did not agree; the message names it, the path, the tensor and the error.
    """
    agreed: Counter[str] = Counter()
    before = ""
    for dtype, tolerance in TOLERANCES.items() if device != "cpu" else [(torch.float32, TOLERANCE)]:
        for case in cases():
            if dtype == torch.bfloat16 and case.cell not in SMOOTH:
                continue
            if say is not None and case.cell != before:
                say(f"{case.cell}, {dtype}")
            before = case.cell
            shape = (GATES[case.cell], case.blocks, *([case.size] * 2 if case.size else []))
            path = f"{explain(torch.empty(shape, device=device, dtype=dtype), case.cell)}, {dtype}"
            for name, error in errors(case, device, dtype).items():
                if not error <= tolerance:
                    raise AssertionError(f"{case} on {device}, {path}: {name} differs by {error:.1e} (> {tolerance:g})")
            agreed[path] += 1
    return dict(agreed)
