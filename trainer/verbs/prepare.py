"""Raw corpus to shards and indexes; goes on where it was interrupted.

./launch.sh prepare speech/read_ru
"""

import argparse

from trainer.verbs import add_config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)


def main(arguments: argparse.Namespace) -> int:
    from trainer.recipe import load

    load(arguments.config, arguments.overrides).prepare()
    return 0
