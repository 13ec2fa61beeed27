"""How much memory a piece of work takes: of this process on a CPU, of the device on a GPU."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

T = TypeVar("T")


def status(name: str, pid: int | None = None) -> int:
    """A line of /proc/PID/status in bytes, e.g. VmRSS (held now) or VmHWM (the most); 0 where the process has ended."""
    try:
        lines = Path(f"/proc/{pid or os.getpid()}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def available() -> int:
    """Bytes that this host can still give (Linux's MemAvailable), or that its control group allows if that is less."""
    lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    try:
        most = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="utf-8"))
        return min(free, most - int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="utf-8")))
    except (OSError, ValueError):  # "max", or another kind of control group
        return free


def taken(device: torch.device, work: Callable[[], T]) -> tuple[T, int, int]:
    """Do some work: (its result, the most bytes that were held meanwhile, how many of them are new)."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_reserved(device), torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark starts anew
    before = status("VmRSS")
    result = work()
    peak = status("VmHWM")
    return result, peak, peak - before
