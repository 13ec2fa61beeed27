"""Our speed beside what a user would write instead, as ratios of one interleaved run.

    ./launch.sh bench step speech/read_ru        the engine's step against a bare PyTorch loop
    ./launch.sh bench loader speech/read_ru      the loader against webdataset, files and lhotse (where it is installed)
    ./launch.sh bench kernels                    every kernel, and LSTM layers, against torch, a loop, and its own floor
    ./launch.sh bench orthogonal                 cost of an orthogonal matrix; copying against torch's parts, one thread
    ./launch.sh bench language                   tokens a second of language models against torch's parts
    ./launch.sh bench plan speech/read_ru        time and memory of index and plan of large synthetic corpora, padding
    ./launch.sh bench memory speech/read_ru_deep resident size of a training pass by depth and batch
    ./launch.sh bench utilization speech/read_ru model FLOPs utilisation of a training step
    ./launch.sh bench scaling speech/read_ru     one process, several, and copies that exchange nothing
    ./launch.sh bench pseudospectrum             seconds and error of 512 units on 200 x 200 points
    ./launch.sh bench batch-size speech/read_ru  the largest safe plan.micro_batch_seconds on this device

The rivals stand in trainer/bench/ and in kernels/bench.py. Lines of blocks are measured against FlashRNN too, where
`pip install flashrnn packaging einops` was done. Close other programs first; the spread (quartiles) tells whether it
was quiet. A corpus of `bench plan` with 10 million utterances takes 4 GB under --folder (or TMPDIR).
"""

import argparse
import json
from pathlib import Path

from trainer.verbs import add_overrides, refuse_unwritable

WHAT = (
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
)
"""Each a function of `trainer.bench.tables`."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=WHAT)
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
    from trainer.bench import tables
    from trainer.errors import UserError

    for name in ("repetitions", "steps", "seconds", "hours", "per_shard", "world_size", "gib"):
        if (value := getattr(arguments, name)) is not None and value <= 0:
            raise UserError(f"--{name.replace('_', '-')} {value}: wanted more than 0")
    refuse_unwritable(arguments, "json", "picture")
    result = getattr(tables, arguments.what.replace("-", "_"))(arguments)
    result["machine"] = machine.describe()
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return 0
