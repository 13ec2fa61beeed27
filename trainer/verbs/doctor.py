"""Checks this machine: packages, audio, processes, disk, kernels, names; says what is wrong and the cure.

Exit code 3 if something is wrong.
"""

import argparse

from trainer.errors import EXIT_CHECK_FOUND_SOMETHING, EXIT_DONE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(arguments: argparse.Namespace) -> int:
    from trainer.doctor import CHECKS, run

    problems = run(CHECKS, lambda line: print(line, flush=True))
    print(f"{problems} problem(s)" if problems else "all is well")
    return EXIT_CHECK_FOUND_SOMETHING if problems else EXIT_DONE
