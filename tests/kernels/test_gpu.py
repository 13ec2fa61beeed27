"""The Triton kernels equal the reference under Triton's interpreter, and compile for real chips without a spill.

No GPU is needed, so nothing here says that they run on one, or how fast.
"""

import multiprocessing
import os
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from kernels import reference

CELLS = list(reference.GATES)
# (T, B, K, P): only the last fills its tiles of columns; and what is too wide for one tile.
SHAPES = [(4, 4, 2, 3), (4, 5, 4, 1), (4, 3, 2, 16)]
WIDE = (3, 2, 300, 1)
TOLERANCE = 2e-6  # float32 against float64, the most of all cases is 7e-7


class Case(NamedTuple):
    cell: str
    structure: str
    reverse: tuple[bool, ...] = (False,)
    options: str = "all"
    shape: tuple[int, int, int, int] = SHAPES[0]
    dtype: torch.dtype = torch.float32


def arguments(case: Case) -> dict[str, Any]:
    """Of reference.recurrence, in float64, with values that `case.dtype` holds."""
    generator = torch.Generator().manual_seed(0)
    num_steps, batch, blocks, size = case.shape
    hidden, gates = blocks * size, reference.GATES[case.cell]
    every = case.options != "none"

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(case.dtype).double()

    if case.structure == "block":
        weight = normal(gates, blocks, size, size)
        weight = weight / torch.linalg.matrix_norm(weight, 2)[..., None, None]
    else:
        weight = normal(gates, hidden).clamp(-1, 1)
    lengths = torch.tensor([num_steps, 0, 1, num_steps - 1, 2]).repeat(batch)[:batch]
    return {
        "u": normal(num_steps, batch, gates * hidden),
        "weight": weight.to(case.dtype).double(),
        "h0": normal(batch, hidden) if every else None,
        "c0": normal(batch, hidden) if every and case.cell == "lstm" else None,
        "bias": normal(hidden if case.cell == "rnn_modrelu" else gates * hidden) * 0.5 if every else None,
        "lengths": lengths if every else None,
        "mask": (normal(batch, hidden) > 0) * 2.0 if every else None,
        "keys": torch.randint(-(2**62), 2**62, (batch,), generator=generator) if case.options == "all" else None,
        "cell": case.cell,
        "reverse": case.reverse,
        "zoneout": (0.3, 0.4) if every else (0.0, 0.0),
    }


def wanted(inputs: dict[str, Any], upstream: list[Tensor]) -> dict[str, Tensor]:
    """Results and gradients of the reference."""
    leaves = {n: inputs[n].requires_grad_() for n in ("u", "weight", "h0", "c0", "bias") if inputs[n] is not None}
    results = reference.recurrence(**inputs)
    real = [i for i, x in enumerate(results) if x.requires_grad]
    gradients = torch.autograd.grad(
        [results[i] for i in real], list(leaves.values()), [upstream[i] for i in real], materialize_grads=True
    )
    return dict(zip("yhc", results, strict=True)) | {f"d{n}": g for n, g in zip(leaves, gradients, strict=True)}


def computed(inputs: dict[str, Any], upstream: list[Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The same of the kernels; what they must not read is NaN."""
    from kernels import gpu

    x = {n: v.detach().to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in inputs.items()}
    dy, dh, dc = (g.to(dtype) for g in upstream)
    if x["lengths"] is not None:
        padding = torch.arange(len(dy))[:, None] >= x["lengths"]
        x["u"][padding], dy[padding] = torch.nan, torch.nan
    common = [x[n] for n in ("h0", "c0", "bias", "lengths", "mask", "keys", "cell", "reverse", "zoneout")]
    y, h, c, saved = gpu.forward(x["u"], x["weight"], None, *common, save=True)
    du, *rest = gpu.backward(dy, dh, dc, y, saved, x["u"], x["weight"], None, *common)
    if x["lengths"] is not None:
        assert not y[padding].any()
        assert not du[padding].any()
    return dict(zip(("y", "h", "c", "du", "dweight", "dh0", "dc0", "dbias"), (y, h, c, du, *rest), strict=True))


def differences(case: Case) -> dict[str, float]:
    """Relative L2 error of every result and gradient; runs in the interpreter's process."""
    torch.use_deterministic_algorithms(True)  # new memory is NaN, so that an unwritten output shows
    inputs = arguments(case)
    num_steps, batch, blocks, size = case.shape
    generator = torch.Generator().manual_seed(1)
    shapes = [(num_steps, batch, blocks * size), (batch, blocks * size), (batch, blocks * size)]
    upstream = [torch.randn(s, generator=generator, dtype=torch.float64).to(case.dtype).double() for s in shapes]
    if case.cell != "lstm":
        upstream[2] = torch.empty(0, dtype=torch.float64)
    want, got = wanted(inputs, upstream), computed(inputs, upstream, case.dtype)
    for name, value in got.items():
        assert value.dtype == case.dtype
        assert name not in want or value.shape == want[name].shape, name
    assert got["dh0"].shape == got["h"].shape
    assert got["dc0"].shape == got["c"].shape
    return {
        name: ((got[name].double() - x).norm() / x.norm().clamp_min(1e-30)).item()
        for name, x in want.items()
        if x.numel()
    }


def interpret() -> None:
    torch.set_num_threads(1)
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="module")
def interpreter() -> Iterator[ProcessPoolExecutor]:
    """A process of its own: Triton reads the variable when it is imported, and then for good."""
    pytest.importorskip("triton")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn"), interpret) as pool:
        yield pool


def check(pool: ProcessPoolExecutor, case: Case, tolerance: float = TOLERANCE) -> None:
    errors = pool.submit(differences, case).result()
    assert all(e <= tolerance for e in errors.values()), errors
    assert len(errors) >= 4


@pytest.mark.parametrize("options", ["all", "expected"])
@pytest.mark.parametrize("reverse", [(False,), (True,), (False, True)], ids=["forwards", "backwards", "both"])
@pytest.mark.parametrize("structure", ["block", "diagonal"])
@pytest.mark.parametrize("cell", CELLS)
def test_kernels_equal_the_reference(
    interpreter: ProcessPoolExecutor, cell: str, structure: str, reverse: tuple[bool, ...], options: str
) -> None:
    """`all` has every argument, with rows of 0 and 1 frames; `expected` has them without keys."""
    shape = SHAPES[(CELLS.index(cell) + len(reverse) + reverse[0] + len(options)) % len(SHAPES)]
    check(interpreter, Case(cell, structure, reverse, options, shape))


@pytest.mark.parametrize("structure", ["block", "diagonal"])
@pytest.mark.parametrize("cell", CELLS)
def test_no_optional_argument(interpreter: ProcessPoolExecutor, cell: str, structure: str) -> None:
    check(interpreter, Case(cell, structure, (False, True), "none", (4, 2, 2, 3)))


@pytest.mark.parametrize("cell", CELLS)
def test_several_tiles_of_rows_are_added(interpreter: ProcessPoolExecutor, cell: str) -> None:
    check(interpreter, Case(cell, "block", shape=(3, 11, 1, 5)))


@pytest.mark.parametrize("cell", ["rnn_modrelu", "gru", "lstm"])
def test_several_tiles_of_columns(interpreter: ProcessPoolExecutor, cell: str) -> None:
    check(interpreter, Case(cell, "diagonal", (True, False), shape=WIDE))


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_modrelu"])
def test_block_too_large_for_registers(interpreter: ProcessPoolExecutor, cell: str) -> None:
    check(interpreter, Case(cell, "block", (False, True), shape=(3, 3, 2, 33)))


@pytest.mark.parametrize(("structure", "dtype"), [("block", torch.float16), ("diagonal", torch.bfloat16)])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "gru_original", "lstm"])
def test_sixteen_bits(interpreter: ProcessPoolExecutor, cell: str, structure: str, dtype: torch.dtype) -> None:
    """Within a few roundings of y, of what is saved and of factors; the interpreter has no product of bfloat16."""
    check(interpreter, Case(cell, structure, (True,), dtype=dtype), 4 * torch.finfo(dtype).eps)


def unsaved(case: Case) -> None:
    from kernels import gpu

    x = {n: v.float() if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in arguments(case).items()}
    kept, not_kept = (gpu.forward(packed=None, **x, save=save) for save in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(kept[:3], not_kept[:3], strict=True))
    assert kept[3].numel()
    assert not_kept[3].shape == (0,)


def test_nothing_is_saved_unless_asked(interpreter: ProcessPoolExecutor) -> None:
    interpreter.submit(unsaved, Case("lstm", "block")).result()


@pytest.mark.parametrize("shape", [(0, 2, 1, 3), (3, 0, 1, 3), (1, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("structure", ["block", "diagonal"])
@pytest.mark.parametrize("cell", ["rnn_modrelu", "lstm"])
def test_nothing_to_do(
    interpreter: ProcessPoolExecutor, cell: str, structure: str, shape: tuple[int, int, int, int]
) -> None:
    errors = interpreter.submit(differences, Case(cell, structure, options="none", shape=shape)).result()
    assert all(e <= TOLERANCE for e in errors.values()), errors


@pytest.fixture(scope="module")
def gpu() -> ModuleType:
    """The module with kernels that compile, in this process."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        pytest.skip("TRITON_INTERPRET is set: nothing is compiled")
    from kernels import gpu

    return gpu


@pytest.fixture(scope="module")
def cuobjdump() -> Path:
    triton = pytest.importorskip("triton")
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    if not tool.exists():
        pytest.skip(f"{tool} is missing")
    return tool


SHARED = {80: 163, 90: 227, 100: 227}
"""KiB of shared memory that a program can have, by compute capability."""

TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.int64: "*i64"}


def compiled(kernel: Any, values: dict[str, Any], num_warps: int, chip: int) -> Any:
    """What a launch with these arguments would compile on that chip."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, aligned = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, Tensor):
            signature[parameter.name] = TYPES[value.dtype]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        if isinstance(value, Tensor) or (isinstance(value, int) and value % 16 == 0):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, aligned)
    options = {"num_warps": num_warps, "num_stages": 1}
    return triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)


def launches(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, case: Case) -> list[tuple[Any, dict[str, Any], int]]:
    """(kernel, arguments, warps) of a forward and a backward pass, neither of which runs."""
    taken: list[tuple[Any, dict[str, Any], int]] = []
    monkeypatch.setattr(gpu, "_launch", lambda kernel, grid, values, warps: taken.append((kernel, values, warps)))
    x = {
        n: v.to(case.dtype) if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in arguments(case).items()
    }
    common = [x[n] for n in ("h0", "c0", "bias", "lengths", "mask", "keys", "cell", "reverse", "zoneout")]
    y, h, c, saved = gpu.forward(x["u"], x["weight"], None, *common, save=True)
    gpu.backward(y, h, c, y, saved, x["u"], x["weight"], None, *common)
    return taken


def spilled(binary: Any, cuobjdump: Path, folder: Path) -> int:
    """Bytes of the stack, on which only spilled registers lie."""
    (folder / "cubin").write_bytes(binary.asm["cubin"])
    command = [cuobjdump, "-res-usage", folder / "cubin"]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    stack, local = re.search(r"STACK:(\d+).* LOCAL:(\d+)", usage).groups()  # type: ignore[union-attr]
    return int(stack) + int(local)


@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize(
    ("structure", "dtype", "size"),
    [("block", torch.float32, 64), ("block", torch.bfloat16, 128), ("diagonal", torch.float32, 128)],
    ids=["fp32", "bf16", "diagonal"],
)
@pytest.mark.parametrize("cell", CELLS)
def test_registers_and_shared_memory_suffice(
    gpu: ModuleType,
    cuobjdump: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    cell: str,
    structure: str,
    dtype: torch.dtype,
    size: int,
    chip: int,
) -> None:
    case = Case(cell, structure, shape=(3, 32, 2, size), dtype=dtype)
    for kernel, values, num_warps in launches(gpu, monkeypatch, case):
        binary = compiled(kernel, values, num_warps, chip)
        assert spilled(binary, cuobjdump, tmp_path) == 0
        assert binary.metadata.shared <= SHARED[chip] * 1024
        before, inside = re.split(r"scf\.for", binary.asm["ttgir"], maxsplit=1)
        if structure == "block":
            assert binary.metadata.shared <= gpu.shared_bytes(cell, size, dtype.itemsize)
            weights = rf"tt\.load .*tensor<{size}x{size}x!tt\.ptr"
            assert len(re.findall(weights, before)) == reference.GATES[cell]  # W is read once, before the loop,
            assert not re.search(weights, inside)  # and never inside it
        if "u" in values:
            assert len(re.findall(r"tt\.load", inside)) == reference.GATES[cell]  # forward reads u alone


@pytest.mark.parametrize("chip", SHARED)
@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 128), (torch.bfloat16, 256)], ids=["fp32", "bf16"])
def test_largest_blocks_fit(
    gpu: ModuleType,
    cuobjdump: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    dtype: torch.dtype,
    size: int,
    chip: int,
) -> None:
    """ptxas may spill a few registers to let another program onto the chip; hundreds of bytes would be our fault."""
    case = Case("rnn_modrelu", "block", shape=(3, 32, 2, size), dtype=dtype)
    for kernel, values, num_warps in launches(gpu, monkeypatch, case):
        binary = compiled(kernel, values, num_warps, chip)
        assert spilled(binary, cuobjdump, tmp_path) <= 16
        assert binary.metadata.shared <= gpu.shared_bytes("rnn_modrelu", size, dtype.itemsize) <= SHARED[chip] * 1024


@pytest.mark.parametrize("structure", ["block", "diagonal"])
def test_sizes_of_one_compile(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch, structure: str) -> None:
    """Triton makes a constant of an argument that is 1."""
    for options in ("none", "all"):
        case = Case("lstm", structure, (True,), options, (1, 1, 1, 1))
        for kernel, values, num_warps in launches(gpu, monkeypatch, case):
            compiled(kernel, values, num_warps, 90)


def test_what_cannot_be_taken(gpu: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu.supports("lstm", (4, 2, 64, 64), torch.float32) is None
    assert gpu.supports("lstm", (4, 10**6), torch.float32) is None
    assert gpu.supports("lstm", (4, 128), torch.float64) == "dtype=torch.float64, wanted float32, float16 or bfloat16"
    assert gpu.supports("gru", (3, 1, 65, 65), torch.float32) == "block size 65 of gru in torch.float32, at most 64"
    with pytest.raises(ValueError, match=r"block size 65 of lstm in torch\.float32, at most 64"):
        launches(gpu, monkeypatch, Case("lstm", "block", shape=(1, 1, 1, 65)))
    assert gpu.supports("gru", (3, 70000, 1, 1), torch.float32) == "70000 blocks, a grid has at most 65535"
    monkeypatch.setattr(gpu, "_shared_limit", lambda: 99 * 1024)
    assert gpu.supports("lstm", (4, 2, 64, 64), torch.float32) is None
    assert "164864 bytes of shared memory, of 101376" in gpu.supports("lstm", (4, 1, 128, 128), torch.bfloat16)
