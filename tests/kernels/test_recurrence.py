"""The fast path agrees with the definition, is a well-formed operator, and depends on nothing that it should not."""

import ctypes
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
from kernels import cases, cpu, reference
from kernels.reference import GATES
from kernels.say import say_once
from tests.kernels.builds import LESSER, run_in
from trainer.config import PROJECT

pytestmark = pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernels: {cpu.MISSING}")

TORCH = {"rnn_tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}
EXACT = {torch.float32: cases.TOLERANCE, torch.float64: 1e-13}


@pytest.mark.parametrize("dtype", EXACT, ids=lambda d: str(d).removeprefix("torch."))
@pytest.mark.parametrize("cell", GATES)
def test_every_case_agrees_with_the_definition(cell: str, dtype: torch.dtype) -> None:
    """Outputs, last states and all gradients; NaN in the padding reaches nothing."""
    assert kernels.explain(torch.empty(0, dtype=dtype)).startswith("C++")
    for case in cases.cases():
        if case.cell == cell:
            wrong = {k: e for k, e in cases.errors(case, dtype=dtype).items() if not e <= EXACT[dtype]}
            assert not wrong, f"{case}: {wrong}"


def test_the_selftest_counts_by_path_and_finds_a_wrong_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    few = [c for c in cases.cases() if c.steps == 12 and c.cell in ("rnn_relu", "lstm")]
    monkeypatch.setattr(cases, "cases", lambda: iter(few))
    told: list[str] = []
    assert kernels.selftest(say=told.append) == {f"{kernels.explain(torch.empty(0))}, torch.float32": len(few)}
    assert told == ["rnn_relu, torch.float32", "lstm, torch.float32"]
    monkeypatch.setattr(cases, "recurrence", lambda *a, **k: [x * 1.00001 for x in kernels.recurrence(*a, **k)])
    with pytest.raises(AssertionError, match=r"rnn_relu-T12-B7-4x19-f.* on cpu, C\+\+ .*: y differs by 1\.0e-05"):
        kernels.selftest()


def test_the_path_of_a_call_is_explained_with_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.empty(0)
    assert kernels.explain(weight) == f"C++ ({cpu.instruction_set()})"
    monkeypatch.setattr(cpu, "openmp", lambda: None)
    assert kernels.explain(weight).endswith("; on one thread, since torch has not loaded the GNU OpenMP)")
    monkeypatch.setattr(cpu, "MISSING", "no compiler")
    assert kernels.explain(weight) == "the reference loop (plain PyTorch, slow): no compiler"


CHECK = """
from kernels import cases
for case in cases.cases():
    if case.cell in ('rnn_relu', 'gru', 'lstm'):
        wrong = {k: e for k, e in cases.errors(case).items() if not e <= cases.TOLERANCE}
        assert not wrong, f'{case}: {wrong}'
"""


@LESSER
def test_every_build_agrees_with_the_definition(isa: str) -> None:
    run_in(isa, CHECK)


@pytest.mark.parametrize("cell", TORCH)
@pytest.mark.parametrize("batch", [1, 33])
def test_one_block_is_torchs_own_layer(cell: str, batch: int) -> None:
    torch.manual_seed(0)
    net = TORCH[cell](20, 48)
    x = torch.randn(30, batch, 20, requires_grad=True)
    want, _ = net(x)
    weight = net.weight_hh_l0.view(GATES[cell], 1, 48, 48)
    got, _, _ = kernels.recurrence(
        nn.functional.linear(x, net.weight_ih_l0, net.bias_ih_l0), weight, cell=cell, bias=net.bias_hh_l0
    )
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), [x, *net.parameters()]) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)  # sums over 30 steps of 33 rows


def small(cell: str, structure: str, dtype: torch.dtype = torch.float64) -> tuple[list[Any], dict[str, Any]]:
    """A call with every option, and its differentiable tensors."""
    case = cases.Case(
        cell,
        steps=4,
        batch=3,
        blocks=2 if structure == "block" else 4,
        size=2 if structure == "block" else None,
        reverse=(False, True),
        state=True,
        bias=True,
        lengths=True,
        mask=True,
        zoneout=(0.3, 0.2),
        drawn=True,
    )
    inputs = {k: x if x is None or not x.is_floating_point() else x.to(dtype) for k, x in case.inputs().items()}
    inputs["u"] = inputs["u"].nan_to_num(0.5)  # finite differences cannot step over NaN
    own = [None if inputs[n] is None else inputs[n].requires_grad_() for n in ("u", "weight", "h0", "c0", "bias")]
    fixed = {n: inputs[n] for n in ("lengths", "mask", "keys")}
    return own, fixed | {"cell": cell, "reverse": [False, True], "zoneout": (0.3, 0.2)}


def call(own: list[Any], options: dict[str, Any]) -> list[Tensor]:
    u, weight, h0, c0, bias = own
    return [x for x in kernels.recurrence(u, weight, h0, c0, bias=bias, **options) if x.numel()]


@pytest.mark.parametrize("structure", ["block", "diagonal"])
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "gru_original", "lstm"])
def test_gradients_are_derivatives_and_have_derivatives(cell: str, structure: str) -> None:
    own, options = small(cell, structure)
    present = [x for x in own if x is not None]

    def function(*tensors: Tensor) -> list[Tensor]:
        given = iter(tensors)
        return call([None if x is None else next(given) for x in own], options)

    assert torch.autograd.gradcheck(function, present)
    assert torch.autograd.gradgradcheck(function, present)


@pytest.mark.parametrize("structure", ["block", "diagonal"])
@pytest.mark.parametrize("cell", ["rnn_relu", "gru", "lstm"])
def test_the_operators_are_well_formed(cell: str, structure: str) -> None:
    own, options = small(cell, structure, torch.float32)
    lengths, mask, keys = (options[n] for n in ("lengths", "mask", "keys"))
    packed = kernels.pack(own[1], cell)
    inputs = (own[0], own[1], packed, *own[2:], lengths, mask, keys, cell, [False, True], [0.3, 0.2])
    torch.library.opcheck(torch.ops.ostinato.recurrence, (*inputs, True))
    with torch.no_grad():
        y, h, c, saved = torch.ops.ostinato.recurrence(*inputs, True)
    gradients = [torch.randn_like(x) for x in (y, h, c)]
    torch.library.opcheck(torch.ops.ostinato.recurrence_backward, (*gradients, y, saved, *inputs))
    if structure == "block":
        torch.library.opcheck(torch.ops.ostinato.pack, (own[1].detach(), cell, False))


@pytest.mark.parametrize(
    ("cell", "structure"), [("rnn_relu", "block"), ("lstm", "block"), ("gru", "block"), ("rnn_tanh", "diagonal")]
)
def test_compiled_whole_it_computes_the_same(cell: str, structure: str) -> None:
    own, options = small(cell, structure, torch.float32)
    present = [x for x in own if x is not None]

    def function() -> list[Tensor]:
        return call(own, options)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for a, b in zip(function(), compiled(), strict=True):
        assert torch.equal(a, b)
    wanted, got = (torch.autograd.grad(sum(x.sum() for x in f()), present) for f in (function, compiled))
    for a, b in zip(wanted, got, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("structure", ["block", "diagonal"])
def test_lengths_out_of_range_touch_no_other_memory(structure: str) -> None:
    """A compiled graph, or a call of the operator itself, does not check them."""
    weight = torch.rand((1, 2, 16, 16) if structure == "block" else (1, 32)) * 0.1
    u = torch.randn(5, 3, 32)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(lengths: Tensor) -> Tensor:
        return kernels.recurrence(u, weight, cell="rnn_tanh", lengths=lengths)[0]

    for wrong, meant in (([9, -3, 2], [5, 0, 2]), ([2**60, 5, -(2**60)], [5, 5, 0])):
        assert torch.equal(compiled(torch.tensor(wrong)), compiled(torch.tensor(meant)))


def on_threads(number: int, function: Any) -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        return function()
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("structure", ["block", "diagonal"])
@pytest.mark.parametrize("cell", GATES)
def test_the_order_of_memory_changes_nothing(cell: str, structure: str) -> None:
    """Such as that of an inverse, which a parametrised matrix may be: transposed."""
    tensors, options = small(cell, structure)
    results = []
    for turn in (lambda x: x, lambda x: x.mT.contiguous().mT if x.ndim > 1 else x):
        own = [None if x is None else turn(x.detach()).requires_grad_() for x in tensors]
        found = call(own, options)
        loss = torch.stack([x.square().sum() for x in found]).sum()
        results.append((*found, *torch.autograd.grad(loss, [x for x in own if x is not None])))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("blocks", "size", "exact"),
    [(16, 16, True), (3, 32, True), (600, None, True), (1, 96, False)],
    ids=["blocks", "few blocks, batch cut", "diagonal", "dense, rows shared"],
)
@pytest.mark.parametrize("cell", ["rnn_tanh", "gru_original", "lstm"])
def test_threads_change_nothing(cell: str, blocks: int, size: int | None, exact: bool) -> None:
    """Bit for bit where no block is shared, and there to rounding; every time the same."""
    case = cases.Case(cell, 11, 40, blocks, size, lengths=True, bias=True)

    def compute() -> dict[str, Tensor]:
        return cases.run(case, "cpu", torch.float32, exact=False)

    one, two, again = on_threads(1, compute), on_threads(2, compute), on_threads(2, compute)
    for name, x in one.items():
        assert torch.equal(two[name], again[name]), name
        if exact:
            assert torch.equal(x, two[name]), name
        else:
            torch.testing.assert_close(x, two[name], rtol=1e-5, atol=1e-5)


def test_never_more_threads_than_processors() -> None:
    assert on_threads(64, cpu._num_threads) <= cpu.most_threads()


@pytest.mark.parametrize(
    ("own", "files", "allowed"),
    [
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "150000 100000", "cpu.max": "max 100000"}, 1.5),
        ("0::/a/b", {"a/b/cpu.max": "50000 100000", "a/cpu.max": "150000 100000"}, 0.5),
        ("0::/host/only", {"cpu.max": "300000 100000"}, 3.0),
        ("4:cpuacct,cpu:/a", {"cpu/a/cpu.cfs_quota_us": "-1", "cpu/a/cpu.cfs_period_us": "100000"}, math.inf),
        ("4:cpuacct,cpu:/a", {"cpu/cpu.cfs_quota_us": "200000", "cpu/cpu.cfs_period_us": "100000"}, 2.0),
        ("3:cpuset:/", {"cpu/cpu.cfs_quota_us": "x", "cpu/cpu.cfs_period_us": "100000"}, math.inf),
    ],
)
def test_the_tightest_quota_holds(tmp_path: Path, own: str, files: dict[str, str], allowed: float) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    (tmp_path / "own").write_text(f"{own}\n")
    assert cpu.quota(tmp_path, tmp_path / "own") == allowed


def test_an_unwritten_output_would_show() -> None:
    """New memory is filled with NaN, in the workspace too: it was used for something else before."""
    torch.use_deterministic_algorithms(True)
    try:
        for cell in ("gru", "lstm"):
            case = cases.Case(cell, 5, 6, 2, 19, lengths=True)
            got = cases.run(case, "cpu", torch.float32, exact=False)
            assert all(x.isfinite().all() for x in got.values())
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("cell", ["rnn_tanh", "gru", "lstm"])
def test_bfloat16_weights_are_rounded_weights(cell: str) -> None:
    case = cases.Case(cell, 9, 5, 2, 40)
    u, weight = (case.inputs()[n].float() for n in ("u", "weight"))
    packed = kernels.pack(weight, cell, bfloat16=True)
    assert packed.dtype == torch.int16
    got, _, _ = kernels.recurrence(u, weight, cell=cell, packed=packed)
    rounded = weight.bfloat16().float().requires_grad_()
    want, _, _ = kernels.recurrence(u, rounded, cell=cell)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    weight.requires_grad_()
    got, _, _ = kernels.recurrence(u, weight, cell=cell, packed=packed)
    (da,), (db,) = torch.autograd.grad(got.sum(), weight), torch.autograd.grad(want.sum(), rounded)
    torch.testing.assert_close(da, db, rtol=1e-5, atol=1e-5)


def test_autocast_leaves_the_state_in_float32() -> None:
    case = cases.Case("lstm", 5, 3, 2, 16)
    inputs = case.inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        u, weight = inputs["u"].bfloat16(), inputs["weight"].float()
        y, _, _ = kernels.recurrence(u, weight, cell="lstm")
        half = torch.full((3, 32), 0.5, dtype=torch.float64)  # in no type that the kernel reads
        of_double, _, _ = kernels.recurrence(u, weight, half, half, cell="lstm", mask=half)
        of_float, _, _ = kernels.recurrence(u, weight, half.float(), half.float(), cell="lstm", mask=half.float())
    assert y.dtype == torch.float32
    assert torch.equal(of_double, of_float)


def test_a_gradient_that_was_not_prepared_is_refused() -> None:
    u, weight = torch.zeros(2, 1, 4, requires_grad=True), torch.zeros(1, 1, 4, 4)
    packed = kernels.pack(weight, "rnn_tanh")
    with pytest.raises(RuntimeError, match="save=False"):
        torch.ops.ostinato.recurrence(u, weight, packed, *[None] * 6, "rnn_tanh", [False], [0.0, 0.0], False)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"u": torch.zeros(3, 2, 7)}, r"u is of shape \(3, 2, 7\), wanted \(T, B, 1 gates x 8 units\)"),
    ({"weight": torch.zeros(1, 2, 4, 3)}, "blocks 4 x 3, wanted square"),
    ({"weight": torch.zeros(3, 2, 4, 4)}, "for 3 gates, wanted 1 for the cell rnn_tanh"),
    ({"weight": torch.zeros(1, 2, 4)}, r"weight is of shape \(1, 2, 4\)"),
    ({"weight": torch.zeros(1, 2, 0, 0), "u": torch.zeros(3, 2, 0)}, r"\(1, 2, 0, 0\), wanted one unit or more"),
    ({"weight": torch.zeros(1, 0), "u": torch.zeros(3, 2, 0)}, r"weight is of shape \(1, 0\), wanted one unit"),
    ({"u": torch.zeros(3, 2, 8, dtype=torch.int32)}, "u is of torch.int32, wanted floating point"),
    ({"weight": torch.zeros(1, 2, 4, 4, dtype=torch.complex64)}, "weight is of torch.complex64, wanted torch.float32"),
    ({"mask": torch.ones(2, 8, requires_grad=True)}, "mask is one that requires a gradient, wanted a constant"),
    ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths is of shape \(3,\), wanted \(2,\)"),
    ({"lengths": torch.tensor([4, 1])}, "lengths is from 1 to 4, wanted from 0 to the 3 frames"),
    ({"lengths": torch.ones(2)}, "lengths is of torch.float32, wanted torch.int64"),
    ({"h0": torch.zeros(2, 8).double()}, "h0 is of torch.float64, wanted torch.float32"),
    ({"c0": torch.zeros(2, 8)}, "c0 is given, wanted None"),
    ({"weight": torch.zeros(1, 2, 4, 4, device="meta")}, "weight is on meta, wanted cpu"),
    ({"reverse": [True, False, True]}, "reverse is 3 flags, wanted a number that divides the 2 blocks"),
    ({"zoneout": 1.0}, "zoneout is"),
    ({"packed": torch.zeros(3)}, r"packed is torch.float32 of shape \(3,\), wanted what pack makes"),
    ({"cell": "rnn"}, "cell is 'rnn', wanted one of"),
]


@pytest.mark.parametrize(("changed", "wanted"), WRONG, ids=[w for _, w in WRONG])
def test_a_wrong_argument_is_named(changed: dict[str, Any], wanted: str) -> None:
    right: dict[str, Any] = {"u": torch.zeros(3, 2, 8), "weight": torch.zeros(1, 2, 4, 4), "cell": "rnn_tanh"}
    kernels.recurrence(**right)
    with pytest.raises(ValueError, match=wanted):
        kernels.recurrence(**(right | changed))


@pytest.mark.parametrize("shape", [(1, 1, 16, 16), (4, 1, 300, 1), (4, 1, 0, 0)], ids=["gates", "not square", "empty"])
def test_weights_that_fit_no_kernel_are_not_packed(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"weight is (for 1 gates|of blocks 300 x 1|of shape \(4, 1, 0, 0\)), wanted"):
        kernels.pack(torch.ones(shape), "lstm")


@pytest.mark.parametrize(
    "changed",
    [
        {"lengths": torch.ones(2, dtype=torch.int32)},
        {"keys": torch.ones(2, dtype=torch.int32), "zoneout": 0.5},
        {"mask": torch.ones(2, 8, dtype=torch.bool)},
        {"u": torch.zeros(3, 2, 8, dtype=torch.int64)},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_autocast_refuses_what_it_cannot_convert(changed: dict[str, Any]) -> None:
    right: dict[str, Any] = {"u": torch.zeros(3, 2, 8), "weight": torch.zeros(1, 2, 4, 4), "cell": "rnn_tanh"}
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"wanted (torch.int64|floating)"):
        kernels.recurrence(**(right | changed))


def test_short_names() -> None:
    u, weight = torch.randn(4, 2, 24), torch.randn(3, 2, 4, 4) * 0.3
    for reset, cell in (("after", "gru"), ("before", "gru_original")):
        y, h = kernels.block_gru(u, weight, reset=reset)
        assert torch.equal(y, kernels.recurrence(u, weight, cell=cell)[0])
        assert torch.equal(h, y[-1])
    y, _ = kernels.diagonal_rnn(u, torch.rand(1, 24), activation="relu")
    assert y.shape == u.shape


def test_without_the_library_the_reference_serves(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Everything still works, and one line says why it is slow."""
    u, weight = torch.randn(4, 2, 8), torch.randn(1, 2, 4, 4) * 0.3
    want, _, _ = kernels.recurrence(u, weight, cell="rnn_tanh")
    monkeypatch.setattr(cpu, "MISSING", "the C++ kernels were not built")
    say_once.cache_clear()
    with caplog.at_level("INFO", logger="kernels"):
        for _ in range(2):
            got, _, _ = kernels.recurrence(u, weight, cell="rnn_tanh")
    torch.testing.assert_close(got, want)
    assert [r.message for r in caplog.records] == [
        "rnn_tanh: the reference loop (plain PyTorch, slow): the C++ kernels were not built"
    ]


def test_the_interface_has_the_fields_of_the_source() -> None:
    """A field more or less on one side would shift all that follow."""
    source = (PROJECT / "kernels/call.h").read_text(encoding="utf-8")
    body = source.partition("struct Call {")[2].partition("};")[0]
    names = []
    for line in body.splitlines():
        declaration = line.partition("//")[0].strip().rstrip(";")
        if declaration:
            names += [n.strip().lstrip("*") for n in declaration.split(" ", 1)[1].replace("void", "").split(",")]
    names = [n.split()[-1].lstrip("*") for n in names]
    assert names == [field[0] for field in cpu._Call._fields_]
    assert ctypes.sizeof(cpu._Call) == 8 * len(names)


def test_reference_zoneout_keeps_the_share_that_it_says() -> None:
    keys = torch.arange(200) * 7919
    mask = reference.zoneout_mask(keys, 3, torch.arange(100), 100, 0.25, False)
    assert abs(mask.double().mean() - 0.25) < 0.01
    assert not torch.equal(mask, reference.zoneout_mask(keys, 4, torch.arange(100), 100, 0.25, False))
    assert not torch.equal(mask, reference.zoneout_mask(keys, 3, torch.arange(100), 100, 0.25, True))
