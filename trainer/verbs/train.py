"""Trains a recipe; goes on by itself where the run directory holds a checkpoint.

    ./launch.sh train speech/tones
    ./launch.sh train speech/read_ru nproc=2 max_epochs=10
    ./launch.sh --hosts hosts.txt train speech/read_ru               (every host of the file, over ssh)
    ./launch.sh --hosts hosts.txt --node 0 train speech/read_ru      (this one by hand, and --node 1 on the second)
    sbatch -N2 launch.sh train speech/read_ru                        (every node of a Slurm allocation)

Exit codes: 0 done, 2 a mistake in the configuration, 75 stopped by SIGTERM, SIGUSR1 or SIGINT after saving: the same
command goes on. docs/launch.md says more.
"""

import argparse
import os
import sys
from pathlib import Path

from trainer.signals import StopSignals
from trainer.verbs import add_config, positive, take
from trainer.watchdog import show_stacks_when_asked


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--hosts", type=Path, help="file with a line `HOST slots=N` for each host")
    parser.add_argument("--node", type=int, help="start this host of the file alone, by its number from 0")
    parser.epilog = "nproc=N: processes on this host (default: one a GPU, or one)"


def main(arguments: argparse.Namespace) -> int:
    show_stacks_when_asked()
    with StopSignals() as signals:  # from here on: importing torch takes seconds
        from trainer import slurm

        nproc, overrides = take(arguments.overrides, "nproc")
        slurm.take_place(os.environ)
        if "RANK" in os.environ:
            return train(arguments.config, overrides, signals)
        return front(arguments, positive(nproc, "nproc"), overrides, signals)


def front(arguments: argparse.Namespace, nproc: int | None, overrides: list[str], signals: StopSignals) -> int:
    """Start the ranks, here or on every host, as often as it takes."""
    from trainer import cluster, hosts, launch, restart, slurm
    from trainer.errors import EXIT_REQUEUE, RequeueError, UserError

    settings = restart.read(arguments.config, overrides)
    command = ["train", arguments.config, *overrides]
    again = settings.max_restarts

    def start(first: bool) -> launch.Job:
        if named is None:
            return launch.HostJob(command, processes)
        if arguments.node is not None:
            return hosts.by_hand(command, named, arguments.node, restart.say)
        return cluster.Cluster(command, named, connect, settings.min_hosts, restart.say, again=not first)

    if arguments.node is not None and not arguments.hosts:
        raise UserError(f"--node {arguments.node}: is a line of a hosts file; name it, --hosts FILE")
    named = hosts.read_hosts(arguments.hosts) if arguments.hosts else None
    if named is not None and nproc is not None:
        raise UserError(f"nproc={nproc}: {arguments.hosts} says how many on each host; leave it out")
    connect = cluster.ssh
    processes = 0
    if named is not None and arguments.node is not None:
        again = 0  # the other hosts know nothing of a new start
        hosts.check_node(arguments.hosts, named, arguments.node)
    elif named is None and slurm.in_allocation(os.environ):
        named, connect = slurm.hosts(os.environ, nproc), slurm.srun
    elif named is None:
        processes = nproc or launch.default_processes()
        if processes == 1 and not again:
            return train(arguments.config, overrides, signals)
    if signals.received is not None:  # nothing was begun
        raise RequeueError
    code = restart.supervise(start, again)
    if code == EXIT_REQUEUE and connect is slurm.srun:
        slurm.requeue(os.environ)
    return code


def train(config: str, overrides: list[str], signals: StopSignals) -> int:
    """One rank's part."""
    import logging

    from kernels import keep_pages
    from trainer import distributed, launch
    from trainer.errors import EXIT_OUR_FAULT, RequeueError, UserError
    from trainer.place import COLLECTIVE, END, START, board
    from trainer.recipe import load
    from trainer.watchdog import LATE_WAITING, Watchdog

    keep_pages()  # one step needs the memory that the last one gave back
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
    for ours in ("trainer", "kernels"):
        logging.getLogger(ours).setLevel(logging.INFO)
    if (notes := launch.notes()) is not None:
        board.publish(notes, int(os.environ["RANK"]))
    recipe = load(config, overrides)
    deadline = recipe.config.launch.deadline_seconds
    board.at(START)  # everything is imported

    def late(error: str, waiting: bool) -> None:
        launch.tell_failure("" if waiting else error, error, lost=waiting)

    with Watchdog(int(os.environ.get("RANK", "0")), deadline, late):
        lost = "did not meet the others"
        try:
            board.at(COLLECTIVE)
            ranks = distributed.start(timeout_seconds=LATE_WAITING * deadline)
            board.at(START)
            lost = "lost another rank"
            from trainer.engine import Training

            Training(recipe, ranks, signals).fit()
        except (RequeueError, UserError):
            raise
        except Exception as error:
            if distributed.is_lost_peer(error):  # the traceback that matters is elsewhere
                launch.tell_failure("", _named(error), lost=True)
                rank = os.environ.get("RANK", "0")
                logging.getLogger(__name__).error("rank %s %s: %s", rank, lost, _named(error))
                return EXIT_OUR_FAULT
            launch.tell_failure(_named(error), _named(error))
            raise
        finally:
            board.at(END)
            distributed.stop()
    return 0


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:300]
