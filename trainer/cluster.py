"""The front end of a job on several hosts: one connection to each, at whose other end is an agent.

Whatever happens to the front end, to a connection or to a host, both sides notice within `SILENCE_SECONDS`, and each
ends what is its own. Why not DeepSpeed's launcher: docs/decisions/0007-one-connection-a-host.md.
"""

import json
import os
import select
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from trainer import hosts
from trainer.agent import BEAT_SECONDS, MARK, SILENCE_SECONDS, environment_to_pass
from trainer.errors import EXIT_OUR_FAULT, EXIT_REQUEUE, EXIT_USER_MISTAKE, UserError
from trainer.hosts import Host
from trainer.launch import SHOWN, Outcome
from trainer.signals import SAME_SECONDS

CONNECT_SECONDS = 10
"""Time that ssh has for a connection."""
INTRODUCTION_SECONDS = 60.0
"""Time until an agent has introduced itself: its environment may come from a slow disk."""
CLOSE_SECONDS = 3.0
UNREACHABLE = 255
"""Exit code of ssh that could not connect, or lost the connection."""

Connect = Callable[[str, str], list[str]]
"""(host, command for its shell) -> the command that runs it there."""


def ssh(host: str, command: str) -> list[str]:
    """By the ssh that is found first; its settings, ports and keys are in ~/.ssh/config, as ever."""
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_SECONDS,
        "ServerAliveInterval": 3,
        "ServerAliveCountMax": 3,
        "ControlPath": "none",
    }
    return ["ssh", "-T", *(f"-o{name}={value}" for name, value in options.items()), host, command]


def agent_command() -> str:
    """Starts the agent in the same folder, with the same Python and project."""
    path = os.pathsep.join(filter(None, [str(hosts.PROJECT), os.environ.get("PYTHONPATH", "")]))
    words = ["env", f"PYTHONPATH={path}", "PYTHONSAFEPATH=1", sys.executable, "-m", "trainer", "host"]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join(words)}"


class Link:
    """The connection to the agent of one host.

    Args:
        host: whose.
        connect: how.
        names: of all hosts, as they are in the file.

    Raises:
        UserError: this host has no program for it.

    Attributes:
        answers: that came and were not used yet.
        heard: when something came last (`time.monotonic()`).
        closed: no more will come.
    """

    def __init__(self, host: Host, connect: Connect, names: Sequence[str]) -> None:
        self.host = host
        command = connect(host.name, agent_command())
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                start_new_session=True,  # Ctrl-C is for the front end, which passes it on
            )
        except FileNotFoundError as error:
            raise UserError(f"{command[0]} is needed to reach {host.name}, and is not in PATH here") from error
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._stdin, self._stdout, self._stderr = (
            s.fileno() for s in (self._process.stdin, self._process.stdout, self._process.stderr)
        )
        for stream in (self._stdin, self._stdout, self._stderr):
            os.set_blocking(stream, False)
        self._pending, self._unsent = b"", b""
        self._said = b""  # the end of what was said on stderr
        self._open = {self._stdout, self._stderr}
        self.answers: list[dict[str, Any]] = []
        self.heard = time.monotonic()
        self.closed = False
        self._sending, self._over = threading.Lock(), threading.Event()
        # Beats go out also while this process cannot write to a terminal that somebody has paused.
        threading.Thread(target=self._beat, daemon=True).start()
        self.send({"hello": {"name": host.name, "names": list(names)}})

    def send(self, command: dict[str, Any]) -> None:
        """Give a command; what does not fit into the connection now is sent later."""
        self._flush(json.dumps(command).encode() + b"\n")

    def _flush(self, more: bytes = b"") -> None:
        with self._sending, suppress(OSError):  # it is full, or closed, which shows on the other streams
            self._unsent += more
            while self._unsent and not self._over.is_set():
                self._unsent = self._unsent[os.write(self._stdin, self._unsent) :]

    def _beat(self) -> None:
        while not self._over.wait(BEAT_SECONDS):
            self._flush(b"" if self._unsent else b'{"beat": true}\n')

    def turn(self) -> None:
        """Read what came; what is not for us goes where the user reads."""
        if not self._open:
            return
        self._flush()
        while self._open and (ready := select.select(list(self._open), [], [], 0)[0]):
            for stream in ready:
                content = os.read(stream, 2**16)
                if not content:
                    self._open.discard(stream)
                elif stream == self._stderr:
                    self._said = (self._said + content)[-2000:]
                    _pass_on(2, content)
                else:
                    self.heard = time.monotonic()
                    self._take(content)
        self.closed = self._stdout not in self._open

    def _take(self, content: bytes) -> None:
        text, *records = (self._pending + content).split(MARK.encode())
        self._pending = b""
        _pass_on(1, text)
        for i, record in enumerate(records):
            line, newline, text = record.partition(b"\n")
            if not newline and i == len(records) - 1:  # its end has not come yet
                self._pending = MARK.encode() + record
                return
            self.answers.append(json.loads(line))
            _pass_on(1, text)

    def answer(self, name: str) -> Any:
        """The first answer of a name, once; None: there is none yet."""
        for number, answer in enumerate(self.answers):
            if name in answer:
                return self.answers.pop(number)[name]
        return None

    @property
    def silent(self) -> bool:
        return time.monotonic() - self.heard > SILENCE_SECONDS

    def why_closed(self) -> tuple[int | None, str]:
        """Exit code of the connection and what was said last."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(CLOSE_SECONDS)
        lines = self._said.decode(errors="replace").strip().splitlines()
        return self._process.poll(), lines[-1] if lines else "no message"

    def close(self, patience: float = 0.0) -> None:
        """Close the connection, upon which the agent ends what is left there."""
        self.send({"end": True})
        self._over.set()
        with self._sending, suppress(OSError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(patience)
        self._process.kill()
        self._process.wait()
        self._open.clear()
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def _pass_on(stream: int, content: bytes) -> None:
    while content:
        content = content[os.write(stream, content) :]


class Cluster:
    """One attempt on several hosts.

    Args:
        arguments: a verb and what follows it.
        named: all hosts of the job.
        connect: how they are reached.
        min_hosts: go on with so many if the others do not answer; None: with all.
        again: this is not the first attempt: a host that does not answer is a fault, no mistake in the file.
    """

    def __init__(
        self,
        arguments: list[str],
        named: Sequence[Host],
        connect: Connect,
        min_hosts: int | None,
        say: Callable[[str], None],
        again: bool,
    ) -> None:
        self._arguments, self._say, self._again = arguments, say, again
        self._least = len(named) if min_hosts is None else min(min_hosts, len(named))
        self._until = time.monotonic() + INTRODUCTION_SECONDS
        self._links = [Link(host, connect, [h.name for h in named]) for host in named]
        self._introduced: dict[int, dict[str, Any]] = {}
        self._away: dict[int, str] = {}
        """Hosts that did not answer, and why."""
        self._running = False
        self._outcomes: dict[int, Outcome] = {}
        self._lost: dict[int, str] = {}
        self._failing = False
        self._wait_until = 0.0
        self._signals: list[int] = []
        self._signalled: float | None = None

    def poll(self) -> Outcome | None:
        for link in self._links:
            link.turn()
        return self._work() if self._running else self._gather()

    # Until all hosts have answered

    def _gather(self) -> Outcome | None:
        if self._signals:
            return Outcome(EXIT_REQUEUE)  # nothing was begun
        for number, link in enumerate(self._links):
            if number in self._introduced or number in self._away:
                continue
            if (told := link.answer("hello")) is not None:
                self._introduced[number] = told
            elif link.closed:
                code, said = link.why_closed()
                if code != UNREACHABLE and not self._again:  # it was reached, and something there is wrong
                    raise UserError(
                        f"host {link.host.name}: the agent cannot be started in {os.getcwd()} with {sys.executable} "
                        f"(exit code {code}: {said}); all hosts need the same folder and environment at that place"
                    )
                self._away[number] = said
            elif time.monotonic() > self._until:
                self._away[number] = f"no answer in {INTRODUCTION_SECONDS:g} s"
        if len(self._introduced) + len(self._away) < len(self._links):
            return None
        return self._start()

    def _start(self) -> Outcome | None:
        told = "; ".join(f"{self._links[n].host.name}: {why}" for n, why in sorted(self._away.items()))
        if len(self._introduced) < self._least:
            text = f"{len(self._introduced)} of {len(self._links)} hosts answer, wanted {self._least} ({told})"
            if not self._again:
                raise UserError(f"{text}; mend the hosts file or ssh, or set launch.min_hosts")
            return Outcome(EXIT_OUR_FAULT, text=text, began=False)
        if self._away:
            self._say(f"goes on without {len(self._away)} of {len(self._links)} hosts ({told})")
        links = [self._links[n] for n in sorted(self._introduced)]
        for number in self._away:
            self._links[number].close()
        introductions = [self._introduced[n] for n in sorted(self._introduced)]
        self._links = links
        self._check(introductions)
        first = introductions[0]
        world_size, first_rank = sum(link.host.slots for link in links), 0
        for link, told_here in zip(links, introductions, strict=True):
            environment = {"GLOO_SOCKET_IFNAME": told_here["network"]["interface"]} | environment_to_pass()
            environment |= {
                "MASTER_ADDR": first["network"]["address"],
                "MASTER_PORT": hosts.master_port(first["port"]),
            }
            link.send(
                {
                    "start": {
                        "arguments": self._arguments,
                        "nproc": link.host.slots,
                        "first_rank": first_rank,
                        "world_size": world_size,
                        "environment": environment,
                    }
                }
            )
            first_rank += link.host.slots
        self._running = True
        return None

    def _check(self, introductions: Sequence[dict[str, Any]]) -> None:
        named = [(link.host.name, told) for link, told in zip(self._links, introductions, strict=True)]
        hosts.compare([(name, told["facts"]) for name, told in named])
        wanted = os.environ.get("GLOO_SOCKET_IFNAME")
        lines = [f"host {name}: {told['problem']}" for name, told in named if "problem" in told]
        lines += [
            f"GLOO_SOCKET_IFNAME={wanted}: host {name} has no such interface, but {', '.join(told['interfaces'])}; "
            "unset it: each host then takes the one that reaches the others"
            for name, told in named
            if wanted and wanted not in told["interfaces"]
        ]
        if lines:
            raise UserError("\n".join(lines))

    # Until all have ended

    def _work(self) -> Outcome | None:
        for number, link in enumerate(self._links):
            if number in self._outcomes or number in self._lost:
                continue
            if (ended := link.answer("ended")) is not None:
                outcome = Outcome(**ended | {"messages": tuple(ended["messages"])})
                where = f" ({link.host.name})" if outcome.text else ""
                self._outcomes[number] = replace(outcome, text=outcome.text + where)
            elif link.closed or link.silent:
                how = "closed the connection" if link.closed else f"was not heard for {SILENCE_SECONDS:g} s"
                self._lost[number] = f"host {link.host.name} {how}"
                # What is left there has not heard of us for so long, too, before it ends.
                if not link.closed and self._signalled is None:
                    self._wait_until = time.monotonic() + SILENCE_SECONDS
                link.close()
            else:
                continue
            outcome_here = self._outcomes.get(number)
            failed = outcome_here is None or outcome_here.code not in (0, EXIT_REQUEUE, EXIT_USER_MISTAKE)
            if failed and not self._failing:
                self._failing = True
                for other in self._links:
                    other.send({"fail": True})
        if len(self._outcomes) + len(self._lost) < len(self._links) or time.monotonic() < self._wait_until:
            return None
        return self._sum_up()

    def _sum_up(self) -> Outcome:
        saved = max((o.saved for o in self._outcomes.values()), default=-1)
        messages = tuple(dict.fromkeys(m for o in self._outcomes.values() for m in o.messages))
        if self._lost:
            step = max((o.step for o in self._outcomes.values()), default=0)
            text = self._others(list(self._lost.values()), None)
            return Outcome(EXIT_OUR_FAULT, step, saved, "", text, messages)
        failed = [o for o in self._outcomes.values() if o.code]
        if not failed:
            return replace(self._outcomes[0], saved=saved, messages=messages)
        # A reason of its own says more than a connection that broke; a signal from outside is the cause of both.
        first = min(failed, key=lambda o: (o.code != EXIT_USER_MISTAKE, o.code < 128, not o.error))
        return replace(first, saved=saved, messages=messages, text=self._others([first.text], first))

    def _others(self, texts: list[str], first: Outcome | None) -> str:
        """A text for the user, and what the other hosts had to say."""
        return "; ".join([*texts, *(o.text for o in self._outcomes.values() if o is not first and o.text)][: 2 * SHOWN])

    def signal(self, number: int) -> None:
        now = time.monotonic()
        self._signals.append(number)
        self._signalled = self._signalled or now
        for link in self._links:
            link.send({"signal": number})
        if now - self._signalled > SAME_SECONDS:  # what does not answer in a moment is left to its agent
            for index, link in enumerate(self._links):
                if index not in self._outcomes:
                    link.heard = min(link.heard, now - SILENCE_SECONDS + CLOSE_SECONDS)

    def close(self) -> None:
        for link in self._links:
            link.send({"end": True})
        until = time.monotonic() + CLOSE_SECONDS
        for link in self._links:
            link.close(max(0.0, until - time.monotonic()))
