"""How training scales: the same steps on one process and on several, beside copies that exchange nothing; and a model
of communication that says what to expect of more devices than are at hand.

The copies tell apart what the exchange costs from what sharing a machine costs: they compete for memory and cache as
the processes of one run do.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.bench.timing import describe
from trainer.config import show
from trainer.errors import UserError
from trainer.launch import PARENT
from trainer.run import RunDirectory, read_lines

WARM_UP_STEPS = 5
"""First steps of a run: memory is still being asked for."""
OVER_ONE, OVER_COPIES = 1.85, 0.93
"""For two processes on two cores: wanted audio-hours a second over one process, and over two copies."""


@dataclass(frozen=True)
class Cluster:
    """Devices in hosts, and what joins them.

    Attributes:
        per_host: devices of a host.
        inside, between: bytes a second that a device moves to its neighbour in its host, and in another, in practice.
        inside_delay, between_delay: seconds before the first byte is there.
    """

    per_host: int
    inside: float
    between: float
    inside_delay: float
    between_delay: float


EIGHT_A_HOST = Cluster(8, inside=200e9, between=40e9, inside_delay=5e-6, between_delay=15e-6)
"""Eight devices behind a switch, each with a 400 Gbit/s network port: assumed, at about half and 80 % of the nominal
rates, not measured."""


def all_reduce_seconds(size: float, devices: int, cluster: Cluster) -> float:
    """Time of a sum over all devices: scattered and gathered in each host, and as rings between the hosts, in which
    each device carries its own share.

    A ring of n passes 2 (n - 1) / n of its bytes through each device in 2 (n - 1) messages; so the bytes of a device
    stop growing with n and the messages do not.

    Args:
        size: bytes.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
    """
    inside = min(devices, cluster.per_host)
    hosts = -(-devices // cluster.per_host)
    return _ring(size, inside, cluster.inside, cluster.inside_delay) + _ring(
        size / inside, hosts, cluster.between, cluster.between_delay
    )


def _ring(size: float, count: int, bandwidth: float, delay: float) -> float:
    return 2 * (count - 1) * (size / count / bandwidth + delay)


def efficiency(compute: float, size: float, devices: int, cluster: Cluster, hidden: float) -> float:
    """Share of a device's speed alone that is left among many, each with as much work as alone.

    Args:
        compute: seconds of a step on one device.
        size: bytes of the gradients.
        hidden: share of `compute` behind which the exchange can hide, since gradients are sent while others are
            still computed.
    """
    return compute / (compute + max(0.0, all_reduce_seconds(size, devices, cluster) - hidden * compute))


def forecast(parameters: int) -> list[dict[str, float]]:
    """Efficiency on 8, 64 and 512 devices of `EIGHT_A_HOST`, for steps of some lengths, with nothing of the exchange
    hidden and with all of it behind the backward pass, about two thirds of a step; gradients of four bytes."""
    size = 4.0 * parameters
    return [
        {
            "devices": devices,
            "exchange_milliseconds": 1e3 * all_reduce_seconds(size, devices, EIGHT_A_HOST),
            "step_milliseconds": 1e3 * compute,
            "nothing_hidden": efficiency(compute, size, devices, EIGHT_A_HOST, 0.0),
            "hidden": efficiency(compute, size, devices, EIGHT_A_HOST, 2 / 3),
        }
        for devices in (8, 64, 512)
        for compute in (0.02, 0.1, 0.5)
    ]


def measure(
    config: str, overrides: Sequence[str], processes: int, repetitions: int, steps: int, say: Any
) -> dict[str, Any]:
    """Audio-hours a second of one process, of several, and of as many copies, of one thread each, in turn.

    Args:
        steps: counted ones of each run.
        say: told what is being done.

    Raises:
        UserError: a run ended with an error.
    """
    ways = {"one process": (1, 1), f"{processes} processes": (processes, 1), f"{processes} copies": (1, processes)}
    found: dict[str, list[float]] = {name: [] for name in ways}
    with tempfile.TemporaryDirectory(prefix="ostinato-scaling-") as folder:
        fixed = [
            "num_workers=0",
            f"plan.micro_batches_per_step={processes}",
            *overrides,
            f"runs_dir={folder}",
            f"max_steps={WARM_UP_STEPS + steps}",
            "validation.every_steps=1000000",
            "checkpoint.every_steps=1000000",
            "tracking.wandb=disabled",
        ]
        for repetition in range(repetitions):
            for name in list(ways)[:: 1 if repetition % 2 else -1]:
                say(f"{repetition + 1} of {repetitions}: {name}")
                found[name].append(_speed(config, fixed, Path(folder), *ways[name]))
    one, together, copies = found.values()
    return {
        "processes": processes,
        "audio_hours_per_second": {name: describe(speeds) for name, speeds in found.items()},
        "over_one": describe([a / b for a, b in zip(together, one, strict=True)]),
        "over_copies": describe([a / b for a, b in zip(together, copies, strict=True)]),
    }


def _speed(config: str, arguments: Sequence[str], folder: Path, processes: int, copies: int) -> float:
    """Of all copies together."""
    command = [sys.executable, "-m", "trainer", "train", config, *arguments, f"nproc={processes}"]
    environment = os.environ | {PARENT: str(os.getpid()), "OMP_NUM_THREADS": "1"}
    runs = [RunDirectory(Path(tempfile.mkdtemp(dir=folder))) for _ in range(copies)]
    logs = [run.path / "output.txt" for run in runs]
    started = []
    for run, log in zip(runs, logs, strict=True):
        with log.open("wb") as out:
            named = [*command, f"name={run.path.name}"]
            started.append(subprocess.Popen(named, stdout=out, stderr=out, env=environment))
    codes = [process.wait() for process in started]
    for log, code in zip(logs, codes, strict=True):
        if code:
            said = "".join(log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-15:])
            raise UserError(f"{show(log)}: a run ended with exit code {code}:\n{said}")
    return sum(_hours_a_second(run) for run in runs)


def _hours_a_second(run: RunDirectory) -> float:
    rows = [row for row in read_lines(run.metrics) if row.get("step", 0) >= WARM_UP_STEPS and "step_seconds" in row]
    hours = rows[-1]["audio_hours"] - rows[0]["audio_hours"]
    seconds: float = sum(row["step_seconds"] for row in rows[1:])
    return float(hours) / seconds
