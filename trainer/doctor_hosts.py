"""Checks of several hosts: each of them, each pair of them, and whether they are alike."""

import time
from collections.abc import Callable, Sequence
from typing import Any

from trainer import hosts
from trainer.agent import environment_to_pass
from trainer.cluster import INTRODUCTION_SECONDS, Connect, Link
from trainer.errors import UserError
from trainer.hosts import Host
from trainer.launch import POLL_SECONDS

MAX_CLOCK_SECONDS = 2.0
"""Difference of clocks: logs of several hosts are read side by side, and so are the times of files they share."""
CHECK_SECONDS = 300.0
PAIR_SECONDS = 60.0


class Examination:
    """All hosts of a file, each behind a connection.

    Args:
        named: the hosts.
        connect: how they are reached.
        say: gets a line for everything that was found.

    Attributes:
        problems: how many were found.
    """

    def __init__(self, named: Sequence[Host], connect: Connect, say: Callable[[str], None]) -> None:
        self._say, self.problems = say, 0
        names = [host.name for host in named]
        self._links = [Link(host, connect, names) for host in named]
        self._told: dict[str, dict[str, Any]] = {}

    def run(self) -> int:
        """Ask everything.

        Returns:
            number of problems.
        """
        try:
            self._introductions()
            if self._links:
                self._alike()
                self._machines()
                self._pairs()
        finally:
            for link in self._links:
                link.close(1.0)
        return self.problems

    def _ok(self, text: str) -> None:
        self._say(f"ok       {text}")

    def _problem(self, text: str) -> None:
        self.problems += 1
        self._say(f"PROBLEM  {text}")

    def _ask(self, commands: dict[int, dict[str, Any]], answer: str, seconds: float) -> dict[int, Any]:
        """Give commands to hosts by number and wait for an answer of each; those that gave none are missing."""
        for number, command in commands.items():
            self._links[number].send(command)
        return self._collect(list(commands), answer, seconds)

    def _collect(self, numbers: Sequence[int], answer: str, seconds: float) -> dict[int, Any]:
        found: dict[int, Any] = {}
        until = time.monotonic() + seconds
        waiting = set(numbers)
        while waiting and time.monotonic() < until:
            for number in sorted(waiting):
                link = self._links[number]
                link.turn()
                if (told := link.answer(answer)) is not None:
                    found[number] = (told, time.time())
                if told is not None or link.closed:
                    waiting.discard(number)
            time.sleep(POLL_SECONDS / 5)
        return found

    def _introductions(self) -> None:
        found = self._collect(range(len(self._links)), "hello", INTRODUCTION_SECONDS)
        there = []
        for number, link in enumerate(self._links):
            name = link.host.name
            if number not in found:
                code, said = link.why_closed()
                self._problem(f"host {name}: no agent answers ({said}; exit code {code}); try `ssh {name} true`")
                link.close()
                continue
            told, received = found[number]
            there.append(link)
            self._told[name] = told
            if "problem" in told:
                self._problem(f"host {name}: {told['problem']}; mend its routes or /etc/hosts")
                continue
            offset, network = told["clock"] - received, told["network"]
            others = [f"{n} {a}" for n, a in told["interfaces"].items() if n != network["interface"]]
            text = f"host {name}: {network['interface']} {network['address']} reaches the others"
            text += f" (also there: {', '.join(others)})" if others else ""
            if abs(offset) > MAX_CLOCK_SECONDS:
                self._problem(f"host {name}: its clock is {offset:+.1f} s from that of this host; use NTP")
            else:
                self._ok(f"{text}; clock {offset:+.1f} s")
        self._links = there

    def _alike(self) -> None:
        facts = [(name, told["facts"]) for name, told in self._told.items()]
        try:
            hosts.compare(facts)
        except UserError as error:
            for line in str(error).splitlines()[1:-1]:
                self._problem(f"hosts differ: {line.strip()}; install the same on each, or share the folder")
            return
        self._ok("all hosts: " + ", ".join(f"{name} {value}" for name, value in facts[0][1].items()))

    def _machines(self) -> None:
        """The checks of `doctor` on each host; what several say alike is said once."""
        environment = environment_to_pass()  # as training would have it
        found = self._ask({n: {"check": environment} for n in range(len(self._links))}, "checked", CHECK_SECONDS)
        said: dict[str, list[str]] = {}
        for number, link in enumerate(self._links):
            if number not in found:
                self._problem(f"host {link.host.name}: its checks are not done in {CHECK_SECONDS:g} s")
                continue
            for line in found[number][0]["lines"]:
                said.setdefault(line, []).append(link.host.name)
        for line, names in said.items():
            level, text = line[:9], line[9:]
            self.problems += len(names) * level.startswith("PROBLEM")
            self._say(f"{level}{'all hosts' if len(names) == len(self._links) else ', '.join(names)}: {text}")

    def _pairs(self) -> None:
        """Each host connects to each other one, all at the same time, in rounds."""
        count = len(self._links)
        places = [self._told[link.host.name].get("network") for link in self._links]
        asked = {n: {"listen": place["address"]} for n, place in enumerate(places) if place is not None}
        ports = self._ask(asked, "listening", PAIR_SECONDS)
        for number in asked.keys() - ports.keys():
            self._problem(f"host {self._links[number].host.name}: its agent answers no more")
        trips: dict[int, list[dict[str, Any]]] = {n: [] for n in range(count)}
        for distance in range(1, count):
            commands = {}
            for number in range(count):
                other = (number + distance) % count
                if number in ports and other in ports:
                    address = {"address": places[other]["address"], "port": ports[other][0]}  # type: ignore[index]
                    commands[number] = {"ping": {"host": self._links[other].host.name, **address}}
            answers = self._ask(commands, "pinged", PAIR_SECONDS)
            for number, command in commands.items():
                name, other_name = self._links[number].host.name, command["ping"]["host"]
                told = answers[number][0] if number in answers else {"problem": "no answer"}
                if "problem" in told:
                    self._problem(
                        f"{name} -> {other_name}: {told['problem']}; processes must connect to each other on any port"
                    )
                else:
                    trips[number].append(told)
        for number, told_of in trips.items():
            if told_of:
                slowest = max(trip["milliseconds"] for trip in told_of)
                least = min(trip["megabytes_per_second"] for trip in told_of)
                self._ok(
                    f"{self._links[number].host.name} -> {len(told_of)} other host(s): {slowest:.2f} ms and "
                    f"{least:,.0f} MB/s at the worst"
                )
