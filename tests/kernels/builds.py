"""The lesser builds of the C++ kernels, which a processor takes that has no AVX-512."""

import os
import subprocess
import sys

import pytest

from trainer.config import PROJECT

LESSER = pytest.mark.parametrize("isa", ["avx2", "portable"])


def run_in(isa: str, statements: str) -> None:
    """Run Python statements in a process of its own, where the processor is taken for a lesser one; skip where it is
    one that cannot run this build."""
    here = f"from kernels import cpu\nassert cpu.instruction_set() == {isa!r}, 'this processor is a lesser one'\n"
    command, environment = [sys.executable, "-c", here + statements], os.environ | {"OSTINATO_CPU": isa}
    done = subprocess.run(command, cwd=PROJECT, env=environment, capture_output=True, text=True)
    if "a lesser one" in done.stderr:
        pytest.skip(f"this processor cannot run the {isa} build")
    assert done.returncode == 0, done.stderr
