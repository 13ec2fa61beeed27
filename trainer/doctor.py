"""Checks of a machine: each says what is wrong and the cure. Nothing here reaches the network."""

import importlib
import io
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from trainer.config import PROJECT

PACKAGES = ("torch", "torchaudio", "deepspeed", "webdataset", "wandb", "soundfile", "pydantic", "kaldialign")
OURS = ("kernels", "trainer", "recipes")
MIN_SHARED_MEGABYTES = 64
MIN_DISK_GIGABYTES = 1.0


class Problem(Exception):
    """Something that would break a run; the text says what and the cure."""


@dataclass(frozen=True)
class Check:
    """A named question; `ask` returns a fact or raises."""

    name: str
    ask: Callable[[], str]


def packages() -> str:
    """Every dependency imports."""
    found = []
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed would warn that it found no other
    for name in PACKAGES:
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a broken binary package fails in any way it likes
            raise Problem(
                f"{name} does not import ({error}); install the pair that is known to work in a fresh environment: "
                "torch==2.14.1 torchaudio==2.11.0"
            ) from error
        found.append(f"{name} {getattr(module, '__version__', '?')}")
    return f"Python {platform.python_version()}, " + ", ".join(found)


def audio() -> str:
    """FLAC is encoded, decoded and resampled; importing alone proves nothing."""
    import numpy as np
    import soundfile
    import torch
    import torchaudio

    wave = (np.sin(np.arange(1600) / 10) / 2).astype(np.float32)
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16000, format="FLAC", subtype="PCM_16")
    back, rate = soundfile.read(io.BytesIO(buffer.getvalue()), dtype="float32")
    if rate != 16000 or abs(back - wave).max() > 1e-3:
        raise Problem("soundfile decodes FLAC wrongly; reinstall it: pip install --force-reinstall soundfile")
    half = torchaudio.functional.resample(torch.from_numpy(back), 16000, 8000)
    if len(half) != 800:
        raise Problem(f"torchaudio resamples 1600 samples to {len(half)}, wanted 800; reinstall torch and torchaudio")
    return f"FLAC decodes (libsndfile {soundfile.__libsndfile_version__}), torchaudio resamples"


GROUP = """
import torch
from trainer import distributed
from trainer.optim import AdamWConfig
from trainer.distributed import Trained, ZeroConfig
ranks = distributed.start(timeout_seconds=60)
total = distributed.sum_over_ranks(torch.tensor([ranks.rank + 1.0]))
assert float(total) == 3.0, total
for stage in (0, 1):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    before = net.weight.detach().clone()
    trained = Trained(net, ZeroConfig(stage=stage), AdamWConfig(), "fp32", 1)
    trained.backward(trained.model(torch.ones(2, 4)).sum())
    assert trained.step().applied
    assert not torch.equal(before, trained.full("weight")["weight"])
distributed.stop()
"""


def process_group() -> str:
    """Two processes meet, add numbers, and DeepSpeed takes a step at ZeRO 0 and 1."""
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {
            "WORLD_SIZE": "2",
            "OSTINATO_STORE": f"{folder}/store",
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
            "PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")]),
        }
        ranks = [
            subprocess.Popen(
                [sys.executable, "-c", GROUP],
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            for rank in range(2)
        ]
        try:
            errors = [rank.communicate(timeout=90)[1].decode(errors="replace") for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise Problem(
                "two processes did not finish in 90 s; does the loopback interface `lo` exist and is it up?"
            ) from error
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
    for rank, text in zip(ranks, errors, strict=True):
        if rank.returncode:
            last = text.strip().splitlines()[-1:] or ["no message"]
            raise Problem(f"two processes could not train together: {last[0]}; reinstall deepspeed and torch")
    return "two processes meet over gloo; DeepSpeed steps at ZeRO 0 and 1"


def disk(folder: Path = Path("runs")) -> str:
    """A run directory can be written, and there is room."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as file:
            file.write(b"\0" * 2**20)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise Problem(
            f"{folder}/ cannot be written ({error.strerror}); set runs_dir=FOLDER on a disk you may write"
        ) from error
    free = shutil.disk_usage(folder).free / 2**30
    inodes = os.statvfs(folder).f_favail
    if free < MIN_DISK_GIGABYTES or (inodes and inodes < 1000):
        raise Problem(f"{folder}/ has {free:.1f} GiB and {inodes} inodes left; free some or set runs_dir=FOLDER")
    return f"{folder}/ is writable, {free:.0f} GiB free"


def checkpoint() -> str:
    """A checkpoint is written, verified and read back."""
    import torch

    from trainer import checkpoint as checkpoints
    from trainer import distributed
    from trainer.distributed import Slice

    distributed.start()
    try:
        with tempfile.TemporaryDirectory() as name:
            folder, values = Path(name), torch.arange(6.0)
            state = {"shapes": {"a": [6]}, "best": {}}
            checkpoints.save(folder, checkpoints.CheckpointConfig(), 1, [Slice("a", "weight", 0, values)], state)
            found = checkpoints.newest(folder)
            if found is None or not torch.equal(found.weights()["a"], values):
                raise Problem(
                    "a checkpoint that was written does not read back; check the disk of the temporary folder"
                )
    finally:
        distributed.stop()
    return "a checkpoint is written, verified and read back"


def shared_memory() -> str:
    """Loader workers hand batches over through /dev/shm."""
    path = Path("/dev/shm")
    if not path.is_dir():
        raise Problem("/dev/shm is missing; mount it, or train with num_workers=0")
    size = shutil.disk_usage(path).free / 2**20
    if size < MIN_SHARED_MEGABYTES:
        raise Problem(f"/dev/shm has {size:.0f} MiB; enlarge it (docker: --shm-size=1g) or train with num_workers=0")
    return f"/dev/shm has {size:,.0f} MiB"


def kernel_selftest() -> str:
    """Every recurrent kernel against torch's own cells."""
    import kernels

    return f"{kernels.selftest('cpu')} cases agree with torch; {kernels.explain('block_lstm')}"


def tracking() -> str:
    """W&B is optional: offline without a key."""
    from trainer.tracking import has_key

    return "W&B: a key is at hand, runs go online" if has_key() else "W&B: no key, runs stay offline (`wandb login`)"


def cores() -> str:
    """Processors this process may use."""
    usable = len(os.sched_getaffinity(0))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads and threads.isdigit() and int(threads) > usable:
        raise Problem(
            f"OMP_NUM_THREADS={threads} but {usable} cores may be used: threads would wait for each other; unset it"
        )
    quota = ""
    limit = Path("/sys/fs/cgroup/cpu.max")
    if limit.is_file():
        amount, _, period = limit.read_text(encoding="utf-8").partition(" ")
        if amount.isdigit() and int(amount) / int(period) < usable:
            quota = f", cgroup allows {int(amount) / int(period):.1f} of them"
    return f"{usable} cores{quota}, OMP_NUM_THREADS {threads or 'not set'}"


def gpus() -> str:
    """GPUs are optional."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return "GPUs: " + (", ".join(names) or "none, training runs on the CPU")


def import_names() -> str:
    """`kernels`, `trainer` and `recipes` are also the names of other packages on the index."""
    owners = metadata.packages_distributions()
    for name in OURS:
        strangers = sorted({d for d in owners.get(name, []) if d.lower() != "ostinato"})
        if strangers:
            raise Problem(
                f"the package {strangers[0]} also installs `{name}`; pip uninstall {strangers[0]}, or use an "
                "environment of its own (./launch.sh makes one in .venv)"
            )
        origin = getattr(importlib.import_module(name), "__file__", None)
        if origin is None or PROJECT not in Path(origin).resolve().parents:
            raise Problem(f"`import {name}` finds {origin}, not this project; start through ./launch.sh")
    return f"{', '.join(OURS)} are this project's"


def corpus_tools() -> str:
    """The default recipe fetches a Debian package."""
    missing = [tool for tool in ("apt-get", "dpkg") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} missing: `prepare speech/read_ru` says what to fetch by hand"
    return "apt-get and dpkg are there for the default corpus"


CHECKS = (
    Check("packages", packages),
    Check("import names", import_names),
    Check("audio", audio),
    Check("kernels", kernel_selftest),
    Check("processes", process_group),
    Check("disk", disk),
    Check("checkpoint", checkpoint),
    Check("shared memory", shared_memory),
    Check("cores", cores),
    Check("GPU", gpus),
    Check("tracking", tracking),
    Check("default corpus", corpus_tools),
)


def run(checks: Iterable[Check], say: Callable[[str], None]) -> int:
    """Ask every check, a line each.

    Returns:
        number of problems.
    """
    problems = 0
    for check in checks:
        try:
            say(f"ok       {check.name}: {check.ask()}")
        except Exception as error:  # a broken environment breaks in any way; the other checks still run
            problems += 1
            text = str(error) if isinstance(error, Problem) else f"{type(error).__name__}: {error}"
            say(f"PROBLEM  {check.name}: {text}")
    return problems
