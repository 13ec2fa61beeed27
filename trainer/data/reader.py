"""Bytes of shards by offset, with a bounded number of files held open."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FILES_OPEN = 64
"""Shards that a process holds open: a window and its neighbours, far below the 1,024 files that a process often may."""


class ShardReader:
    """Reads pieces of shards. A forked process inherits open files, which is harmless: `pread` moves no position.

    Args:
        shards: paths by number.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = shards
        self._open: OrderedDict[int, int] = OrderedDict()  # number of the shard -> descriptor, the last used one last

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer where the shard ends before.

        Raises:
            OSError: it cannot be opened or read.
        """
        if shard in self._open:
            self._open.move_to_end(shard)
        else:
            if len(self._open) >= FILES_OPEN:
                os.close(self._open.popitem(last=False)[1])
            self._open[shard] = os.open(self.shards[shard], os.O_RDONLY | os.O_CLOEXEC)
        return os.pread(self._open[shard], size, offset)

    def close(self) -> None:
        """Close all files."""
        while self._open:
            os.close(self._open.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()
