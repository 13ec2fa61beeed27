"""Checks this machine: packages, audio, processes, disk, kernels, names; says what is wrong and the cure.

    ./launch.sh doctor
    ./launch.sh --hosts hosts.txt doctor      (every host of a file, and every pair of them)

A line a check: `ok` with what was found, or `PROBLEM` with the cure. Nothing is changed, and without --hosts the
network is not used. Stand where you would start a run: its folder runs/ is tried. Exit code 0 if all is well, 3 if
something is wrong.
"""

import argparse
import os
from pathlib import Path

from trainer.errors import EXIT_CHECK_FOUND_SOMETHING, EXIT_DONE

PLACE_IN_A_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OSTINATO_STORE")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--hosts", type=Path, help="file with a line `HOST slots=N` for each host")


def main(arguments: argparse.Namespace) -> int:
    from trainer.doctor import CHECKS, run

    for name in PLACE_IN_A_JOB:  # inside a job, too, the checks wait for nobody else
        os.environ.pop(name, None)
    if arguments.hosts:
        from trainer import cluster, doctor_hosts, hosts

        named = hosts.read_hosts(arguments.hosts)
        problems = doctor_hosts.Examination(named, cluster.ssh, lambda line: print(line, flush=True)).run()
    else:
        problems = run(CHECKS, lambda line: print(line, flush=True))
    print(f"{problems} problem(s)" if problems else "all is well")
    return EXIT_CHECK_FOUND_SOMETHING if problems else EXIT_DONE
