"""The one training loop. It accumulates, clips, steps, logs, validates and saves, and knows no task.

What the loop may rely on: the plan gives every rank the same number of rounds, so no rank waits for one that has run
out of data; the counts of a step are known before it runs, so the loss needs no collective to be normalised; and all
decisions (stop, best, plateau, bad samples) are made from numbers that are equal on every rank.
"""

import logging
import math
import time
from collections.abc import Iterator
from functools import partial
from itertools import chain, islice
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from kernels.say import say_once
from trainer import checkpoint as checkpoints
from trainer import config as configuration
from trainer import distributed, hosts, incidents, keyed, machine, transfer
from trainer.analysis import recurrences
from trainer.checkpoint import Checkpoint
from trainer.checkpoint_writer import Writer
from trainer.data.dataset import Batch, Dataset, Fault
from trainer.data.loader import Loader
from trainer.data.plan import MicroBatch, Step, mine
from trainer.distributed import CARRIED, Ranks, Slice, Trained
from trainer.errors import EXIT_OUR_FAULT, RequeueError, UserError
from trainer.evaluation import Evaluator, left_out, to_device
from trainer.examples import examples
from trainer.models.block import recompute_blocks
from trainer.models.normalization import update_statistics
from trainer.models.regularizers import activation_losses, at_step, penalises_weights, weight_penalty
from trainer.optim import Plateau, set_lr
from trainer.place import BACKWARD, CHECKPOINT, COLLECTIVE, DATA, END, FORWARD, START, board
from trainer.position import Position
from trainer.profiling import Profile
from trainer.recipe import Recipe, State, StepOutput, Wish
from trainer.run import Ledger, LogFile, RunDirectory, read_quarantine
from trainer.signals import StopSignals
from trainer.spikes import Spikes
from trainer.tracking import Tracker

log = logging.getLogger(__name__)

PATIENCE = 0.3
"""Share of the deadline for W&B to begin, and to end: with what else is to be done then, less than the watchdog's."""


def initialise(model: nn.Module, seed: int) -> None:
    """Draw every module's weights from (seed, name of the module): adding a layer does not change the others."""
    with torch.random.fork_rng(devices=[]):
        for name, module in model.named_modules():
            if callable(reset := getattr(module, "reset_parameters", None)):
                torch.manual_seed(keyed.key(seed, name, "weights"))
                reset()


class Training:
    """One run from where it stands to its end.

    Args:
        recipe: with its configuration.
        ranks: this process among all.
        signals: caught already, so that one that comes before `fit` counts; None catches them in `fit`.
    """

    def __init__(self, recipe: Recipe[Any], ranks: Ranks, signals: StopSignals | None = None) -> None:
        self.recipe, self.ranks, self.config = recipe, ranks, recipe.config
        config = self.config
        distributed.check_precision(config.precision, ranks.device)
        self.run = RunDirectory(config.runs_dir / config.name)
        distributed.on_first(lambda: self.run.claim(config))
        hosts.check_alike(self.run.path)
        self._log_to_file()
        self.dataset = recipe.build_dataset("train")
        self.validation = Evaluator(recipe, "valid", ranks)
        self.data = {"train": self.dataset.identity, "valid": self.validation.dataset.identity}
        self._compare_data()
        distributed.on_first(lambda: self.run.save_config(config))
        self.rounds = math.ceil(self.dataset.plan.micro_batches_per_step / ranks.world_size)
        board.at(START)  # a piece of work each
        model = recipe.build_model()
        initialise(model, config.seed)
        self.writer = Writer(self.run.checkpoints, config.checkpoint)
        distributed.on_first(self.writer.clean)
        found: Checkpoint | None = distributed.on_first(lambda: checkpoints.newest(self.run.checkpoints))
        self.not_taken: list[str] = []
        if found is None and config.init_from is not None:
            labels = {name: value for name, value in self.data["train"].items() if name != "samples"}
            self.not_taken = transfer.take_weights(model, config.init_from, recipe.heads, labels)
        transfer.freeze(model, config.freeze)
        recompute_blocks(model, config.activation_checkpointing)
        model.to(ranks.device)
        whole = penalises_weights(model)
        self.trained = Trained(model, config.zero, config.optimizer, config.precision, self.rounds, whole)
        board.at(START)
        self.position, self.plateau, self.best = Position(), Plateau(), dict[int, float]()
        self.validated: dict[str, float] = {}
        self.spikes = Spikes(config.spikes)
        self._last_norms: dict[str, float] = {}  # of gradients before this start, for a validation that was due then
        self.carried: dict[int, State] = {}  # by number of the micro-batch, those of this rank
        self.known: list[Fault] = distributed.on_first(lambda: read_quarantine(config.quarantine, "train"))
        if found is not None:
            self._restore(found)
            self.position.known = sorted({*self.position.known, *(fault.key for fault in self.known)})
        else:
            self.position.known = self.position.excluded = sorted(fault.key for fault in self.known)
            self.position.total_steps = config.max_steps or self._steps_of_an_epoch() * config.max_epochs
        distributed.on_first(lambda: self.run.cut_back(self.position.step, self.position.validation_due is None))
        distributed.on_first(lambda: incidents.record_left_out(self.run, self.position, self._splits()))
        board.at(START)
        self.machine = machine.describe()
        self.signals = signals or StopSignals()
        self.ledger = Ledger(self.run.ledger, ranks.rank)
        self.tracker = Tracker(
            config.tracking,
            self.run.path,
            config.name,
            configuration.plain(config),
            self.position.total_steps,
            active=ranks.first,
            patience_seconds=PATIENCE * config.launch.deadline_seconds,
        )

    def _log_to_file(self) -> None:
        handler = LogFile(self.run.logs / f"rank-{self.ranks.rank:05d}.log", encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        say_once.cache_clear()  # of a run before in this process

    def _splits(self) -> Iterator[tuple[str, Dataset, list[Fault]]]:
        """Each split with its data and what is known to be bad in it."""
        yield "train", self.dataset, self.known
        yield "valid", self.validation.dataset, self.validation.known

    def _steps_of_an_epoch(self) -> int:
        """Of the first one; all splits must have some."""
        for split, dataset, known in self._splits():
            if not dataset.plan.epoch(0, [fault.key for fault in known]):
                reasons = left_out([*dataset.plan.rejections, *known]) or "it is empty"
                raise UserError(f"{self.config.name}: the split {split} holds no usable sample: {reasons}")
        return len(self.dataset.plan.epoch(0, self.position.excluded))

    def _compare_data(self) -> None:
        """All ranks must see the same data, or their plans would differ."""
        for rank, data in enumerate(distributed.gather(self.data)):
            if data != self.data:
                raise UserError(
                    f"rank {rank} finds other data than rank {self.ranks.rank}: {data} and {self.data}; "
                    "copy the same data.path to every host"
                )

    def _restore(self, found: Checkpoint) -> None:
        state = found.state
        found.check_data(self.data)
        self._take_back(found)
        self.position = Position(**state["position"])
        self.spikes.losses = list(state["losses"])
        self.writer.written_step = self.position.step
        board.saved(self.position.step)
        log.info("resumed from %s", found.folder)

    def _take_back(self, found: Checkpoint) -> None:
        """Weights, optimizer, what follows from validations, and carried states, as they were."""
        self.trained.allocate(found.slots(), found.state["scalars"])
        found.fill(self.trained.slices(everything=True), self.trained.shapes)
        self.trained.filled()
        self.trained.scale.restore(found.state["scale"])
        self.plateau.restore(found.state["plateau"])
        self.trained.optimizer.triggered = self.plateau.triggered
        self.best = {int(step): value for step, value in found.state["best"].items()}
        self.validated = found.state.get("validated", {})
        self._last_norms = found.state.get("gradient_norms", {})
        self.carried.clear()
        for name, values in found.tensors(CARRIED).items():
            number, _, part = name.partition(".")
            if int(number) % self.ranks.world_size == self.ranks.rank:
                self.carried.setdefault(int(number), {})[part] = values.to(self.ranks.device)

    # The loop

    def fit(self) -> dict[str, float]:
        """Train to the end.

        Returns:
            the last validation's numbers.

        Raises:
            RequeueError: stopped by a signal, saved.
            UserError: too many bad samples or refused steps.
            SystemExit: the last checkpoint could not be written; exit code 1.
        """
        self._greet()
        if self.config.profile:
            self._profile = Profile(self.run.path / "profile" / f"rank-{self.ranks.rank:05d}.json")
        exit_code = 1
        try:
            with self.signals:
                if self.position.validation_due is not None:
                    self._make_up_validation()
                while not self._finished():
                    self._train()
            if self._stops_early():
                stop_after = self.config.validation.early_stop_after
                self.tracker.say(f"stopped early: no better {self.recipe.monitor} for {stop_after} validations")
            self._save_or_fail()
            if self.ranks.first and (text := incidents.summary(self.run)):
                self.tracker.say(text)
            exit_code = 0
        except RequeueError:
            exit_code = 75
            raise
        finally:
            if exit_code != EXIT_OUR_FAULT:  # else the place of the failure is still to be told
                board.at(END)
            self.close(exit_code)
        return self.validated

    def close(self, exit_code: int) -> None:
        """Close the files and W&B."""
        if self._profile is not None:
            self._profile.stop()
        self.ledger.close()
        self.tracker.finish(exit_code)

    def _greet(self) -> None:
        where = self.position
        if where.step:
            self.tracker.say(f"resumed at step {where.step} (epoch {where.epoch + 1}) of {where.total_steps}")
            config, end = self.config, where.total_steps
            more = where.epoch < config.max_epochs and (config.max_steps is None or config.max_steps > where.step)
            if more and where.step >= end and config.schedule.kind == "cosine":
                self.tracker.say(
                    f"the schedule that the run began with ended at step {end}: what follows has its last learning "
                    f"rate, {config.schedule.final:g} of optimizer.lr; for a new schedule start a run with init_from"
                )
        for split, dataset, known in self._splits():
            if rejections := dataset.plan.rejections:
                self.tracker.say(f"{split}: left out of {len(dataset)} samples: {left_out(rejections)}")
            if known:
                self.tracker.say(f"{split}: left out as {self.config.quarantine} says: {left_out(known)}")
            if odd := dataset.plan.suspicions:
                self.tracker.say(f"{split}: used, but look at them: {left_out(odd)}; see {self.run.suspicious}")
        for line in self.not_taken:
            self.tracker.say(f"init_from = {self.config.init_from}: {line}")
        self.tracker.say(
            f"{self.config.name}: {self.trained.num_trained:,} parameters to train, "
            f"{self.ranks.world_size} process(es) x {torch.get_num_threads()} thread(s), "
            f"{self.rounds} micro-batch(es) each a step, ZeRO {self.config.zero.stage}, {self.config.precision}"
        )

    def _stops_early(self) -> bool:
        stop_after = self.config.validation.early_stop_after
        return stop_after is not None and self.plateau.since_best >= stop_after

    def _finished(self) -> bool:
        where, config = self.position, self.config
        if self._stops_early():
            return True
        return where.epoch >= config.max_epochs or (config.max_steps is not None and where.step >= config.max_steps)

    def _coming(self) -> Iterator[Step]:
        """The steps from here to the end, if no more samples turn out bad than are known now."""
        where, config = self.position, self.config
        done, excluded, later = where.step_in_epoch, where.excluded, where.left_out_later()
        for epoch in range(where.epoch, config.max_epochs):
            yield from self.dataset.plan.epoch(epoch, excluded)[done:]
            done, excluded = 0, later

    def _train(self) -> None:
        """Train to the end, or to that of an epoch after which more samples are left out than the loader knew."""
        where, config, ranks = self.position, self.config, self.ranks
        before, known = where.step, where.left_out_later()
        left = None if config.max_steps is None else config.max_steps - where.step
        steps = islice(self._coming(), left)
        board.at(DATA, where.step + 1)
        loader = Loader(self.dataset, steps, ranks.rank, ranks.world_size, self.rounds, config.num_workers)
        for step, batches in loader:
            self.step(step, batches, loader.waited_seconds)
            epoch, last = where.epoch, step.last
            if last:
                where.epoch, where.step_in_epoch = where.epoch + 1, 0
                where.excluded, where.missing = where.left_out_later(), 0
            every = config.validation.every_steps
            ended = config.max_steps is not None and where.step >= config.max_steps
            better = False
            if (where.step % every == 0 if every else last) or ended or (last and where.epoch >= config.max_epochs):
                where.validation_due = epoch
                better = not self._stopping and self._validate()
            due = better or where.step % config.checkpoint.every_steps == 0
            if self._may_save or (due and not self.writer.paused):
                self._save()
            if self._stopping:
                self._stop()
            if self._finished() or (last and where.excluded != known):
                break
        if where.step == before:
            raise UserError(
                f"{config.name}: epoch {where.epoch + 1} holds no sample: {len(where.excluded)} of {len(self.dataset)} "
                f"are left out as bad, see {self.run.quarantine}"
            )

    def _stop(self) -> NoReturn:
        """Save and leave: a signal came."""
        self._save_or_fail()
        self.tracker.say(f"stopped by a signal at step {self.position.step}, saved; the same command goes on")
        distributed.on_first(self.run.stopped)
        raise RequeueError

    def _make_up_validation(self) -> None:
        """Begin where a signal came before a validation."""
        self._validate()
        if self._stopping:
            self._stop()
        self._save()  # this step's checkpoint again, which now knows of it

    _stopping = False
    _may_save = False
    _profile: Profile | None = None

    def step(self, step: Step, batches: list[Batch], waited: float) -> None:
        """One optimizer step on this rank's batches, with everything that is recorded about it.

        Args:
            waited: seconds that the batches let this rank wait.
        """
        where, config, start = self.position, self.config, time.perf_counter()
        lr = config.optimizer.lr * config.schedule.factor(where.applied_steps, where.total_steps, self.plateau)
        lr *= step.lr_share
        set_lr(self.trained.optimizer, lr)
        self.trained.module.train()
        at_step(self.trained.module, config.seed, where.step)
        sums: dict[str, float] = {}
        faults: list[Fault] = []
        applied = None
        own: list[MicroBatch | None] = mine(step, self.ranks.rank, self.ranks.world_size, self.rounds)
        for micro_batch, batch in zip(own, batches, strict=True):
            if micro_batch is not None:
                self.ledger.record(where.epoch, where.step + 1, micro_batch.number, batch)
                faults += batch["faults"]
            board.at(FORWARD, where.step + 1, partial("samples {}".format, " ".join(batch["keys"])))
            state = self.carried.pop(micro_batch.number, None) if micro_batch is not None else None
            batch = to_device(batch, self.ranks.device)
            output = self.recipe.step(self.trained.model, batch, state)
            self._regularize(output, batch)
            if micro_batch is not None and output.state is not None:
                self.carried[micro_batch.number] = {name: t.detach() for name, t in output.state.items()}
            board.at(BACKWARD)
            self.trained.backward(self._scaled(output, step))
            for name, loss in output.losses.items():
                sums[name] = sums.get(name, 0.0) + float(loss.sum.detach())
            board.at(COLLECTIVE)
            applied = self.trained.step()
        assert applied is not None
        if step.last or not applied.applied:  # a stream starts anew; a state behind a refused step is not finite
            self.carried.clear()
        update_statistics(self.trained.module, applied.applied)

        names = sorted(sums)
        vote = torch.tensor(
            [
                float(self.signals.received is not None),
                float(self.writer.ready),
                float(self.writer.may_try()),
                float(len(faults)),
                waited,
                *(sums[n] for n in names),
            ],
            dtype=torch.float64,
        ).to(self.ranks.device)
        stop, written, may_save, num_faults, waiting, *totals = distributed.sum_over_ranks(vote).tolist()
        self._stopping, self._may_save = stop > 0, may_save > 0
        if written == self.ranks.world_size:
            self.writer.advance()
        where.step += 1
        where.step_in_epoch += 1
        where.applied_steps += applied.applied
        where.audio_seconds += step.counts.get("seconds", 0.0)
        seconds = time.perf_counter() - start + waited
        where.train_seconds += seconds
        if num_faults:
            incidents.bad_samples(self.run, config, where, faults, len(self.dataset))
        if applied.rescaled and all(map(math.isfinite, totals)):
            where.rescaled_steps += 1
        elif not applied.applied:
            keys = [key for batch in batches for key in batch["keys"] if key]
            incidents.refused_step(self.run, config, where, keys)
        units = {n: loss.unit for n, loss in output.losses.items()}
        means = {n: total / max(step.counts[units[n]], 1.0) for n, total in zip(names, totals, strict=True)}
        loss = sum(means[n] * x.weight for n, x in output.losses.items())
        self._track(step, loss, means, lr, applied.grad_norm, seconds, waiting / self.ranks.world_size)
        if applied.applied and self.spikes.observe(loss):
            self._roll_back(loss)
            if step.last:  # a stream starts anew, whatever state came back
                self.carried.clear()
        if self._profile is not None:
            self._profile.step()

    def _regularize(self, output: StepOutput, batch: Batch) -> None:
        """Add what the model's regularisers ask for."""
        output.losses |= activation_losses(self.trained.module, batch["valid"])
        self.trained.hold_weights()
        penalty = weight_penalty(self.trained.module)
        if output.penalty is None or penalty is None:
            output.penalty = penalty if output.penalty is None else output.penalty
        else:
            output.penalty = output.penalty + penalty

    def _scaled(self, output: StepOutput, step: Step) -> Tensor:
        """What to differentiate, so that after DeepSpeed's division by rounds and ranks each loss is divided by its
        own count over the whole step."""
        parts = self.rounds * self.ranks.world_size
        total = sum(
            (x.sum * (x.weight * parts / max(step.counts[x.unit], 1.0)) for x in output.losses.values()),
            start=torch.zeros((), device=self.ranks.device),
        )
        total = total if output.penalty is None else total + output.penalty
        # A loss that is not finite can have a gradient that is: it must not pass as a step.
        return total * torch.where(total.detach().isfinite(), 1.0, math.nan)

    def _track(
        self,
        step: Step,
        loss: float,
        means: dict[str, float],
        lr: float,
        grad_norm: float,
        seconds: float,
        waited: float,
    ) -> None:
        where = self.position
        hours_a_second = step.counts.get("seconds", 0.0) / 3600 / seconds
        left = (where.total_steps - where.step) * where.train_seconds / where.step
        self.tracker.train(
            {
                "step": where.step,
                "epoch": where.epoch,
                "loss": loss,
                **(means if len(means) > 1 else {}),
                "lr": lr,
                "grad_norm": grad_norm,
                "refused_steps": where.refused_steps,
                "audio_hours": where.audio_seconds / 3600,
                "audio_hours_per_second": hours_a_second,
                "padding_percent": 100 * (1 - step.counts["seconds"] / step.counts["padded_seconds"])
                if "padded_seconds" in step.counts
                else 0.0,
                "data_wait_percent": 100 * waited / seconds,
                **({"tokens_per_second": step.counts["tokens"] / seconds} if "tokens" in step.counts else {}),
                "step_seconds": seconds,
            },
            f"loss {loss:.4g}  lr {lr:.1e}  {_speed(step, seconds)}  "
            f"epoch {where.epoch + 1}  {max(left, 0) / 60:.1f} min left",
        )

    def _roll_back(self, loss: float) -> None:
        """After a spike: weights and optimizer of an older checkpoint. The plan goes on from here, so that the samples
        since then are not seen again."""
        where, usual = self.position, self.spikes.usual
        self.writer.wait()
        found: Checkpoint | None = distributed.on_first(
            lambda: checkpoints.back(self.run.checkpoints, self.config.spikes.checkpoints_back)
        )
        told = f"step {where.step}: loss {loss:.4g} is a spike, {usual:.4g} is usual"
        if found is None:
            log.warning("%s; there is no checkpoint to go back to", told)
            return
        there = found.state["position"]
        where.applied_steps = there["applied_steps"]
        self._take_back(found)
        self.tracker.say(f"{told}: took back the steps from {there['step'] + 1} on, which are not trained on again")
        incidents.spike(self.run, self.config, where, loss, usual, there["step"])
        self._may_save = True  # else a run that is killed now would go on from what was taken back

    # Validation and checkpoints

    def weights(self) -> dict[str, Tensor]:
        """See `Trained.weights`."""
        return self.trained.weights()

    def _validate(self) -> bool:
        """Do the validation that is due, unless a signal comes first; true if it is the best so far."""
        where, start = self.position, time.perf_counter()
        epoch = where.validation_due
        assert epoch is not None
        try:
            evaluation = self.validation.run(self.weights(), self.signals)
        except RequeueError:  # a split can take longer than whoever sent it waits
            self._stopping = True
            return False
        where.validation_due = None
        self.validation.account(evaluation, self.run, where.step, epoch)
        values = self.validated = evaluation.values
        monitor = self.recipe.monitor
        if monitor not in values:
            raise KeyError(f"the recipe monitors {monitor!r}; validation gives {sorted(values)}")
        trigger, before = self.config.optimizer.average_trigger, self.plateau.triggered
        better = self.plateau.observe(values[monitor], where.step, self.config.schedule, trigger)
        self.trained.optimizer.triggered = self.plateau.triggered
        if self.plateau.triggered and not before:
            self.tracker.say(f"step {where.step}: from here on the mean of all weights is kept and evaluated")
        if not math.isnan(values[monitor]):
            self.best[where.step] = values[monitor]
        self.tracker.validation(
            {
                "step": where.step,
                "epoch": epoch,
                **({"audio_hours": where.audio_seconds / 3600} if where.audio_seconds else {}),
                **values,
                "best": self.plateau.best,
                "seconds": time.perf_counter() - start,
            },
            self._of_layers() if self.ranks.first else {},
        )
        if self.ranks.first and self.config.validation.table_rows:
            cells = examples(self.validation, evaluation.rows, self.config.validation.table_rows)
            self.tracker.table(where.step, epoch, "valid/table", cells)
        if self.ranks.first and self.config.validation.samples:
            self._generate(epoch)
        return better

    def _of_layers(self) -> dict[str, float]:
        """What is told of each recurrent layer at a validation: of its matrix, and of the last step's gradient."""
        gradients = recurrences.gradients(self.trained.module, self.trained.gradient_norms() or self._last_norms)
        return recurrences.logged(self.validation.model) | gradients

    @torch.inference_mode()
    def _generate(self, epoch: int) -> None:
        """Have the validated copy of the model write some pieces; what fails here ends no run."""
        cells: list[tuple[dict[str, str | float], Any]] = []
        for seed in range(self.config.validation.samples):
            try:
                piece = self.recipe.generate(self.validation.model, Wish(seed))
                cells.append(({"seed": seed, "text": piece.text}, piece.media))
            except Exception as error:
                log.warning("seed %d gave no piece: %s", seed, error)
        self.tracker.table(self.position.step, epoch, "generated", cells)

    def _save_or_fail(self) -> None:
        """Have this step's checkpoint on the disk; without it the run must not end as if all were well."""
        board.at(CHECKPOINT)
        self.writer.wait()
        if self.writer.written_step != self.position.step:
            self._save()
            self.writer.wait()
        if self.writer.written_step != self.position.step:
            if self.ranks.first:
                log.error(
                    "%s: step %d could not be saved: make room or mend the disk; the same command goes on from the "
                    "last checkpoint that was written",
                    self.run.path,
                    self.position.step,
                )
            raise SystemExit(EXIT_OUR_FAULT)

    def _save(self) -> None:
        """Begin to write a checkpoint."""
        board.at(CHECKPOINT)
        carried = {f"{number}.{part}": t for number, s in self.carried.items() for part, t in s.items()}
        shapes = {name: list(t.shape) for name, t in carried.items()}
        state = {
            "position": dict(self.position.__dict__),
            "plateau": self.plateau.state(),
            "best": {str(step): value for step, value in self.best.items()},
            "validated": self.validated,
            "losses": self.spikes.losses,
            "gradient_norms": self.trained.gradient_norms() if self.position.validation_due is not None else {},
            "scalars": self.trained.scalars(),
            "scale": self.trained.scale.state(),
            "shapes": self.trained.shapes,
            "ties": self.trained.ties,
            "carried": {name: shape for part in distributed.gather(shapes) for name, shape in part.items()},
            "data": self.data,
            "world_size": self.ranks.world_size,
            "zero_stage": self.config.zero.stage,
            "machine": self.machine,
            "config": configuration.plain(self.config),
        }
        slices = chain(self.trained.slices(), (Slice(n, CARRIED, 0, t.reshape(-1)) for n, t in carried.items()))
        told = self.ledger.flush() and self.tracker.flush()
        obstacle = None if told else "ledger or metrics of its steps could not be written"
        self.writer.start(self.position.step, slices, state, obstacle)


def _speed(step: Step, seconds: float) -> str:
    """How fast a step was, in what its data is measured in."""
    if (sound := step.counts.get("seconds")) is not None:
        return f"{sound / seconds:.0f}x real time"
    if (tokens := step.counts.get("tokens")) is not None:
        return f"{tokens / seconds:,.0f} tokens/s"
    return f"{step.counts['samples'] / seconds:.0f} samples/s"
