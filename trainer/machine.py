"""What a run ran on: processor, commit and versions, kept in its checkpoints and shown in its report."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from trainer.config import PROJECT

PACKAGES = ("ostinato", "torch", "torchaudio", "deepspeed", "webdataset", "wandb", "numpy", "pydantic")


def describe() -> dict[str, str]:
    """Facts by name, in the order in which they are shown."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "processor": f"{_cpu()}, {len(os.sched_getaffinity(0))} cores",
        "GPU": ", ".join(gpus) or "none",
        "commit": _commit(),
        "python": platform.python_version(),
        **{name: _version(name) for name in PACKAGES},
    }


def _commit() -> str:
    if not (PROJECT / ".git").exists():  # an installed copy may lie inside someone else's checkout
        return "not a checkout"
    try:
        options: dict[str, Any] = {"cwd": PROJECT, "capture_output": True, "text": True, "timeout": 10, "check": True}
        commit = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], **options).stdout.strip()
        dirty = subprocess.run(["git", "status", "--porcelain", "-uno"], **options).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return "unknown: git does not answer"
    return commit + ("+dirty" if dirty else "")


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
