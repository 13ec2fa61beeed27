"""What goes wrong in a run without ending it, on record and within a budget: bad samples, refused steps, spikes.

Every rank calls these functions at the same steps, and all come to the same decision.
"""

import logging
from collections.abc import Iterable

from trainer import distributed
from trainer.data.dataset import MISSING, Dataset, Fault
from trainer.errors import UserError
from trainer.evaluation import left_out, quarantined, refuse_too_many
from trainer.position import Position
from trainer.recipe import RunConfig
from trainer.run import BEFORE, PLAN, READING, RunDirectory, append, read_lines

log = logging.getLogger(__name__)


def record_left_out(run: RunDirectory, where: Position, splits: Iterable[tuple[str, Dataset, list[Fault]]]) -> None:
    """What the plans and earlier runs leave out from the start, and what looks odd; rank 0 only."""
    odd = []
    for split, dataset, known in splits:
        facts = {"split": split, "epoch": where.epoch, "step": where.step}
        run.add_to_quarantine(quarantined(known, BEFORE, **facts))
        run.add_to_quarantine(quarantined(dataset.plan.rejections, PLAN, **facts))
        odd += [{"split": split, "key": s.key, "reason": s.reason, "detail": s.detail} for s in dataset.plan.suspicions]
    run.write_suspicious(odd)


def bad_samples(run: RunDirectory, config: RunConfig, where: Position, own: list[Fault], num_samples: int) -> None:
    """Leave samples out that could not be read.

    Args:
        own: this rank's.
        num_samples: of the split.

    Raises:
        UserError: they are too many.
    """
    found = [fault for part in distributed.gather(own) for fault in part]
    rows = quarantined(found, READING, split="train", epoch=where.epoch, step=where.step)
    where.bad = sorted({*where.bad, *(fault.key for fault in found if fault.reason != MISSING)})
    where.missing += sum(fault.reason == MISSING for fault in found)
    if distributed.is_first():
        for row in run.add_to_quarantine(rows):
            log.warning("bad sample %s: %s %s", row["key"], row["reason"], row["detail"])
    refuse_too_many(len(where.bad), where.missing, num_samples, config, run.quarantine, rows)


def summary(run: RunDirectory) -> str | None:
    """What reading has left out, for the end of a run."""
    rows = [row for row in read_lines(run.quarantine) if row.get("found") == READING]
    text = left_out(Fault(row["key"], row["reason"]) for row in rows)
    return f"{len(rows)} bad samples were skipped: {text}; see {run.quarantine}" if rows else None


def refused_step(run: RunDirectory, config: RunConfig, where: Position, own: list[str]) -> None:
    """A step that no rank has applied, because its loss or gradient was not finite.

    Args:
        own: keys of this rank's samples in it.

    Raises:
        UserError: there were too many.
    """
    where.refused_steps += 1
    keys = [key for part in distributed.gather(own) for key in part]
    if distributed.is_first():
        append(run.refused, [{"step": where.step, "epoch": where.epoch, "keys": keys}])
        log.warning("step %d was refused: its loss or gradient is not finite", where.step)
    if where.refused_steps > config.max_refused_steps:
        raise UserError(
            f"{run.refused}: {where.refused_steps} steps had a loss or gradient that was not finite, more than "
            f"max_refused_steps = {config.max_refused_steps}; lower optimizer.lr or look at these samples"
        )


def spike(run: RunDirectory, config: RunConfig, where: Position, loss: float, usual: float, back_to: int) -> None:
    """A step after which the run has gone back to an older checkpoint.

    Args:
        loss, usual: of that step, and of those before.
        back_to: step of the checkpoint.

    Raises:
        UserError: there were too many.
    """
    where.taken_back = [*where.taken_back, [back_to + 1, where.step]]
    if distributed.is_first():
        row = {"step": where.step, "epoch": where.epoch, "loss": loss, "usual": usual, "taken_back_from": back_to + 1}
        append(run.spikes, [row])
    if len(where.taken_back) > config.spikes.max_rollbacks:
        raise UserError(
            f"{run.spikes}: {len(where.taken_back)} spikes, more than spikes.max_rollbacks = "
            f"{config.spikes.max_rollbacks}; lower optimizer.lr or look at the samples of these steps in the ledger"
        )
