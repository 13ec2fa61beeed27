"""One file from elsewhere to this disk: HTTP(S), S3, or what a command prints; whole, or not at all.

A transfer that breaks is tried again with growing, random pauses (exponential back-off with full jitter, Brooker 2015)
and goes on where it stopped, as long as the server says that the object is still the same one (its ETag and length). A
part that a killed process left is gone on with in the same way. No message holds a key, a token or a command.
"""

import json
import logging
import os
import random
import re
import selectors
import shlex
import signal
import subprocess
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Any, Protocol

from trainer.errors import UserError

TRIES = 6
"""In a row without progress, then a transfer is given up; its pauses add up to about half a minute at most."""
BACK_OFF_SECONDS = 1.0
"""The pause before try n is drawn from 0 to this times 2^(n - 2)."""
LONGEST_PAUSE_SECONDS = 30.0
CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""A connection or a command that says nothing for so long counts as broken."""
BLOCK = 1 << 18
PROGRESS = 0.01
"""Share of the object that a try must bring to count as progress."""
RETRIED = {408, 425, 429, 500, 502, 503, 504}


class TransferError(Exception):
    """What was asked for did not come.

    Args:
        reason: without any secret.
        final: whether another try would not help.
        pause: seconds that the server asks to wait.
    """

    def __init__(self, reason: str, final: bool = False, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.final = final
        self.pause = pause


class ChangedError(TransferError):
    """The object is not the one whose beginning is here: it must be fetched from its start."""


@dataclass(frozen=True)
class Version:
    """What tells one state of an object from another."""

    etag: str | None = None
    size: int | None = None


@dataclass
class Answer:
    """An object, from some byte on."""

    start: int
    version: Version
    stream: IO[bytes]


class Source(Protocol):
    """A folder that is elsewhere."""

    def open(self, name: str, start: int, version: Version) -> Answer:
        """Ask for a file.

        Args:
            name: path of the file below the folder.
            start: first byte that is wanted; the answer may begin at 0 all the same.
            version: of the object whose first bytes are here already.

        Raises:
            TransferError: it cannot be had, or (ChangedError) is another one by now.
        """
        ...


def open_source(url: str) -> Source:
    """The folder that a URL of the user's configuration names.

    Raises:
        UserError: it is none that can be fetched from, or holds a secret.
    """
    if problem := wrong_url(url):
        raise UserError(f"data.remote.url = {public(url)}: {problem}")
    kind = url.partition(":")[0]
    if kind == "pipe":
        return Pipe(url.removeprefix("pipe:").strip())
    return S3(url) if kind == "s3" else Http(url)


def wrong_url(url: str) -> str | None:
    """What is wrong with the URL of a folder, with the cure; None if nothing is."""
    kind = url.partition(":")[0]
    if kind == "pipe":
        if "{}" not in url:
            return "wanted {} in the command, where the name of a file goes, as in pipe:ssh host cat /data/speech/{}"
        return None
    if kind not in ("http", "https", "s3"):
        return "wanted http://, https://, s3:// or pipe:"
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        return str(error)
    if not host:
        return "names no host" if kind != "s3" else "names no bucket"
    if parts.username is not None or parts.password is not None:
        return "holds a password, which would be saved with the run; write it into ~/.netrc instead"
    if parts.query or parts.fragment:
        return "wanted the plain address of a folder, without ? and #: a token in it would be saved with the run"
    return None


def public(url: str) -> str:
    """A URL as messages show it: of a command only that it is one, and no password or token."""
    if url.startswith("pipe:"):
        return "pipe:..."
    return re.sub(r"//[^/@]*@", "//", url.partition("?")[0].partition("#")[0])


def fetch(source: Source, name: str, target: Path, part: Path, size: int | None = None) -> int:
    """Bring a file here.

    The caller sees to it that nobody else fetches to the same place.

    Args:
        source: the folder.
        name: of the file below it.
        target: replaced once everything has come.
        part: on the same disk; what has come so far, which the next call goes on with.
        size: bytes that it must have; None where nobody knows.

    Returns:
        bytes that were transferred.

    Raises:
        TransferError: it did not come; the text says why, and after how many tries.
    """
    note = part.with_name(f"{part.name}.json")
    received = tries = failures = 0
    best = part.stat().st_size if part.exists() else 0
    while True:
        try:
            for count in _attempt(source, name, part, note, size):
                received += count
            break
        except ChangedError as error:
            part.unlink(missing_ok=True)
            failure: TransferError = error
        except OSError as error:  # of this disk: those of the network are TransferErrors
            raise TransferError(f"cannot be written: {error.strerror}") from error
        except TransferError as error:
            failure = error
        failures += 1
        have = part.stat().st_size if part.exists() else 0
        # What begins anew each time makes no progress, however much comes.
        tries = 1 if size and have - best >= PROGRESS * size else tries + 1
        best = max(best, have)
        if failure.final or tries >= TRIES:
            times = f" ({failures} tries)" if failures > 1 else ""
            if part.exists() and not part.stat().st_size:
                part.unlink()
            raise TransferError(f"{failure}{times}", final=True) from failure
        longest = min(LONGEST_PAUSE_SECONDS, BACK_OFF_SECONDS * 2 ** (tries - 1))
        time.sleep(max(random.uniform(0, longest), min(failure.pause, LONGEST_PAUSE_SECONDS)))
    try:
        os.replace(part, target)
        note.unlink(missing_ok=True)
    except OSError as error:
        raise TransferError(f"cannot be written: {error.strerror}") from error
    return received


def _attempt(source: Source, name: str, part: Path, note: Path, size: int | None) -> Iterator[int]:
    """One try: yields the size of each block that was written."""
    version = _read_note(note) if part.exists() else Version()
    start = part.stat().st_size if part.exists() and version != Version() else 0
    if start and start == version.size == (size or version.size):
        return  # a process was killed between the last byte and the new name
    answer = source.open(name, start, version)
    with _closing(answer.stream):
        wanted = answer.version.size
        if size is not None and wanted is not None and wanted != size:
            raise TransferError(f"has {wanted:,} bytes where corpus.json says {size:,}", final=True)
        wanted = size if wanted is None else wanted
        if answer.start not in (0, start):
            raise ChangedError(f"the server sent the bytes from {answer.start:,} on, not from {start:,}")
        if answer.start and answer.version != version:
            raise ChangedError("changed while it was fetched")
        note.write_text(json.dumps(asdict(answer.version)), encoding="utf-8")
        with part.open("r+b" if answer.start else "wb") as file:
            file.seek(answer.start)
            have = answer.start
            while block := _read(answer.stream):
                file.write(block)
                have += len(block)
                if wanted is not None and have > wanted:
                    file.truncate(0)
                    raise ChangedError(f"is longer than the {wanted:,} bytes it should have")
                yield len(block)
            file.flush()
            os.fsync(file.fileno())
        if wanted is not None and have < wanted:
            raise TransferError(f"the connection ended after {have:,} of {wanted:,} bytes")


def _read_note(note: Path) -> Version:
    try:
        return Version(**json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Version()


def _read(stream: IO[bytes]) -> bytes:
    try:
        return stream.read(BLOCK)
    except TransferError:
        raise
    except Exception as error:  # urllib3, botocore and ssl have a dozen of them
        raise TransferError(f"the connection broke ({_cause(error)})") from error


@contextmanager
def _closing(stream: IO[bytes]) -> Iterator[None]:
    try:
        yield
    finally:
        with suppress(Exception):
            stream.close()


def _cause(error: BaseException) -> str:
    """The kind of an error of the network, without its text, which may hold an address with a token."""
    seen: list[BaseException] = []
    queue: list[BaseException | None] = [error]
    while queue:
        found = queue.pop(0)
        if found is None or found in seen:
            continue
        seen.append(found)
        if isinstance(found, OSError) and found.strerror and found.errno:
            return found.strerror
        inside = [found.__cause__, found.__context__, getattr(found, "reason", None), *found.args]
        queue += [x for x in inside if isinstance(x, BaseException)]
    return type(seen[-1]).__name__


def _status_error(status: int, pause: str | None = None) -> TransferError:
    """What an HTTP status that is no success means."""
    names = {401: "not logged in", 403: "forbidden", 404: "not found", 410: "gone"}
    text = f"HTTP {status}" + (f" {names[status]}" if status in names else "")
    seconds = float(pause) if pause and pause.isascii() and pause.isdigit() else 0.0
    return TransferError(text, final=status not in RETRIED, pause=seconds)


def _total(content_range: str | None) -> tuple[int, int | None]:
    """`bytes 5-9/10` -> (5, 10)."""
    found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", content_range or "")
    if not found:
        raise ChangedError("the server's answer does not say which bytes it is")
    return int(found[1]), None if found[2] == "*" else int(found[2])


class Http:
    """A folder of a web server. Proxies, certificates and ~/.netrc are those of the environment, as `requests` does."""

    def __init__(self, url: str) -> None:
        import requests

        self.url = url.rstrip("/")
        self.session = requests.Session()
        for kind in ("http://", "https://"):
            self.session.mount(kind, requests.adapters.HTTPAdapter(pool_maxsize=32))

    def open(self, name: str, start: int, version: Version) -> Answer:
        import requests

        # Not compressed on the way: a range is one of the bytes that are written here.
        headers = {"Accept-Encoding": "identity"}
        if start:
            headers["Range"] = f"bytes={start}-"
            if version.etag and not version.etag.startswith("W/"):
                headers["If-Range"] = version.etag
        try:
            response = self.session.get(
                f"{self.url}/{urllib.parse.quote(name)}",
                headers=headers,
                stream=True,
                timeout=(CONNECT_SECONDS, SILENCE_SECONDS),
            )
        except (requests.exceptions.InvalidURL, requests.exceptions.TooManyRedirects) as error:
            raise TransferError(_cause(error), final=True) from error
        except requests.exceptions.RequestException as error:
            raise TransferError(f"no connection ({_cause(error)})") from error
        if response.status_code not in (200, 206):
            response.close()
            if response.status_code == 416:
                raise ChangedError("is shorter than what is here of it")
            raise _status_error(response.status_code, response.headers.get("Retry-After"))
        first, size = 0, response.headers.get("Content-Length")
        total = int(size) if size and size.isascii() and size.isdigit() else None
        if response.status_code == 206:
            first, total = _total(response.headers.get("Content-Range"))
        etag = response.headers.get("ETag") or response.headers.get("Last-Modified")
        return Answer(first, Version(etag, total), response.raw)


class S3:
    """A folder of a bucket. Keys, region and endpoint are those of the usual AWS variables and files; where there are
    no keys the bucket is asked as one that is open to all."""

    def __init__(self, url: str) -> None:
        parts = urllib.parse.urlsplit(url)
        self.bucket = parts.netloc
        self.prefix = f"{parts.path.strip('/')}/".lstrip("/")
        self.client = _s3_client()

    def open(self, name: str, start: int, version: Version) -> Answer:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError

        wanted = {"Range": f"bytes={start}-"} if start else {}
        if start and version.etag:
            wanted["IfMatch"] = version.etag
        try:
            response = self.client.get_object(Bucket=self.bucket, Key=f"{self.prefix}{name}", **wanted)
        except ClientError as error:
            status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500)
            if status in (412, 416):
                raise ChangedError("changed while it was fetched") from error
            headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
            raise _status_error(status, headers.get("retry-after")) from error
        except HTTPClientError as error:
            raise TransferError(f"no connection ({_cause(error)})") from error
        except BotoCoreError as error:
            raise TransferError(f"the settings of AWS do not do: {type(error).__name__}", final=True) from error
        first, total = 0, response.get("ContentLength")
        if response["ResponseMetadata"]["HTTPStatusCode"] == 206:
            first, total = _total(response.get("ContentRange"))
        return Answer(first, Version(response.get("ETag"), total), response["Body"])


@lru_cache(maxsize=1)
def _s3_client() -> Any:
    try:
        import botocore.session
        from botocore import UNSIGNED
        from botocore.config import Config as ClientConfig
        from botocore.exceptions import BotoCoreError
    except ImportError as error:
        raise UserError(
            "data.remote.url: s3:// needs botocore, which is not installed; run `pip install 'ostinato[remote]'`"
        ) from error
    logging.getLogger("botocore").setLevel(logging.WARNING)  # below that it writes signatures and session tokens
    session = botocore.session.get_session()
    settings = ClientConfig(
        connect_timeout=CONNECT_SECONDS,
        read_timeout=SILENCE_SECONDS,
        retries={"total_max_attempts": 1},  # `fetch` tries again
        max_pool_connections=32,
        response_checksum_validation="when_required",  # those of S3 are of whole objects, not of ranges
    )
    try:
        if session.get_credentials() is None:
            settings = settings.merge(ClientConfig(signature_version=UNSIGNED))
        return session.create_client("s3", config=settings)
    except (BotoCoreError, ValueError) as error:
        raise UserError(f"data.remote.url: the settings of AWS do not do ({type(error).__name__}): {error}") from error


class Pipe:
    """What a command prints, `{}` in it being the name of the file. It runs in bash, and it has failed if any part of
    a pipeline has. It cannot be gone on with, so each try begins anew."""

    def __init__(self, command: str) -> None:
        self.command = command

    def open(self, name: str, start: int, version: Version) -> Answer:
        command = ["bash", "-o", "pipefail", "-c", self.command.replace("{}", shlex.quote(name))]
        try:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,  # it may quote the command, and secrets with it
                start_new_session=True,
            )
        except OSError as error:
            raise TransferError(f"bash cannot be started: {error.strerror}", final=True) from error
        return Answer(0, Version(), _Output(process))  # type: ignore[arg-type]


class _Output:
    """Output of a command, as a stream that ends in an error if the command does."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self.process = process
        assert process.stdout is not None
        self.pipe = process.stdout
        self.selector = selectors.DefaultSelector()
        self.selector.register(self.pipe, selectors.EVENT_READ)

    def read(self, size: int) -> bytes:
        if not self.selector.select(SILENCE_SECONDS):
            raise TransferError(f"the command said nothing for {SILENCE_SECONDS:.0f} s")
        if block := os.read(self.pipe.fileno(), size):
            return block
        try:
            code = self.process.wait(SILENCE_SECONDS)
        except subprocess.TimeoutExpired as error:
            raise TransferError("the command closed its output and did not end") from error
        if code:
            raise TransferError(f"the command ended with code {code}; run it by hand to see why")
        return b""

    def close(self) -> None:
        self.selector.close()
        self.pipe.close()
        if self.process.poll() is None:
            with suppress(ProcessLookupError):  # also what the command has started
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
