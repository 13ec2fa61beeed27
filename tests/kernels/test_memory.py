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
from kernels import cases, cpu
library = ctypes.CDLL(sys.argv[1])
cpu._LIBRARY = library
for case in cases.cases():
    cases.run(case, "cpu", cases.torch.float32, exact=False)
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
    subprocess.run([compiler, *flags, PROJECT / "kernels/cpu.cpp", "-o", library], check=True)
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
