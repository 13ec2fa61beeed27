"""What the chaos tests share: two hosts, the processes in them, and a run that is watched."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.helpers import overrides
from trainer.config import PROJECT
from trainer.run import read_lines

PATIENCE = 180.0
HERE = Path(__file__).resolve().parent


def why_not(*programs: str) -> str | None:
    """Why two hosts cannot be made here; None: they can."""
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    missing = [name for name in programs if shutil.which(name, path=path) is None]
    if os.geteuid() != 0:
        return "network namespaces need root"
    if missing:
        return f"needs {', '.join(missing)} (Debian: iproute2 openssh-server pdsh slurm-wlm munge)"
    probe = f"probe{secrets.token_hex(2)}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        return "this system allows no network namespaces"
    subprocess.run(["ip", "netns", "delete", probe], check=True)
    return None


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def words(pid: int) -> str:
    """Command line; empty for one that is gone or a zombie."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    return ""


def environment_of(pid: int) -> bytes:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/environ").read_bytes()
    return b""


def wait_for(
    condition: Callable[[], bool],
    what: str,
    seconds: float = PATIENCE,
    pause: float = 0.01,
    said: Callable[[], str] = str,
) -> float:
    """Wait until something is so; the seconds that took. `said`: what a failure shows the end of."""
    start = time.monotonic()
    while not condition():
        assert time.monotonic() - start < seconds, f"{what}: not in {seconds:g} s\n{said()[-3000:]}"
        time.sleep(pause)
    return time.monotonic() - start


@dataclass
class Place(ABC):
    """Where a run is started and which processes can belong to it."""

    slots: int

    @abstractmethod
    def command(self, arguments: list[str], folder: Path) -> list[str]:
        """A verb with its arguments, to be started from this host."""

    @abstractmethod
    def processes(self) -> list[int]:
        """All that a run has here now, on any host."""


class OneHost(Place):
    """Two ranks on this host; a variable of the environment tells their processes from others."""

    def __init__(self) -> None:
        super().__init__(slots=2)
        self.mark = f"OSTINATO_CHAOS={secrets.token_hex(8)}"

    def command(self, arguments: list[str], folder: Path) -> list[str]:
        return ["env", self.mark, sys.executable, "-m", "trainer", *arguments, f"nproc={self.slots}"]

    def processes(self) -> list[int]:
        found = [int(p.name) for p in Path("/proc").glob("[0-9]*")]
        return [pid for pid in found if self.mark.encode() in environment_of(pid) and words(pid)]


class TwoHosts(Place):
    """nodea and nodeb, see two_hosts.sh; a run is started on nodea."""

    def __init__(self, folder: Path) -> None:
        super().__init__(slots=1)
        self.folder, self.id = folder, f"o{secrets.token_hex(2)}"
        self._script("up")
        self._before = set(self._all())
        (folder / "hostfile").write_text("nodea slots=1\nnodeb slots=1\n")

    def _script(self, action: str) -> None:
        command = [str(HERE / "two_hosts.sh"), action, str(self.folder), self.id]
        with (self.folder.parent / "two_hosts.log").open("ab") as log:
            subprocess.run(command, check=True, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def down(self) -> None:
        self._script("down")

    def on(self, node: str, *command: str) -> list[str]:
        return [str(self.folder / "on"), node, *command]

    def command(self, arguments: list[str], folder: Path) -> list[str]:
        hosts = ["--hosts", str(self.folder / "hostfile")]
        return self.on("nodea", sys.executable, "-m", "trainer", *arguments, *hosts)

    def _all(self, *nodes: str) -> list[int]:
        found: list[int] = []
        for node in nodes or ("nodea", "nodeb"):
            done = subprocess.run(["ip", "netns", "pids", f"{self.id}-{node}"], capture_output=True, text=True)
            found += [int(pid) for pid in done.stdout.split()]
        return found

    def processes(self) -> list[int]:
        return [pid for pid in self._all() if pid not in self._before and words(pid)]

    def of_host(self, node: str) -> list[int]:
        """What a run has on one host."""
        return [pid for pid in self._all(node) if pid not in self._before and words(pid)]

    def link(self, node: str, state: str) -> None:
        """Cut (down) or mend (up) the cable of a host."""
        subprocess.run(["ip", "-n", f"{self.id}-{node}", "link", "set", "eth0", state], check=True)


@contextlib.contextmanager
def two_hosts(folder: Path) -> Iterator[TwoHosts]:
    if (reason := why_not("ip", "nsenter", "unshare", "sshd", "ssh")) is not None:
        pytest.skip(reason)
    world = TwoHosts(folder / "net")
    try:
        yield world
    finally:
        world.down()


class Run:
    """A run that is started, watched and hurt.

    Args:
        world: where.
        corpus, runs: folders.
        name: of the run.
        more: settings.
    """

    def __init__(self, world: Place, corpus: Path, runs: Path, name: str, *more: str) -> None:
        self.world, self.name, self.path = world, name, runs / name
        self.arguments = ["train", "speech/tones", *overrides(corpus, runs, f"name={name}", *more)]
        self.output = runs.parent / f"{name}.log"
        self.front: subprocess.Popen[bytes] | None = None

    def start(self) -> "Run":
        environment = os.environ | {"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"}
        with self.output.open("ab") as output:
            self.front = subprocess.Popen(
                self.world.command(self.arguments, self.output.parent),
                cwd=PROJECT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def step(self) -> int:
        """The last one that is on record."""
        rows = [row["step"] for row in read_lines(self.path / "metrics.jsonl") if row["kind"] == "train"]
        return rows[-1] if rows else 0

    def reach(self, step: int) -> None:
        """Wait until a step is done."""

        def there() -> bool:
            assert self.front is not None
            code = self.front.poll()
            assert code is None, f"ended with {code}:\n{self.text()[-3000:]}"
            return self.step() >= step

        wait_for(there, f"step {step}")

    def end(self, seconds: float = PATIENCE) -> int:
        """Wait for the front end; its exit code. Nothing may be left then."""
        assert self.front is not None
        try:
            code = self.front.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"not over in {seconds:g} s:\n{self.text()[-3000:]}") from None
        wait_for(lambda: not self.world.processes(), "orphans are left", 15)
        return code

    def hurt(self, pids: list[int]) -> float:
        """kill -9; the time of it."""
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return time.time()

    def stop(self) -> None:
        """Leave nothing behind, however a test ends."""
        if self.front is not None:
            self.front.kill()
            self.front.wait()
        self.hurt(self.world.processes())

    # Who is who

    def ranks(self) -> list[int]:
        """Processes that train, oldest first."""
        found = self.world.processes()
        trains = [pid for pid in found if f"name={self.name}" in words(pid) and b"\0RANK=" in environment_of(pid)]
        return sorted(pid for pid in trains if parent(pid) not in trains)

    def agents(self) -> list[int]:
        return [pid for pid in self.world.processes() if "-m trainer host" in words(pid) and "cd /" not in words(pid)]

    def front_pid(self) -> int:
        """The front end itself: with two hosts it has become what was started."""
        assert self.front is not None
        return self.front.pid
