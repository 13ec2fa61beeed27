"""Dry run: what an epoch will be, before any time is spent on it.

    ./launch.sh plan speech/read_ru world_size=2
    ./launch.sh plan speech/librispeech_960 world_size=64 utterances=281241

The second is of a corpus that is not at hand: so many made-up utterances as long as those of LibriSpeech stand for it,
spelt by letters.

Prints steps, batches, padding, what is left out and why, what looks odd, the model's size, memory of the worst batches,
warnings (processes with nothing to do, much padding), and the DeepSpeed JSON that follows from the configuration.
"""

import argparse
import json
import math
from typing import TYPE_CHECKING, Any

from trainer.verbs import add_config, positive, take

if TYPE_CHECKING:
    from torch import nn

    from trainer.data.dataset import Dataset
    from trainer.data.plan import Steps
    from trainer.recipe import Recipe

MUCH_WASTE, HALF = 0.05, 0.5
"""Share of padding, of samples left out or of dummies in each step that is worth a warning; of dummies in a last step
that is not full."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_config(parser)
    parser.epilog = "world_size=N: for how many processes (default 1); utterances=N: of a made-up corpus of speech"


def main(arguments: argparse.Namespace) -> int:
    text, overrides = take(arguments.overrides, "world_size")
    world_size = positive(text, "world_size") or 1
    text, overrides = take(overrides, "utterances")
    if (count := positive(text, "utterances")) is not None:
        from trainer.bench.plan import stand_in

        with stand_in(arguments.config, overrides, count) as more:
            return _print(arguments.config, [*overrides, *more], world_size, f" of {count:,} made-up utterances")
    return _print(arguments.config, overrides, world_size)


def _print(config_name: str, overrides: list[str], world_size: int, what: str = "") -> int:
    """The whole of it; `what` the corpus is, if it is none of its own."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from trainer import distributed
    from trainer.data.prepared import SpeechDataConfig
    from trainer.errors import UserError
    from trainer.evaluation import left_out
    from trainer.models.regularizers import penalises_weights
    from trainer.recipe import load
    from trainer.run import read_quarantine

    recipe = load(config_name, overrides)
    config = recipe.config
    try:
        dataset = recipe.build_dataset("train")
    except UserError as error:
        data = getattr(config, "data", None)
        if isinstance(data, SpeechDataConfig) and not (data.path / "corpus.json").is_file():
            raise UserError(f"{error}; or plan as many made-up ones: `plan {config_name} utterances=N`") from error
        raise
    known = read_quarantine(config.quarantine, "train")
    steps = dataset.plan.epoch(0, [fault.key for fault in known])
    size = dataset.plan.micro_batches_per_step
    rounds = math.ceil(size / world_size)
    counts = steps.totals()
    dummies = rounds * world_size * len(steps) - steps.num_micro_batches()
    model = recipe.build_model()

    table = Table(show_header=False, title=Text(f"{config.name}, epoch 1{what} on {world_size} process(es)"))
    table.add_row("samples", f"{counts.get('samples', 0):,.0f} of {len(dataset):,}")
    for reason in filter(None, left_out([*dataset.plan.rejections, *known]).split(", ")):
        table.add_row("left out", Text(reason))
    if odd := dataset.plan.suspicions:
        shown = "; ".join(f"{s.key}: {s.detail}" for s in odd[:3])
        table.add_row("look at", Text(f"{left_out(odd)} (used all the same): {shown}"))
    table.add_row("steps", f"{len(steps):,} an epoch, {config.max_steps or len(steps) * config.max_epochs:,} in all")
    table.add_row("micro-batches", f"up to {size} a step, {rounds} a process; {dummies} dummies keep the ranks in step")
    padding = 0.0
    if counts.get("padded_seconds"):
        padding = 1 - counts["seconds"] / counts["padded_seconds"]
        table.add_row(
            "sound", f"{counts['seconds'] / 3600:.2f} h an epoch; {100 * padding:.1f} % of what is computed is padding"
        )
    table.add_row("parameters", f"{sum(p.numel() for p in model.parameters() if p.requires_grad):,}")
    for name, fact in recipe.describe(model).items():
        table.add_row(name, fact)
    if steps:
        text, grown = _worst(recipe, dataset, steps, model)
        table.add_row("worst batch", f"{text}; forward and backward take {grown / 2**20:,.0f} MiB")
    console = Console()
    console.print(table)
    left = (len(dataset.plan.rejections) + len(known)) / max(len(dataset), 1)
    if left > MUCH_WASTE or not steps:
        told = f"{100 * left:.0f} % of the samples are left out, see above" + ("" if steps else ": nothing to train on")
        console.print(f"warning: {told}; mend the data, or what leaves it out", highlight=False, soft_wrap=True)
    passes = rounds * world_size * len(steps)
    for warning in _warnings(world_size, size, dummies / max(passes, 1), padding):
        console.print(f"warning: {warning}", highlight=False, markup=False, soft_wrap=True)
    console.print("DeepSpeed:", highlight=False)
    derived = distributed.deepspeed_config(
        config.zero, config.optimizer, config.precision, rounds, penalises_weights(model)
    )
    console.print_json(json.dumps(derived))
    return 0


def _worst(recipe: "Recipe[Any]", dataset: "Dataset", steps: "Steps", model: "nn.Module") -> tuple[str, int]:
    """The batch that is computed longest, and the most bytes that any batch takes beside the weights."""
    import torch

    from trainer import memory
    from trainer.evaluation import to_device

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device).train()
    worst = steps.worst()
    batches = [dataset.load(m) for m in worst]

    def work() -> None:
        for batch in batches:
            output = recipe.step(model, to_device(batch, device))
            sum((x.sum for x in output.losses.values()), start=torch.zeros((), device=device)).backward()

    _, _, grown = memory.taken(device, work)
    size = worst[0].cost / len(worst[0].samples)
    counts = steps[0].counts
    unit = "frames" if "frames" in counts else "tokens"
    length = f"up to {size:.1f} s" if "seconds" in counts else f"{size:,.0f} {unit}"
    return f"{len(worst[0].samples)} samples of {length}", grown


def _warnings(world_size: int, size: int, dummies: float, padding: float) -> list[str]:
    """What would be wasted, each with its cure.

    Args:
        size: micro-batches of a step.
        dummies, padding: their shares.
    """
    found = []
    if world_size > size:
        idle = f"rank {size} has" if world_size == size + 1 else f"ranks {size} to {world_size - 1} have"
        found.append(
            f"{idle} nothing to do in any step: a step holds {size} micro-batches for {world_size} processes; set "
            f"plan.micro_batches_per_step={world_size} or more, or start fewer processes"
        )
    elif 1 - size / (most := math.ceil(size / world_size) * world_size) > MUCH_WASTE:
        found.append(
            f"{100 * dummies:.0f} % of all passes are dummies that keep the ranks in step; make "
            f"plan.micro_batches_per_step a multiple of the {world_size} processes, e.g. {most}"
        )
    elif dummies > HALF:
        found.append(
            f"{100 * dummies:.0f} % of all passes are dummies, as an epoch has fewer micro-batches than its steps "
            "could hold; make plan.micro_batches_per_step smaller"
        )
    if padding > MUCH_WASTE:
        found.append(
            f"{100 * padding:.0f} % of what is computed is padding; raise plan.window_shards, or plan.num_buckets if a "
            "window holds many clips"
        )
    return found
