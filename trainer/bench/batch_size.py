"""The largest budget of a micro-batch that fits the device: real training steps on the worst batches of growing plans.

The steps run in a child process. This one watches its memory and ends it before the machine has to, so trying costs
nothing but time.
"""

import multiprocessing
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from trainer.data.buckets import BucketedConfig
from trainer.data.plan import Steps
from trainer.errors import UserError

CLOSE_ENOUGH = 1.05
"""The search ends when a budget so many times larger is known, or expected, not to fit."""
WATCH_SECONDS = 0.01
START_METHOD = "spawn"
START_SECONDS = 300.0
"""Time for the child to start and for any one budget."""


@dataclass(frozen=True)
class Trial:
    """What a budget took."""

    budget_seconds: float
    """plan.micro_batch_seconds."""
    fits: bool
    peak_bytes: int = 0
    """The most that was held, weights and optimizer included; of one that does not fit, when it was ended."""
    worst: str = ""
    """The batch that took the most."""
    step_seconds: float = 0.0
    """Of the batch with the most padded seconds."""
    hours_per_second: float = 0.0
    """Audio-hours a second in it."""
    whole_epoch: bool = False
    """Whether one micro-batch holds all there is: a larger budget changes nothing."""
    timed_out: bool = False
    """It was ended because it took longer than `START_SECONDS`: whether it fits is not known."""


def largest(
    config: str, overrides: Sequence[str], limit_bytes: int | None, share: float, report: Callable[[Trial], None]
) -> dict[str, Any]:
    """Find the largest `plan.micro_batch_seconds` whose worst batches fit.

    Args:
        limit_bytes: memory that one process may take; None: `share` of what the device or host has free.
        share: of the free memory.
        report: told of each trial.

    Returns:
        the trials, the largest budget that fits, the limit in bytes.

    Raises:
        UserError: not even a batch of the longest clip fits, or can be tried in time.
    """
    child = _Child(config, overrides)
    try:
        facts = child.ask()
        limit = limit_bytes or int(share * facts["free_bytes"])
        trials: list[Trial] = []

        def attempt(budget: float) -> Trial:
            trials.append(child.attempt(budget, limit))
            report(trials[-1])
            return trials[-1]

        low = attempt(facts["least_seconds"])
        if low.timed_out:
            raise UserError(
                f"{config}: a batch of the longest clip takes longer than {START_SECONDS:g} s; set plan.max_seconds, "
                "or a smaller model"
            )
        if not low.fits:
            raise UserError(
                f"{config}: a batch of the longest clip ({low.budget_seconds:.1f} s of the budget) takes more than the "
                f"{limit / 2**30:.2f} GiB that a process may have; set plan.max_seconds, or a smaller model"
            )
        high: float | None = None
        while not low.whole_epoch:
            wanted = 2 * low.budget_seconds if high is None else (low.budget_seconds * high) ** 0.5
            if (expected := _expected(trials, limit)) is not None:
                wanted = min(wanted, expected)
            if wanted < CLOSE_ENOUGH * low.budget_seconds:
                break
            trial = attempt(wanted)
            if trial.fits:
                low = trial
            else:
                high = wanted
    finally:
        child.close()
    return {
        "config": config,
        "device": facts["device"],
        "limit_bytes": limit,
        "trials": [asdict(trial) for trial in trials],
        "micro_batch_seconds": low.budget_seconds,
    }


def _expected(trials: Sequence[Trial], limit: int) -> float | None:
    """The budget at which the line through the two largest that fit reaches the limit, a little less to be safe."""
    fitting = sorted((t for t in trials if t.fits), key=lambda t: t.budget_seconds)[-2:]
    if len(fitting) < 2 or fitting[1].peak_bytes <= fitting[0].peak_bytes:
        return None
    a, b = fitting
    slope = (b.peak_bytes - a.peak_bytes) / (b.budget_seconds - a.budget_seconds)
    return b.budget_seconds + 0.95 * (limit - b.peak_bytes) / slope


class _Child:
    """The process that runs the steps; started anew after it had to be ended."""

    def __init__(self, config: str, overrides: Sequence[str]) -> None:
        self.arguments = (config, list(overrides))
        self._start()

    def _start(self) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_run, args=(theirs, *self.arguments))
        self.process.start()
        theirs.close()
        try:
            self.facts = self._answer(0)
        except TimeoutError as error:
            raise UserError(
                f"bench batch-size: the process that runs the steps did not start within {START_SECONDS:g} s"
            ) from error

    def _answer(self, limit: int) -> Any:
        """What the child sends, or None if it passed the limit or died.

        Raises:
            TimeoutError: it took too long, and was ended.
        """
        from trainer import memory

        begun = time.monotonic()
        while not self.pipe.poll(WATCH_SECONDS):
            late = time.monotonic() - begun > START_SECONDS
            if late or (limit and memory.status("VmRSS", self.process.pid) > limit):
                self.process.kill()
                self.process.join()
                if late:
                    raise TimeoutError
                return None
        try:
            answer = self.pipe.recv()
        except EOFError:  # killed, most likely by the kernel for its memory
            self.process.join()
            return None
        if isinstance(answer, UserError):
            raise answer
        return answer

    def ask(self) -> dict[str, Any]:
        if self.facts is None:
            raise UserError("bench batch-size: the process that runs the steps ended before its first one")
        return dict(self.facts)

    def attempt(self, budget: float, limit: int) -> Trial:
        if not self.process.is_alive():
            self._start()
        self.pipe.send((budget, limit))
        on_gpu = self.ask()["device"] != "cpu"
        try:
            answer = self._answer(0 if on_gpu else limit)  # there the child knows, and the device says when it is full
        except TimeoutError:
            return Trial(budget, fits=False, timed_out=True)
        return Trial(budget, fits=False, peak_bytes=limit) if answer is None else answer

    def close(self) -> None:
        if self.process.is_alive():
            self.pipe.send(None)
            self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


def _run(pipe: Connection, config: str, overrides: list[str]) -> None:
    """The child: trains on the worst batches of each budget it is told."""
    import torch

    from kernels import keep_pages
    from trainer import distributed, memory
    from trainer import recipe as recipes
    from trainer.distributed import Trained
    from trainer.engine import initialise
    from trainer.evaluation import to_device

    try:
        keep_pages()
        recipe = recipes.load(config, overrides)
        settings = recipe.config
        if not isinstance(settings.plan, BucketedConfig):
            raise UserError(
                f"{config}: plan.kind = {settings.plan.kind}: its batches are no seconds of sound; bench batch-size "
                "wants a configuration whose plan is bucketed, as speech/read_ru"
            )
        ranks = distributed.start()
        model = recipe.build_model()
        initialise(model, settings.seed)
        trained = Trained(model.to(ranks.device), settings.zero, settings.optimizer, settings.precision, rounds=1)
        first = recipe.build_dataset("train").plan.epoch(0)
        if not first:
            raise UserError(f"{config}: the training split holds no usable sample")
        longest, least = of_the_longest(settings.plan, first)
        cuda = ranks.device.type == "cuda"
        free = torch.cuda.mem_get_info(ranks.device)[0] if cuda else memory.available()
        pipe.send({"device": str(ranks.device), "free_bytes": free, "least_seconds": least})

        def step(batch: Any) -> None:
            trained.backward(recipe.step(trained.model, to_device(batch, ranks.device)).loss())
            trained.step()

        while (order := pipe.recv()) is not None:
            budget, limit = order
            plan = [f"plan.micro_batch_seconds={budget}", f"plan.max_seconds={longest}"]
            dataset = recipes.load(config, [*overrides, *plan]).build_dataset("train")
            steps = dataset.plan.epoch(0)
            pipe.send(_try(dataset, steps, budget, limit, step, ranks.device))
    except (UserError, EOFError) as error:
        if isinstance(error, UserError):
            pipe.send(error)
    finally:
        distributed.stop()


def of_the_longest(plan: BucketedConfig, steps: Steps) -> tuple[float, float]:
    """Seconds of the longest clip, and the budget that it takes alone; both a little more, for their rounding."""
    longest = max(max(m.cost / len(m.samples) for m in steps.worst()), plan.min_seconds) * (1 + 1e-9)
    return longest, float(plan.effective(np.array(longest))) * (1 + 1e-9)


def _try(dataset: Any, steps: Any, budget: float, limit: int, step: Callable[[Any], None], device: Any) -> Trial:
    """Train on the worst batches of a plan, the smallest first."""
    import torch

    from trainer import memory

    model_peak, worst, seconds = 0, "", 0.0
    batches = sorted(steps.worst(), key=lambda m: m.cost)
    costliest = batches[-1]
    for m in batches:
        batch = dataset.load(m)
        begun = time.perf_counter()
        try:
            _, peak, _ = memory.taken(device, partial(step, batch))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            return Trial(budget, fits=False, peak_bytes=limit)
        if m is costliest:
            seconds = time.perf_counter() - begun
        if peak >= model_peak:
            model_peak = peak
            worst = f"{len(m.samples)} clips of up to {m.cost / len(m.samples):.1f} s"
        if peak > limit:
            return Trial(budget, fits=False, peak_bytes=peak, worst=worst)
    hours = float(dataset.load(costliest)["seconds"].sum()) / 3600
    whole = steps.num_micro_batches() == 1
    return Trial(budget, True, model_peak, worst, seconds, hours / max(seconds, 1e-9), whole)
