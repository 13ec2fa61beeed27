"""The CPU backend: `cpu.cpp`, built when the project is installed, called through a plain C interface.

The library knows nothing of torch or Python, so one build serves every version of both; it borrows the threads that
torch has already started.
"""

import ctypes
import glob
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kernels.reference import GATES, SAVED

CELLS = list(GATES)
"""In the order of the enumeration in call.h."""
DTYPES = {torch.float32: "float32", torch.float64: "float64"}

_INTEGERS = ("T", "B", "K", "P", "groups", "cell", "diagonal", "bfloat16", "threads")
_TENSORS = ("u", "weight", "packed", "h0", "c0", "bias", "mask", "y", "h", "c", "saved")
_GRADIENTS = ("dy", "dh", "dc", "du", "dweight", "dh0", "dc0", "dbias")


class _Call(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in _INTEGERS),
        ("zoneout_h", ctypes.c_double),
        ("zoneout_c", ctypes.c_double),
        *((name, ctypes.c_void_p) for name in ("reverse", "lengths", "keys", *_TENSORS, *_GRADIENTS)),
    ]


class _Threads(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("parallel", "number", "count")]


def _load() -> tuple[ctypes.CDLL | None, str | None]:
    """The library, or why there is none."""
    found = glob.glob(str(Path(__file__).parent / "_cpu*.so"))
    if not found:
        return (
            None,
            "the C++ kernels were not built (no compiler at install time?); install the project again with g++",
        )
    try:
        loaded = ctypes.CDLL(found[0])
        isa = instruction_set()
        _share_threads(getattr(loaded, f"use_threads_{isa}"))
        if isa != "portable":
            _share_threads(loaded.use_threads_portable)
        return loaded, None
    except (OSError, AttributeError) as error:
        return None, f"the C++ kernels do not load ({error}); install the project again"


@lru_cache(maxsize=1)
def instruction_set() -> str:
    """Which of the builds this processor runs: avx512, avx2 or portable. OSTINATO_CPU asks for a smaller one."""
    best = {"AVX512": "avx512", "AVX2": "avx2"}.get(torch.backends.cpu.get_cpu_capability(), "portable")
    order = ["portable", "avx2", "avx512"]
    wanted = os.environ.get("OSTINATO_CPU", best)
    if wanted not in order:
        raise ValueError(f"OSTINATO_CPU={wanted!r}, wanted one of {', '.join(order)}")
    return order[min(order.index(wanted), order.index(best))]


def function(name: str) -> tuple[Any, str | None]:
    """A function of the library as this processor runs it, or why there is none."""
    if MISSING is not None:
        return None, MISSING
    found = getattr(_LIBRARY, f"{name}_{instruction_set()}", None)
    return found, None if found else "the C++ kernels are older than their source; install the project again"


def explain(x: Tensor, otherwise: str, missing: str | None) -> str:
    """Which path a call takes that has a kernel for float32 on a CPU alone, and why.

    Args:
        otherwise: what computes the same where the kernel cannot.
        missing: why there is none, see `function`.
    """
    if x.device.type != "cpu":
        return f"{otherwise}: there is no kernel for {x.device.type}"
    if x.dtype != torch.float32:
        return f"{otherwise}: {x.dtype} is not torch.float32"
    return f"C++ ({instruction_set()})" if missing is None else f"{otherwise}: {missing}"


@lru_cache(maxsize=1)
def openmp() -> str | None:
    """Path of the GNU OpenMP that torch has loaded; None: it uses another or none, and kernels run on one thread."""
    return next((line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "gomp" in line), None)


def _share_threads(use: Any) -> None:
    """Hand over the entry points of the OpenMP that torch has loaded: a second one would fight for the cores."""
    if (path := openmp()) is None:
        return
    gomp = ctypes.CDLL(path)
    names = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")
    use(ctypes.byref(_Threads(*(ctypes.cast(getattr(gomp, name), ctypes.c_void_p) for name in names))))


@lru_cache(maxsize=1)
def most_threads() -> int:
    """Processors this process may use: its affinity, and the quota of a container, service or job."""
    return max(1, int(min(len(os.sched_getaffinity(0)), quota())))


def quota(mounted: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Processors that the control groups of this process allow it, the tightest of them all; infinite without one.

    Args:
        mounted: where their file systems are, of version 2 or 1.
        own: lists the groups of the process. Inside a container their paths may not be there: its own is then on top.
    """
    try:
        listed = own.read_text(encoding="utf-8").splitlines()
    except OSError:
        listed = []
    allowed = math.inf
    for line in {"0::/", "0:cpu:/", *listed}:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        top = mounted / "cpu" if controllers else mounted
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            allowed = min(allowed, _quota_of(folder))
            if folder == top:
                break
    return allowed


def _quota_of(group: Path) -> float:
    try:
        if (group / "cpu.max").is_file():
            amount, period = (group / "cpu.max").read_text(encoding="utf-8").split()
        else:
            amount, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="utf-8").strip() for name in ("quota", "period")
            )
        return int(amount) / int(period) if amount.isdigit() else math.inf
    except (OSError, ValueError):
        return math.inf


def peak_flops() -> float:
    """Most float32 operations a second of one core with this instruction set: what a kernel is measured by."""
    function = getattr(_LIBRARY, f"peak_flops_{instruction_set()}")
    function.restype = ctypes.c_double
    peak: float = function()
    return peak


def keep_pages() -> None:
    """Ask glibc to keep freed memory instead of giving it back: large outputs then lie on pages that exist already.

    Fresh pages cost more than the arithmetic of a sparse recurrence. It is a setting of the whole process, so a
    program decides on it, not an import; memory stays at its highest level until the process ends.
    """
    m_trim_threshold, m_mmap_max = -1, -4
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def padded_size(size: int, dtype: torch.dtype) -> int:
    """P up to whole vectors, as gemm.h lays out packed weights."""
    isa = "portable" if dtype == torch.float64 else instruction_set()
    lanes = {"avx512": 64, "avx2": 32, "portable": 16}[isa] // dtype.itemsize
    lanes = max(lanes, 4)
    return math.ceil(size / lanes) * lanes


def supports(weight: Tensor) -> str | None:
    """Why a call with these weights cannot be taken, or None."""
    if MISSING is not None:
        return MISSING
    if weight.dtype not in DTYPES:
        return f"{weight.dtype} is not one of float32 and float64"
    return None


def pack(weight: Tensor, cell: str, bfloat16: bool) -> Tensor:
    """Blocks as the forward kernel reads them: (K, G, P', P') of the weights' type, or int16 for bfloat16."""
    packed = empty_packed(weight, bfloat16)
    _, num_blocks, size, _ = weight.shape
    call = _Call(K=num_blocks, P=size, cell=CELLS.index(cell), bfloat16=bfloat16, threads=_num_threads())
    weight = weight.contiguous()
    call.weight, call.packed = weight.data_ptr(), packed.data_ptr()
    _function("pack", weight.dtype)(ctypes.byref(call))
    return packed


def empty_packed(weight: Tensor, bfloat16: bool) -> Tensor:
    """A tensor of the shape and type that `pack` returns."""
    gates, num_blocks, size, _ = weight.shape
    size = padded_size(size, weight.dtype)
    return weight.new_empty(num_blocks, gates, size, size, dtype=torch.int16 if bfloat16 else weight.dtype)


def _num_threads() -> int:
    return min(torch.get_num_threads(), most_threads())


def _function(name: str, dtype: torch.dtype) -> Any:
    isa = "portable" if dtype == torch.float64 else instruction_set()
    return getattr(_LIBRARY, f"{name}_{DTYPES[dtype]}_{isa}")


def _run(
    backward: bool,
    u: Tensor,
    weight: Tensor,
    cell: str,
    reverse: Sequence[bool],
    zoneout: Sequence[float],
    **tensors: Any,
) -> None:
    num_steps, batch, _ = u.shape
    diagonal = weight.ndim == 2
    num_blocks, size = (weight.shape[1], 1) if diagonal else weight.shape[1:3]
    packed = tensors.get("packed")
    flags = (ctypes.c_uint8 * len(reverse))(*reverse)
    call = _Call(
        num_steps,
        batch,
        num_blocks,
        size,
        len(reverse),
        CELLS.index(cell),
        diagonal,
        packed is not None and packed.dtype == torch.int16,
        _num_threads(),
        *zoneout,
        ctypes.addressof(flags),
    )
    kept = []
    for name, tensor in (("u", u), ("weight", weight), *tensors.items()):
        if tensor is not None and tensor.numel():
            kept.append(tensor.contiguous())  # alive until the call returns
            setattr(call, name, kept[-1].data_ptr())
    if _function("run", u.dtype)(ctypes.byref(call), int(backward)):
        raise MemoryError(f"no memory for the workspace of a {cell}: T={num_steps}, B={batch}, {tuple(weight.shape)}")


def forward(
    u: Tensor,
    weight: Tensor,
    packed: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    keys: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    zoneout: Sequence[float],
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (T, B, H), h (B, H), c (B, H) or empty, and what backward needs: (T, B, S H), empty if not `save`."""
    y, h, c, saved = empty_outputs(u, cell, zoneout, keys, save)
    _run(False, u, weight, cell, reverse, zoneout, packed=packed, h0=h0, c0=c0, bias=bias, lengths=lengths, mask=mask,
         keys=keys, y=y, h=h, c=c, saved=saved)  # fmt: skip
    return y, h, c, saved


def empty_outputs(
    u: Tensor, cell: str, zoneout: Sequence[float], keys: Tensor | None, save: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tensors of the shapes that `forward` returns."""
    num_steps, batch, width = u.shape
    size = width // GATES[cell]
    mixed = (
        bool(zoneout[0]) and keys is None and not u.is_cuda
    )  # an Elman cell's output alone no longer tells its derivative
    sections = SAVED.get(cell, int(mixed)) if save else 0
    return (
        u.new_empty(num_steps, batch, size),
        u.new_empty(batch, size),
        u.new_empty(batch, size) if cell == "lstm" else u.new_empty(0),
        u.new_empty(num_steps, batch, sections * size) if sections else u.new_empty(0),
    )


def backward(
    dy: Tensor,
    dh: Tensor,
    dc: Tensor,
    y: Tensor,
    saved: Tensor,
    u: Tensor,
    weight: Tensor,
    packed: Tensor,
    h0: Tensor | None,
    c0: Tensor | None,
    bias: Tensor | None,
    lengths: Tensor | None,
    mask: Tensor | None,
    keys: Tensor | None,
    cell: str,
    reverse: Sequence[bool],
    zoneout: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """du, dweight, dh0 (B, H), dc0 (B, H) or empty, dbias or empty."""
    # `new_`, not `_like`, which takes over strides: what is written must lie in order.
    du, dweight, dh0 = u.new_empty(u.shape), weight.new_zeros(weight.shape), dh.new_empty(dh.shape)
    dc0 = dh.new_empty(dh.shape if cell == "lstm" else 0)
    dbias = u.new_empty(0) if bias is None else bias.new_zeros(bias.shape)
    _run(True, u, weight, cell, reverse, zoneout, packed=packed, h0=h0, c0=c0, bias=bias, lengths=lengths, mask=mask,
         keys=keys, y=y, saved=saved, dy=dy, dh=dh, dc=dc, du=du, dweight=dweight, dh0=dh0, dc0=dc0,
         dbias=dbias)  # fmt: skip
    return du, dweight, dh0, dc0, dbias


_LIBRARY, MISSING = _load()
