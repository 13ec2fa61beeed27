"""What is read out of Slurm's environment; a real Slurm: tests/chaos."""

import os
import shutil
from pathlib import Path

import pytest

from trainer import slurm
from trainer.errors import UserError
from trainer.hosts import Host, Network

SCONTROL = """#!/bin/sh
echo "$*" >>"$(dirname "$0")/asked"
case "$*" in
"show hostnames n[1-2]") printf 'n1\\nn2\\n' ;;
requeue*) ;;
*) echo "invalid" >&2; exit 1 ;;
esac
"""
JOB = {"SLURM_JOB_ID": "77", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_PROCID": "0", "SLURMD_NODENAME": "n1"}
STEP = {**JOB, "SLURM_STEP_ID": "0", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_LOCALID": "1", "SLURM_PROCID": "3"}


@pytest.fixture(autouse=True)
def asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(slurm, "network", lambda own, names: Network(f"{own} of {' '.join(names)}", "10.0.0.1"))
    (tmp_path / "scontrol").write_text(SCONTROL)
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "asked"


@pytest.mark.parametrize(("environment", "inside"), [(JOB, True), (STEP, False), ({}, False)])
def test_a_job_is_started_from_its_script(environment: dict[str, str], inside: bool) -> None:
    assert slurm.in_allocation(environment) == inside


@pytest.mark.parametrize(
    ("more", "nproc", "slots"),
    [
        ({}, None, 1),
        ({"SLURM_GPUS_ON_NODE": "8"}, None, 8),
        ({"SLURM_NTASKS_PER_NODE": "4", "SLURM_GPUS_ON_NODE": "8"}, None, 4),
        ({"SLURM_GPUS_ON_NODE": "8"}, 2, 2),
    ],
)
def test_the_hosts_of_a_job(more: dict[str, str], nproc: int | None, slots: int) -> None:
    assert slurm.hosts(JOB | more, nproc) == [Host("n1", slots), Host("n2", slots)]
    with pytest.raises(UserError, match=r"scontrol show hostnames n\[1-9\]: invalid"):
        slurm.hosts({"SLURM_JOB_NODELIST": "n[1-9]"}, None)


def test_a_task_of_several_is_a_rank() -> None:
    environment = STEP | {"SLURM_STEP_NUM_TASKS": "4"}
    slurm.take_place(environment)
    place = {name: environment[name] for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")}
    assert place == {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "4", "MASTER_ADDR": "n1", "MASTER_PORT": "20077"}
    assert environment["GLOO_SOCKET_IFNAME"] == "n1 of n1 n2"
    again = STEP | {"SLURM_STEP_NUM_TASKS": "4", "SLURM_RESTART_COUNT": "1"}
    slurm.take_place(again)
    assert again["MASTER_PORT"] != environment["MASTER_PORT"]


@pytest.mark.parametrize("environment", [{}, JOB, STEP, STEP | {"SLURM_STEP_NUM_TASKS": "1"}])
def test_anything_else_is_none(environment: dict[str, str]) -> None:
    before = dict(environment)
    slurm.take_place(environment)
    assert environment == before


def test_a_rank_of_another_launcher_keeps_its_place() -> None:
    environment = STEP | {"SLURM_STEP_NUM_TASKS": "4", "RANK": "0"}
    slurm.take_place(environment)
    assert environment["RANK"] == "0"
    assert "WORLD_SIZE" not in environment


def test_a_named_interface_is_taken() -> None:
    environment = STEP | {"SLURM_STEP_NUM_TASKS": "4", "GLOO_SOCKET_IFNAME": "ib0"}
    slurm.take_place(environment)
    assert environment["GLOO_SOCKET_IFNAME"] == "ib0"


def test_without_slurms_programs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A message where they are needed; a run that has saved ends as such all the same."""
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    assert shutil.which("scontrol") is None
    with pytest.raises(UserError, match=r"n\[1-2\]: cannot be started: No such file .* unset SLURM_JOB_ID"):
        slurm.hosts(JOB, None)
    slurm.requeue(JOB)
    assert "launch: is not requeued: scontrol: cannot be started: No such file" in capsys.readouterr().err


def test_only_a_batch_job_that_is_not_cancelled_is_requeued(asked: Path) -> None:
    slurm.requeue({name: value for name, value in JOB.items() if name != "SLURMD_NODENAME"})
    assert not asked.exists()
    slurm.requeue(JOB)
    assert asked.read_text() == "requeue incomplete 77\n"
