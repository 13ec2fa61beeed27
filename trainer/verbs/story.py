"""The whole story, which `./launch.sh` alone runs on the default recipe: prepare, train, evaluate, report.

./launch.sh story speech/tones nproc=2
"""

import argparse

from trainer.verbs import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.epilog = "nproc=N: processes on this host (default: one a GPU, or one)"


def main(arguments: argparse.Namespace) -> int:
    from trainer import launch

    return launch.story(arguments.config, arguments.overrides)
