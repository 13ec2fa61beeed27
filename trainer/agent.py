"""The agent: stands for one host of a job, does what the front end says over one connection, and ends with it.

Whoever starts the job has one connection to each host, ssh or srun; the agent is at its other end. Commands come as
lines of JSON on stdin. Answers go to stdout, where the ranks write as well: an answer is a line that begins with a
character that no text holds. Both sides send a beat every second. If none comes for `SILENCE_SECONDS`, or the
connection is closed, the agent ends its ranks and itself, so nothing is left of a job whose front end is gone.
"""

import json
import os
import select
import socket
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from trainer import hosts
from trainer.errors import EXIT_DONE, EXIT_OUR_FAULT, UserError
from trainer.launch import POLL_SECONDS, HostJob, catching_signals

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 10.0
"""Without a beat for so long the other side counts as lost."""
MARK = "\x1e"
"""Begins an answer: the record separator of ASCII."""
PING_SECONDS = 5.0
PASSED_NAMES = ("PATH", "LD_LIBRARY_PATH", "VIRTUAL_ENV", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
PASSED_BEGINNINGS = ("PYTHON", "OMP_", "MKL_", "KMP_", "GLOO_", "NCCL_", "CUDA_", "TORCH", "DS_", "WANDB_", "AWS_")
"""Environment variables that go to every host: names, and beginnings of names. They travel inside the connection."""


def environment_to_pass() -> dict[str, str]:
    passed = {k: v for k, v in os.environ.items() if k.upper() in PASSED_NAMES}
    return passed | {k: v for k, v in os.environ.items() if k.startswith(PASSED_BEGINNINGS)}


class Agent:
    """One host's end of the connection."""

    def __init__(self) -> None:
        self._pending = b""
        self._job: HostJob | None = None

    def run(self) -> int:
        """Serve until the connection ends.

        Returns:
            the exit code.
        """
        heard = beaten = time.monotonic()
        passed = 0
        try:
            with catching_signals() as came:
                while True:
                    commands = self._commands()
                    now = time.monotonic()
                    if commands:
                        heard = now
                    if commands is None or now - heard > SILENCE_SECONDS:
                        return EXIT_OUR_FAULT
                    for command in commands:
                        if "end" in command:
                            return EXIT_DONE
                        self._answer(command)
                    if now - beaten > BEAT_SECONDS:
                        beaten = now
                        self._say({"beat": True}, patient=False)
                    if self._job is not None:
                        for number in came[passed:]:  # Slurm tells each process of a step
                            self._job.signal(number)
                        passed = len(came)
                        if (outcome := self._job.poll()) is not None:
                            self._job.close()
                            self._job = None
                            self._say({"ended": asdict(outcome)})
        finally:
            if self._job is not None:
                self._job.close()

    def _commands(self) -> list[dict[str, Any]] | None:
        """What came in a moment; None: the connection is closed."""
        if not select.select([0], [], [], POLL_SECONDS)[0]:
            return []
        content = os.read(0, 2**16)
        if not content:
            return None
        *lines, self._pending = (self._pending + content).split(b"\n")
        return [json.loads(line) for line in lines]

    def _say(self, answer: dict[str, Any], patient: bool = True) -> None:
        """Answer; a beat for which there is no room is left out, so that the agent never waits for a lost front end."""
        if not patient and not select.select([], [1], [], 0)[1]:
            return
        with suppress(BrokenPipeError):  # the end of stdin says the same
            os.write(1, f"{MARK}{json.dumps(answer)}\n".encode())

    def _answer(self, command: dict[str, Any]) -> None:
        match command:
            case {"hello": {"name": name, "names": names}}:
                self._say({"hello": self._introduction(name, names)})
            case {"start": job}:
                self._job = HostJob(**job)
            case {"signal": number} if self._job is not None:
                self._job.signal(number)
            case {"fail": _} if self._job is not None:
                self._job.fail()
            case {"check": environment}:
                os.environ.update(environment)
                self._say({"checked": check()})
            case {"listen": address}:
                listening = socket.create_server((address, 0))
                threading.Thread(target=give_back, args=(listening,), daemon=True).start()
                self._say({"listening": listening.getsockname()[1]})
            case {"ping": {"host": host, "address": address, "port": port}}:
                self._say({"pinged": {"host": host, **ping(address, port)}})

    def _introduction(self, name: str, names: list[str]) -> dict[str, Any]:
        told: dict[str, Any] = {"facts": hosts.facts(), "clock": time.time(), "interfaces": hosts.interfaces()}
        try:
            network = hosts.network(name, names)
            wanted = os.environ.get("GLOO_SOCKET_IFNAME")
            told |= {"network": asdict(network), "port": hosts.free_port(network.address), "wanted": wanted}
        except (UserError, OSError) as error:
            told["problem"] = str(error)
        return told


def give_back(listening: socket.socket) -> None:
    """Return to other hosts what they send."""
    while True:
        connection, _ = listening.accept()
        with connection, suppress(OSError):
            connection.settimeout(PING_SECONDS)
            while content := connection.recv(2**16):
                connection.sendall(content)


def ping(address: str, port: int) -> dict[str, Any]:
    """Round trip of a byte and throughput of a megabyte to another host's agent, or what is wrong."""
    try:
        with socket.create_connection((address, port), timeout=PING_SECONDS) as connection:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            trips = [_echo(connection, 1) for _ in range(5)]
            seconds = _echo(connection, 2**20)
    except OSError as error:
        return {"problem": str(error)}
    return {"milliseconds": 1000 * min(trips), "megabytes_per_second": 2 / seconds}


def _echo(connection: socket.socket, size: int) -> float:
    """Send so many bytes and get them back, in pieces that fit into the buffers of both sides."""
    start, piece = time.perf_counter(), b"\0" * min(size, 2**14)
    for _ in range(0, size, len(piece)):
        connection.sendall(piece)
        missing = len(piece)
        while missing:
            got = len(connection.recv(missing))
            if not got:
                raise OSError("the connection was closed")
            missing -= got
    return time.perf_counter() - start


def check() -> dict[str, Any]:
    """What `doctor --hosts` wants to know of a host besides its versions and its network."""
    from trainer import doctor

    lines: list[str] = []
    return {"problems": doctor.run(doctor.CHECKS, lines.append), "lines": lines}


def main() -> int:
    return Agent().run()
