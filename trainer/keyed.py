"""Randomness from keys, never from a running state.

What is random about a sample is a function of (seed, epoch, sample, name), what is random about a step of (seed,
step, name). So a batch may be split, merged, moved to another rank or recomputed, and a resumed run has no generator
to restore. Keys are mixed with splitmix64 (Steele, Lea & Flood 2014), which is the same on every platform and version,
unlike `hash()` or the streams of a library's generator.
"""

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX1 = 0xBF58476D1CE4E5B9
_MIX2 = 0x94D049BB133111EB


def key(*parts: int | str) -> int:
    """A 63-bit key that names the parts, e.g. `key(seed, epoch, "an4-7", "speed")`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def number(*parts: int | str) -> float:
    """A number in [0, 1) that the parts name."""
    return (key(*parts) >> 10) * 2.0**-53


def mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Scramble 64-bit integers one to one: the finaliser of splitmix64."""
    with np.errstate(over="ignore"):
        z = values + np.uint64(_GOLDEN)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(_MIX1)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(_MIX2)
        return z ^ (z >> np.uint64(31))


def hashes(keys: NDArray[np.uint64], *parts: int | str) -> NDArray[np.uint64]:
    """One uniform 64-bit number for each key, another one for each `parts`."""
    return mix(keys ^ np.uint64(key(*parts)))


def uniform(keys: NDArray[np.uint64], *parts: int | str) -> NDArray[np.float64]:
    """One number in [0, 1) for each key."""
    return (hashes(keys, *parts) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def table(keys: NDArray[np.int64], count: int, *parts: int | str) -> NDArray[np.float64]:
    """`count` numbers in [0, 1) for each key, a row each."""
    rows = hashes(keys.astype(np.uint64), *parts)[:, None]
    columns = mix(np.arange(count, dtype=np.uint64))
    return (mix(rows ^ columns) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(count: int, *parts: int | str) -> NDArray[np.int64]:
    """An order of 0 .. count - 1 that depends on `parts` only."""
    return np.argsort(hashes(np.arange(count, dtype=np.uint64), *parts), kind="stable")


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator seeded by its name."""
    return torch.Generator().manual_seed(key(*parts))


def fold(keys: Tensor, name: str) -> list[int]:
    """The seeds of one layer for each sample of a batch: keys (B,) int64 -> B integers."""
    return [key(k, name) for k in keys.tolist()]
