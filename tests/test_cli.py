"""Runs as users start them: killed in every way, they go on as if nothing had happened, and leave nothing behind."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import overrides
from trainer import checkpoint
from trainer.config import PROJECT
from trainer.run import CLOCKS, read_ledger, read_lines

pytestmark = [pytest.mark.distributed, pytest.mark.slow]
PATIENCE = 120.0


def start(verb: str, *arguments: str) -> subprocess.Popen[bytes]:
    """A command in a process group of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "trainer", verb, *arguments],
        cwd=PROJECT,
        start_new_session=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes] | None = None) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        if process is not None and process.poll() is not None:
            raise AssertionError(f"ended with {process.returncode}: {process.stdout.read().decode()[-3000:]}")
        assert time.monotonic() < deadline
        time.sleep(0.01)


def processes_with(text: str) -> list[int]:
    """Processes of this machine whose command line holds a text."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if text.encode() in words and state != "Z" and int(folder.name) != os.getpid():
            found.append(int(folder.name))
    return found


def last_step(run: Path) -> int:
    return max((row["step"] for row in read_lines(run / "metrics.jsonl")), default=0)


def weights(run: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.newest(run / "checkpoints")
    assert found is not None
    return found.tensors("weight") | {f"{k} average": v for k, v in found.tensors("average").items()}


def numbers(run: Path) -> list[dict[str, Any]]:
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_lines(run / "metrics.jsonl")]


def arguments(corpus: Path, runs: Path, name: str) -> list[str]:
    more = [
        "plan.micro_batch_seconds=6",
        "plan.micro_batches_per_step=2",
        "max_epochs=12",
        "validation.every_steps=30",
        "checkpoint.every_steps=7",
        "num_workers=1",
        "nproc=2",
        "launch.max_restarts=0",
        "tracking.wandb=offline",
        "validation.table_rows=2",
    ]
    return ["speech/tones", *overrides(corpus, runs, f"name={name}", *more)]


def test_a_run_survives_every_way_of_being_ended(corpus: Path, tmp_path: Path) -> None:
    """kill -9 of everything, of the spawner, of one rank, and SIGTERM: the same ledger, numbers and weights."""
    whole = start("train", *arguments(corpus, tmp_path, "whole"))
    output = whole.communicate(timeout=PATIENCE)[0].decode()
    assert whole.returncode == 0, output

    run = tmp_path / "broken"
    chance = random.Random(os.getpid())

    def group(process: subprocess.Popen[bytes]) -> int:
        ranks = processes_with("name=broken")
        for pid in ranks:
            os.kill(pid, signal.SIGKILL)
        return -9

    def spawner(process: subprocess.Popen[bytes]) -> int:
        process.kill()
        return -9

    def one_rank(process: subprocess.Popen[bytes]) -> int:
        ranks = [pid for pid in processes_with("name=broken") if pid != process.pid]
        os.kill(max(ranks, key=lambda pid: int(Path(f"/proc/{pid}/stat").read_text().split()[21])), signal.SIGKILL)
        return 128 + 9

    def terminate(process: subprocess.Popen[bytes]) -> int:
        process.send_signal(signal.SIGTERM)
        return 75

    for fault in (group, spawner, one_rank, terminate):
        process = start("train", *arguments(corpus, tmp_path, "broken"))
        goal = last_step(run) + chance.randint(1, 12)
        wait_for(lambda goal=goal: last_step(run) >= goal, process)
        code = fault(process)
        output = process.communicate(timeout=PATIENCE)[0].decode()
        assert process.returncode in (code, -9 if fault is group else code, 1 if fault is one_rank else code), output
        wait_for(lambda: not processes_with("name=broken"))
    process = start("train", *arguments(corpus, tmp_path, "broken"))
    output = process.communicate(timeout=PATIENCE)[0].decode()
    assert process.returncode == 0, output
    assert "resumed at step" in output

    assert read_ledger(run / "ledger") == read_ledger(tmp_path / "whole" / "ledger")
    assert numbers(run) == numbers(tmp_path / "whole")
    assert [r["step"] for r in numbers(run) if r["kind"] == "train"] == list(range(1, last_step(run) + 1))
    wanted = weights(tmp_path / "whole")
    for name, value in weights(run).items():
        assert torch.equal(value, wanted[name]), name
    check_wandb(run)


def check_wandb(run: Path) -> None:
    """What Weights & Biases holds of a run that was started five times: one id, equal points where they double."""
    parts = sorted((run / "wandb").glob("offline-run-*"))
    assert len(parts) == 5
    points: dict[int, tuple[float, float, float]] = {}
    doubled, tables = 0, 0
    for part in parts:
        done = subprocess.run(
            [Path(sys.executable).with_name("wandb"), "leet", "inspect", "--json", str(part)],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
        )
        assert done.returncode == 0, done.stderr
        for line in done.stdout.splitlines():
            record = json.loads(line)
            if record["type"] != "history":
                continue
            values = record["history"]["item"]
            tables += "valid/table._type" in values
            if "train/loss" in values:
                point = (values["train/loss"], values["train/lr"], values["train/grad_norm"])
                doubled += values["trainer/step"] in points
                assert points.setdefault(values["trainer/step"], point) == point
                assert values["train/audio_hours_per_second"] > 0
    assert len({part.name.rpartition("-")[2] for part in parts}) == 1
    assert tables >= 1
    assert sorted(points) == list(range(1, last_step(run) + 1))
    assert doubled < last_step(run)
    staged = (run / "wandb" / "data" / "artifacts" / "staging").iterdir()
    assert any(path.read_bytes()[:4] == b"RIFF" for path in staged), "the sound lies inside the run directory"


def test_a_mistake_that_every_rank_finds_is_told_once(corpus: Path, tmp_path: Path) -> None:
    more = overrides(corpus, tmp_path, "nproc=2", "model.rnn.cel=gru", "data.path=nowhere")
    done = start("train", "speech/tones", *more)
    output = done.communicate(timeout=PATIENCE)[0].decode()
    assert done.returncode == 2, output
    assert output.count("model.rnn.cel: unknown key; did you mean model.rnn.cell?") == 1, output
    assert "Traceback" not in output


def test_two_hosts_started_by_hand_train_together(corpus: Path, tmp_path: Path) -> None:
    """The same command with --node 0 and --node 1 (both on this machine) equals two processes of one host."""
    (tmp_path / "hosts").write_text("127.0.0.1 slots=1\n127.0.0.2 slots=1  # the second\n")
    more = ["speech/tones", *overrides(corpus, tmp_path, "max_steps=3", "validation.every_steps=9")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MASTER_PORT": str(20000 + os.getpid() % 20000)}
    command = [sys.executable, "-m", "trainer", "train", *more, "name=by-hand", "--hosts", str(tmp_path / "hosts")]
    nodes = [
        subprocess.Popen([*command, "--node", str(k)], cwd=PROJECT, env=environment, stderr=subprocess.PIPE)
        for k in (0, 1)
    ]
    for node in nodes:
        output = node.communicate(timeout=PATIENCE)[1].decode()
        assert node.returncode == 0, output
    done = start("train", *more, "name=one", "nproc=2")
    output = done.communicate(timeout=PATIENCE)[0].decode()
    assert done.returncode == 0, output
    assert read_ledger(tmp_path / "by-hand" / "ledger") == read_ledger(tmp_path / "one" / "ledger")
    assert numbers(tmp_path / "by-hand") == numbers(tmp_path / "one")


def test_a_process_ends_with_its_own_code_whatever_is_left(tmp_path: Path) -> None:
    """What is to be done at exit is done; a C++ library that aborts when it is taken down is not asked to."""
    code = (
        "import atexit, ctypes\n"
        "libc = ctypes.CDLL(None)\n"
        "libc.__cxa_atexit(ctypes.cast(libc.abort, ctypes.c_void_p), None, None)\n"
        f"atexit.register(open({str(tmp_path / 'done')!r}, 'w').write, 'x')\n"
        "from trainer.__main__ import leave\n"
        "print('said')\n"
        "leave(75)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (75, "said\n"), done.stderr
    assert (tmp_path / "done").exists()
