"""The data of an R package without R: the files Rdata.rdx and Rdata.rdb of its folder `data`.

The first lists where each object lies in the second, compressed on its own; both hold R's serialisation in its binary
(XDR) form. Vectors of texts and numbers, lists and their names are read; what else there may be is refused.

Source: R Internals, section 1.8 (serialisation) and 1.2 (lazy loading).
"""

import struct
import zlib
from pathlib import Path
from typing import Any

_NIL, _REFERENCE = 254, 255
_SYMBOL, _PAIRS, _CHARACTERS, _LIST = 1, 2, 9, 19
_LOGICALS, _INTEGERS, _REALS, _TEXTS = 10, 13, 14, 16
_HAS_ATTRIBUTES, _HAS_TAG, _LATIN1 = 0x200, 0x400, 1 << (12 + 2)


class RDataError(ValueError):
    """Bytes that are no serialisation, or hold something that is not read here."""


class _Reader:
    def __init__(self, content: bytes) -> None:
        self.content, self.place = content, 0
        self.symbols: list[str] = []

    def take(self, count: int) -> bytes:
        part = self.content[self.place : self.place + count]
        if count < 0 or len(part) != count:
            raise RDataError(f"cut short at byte {self.place}")
        self.place += count
        return part

    def integer(self) -> int:
        return int.from_bytes(self.take(4), "big", signed=True)

    def numbers(self, code: str, size: int) -> list[Any]:
        count = self.integer()
        return list(struct.unpack(f">{count}{code}", self.take(size * count)))

    def header(self) -> None:
        if self.take(2) != b"X\n":
            raise RDataError("is not in R's binary form")
        version, _, _ = self.integer(), self.integer(), self.integer()
        if version == 3:
            self.take(self.integer())  # name of an encoding
        elif version != 2:
            raise RDataError(f"version {version} of R's serialisation, wanted 2 or 3")

    def item(self) -> Any:
        """The next object: None, a text, a list, or where it has names a dict."""
        flags = self.integer()
        kind = flags & 0xFF
        if kind == _NIL:
            return None
        if kind == _REFERENCE:
            number = flags >> 8 or self.integer()
            return self.symbols[number - 1]
        if kind == _SYMBOL:
            self.symbols.append(self.item())
            return self.symbols[-1]
        if kind == _CHARACTERS:
            length = self.integer()
            return None if length < 0 else self.take(length).decode("latin-1" if flags & _LATIN1 else "utf-8")
        if kind == _PAIRS:
            return self._pairs(flags)
        if kind == _REALS:
            values = self.numbers("d", 8)
        elif kind in (_LOGICALS, _INTEGERS):
            values = self.numbers("i", 4)
        elif kind in (_TEXTS, _LIST):
            values = [self.item() for _ in range(self.integer())]
        else:
            raise RDataError(f"holds an object of type {kind}, which is not read here")
        names = (self.item() or {}).get("names") if flags & _HAS_ATTRIBUTES else None
        return dict(zip(names, values, strict=True)) if names else values

    def _pairs(self, flags: int) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while flags & 0xFF == _PAIRS:
            if flags & _HAS_ATTRIBUTES:
                self.item()
            tag = self.item() if flags & _HAS_TAG else str(len(found))
            found[tag] = self.item()
            flags = self.integer()
        if flags & 0xFF != _NIL:
            raise RDataError(f"a list that ends with an object of type {flags & 0xFF}")
        return found


def parse(content: bytes) -> Any:
    """One object from R's serialisation, packed (gzip, zlib) or not.

    Raises:
        RDataError: it is none, is damaged, or is of a kind that is not read here.
    """
    if content[:2] == b"\x1f\x8b" or content[:1] == b"\x78":
        try:
            content = zlib.decompress(content, 47)
        except zlib.error as error:
            raise RDataError(f"cannot be unpacked: {error}") from error
    reader = _Reader(content)
    try:
        reader.header()
        return reader.item()
    except (IndexError, UnicodeDecodeError, AttributeError, TypeError, ValueError) as error:
        raise error if isinstance(error, RDataError) else RDataError(f"is damaged: {error}") from error


def read_package(folder: Path) -> dict[str, Any]:
    """The data objects of an installed R package by name.

    Args:
        folder: `data` of the package.

    Raises:
        RDataError: the files are damaged, or of a kind that is not read here.
        OSError: there are none.
    """
    listed = parse((folder / "Rdata.rdx").read_bytes())
    content = (folder / "Rdata.rdb").read_bytes()
    if not isinstance(listed, dict) or not isinstance(listed.get("variables"), dict):
        raise RDataError("Rdata.rdx lists no variables")
    # Each object: its unpacked size in four bytes, then a zlib stream.
    return {name: parse(content[start + 4 : start + size]) for name, (start, size) in listed["variables"].items()}
