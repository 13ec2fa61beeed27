"""Dry run: what an epoch will be, before any time is spent on it.

    ./launch.sh plan speech/read_ru world_size=2

Prints steps, batches, padding, what is left out and why, the model's size, memory of the longest batch, and the
DeepSpeed JSON that follows from the configuration.
"""

import argparse
import json
import math

from trainer.verbs import add_config, positive, take


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.epilog = "world_size=N: for how many processes (default 1)"


def main(arguments: argparse.Namespace) -> int:
    text, overrides = take(arguments.overrides, "world_size")
    world_size = positive(text, "world_size") or 1

    import resource

    import torch
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trainer import distributed
    from trainer.recipe import load

    recipe = load(arguments.config, overrides)
    config = recipe.config
    dataset = recipe.build_dataset("train")
    steps = dataset.plan.epoch(0)
    size = dataset.plan.micro_batches_per_step
    rounds = math.ceil(size / world_size)
    counts = {name: sum(step.counts[name] for step in steps) for name in steps[0].counts} if steps else {}
    dummies = sum(rounds * world_size - len(step.micro_batches) for step in steps)
    model = recipe.build_model()

    table = Table(show_header=False, title=Text(f"{config.name}, epoch 1 on {world_size} process(es)"))
    table.add_row("samples", f"{counts.get('samples', 0):,.0f} of {len(dataset):,}")
    reasons: dict[str, int] = {}
    for rejection in dataset.plan.rejections:
        reasons[rejection.reason] = reasons.get(rejection.reason, 0) + 1
    for reason, number in reasons.items():
        table.add_row("left out", f"{number}: {reason}")
    table.add_row("steps", f"{len(steps)} an epoch, {config.max_steps or len(steps) * config.max_epochs} in all")
    table.add_row("micro-batches", f"up to {size} a step, {rounds} a process; {dummies} dummies keep the ranks in step")
    if "padded_seconds" in counts:
        padding = 100 * (1 - counts["seconds"] / max(counts["padded_seconds"], 1e-9))
        table.add_row(
            "sound", f"{counts['seconds'] / 3600:.2f} h an epoch; {padding:.1f} % of what is computed is padding"
        )
    table.add_row("parameters", f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}")
    for name, fact in recipe.describe(model).items():
        table.add_row(name, fact)
    if steps:
        longest = max((m for s in steps for m in s.micro_batches), key=lambda m: m.cost)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        output = recipe.step(model.train(), dataset.load(longest))
        sum((x.sum for x in output.losses.values()), start=torch.zeros(())).backward()
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        table.add_row(
            "longest batch", f"{len(longest.samples)} samples; forward and backward take {grown / 1024:,.0f} MiB here"
        )
    console = Console()
    console.print(table)
    console.print("DeepSpeed:", highlight=False)
    derived = distributed.deepspeed_config(config.zero, config.optimizer, config.precision, rounds)
    console.print_json(json.dumps(derived))
    return 0
