"""Whether a killed run goes on exactly: the same training without faults, killed on as many processes, and killed and
moved between numbers of processes and workers.

All are real runs in processes of their own. A kill is SIGKILL to every process of a run at once, at a random moment
after a random step, so that it hits steps, validations and checkpoints that are being written alike.
"""

import contextlib
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from trainer import checkpoint
from trainer.config import show
from trainer.errors import UserError
from trainer.launch import PARENT
from trainer.run import CLOCKS, RunDirectory, read_ledger, read_lines

MOST_WORKERS = 4
POLL_SECONDS = 0.01


@dataclass(frozen=True)
class Start:
    """One start of a run: on what, and when it is killed."""

    processes: int
    workers: int
    kill_after: int | None
    """A step; None: it goes on to the end."""


@dataclass
class Comparison:
    """A killed run beside the one without faults."""

    name: str
    starts: list[Start]
    resumed: list[int] = field(default_factory=list)
    """Steps of the checkpoints it went on from."""
    moved: bool = False
    """Whether the number of processes changed: sums are then added in another order."""
    ledger: bool = False
    """Whether the same samples, augmented alike, were in the same steps."""
    differences: dict[str, float] = field(default_factory=dict)
    """Of `weights`, `optimizer` and `metrics`, relative; 0 where they are equal bit for bit."""

    def wrong(self, tolerance: float) -> list[str]:
        """What does not hold."""
        bound = tolerance if self.moved else 0.0
        return ([] if self.ledger else ["ledger"]) + [n for n, d in self.differences.items() if not d <= bound]


def schedule(seed: int, steps: int, kills: int, processes: Sequence[int]) -> list[Start]:
    """Starts of one run: killed after random steps, on the numbers of processes in turn, with 0 to 4 workers.

    Raises:
        UserError: there are more kills than steps between the first and the last.
    """
    if kills > steps - 2:
        raise UserError(f"--kills {kills}: more than --steps {steps} has room for; wanted at most {max(steps - 2, 0)}")
    chance = random.Random(f"{seed} {processes}")
    moments: list[int | None] = [*sorted(chance.sample(range(1, steps - 1), kills)), None]
    return [
        Start(count, chance.randint(0, MOST_WORKERS), moment)
        for count, moment in zip(islice(cycle(processes), kills + 1), moments, strict=True)
    ]


def verify(
    config: str,
    overrides: Sequence[str],
    folder: Path,
    steps: int,
    kills: int,
    processes: Sequence[int],
    seed: int,
    say: Callable[[str], None],
) -> list[Comparison]:
    """Train without faults on the first number of processes, then as `schedule` says, and compare.

    Args:
        config, overrides: of the runs; their names, lengths and places are set here.
        folder: for the run directories, empty or absent.
        processes: numbers of processes that the second killed run goes through; the first stays at the first of them.
        say: told what is being done.

    Raises:
        UserError: a run ended by itself with an error, or could not be killed.
    """
    fixed = [
        *overrides,
        f"runs_dir={folder}",
        f"max_steps={steps}",
        f"checkpoint.every_steps={max(1, steps // 6)}",
        "checkpoint.keep_last=2",
        "tracking.wandb=disabled",
    ]
    runs = {
        "whole": [Start(processes[0], 1, None)],
        "killed": schedule(seed, steps, kills, processes[:1]),
        "killed and moved": schedule(seed, steps, kills, [*processes[1:], processes[0]]),
    }
    if len(processes) == 1:
        del runs["killed and moved"]
    chance = random.Random(seed)
    found = []
    for name, starts in runs.items():
        run = RunDirectory(folder / name.replace(" ", "-"))
        resumed = []
        for start in starts:
            resumed.append(max(checkpoint.steps_in(run.checkpoints), default=0))
            until = "to the end" if start.kill_after is None else f"to be killed after step {start.kill_after}"
            say(f"{name}: from step {resumed[-1]} on {start.processes} process(es), {start.workers} worker(s), {until}")
            _train(config, [*fixed, f"name={run.path.name}"], start, run, chance)
        if name == "whole":
            whole = run
        else:
            moved = len({s.processes for s in starts} | {processes[0]}) > 1
            found.append(Comparison(name, starts, resumed[1:], moved, *compare(run, whole)))
    return found


def _train(config: str, arguments: list[str], start: Start, run: RunDirectory, chance: random.Random) -> None:
    """One start, to its end or until it is killed.

    Raises:
        UserError: it ended with an error, or before it could be killed.
    """
    command = ["train", config, *arguments, f"num_workers={start.workers}", f"nproc={start.processes}"]
    run.path.parent.mkdir(parents=True, exist_ok=True)
    output, began = run.path.with_suffix(".log"), time.time_ns()
    with output.open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "trainer", *command],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | {PARENT: str(os.getpid())},
            start_new_session=True,
        )
    try:
        if start.kill_after is None:
            process.wait()
        else:
            seconds = 0.0
            while process.poll() is None and (reached := _last_step(run, began)) < start.kill_after:
                time.sleep(POLL_SECONDS)
                seconds = 0.0 if reached < 1 else seconds + POLL_SECONDS
            time.sleep(chance.uniform(0, min(1.0, seconds)))  # into a step, or whatever comes after it
    finally:
        running = _kill(process)
    if process.returncode and not running:
        told = "".join(output.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)[-15:])
        raise UserError(f"{show(output)}: a run ended with exit code {process.returncode}:\n{told}")
    if start.kill_after is not None and not running:
        raise UserError(f"{show(run.path)}: it ended before it could be killed; take more --steps, or fewer --kills")


def _last_step(run: RunDirectory, since: int) -> int:
    """The last step on record of a run that has been at work since some time (ns)."""
    try:
        if run.metrics.stat().st_mtime_ns < since:
            return 0  # what it will cut back
    except OSError:
        return 0
    return max((row["step"] for row in read_lines(run.metrics)), default=0)


def _kill(process: subprocess.Popen[bytes]) -> bool:
    """SIGKILL to all processes of a run at once; whether it was still running. None of them is left afterwards."""
    try:
        root = psutil.Process(process.pid)
        tree = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        tree = []
    running = process.poll() is None
    for one in tree:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()
    while any(map(_alive, tree)):
        time.sleep(POLL_SECONDS)
    return running


def _alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE  # nobody may be there to take note of its end
    except psutil.NoSuchProcess:
        return False


def compare(run: RunDirectory, whole: RunDirectory) -> tuple[bool, dict[str, float]]:
    """Whether the ledgers are equal, and how far the rest is apart."""
    ledger = read_ledger(run.ledger)
    a, b = checkpoint.newest(run.checkpoints), checkpoint.newest(whole.checkpoints)
    assert a is not None
    assert b is not None
    optimizer = b.slots()
    return bool(ledger) and ledger == read_ledger(whole.ledger), {
        "weights": _apart(a.weights(), b.weights()),
        "optimizer": max((_apart(a.tensors(s), b.tensors(s)) for s in optimizer), default=0.0)
        if a.slots() == optimizer
        else float("inf"),
        "metrics": _rows_apart(_numbers(run), _numbers(whole)),
    }


def _apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """Relative L2 distance of two sets of tensors; 0 only where they are equal bit for bit."""
    if a.keys() != b.keys():
        return float("inf")
    if all(torch.equal(a[name], b[name]) for name in b):
        return 0.0
    distance = sum(float((a[name].double() - b[name].double()).square().sum()) for name in b)
    size = sum(float(b[name].double().square().sum()) for name in b)
    return max(float((distance / size) ** 0.5) if size else float("inf"), sys.float_info.min)


def _numbers(run: RunDirectory) -> list[dict[str, Any]]:
    """Rows of a run's metrics without what a clock has measured, and without what nearly normal
    matrices have of departure: differences of nearly equal numbers, and the weights are compared themselves."""
    return [
        {k: v for k, v in row.items() if k not in CLOCKS and not k.startswith("nonnormality/")}
        for row in read_lines(run.metrics)
    ]


def _rows_apart(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """Largest relative difference of a number; infinite where other rows or keys are there."""
    if [row.keys() for row in a] != [row.keys() for row in b]:
        return float("inf")
    worst = 0.0
    for one, other in zip(a, b, strict=True):
        for name, value in other.items():
            if one[name] != value:
                numbers = isinstance(value, float) and isinstance(one[name], float)
                worst = max(worst, abs(one[name] - value) / max(abs(value), 1e-9) if numbers else float("inf"))
    return worst
