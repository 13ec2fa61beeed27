"""One host's part of a job that a front end starts on several: see trainer.agent."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    del parser


def main(arguments: argparse.Namespace) -> int:
    from trainer import agent

    return agent.main()
