"""Worker processes that train, score and analyse the runs of a sweep."""

import json
import os
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from trainer.errors import RequeueError, UserError
from trainer.signals import StopSignals, die_with_parent
from trainer.sweep.points import RESULT, Point

PROBE_STEPS = 3


def work(number: int, folder: str, threads: int, gpu: str | None, parent: int, pipe: Connection) -> None:
    """A worker process: runs what comes through the pipe until it is closed or a signal asks to stop."""
    die_with_parent(parent)
    if gpu is not None:  # before anything asks for one
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    log = os.open(f"{folder}/worker-{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(log, stream.fileno())
    with StopSignals() as signals:
        import logging

        import torch

        from kernels import keep_pages
        from trainer import distributed

        torch.set_num_threads(threads)
        keep_pages()
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", stream=sys.stderr)
        for ours in ("trainer", "kernels"):
            logging.getLogger(ours).setLevel(logging.INFO)
        ranks = distributed.start()
        while signals.received is None:
            try:
                probe, point = pipe.recv()
            except EOFError:
                break
            handlers = list(logging.getLogger().handlers)
            try:
                answer: tuple[str, Any] = (
                    "done",
                    _probe(point, ranks) if probe else _train(point, ranks, signals),
                )
            except RequeueError:
                answer = ("stopped", None)
            except UserError as error:
                answer = ("mistake", str(error))
            except BaseException:
                answer = ("failed", traceback.format_exc())
            for handler in set(logging.getLogger().handlers) - set(handlers):  # of that run's log
                logging.getLogger().removeHandler(handler)
                handler.close()
            pipe.send(answer)
        distributed.stop()


def _train(point: Point, ranks: Any, signals: StopSignals) -> dict[str, Any]:
    """Run a point to its end; the row of its result, which lies in its folder then."""
    from trainer import checkpoint, recipe
    from trainer.engine import Training
    from trainer.evaluation import Evaluator

    training = Training(recipe.load(point.config, point.overrides), ranks, signals)
    values = training.fit()
    tested = {}
    if point.test:
        best = checkpoint.best(training.run.checkpoints)
        tested = Evaluator(training.recipe, "test", ranks).run(best.weights()).values
    row = {
        "run": point.name,
        "variant": point.variant,
        "label": point.label,
        "config": point.config,
        "seed": point.seed,
        "monitor": training.recipe.monitor,
        "best": training.plateau.best,
        "best_step": training.plateau.best_step,
        "steps": training.position.step,
        "seconds": training.position.train_seconds,
        "parameters": sum(p.numel() for p in training.trained.module.parameters()),
        "last": values,
        "test": tested,
        "command": point.command(),
    }
    if point.analyze:
        row["analysis"] = _analysis(training, point.analyze, signals)
    path = training.run.path / RESULT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(row), encoding="utf-8")
    temporary.replace(path)
    return row


def _analysis(training: Any, samples: int, signals: StopSignals) -> dict[str, Any]:
    """Of a trained run's analysis what runs are compared by; a curve is the mean over its draws.

    Raises:
        RequeueError: a signal asked to stop.
    """
    from trainer.analysis.run import analyze
    from trainer.analysis.study import Options

    def told(what: str, done: int, total: int) -> None:
        if signals.received is not None:
            raise RequeueError

    began = time.perf_counter()
    found = analyze(training.run, training.recipe, "test", Options(samples=samples), told)
    curves = {
        kind: [None if None in column else statistics.fmean(column) for column in zip(*curve["monitor"], strict=True)]
        for kind, curve in found["curves"].items()
    }
    seconds = time.perf_counter() - began
    return {"summary": found["summary"], "sizes": found["sizes"], "curves": curves, "seconds": seconds}


def _probe(point: Point, ranks: Any) -> float:
    """Seconds that the training steps of a point will take."""
    from trainer import recipe
    from trainer.engine import Training

    with tempfile.TemporaryDirectory() as folder:
        quiet = [f"runs_dir={folder}", "tracking.wandb=disabled"]
        training = Training(recipe.load(point.config, [*point.overrides, *quiet]), ranks)
        seconds = []
        for step in training.dataset.plan.epoch(0)[: PROBE_STEPS + 1]:
            start = time.perf_counter()
            training.step(step, [training.dataset.load(m) for m in step.micro_batches], 0.0)
            seconds.append(time.perf_counter() - start)
        training.close(0)
    return training.position.total_steps * statistics.median(seconds[1:] or seconds)


class Workers:
    """Worker processes that are handed points, one at a time each.

    Args:
        count: of them.
        folder: of the sweep.
    """

    def __init__(self, count: int, folder: Path) -> None:
        self.folder, self.count = folder, count
        self._context = get_context("spawn")
        self._threads = max(1, len(os.sched_getaffinity(0)) // count)
        self._gpus = gpus()
        self._running: dict[int, tuple[Any, Connection]] = {}

    def _start(self, number: int) -> None:
        ours, theirs = self._context.Pipe()
        gpu = self._gpus[number % len(self._gpus)] if self._gpus else None
        arguments = (number, str(self.folder), self._threads, gpu, os.getpid(), theirs)
        process = self._context.Process(target=work, args=arguments)  # not a daemon: a run has loaders
        process.start()
        theirs.close()
        self._running[number] = (process, ours)

    def each(
        self, todo: Sequence[Point], signals: StopSignals, probe: bool = False
    ) -> Iterator[tuple[Point, str, Any]]:
        """Run all points, or until a signal comes; yields (point, how it ended, its answer) as they end."""
        waiting, busy = list(todo)[::-1], dict[int, Point]()
        told = False
        while waiting or busy:
            if signals.received is not None:
                waiting.clear()
                if not told:
                    told = True
                    for process, _ in self._running.values():
                        os.kill(process.pid, signal.SIGTERM)
            for number in range(self.count):
                if waiting and number not in busy:
                    if number not in self._running or not self._running[number][0].is_alive():
                        self._start(number)
                    busy[number] = waiting.pop()
                    self._running[number][1].send((probe, busy[number]))
            ready = wait([self._running[number][1] for number in busy], timeout=0.2)
            for number in [n for n in busy if self._running[n][1] in ready]:
                process, pipe = self._running[number]
                point = busy.pop(number)
                try:
                    yield point, *pipe.recv()
                except (EOFError, ConnectionResetError):
                    process.join()
                    del self._running[number]
                    yield point, "failed", f"the worker ended with exit code {process.exitcode}"

    def close(self) -> None:
        """End all workers."""
        for process, pipe in self._running.values():
            pipe.close()
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()
        self._running.clear()


def default_workers() -> int:
    """One a GPU, or one a core."""
    return len(gpus()) or len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls each GPU of this process."""
    import torch

    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",")[:count] if given else [str(number) for number in range(count)]
