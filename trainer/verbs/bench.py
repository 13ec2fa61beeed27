"""Our speed beside what a user would write instead, as ratios of one interleaved run.

    ./launch.sh bench step speech/read_ru        the engine's step against a bare PyTorch loop
    ./launch.sh bench loader speech/read_ru      the loader against webdataset, files and lhotse (where it is installed)
    ./launch.sh bench kernels                    every kernel, and LSTM layers, against torch, a loop, and its own floor
    ./launch.sh bench orthogonal                 cost of an orthogonal matrix; copying against torch's parts, one thread
    ./launch.sh bench language                   tokens a second of language models against torch's parts
    ./launch.sh bench plan speech/read_ru        time and memory of index and plan of large synthetic corpora, padding
    ./launch.sh bench memory speech/read_ru_deep resident size of a training pass by depth and batch
    ./launch.sh bench utilization speech/read_ru model FLOPs utilisation of a training step
    ./launch.sh bench pseudospectrum             seconds and error of 512 units on 200 x 200 points
    ./launch.sh bench batch-size speech/read_ru  the largest safe plan.micro_batch_seconds on this device

The rivals stand in trainer/bench.py, bench_loader.py, bench_orthogonal.py, bench_language.py and bench_layers.py, and
in kernels/bench.py. Lines of blocks are measured against FlashRNN too, where `pip install flashrnn packaging einops`
was done. Close other programs first; the spread (quartiles) tells whether it was quiet. A corpus of `bench plan` with
10 million utterances takes 4 GB under --folder (or TMPDIR).
"""

import argparse
import json
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

from trainer.verbs import add_overrides, refuse_unwritable


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "what",
        choices=[
            "step",
            "loader",
            "kernels",
            "orthogonal",
            "language",
            "plan",
            "memory",
            "utilization",
            "batch-size",
            "scaling",
            "pseudospectrum",
        ],
    )
    parser.add_argument("config", metavar="CONFIG", nargs="?", default="speech/read_ru")
    add_overrides(parser)
    parser.add_argument("--repetitions", type=int, default=7, help="of every way of a thing (default 7)")
    parser.add_argument("--steps", type=int, default=8, help="of step, language, scaling: optimizer steps (default 8)")
    parser.add_argument("--hours", type=float, default=1.0, help="of sound for loader (default 1)")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each line of kernels (default 2)")
    parser.add_argument("--only", default="", help="lines of kernels or language with this text in their names")
    parser.add_argument("--sizes", default="100000,1000000", help="utterances of the corpora of plan, e.g. 10000000")
    parser.add_argument("--per-shard", type=int, default=500, help="utterances in a shard of plan (default 500)")
    parser.add_argument("--world-size", type=int, default=2, help="processes of plan, scaling (default 2)")
    parser.add_argument("--folder", type=Path, help="where plan makes its corpora, and deletes them again")
    parser.add_argument("--gib", type=float, help="memory that batch-size may take (default: 80 %% of what is free)")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    parser.add_argument("--picture", type=Path, help="draw the ratios of kernels or loader there (PNG)")


def main(arguments: argparse.Namespace) -> int:
    from trainer import machine
    from trainer.errors import UserError

    for name in ("repetitions", "steps", "seconds", "hours", "per_shard", "world_size", "gib"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: wanted more than 0")
    refuse_unwritable(arguments, "json", "picture")
    others = {
        "kernels": _kernels,
        "orthogonal": _orthogonal,
        "language": _language,
        "plan": _plan,
        "memory": _memory,
        "utilization": _utilization,
        "batch-size": _batch_size,
        "scaling": _scaling,
        "pseudospectrum": _pseudospectrum,
    }
    run = others.get(arguments.what, _training)
    result = run(arguments)
    result["machine"] = machine.describe()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0


def _training(arguments: argparse.Namespace) -> dict[str, Any]:
    from rich.console import Console
    from rich.table import Table

    from trainer import bench, bench_loader, distributed

    ranks = distributed.start()
    what = (arguments.config, arguments.overrides, ranks, arguments.repetitions)
    try:
        if arguments.what == "step":
            result = bench.bench_step(*what, arguments.steps)
        else:
            result = bench_loader.bench_loader(*what, arguments.hours)
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
    from rich.table import Table

    table = Table(title="times as fast: ours (two workers in the last line) against each")
    for heading in ("", "against", "by the clock", "by processor time", "wanted"):
        table.add_column(heading)
    for line in lines:
        shown = [f"{v['median']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for v in (line["clock"], line["processor"])]
        missed = line["wanted"] and line[line["judged_by"]]["median"] < line["wanted"]
        wanted = f"{line['wanted']:g}" if line["wanted"] else ""
        table.add_row(line["contest"], line["rival"], *shown, wanted + ("  MISSED" if missed else ""))
    return table


def _orthogonal(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from rich.table import Table

    from trainer import bench_orthogonal, distributed

    torch.set_num_threads(1)
    ranks = distributed.start()
    try:
        rows = bench_orthogonal.forming(10 * arguments.repetitions)
        rows |= bench_orthogonal.training(ranks, arguments.overrides, arguments.repetitions)
    finally:
        distributed.stop()
    table = Table(title="ratios: median (quartiles), one thread")
    for heading in ("", "ms", "by the clock", "by processor time", "wanted"):
        table.add_column(heading)
    for name, row in rows.items():
        shown = [f"{v['median']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for v in (row["clock"], row["processor"])]
        table.add_row(name, " / ".join(f"{x:.1f}" for x in row["milliseconds"]), *shown, row["wanted"])
    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(table)
    count, drifts = bench_orthogonal.DRIFT_STEPS, {}
    for name, what in bench_orthogonal.DRIFTED.items():
        drifts[name] = far, off = bench_orthogonal.drift(*what, count)
        steps = f"{count:,} RMSprop steps"
        console.print(
            f"{name} after {steps}: entries moved by up to {far:.2f}, |W^T W - I| = {off:.1e}", highlight=False
        )
    return {"rows": rows, "drifts": drifts}


def _scaling(arguments: argparse.Namespace) -> dict[str, Any]:
    """One process, several, and copies that exchange nothing; and what the model of communication foresees."""
    from rich.console import Console
    from rich.table import Table

    from trainer import bench_scaling, recipe

    console = Console()
    what = (arguments.config, arguments.overrides, arguments.world_size, arguments.repetitions, arguments.steps)
    result = bench_scaling.measure(*what, lambda line: console.print(line, highlight=False))
    model = recipe.load(arguments.config, arguments.overrides).build_model()
    result["parameters"] = sum(p.numel() for p in model.parameters())
    result["forecast"] = bench_scaling.forecast(result["parameters"])

    def shown(value: dict[str, float], digits: int = 2) -> str:
        return "{median:.{d}f} ({low:.{d}f}-{high:.{d}f})".format(**value, d=digits)

    table = Table(title=f"audio-hours a second of {arguments.config}, one thread a process: median (quartiles)")
    for heading in ("", "", "wanted of two"):
        table.add_column(heading)
    for name, speed in result["audio_hours_per_second"].items():
        table.add_row(name, shown(speed, 4), "")
    table.add_row("together over one", shown(result["over_one"]), f">= {bench_scaling.OVER_ONE}")
    table.add_row("together over copies", shown(result["over_copies"]), f">= {bench_scaling.OVER_COPIES}")
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


def _language(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from rich.table import Table

    from trainer import bench_language, distributed

    ranks = distributed.start()
    what = (arguments.overrides, arguments.repetitions, arguments.steps, arguments.only)
    try:
        rows = bench_language.run(ranks, *what)
    finally:
        distributed.stop()
    table = Table(title=f"a training step, {torch.get_num_threads()} thread(s): ratios are medians (quartiles)")
    for heading in ("", "tokens/s", "torch's", "by the clock", "by processor time", "wanted"):
        table.add_column(heading)
    for name, row in rows.items():
        shown = [f"{v['median']:.2f} ({v['low']:.2f}-{v['high']:.2f})" for v in (row["clock"], row["processor"])]
        table.add_row(name, *(f"{x:,.0f}" for x in row["tokens_per_second"]), *shown, row["wanted"])
    Console(width=150 if not sys.stdout.isatty() else None).print(table)
    return {"rows": rows, "threads": torch.get_num_threads()}


def _plan(arguments: argparse.Namespace) -> dict[str, Any]:
    """The planning of large corpora, and how well and how randomly an epoch is packed."""
    from rich.console import Console
    from rich.table import Table

    from trainer import bench_plan
    from trainer.data.buckets import BucketedConfig
    from trainer.errors import UserError

    try:
        sizes = [int(size) for size in arguments.sizes.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1:
        raise UserError(f"--sizes {arguments.sizes}: wanted numbers of utterances, e.g. 100000,1000000")
    rows = bench_plan.measure(
        arguments.config,
        arguments.overrides,
        sizes,
        arguments.per_shard,
        arguments.world_size,
        arguments.repetitions,
        arguments.folder,
    )
    console = Console(width=150 if not sys.stdout.isatty() else None)
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
        order = bench_plan.disorder(bench_plan.librispeech_plan(config, LIBRISPEECH_UTTERANCES, arguments.per_shard))
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


def _memory(arguments: argparse.Namespace) -> dict[str, Any]:
    """Resident size of a training pass by depth and batch."""
    from rich.console import Console
    from rich.table import Table

    from trainer import bench_memory

    console = Console()
    rows = bench_memory.measure(
        arguments.config, arguments.overrides, lambda line: print(line, file=sys.stderr, flush=True)
    )
    table = Table(title=f"{arguments.config}: a pass over clips of {bench_memory.SECONDS:g} s, MiB of resident size")
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
    return {"config": arguments.config, "seconds": bench_memory.SECONDS, "rows": rows}


def _utilization(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a step needs by kind, and the share of what the device could have done meanwhile."""
    from rich.console import Console
    from rich.table import Table

    from trainer import bench_utilization, distributed

    ranks = distributed.start()
    try:
        result = bench_utilization.measure(arguments.config, arguments.overrides, ranks, arguments.repetitions)
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


def _pseudospectrum(arguments: argparse.Namespace) -> dict[str, Any]:
    """How long the analysis of a large recurrence takes, and how exact it is."""
    from rich.console import Console
    from rich.table import Table

    from trainer import bench_pseudospectrum as bench

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
    Console(width=150 if not sys.stdout.isatty() else None).print(table)
    return {"size": bench.SIZE, "points": bench.POINTS, "threads": threads, "rows": rows}


def _batch_size(arguments: argparse.Namespace) -> dict[str, Any]:
    """The largest safe budget of a micro-batch."""
    from rich.console import Console

    from trainer import batch_size

    console = Console()

    def show(trial: batch_size.Trial) -> None:
        verdict = f"{trial.peak_bytes / 2**30:.2f} GiB, {trial.worst}" if trial.fits else "does not fit"
        if trial.timed_out:
            verdict = f"not done within {batch_size.START_SECONDS:g} s, given up"
        speed = f"; {3600 * trial.hours_per_second:.0f} x real time" if trial.fits else ""
        console.print(f"{trial.budget_seconds:8.1f} s: {verdict}{speed}", highlight=False)

    limit = int(arguments.gib * 2**30) if arguments.gib else None
    result = batch_size.largest(arguments.config, arguments.overrides, limit, SAFE_SHARE, show)
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


def _kernels(arguments: argparse.Namespace) -> dict[str, Any]:
    import torch
    from rich.console import Console
    from rich.table import Table

    import kernels
    from kernels import bench
    from trainer import bench_layers
    from trainer.errors import UserError

    if kernels.unsupported(torch.empty(0), "lstm") is not None:
        raise UserError(f"bench kernels: the CPU runs {kernels.explain(torch.empty(0))}")
    console = Console(width=150 if not sys.stdout.isatty() else None)
    try:
        say = partial(print, file=sys.stderr, flush=True)
        result = bench.run(arguments.seconds, arguments.only, say, bench_layers.benches())
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
