"""What each part of `bench` found, as the terminal shows it: a function each, of the verb's arguments, that returns the
figures for --json too.
"""

import os
import sys
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.errors import UserError


def _wide() -> Console:
    """Where the output goes into a file, lines are not cut short."""
    return Console(width=150 if not sys.stdout.isatty() else None)


def step(arguments: Namespace) -> dict[str, Any]:
    """The engine's step."""
    from trainer.bench import step as bench

    return _of_a_training(arguments, partial(bench.measure, num_steps=arguments.steps))


def loader(arguments: Namespace) -> dict[str, Any]:
    """The loader."""
    from trainer.bench import loader as bench

    return _of_a_training(arguments, partial(bench.measure, hours=arguments.hours))


def _of_a_training(arguments: Namespace, measure: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    from trainer import distributed

    ranks = distributed.start()
    try:
        result = measure(arguments.config, arguments.overrides, ranks, arguments.repetitions)
    finally:
        distributed.stop()
    columns = list(next(iter(result["rows"].values())))
    table = Table(title=f"bench {arguments.what} {arguments.config}: median (quartiles) of {arguments.repetitions}")
    table.add_column("")
    for column in columns:
        table.add_column(column.replace("_", " "), justify="right")
    for name, row in result["rows"].items():
        table.add_row(name, *(f"{v['median']:.3f} ({v['low']:.3f}-{v['high']:.3f})" for v in row.values()))
    console = Console()
    console.print(table)
    if "ratios" in result:
        console.print(_ratios(result["ratios"]))
        if arguments.picture:
            from trainer.plots import loader_ratios

            loader_ratios(result["ratios"], arguments.picture)
    for key, value in result.items():
        if key not in ("rows", "ratios"):
            console.print(f"{key.replace('_', ' ')}: {value}", highlight=False)
    return result


def _ratios(lines: list[dict[str, Any]]) -> Any:
    """The loader against each rival, by the clock and by processor time."""

    table = Table(title="times as fast: ours (two workers in the last line) against each")
    for heading in ("", "against", "by the clock", "by processor time", "wanted"):
        table.add_column(heading)
    for line in lines:
        shown = [f"{v['median']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for v in (line["clock"], line["processor"])]
        missed = line["wanted"] and line[line["judged_by"]]["median"] < line["wanted"]
        wanted = f"{line['wanted']:g}" if line["wanted"] else ""
        table.add_row(line["contest"], line["rival"], *shown, wanted + ("  MISSED" if missed else ""))
    return table


def orthogonal(arguments: Namespace) -> dict[str, Any]:
    import torch

    from trainer import distributed
    from trainer.bench import orthogonal as bench

    torch.set_num_threads(1)
    ranks = distributed.start()
    try:
        rows = bench.forming(10 * arguments.repetitions)
        rows |= bench.training(ranks, arguments.overrides, arguments.repetitions)
    finally:
        distributed.stop()
    table = Table(title="ratios: median (quartiles), one thread")
    for heading in ("", "ms", "by the clock", "by processor time", "wanted"):
        table.add_column(heading)
    for name, row in rows.items():
        shown = [f"{v['median']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for v in (row["clock"], row["processor"])]
        table.add_row(name, " / ".join(f"{x:.1f}" for x in row["milliseconds"]), *shown, row["wanted"])
    console = _wide()
    console.print(table)
    count, drifts = bench.DRIFT_STEPS, {}
    for name, what in bench.DRIFTED.items():
        drifts[name] = far, off = bench.drift(*what, count)
        steps = f"{count:,} RMSprop steps"
        console.print(
            f"{name} after {steps}: entries moved by up to {far:.2f}, |W^T W - I| = {off:.1e}", highlight=False
        )
    return {"rows": rows, "drifts": drifts}


def scaling(arguments: Namespace) -> dict[str, Any]:
    """One process, several, and copies that exchange nothing; and what the model of communication foresees."""
    from trainer import recipe
    from trainer.bench import scaling as bench

    console = Console()
    what = (arguments.config, arguments.overrides, arguments.world_size, arguments.repetitions, arguments.steps)
    result = bench.measure(*what, lambda line: console.print(line, highlight=False))
    model = recipe.load(arguments.config, arguments.overrides).build_model()
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["forecast"] = bench.forecast(result["parameters"])

    def shown(value: dict[str, float], digits: int = 2) -> str:
        return "{median:.{d}f} ({low:.{d}f}-{high:.{d}f})".format(**value, d=digits)

    table = Table(title=f"audio-hours a second of {arguments.config}, one thread a process: median (quartiles)")
    for heading in ("", "", "wanted of two"):
        table.add_column(heading)
    for name, speed in result["audio_hours_per_second"].items():
        table.add_row(name, shown(speed, 4), "")
    table.add_row("together over one", shown(result["over_one"]), f">= {bench.OVER_ONE}")
    table.add_row("together over copies", shown(result["over_copies"]), f">= {bench.OVER_COPIES}")
    console.print(table)
    table = Table(title=f"foreseen for {result['parameters']:,} parameters on hosts of eight devices (docs/scaling.md)")
    for heading in ("devices", "exchange, ms", "step alone, ms", "nothing hidden", "hidden behind backward"):
        table.add_column(heading, justify="right")
    for row in result["forecast"]:
        shares = [f"{100 * row[name]:.1f} %" for name in ("nothing_hidden", "hidden")]
        milliseconds = (f"{row['exchange_milliseconds']:.2f}", f"{row['step_milliseconds']:.0f}")
        table.add_row(str(row["devices"]), *milliseconds, *shares)
    console.print(table)
    return result


def language(arguments: Namespace) -> dict[str, Any]:
    import torch

    from trainer import distributed
    from trainer.bench import language as bench

    ranks = distributed.start()
    what = (arguments.overrides, arguments.repetitions, arguments.steps, arguments.only)
    try:
        rows = bench.run(ranks, *what)
    finally:
        distributed.stop()
    table = Table(title=f"a training step, {torch.get_num_threads()} thread(s): ratios are medians (quartiles)")
    for heading in ("", "tokens/s", "torch's", "by the clock", "by processor time", "wanted"):
        table.add_column(heading)
    for name, row in rows.items():
        shown = [f"{v['median']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for v in (row["clock"], row["processor"])]
        table.add_row(name, *(f"{x:,.0f}" for x in row["tokens_per_second"]), *shown, row["wanted"])
    _wide().print(table)
    return {"rows": rows, "threads": torch.get_num_threads()}


def plan(arguments: Namespace) -> dict[str, Any]:
    """The planning of large corpora, and how well and how randomly an epoch is packed."""
    from trainer.bench import plan as bench
    from trainer.data.buckets import BucketedConfig

    try:
        sizes = [int(size) for size in arguments.sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"--sizes {arguments.sizes}: wanted numbers of utterances, e.g. 100000,1000000")
    rows = bench.measure(
        arguments.config,
        arguments.overrides,
        sizes,
        arguments.per_shard,
        arguments.world_size,
        arguments.repetitions,
        arguments.folder,
    )
    console = _wide()
    table = Table(
        title=f"One host, {rows[0]['processes']} processes: seconds (and of all ranks' CPU), bytes an utterance"
    )
    headings = (
        "utterances",
        "shards",
        "merge, once",
        "plan ready",
        "opened again",
        "first batch, worst",
        "memory",
        "files",
    )
    for name in headings:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row['utterances']:,}",
            f"{row['shards']:,}",
            f"{row['merge_seconds']:.1f} ({row['merge_cpu_seconds']:.1f})",
            f"{row['open_and_plan_seconds']:.2f} ({row['open_and_plan_cpu_seconds']:.2f})",
            f"{row['reopen_seconds']:.2f}",
            f"{row['first_batch_seconds']['worst']:.2f}",
            f"{row['bytes_an_utterance']:.0f}, merging {row['merge_bytes_an_utterance']:.0f}",
            f"{sum(row['file_bytes_an_utterance'].values()):.0f}",
        )
    console.print(table)
    orders = []
    table = Table(title=f"LibriSpeech-like durations, {LIBRISPEECH_UTTERANCES:,} utterances")
    for name in (
        "micro-batches a step",
        "padding %",
        "balance of ranks %",
        "mean displacement (random: 0.333)",
        "bits of the bucket, given the last",
    ):
        table.add_column(name, justify="right")
    for size in (2, 16, 64):
        config = BucketedConfig(micro_batches_per_step=size)
        order = bench.disorder(bench.librispeech_plan(config, LIBRISPEECH_UTTERANCES, arguments.per_shard))
        orders.append({"micro_batches_per_step": size, **order})
        table.add_row(
            str(size),
            f"{order['padding_percent']:.2f}",
            f"{order['balance_percent']:.1f}",
            f"{order['displacement']:.3f}, between epochs {order['displacement_between_epochs']:.3f}",
            f"{order['bucket_bits']:.2f}, {order['bucket_bits_given_the_last']:.2f}",
        )
    console.print(table)
    return {"config": arguments.config, "rows": rows, "orders": orders}


LIBRISPEECH_UTTERANCES = 281_241
"""Of its three training sets."""


def memory(arguments: Namespace) -> dict[str, Any]:
    """Resident size of a training pass by depth and batch."""
    from trainer.bench import memory as bench

    console = Console()
    rows = bench.measure(arguments.config, arguments.overrides, lambda line: print(line, file=sys.stderr, flush=True))
    table = Table(title=f"{arguments.config}: a pass over clips of {bench.SECONDS:g} s, MiB of resident size")
    for heading in ("layers", "batch", "weights", "gradients", "activations", "a layer and clip", "computed again"):
        table.add_column(heading, justify="right")
    for row in rows:
        mebibytes = row["activation_bytes"] / 2**20
        table.add_row(
            str(row["layers"]),
            str(row["batch"]),
            f"{row['parameters']:,}",
            f"{row['gradient_bytes'] / 2**20:.0f}",
            f"{mebibytes:,.0f}",
            f"{mebibytes / row['layers'] / row['batch']:.3f}",
            "yes" if row["recompute"] else "no",
        )
    console.print(table)
    return {"config": arguments.config, "seconds": bench.SECONDS, "rows": rows}


def utilization(arguments: Namespace) -> dict[str, Any]:
    """What a step needs by kind, and the share of what the device could have done meanwhile."""
    from trainer import distributed
    from trainer.bench import utilization as bench

    ranks = distributed.start()
    try:
        result = bench.measure(arguments.config, arguments.overrides, ranks, arguments.repetitions)
    finally:
        distributed.stop()
    total = sum(result["flops"].values())
    table = Table(title=f"{arguments.config}: a training step of one process")
    for heading in ("", "GFLOP, forward and backward", "share"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, flops in sorted(result["flops"].items(), key=lambda item: -item[1]):
        table.add_row(name, f"{flops / 1e9:,.2f}", f"{flops / total:.1%}")
    table.add_row("together", f"{total / 1e9:,.2f}", "100.0%")
    console = Console()
    console.print(table)
    console.print(
        f"{1000 * result['step_seconds']:.0f} ms a step (median of {arguments.repetitions}): "
        f"{total / result['step_seconds'] / 1e9:,.0f} of {result['peak'] / 1e9:,.0f} GFLOP/s that a product of large "
        f"matrices reaches: model FLOPs utilisation {result['utilization']:.1%}",
        highlight=False,
    )
    return {"config": arguments.config, **result}


def pseudospectrum(arguments: Namespace) -> dict[str, Any]:
    """How long the analysis of a large recurrence takes, and how exact it is."""
    from trainer.bench import pseudospectrum as bench

    rows = bench.measure(bench.SIZE, bench.POINTS, lambda line: print(line, file=sys.stderr, flush=True))
    threads = os.environ.get("OMP_NUM_THREADS", "all")
    table = Table(title=f"{bench.SIZE} units on {bench.POINTS} x {bench.POINTS} points, OMP_NUM_THREADS: {threads}")
    headings = ("", "tolerance", f"seconds (wanted {bench.SECONDS:g})", "of the processor", "largest relative error")
    for heading in headings:
        table.add_column(heading)
    for row in rows:
        table.add_row(
            row["matrix"],
            f"{row['tolerance']:g}, {row['kind']}",
            f"{row['seconds']:.1f}" + ("  MISSED" if row["seconds"] > bench.SECONDS else ""),
            f"{row['cpu_seconds']:.1f}",
            f"{row['error']:.1e} of {row['checked']}" + ("  MISSED" if row["error"] > row["tolerance"] else ""),
        )
    _wide().print(table)
    return {"size": bench.SIZE, "points": bench.POINTS, "threads": threads, "rows": rows}


def batch_size(arguments: Namespace) -> dict[str, Any]:
    """The largest safe budget of a micro-batch."""
    from trainer.bench import batch_size as bench

    console = Console()

    def show(trial: bench.Trial) -> None:
        verdict = f"{trial.peak_bytes / 2**30:.2f} GiB, {trial.worst}" if trial.fits else "does not fit"
        if trial.timed_out:
            verdict = f"not done within {bench.START_SECONDS:g} s, given up"
        speed = f"; {3600 * trial.hours_per_second:.0f} x real time" if trial.fits else ""
        console.print(f"{trial.budget_seconds:8.1f} s: {verdict}{speed}", highlight=False)

    limit = int(arguments.gib * 2**30) if arguments.gib else None
    result = bench.largest(arguments.config, arguments.overrides, limit, SAFE_SHARE, show)
    fitting = [t for t in result["trials"] if t["fits"]]
    fastest = max(fitting, key=lambda t: float(t["hours_per_second"]))
    console.print(
        f"largest that fits {result['limit_bytes'] / 2**30:.2f} GiB on {result['device']}: "
        f"plan.micro_batch_seconds={result['micro_batch_seconds']:.0f}; fastest: {fastest['budget_seconds']:.0f}",
        highlight=False,
    )
    if fitting[-1]["whole_epoch"]:
        console.print("one micro-batch then holds the whole epoch", highlight=False)
    return result


SAFE_SHARE = 0.8
"""Of the free memory: the rest is for other processes, fragments and longer labels."""


def kernels(arguments: Namespace) -> dict[str, Any]:
    import torch

    import kernels
    from kernels import bench
    from trainer.bench import layers

    if kernels.unsupported(torch.empty(0), "lstm") is not None:
        raise UserError(f"bench kernels: the CPU runs {kernels.explain(torch.empty(0))}")
    console = _wide()
    try:
        say = partial(print, file=sys.stderr, flush=True)
        result = bench.run(arguments.seconds, arguments.only, say, layers.benches())
    except ValueError as error:
        raise UserError(f"--only {arguments.only}: {error}") from error
    table = Table(title=f"forward / forward + backward, medians; floor {result['peak_gflops']:.0f} GFLOP/s a core")
    for heading in ("", "ms", "of the floor", "against", "ratio (quartiles)", "wanted"):
        table.add_column(heading)
    for line in result["lines"]:
        for row in _rows(line):
            table.add_row(*row)
        table.add_section()
    console.print(table)
    if arguments.picture:
        from trainer.plots import ratios

        ratios(result["lines"], arguments.picture)
    return result


def _rows(line: dict[str, Any]) -> list[list[str]]:
    """One line of the table: a row for each rival, and what is wanted of it."""
    both = (line["forward"], line["both"])
    others = [name for name in line["forward"] if name not in ("milliseconds", "floor")]

    def pair(name: str, factor: float = 1.0, digits: int = 2) -> str:
        return " / ".join(f"{factor * d[name]['median']:.{digits}f}" for d in both if name in d)

    def spread(name: str) -> str:
        return " / ".join(
            f"{d[name]['median']:.2f} ({d[name]['low']:.2f}-{d[name]['high']:.2f})" for d in both if name in d
        )

    def wanted(name: str) -> str:
        goals = line["wanted"].get(name)
        if goals is None:
            return ""
        less = line.get("less is better", False)
        met = [
            (d[name]["median"] <= g) if less else (d[name]["median"] >= g)
            for d, g in zip(both, goals, strict=True)
            if g
        ]
        return " / ".join(f"{g:g}" for g in goals if g) + ("" if all(met) else "  MISSED")

    floor = pair("floor", 100, 0) + " %" if "floor" in both[0] else ""
    first = [line["name"], pair("milliseconds"), floor + (f" (wanted {wanted('floor')})" if wanted("floor") else "")]
    rows = [["", "", "", name, spread(name), wanted(name)] for name in others] or [[""] * 6]
    rows[0][:3] = first
    return rows
