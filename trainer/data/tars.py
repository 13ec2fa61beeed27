"""Webdataset tars from anywhere, whole or damaged: their members, and the samples that these make up.

A tar that was cut, also between two members, or in which some bytes have changed, gives up what is damaged and no
more, and every gap is named. The tar library stops at the first damage without a word, so the headers are read one by
one here, with its help, and after a gap they are searched for. A sample is the members with one key (the path up to
the first dot of the file's name, as webdataset has it), wherever in the tar they are: audio and text are brought
together by name alone, never by order.
"""

import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from trainer.data.text import not_text

AUDIO_ENDINGS = {"log_mel": ("flac", "wav", "mp3", "ogg", "opus"), "precomputed": ("npy",)}
"""By the kind of the features."""
TEXT_ENDINGS = ("txt", "json")
"""The first that a sample has is taken."""
BLOCK = tarfile.BLOCKSIZE
ZEROS = bytes(BLOCK)
MAGIC = slice(257, 262)
EXTENDED = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.SOLARIS_XHDTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)
MAX_EXTENDED = 6
COMPRESSED = {b"\x1f\x8b": "gunzip", b"BZh": "bunzip2", b"\xfd7zXZ": "unxz", b"\x28\xb5\x2f\xfd": "unzstd"}


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar; offset and size in bytes, of its content."""

    name: str
    offset: int
    size: int

    @property
    def key(self) -> str:
        folder, slash, name = self.name.rpartition("/")
        return f"{folder}{slash}{name.partition('.')[0]}"

    @property
    def ending(self) -> str:
        """What follows the last dot, in lower case."""
        name = self.name.rpartition("/")[2]
        return name.rpartition(".")[2].lower() if "." in name else ""


@dataclass
class Pair:
    """A sample: its sound and its text."""

    key: str
    audio: Member
    text: Member


@dataclass(frozen=True)
class Problem:
    """Something that is wrong."""

    check: str
    """Its kind, in a word or two."""
    detail: str
    key: str = ""
    """Of the sample; empty: of the shard as a whole."""


@dataclass
class Contents:
    """What a tar holds, in its order."""

    pairs: list[Pair] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)


def read_contents(path: Path, kind: str = "log_mel") -> Contents:
    """The samples of a tar, and what is wrong with it.

    Args:
        kind: of the features; of precomputed ones the "audio" of a sample is a matrix.

    Raises:
        OSError: it cannot be read.
    """
    contents = Contents()
    groups: dict[str, list[Member]] = {}
    damaged: set[str] = set()
    with path.open("rb") as file:
        for found in _members(file, contents.problems):
            if isinstance(found, Problem):
                damaged.add(found.key)
                contents.problems.append(found)
            elif found.key:  # a hidden file has none
                groups.setdefault(found.key, []).append(found)
    for key, members in groups.items():
        chosen: list[Member] = []
        for what, endings in (("audio", AUDIO_ENDINGS[kind]), ("text", TEXT_ENDINGS)):
            there = [m for m in members if m.ending in endings]
            if what == "text":
                there = [m for m in there if m.ending == "txt"] or there
            if len(there) == 1:
                chosen += there
            elif there:
                names = ", ".join(m.name for m in there)
                detail = f"{len(there)} members with {what}, and nothing says which is meant: {names}"
                contents.problems.append(Problem("pairs", detail, key))
            elif key not in damaged:
                wanted = " or ".join(f".{e}" for e in endings)
                contents.problems.append(Problem("pairs", f"no {what}: a member with the ending {wanted}", key))
        if len(chosen) == 2:
            contents.pairs.append(Pair(key, *chosen))
    if not contents.pairs and not contents.problems:
        contents.problems.append(Problem("tar", "holds no sample"))
    return contents


class _Headers(tarfile.TarFile):
    """Reads no header by itself."""

    def next(self) -> None:
        return None


def _members(file: BinaryIO, problems: list[Problem]) -> Iterator[Member | Problem]:
    """Members that are whole, and a Problem for each that is not; what concerns the tar goes to `problems`."""
    size = file.seek(0, 2)
    file.seek(0)
    start = file.read(BLOCK)
    for magic, program in COMPRESSED.items():
        if start.startswith(magic):
            problems.append(Problem("tar", f"is compressed, so nothing in it can be read by its place: {program} it"))
            return
    if not size:
        problems.append(Problem("tar", "is empty (0 bytes)"))
        return
    headers = _Headers(fileobj=file, mode="r")
    offset = zeros = 0
    while offset < size:
        file.seek(offset)
        block = file.read(BLOCK)
        if block == ZEROS:
            zeros += 1
            offset += BLOCK
            continue
        member = _header(headers, file, offset)
        if member is None or member.size < 0 or headers.offset <= offset:
            after = _next_header(headers, file, offset + BLOCK, size)
            problems.append(Problem("tar", f"{after - offset:,} bytes at {offset:,} are no part of a tar: damaged"))
            offset, zeros = after, 0
            continue
        zeros = 0
        name = _printable(member.name.removeprefix("./"))
        found = Member(name, member.offset_data, member.size)
        if member.offset_data + member.size > size:
            lost = member.offset_data + member.size - size
            if member.isreg():
                yield Problem("tar", f"{name}: cut, {lost:,} of its {member.size:,} bytes are missing", found.key)
            else:
                problems.append(Problem("tar", f"cut in the middle of {name}"))
            return
        if member.isreg() and not member.issparse():
            yield found
        elif not member.isdir():
            problems.append(Problem("tar", f"{name}: is a link or the like, which holds no content: left out"))
        offset = headers.offset
    if zeros < 2:
        problems.append(Problem("tar", "has no end mark: it was cut, or what wrote it was stopped"))


def _header(headers: tarfile.TarFile, file: BinaryIO, offset: int) -> tarfile.TarInfo | None:
    """The member that begins at a place, with what its extended headers say, or None if none does."""
    if not _chain_is_short(file, offset):
        return None
    file.seek(offset)
    headers.offset = offset
    headers.pax_headers = {}
    try:
        return tarfile.TarInfo.fromtarfile(headers)
    except (tarfile.TarError, ValueError, KeyError, IndexError, OverflowError, OSError, EOFError, RecursionError):
        return None
    except MemoryError:  # an extended header that claims to be larger than the machine
        return None


def _chain_is_short(file: BinaryIO, offset: int) -> bool:
    """Whether a member follows after few extended headers: the library follows them by recursion, however many."""
    for _ in range(MAX_EXTENDED):
        file.seek(offset)
        try:
            header = tarfile.TarInfo.frombuf(file.read(BLOCK), "utf-8", "surrogateescape")
        except (tarfile.TarError, ValueError):
            return False
        if header.type not in EXTENDED or header.size < 0:
            return True
        offset += BLOCK + -(-header.size // BLOCK) * BLOCK
    return False


def _printable(name: str) -> str:
    """A name in which what is no text, as damage leaves it, is written as escapes."""
    return "".join(c.encode("unicode_escape").decode() if not_text(c) else c for c in name)


def _next_header(headers: tarfile.TarFile, file: BinaryIO, offset: int, size: int) -> int:
    """Where the next header begins, or the end of the file."""
    file.seek(offset)
    while block := file.read(BLOCK):
        if block[MAGIC] == b"ustar":
            after = file.tell()
            if _header(headers, file, offset) is not None:
                return offset
            file.seek(after)
        offset += BLOCK
    return size


def transcript(content: bytes) -> str:
    """The text in a member: the member itself, or the field `text` of a JSON object.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    text = content.decode("utf-8-sig")
    if text.startswith("{"):
        try:
            fields: Any = json.loads(text)
        except (ValueError, RecursionError):
            return text
        if isinstance(fields, dict) and isinstance(fields.get("text"), str):
            return str(fields["text"])
    return text
