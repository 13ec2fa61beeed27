"""Slurm: the hosts of an allocation, the place of a rank that srun started, and starting again later."""

import subprocess
import sys
from collections.abc import Mapping, MutableMapping

from trainer.errors import UserError
from trainer.hosts import Host, network

FIRST_PORT, NUM_PORTS = 20000, 10000


def in_allocation(environment: Mapping[str, str]) -> bool:
    """Whether this is the script of a batch job, or a shell of `salloc`: a place to start a job from."""
    return "SLURM_JOB_ID" in environment and "SLURM_STEP_ID" not in environment


def take_place(environment: MutableMapping[str, str]) -> None:
    """In a process that srun started as one of several: say what torch and DeepSpeed want to know."""
    several = int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1
    if "RANK" in environment or not several or "SLURM_PROCID" not in environment:
        return
    # A port of its own for each step and each time the job is started: the last one's may not be free yet.
    number = sum(int(environment.get(name, "0")) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
    number += 1000 * int(environment.get("SLURM_RESTART_COUNT", "0"))
    names = _names(environment["SLURM_STEP_NODELIST"])
    environment.setdefault("MASTER_ADDR", names[0])
    if "GLOO_SOCKET_IFNAME" not in environment:
        environment["GLOO_SOCKET_IFNAME"] = network(environment["SLURMD_NODENAME"], names).interface
    environment.setdefault("MASTER_PORT", str(FIRST_PORT + number % NUM_PORTS))
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]


def _scontrol(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = ["scontrol", *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True)
    except OSError as error:  # there is none
        return subprocess.CompletedProcess(command, 127, "", f"cannot be started: {error.strerror}")


def _names(nodes: str) -> list[str]:
    done = _scontrol("show", "hostnames", nodes)
    if done.returncode:
        raise UserError(
            f"scontrol show hostnames {nodes}: {done.stderr.strip()}; is Slurm's bin folder in PATH? To train on this "
            "host alone, unset SLURM_JOB_ID"
        )
    return done.stdout.split()


def hosts(environment: Mapping[str, str], nproc: int | None) -> list[Host]:
    """The nodes of the allocation; a process a task if tasks a node were asked for, else one a GPU, else one."""
    tasks = environment.get("SLURM_NTASKS_PER_NODE") or environment.get("SLURM_GPUS_ON_NODE") or "1"
    slots = nproc or (int(tasks) if tasks.isdigit() else 1)
    return [Host(name, slots) for name in _names(environment["SLURM_JOB_NODELIST"])]


def srun(host: str, command: str) -> list[str]:
    """One agent on one node, which may have all of it."""
    options = [
        "--overlap",
        "--nodes=1",
        "--ntasks=1",
        f"--nodelist={host}",
        "--cpu-bind=none",
        "--unbuffered",
        "--quiet",
    ]
    return ["srun", *options, "sh", "-c", command]


def requeue(environment: Mapping[str, str]) -> None:
    """Have a batch job that has saved started again, unless somebody has cancelled it; one of `salloc` is left to its
    user."""
    if "SLURMD_NODENAME" not in environment:  # the shell of salloc
        return
    # `incomplete`: not one that was cancelled, which Slurm shows as completing at this time, and says nothing of.
    done = _scontrol("requeue", "incomplete", job := environment["SLURM_JOB_ID"])
    why_not = f"is not requeued: scontrol: {done.stderr.strip()}"
    said = why_not if done.returncode else f"job {job} is requeued, unless it was cancelled"
    print(f"launch: {said}", file=sys.stderr, flush=True)
