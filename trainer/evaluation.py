"""Scoring a split: the same numbers to the last bit on any number of ranks, and an account of what was not scored."""

import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import distributed
from trainer.config import show
from trainer.data.dataset import MISSING, Batch, Fault
from trainer.data.plan import Rejection
from trainer.distributed import Ranks
from trainer.errors import RequeueError, UserError
from trainer.metrics import Mean, add
from trainer.place import COLLECTIVE, VALIDATION, being_read, board
from trainer.recipe import Recipe, Row, RunConfig, Split, State
from trainer.run import BEFORE, READING, RunDirectory, read_quarantine
from trainer.signals import StopSignals

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """What came of scoring a split; equal on all ranks."""

    values: dict[str, float]
    """Means of all losses ("loss" is their weighted sum) and metrics."""
    rows: list[Row]
    """A row a sample."""
    scored: int
    """Samples that counted."""
    bad: list[Fault]
    """Samples that could not be read."""


def left_out(rejections: Iterable[Rejection | Fault]) -> str:
    """What cannot be used, as counts of each reason."""
    reasons = Counter(r.reason for r in rejections)
    return ", ".join(f"{n} {reason}" for reason, n in reasons.items())


def quarantined(faults: Iterable[Rejection | Fault], found: str, **facts: Any) -> list[dict[str, Any]]:
    """Rows of a quarantine.

    Args:
        found: how, see `trainer.run`.
        facts: split, epoch and step.
    """
    return [{**facts, "key": f.key, "reason": f.reason, "detail": f.detail, "found": found} for f in faults]


def refuse_too_many(
    bad: int, missing: int, total: int, config: RunConfig, path: Path, last: Sequence[Mapping[str, Any]]
) -> None:
    """Stop where more samples turned out bad, or did not come, than the configuration allows.

    Args:
        bad, missing: their numbers, of `total`.
        path: where all are on record.
        last: rows of the quarantine; the last ten are shown.

    Raises:
        UserError: they are too many.
    """
    limits = {
        "bad samples": (bad, "max_bad_share", config.max_bad_share, "mend the data or raise it"),
        "samples did not come": (
            missing,
            "max_missing_share",
            config.max_missing_share,
            "mend the way to data.remote.url, then start again to go on, or raise it",
        ),
    }
    for what, (found, key, share, cure) in limits.items():
        allowed = max(1, int(share * total))
        if found > allowed:
            raise UserError(
                f"{path}: {found} {what} of {total}, more than {key} = {share:g} allows ({allowed}); {cure}. The last "
                "ones:\n" + "\n".join(f"  {row['key']}: {row['reason']} {row['detail']}".rstrip() for row in last[-10:])
            )


class Evaluator:
    """Scores a split with a plain copy of the model, which holds the averaged weights.

    A copy of its own takes no part in training: nothing is written into a trained parameter, and no collective runs
    inside a forward pass. Results are added in the order of the micro-batches, so they are the same on any number of
    ranks.

    Args:
        recipe: with its configuration.
        split: to score.
        ranks: this process among all.
    """

    def __init__(self, recipe: Recipe[Any], split: Split, ranks: Ranks) -> None:
        self.recipe = recipe
        self.split = split
        self.dataset = recipe.build_dataset(split)
        self.ranks = ranks
        self.model = recipe.build_model().to(ranks.device).eval()
        self.known: list[Fault] = distributed.on_first(lambda: read_quarantine(recipe.config.quarantine, split))

    @torch.inference_mode()
    def run(self, weights: dict[str, Tensor], signals: StopSignals | None = None) -> Evaluation:
        """Score every sample that the plan can use.

        Args:
            signals: looked at before each step of the plan.

        Raises:
            RequeueError: a signal came to one of the ranks; on every rank alike.
        """
        self.model.load_state_dict(weights)
        results = []
        carried: dict[int, State] = {}
        own = slice(self.ranks.rank, None, self.ranks.world_size)  # by number, as in training: a stream stays together
        steps = self.dataset.plan.epoch(0, [fault.key for fault in self.known])
        for step in steps:
            if signals is not None and self._any_received(signals):
                raise RequeueError
            for micro_batch in step.micro_batches[own]:
                board.at(VALIDATION, describe=being_read)
                batch = self.dataset.load(micro_batch)
                state = carried.pop(micro_batch.number, None)
                output = self.recipe.step(self.model, to_device(batch, self.ranks.device), state)
                if output.state is not None:
                    carried[micro_batch.number] = output.state
                means = {name: Mean(float(x.sum), x.count) for name, x in output.losses.items()}
                weight = {name: x.weight for name, x in output.losses.items()}
                means |= {name: Mean(float(m.sum), m.count) for name, m in output.metrics.items()}
                number = (micro_batch.step, micro_batch.number)
                results.append((number, means, weight, output.rows, int(batch["valid"].sum()), batch["faults"]))
        board.at(COLLECTIVE)
        everything = sorted((r for part in distributed.gather(results) for r in part), key=lambda r: r[0])
        totals: dict[str, Mean] = {}
        weights_of: dict[str, float] = {}
        for _, means, weight, *_ in everything:
            add(totals, means)
            weights_of |= weight
        values = {name: float(m.sum) / max(m.count, 1e-9) for name, m in totals.items()}
        values["loss"] = sum(values[name] * w for name, w in weights_of.items())
        values |= self.recipe.derive(values)
        return Evaluation(
            values,
            rows=[row for r in everything for row in r[3]],
            scored=sum(r[4] for r in everything),
            bad=[fault for r in everything for fault in r[5]],
        )

    def _any_received(self, signals: StopSignals) -> bool:
        """Whether a signal came to one of the ranks."""
        board.at(COLLECTIVE)
        vote = torch.tensor(float(signals.received is not None), device=self.ranks.device)
        return bool(distributed.sum_over_ranks(vote))

    def account(self, evaluation: Evaluation, run: RunDirectory, step: int, epoch: int) -> None:
        """Put bad samples on record, and stop where they are too many; every rank calls it.

        Args:
            step, epoch: the age of the weights.

        Raises:
            UserError: too many are bad, or none was left to score.
        """
        facts = {"split": self.split, "epoch": epoch, "step": step}
        rows = quarantined(evaluation.bad, READING, **facts)
        if self.ranks.first:
            run.add_to_quarantine(quarantined(self.known, BEFORE, **facts))
            for row in run.add_to_quarantine(rows):
                log.warning("bad sample %s (%s): %s %s", row["key"], self.split, row["reason"], row["detail"])
        missing = sum(fault.reason == MISSING for fault in evaluation.bad)
        refuse_too_many(len(rows) - missing, missing, len(self.dataset), self.recipe.config, run.quarantine, rows)
        if not evaluation.scored:
            reasons = left_out([*self.dataset.plan.rejections, *self.known])
            raise UserError(f"{self.recipe.config.name}: no sample of the split {self.split} can be scored: {reasons}")


def write_evaluation(folder: Path, split: str, result: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> None:
    """Write SPLIT.jsonl, a row a line, and SPLIT.json, each whole or not at all.

    Args:
        result: the numbers, `metrics` among them.
        rows: see `trainer.recipe.Row`.
    """
    folder.mkdir(exist_ok=True)
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    for ending, text in (("jsonl", "".join(lines)), ("json", json.dumps(result, ensure_ascii=False, indent=1) + "\n")):
        temporary = folder / f"{split}.tmp"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(folder / f"{split}.{ending}")


def read_evaluation(path: Path) -> dict[str, Any]:
    """What `evaluate` wrote: the numbers, and as `rows` the lines of the file beside them.

    Args:
        path: SPLIT.json.

    Raises:
        UserError: it is something else, or damaged.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        with path.with_suffix(".jsonl").open(encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        for row in rows:
            row["key"], row["errors"], row["length"], row["columns"]
        return {**found, "metrics": dict(found["metrics"]), "rows": rows}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{show(path)}: is not what `evaluate` writes ({error}); delete it or evaluate again"
        ) from error


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Move the tensors of a batch."""
    if device.type == "cpu":
        return batch
    return {k: v.to(device, non_blocking=True) if torch.is_tensor(v) else v for k, v in batch.items()}
