"""Trains a recipe; goes on by itself where the run directory holds a checkpoint.

    ./launch.sh train speech/tones
    ./launch.sh train speech/read_ru nproc=2 max_epochs=10
    ./launch.sh --hosts hosts.txt --node 0 train speech/read_ru      (and --node 1 on the second host)

Exit codes: 0 done, 2 a mistake in the configuration, 75 stopped by SIGTERM or SIGUSR1 after saving: the same command
goes on.
"""

import argparse
import os
import sys
from pathlib import Path

from trainer.signals import StopSignals
from trainer.verbs import add_config, positive, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--hosts", type=Path, help="file with a line `HOST slots=N` for each host")
    parser.add_argument("--node", type=int, default=0, help="number of this host in that file, from 0")
    parser.epilog = "nproc=N: processes on this host (default: one a GPU, or one)"


def main(arguments: argparse.Namespace) -> int:
    with StopSignals() as signals:  # from here on: importing torch takes seconds
        nproc, overrides = take(arguments.overrides, "nproc")
        if "RANK" in os.environ:
            return train(arguments.config, overrides, signals)
        from trainer import launch
        from trainer.errors import RequeueError, UserError

        hosts = launch.read_hosts(arguments.hosts) if arguments.hosts else None
        if hosts is not None and not 0 <= arguments.node < len(hosts):
            raise UserError(
                f"--node {arguments.node}: {arguments.hosts} names {len(hosts)} hosts, wanted 0 to {len(hosts) - 1}"
            )
        processes = positive(nproc, "nproc") or launch.default_processes()
        if hosts is None and processes == 1:
            return train(arguments.config, overrides, signals)
        if signals.received is not None:  # nothing was begun
            raise RequeueError
        return launch.run(["train", arguments.config, *overrides], processes, hosts, arguments.node)


def train(config: str, overrides: list[str], signals: StopSignals) -> int:
    """One rank's part."""
    import logging

    from kernels import keep_pages
    from trainer import distributed
    from trainer.recipe import load

    keep_pages()  # one step needs the memory that the last one gave back
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("trainer").setLevel(logging.INFO)
    recipe = load(config, overrides)
    ranks = distributed.start()
    try:
        from trainer.engine import Training

        Training(recipe, ranks, signals).fit()
    finally:
        distributed.stop()
    return 0
