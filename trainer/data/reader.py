"""Bytes of shards by offset, with a bounded number of files held open."""

import os
from collections import OrderedDict
from collections.abc import Sequence
from io import FileIO
from pathlib import Path
from threading import Lock

FILES_OPEN = 64
"""Shards that a process holds open: a window and its neighbours, far below the 1,024 files that a process often may."""


class ShardReader:
    """Reads pieces of shards, in any thread.

    Args:
        shards: paths by number.
    """

    def __init__(self, shards: Sequence[Path]) -> None:
        self.shards = shards
        self._lock = Lock()
        self._open: OrderedDict[int, FileIO] = OrderedDict()  # by number of the shard, the last used one last

    def read(self, shard: int, offset: int, size: int) -> bytes:
        """Up to `size` bytes; fewer where the shard ends before.

        Raises:
            OSError: it cannot be opened or read.
        """
        with self._lock:
            file = self._open.pop(shard, None) or FileIO(self.shards[shard])
            self._open[shard] = file
            if len(self._open) > FILES_OPEN:
                self._open.popitem(last=False)  # closed once no other thread reads it any more
        return os.pread(file.fileno(), size, offset)
