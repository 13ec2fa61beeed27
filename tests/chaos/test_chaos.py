"""Runs are hurt at random, and must end as if nothing had happened. `./launch.sh test -m chaos`

Each run is compared with one that nothing happened to: which sample was in which step, with which waveform, is equal.
"""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.chaos.world import (
    HERE,
    PATIENCE,
    OneHost,
    Place,
    Run,
    TwoHosts,
    environment_of,
    two_hosts,
    wait_for,
    why_not,
)
from trainer.config import PROJECT
from trainer.run import CLOCKS, read_ledger, read_lines

pytestmark = pytest.mark.chaos
DEADLINE = 30
"""Of the runs whose link is cut; on a machine that others use too, starting alone can take as long."""
STEPS = 160
SETTINGS = [
    f"max_steps={STEPS}",
    "max_epochs=40",
    "checkpoint.every_steps=4",
    "validation.every_steps=40",
    "num_workers=1",
    "launch.deadline_seconds=120",
    "launch.max_restarts=20",
]
MOST_SECONDS = 60.0
"""From a fault to the next step."""


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoHosts]:
    with two_hosts(tmp_path_factory.mktemp("hosts")) as world:
        yield world


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two ranks on one host that nothing happens to."""
    run = Run(OneHost(), corpus, tmp_path_factory.mktemp("whole") / "runs", "whole", *SETTINGS).start()
    assert run.end() == 0, run.text()
    return run.path


@pytest.fixture
def start(corpus: Path, tmp_path: Path) -> Iterator[Callable[..., Run]]:
    """Starts a run in a place; whatever is left of it is ended."""
    runs: list[Run] = []

    def begin(world: Place, name: str, *more: str) -> Run:
        runs.append(Run(world, corpus, tmp_path / "runs", name, *SETTINGS, *more))
        return runs[-1].start()

    yield begin
    for run in runs:
        run.stop()


def check_equal(run: Run, whole: Path) -> None:
    assert read_ledger(run.path / "ledger") == read_ledger(whole / "ledger")
    numbers = [
        [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_lines(path / "metrics.jsonl")]
        for path in (run.path, whole)
    ]
    assert numbers[0] == numbers[1]


# Two hosts


def test_two_hosts_train_like_one(hosts: TwoHosts, start: Callable[..., Run], whole: Path) -> None:
    run = start(hosts, "two")
    assert run.end() == 0, run.text()
    check_equal(run, whole)


@pytest.mark.skipif(bool(why_not("pdsh")), reason=str(why_not("pdsh")))
def test_deepspeeds_launcher_over_pdsh_starts_the_ranks(
    hosts: TwoHosts, start: Callable[..., Run], whole: Path
) -> None:
    """Ours is not needed: whoever sets RANK and the like may start them."""
    here = hosts.folder / "deepspeed"
    here.mkdir()
    variables = {"PATH": f"{hosts.folder}/bin:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    lines = [f"{name}={value}" for name, value in {**variables, "GLOO_SOCKET_IFNAME": "eth0"}.items()]
    (here / ".deepspeed_env").write_text("\n".join(lines) + "\n")

    class ByDeepSpeed(TwoHosts):
        def __init__(self) -> None:
            self.__dict__ |= hosts.__dict__

        def command(self, arguments: list[str], folder: Path) -> list[str]:
            file = str(hosts.folder / "hostfile")
            options = ["--hostfile", file, "--launcher", "pdsh", "--master_addr", "10.77.0.1", "--no_local_rank"]
            front = str(Path(sys.executable).with_name("deepspeed"))
            inside = ["env", f"DS_ENV_FILE={here}/.deepspeed_env", front, *options, "--module", "trainer", *arguments]
            return self.on("nodea", *inside)

    run = start(ByDeepSpeed(), "by-deepspeed")
    assert run.end() == 0, run.text()
    check_equal(run, whole)


# Random faults


@dataclass
class Log:
    """What was done to the runs, and how long each needed to go on."""

    seconds: list[float] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    inside_a_write: int = 0


def unfinished(run: Run) -> Path | None:
    """A checkpoint that is being written."""
    return next((run.path / "checkpoints").glob(".step-*.partial"), None)


def choose(run: Run, kind: str, chance: random.Random) -> list[int]:
    """Processes to kill; none if there is no such one at this moment."""
    world = run.world
    if kind == "front":
        return [run.front_pid()]
    if kind == "host":
        assert isinstance(world, TwoHosts)
        return world.of_host("nodeb")
    found = {"rank": run.ranks, "write": run.ranks, "agent": run.agents}[kind]()
    return [chance.choice(found)] if found else []


def hurt(run: Run, kind: str, chance: random.Random, log: Log) -> bool:
    """Kill something at a random moment and wait until the run goes on; whether it was a fault that counts."""
    run.reach(run.step() + chance.randint(1, 6))
    if kind == "write":
        victims = choose(run, kind, chance)  # looking for them takes longer than a write
        wait_for(lambda: unfinished(run) is not None, "a checkpoint", pause=0)
    else:
        time.sleep(chance.uniform(0, 0.2))  # a random moment of a step
        victims = choose(run, kind, chance)
    if not victims or run.front is None or run.front.poll() is not None:
        return False
    before = inode(run)
    fault = run.hurt(victims)
    if kind == "front":
        assert run.front.wait(PATIENCE) == -9
        run.start()
    proof = unfinished(run)
    whole = proof is not None and proof.name[1:].removesuffix(".partial")

    def alive(condition: bool) -> bool:
        assert run.front is not None
        assert run.front.poll() is None, f"ended with {run.front.poll()} after {kind}:\n{run.text()[-3000:]}"
        return condition

    metrics = run.path / "metrics.jsonl"
    wait_for(lambda: alive(inode(run) != before), f"a new start after {kind}")  # metrics are cut back
    size = metrics.stat().st_size
    wait_for(lambda: alive(metrics.stat().st_size > size), f"a step after {kind}")
    log.seconds.append(time.time() - fault)
    print(f"{run.name}: {kind}, {log.seconds[-1]:.1f} s", flush=True)
    if kind == "write":  # what was being written then must not be what it goes on from
        inside = bool(whole) and f"checkpoints/{whole}" not in resumed(run)
        log.inside_a_write += inside
        return inside
    return True


def inode(run: Run) -> int:
    return (run.path / "metrics.jsonl").stat().st_ino


def resumed(run: Run) -> str:
    """What the run went on from last."""
    lines = [line for line in run.text().splitlines() if "resumed from" in line]
    return lines[-1] if lines else ""


DECKS = {
    "one-host": {"rank": 11, "front": 7, "write": 7},
    "two-hosts": {"rank": 6, "agent": 5, "front": 5, "host": 5, "write": 4},
}
FAULTS_A_RUN = 13
log = Log()


@pytest.mark.parametrize("place", DECKS)
def test_random_kills(request: pytest.FixtureRequest, place: str, start: Callable[..., Run], whole: Path) -> None:
    """50 in all; see the summary."""
    world = OneHost() if place == "one-host" else request.getfixturevalue("hosts")
    seed = int(os.environ.get("CHAOS_SEED", time.time_ns() % 10**6))
    print(f"CHAOS_SEED={seed}")
    chance = random.Random(f"{seed} {place}")
    deck = [kind for kind, count in DECKS[place].items() for _ in range(count)]
    chance.shuffle(deck)
    number = 0
    while deck:
        number += 1
        run, done = start(world, f"{place}-{number}"), 0
        while deck and done < FAULTS_A_RUN and run.step() < STEPS - 30:
            kind = deck[-1]
            if hurt(run, kind, chance, log):
                log.kinds[deck.pop()] += 1
                done += 1
        assert run.end() == 0, run.text()
        check_equal(run, whole)
    print(f"{sum(log.kinds.values())} kills: {dict(log.kinds)}, {log.inside_a_write} inside a checkpoint write;")
    print(f"seconds from fault to next step: {sorted(round(s, 1) for s in log.seconds)}")
    assert max(log.seconds) <= MOST_SECONDS


def test_there_were_fifty_kills_and_ten_inside_a_write() -> None:
    if "two-hosts" not in str(log.kinds) and not log.kinds["host"]:
        pytest.skip("there were no two hosts")
    assert sum(log.kinds.values()) >= 50
    assert log.inside_a_write >= 10


# The network


def test_a_cut_link_ends_all_ranks_in_time_and_the_run_resumes(
    hosts: TwoHosts, start: Callable[..., Run], whole: Path
) -> None:
    run = start(hosts, "cut", f"launch.deadline_seconds={DEADLINE}")
    try:
        run.reach(6)
        ranks = run.ranks()
        assert len(ranks) == 2
        hosts.link("nodeb", "down")
        seconds = wait_for(lambda: not any(environment_of(pid) for pid in ranks), "the ranks end", 2 * DEADLINE)
        print(f"all ranks ended {seconds:.1f} s after the cut")
        assert seconds <= DEADLINE
    finally:
        hosts.link("nodeb", "up")
    assert run.end() == 0, run.text()
    assert "host nodeb was not heard for" in run.text()
    check_equal(run, whole)


def test_the_hosts_that_are_left_go_on(hosts: TwoHosts, start: Callable[..., Run], whole: Path) -> None:
    """The link stays down; the order of the samples does not depend on the number of processes."""
    run = start(hosts, "left", "launch.min_hosts=1")
    try:
        run.reach(6)
        hosts.link("nodeb", "down")
        assert run.front is not None
        run.front.wait(PATIENCE)
        assert not [*run.ranks(), *run.agents()]  # sshd itself stays until it hears of the other side
    finally:
        hosts.link("nodeb", "up")
    assert run.end() == 0, run.text()
    assert "goes on without 1 of 2 hosts (nodeb: " in run.text()
    assert read_ledger(run.path / "ledger") == read_ledger(whole / "ledger")


def test_a_cut_between_the_ranks_is_seen_by_the_deadline(
    hosts: TwoHosts, start: Callable[..., Run], whole: Path
) -> None:
    """Each host by hand: nothing but the process group's time-out can tell."""

    class ByHand(TwoHosts):
        def __init__(self, node: int) -> None:
            self.__dict__ |= hosts.__dict__
            self.node = node

        def command(self, arguments: list[str], folder: Path) -> list[str]:
            line = ["--hosts", str(self.folder / "hostfile"), "--node", str(self.node)]
            return self.on(("nodea", "nodeb")[self.node], sys.executable, "-m", "trainer", *arguments, *line)

    first, second = (start(ByHand(node), "by-hand", f"launch.deadline_seconds={DEADLINE}") for node in (0, 1))
    try:
        first.reach(6)
        hosts.link("nodeb", "down")
        cut = time.monotonic()
        codes = [run.front.wait(2 * DEADLINE) for run in (first, second) if run.front is not None]
        print(f"all ended {time.monotonic() - cut:.1f} s after the cut")
        assert time.monotonic() - cut <= DEADLINE
        assert codes == [1, 1]
    finally:
        hosts.link("nodeb", "up")
    first, second = (start(ByHand(node), "by-hand", f"launch.deadline_seconds={DEADLINE}") for node in (0, 1))
    assert (first.end(), second.end()) == (0, 0), first.text()
    check_equal(first, whole)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_saves_everywhere(
    hosts: TwoHosts, start: Callable[..., Run], whole: Path, number: signal.Signals
) -> None:
    run = start(hosts, f"signal-{number}")
    run.reach(10)
    begin = time.monotonic()
    os.kill(run.front_pid(), number)
    assert run.end() == 75, run.text()
    print(f"{number.name}: saved and ended in {time.monotonic() - begin:.2f} s")
    assert time.monotonic() - begin < 10  # a step and a save, and two connections that are closed
    step = run.step()
    run.start()
    assert run.end() == 0, run.text()
    assert f"step-{step:08d}" in resumed(run)
    check_equal(run, whole)


# Slurm


@pytest.fixture(scope="module")
def slurm(hosts: TwoHosts) -> Iterator[Callable[..., str]]:
    """Runs a command of Slurm on nodea; its output."""
    if (reason := why_not("slurmctld", "slurmd", "munged", "sbatch")) is not None:
        pytest.skip(reason)
    environment = os.environ | {"VIRTUAL_ENV": sys.prefix, "OMP_NUM_THREADS": "1"}

    def ask(*command: str) -> str:
        words = [str(hosts.folder / "slurm" / "on"), "nodea", *command]
        return subprocess.run(words, cwd=PROJECT, env=environment, check=True, capture_output=True, text=True).stdout

    try:
        subprocess.run([str(HERE / "slurm.sh"), "up", str(hosts.folder)], check=True, stdin=subprocess.DEVNULL)
        hosts._before = set(hosts._all())
        yield ask
    finally:
        subprocess.run([str(HERE / "slurm.sh"), "down", str(hosts.folder)], check=True)


def test_sbatch_survives_a_kill_and_a_preemption(
    slurm: Callable[..., str], hosts: TwoHosts, corpus: Path, tmp_path: Path, whole: Path
) -> None:
    run = Run(hosts, corpus, tmp_path / "runs", "slurm", *SETTINGS)
    run.output.parent.mkdir(exist_ok=True)
    job = re.findall(r"\d+", slurm("sbatch", "-N2", f"--output={run.output}", "launch.sh", *run.arguments))[0]

    def reach(step: int) -> None:
        wait_for(lambda: run.step() >= step, f"step {step}", pause=0.1, said=run.text)

    def state() -> str:
        return re.findall(r"JobState=(\w+)", slurm("scontrol", "show", "job", job))[0]

    try:
        reach(6)
        ranks = run.ranks()
        assert {environment_of(pid).count(b"SLURMD_NODENAME=nodeb") for pid in ranks} == {0, 1}
        before = inode(run)
        run.hurt([run.ranks()[-1]])
        wait_for(lambda: inode(run) != before, "a new start", said=run.text)
        reach(run.step() + 4)
        slurm("scancel", "--signal=TERM", job)
        wait_for(lambda: "is requeued" in run.text(), "the requeue", said=run.text)
        wait_for(lambda: state() == "PENDING", "the job in the queue", pause=0.5, said=run.text)
        wait_for(lambda: not run.ranks(), "orphans", said=run.text)
        slurm("scontrol", "update", f"JobId={job}", "StartTime=now")  # instead of two minutes
        wait_for(lambda: state() == "COMPLETED", "the end", pause=0.5, said=run.text)
    finally:
        if state() not in ("COMPLETED", "FAILED"):
            slurm("scancel", job)
            wait_for(lambda: state() == "CANCELLED", "the end of the job", pause=0.5)
    assert "stopped by a signal" in run.text()
    check_equal(run, whole)


@pytest.mark.parametrize(
    ("option", "setting", "processes"), [("--gpus-per-node=2", "", 4), ("--ntasks-per-node=2", "nproc=1", 2)]
)
def test_a_cancelled_job_saves_and_stays_cancelled(
    slurm: Callable[..., str],
    hosts: TwoHosts,
    corpus: Path,
    tmp_path: Path,
    option: str,
    setting: str,
    processes: int,
) -> None:
    """With as many ranks as were asked for: one a GPU (which Slurm believes to be there), or nproc on each node."""
    run = Run(hosts, corpus, tmp_path / "runs", "cancelled", *SETTINGS, *filter(None, [setting]))
    words = ["sbatch", "-N2", option, f"--output={run.output}", "launch.sh", *run.arguments]
    job = re.findall(r"\d+", slurm(*words))[0]

    def told(name: str) -> str:
        return re.findall(rf"\b{name}=(\w+)", slurm("scontrol", "show", "job", job))[0]

    try:
        wait_for(lambda: run.step() >= 6, "step 6", pause=0.1, said=run.text)
        assert f"{processes} process(es)" in run.text()
    finally:
        slurm("scancel", job)
    wait_for(lambda: "is requeued, unless it was cancelled" in run.text(), "the last word", said=run.text)
    wait_for(lambda: told("JobState") != "COMPLETING" and not run.ranks(), "the end", pause=0.5, said=run.text)
    assert (told("JobState"), told("Restarts")) == ("CANCELLED", "0")
    assert "stopped by a signal" in run.text()


def test_srun_starts_ranks(
    slurm: Callable[..., str], hosts: TwoHosts, corpus: Path, tmp_path: Path, whole: Path
) -> None:
    """Without a front end of ours: each task is a rank."""
    run = Run(hosts, corpus, tmp_path / "runs", "srun", *SETTINGS)
    options = ["-N2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    slurm("srun", *options, "./launch.sh", *run.arguments)
    check_equal(run, whole)
