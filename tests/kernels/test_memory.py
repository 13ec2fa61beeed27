"""The C++ kernels touch no memory but what they were given."""

import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kernels import cpu
from trainer.config import PROJECT

CODE = """
import ctypes, sys
import torch
import kernels
from kernels import cases, cpu, ctc, log_mel, moments
library = ctypes.CDLL(sys.argv[1])
cpu._LIBRARY = library
for module in (ctc, log_mel, moments):
    name = module.__name__.split(".")[-1]
    module._FUNCTION = getattr(library, f"{name}_{cpu.instruction_set()}")
for case in cases.cases():
    cases.run(case, "cpu", torch.float32, exact=False)
for cell, gates in kernels.reference.GATES.items():
    weight = torch.rand(gates, 3, 19, 19) / 19
    packed = kernels.pack(weight, cell, bfloat16=True)
    kernels.recurrence(torch.rand(4, 5, gates * 57), weight, cell=cell, packed=packed)
for module in (ctc, log_mel, moments):
    module.selftest()
for shape in ((1, 1, 16, 16), (4, 1, 3000, 1), (4, 1, 0, 0)):  # refused, or read where nothing is
    try:
        kernels.pack(torch.ones(shape), "lstm")
    except ValueError:
        continue
    raise AssertionError(shape)
for lengths in ([9, -3, 2], [2**60, 5, -(2**60)]):  # that compiled graphs do not check
    inputs = (None, None, None, torch.tensor(lengths), None, None, "rnn_tanh", [False], [0.0, 0.0])
    weight = torch.rand(1, 2, 16, 16)
    packed = kernels.pack(weight, "rnn_tanh")
    torch.ops.ostinato.recurrence(torch.rand(5, 3, 32), weight, packed, *inputs, False)
for labels, lengths, counts in (([1, 9, -1], [5, 5], [2, 1]), ([1], [6, -1], [1, 0]), ([1], [5, 5], [2**60, -1])):
    nats, _ = torch.ops.ostinato.ctc(torch.zeros(2, 5, 4), *map(torch.tensor, (labels, lengths, counts)), 0, True)
    assert nats.isnan().any()
"""


@pytest.mark.slow
@pytest.mark.skipif(cpu.MISSING is not None, reason=f"no C++ kernels: {cpu.MISSING}")
def test_nothing_is_read_or_written_out_of_bounds(tmp_path: Path) -> None:
    """Under AddressSanitizer, with a workspace that is new in each call and gaps between its pieces."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++")
    runtime = subprocess.run([compiler, "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()
    if not Path(runtime).is_absolute():
        pytest.skip("g++ has no AddressSanitizer")
    isa = cpu.instruction_set()
    build = runpy.run_path(str(PROJECT / "setup.py"))
    flags = [*build["ALL"], *(build["X86"] | build["PORTABLE"])[isa], f"-DNAME={isa}"]
    library = tmp_path / "sanitized.so"
    flags += ["-O1", "-g1", "-fsanitize=address", "-fPIC", "-shared"]
    sources = sorted((PROJECT / "kernels").glob("*.cpp"))
    subprocess.run([compiler, *flags, *sources, "-o", library], check=True)
    # Python keeps memory to its end, which is no leak; looking up the names of functions takes minutes.
    done = subprocess.run(
        [sys.executable, "-c", CODE, library],
        cwd=PROJECT,
        env=os.environ | {"LD_PRELOAD": runtime, "ASAN_OPTIONS": "detect_leaks=0:symbolize=0"},
        timeout=300,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[:3000]
