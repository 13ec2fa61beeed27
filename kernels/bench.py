"""Our kernels beside what a user would otherwise pick, as ratios of one interleaved run.

Before a line is timed its outputs and gradients are compared with those of the definition (`kernels.reference`) in
float64, and those of its rivals with ours.

Every row also gives the share of the floor: the multiply-adds that the recurrence cannot do without at the rate of a
loop of nothing else (`cpu.peak_flops`), or, where bytes and not flops are the limit, the speed of a plain copy.
Forward is measured without gradients, backward as forward and backward together.
"""

import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kernels import cpu, ctc, moments, products, reference
from kernels.ops import pack, recurrence
from kernels.reference import GATES, hash24

Outputs = Callable[[], Tensor]
Function = Callable[..., Tensor]
Rivals = dict[str, tuple[Outputs, list[Tensor], bool]]
TOLERANCE = 1e-5
"""Relative L2 between our float32 and the definition in float64; weights with norms above 1 amplify what is rounded."""
BFLOAT16_TOLERANCE = 0.02
RIVALS_TOLERANCE = 1e-4
MODULES: dict[str, Callable[[int, int], nn.RNNBase]] = {"rnn_tanh": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


@dataclass
class Bench:
    """One line of the table.

    Args:
        function: ours: the output of `inputs`, differentiable by them.
        exact: the definition of it, which takes any precision.
        rivals: the same by other means, by name.
        equal: whether a rival computes the same numbers (a dense net of the same size does not).
        flops: of the recurrence forward; backward takes twice as many more.
        numbers: elements that a copy would move, where bytes are the limit.
        wanted: at least this ratio or share, forward and forward + backward, by the rival's name, "floor" or "copy".
        tolerance: relative L2 to the definition; more than rounding where weights are rounded to bfloat16.
        rivals_tolerance: relative L2 of rivals to ours.
    """

    name: str
    function: Function
    exact: Function
    inputs: list[Tensor]
    rivals: Rivals = field(default_factory=dict)
    flops: float = 0.0
    numbers: int = 0
    wanted: dict[str, tuple[float, float | None]] = field(default_factory=dict)
    tolerance: float = TOLERANCE
    rivals_tolerance: float = RIVALS_TOLERANCE

    def ours(self) -> Tensor:
        return self.function(*self.inputs)


def block_loop(u: Tensor, weight: Tensor) -> Tensor:
    """tanh blocks as people write them: one batched product a step, inputs cut once."""
    num_blocks, size = weight.shape[1:3]
    steps = u.unflatten(-1, (num_blocks, size)).permute(0, 2, 1, 3).contiguous().unbind(0)  # T x (K, B, P)
    matrices = weight[0].transpose(1, 2)
    h = torch.tanh(steps[0])
    outputs = [h]
    for u_t in steps[1:]:
        h = torch.tanh(torch.baddbmm(u_t, h, matrices))
        outputs.append(h)
    return torch.stack(outputs).permute(0, 2, 1, 3).flatten(2)


FLASHRNN = {"rnn_tanh": "elman", "gru": "gru", "lstm": "lstm"}
"""What it calls a cell."""


def flashrnn_rivals(cell: str, u: Tensor, weight: Tensor) -> Rivals:
    """The same blocks by FlashRNN's `vanilla` backend, its loop for CPUs; nothing where it is not installed.

    As fast as it goes: float32, and every tensor laid out as its loop has it inside, so that it transposes nothing. Its
    other backend for CPUs, `vanilla_fwbw`, has only the LSTM and is slower.

    Source: Pöppel, Beck & Hochreiter 2024, arXiv:2412.07752.
    """
    try:
        from flashrnn import FlashRNNConfig, flashrnn
    except ImportError:
        return {}
    (gates, num_blocks, size, _), batch = weight.shape, u.shape[1]
    config = FlashRNNConfig(
        backend="vanilla",
        function=FLASHRNN[cell],
        num_heads=num_blocks,
        head_dim=size,
        batch_size=batch,
        dtype="float32",
        input_shape="TBGHD",
        recurrent_shape="HPGD",
        bias_shape="GHD",
        output_shape="STBHD",
    )
    matrices = weight.detach()
    if cell == "gru":
        matrices = matrices[[2, 0, 1]]  # it has n, r, z
    matrices = matrices.permute(1, 3, 0, 2).contiguous().requires_grad_()  # (K, from P, G, to P)
    bias = torch.zeros(config.num_gates_t, num_blocks, size)
    first = torch.zeros(config.num_states, 1, batch, num_blocks, size)

    def run() -> Tensor:
        inputs = u.unflatten(-1, (gates, num_blocks, size))
        states, _ = flashrnn(inputs, matrices, bias, states=first, config=config)  # (states, T, B, K, P), h first
        y: Tensor = states[0].flatten(2)
        return y

    return {"flashrnn": (run, [u, matrices], True)}


def _case(cell: str, steps: int, batch: int, blocks: int, size: int | None) -> tuple[Tensor, Tensor]:
    gates, hidden = GATES[cell], blocks * (size or 1)
    weight = torch.randn(gates, blocks, size, size) * 0.5 / size**0.5 if size else torch.rand(gates, hidden)
    return torch.randn(steps, batch, gates * hidden).requires_grad_(), weight.requires_grad_()


def _ours(cell: str) -> Function:
    return lambda u, weight, bias=None, **more: recurrence(u, weight, cell=cell, bias=bias, **more)[0]


def _exact(cell: str) -> Function:
    def function(u: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return reference.recurrence(u, weight, None, None, bias, None, None, None, cell, [False], [0.0, 0.0])[0]

    return function


def bench(cell: str, name: str, u: Tensor, weight: Tensor, rivals: Rivals, **facts: Any) -> Bench:
    """A line of one recurrence without projections; the definition, a loop of plain PyTorch, is a rival too."""
    exact = _exact(cell)
    loop: Rivals = {"reference": (lambda: exact(u, weight), [u, weight], True)}
    return Bench(name, _ours(cell), exact, [u, weight], loop | rivals, **facts)


def block_bench(steps: int, batch: int, size: int, hidden: int = 1024, **wanted: tuple[float, float | None]) -> Bench:
    """tanh blocks of P = `size` against the loop, FlashRNN, and a dense nn.RNN of as many units."""
    u, weight = _case("rnn_tanh", steps, batch, hidden // size, size)
    dense = nn.RNN(hidden, hidden)
    # The sparse layer is compared with a dense layer's recurrence alone: no projection on either side.
    x = torch.randn(steps, batch, hidden)
    rivals: Rivals = {
        "loop": (lambda: block_loop(u, weight), [u, weight], True),
        "dense": (lambda: dense(x)[0], list(dense.parameters()), False),
        **flashrnn_rivals("rnn_tanh", u, weight),
    }
    return bench(
        "rnn_tanh",
        f"blocks of {size}, B={batch}, T={steps}",
        u,
        weight,
        rivals,
        flops=2.0 * steps * batch * hidden * size,
        numbers=u.numel() if "copy" in wanted else 0,
        wanted=wanted,
    )


def dense_bench(cell: str, batch: int, hidden: int, bfloat16: bool = False, **wanted: tuple[float, float]) -> Bench:
    """One dense layer of 100 steps against torch's own, the input projection on both sides."""
    net = MODULES[cell](hidden, hidden)
    weight_ih, weight_hh, bias_ih, bias_hh = (p for _, p in net.named_parameters())
    x = torch.randn(100, batch, hidden).requires_grad_()
    gates = GATES[cell]
    weight = weight_hh.detach().view(gates, 1, hidden, hidden).clone().requires_grad_()

    def layer(run: Function, **more: Any) -> Function:
        def function(x: Tensor, weight: Tensor, weight_ih: Tensor, bias_ih: Tensor, bias_hh: Tensor) -> Tensor:
            u = products.linear(x.flatten(0, 1), weight_ih, bias_ih).unflatten(0, x.shape[:2])  # as layers take it
            return run(u, weight, bias_hh, **more)

        return function

    more = {"packed": pack(weight, cell, bfloat16=True)} if bfloat16 else {}
    rivals: Rivals = {"torch": (lambda: net(x)[0], [x, *net.parameters()], not bfloat16)}
    return Bench(
        f"dense {cell.removesuffix('_tanh')}, H={hidden}, B={batch}" + (", bfloat16 weights" if bfloat16 else ""),
        layer(_ours(cell), **more),
        layer(_exact(cell)),
        [x, weight, weight_ih, bias_ih, bias_hh],
        rivals,
        flops=2.0 * 2 * 100 * batch * gates * hidden * hidden,
        wanted=dict(wanted),
        tolerance=BFLOAT16_TOLERANCE if bfloat16 else TOLERANCE,
    )


def ctc_bench(batch: int, frames: int, classes: int, count: int) -> Bench:
    """The loss of a recogniser against torch's, the log-softmax on both sides; rows of `count` labels."""
    scores = torch.randn(batch, frames, classes).requires_grad_()
    labels = torch.randint(1, classes, (batch * count,))
    rest = labels, torch.full((batch,), frames), torch.full((batch,), count)

    def loss(run: Function) -> Function:
        return lambda scores: run(scores.log_softmax(-1), *rest)

    return Bench(
        f"ctc, {batch} rows of {frames} frames and {count} labels of {classes}",
        loss(ctc.ctc_loss),
        loss(ctc.reference),
        [scores],
        {"torch": (lambda: loss(ctc.reference)(scores), [scores], True)},
        rivals_tolerance=1e-3,  # torch adds logarithms of hundreds in float32
    )


def moments_bench(steps: int, batch: int, size: int) -> Bench:
    """Means and variances through a tanh net against the loop in plain PyTorch."""
    inputs = [
        torch.randn(steps, batch, size).requires_grad_(),
        torch.rand(steps, batch, size).requires_grad_(),
        (torch.randn(size, size) / size**0.5).requires_grad_(),
        torch.zeros(batch, size).requires_grad_(),
        torch.zeros(batch, size).requires_grad_(),
    ]

    def run(function: Callable[..., moments.Moments]) -> Function:
        return lambda *given: torch.cat(function(*given, 0.5))

    return Bench(
        f"moments, H={size}, B={batch}, T={steps}",
        run(moments.moments),
        run(moments.reference),
        inputs,
        {"loop": (lambda: run(moments.reference)(*inputs), inputs, True)},
        flops=2.0 * 2 * steps * batch * size * size,
    )


def benches() -> Iterator[Bench]:
    """The table, in order."""
    yield block_bench(100, 16, 64, loop=(4, 3), dense=(20, 20), floor=(0.55, 0.50))
    yield block_bench(500, 1, 64, loop=(9, 11), dense=(20, 20))
    yield block_bench(100, 16, 256, floor=(0.75, 0.70))
    yield block_bench(100, 32, 256, floor=(0.75, 0.70))
    yield block_bench(100, 16, 16, copy=(0.35, None))
    for cell in ("lstm", "gru"):
        u, weight = _case(cell, 100, 16, 16, 64)
        flops = 2.0 * u.numel() * 64
        yield bench(cell, f"{cell} blocks of 64, B=16", u, weight, flashrnn_rivals(cell, u, weight), flops=flops)
    for cell in ("rnn_relu", "gru", "lstm"):
        u, weight = _case(cell, 100, 16, 1024, None)
        name = f"diagonal{'' if cell == 'rnn_relu' else f' {cell}'}, H=1024, B=16"
        bytes_bound: dict[str, Any] = (
            {"numbers": u.numel(), "wanted": {"copy": (0.8, None)}} if cell == "rnn_relu" else {}
        )
        yield bench(cell, name, u, weight, {}, **bytes_bound)
    for cell in ("rnn_tanh", "gru", "lstm"):
        for hidden in (256, 512, 1024):
            for batch in (1, 4, 16, 32):
                few = batch <= 16
                if cell == "lstm":  # what is wanted is wanted of layers: trainer/bench/layers.py
                    yield dense_bench(cell, batch, hidden)
                    continue
                wanted = {"rnn_tanh": (1.3, 1.3), "gru": (1.3, 1.5)}[cell] if few else (1.1, 1.1)
                yield dense_bench(cell, batch, hidden, torch=wanted)
    for cell in ("rnn_tanh", "gru"):  # one row: bound by reading the weights
        yield dense_bench(cell, 1, 1024, bfloat16=True)
    yield ctc_bench(4, 230, 36, 80)  # letters, as the default recipe has them
    yield ctc_bench(16, 250, 1000, 40)  # subwords
    yield moments_bench(60, 16, 200)  # chorales with fast dropout


def _closure(cell: str, u: Tensor, weight: Tensor) -> Outputs:
    return lambda: recurrence(u, weight, cell=cell)[0]


def _agree(bench: Bench) -> None:
    """Ours agrees with the definition in float64, and rivals that compute the same agree with ours.

    Raises:
        AssertionError: they do not, so that no ratio would mean anything.
    """

    def compare(what: str, x: Tensor, y: Tensor, tolerance: float) -> None:
        error = float((x - y).norm() / y.norm())
        if not error < tolerance:
            raise AssertionError(f"{bench.name}: {what} differs by {error:.1e}")

    ours = bench.ours()
    weights = torch.randn_like(ours)
    gradients = torch.autograd.grad(ours, bench.inputs, weights, retain_graph=True)
    doubles = [x.detach().double().requires_grad_() for x in bench.inputs]
    exact = bench.exact(*doubles)
    compare("our output", ours.detach(), exact.detach(), bench.tolerance)
    for number, (x, y) in enumerate(zip(gradients, torch.autograd.grad(exact, doubles, weights.double()), strict=True)):
        compare(f"our gradient of input {number}", x, y, bench.tolerance)
    for name, (rival, inputs, equal) in bench.rivals.items():
        if equal:
            theirs = rival()
            (gradient,) = torch.autograd.grad(theirs, inputs[:1], weights)
            compare(f"the output of {name}", theirs.detach(), ours.detach(), bench.rivals_tolerance)
            compare(f"the gradient of {name}", gradient, gradients[0], bench.rivals_tolerance)


def _forward(function: Outputs) -> Callable[[], object]:
    def run() -> object:
        with torch.no_grad():
            return function()

    return run


def _both(function: Outputs, inputs: list[Tensor], weights: Tensor) -> Callable[[], object]:
    return lambda: torch.autograd.grad(function(), inputs, weights)


def interleaved(ways: dict[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Time each way in turn, A B C, C B A, ..., after a warm-up, for about so many seconds and five rounds at least."""
    for run in ways.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in ways}
    end = time.perf_counter() + seconds
    rounds = 0
    while rounds < 5 or (time.perf_counter() < end and rounds < 200):
        for name in list(ways)[:: 1 if rounds % 2 else -1]:
            start = time.perf_counter()
            ways[name]()
            times[name].append(time.perf_counter() - start)
        rounds += 1
    return times


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}


def measure(bench: Bench, seconds: float, peak: float) -> dict[str, Any]:
    """One line: milliseconds, share of the floor, ratios to each rival; forward and forward + backward."""
    _agree(bench)
    weights = torch.randn_like(bench.ours())
    result: dict[str, Any] = {"name": bench.name, "wanted": bench.wanted}
    buffer = torch.randn(bench.numbers) if bench.numbers else None
    for number, direction in enumerate(("forward", "both")):
        ways: dict[str, Callable[[], object]] = {}
        if direction == "forward":
            ways["ours"] = _forward(bench.ours)
            ways |= {name: _forward(rival) for name, (rival, _, _) in bench.rivals.items()}
            if buffer is not None:
                ways["copy"] = buffer.clone
        else:
            ways["ours"] = _both(bench.ours, bench.inputs, weights)
            ways |= {name: _both(rival, inputs, weights) for name, (rival, inputs, _) in bench.rivals.items()}
        times = interleaved(ways, seconds)
        line: dict[str, Any] = {"milliseconds": quartiles([1e3 * t for t in times["ours"]])}
        for name in list(ways)[1:]:
            pairs = zip(times[name], times["ours"], strict=True)
            line[name] = quartiles([theirs / ours for theirs, ours in pairs])
        if bench.flops:
            done = bench.flops * (1, 3)[number]
            line["floor"] = quartiles([done / peak / t for t in times["ours"]])
        result[direction] = line
    return result


def threads(seconds: float) -> dict[str, Any]:
    """One thread against two on a block-diagonal layer; 1 where this process has one processor."""
    u, weight = _case("rnn_tanh", 100, 16, 16, 64)
    out = torch.randn(100, 16, 1024)
    before = torch.get_num_threads()

    def on(number: int, way: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            torch.set_num_threads(number)
            return way()

        return run

    result: dict[str, Any] = {"name": "blocks of 64: two threads over one", "wanted": {"one": (1.9, 1.9)}}
    try:
        for direction, way in (
            ("forward", _forward(_closure("rnn_tanh", u, weight))),
            ("both", _both(_closure("rnn_tanh", u, weight), [u, weight], out)),
        ):
            times = interleaved({"two": on(2, way), "one": on(1, way)}, seconds)
            ratios = [one / two for one, two in zip(times["one"], times["two"], strict=True)]
            result[direction] = {"milliseconds": quartiles([1e3 * t for t in times["two"]]), "one": quartiles(ratios)}
    finally:
        torch.set_num_threads(before)
    return result


def lengths(seconds: float) -> dict[str, Any]:
    """Rows of lengths uniform in 1..T against rows of T: half the work."""
    u, weight = _case("rnn_tanh", 100, 32, 16, 64)
    out = torch.randn(100, 32, 1024)
    short = 1 + hash24(torch.zeros((), dtype=torch.int64), torch.arange(32)) % 100
    ways: dict[str, Outputs] = {
        "full": lambda: recurrence(u, weight, cell="rnn_tanh")[0],
        "short": lambda: recurrence(u, weight, cell="rnn_tanh", lengths=short)[0],
    }
    mean = float(short.double().mean()) / 100
    result: dict[str, Any] = {
        "name": f"lengths uniform in 1..T (mean {mean:.2f} T): time over full",
        "wanted": {"full": (0.65, 0.65)},
        "less is better": True,
    }
    for direction in ("forward", "both"):
        runs = {k: _forward(w) if direction == "forward" else _both(w, [u, weight], out) for k, w in ways.items()}
        times = interleaved(runs, seconds)
        ratios = [a / b for a, b in zip(times["short"], times["full"], strict=True)]
        result[direction] = {"milliseconds": quartiles([1e3 * t for t in times["short"]]), "full": quartiles(ratios)}
    return result


def run(
    seconds: float = 1.0, only: str = "", say: Callable[[str], None] = print, more: Iterable[Bench] = ()
) -> dict[str, Any]:
    """The table on one thread.

    Args:
        seconds: about so long for each line and direction.
        only: text that a line's name must hold.
        say: told each line's name as it begins.
        more: lines that stand behind those of `benches`.

    Returns:
        the floor, and a list of lines.

    Raises:
        ValueError: no line has this text in its name.
    """
    torch.manual_seed(0)
    cpu.keep_pages()
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        peak = cpu.peak_flops()
        lines, names = [], []
        for bench in chain(benches(), more):
            names.append(bench.name)
            if only in bench.name:
                say(bench.name)
                lines.append(measure(bench, seconds, peak))
        for line in (lengths, threads):
            names.append(line.__name__)
            if only in line.__name__:
                say(line.__name__)
                lines.append(line(seconds))
    finally:
        torch.set_num_threads(before)
    if not lines:
        raise ValueError(f"no line has {only!r} in its name, which is one of {', '.join(names)}")
    return {"peak_gflops": peak / 1e9, "instruction_set": cpu.instruction_set(), "lines": lines}
