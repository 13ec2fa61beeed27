"""Faults on one host: started again from the last checkpoint, not in vain, and named where something hangs."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import faults
from tests.helpers import overrides
from trainer.config import PROJECT
from trainer.run import read_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PATIENCE = 120.0
SETTINGS = ["name=run", "max_steps=16", "checkpoint.every_steps=2", "validation.every_steps=50"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Started:
    """A run of two ranks, with a fault in it; `launcher` comes before `-m trainer`."""

    def __init__(self, corpus: Path, folder: Path, fault: str, *more: str, launcher: tuple[str, ...] = ()) -> None:
        self.run = folder / "run"
        self.mark = faults.put(folder / "fault", fault)
        arguments = ["speech/tones", *overrides(corpus, folder, *SETTINGS, *more)]
        self.process = subprocess.Popen(
            [sys.executable, *launcher, "-m", "trainer", "train", *arguments],
            cwd=PROJECT,
            env=os.environ | {"PYTHONPATH": f"{self.mark}:{PROJECT}", "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def steps(self) -> list[int]:
        return [row["step"] for row in read_lines(self.run / "metrics.jsonl") if row["kind"] == "train"]

    def reach(self, step: int) -> None:
        wait_for(lambda: (self.steps() or [0])[-1] >= step or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.stdout.read()[-3000:]

    def ended(self) -> tuple[int, str]:
        output = self.process.communicate(timeout=PATIENCE)[0]
        wait_for(lambda: not self.left())
        return self.process.returncode, output

    def left(self) -> list[int]:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                words, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            except OSError:
                continue
            if words and self.mark.encode() in variables and int(folder.name) != self.process.pid:
                found.append(int(folder.name))
        return found

    def rank(self, number: int) -> int:
        """Process of a rank."""
        variable = f"\0RANK={number}\0".encode()
        (pid,) = [p for p in self.left() if variable in Path(f"/proc/{p}/environ").read_bytes()]
        return pid


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[Callable[..., Started]]:
    runs: list[Started] = []

    def begin(*more: str, fault: str = "", launcher: tuple[str, ...] = ()) -> Started:
        runs.append(Started(corpus, tmp_path, fault, *more, launcher=launcher))
        return runs[-1]

    yield begin
    for run in runs:
        run.process.kill()
        run.process.wait()
        for pid in run.left():
            os.kill(pid, signal.SIGKILL)


def test_a_killed_rank_costs_a_new_start(start: Callable[..., Started]) -> None:
    run = start("nproc=2")
    run.reach(5)
    os.kill(run.rank(0), signal.SIGUSR2)
    os.kill(run.rank(1), signal.SIGKILL)
    run.reach(7)  # so that two processes do not write their stacks at once, line by line among each other's
    os.kill(run.process.pid, signal.SIGUSR2)
    code, output = run.ended()
    assert code == 0, output
    for where in ("supervise", "fit"):  # stacks of the command and of a rank, which go on
        assert re.search(rf'\.py", line \d+ in {where}$', output, re.MULTILINE), output
    assert re.search(r"launch: rank 1 was ended by SIGKILL in \w+ of step \d+", output), output
    assert "starts again in 1 s from the newest checkpoint (1 of 3)" in output
    assert "resumed at step " in output
    assert "Traceback" not in output  # of the rank that lost the other one
    assert run.steps() == list(range(1, 17))


def test_ranks_that_have_only_lost_each_other_have_failed(start: Callable[..., Started]) -> None:
    run = start("nproc=2", "launch.max_restarts=0", fault=faults.LOST)
    code, output = run.ended()
    assert code == 1, output
    assert "failed (RuntimeError: Connection closed by peer, says gloo)" in output


def test_an_error_that_comes_again_is_not_tried_for_ever(start: Callable[..., Started]) -> None:
    run = start("nproc=2", fault=faults.RAISE)
    code, output = run.ended()
    assert code == 1, output
    assert "launch: rank 1 failed (ValueError: a fault of the model, number " in output
    assert "the same error twice at step 6 (ValueError: a fault of the model, number #.#)" in output
    assert output.count("starts again") == 1


def test_a_mistake_that_one_rank_finds_ends_all(start: Callable[..., Started]) -> None:
    """Its exit code and message are those of the run, although the other rank fails too."""
    run = start("nproc=2", fault=faults.MISTAKE)
    code, output = run.ended()
    assert code == 2, output
    assert "a fault of the model, number" in output
    assert "starts again" not in output
    assert "Traceback" not in output


def test_what_hangs_is_named_and_ended(start: Callable[..., Started]) -> None:
    """A loader reads for ever: the sample, its shard and the line it hangs in are told, and the run goes on."""
    run = start("nproc=2", "num_workers=1", "launch.deadline_seconds=20", fault=faults.HANG)
    hung = Path(run.mark) / "happened"
    wait_for(lambda: hung.exists() or run.process.poll() is not None)
    victim = run.rank(1)
    wait_for(lambda: not Path(f"/proc/{victim}").exists())
    assert time.time() - hung.stat().st_mtime < 20
    code, output = run.ended()
    assert code == 0, output
    late = re.search(r"rank 1 is late: in data of step \d+ for [\d.]+ s; .* = 20; loader 0 reads (.*)", output)
    assert late, output
    assert re.fullmatch(r"sample \S+ of shard train/\S+\.tar", late[1])
    assert "rank 0 is late" not in output
    assert re.search(r'sitecustomize\.py", line \d+ in hang', output), "the stack of the loader"
    assert "launch: rank 1 failed (late in data)" in output
    assert run.steps() == list(range(1, 17))


def test_a_second_signal_ends_ranks_that_hear_nothing(start: Callable[..., Started]) -> None:
    run = start("nproc=2", "max_steps=10000")
    run.reach(3)
    os.kill(run.rank(1), signal.SIGSTOP)
    run.process.send_signal(signal.SIGTERM)
    with pytest.raises(subprocess.TimeoutExpired):  # the other one waits for it
        run.process.wait(2.5)
    run.process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    code, _ = run.ended()
    assert time.monotonic() - begin < 2
    assert code > 128


def test_under_torchrun(start: Callable[..., Started]) -> None:
    """It flattens exit codes, so a file says what happened; when it is killed, the ranks end too."""
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone")
    run = start("max_steps=10000", launcher=launcher)
    run.reach(3)
    run.process.send_signal(signal.SIGTERM)
    code, output = run.ended()
    assert code != 0
    assert "stopped by a signal at step " in output
    assert (run.run / "requeue").exists()

    before = run.steps()[-1]
    run = start("max_steps=10000", launcher=launcher)
    run.reach(before + 2)
    assert not (run.run / "requeue").exists()
    assert len(run.left()) >= 2
    run.process.kill()
    assert run.ended()[0] == -9
