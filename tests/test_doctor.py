"""The doctor finds what is wrong, names the cure, goes on after any failure, and says so in its exit code."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from trainer import doctor
from trainer.__main__ import main
from trainer.config import PROJECT
from trainer.verbs import doctor as doctor_verb


def only(monkeypatch: pytest.MonkeyPatch, ask: Callable[[], str]) -> int:
    """Exit code of the command with one check."""
    monkeypatch.setattr(doctor, "CHECKS", (doctor.Check("the one", ask),))
    return main(["doctor"])


@pytest.mark.slow
@pytest.mark.distributed
def test_all_is_well_here(tmp_path: Path) -> None:
    environment = {name: v for name, v in os.environ.items() if name != "OMP_NUM_THREADS"}
    # A rank's environment, as inside a job: the checks must not wait for the other ranks.
    environment |= {"PYTHONPATH": str(PROJECT), "RANK": "1", "WORLD_SIZE": "4", "OSTINATO_STORE": "nowhere"}
    command = [sys.executable, "-m", "trainer", "doctor"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == len(doctor.CHECKS) + 1
    assert all(line.startswith("ok ") for line in lines[:-1])
    assert not any(tmp_path.iterdir()), "it leaves nothing behind"


@pytest.mark.slow
@pytest.mark.distributed
def test_its_ranks_end_like_those_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """A C++ library that aborts while it is taken down is no fault of the machine."""
    aborts = "import ctypes\nc = ctypes.CDLL(None)\nc.__cxa_atexit(ctypes.cast(c.abort, ctypes.c_void_p), None, None)\n"
    monkeypatch.setattr(doctor, "GROUP", aborts + doctor.GROUP)
    for name in doctor_verb.PLACE_IN_A_JOB:
        monkeypatch.delenv(name, raising=False)
    assert "ZeRO 0 and 1" in doctor.process_group()


def test_fp16_is_tried_where_there_is_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without one the steps are taken on the CPU here, which can, slowly."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert doctor.half_precision() == "no GPU, not tried"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert doctor.half_precision() == "DeepSpeed takes a step"
    monkeypatch.setattr(doctor, "HALF", "import sys\nsys.exit('[rank0]: RuntimeError: no step\\nand more')")
    with pytest.raises(doctor.Problem, match=r"\(RuntimeError: no step\); set precision=bf16 or fp32"):
        doctor.half_precision()


def test_it_counts_problems_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []

    def broken() -> str:
        raise ImportError("nothing here\nand a second line")

    quick = [c for c in doctor.CHECKS if c.name in ("audio", "shared memory", "import names")]
    assert len(quick) == 3
    assert doctor.run([doctor.Check("broken", broken), *quick], lines.append) == 1
    assert lines[0] == f"PROBLEM  broken: ImportError: nothing here; {doctor.FRESH_CURE}"
    assert all(line.startswith("ok") for line in lines[1:])


def test_a_clash_of_import_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("kernels", "trainer"):
        folder = tmp_path / f"other_{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: other-{name}\nVersion: 1.0\n")
        (folder / "top_level.txt").write_text(f"{name}\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert only(monkeypatch, doctor.import_names) == 3
    said = capsys.readouterr().out
    assert "pip uninstall other-kernels" in said
    assert "pip uninstall other-trainer" in said
    assert "1 problem(s)" in said


def test_an_old_and_a_missing_package(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "requirements", lambda: {"pydantic": "999.1", "no_such_package": "1.0"})
    assert only(monkeypatch, doctor.packages) == 3
    said = capsys.readouterr().out
    assert "is older than 999.1: pip install 'pydantic>=999.1'" in said
    assert "no_such_package does not import (ModuleNotFoundError" in said


def test_the_requirements_are_those_of_the_project() -> None:
    found = doctor.requirements()
    assert found["torch"] == "2.9"
    assert {"deepspeed", "webdataset", "wandb", "soundfile", "pyyaml"} <= set(found)
    assert "pytest" not in found


@pytest.mark.parametrize("check", [doctor.disk, doctor.checkpoint], ids=["disk", "checkpoint"])
def test_a_folder_that_cannot_be_written(
    check: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert only(monkeypatch, lambda: check(blocked / "runs")) == 3
    assert "set runs_dir=FOLDER" in capsys.readouterr().out
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "MIN_DISK_GIGABYTES", 1e9)
        with pytest.raises(doctor.Problem, match="GiB left"):
            doctor.disk(tmp_path / "runs")
    assert not (tmp_path / "runs").exists()


def test_more_threads_than_cores(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    quota = tmp_path / "cpu.max"
    quota.write_text("50000 100000\n")
    monkeypatch.setenv("OMP_NUM_THREADS", "4000")
    with pytest.raises(doctor.Problem, match="set OMP_NUM_THREADS=1"):
        doctor.cores(quota)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert "quota allows 0.5" in doctor.cores(quota)


def test_a_failing_group_names_the_reason_not_the_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "GROUP", "import sys\nprint('met', flush=True)\nraise RuntimeError('no step')")
    with pytest.raises(doctor.Problem, match=r"DeepSpeed cannot take a step \(RuntimeError: no step\)"):
        doctor.process_group()
    monkeypatch.setattr(doctor, "GROUP", "raise OSError('no way')")
    with pytest.raises(doctor.Problem, match=r"do not meet \(OSError: no way\); is the loopback"):
        doctor.process_group()
