"""The door and the spawner: what launch.sh installs and starts, and what becomes of signals on the way."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers import overrides
from trainer import checkpoint
from trainer.config import PROJECT
from trainer.signals import STOP_SIGNALS, StopSignals

PATIENCE = 120.0

FAKE_PYTHON = """#!/bin/bash
# Stands for every Python of these tests. Says what it was asked, and makes environments in which it stands again.
echo "$PYTHONSAFEPATH $*" >>"{log}"
case "$*" in
"-m venv "*)
    mkdir -p "$3/bin" && cp "$0" "$3/bin/python"
    [[ -e "{root}/whole" ]] || {{ echo "ensurepip is not available" >&2; exit 1; }}
    touch "$3/pip" ;;
"-m ensurepip") [[ -e "{root}/whole" ]] && touch "$(dirname "$0")/../pip" ;;
"-m pip --version") [[ -e "$(dirname "$0")/../pip" ]] ;;
esac
"""


class Door:
    """A copy of the project with nothing but launch.sh in it, and Pythons that only write down what they should do."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "project"
        self.log = folder / "log"
        (self.root / "kernels" / "op").mkdir(parents=True)
        shutil.copy(PROJECT / "launch.sh", self.root)
        (self.root / "pyproject.toml").write_text("[project]\n")
        (self.root / "whole").touch()
        self.python = self.make(folder / "python")

    def make(self, path: Path) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(FAKE_PYTHON.format(log=self.log, root=self.root))
        path.chmod(0o755)
        return path

    def __call__(self, *arguments: str, active: Path | None = None) -> tuple[int, str, list[str]]:
        """Exit code, message, and what was asked of Python."""
        self.log.write_text("")
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(self.python)}
        if active is not None:
            environment["VIRTUAL_ENV"] = str(active)
        command = [str(self.root / "launch.sh"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        return done.returncode, done.stderr, self.log.read_text().splitlines()

    def installed(self, *arguments: str, active: Path | None = None) -> bool:
        """Whether a call installs; it must run the verb in any case."""
        code, message, asked = self(*arguments, active=active)
        assert code == 0, message
        assert asked[-1].startswith("1 -m "), asked
        return any("pip install" in line for line in asked)


@pytest.fixture
def door(tmp_path: Path) -> Door:
    return Door(tmp_path)


def test_it_installs_once_and_again_when_a_source_has_changed(door: Door) -> None:
    assert door.installed("plan")
    assert not door.installed("plan")
    assert door.installed("test")
    assert not door.installed("test")
    for name in ("pyproject.toml", "setup.py", "kernels/cpu.cpp", "kernels/op/cpu.cpp", "kernels/op/common.h"):
        (door.root / name).write_text(f"# {name}")
        assert door.installed("plan"), name
        assert not door.installed("plan"), name
        assert door.installed("test"), name
        assert not door.installed("plan"), name


def test_its_own_environment_may_be_active(door: Door) -> None:
    door("plan")
    own = door.root / ".venv"
    (own / "lib/python3.11/site-packages/ostinato-0.1.0.dist-info").mkdir(parents=True)
    assert not door.installed("plan", active=own)
    assert door.installed("test", active=own)
    (door.root / "pyproject.toml").write_text("# changed")
    assert door.installed("plan", active=own)


def test_an_environment_of_the_user_is_used_as_it_is(door: Door, tmp_path: Path) -> None:
    theirs, packages = tmp_path / "theirs", tmp_path / "theirs/lib/python3.11/site-packages"
    door.make(theirs / "bin/python")
    packages.mkdir(parents=True)
    assert door.installed("plan", active=theirs), "without ostinato it is not one to use"
    (packages / "ostinato-0.1.0.dist-info").mkdir()
    assert not door.installed("plan", active=theirs)
    code, message, asked = door("test", active=theirs)
    assert (code, asked) == (2, [])
    assert "has no pytest" in message
    assert f"pip install -e '{door.root}[dev]'" in message
    (packages / "pytest").mkdir()
    assert not door.installed("test", active=theirs)


def test_a_python_without_its_venv_module_can_be_mended(door: Door) -> None:
    (door.root / "whole").unlink()
    for _ in range(2):
        code, message, _ = door("plan")
        assert code == 2
        assert message.splitlines()[-1].endswith("install its venv module (Debian: python3-venv)")
    (door.root / "whole").touch()
    assert door.installed("plan")


def test_it_takes_little_time_of_its_own(door: Door) -> None:
    door("plan")
    start = time.monotonic()
    for _ in range(5):
        door("plan")
    assert (time.monotonic() - start) / 5 < 0.3


def test_sbatch_runs_a_copy_of_it_elsewhere(door: Door, tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    spool.mkdir()
    shutil.copy(door.root / "launch.sh", spool / "slurm_script")
    environment = {"PATH": os.environ["PATH"], "PYTHON": str(door.python), "SLURM_SUBMIT_DIR": str(door.root)}
    command = [str(spool / "slurm_script"), "train", "x"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
    assert door.log.read_text().splitlines()[-1] == "1 -m trainer train x"
    assert not (spool / ".venv").exists()
    environment["SLURM_SUBMIT_DIR"] = str(tmp_path)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2
    assert f"{tmp_path} is not the project's folder" in done.stderr


def test_what_comes_before_the_verb_belongs_to_it(door: Door) -> None:
    asked = door("--hosts", "my hosts", "--node", "1", "train", "x", "nproc=2")[2]
    assert asked[-1] == "1 -m trainer train x nproc=2 --hosts my hosts --node 1"
    code, message, asked = door("--hosts")
    assert (code, asked) == (2, [])
    assert message == "launch.sh: --hosts needs a value, as in: ./launch.sh --hosts FILE train CONFIG\n"


def test_without_a_verb_it_becomes_the_story(door: Door) -> None:
    door("plan")
    assert door()[2] == ["1 -m trainer story speech/read_ru nproc=2"]


@pytest.mark.skipif(sys.version_info < (3, 11), reason="PYTHONSAFEPATH is new in Python 3.11")
def test_a_file_of_the_user_is_not_taken_for_ours(tmp_path: Path) -> None:
    (tmp_path / "trainer.py").write_text("print('a file of the user ran')")
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix}
    command = [str(PROJECT / "launch.sh"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert "usage: ./launch.sh" in done.stdout


# --- signals -----------------------------------------------------------------------------------------------------


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.poll() is None, process.stdout.read().decode()[-3000:] if process.stdout else ""
        assert time.monotonic() < deadline
        time.sleep(0.01)


def children(pid: int) -> list[int]:
    """Processes that a process has started, and theirs."""
    found = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return found + [p for child in found for p in children(child)]


def test_a_signal_repeated_at_once_is_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[int] = []
    monkeypatch.setattr(os, "_exit", ended.append)
    now = [100.0]
    monkeypatch.setattr("trainer.signals.time.monotonic", lambda: now[0])
    before = {name: signal.getsignal(name) for name in STOP_SIGNALS}
    with StopSignals() as outer, outer as signals:
        for later in (0.0, 0.5, 1.9):
            now[0] = 100.0 + later
            signal.raise_signal(signal.SIGTERM)
        assert signals.received == signal.SIGTERM
        assert not ended
        now[0] = 102.5
        signal.raise_signal(signal.SIGUSR1)
        assert ended == [128 + signal.SIGUSR1]
    assert signal.getsignal(signal.SIGTERM) != before[signal.SIGTERM]
    for name in STOP_SIGNALS:
        signal.signal(name, before[name])


@pytest.mark.parametrize(("asked", "code"), [(True, 75), (False, -signal.SIGTERM)])
def test_a_request_heard_again_at_the_end_takes_no_exit_code(asked: bool, code: int) -> None:
    """A scheduler's signal reaches a rank from several sides, the last of them when it has saved and is leaving."""
    program = f"""
import signal, sys
from trainer.signals import STOP_SIGNALS, StopSignals
with StopSignals():
    if {asked}:
        signal.raise_signal(signal.SIGTERM)
signal.raise_signal(signal.SIGTERM)
sys.exit(75)
"""
    assert subprocess.run([sys.executable, "-c", program], cwd=PROJECT).returncode == code


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_while_the_ranks_start_saves_too(corpus: Path, tmp_path: Path) -> None:
    """Sent to the spawner and to the ranks at once, as a scheduler does."""
    run = tmp_path / "run"
    more = ["speech/tones", *overrides(corpus, tmp_path, "name=run", "max_epochs=500", "nproc=2")]
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "train", *more],
        cwd=PROJECT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        wait_for(lambda: len(children(process.pid)) == 2, process)
        for pid in [process.pid, *children(process.pid)]:
            os.kill(pid, signal.SIGUSR1)
        output = process.communicate(timeout=PATIENCE)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert checkpoint.newest(run / "checkpoints") is not None


@pytest.mark.slow
@pytest.mark.distributed
def test_a_signal_to_the_story_saves_the_run_and_ends_it(corpus: Path, tmp_path: Path) -> None:
    small = overrides(corpus, Path("runs"), "max_epochs=500", "nproc=2")
    environment = os.environ | {"PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", "story", "speech/tones", *small],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    metrics = tmp_path / "runs/speech-tones/metrics.jsonl"
    try:
        wait_for(lambda: metrics.is_file() and metrics.stat().st_size > 0, process)
        others = children(process.pid)
        assert len(others) >= 3
        process.send_signal(signal.SIGTERM)
        output = process.communicate(timeout=PATIENCE)[0].decode()
    finally:
        process.kill()
    assert process.returncode == 75, output
    assert "stopped by a signal" in output
    assert "report:" not in output
    assert not [pid for pid in others if Path(f"/proc/{pid}").exists()]
    found = checkpoint.newest(tmp_path / "runs/speech-tones/checkpoints")
    assert found is not None
    assert found.state["position"]["step"] == json.loads(metrics.read_text().splitlines()[-1])["step"]


@pytest.mark.parametrize(("verb", "code"), [("--help", 0), ("prepare", 1)])
def test_a_closed_pipe_is_success_only_where_printing_is_all(tmp_path: Path, verb: str, code: int) -> None:
    arguments = [verb]
    if verb == "prepare":
        arguments += ["speech/tones", f"data.path={tmp_path}", "data.corpus.num_utterances=40"]
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "trainer", *arguments]
    done = subprocess.run(command, cwd=PROJECT, stdout=write, stderr=subprocess.PIPE, text=True, timeout=PATIENCE)
    os.close(write)
    assert (done.returncode, done.stderr) == (code, "")
