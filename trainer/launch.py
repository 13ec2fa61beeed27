"""The spawner: starts the ranks of one host, passes signals on, and returns their exit code.

DeepSpeed's own front end passes no signals on and leaves orphans behind. Each rank here dies with the spawner (the
kernel sees to it), the first one that fails ends the others, and its exit code is returned. A mistake of the user is
noticed by the ranks, mostly by all of them, and told once: they leave their messages to the spawner, which knows
nothing of torch and therefore starts them at once.

Several hosts: the same command on each with `--hosts FILE --node K`, where FILE has a line `HOST slots=N` a host and K
is the line's number from 0; the first host is where the ranks meet.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import EXIT_REQUEUE, EXIT_USER_MISTAKE, UserError
from trainer.signals import STOP_SIGNALS, die_with_parent

GRACE_SECONDS = 30.0
"""Time that ranks have to save after SIGTERM before they are killed."""
AFTER_FAILURE_SECONDS = 5.0
"""Time that the others have to end after one rank failed."""
STORE = "OSTINATO_STORE"
MESSAGES = "OSTINATO_MESSAGES"
PARENT = "OSTINATO_PARENT"
PORT = 29400


@dataclass(frozen=True)
class Host:
    """A line of a hosts file."""

    name: str
    slots: int


def read_hosts(path: Path) -> list[Host]:
    """Hosts of a file in DeepSpeed's format: `name slots=N` a line, # starts a comment.

    Raises:
        UserError: no such file, or a line of another form.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--hosts {path}: cannot be read: {error.strerror}") from error
    hosts = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)(?:\s+slots=(\d+))?", text)
        if match is None or match[2] == "0":
            raise UserError(f"{path}:{number}: {line!r}: wanted `HOST slots=N`")
        hosts.append(Host(match[1], int(match[2] or 1)))
    if not hosts:
        raise UserError(f"{path}: names no host; write a line `HOST slots=N` for each")
    return hosts


def default_processes() -> int:
    """One process a GPU, or one in all."""
    import torch

    return max(1, torch.cuda.device_count())


def run(arguments: list[str], nproc: int, hosts: list[Host] | None = None, node: int = 0) -> int:
    """Start the ranks of this host as `python -m trainer ARGUMENTS` and wait for them.

    Args:
        arguments: a verb that enters `StopSignals`, and what follows it.
        nproc: processes on this host (without `hosts`).
        hosts: of the whole job; None for this one alone.
        node: number of this host.

    Returns:
        the exit code: 0 if all ended well, else that of the first that did not; 128 + n for a signal n.
    """
    folder = Path(tempfile.mkdtemp(prefix="ostinato-"))
    environment = os.environ | {MESSAGES: str(folder)}
    if hosts is None:
        # A file is enough to meet on one host: no port to choose, nothing that listens.
        environment[STORE] = str(folder / "store")
        environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        first_rank, world_size = 0, nproc
    else:
        nproc = hosts[node].slots
        first_rank = sum(h.slots for h in hosts[:node])
        world_size = sum(h.slots for h in hosts)
        environment["MASTER_ADDR"] = hosts[0].name
        environment.setdefault("MASTER_PORT", str(PORT))
    environment["WORLD_SIZE"] = str(world_size)
    environment["LOCAL_WORLD_SIZE"] = str(nproc)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // nproc)))
    environment[PARENT] = str(os.getpid())
    ranks: list[subprocess.Popen[bytes]] = []
    try:
        with _passing_signals_to(ranks):
            # A rank inherits this and takes signals from where it enters `StopSignals`: one that comes before waits.
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            for local in range(nproc):
                place = {"RANK": str(first_rank + local), "LOCAL_RANK": str(local)}
                ranks.append(_start(arguments, environment | place, stdin=subprocess.DEVNULL))
            signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
            code = _wait(ranks)
        for message in dict.fromkeys(p.read_text(encoding="utf-8") for p in sorted(folder.glob("message-*"))):
            print(message, file=sys.stderr)
        return code
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _start(arguments: list[str], environment: dict[str, str], stdin: int | None = None) -> subprocess.Popen[bytes]:
    """Start `python -m trainer ARGUMENTS`, in a session of its own, so that Ctrl-C reaches it once, through us."""
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.Popen(command, env=environment, stdin=stdin, start_new_session=True)


@contextmanager
def _passing_signals_to(processes: list[subprocess.Popen[bytes]]) -> Iterator[list[int]]:
    """Pass stop signals on to processes; at the end none of them is left.

    Yields:
        the signals that came so far.
    """
    came: list[int] = []

    def forward(number: int, _: object) -> None:
        came.append(number)
        for process in processes:
            if process.poll() is None:
                process.send_signal(number)

    old = {name: signal.signal(name, forward) for name in STOP_SIGNALS}
    try:
        yield came
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        for process in processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        for name, handler in old.items():
            signal.signal(name, handler)


def story(config: str, overrides: list[str]) -> int:
    """Prepare, train, evaluate and report, one after the other; a signal goes to the one at work, and no other follows.

    Returns:
        the exit code of the first verb that did not end with 0; 128 + n for a signal n.
    """
    name = config.replace("/", "-")
    data = [text for text in overrides if not text.startswith("nproc=")]
    running: list[subprocess.Popen[bytes]] = []
    with _passing_signals_to(running) as came:
        for arguments in (
            ["prepare", config, *data],
            ["train", config, *overrides],
            ["evaluate", name],
            ["report", name],
        ):
            running[:] = [_start(arguments, os.environ | {PARENT: str(os.getpid())})]
            if came:  # while this one was being started
                running[0].send_signal(came[-1])
            code = running[0].wait()
            if code or came:
                return (code if code >= 0 else 128 - code) or EXIT_REQUEUE
    return 0


def _wait(ranks: list[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks ended; after the first failure the others get a little time, then SIGKILL."""
    deadline = None
    code = 0
    while True:
        running = [rank for rank in ranks if rank.poll() is None]
        failed = [rank.returncode for rank in ranks if rank.returncode not in (None, 0)]
        if failed and not code:
            code = failed[0]
            deadline = time.monotonic() + (GRACE_SECONDS if code == EXIT_REQUEUE else AFTER_FAILURE_SECONDS)
            if code not in (EXIT_REQUEUE, EXIT_USER_MISTAKE):  # these two are mostly everybody's
                for rank in running:
                    rank.send_signal(signal.SIGTERM)
        if not running:
            return code if code >= 0 else 128 - code
        if deadline is not None and time.monotonic() > deadline:
            for rank in running:
                rank.kill()
        time.sleep(0.05)


def tell(message: str) -> None:
    """Say what the user did wrong; a rank leaves that to its spawner, which says it once."""
    folder, rank = os.environ.get(MESSAGES), int(os.environ.get("RANK", "0"))
    if folder and Path(folder).is_dir():
        (Path(folder) / f"message-{rank:05d}").write_text(message, encoding="utf-8", errors="backslashreplace")
    else:
        print(f"rank {rank}: {message}" if rank else message, file=sys.stderr)


def follow_parent() -> None:
    """In a process that was started here: end when the one that started it does, even if that is killed."""
    if (parent := os.environ.pop(PARENT, None)) is not None:
        die_with_parent(int(parent))
