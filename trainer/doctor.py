"""Checks of a machine: each says what is wrong and the cure. Nothing here reaches the network.

Nothing but the standard library is imported before a check asks for it, so that a broken package is one line.
"""

import importlib
import io
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from trainer.launch import GPU_DEVICES

PROJECT = Path(__file__).resolve().parent.parent  # as in trainer.config, which imports pydantic
# Where the name of a package is not that of its module.
IMPORTS = {
    "pyyaml": "yaml",
    "pillow": "PIL",
    "ufal-flashlight-text": "flashlight.lib.text.decoder",
    "zlib-ng": "zlib_ng",
}
OURS = ("kernels", "trainer", "recipes")
MIN_SHARED_MEGABYTES = 64
MIN_DISK_GIGABYTES = 1.0
MIN_INODES = 1000
FRESH_CURE = "mend what is named before, or start from a fresh environment: delete .venv, ./launch.sh doctor"


class Problem(Exception):
    """Something that would break a run; the text says what and the cure."""


@dataclass(frozen=True)
class Check:
    """A named question; `ask` returns a fact or raises."""

    name: str
    ask: Callable[[], str]


def requirements() -> dict[str, str]:
    """Each package that the project needs and its oldest version, as pyproject.toml or the installation says."""
    path = PROJECT / "pyproject.toml"
    if path.is_file():
        text = path.read_text(encoding="utf-8").partition("\ndependencies = [")[2].partition("]")[0]
    else:
        text = "\n".join(line for line in metadata.requires("ostinato") or [] if "extra ==" not in line)
    return dict(re.findall(r"([A-Za-z][\w-]*)\s*>=\s*([\d.]+)", text))


def _numbers(version: str) -> tuple[int, ...]:
    """2.14.1+cpu -> (2, 14, 1)"""
    return tuple(int(n) for n in re.findall(r"\d+", re.split(r"[+a-z]", version)[0]))


def packages() -> str:
    """Every dependency imports, all in one process, and is new enough."""
    found, wrong = [], []
    if not any(Path(path).exists() for path in GPU_DEVICES):
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # deepspeed would warn that it found no other
    for name, oldest in requirements().items():
        try:
            importlib.import_module(IMPORTS.get(name, name))
            version = metadata.version(name)
        except Exception as error:  # a broken binary package fails in any way it likes
            cure = f"pip install --force-reinstall '{name}>={oldest}'"
            if name in ("torch", "torchaudio", "deepspeed"):
                cure = "install a pair that fits, e.g. torch==2.14.1 torchaudio==2.11.0, in a fresh environment"
            wrong.append(f"{name} does not import ({type(error).__name__}: {_first_line(error)}): {cure}")
            continue
        if _numbers(version) < _numbers(oldest):
            wrong.append(f"{name} {version} is older than {oldest}: pip install '{name}>={oldest}'")
        found.append(f"{name} {version}")
    if wrong:
        raise Problem("; ".join(wrong))
    return f"Python {platform.python_version()}, " + ", ".join(found)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no message"])[0]


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
from trainer.__main__ import leave
from trainer.optim import AdamWConfig
from trainer.distributed import Trained, ZeroConfig
ranks = distributed.start(timeout_seconds=60)
total = distributed.sum_over_ranks(torch.tensor([ranks.rank + 1.0]))
assert float(total) == 3.0, total
print("met", flush=True)
for stage in (0, 1):
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1)
    before = net.weight.detach().clone()
    trained = Trained(net, ZeroConfig(stage=stage), AdamWConfig(), "fp32", 1)
    trained.backward(trained.model(torch.ones(2, 4)).sum())
    assert trained.step().applied
    assert not torch.equal(before, trained.full("weight")["weight"])
distributed.stop()
leave(0)
"""


HALF = """
import torch
from trainer import distributed
from trainer.__main__ import leave
from trainer.optim import AdamWConfig
from trainer.distributed import Trained, ZeroConfig
ranks = distributed.start(timeout_seconds=60)
trained = Trained(torch.nn.Linear(4, 1).to(ranks.device), ZeroConfig(), AdamWConfig(), "fp16", 1)
for attempt in range(20):  # each that overflows halves the scale of the loss
    trained.backward(trained.model(torch.ones(2, 4, device=ranks.device)).sum())
    if trained.step().applied:
        break
else:
    raise RuntimeError("20 steps overflow, however small the loss is made")
distributed.stop()
leave(0)
"""


NETWORK_CURE = (
    "is the loopback interface up (`ip link set lo up`), and may processes of this machine connect to each other?"
)


def _reason(text: str) -> str:
    """The line of a traceback that names the error; what a dying process prints after it says nothing."""
    lines = [re.sub(r"^\[rank\d+\]: ", "", line.strip()) for line in text.strip().splitlines()] or ["no message"]
    named = [line for line in lines if re.match(r"[\w.]+(Error|Exception)\b", line)]
    return (named or lines)[-1][:300]


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
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
            )
            for rank in range(2)
        ]
        try:
            outputs = [rank.communicate(timeout=90) for rank in ranks]
        except subprocess.TimeoutExpired as error:
            raise Problem(f"two processes did not finish in 90 s; {NETWORK_CURE}") from error
        finally:
            for rank in ranks:
                if rank.poll() is None:
                    rank.kill()
                    rank.wait()
    if any(rank.returncode for rank in ranks):
        met = all("met" in out for out, _ in outputs)
        reasons = dict.fromkeys(
            _reason(text) for rank, (_, text) in zip(ranks, outputs, strict=True) if rank.returncode
        )
        cure = "reinstall deepspeed: pip install --force-reinstall 'deepspeed>=0.19'" if met else NETWORK_CURE
        what = "DeepSpeed cannot take a step" if met else "two processes do not meet"
        raise Problem(f"{what} ({'; '.join(reasons)}); {cure}")
    return "two processes meet over gloo; DeepSpeed steps at ZeRO 0 and 1"


RUNS = Path("runs")


@contextmanager
def _scratch(runs: Path) -> Iterator[Path]:
    """A folder inside `runs`, gone afterwards; while there is no `runs`, where it would be made.

    `runs` itself is never made here: the hosts of a job ask at the same time and may share a disk, and the
    one that took it away again would pull it from under the others.

    Raises:
        Problem: it cannot be made.
    """
    parent = next(folder for folder in (runs, *runs.absolute().parents) if folder.exists())
    try:
        with tempfile.TemporaryDirectory(dir=parent, prefix=".doctor-") as name:
            yield Path(name)
    except OSError as error:
        raise Problem(
            f"{runs}/ cannot be written ({error.strerror or error}); set runs_dir=FOLDER on a disk you may write"
        ) from error


def disk(folder: Path = RUNS) -> str:
    """A run directory can be written, and there is room."""
    with _scratch(folder) as scratch:
        with (scratch / "file").open("wb") as file:
            file.write(b"\0" * 2**20)
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(scratch).free / 2**30
        system = os.statvfs(scratch)
    if free < MIN_DISK_GIGABYTES:
        raise Problem(f"{folder}/ has {free:.2f} GiB left; free some or set runs_dir=FOLDER on another disk")
    if system.f_files and system.f_favail < MIN_INODES:  # some file systems do not count them
        raise Problem(
            f"{folder}/ has room for {system.f_favail} more files (inodes); delete some or set runs_dir=FOLDER"
        )
    return f"{folder}/ is writable, {free:,.0f} GiB free" + (f", {system.f_favail:,} inodes" if system.f_files else "")


def checkpoint(folder: Path = RUNS) -> str:
    """A checkpoint is written into runs/, verified and read back."""
    import torch

    from trainer import checkpoint as checkpoints
    from trainer import distributed
    from trainer.distributed import Slice

    distributed.start()
    try:
        with _scratch(folder) as scratch:
            values = torch.arange(6.0)
            state = {"shapes": {"a": [6]}, "best": {}}
            slices = [Slice("a", "weight", 0, values)]
            written = checkpoints.save(scratch, checkpoints.CheckpointConfig(), 1, slices, state)
            found = checkpoints.newest(scratch) if written else None
            if found is None or not torch.equal(found.weights()["a"], values):
                raise Problem(f"a checkpoint in {folder}/ does not read back; check that disk or set runs_dir=FOLDER")
    finally:
        distributed.stop()
    return f"one is written into {folder}/, verified and read back"


def shared_memory() -> str:
    """The GPUs of a host exchange gradients through /dev/shm, where they have no better way."""
    import torch

    path = Path("/dev/shm")
    size = shutil.disk_usage(path).free / 2**20 if path.is_dir() else 0.0
    if size < MIN_SHARED_MEGABYTES and torch.cuda.device_count() > 1:
        raise Problem(f"/dev/shm has {size:.0f} MiB, too little for NCCL; enlarge it (docker: --shm-size=1g)")
    return f"/dev/shm has {size:,.0f} MiB"


def kernel_selftest() -> str:
    """Every kernel against its definition; without the C++ build training works, but slowly."""
    import torch

    import kernels
    from kernels import ctc, log_mel, moments

    weight = torch.empty(0)
    if kernels.unsupported(weight, "lstm") is not None:
        raise Problem(f"the CPU runs {kernels.explain(weight)}")
    others = (log_mel, ctc, moments)
    number = sum(kernels.selftest("cpu").values()) + sum(module.selftest() for module in others)
    said = f"{kernels.explain(weight)}: {number} cases agree with the definition"
    if torch.cuda.is_available():  # not here: every case is compiled first, which takes minutes
        said += """; prove the GPU by: python -c "import kernels; print(kernels.selftest('cuda'))\""""
    return said


def tracking() -> str:
    """W&B is optional: offline without a key."""
    from trainer.tracking import has_key

    return "W&B has a key, runs go online" if has_key() else "W&B has no key, runs stay offline (`wandb login`)"


def cores() -> str:
    """Processors this process may use, and whether the threads fit on them."""
    from kernels import cpu

    usable = len(os.sched_getaffinity(0))
    allowed, said = min(usable, cpu.quota()), f"{usable} cores"
    if allowed < usable:
        said += f", of which the quota of a control group allows {allowed:.1f}"
    fitting = max(1, int(allowed))
    threads = os.environ.get("OMP_NUM_THREADS")
    if threads is not None and (not threads.isdigit() or int(threads) > fitting):
        raise Problem(
            f"OMP_NUM_THREADS={threads}, but {said}: threads would wait for each other; "
            f"unset it or set OMP_NUM_THREADS={fitting}"
        )
    if threads is None and allowed < usable:
        return f"{said}; OMP_NUM_THREADS is not set: {fitting} would fit"
    return f"{said}, OMP_NUM_THREADS {threads or 'not set'}"


def gpus() -> str:
    """GPUs are optional, but one that is there should be seen."""
    import torch

    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not names and Path("/dev/nvidia0").exists() and os.environ.get("CUDA_VISIBLE_DEVICES") is None:
        built = torch.version.cuda
        raise Problem(
            "there is an NVIDIA GPU that torch does not see; "
            + (
                f"the driver must fit CUDA {built}"
                if built
                else "this torch is built for the CPU: install a CUDA build"
            )
        )
    return ", ".join(names) or "none, training runs on the CPU"


def half_precision() -> str:
    """On a GPU, DeepSpeed takes a step with `precision=fp16`."""
    import torch

    if not torch.cuda.is_available():
        return "no GPU, not tried"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(PROJECT), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-c", HALF]
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, errors="replace", timeout=90)
    except subprocess.TimeoutExpired as error:
        raise Problem("no step in 90 s; set precision=bf16 or fp32") from error
    if done.returncode:
        raise Problem(f"DeepSpeed cannot take a step ({_reason(done.stderr)}); set precision=bf16 or fp32")
    return "DeepSpeed takes a step"


def import_names() -> str:
    """`kernels`, `trainer` and `recipes` are also the names of other packages on the index."""
    owners = metadata.packages_distributions()
    wrong = []
    for name in OURS:
        strangers = sorted({d for d in owners.get(name, []) if d.lower() != "ostinato"})
        for stranger in strangers:
            wrong.append(
                f"the package {stranger} also installs `{name}`; pip uninstall {stranger}, or use an environment of "
                "its own (./launch.sh makes one in .venv)"
            )
        origin = getattr(importlib.import_module(name), "__file__", None)
        if origin is None or PROJECT not in Path(origin).resolve().parents:
            wrong.append(f"`import {name}` finds {origin}, not this project; start through ./launch.sh")
    if wrong:
        raise Problem("; ".join(wrong))
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
    Check("fp16", half_precision),
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
            text = str(error)
            if not isinstance(error, Problem):
                text = f"{type(error).__name__}: {_first_line(error)}; {FRESH_CURE}"
            say(f"PROBLEM  {check.name}: {text}")
    return problems
