"""A job on several hosts, all of them this one: `ssh` is a script that runs the command here."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import DistStoreError

from tests import faults
from tests.helpers import overrides, run_ranks
from trainer import distributed, hosts
from trainer.__main__ import main
from trainer.cluster import Cluster, ssh
from trainer.config import PROJECT
from trainer.doctor import requirements
from trainer.errors import UserError
from trainer.hosts import Host, read_hosts
from trainer.run import read_ledger, read_lines
from trainer.signals import StopSignals
from trainer.verbs.train import train

PATIENCE = 120.0
SSH = """#!/bin/bash
# Takes ssh's place: the last argument is the command, the one before it the host.
host=${@: -2:1} command=${@: -1}
echo "$*" >>"$(dirname "$0")/asked"
case $host in
127.0.0.8) echo "ssh: connect to host $host port 22: No route to host" >&2; exit 255 ;;
127.0.0.9) command=${command/cd /cd /nowhere} ;;
127.0.0.7) command=${command/PYTHONPATH=/PYTHONPATH=$ODD:} ;;
esac
exec sh -c "$command"
"""
ODD = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: "9.9" if name == "deepspeed" else version(name)
"""
"""A host with another version of a package."""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """What a command needs to find the other `ssh`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "ssh").write_text(SSH)
    (folder / "ssh").chmod(0o755)
    return os.environ | {
        "PATH": f"{folder}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT),
        "OMP_NUM_THREADS": "1",
        "ODD": faults.put(tmp_path / "odd", ODD),
    }


class Launched:
    """A run on some of the addresses of this host."""

    def __init__(self, corpus: Path, folder: Path, environment: dict[str, str]) -> None:
        self.corpus, self.folder, self.environment = corpus, folder, environment
        self.path = folder / "runs" / "run"
        self.process: subprocess.Popen[str] | None = None

    def start(self, addresses: list[str], *more: str) -> "subprocess.Popen[str]":
        file = self.folder / "hosts"
        file.write_text("".join(f"{a} slots=1\n" for a in addresses))
        arguments = ["speech/tones", *overrides(self.corpus, self.path.parent, "name=run", *more)]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "trainer", "train", *arguments, "--hosts", str(file)],
            cwd=PROJECT,
            env=self.environment,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        return self.process

    def ended(self) -> tuple[int, str]:
        """Exit code and output; nothing may be left."""
        assert self.process is not None
        output = self.process.communicate(timeout=PATIENCE)[0]
        wait_for(lambda: not self.left())
        return self.process.returncode, output

    def left(self, text: str = "") -> list[int]:
        """Processes of this run besides its front end, those with a text in their command line."""
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                command, variables = (folder / "cmdline").read_bytes(), (folder / "environ").read_bytes()
            except OSError:
                continue
            ours = f"ODD={self.environment['ODD']}".encode() in variables
            if ours and command and text.encode() in command and self.process and int(folder.name) != self.process.pid:
                found.append(int(folder.name))
        return found

    def step(self) -> int:
        return max((row["step"] for row in read_lines(self.path / "metrics.jsonl")), default=0)

    def reach(self, step: int) -> None:
        assert self.process is not None
        wait_for(lambda: self.step() >= step or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.stdout.read()[-3000:]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def run(corpus: Path, tmp_path: Path, environment: dict[str, str]) -> Iterator[Launched]:
    launched = Launched(corpus, tmp_path, environment)
    yield launched
    if launched.process is not None:
        launched.process.kill()
        launched.process.wait()
        for pid in launched.left():
            os.kill(pid, signal.SIGKILL)


TWO = ["127.0.0.1", "127.0.0.2"]


@pytest.mark.slow
@pytest.mark.distributed
def test_a_host_is_killed_and_the_run_goes_on_until_it_is_told_to_stop(
    run: Launched, corpus: Path, tmp_path: Path
) -> None:
    """An agent is killed, a signal stops it, the front end is killed; the ledger is that of a run in peace."""
    settings = ["max_steps=40", "checkpoint.every_steps=4", "validation.every_steps=20"]
    whole = [sys.executable, "-m", "trainer", "train", "speech/tones", *overrides(corpus, tmp_path, "name=whole")]
    done = subprocess.run([*whole, *settings, "nproc=2"], cwd=PROJECT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

    run.start(TWO, *settings)
    run.reach(6)
    agents = run.left("trainer\0host")
    assert len(agents) == 2
    os.kill(agents[-1], signal.SIGKILL)
    wait_for(lambda: run.step() == 5)  # cut back to the checkpoint and one further
    run.reach(10)
    run.process.send_signal(signal.SIGUSR1)
    code, output = run.ended()
    assert code == 75, output
    assert "closed the connection" in output
    assert "starts again in 1 s from the newest checkpoint (1 of 3)" in output
    assert (run.path / "requeue").exists()

    run.start(TWO, *settings)
    run.reach(run.step() + 3)
    assert not (run.path / "requeue").exists()
    run.process.kill()
    assert run.ended()[0] == -9

    run.start(TWO, *settings)
    code, output = run.ended()
    assert code == 0, output
    assert read_ledger(run.path / "ledger") == read_ledger(tmp_path / "whole" / "ledger")


@pytest.mark.slow
@pytest.mark.distributed
def test_it_goes_on_with_the_hosts_that_answer(run: Launched) -> None:
    run.start(["127.0.0.8", *TWO], "max_steps=2", "launch.min_hosts=2")
    code, output = run.ended()
    assert code == 0, output
    assert "goes on without 1 of 3 hosts (127.0.0.8: ssh: connect to host 127.0.0.8 port 22: No route" in output
    assert "2 process(es)" in output


@pytest.mark.parametrize(
    ("addresses", "messages"),
    [
        (["127.0.0.1", "127.0.0.8"], ["1 of 2 hosts answer, wanted 2 (127.0.0.8: ssh: connect", "launch.min_hosts"]),
        (["127.0.0.1", "127.0.0.9"], ["host 127.0.0.9: the agent cannot be started in", "same folder"]),
        (["127.0.0.1", "127.0.0.2", "127.0.0.7"], ["deepspeed: 127.0.0.7 has 9.9; all others have "]),
    ],
)
def test_an_odd_host_is_named_before_anything_starts(run: Launched, addresses: list[str], messages: list[str]) -> None:
    run.start(addresses)
    code, output = run.ended()
    assert code == 2, output
    assert all(message in output for message in messages), output
    assert "Traceback" not in output
    assert not run.path.exists()


def test_too_few_hosts_at_a_new_start_are_no_new_start() -> None:
    gone = ["sh", "-c", "echo gone >&2; exit 255"]
    job = Cluster(["train"], [Host("a", 1)], lambda *_: gone, None, print, again=True)
    try:
        while (outcome := job.poll()) is None:
            time.sleep(0.01)
    finally:
        job.close()
    assert (outcome.code, outcome.began, outcome.text) == (1, False, "0 of 1 hosts answer, wanted 1 (a: gone)")


def test_a_program_that_is_missing_is_named() -> None:
    with pytest.raises(UserError, match="no-such-ssh is needed to reach a, and is not in PATH here"):
        Cluster(["train"], [Host("a", 1)], lambda *_: ["no-such-ssh"], None, print, again=False)


def test_each_host_by_hand_knows_its_interface_and_its_port(monkeypatch: pytest.MonkeyPatch) -> None:
    two, said, started = [Host(TWO[0], 2), Host(TWO[1], 3)], [], []
    monkeypatch.setattr(hosts, "HostJob", lambda *arguments: started.append(arguments))
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    with socket.create_server(("", 0)) as taken:
        port = str(taken.getsockname()[1])
        monkeypatch.setenv("MASTER_PORT", port)
        with pytest.raises(UserError, match=f"MASTER_PORT={port}: Address already in use; set another one"):
            hosts.by_hand(["train"], two, 0, said.append)
        hosts.by_hand(["train"], two, 1, said.append)  # there it is somebody else's
    place = {"MASTER_ADDR": TWO[0], "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    assert started == [(["train"], 3, 2, 5, place)]
    assert said == [f"host 1 of 2 (127.0.0.2): meets the others at 127.0.0.1, port {port}"]
    for node in (0, 1):
        unknown = [Host("no.such.host.invalid", 1)]
        with pytest.raises(UserError, match=rf"--node {node}: cannot reach no\.such\.host\.invalid: "):
            hosts.by_hand(["train"], [two[0], *unknown] if node == 0 else [*unknown, two[0]], node, said.append)
    for wrong in ("ssh", "0", "70000"):
        monkeypatch.setenv("MASTER_PORT", wrong)
        with pytest.raises(UserError, match=f"MASTER_PORT={wrong}: wanted the number of a port"):
            hosts.by_hand(["train"], two, 0, said.append)


def test_a_number_of_a_host_belongs_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "speech/tones", "--node", "0"]) == 2
    assert capsys.readouterr().err == "--node 0: is a line of a hosts file; name it, --hosts FILE\n"


def test_a_rank_that_is_started_twice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        place = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    store = distributed._meet(0, timedelta(seconds=20))
    with pytest.raises(UserError, match="rank 0 was started twice: is the number after --node another one"):
        distributed._meet(0, timedelta(seconds=20))
    del store


def test_a_rank_that_meets_nobody_says_so_in_a_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def alone(timeout_seconds: float) -> None:
        raise DistStoreError("timed out")

    monkeypatch.setattr(distributed, "start", alone)
    with StopSignals() as signals:
        assert train("speech/tones", overrides(tmp_path, tmp_path), signals) == 1
    assert "rank 0 did not meet the others: DistStoreError: timed out" in caplog.text


def test_a_missing_interface_is_named(run: Launched, environment: dict[str, str]) -> None:
    environment["GLOO_SOCKET_IFNAME"] = "nosuch0"
    run.start(TWO)
    code, output = run.ended()
    assert code == 2, output
    assert "GLOO_SOCKET_IFNAME=nosuch0: host 127.0.0.2 has no such interface, but lo" in output


def test_no_secret_is_on_a_command_line(run: Launched, environment: dict[str, str], tmp_path: Path) -> None:
    environment["WANDB_API_KEY"] = "very-secret"
    run.start(["127.0.0.1", "127.0.0.8"])
    run.ended()
    asked = (tmp_path / "bin" / "asked").read_text()
    assert "127.0.0.8" in asked
    assert "very-secret" not in asked


FEW = """
from trainer import doctor
def shared_memory():
    return "there is some"
doctor.CHECKS = [doctor.Check("disk", doctor.disk), doctor.Check("shared memory", shared_memory)]
"""
"""The checks of a host that are done in a moment."""


def test_the_doctor_visits_every_host_and_pair(environment: dict[str, str], tmp_path: Path) -> None:
    environment["PYTHONPATH"] = f"{faults.put(tmp_path / 'few', FEW)}:{PROJECT}"
    file = tmp_path / "hosts"

    def visit(*addresses: str) -> tuple[int, str]:
        file.write_text("".join(f"{a}\n" for a in addresses))
        command = [sys.executable, "-m", "trainer", "doctor", "--hosts", str(file)]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=PATIENCE)
        return done.returncode, done.stdout + done.stderr

    code, output = visit("127.0.0.1", "127.0.0.2", "127.0.0.3")
    assert code == 0, output
    assert "host 127.0.0.2: lo 127.0.0.1 reaches the others" in output
    assert "clock +0.0 s" in output or "clock -0.0 s" in output
    assert "ok       all hosts: Python " in output
    assert "ok       all hosts: shared memory: there is some" in output
    for address in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
        assert f"{address} -> 2 other host(s): " in output

    code, output = visit("127.0.0.1", "127.0.0.2", "127.0.0.8")
    assert code == 3, output
    assert "PROBLEM  host 127.0.0.8: no agent answers (ssh: connect to host 127.0.0.8 port 22: No route" in output
    assert "127.0.0.1 -> 1 other host(s)" in output
    assert "\n1 problem(s)\n" in output


def test_hosts_are_compared() -> None:
    same = {"torch": "2", "code": "a"}
    hosts.compare([("a", same), ("b", dict(same))])
    with pytest.raises(UserError, match=r"torch: b has 3, c has missing; all others have 2") as caught:
        hosts.compare([("a", same), ("b", same | {"torch": "3"}), ("c", {"code": "a"}), ("d", same)])
    assert "code" not in str(caught.value)
    with pytest.raises(UserError, match=r"torch: b has 3; a has 2"):
        hosts.compare([("a", same), ("b", same | {"torch": "3"})])


def test_the_code_of_a_host_is_in_its_facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trainer").mkdir()
    monkeypatch.setattr(hosts, "PROJECT", tmp_path)
    (tmp_path / "trainer" / "a.py").write_text("1")
    one = hosts.facts()
    (tmp_path / "trainer" / "a.py").write_text("2")
    assert hosts.facts()["code"] != one["code"]
    assert {"Python", "ostinato", "working directory", *requirements()} <= one.keys()


def alike(ranks: Any, variables: list[dict[str, str]], folder: Path) -> list[str]:
    """Compare ranks as if each were a host of its own; what is logged."""
    os.environ.update(variables[ranks.rank], LOCAL_RANK="0")
    socket.gethostname = lambda: f"host-{ranks.rank}"
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    hosts.log.addHandler(handler)
    hosts.check_alike(folder)
    return told


@pytest.mark.distributed
def test_the_environment_of_hosts_is_compared_however_they_were_started(tmp_path: Path) -> None:
    same, other = ({"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": number} for number in ("1", "2"))
    assert run_ranks(2, alike, [same, other], tmp_path) == [
        ["OMP_NUM_THREADS: host-1 has 2; host-0 has 1; the slower ones hold up the others"],
        [],
    ]
    with pytest.raises(RuntimeError, match="DS_SKIP: host-1 has 1; host-0 has missing"):
        run_ranks(2, alike, [same, same | {"DS_SKIP": "1"}], tmp_path)


def test_the_interface_is_the_one_that_reaches_the_others() -> None:
    assert hosts.network("127.0.0.1", TWO) == hosts.Network("lo", "127.0.0.1")
    with pytest.raises(UserError, match=r"cannot reach no\.such\.host\.invalid"):
        hosts.network("127.0.0.1", ["127.0.0.1", "no.such.host.invalid"])


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", "names no host"),
        ("a slots=two\n", r":1: 'a slots=two': wanted `HOST slots=N`"),
        ("a slots=0\n", "wanted"),
        ("-oProxyCommand=x\n", "wanted `HOST"),
        ("a slots=2\nb\na slots=1\n", ":3: names a again; write one line with all its slots"),
        ("h\u00f6st", "is no text in UTF-8"),
    ],
)
def test_a_wrong_hosts_file_is_explained(tmp_path: Path, text: str, wanted: str) -> None:
    path = tmp_path / "hosts"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=wanted):
        read_hosts(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_hosts(tmp_path / "nowhere")


def test_a_hosts_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_text("# ours\nnode-1 slots=2\n\nuser@node-2  # one\n")
    assert read_hosts(path) == [Host("node-1", 2), Host("user@node-2", 1)]
    assert ssh("node-1", "x")[-2:] == ["node-1", "x"]
