"""Weights from one run to another or out of it, and which of them stay as they are."""

import difflib
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trainer import checkpoint, distributed
from trainer import config as configuration
from trainer.checkpoint import Checkpoint
from trainer.config import show
from trainer.data.text import SUBWORDS_FILE
from trainer.errors import UserError
from trainer.run import RunDirectory


def below(name: str, parts: Iterable[str]) -> bool:
    """Whether a dotted name is one of `parts` or lies below one."""
    return any(name == part or name.startswith(f"{part}.") for part in parts)


def freeze(model: nn.Module, parts: Sequence[str]) -> None:
    """Keep weights from being trained.

    Args:
        parts: names of modules or weights.

    Raises:
        UserError: there is no such part, or nothing is left to train.
    """
    named = dict(model.named_parameters(remove_duplicate=False))
    known = sorted({".".join(n.split(".")[:depth]) for n in named for depth in range(1, n.count(".") + 2)})
    for part in parts:
        found = [p for name, p in named.items() if below(name, [part])]
        if not found:
            near = difflib.get_close_matches(part, known, n=1, cutoff=0.4)
            hint = f"did you mean {near[0]}?" if near else "parts: " + ", ".join(n for n in known if "." not in n)
            raise UserError(f"freeze = {part!r}: the model has no such module or weight; {hint}")
        for p in found:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in named.values()):
        raise UserError(f"freeze = {list(parts)}: nothing is left to train; name fewer parts")


def take_weights(model: nn.Module, source: Path, heads: Sequence[str], labels: Mapping[str, str]) -> list[str]:
    """Copy the weights of another run's best checkpoint into a model; every rank calls it.

    Args:
        source: the run.
        heads: parts that depend on the labels. Where the other run has other labels, or they have another shape, they
            stay as they are; everything else must fit.
        labels: what the outputs of this model stand for.

    Returns:
        a line for each tensor that was not taken.

    Raises:
        UserError: there is no such run, or its weights do not fit.
    """
    best: Checkpoint = distributed.on_first(lambda: checkpoint.best(RunDirectory.existing(str(source)).checkpoints))
    theirs, ours = best.weights(), model.state_dict()
    their_labels = {k: v for k, v in best.state.get("data", {}).get("train", {}).items() if k in labels}
    same = their_labels == dict(labels)
    taken: dict[str, Tensor] = {}
    fresh: list[str] = []
    wrong: list[str] = []
    for name, value in ours.items():
        if name in theirs and theirs[name].shape == value.shape and (same or not below(name, heads)):
            taken[name] = theirs[name]
            continue
        there = list(theirs[name].shape) if name in theirs else "absent"
        why = ", for other labels" if there == list(value.shape) else ""
        (fresh if below(name, heads) else wrong).append(f"{name}: here {list(value.shape)}, there {there}{why}")
    unused = [f"{name}: here absent, there {list(value.shape)}" for name, value in theirs.items() if name not in ours]
    if wrong:
        shown = wrong[:10] + ([f"and {len(wrong) - 10} more"] if len(wrong) > 10 else [])
        raise UserError(
            f"init_from = {source}: {show(best.folder)}: its weights do not fit this model:\n"
            + "\n".join(shown)
            + f"\nset the same model keys as there; only {', '.join(heads)} may differ"
        )
    model.load_state_dict(ours | taken)
    return [f"{line}: drawn anew" for line in fresh] + [f"{line}: not taken" for line in unused]


def export(run: RunDirectory, folder: Path, config: configuration.Config) -> dict[str, Any]:
    """Write the weights of a run's best checkpoint, a configuration and what one must know of them.

    Args:
        folder: is made; what an earlier export left there is replaced.
        config: the run's, with what is to be otherwise wherever the weights are used.

    Returns:
        what `export.json` holds.

    Raises:
        UserError: there is no whole checkpoint, or the folder cannot be written.
    """
    best = checkpoint.best(run.checkpoints)
    values = configuration.plain(config)
    weights = {name: value.contiguous().clone() for name, value in best.weights().items()}
    facts = {
        "run": run.path.resolve().name,
        "step": best.state["position"]["step"],
        "labels": {k: v for k, v in best.state["data"]["train"].items() if k != "samples"},
        "numbers": sum(value.numel() for value in weights.values()),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".weights.pt"
        torch.save(weights, temporary)
        facts["sha256"] = hashlib.sha256(temporary.read_bytes()).hexdigest()
        temporary.replace(folder / "weights.pt")
        (folder / "config.yaml").write_text(configuration.dump_yaml(values), encoding="utf-8")
        vocabulary = Path(values.get("data", {}).get("path", "")) / SUBWORDS_FILE
        if vocabulary.is_file():  # of labels that are subwords
            (folder / SUBWORDS_FILE).write_bytes(vocabulary.read_bytes())
        (folder / "export.json").write_text(json.dumps(facts, ensure_ascii=False, indent=1), encoding="utf-8")
    except (OSError, RuntimeError) as error:  # RuntimeError: torch could not write
        raise UserError(f"{show(folder)}: cannot be written: {error}; name another with to=FOLDER") from error
    return facts
