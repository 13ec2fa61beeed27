"""The hosts of a job: the file that names them, what each of them is like, and whether they are alike."""

import fcntl
import hashlib
import logging
import os
import platform
import re
import secrets
import socket
import struct
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from trainer.doctor import requirements
from trainer.errors import UserError
from trainer.launch import HostJob

PORT = 29400
"""Where the ranks meet on the first host if every host is started by hand and MASTER_PORT is not set."""
SOURCES = ("trainer", "recipes", "kernels", "configs")
PROJECT = Path(__file__).resolve().parent.parent  # as in trainer.config, which imports pydantic
SIOCGIFADDR = 0x8915

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Host:
    """A line of a hosts file."""

    name: str
    slots: int


def read_hosts(path: Path) -> list[Host]:
    """Hosts of a file in DeepSpeed's format: `name slots=N` a line, # starts a comment.

    Raises:
        UserError: no such file, a line of another form, or a host twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"--hosts {path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--hosts {path}: is no text in UTF-8; wanted a line `HOST slots=N` for each host") from error
    hosts: list[Host] = []
    for number, line in enumerate(lines, 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([^\s-]\S*)(?:\s+slots=(\d+))?", text)  # ssh would take -o... for an option
        if match is None or match[2] == "0":
            raise UserError(f"{path}:{number}: {line!r}: wanted `HOST slots=N`")
        if match[1] in [host.name for host in hosts]:
            raise UserError(f"{path}:{number}: names {match[1]} again; write one line with all its slots")
        hosts.append(Host(match[1], int(match[2] or 1)))
    if not hosts:
        raise UserError(f"{path}: names no host; write a line `HOST slots=N` for each")
    return hosts


def check_node(path: Path, hosts: Sequence[Host], node: int) -> None:
    """Whether a file has such a line.

    Raises:
        UserError: it has not.
    """
    if not 0 <= node < len(hosts):
        raise UserError(f"--node {node}: {path} names {len(hosts)} hosts, wanted 0 to {len(hosts) - 1}")


def by_hand(arguments: list[str], hosts: Sequence[Host], node: int, say: Callable[[str], None]) -> HostJob:
    """The part of one host, where every host is started by a person or another program.

    Raises:
        UserError: the others cannot be reached from here, or the port is none or taken.
    """
    own, port = hosts[node], master_port(PORT)
    try:
        there = network(own.name, [host.name for host in (hosts[:1] if node else hosts)])
        if not node:
            socket.create_server(("", int(port))).close()
    except UserError as error:
        raise UserError(f"--node {node}: {error}") from error
    except OSError as error:
        raise UserError(
            f"MASTER_PORT={port}: {os.strerror(error.errno or 0)}; set another one on every host"
        ) from error
    environment = {"MASTER_ADDR": hosts[0].name if node else there.address, "MASTER_PORT": port}
    environment["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", there.interface)
    say(f"host {node} of {len(hosts)} ({own.name}): meets the others at {hosts[0].name}, port {port}")
    first = sum(h.slots for h in hosts[:node])
    return HostJob(arguments, own.slots, first, sum(h.slots for h in hosts), environment)


# What a host is like


def code_version() -> str:
    """Digest of the project's sources and configurations."""
    digest = hashlib.sha256()
    for folder in SOURCES:
        for path in sorted((PROJECT / folder).rglob("*")):
            if path.suffix in (".py", ".yaml", ".cpp", ".h") and path.is_file():
                digest.update(f"{path.relative_to(PROJECT)}\0".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def facts() -> dict[str, str]:
    """What must be the same on every host of a run."""
    found = {"Python": platform.python_version()}
    for name in ("ostinato", *requirements()):
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return {**found, "project": str(PROJECT), "code": code_version(), "working directory": os.getcwd()}


def differences(found: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """For each fact in which hosts differ, those that differ from the others.

    Args:
        found: (host, facts) of each.
    """
    lines = []
    for name in dict.fromkeys(name for _, facts in found for name in facts):
        values = {host: facts.get(name, "missing") for host, facts in found}
        (common, number), *_ = Counter(values.values()).most_common(1)
        odd = {host: value for host, value in values.items() if value != common}
        same = [host for host, value in values.items() if value == common]
        others = "all others" if number > 1 else same[0]
        if odd:
            told = ", ".join(f"{host} has {value}" for host, value in sorted(odd.items())[:8])
            lines.append(f"{name}: {told}; {others} {'have' if number > 1 else 'has'} {common}")
    return lines


def compare(found: Sequence[tuple[str, Mapping[str, str]]]) -> None:
    """Refuse hosts that differ from the others; for the argument see `differences`.

    Raises:
        UserError: some do.
    """
    if lines := differences(found):
        raise UserError(
            "the hosts are not alike:\n  "
            + "\n  ".join(lines)
            + "\nstart all of them from one folder and environment that they share, or install the same on each"
        )


def check_alike(folder: Path) -> None:
    """Compare the hosts of all ranks, and whether they see the same files; every rank calls it.

    Args:
        folder: the run directory, there on rank 0.

    Raises:
        UserError: they differ; on every rank alike.
    """
    from trainer import distributed

    host = socket.gethostname()
    own = None
    if distributed.is_first_of_host():
        settings = {name: value for name, value in os.environ.items() if name.startswith("DS_")}
        own = facts() | settings, {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "not set")}
    found = [(name, each) for name, each in distributed.gather((host, own)) if each is not None]
    compare([(name, wanted) for name, (wanted, _) in found])
    for line in differences([(name, usual) for name, (_, usual) in found]):  # hosts may have more cores than others
        if distributed.is_first():
            log.warning("%s; the slower ones hold up the others", line)
    token = folder / f".seen-{distributed.from_first(secrets.token_hex(4))}"
    distributed.on_first(token.touch)
    seen = distributed.gather((host, token.exists()))
    distributed.on_first(token.unlink)
    if blind := sorted({name for name, sees in seen if not sees}):
        raise UserError(
            f"{folder}: {', '.join(blind)} cannot see what {seen[0][0]} writes there; set runs_dir= to a folder that "
            "all hosts share"
        )


# The network


def master_port(default: int) -> str:
    """MASTER_PORT, or the default.

    Raises:
        UserError: it is no port.
    """
    port = os.environ.get("MASTER_PORT", str(default))
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
        raise UserError(f"MASTER_PORT={port}: wanted the number of a port, 1 to 65535")
    return port


@dataclass(frozen=True)
class Network:
    """How a host is reached by the others."""

    interface: str
    address: str


def network(own: str, names: Sequence[str]) -> Network:
    """The interface through which this host reaches the others.

    The name of a host is often one of its loopback addresses (127.0.1.1 in Debian), at which nobody else finds it:
    the route to another host tells the truth.

    Args:
        own: name of this host in the file.
        names: of all hosts.

    Raises:
        UserError: a name is unknown here, or there is no route.
    """
    others = [name for name in names if name != own] or [own]
    problems = []
    for other in others:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            try:
                probe.connect((other, PORT))  # a datagram socket: nothing is sent
            except OSError as error:
                problems.append(f"cannot reach {other}: {error.strerror or error}")
                continue
            address = probe.getsockname()[0]
        for name, own_address in interfaces().items():
            if address == own_address:
                return Network(name, address)
        problems.append(f"reaches {other} from {address}, which is no address of its interfaces")
    raise UserError("; ".join(problems[:3]))


def _address(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
        packed = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        return socket.inet_ntoa(packed[20:24])
    return None


def interfaces() -> dict[str, str]:
    """Address of each interface that has one."""
    return {name: address for _, name in socket.if_nameindex() if (address := _address(name)) is not None}


def free_port(address: str) -> int:
    """A port of this host that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((address, 0))
        port: int = probe.getsockname()[1]
        return port
