"""Kills real runs at random steps, resumes them elsewhere, and compares the ledger, weights, optimizer and metrics.

    ./launch.sh verify-resume speech/tones
    ./launch.sh verify-resume speech/read_ru --steps 40 --kills 6 --processes 1,2,3 plan.micro_batch_seconds=30

The same training is done three times: without faults; killed, and resumed on as many processes, which must end in
equal bits; killed, and resumed on other numbers of processes and loader workers, whose sums are added in another order
and may differ by --tolerance. The ledger (which samples, augmented how, in which step) must be equal in both. Prepare
the corpus before (`./launch.sh prepare CONFIG`). The runs lie in runs/verify-resume-NAME, which is deleted if all is
well.

Exit codes: 0 all is equal, 3 something is not, 2 a mistake in the configuration.
"""

import argparse
import shutil
from typing import TYPE_CHECKING

from trainer.verbs import add_config

if TYPE_CHECKING:
    from trainer.verify_resume import Comparison

MOST_PROCESSES = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.add_argument("--steps", type=int, default=24, help="length of the runs (default 24)")
    parser.add_argument("--kills", type=int, default=3, help="of each of the two runs (default 3)")
    parser.add_argument("--processes", default="1,2", help="the first: without faults; all: resumed on (default 1,2)")
    parser.add_argument("--tolerance", type=float, default=1e-3, help="relative, between processes (default 1e-3)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which runs are killed")


def main(arguments: argparse.Namespace) -> int:
    from rich.console import Console
    from rich.table import Table

    from trainer.errors import EXIT_CHECK_FOUND_SOMETHING, EXIT_DONE, UserError
    from trainer.recipe import load
    from trainer.verify_resume import verify

    processes = [int(n) for n in arguments.processes.split(",") if n.isascii() and n.isdigit()]
    if len(processes) != arguments.processes.count(",") + 1 or not all(1 <= n <= MOST_PROCESSES for n in processes):
        raise UserError(
            f"--processes {arguments.processes}: wanted numbers from 1 to {MOST_PROCESSES} and commas, as in 1,2"
        )
    if arguments.kills < 0:
        raise UserError(f"--kills {arguments.kills}: wanted 0 or more")
    if not 0 <= arguments.tolerance < float("inf"):
        raise UserError(f"--tolerance {arguments.tolerance}: wanted a number from 0 on")
    config = load(arguments.config, arguments.overrides).config
    folder = config.runs_dir / f"verify-resume-{config.name}"
    if folder.exists():
        shutil.rmtree(folder)  # of a check that found something, or was interrupted
    console = Console()
    found = verify(
        arguments.config,
        arguments.overrides,
        folder,
        arguments.steps,
        arguments.kills,
        processes,
        arguments.seed,
        lambda text: console.print(text, highlight=False, markup=False),
    )
    wrong = [f"{c.name}: {name} differs" for c in found for name in c.wrong(arguments.tolerance)]
    table = Table(title=f"{config.name}, {arguments.steps} steps, beside the run without faults")
    for column in ("", *(c.name for c in found)):
        table.add_column(column)
    for row in zip(*(_facts(c).items() for c in found), strict=True):
        table.add_row(row[0][0], *(text for _, text in row))
    console.print(table)
    if wrong:
        console.print("\n".join(wrong) + f"\nthe runs are kept in {folder}", highlight=False, markup=False)
        return EXIT_CHECK_FOUND_SOMETHING
    shutil.rmtree(folder)
    return EXIT_DONE


def _facts(found: "Comparison") -> dict[str, str]:
    starts = found.starts
    return {
        "processes": ", ".join(str(s.processes) for s in starts),
        "loader workers": ", ".join(str(s.workers) for s in starts),
        "killed after step": ", ".join(str(s.kill_after) for s in starts if s.kill_after is not None),
        "resumed from": ", ".join(map(str, found.resumed)),
        "ledger": "equal" if found.ledger else "DIFFERS",
        **{n: "equal bit for bit" if d == 0 else f"{d:.1e} apart" for n, d in found.differences.items()},
    }
