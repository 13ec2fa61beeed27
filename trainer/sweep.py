"""Many runs from one file: variants x grid or random draws x seeds, on worker processes that are used again and again.

Each run is a run directory below that of the sweep, with `result.json` in it once it is done. So a sweep that was
stopped or killed goes on with what has none: a run that was half way goes on from its checkpoint.

    runs/NAME/
      RUN/                  a run directory each, named after its settings and seed
      worker-0.log          what the workers said
      results.jsonl         a row a finished run
      table.md curves.png   means over seeds, and curves over steps, a picture for each of several monitors
      report.html           both in one file, with commands, and the tables and pictures of `conclusion`
"""

import hashlib
import importlib
import itertools
import json
import math
import os
import re
import signal
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from trainer import config as configuration
from trainer import keyed
from trainer.config import PROJECT, Config, show
from trainer.errors import RequeueError, UserError
from trainer.run import RunDirectory, read_lines
from trainer.signals import StopSignals, die_with_parent

RESULT = "result.json"
OWN_KEYS = ("seed", "name", "runs_dir")
"""Keys of a run that the sweep sets itself."""
LENGTHS = ("max_steps", "max_epochs", "validation.early_stop_after")
"""Keys that a resumed run may change, and that its result depends on."""
PROBED = 4
"""Runs that are tried for some steps, spread over the sweep, to say how long it takes."""
PROBE_STEPS = 3


class DrawConfig(Config):
    """Random values of one key: one of `choices`, or a number between `low` and `high`."""

    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Uniform in the logarithm."""
    whole: bool = False
    """Round to whole numbers."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "DrawConfig":
        bounds = self.low is not None and self.high is not None
        if bounds == bool(self.choices):
            raise ValueError("wanted either choices, or low and high")
        if self.low is not None and self.high is not None and (self.low > self.high or (self.log and self.low <= 0)):
            raise ValueError(f"low = {self.low} and high = {self.high}: wanted low <= high, and above 0 where log")
        return self

    def draw(self, *parts: int | str) -> Any:
        """The value that the parts name."""
        share = keyed.number(*parts)
        if self.low is None or self.high is None:
            return self.choices[int(share * len(self.choices))]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        return round(value) if self.whole else value


class VariantConfig(Config):
    """One line of the table: settings that belong together."""

    config: str | None = None
    """Null: that of the sweep."""
    overrides: tuple[str, ...] = ()
    """key=value, after those of the sweep."""
    paper: str = ""
    """What a paper reports, for the table."""
    wanted: str = ""
    """The bar that was set, for the table."""
    chance: float | None = None
    """What no learning gives, drawn as a line."""
    family: str = ""
    """Variants of one family differ in a strength. The one whose mean on validation is best stands for it: the table
    marks it with a star."""


class SweepConfig(Config):
    """A sweep."""

    config: str | tuple[str, ...] | None = None
    """CONFIG of `train`; several of them: every variant is run with each, and compared with the first variant of it."""
    overrides: tuple[str, ...] = ()
    """key=value for every run."""
    test: bool = False
    """Score the best checkpoint of each run, as validation chose it, on the test split too."""
    variants: dict[str, VariantConfig] = Field(default_factory=dict)
    """Settings by name."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values by key: every combination is run."""
    random: dict[str, DrawConfig] = Field(default_factory=dict)
    """Draws by key, instead of a grid."""
    samples: PositiveInt = 20
    """Combinations drawn, where `random` is given; equal ones are run once."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    analyze: NonNegativeInt = 0
    """So many samples of the test split are perturbed once a run is trained, as by `analyze`; 0: no analysis."""
    conclusion: str | None = None
    """A file in recipes/, without its ending, whose `conclude` makes tables and pictures of all finished runs."""
    workers: PositiveInt | None = None
    """Processes; null: one a core, or one a GPU."""
    runs_dir: Path = Path("runs")

    @model_validator(mode="after")
    def _complete(self) -> "SweepConfig":
        if self.conclusion is not None and not (PROJECT / "recipes" / f"{self.conclusion}.py").is_file():
            raise ValueError(f"conclusion = {self.conclusion!r}: there is no such file in recipes/")
        if self.grid and self.random:
            raise ValueError("grid and random are both given: leave one out")
        given = [
            o.partition("=")[0] for o in (*self.overrides, *(o for v in self.variants.values() for o in v.overrides))
        ]
        if own := [key for key in (*self.grid, *self.random, *given) if key in OWN_KEYS]:
            raise ValueError(
                f"{own[0]}: is set by the sweep itself; take seeds, runs_dir and the file's own name instead"
            )
        if self.config is None and any(v.config is None for v in [*self.variants.values()] or [VariantConfig()]):
            raise ValueError("config is missing: name it, or one in each of the variants")
        return self


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Of its run directory."""
    variant: str
    """Of its line in the table: all but the seed."""
    seed: int
    config: str
    overrides: tuple[str, ...]
    label: str = ""
    """Of the variant in the file."""
    test: bool = False
    """See `SweepConfig`; `analyze` too."""
    analyze: int = 0

    def command(self) -> str:
        """The same run by hand."""
        return " ".join(["./launch.sh train", self.config, *(f"'{o}'" if " " in o else o for o in self.overrides)])


def load(path: Path) -> SweepConfig:
    """A sweep's file.

    Raises:
        UserError: anything wrong with it.
    """
    return configuration.validate(SweepConfig, configuration.gather(path, []))


def points(sweep: SweepConfig, name: str) -> list[Point]:
    """All runs, equal ones once; seed by seed, so that what is stopped early has every variant of the first seeds.

    Args:
        name: of the sweep.
    """
    found = dict[str, Point]()
    for label, variant in (sweep.variants or {"": VariantConfig()}).items():
        given = variant.config or sweep.config
        assert given is not None
        configs = (given,) if isinstance(given, str) else given
        for config, settings in itertools.product(configs, _settings(sweep, name)):
            chosen = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            where = [config] if len(configs) > 1 else []
            line = ", ".join([*where, *([label] if label else []), *chosen]) or config
            overrides = (*sweep.overrides, *variant.overrides, *chosen)
            digest = hashlib.sha256(json.dumps([config, overrides]).encode()).hexdigest()[:6]
            slug = re.sub(r"[^A-Za-z0-9.]+", "-", line).strip("-")[:60]
            for seed in sweep.seeds:
                more = (f"seed={seed}", f"runs_dir={sweep.runs_dir / name}", f"name={slug}-{digest}-s{seed}")
                quiet = (f"tracking.group={name}", "tracking.tags=[sweep]")
                every = (*quiet, *overrides, *more)
                run = more[2][5:]
                found[run] = Point(run, line, seed, config, every, label, sweep.test, sweep.analyze)
    return sorted(found.values(), key=lambda point: sweep.seeds.index(point.seed))


def _settings(sweep: SweepConfig, name: str) -> Iterator[dict[str, Any]]:
    if sweep.random:
        for i in range(sweep.samples):
            yield {key: draw.draw(name, i, key) for key, draw in sweep.random.items()}
        return
    for values in itertools.product(*sweep.grid.values()):
        yield dict(zip(sweep.grid, values, strict=True))


def result_of(sweep: SweepConfig, name: str, point: Point) -> dict[str, Any] | None:
    """What a finished run left; None where it lacks what the point asks for."""
    path = sweep.runs_dir / name / point.name / RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    lacks = (point.analyze and "analysis" not in found) or (point.test and not found["test"])
    return None if lacks else found


def _check_same(folder: Path, config: Config) -> None:
    """A run's name holds what the sweep sets: what its CONFIG file said then must still be so.

    Raises:
        UserError: the run in the folder is of another configuration.
    """
    run = RunDirectory(folder)
    if not run.config.is_file():
        return
    saved = run.saved_config()
    old, new = configuration.flatten(saved), configuration.flatten(configuration.plain(config))
    different = configuration.differences(saved, config)
    different += [(key, old[key], new[key]) for key in LENGTHS if key in old and old[key] != new[key]]
    if different:
        lines = "".join(f"{show(run.config)}: {key} = {old!r}, now {new!r}\n" for key, old, new in different)
        raise UserError(
            f"{lines}the run is of before the configuration changed: put the values back, or move {show(folder)} away"
        )


# Workers


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
        logging.getLogger("trainer").setLevel(logging.INFO)
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
        row["analysis"] = _analysis(training, point.analyze)
    path = training.run.path / RESULT
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(row), encoding="utf-8")
    temporary.replace(path)
    return row


def _analysis(training: Any, samples: int) -> dict[str, Any]:
    """Of a trained run's analysis what runs are compared by; a curve is the mean over its draws."""
    from trainer.analysis.run import analyze
    from trainer.analysis.study import Options

    began = time.perf_counter()
    found = analyze(training.run, training.recipe, "test", Options(samples=samples), lambda what, done, total: None)
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


# The whole


def run(sweep: SweepConfig, name: str, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """Run what is not finished yet.

    Args:
        name: of the sweep and its folder.
        say: told how it goes.

    Returns:
        the rows of all finished runs, in the sweep's order.

    Raises:
        UserError: a point's configuration is wrong; nothing was begun. Or some runs failed; the others are done.
        RequeueError: stopped by a signal; all runs saved.
    """
    from trainer import recipe

    every = points(sweep, name)
    mistakes: dict[str, str] = {}
    for point in every:
        try:
            _check_same(sweep.runs_dir / name / point.name, recipe.load(point.config, point.overrides).config)
        except UserError as error:
            mistakes.setdefault(str(error), point.variant)
    if mistakes:
        raise UserError("\n".join(f"{variant}: {text}" for text, variant in list(mistakes.items())[:5]))
    folder = sweep.runs_dir / name
    folder.mkdir(parents=True, exist_ok=True)
    done = {point.name: row for point in every if (row := result_of(sweep, name, point)) is not None}
    todo = [point for point in every if point.name not in done]
    failures: list[str] = []
    workers = Workers(min(sweep.workers or default_workers(), max(1, len(todo))), folder)
    try:
        with StopSignals() as signals:
            say(f"{len(every)} runs, {len(done)} finished, {workers.count} at a time")
            if todo:
                say(_estimate(todo, list(done.values()), workers, signals))
            for point, how, answer in workers.each(todo, signals):
                if how == "done":
                    done[point.name] = answer
                    say(f"[{len(done)}/{len(every)}] {point.name}: {answer['monitor']} {_best(answer):.4g}")
                elif how != "stopped":
                    failures.append(f"{point.name}: {answer.strip().splitlines()[-1]}")
                    say(f"[{len(done)}/{len(every)}] {failures[-1]}")
            if signals.received is not None:
                raise RequeueError
    finally:
        workers.close()
    rows = [done[point.name] for point in every if point.name in done]
    temporary = folder / "results.tmp"
    temporary.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    temporary.replace(folder / "results.jsonl")
    if failures:
        shown = "\n".join(failures[:10])
        raise UserError(
            f"{len(failures)} runs failed; see {show(folder)}/worker-*.log; the same command tries again\n{shown}"
        )
    return rows


def default_workers() -> int:
    """One a GPU, or one a core."""
    return len(gpus()) or len(os.sched_getaffinity(0))


def gpus() -> list[str]:
    """What `CUDA_VISIBLE_DEVICES` calls each GPU of this process."""
    import torch

    count, given = torch.cuda.device_count(), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    return given.split(",")[:count] if given else [str(number) for number in range(count)]


def _estimate(todo: list[Point], rows: list[dict[str, Any]], workers: Workers, signals: StopSignals) -> str:
    """How long it will take, by the runs that are finished, or else by some steps of a few."""
    if rows:
        spent = [row["seconds"] + row.get("analysis", {}).get("seconds", 0.0) for row in rows]
        each, basis = statistics.fmean(spent), f"as the {len(rows)} finished ones"
    else:
        few = todo[:: -(-len(todo) // PROBED)]
        seconds = [answer for _, how, answer in workers.each(few, signals, probe=True) if how == "done"]
        if not seconds:
            return "no estimate: none of the runs that were tried for some steps could start"
        apart = "validation and analysis" if todo[0].analyze else "validation"
        each, basis = statistics.fmean(seconds), f"{PROBE_STEPS} steps of {len(seconds)} runs, {apart} apart"
    return f"about {each * len(todo) / workers.count / 60:.1f} min, by {basis}"


# What came of it


def table(sweep: SweepConfig, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A line a variant: mean and spread over the seeds, and the difference from the first variant, paired by seed.

    A variant is compared with the first one of its own configuration.
    """
    by_variant: dict[str, dict[int, Mapping[str, Any]]] = {}
    for row in rows:
        by_variant.setdefault(row["variant"], {})[row["seed"]] = row
    if not isinstance(sweep.config, str | None):  # what is compared stands together
        by_variant = dict(sorted(by_variant.items(), key=lambda item: next(iter(item[1].values()))["config"]))
    firsts: dict[str, dict[int, Mapping[str, Any]]] = {}
    lines, chosen = [], _chosen(sweep, by_variant)
    asides = [aside for aside in ("paper", "wanted") if any(getattr(v, aside) for v in sweep.variants.values())]
    monitors = {row["monitor"] for row in rows}
    for variant, runs in by_variant.items():
        last = next(iter(runs.values()))
        first = firsts.setdefault(last["config"], runs)
        line = {"": f"{variant} *" if variant in chosen else variant}
        of, unit = ("", f" {last['monitor']}") if len(monitors) > 1 else (f" {last['monitor']}", "")
        columns = {f"best{of}": _best}
        if sweep.test:
            columns[f"test{of}"] = _tested
        for name, value in columns.items():
            values = [value(row) for row in runs.values()]
            spread = f" +- {statistics.stdev(values):.2g}" if len(values) > 1 and _finite(values) else ""
            line[name] = f"{statistics.fmean(values):.4g}{spread}{unit}"
        compared = _tested if sweep.test else _best
        pairs = [compared(runs[seed]) - compared(first[seed]) for seed in runs if seed in first]
        line["against the first, 95 % (p)"] = (
            _difference(pairs) if runs is not first and pairs and _finite(pairs) else ""
        )
        for aside in asides:
            line[aside] = getattr(sweep.variants.get(last["label"]), aside, "")
        line["parameters"] = f"{last['parameters']:,}"
        line["steps"] = f"{last['steps']:,}"
        line["minutes"] = f"{statistics.fmean(row['seconds'] for row in runs.values()) / 60:.1f}"
        line["ms a step"] = f"{1000 * statistics.fmean(row['seconds'] / row['steps'] for row in runs.values()):.3g}"
        line["seeds"] = ", ".join(map(str, runs))
        lines.append(line)
    return lines


@dataclass(frozen=True)
class Conclusion:
    """What a file in recipes/ makes of finished runs."""

    tables: dict[str, list[dict[str, str]]]
    """Lines of equal keys, by heading."""
    pictures: list[Path]


def conclude(name: str, rows: Sequence[Mapping[str, Any]], folder: Path) -> Conclusion:
    """What `conclude` of recipes/NAME.py says of finished runs; its pictures go into the folder."""
    found: Conclusion = importlib.import_module(f"recipes.{name}").conclude(rows, folder)
    return found


def _best(row: Mapping[str, Any]) -> float:
    return math.inf if row["best"] is None else float(row["best"])  # None: no validation gave a number


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _tested(row: Mapping[str, Any]) -> float:
    return float(row["test"][row["monitor"]])


def _chosen(sweep: SweepConfig, by_variant: Mapping[str, Mapping[int, Mapping[str, Any]]]) -> set[str]:
    """Of each family and configuration the variant with the best mean on validation."""
    best: dict[tuple[str, str], tuple[float, str]] = {}
    for variant, runs in by_variant.items():
        row = next(iter(runs.values()))
        family = sweep.variants[row["label"]].family if row["label"] in sweep.variants else ""
        if family:
            place = (family, row["config"])
            best[place] = min(best.get(place, (math.inf, "")), (statistics.fmean(map(_best, runs.values())), variant))
    return {variant for _, variant in best.values()}


STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5 % points of Student's t with 1, 2, ... degrees of freedom."""


def _difference(pairs: Sequence[float]) -> str:
    """Mean of paired differences, half of its 95 % interval by Student's t, and the p-value of the signs."""
    half, freedom = "", len(pairs) - 1
    if freedom:
        t = STUDENT[freedom - 1] if freedom <= len(STUDENT) else 1.96 + 2.5 / freedom  # to 1 %
        half = f" +- {t * statistics.stdev(pairs) / math.sqrt(len(pairs)):.2g}"
    return f"{statistics.fmean(pairs):+.2g}{half} ({sign_flip_test(pairs):.2g})"


def sign_flip_test(differences: Sequence[float]) -> float:
    """Two-sided p-value of paired differences: the share of all choices of their signs whose mean is as far from zero.

    Exact up to 14 pairs, 16,384 choices drawn by hashes beyond. With n pairs it is never below 2^(1 - n).
    """
    n, observed = len(differences), abs(sum(differences)) * (1 - 1e-12)
    if n <= 14:
        choices: Iterator[tuple[int, ...]] = itertools.product((1, -1), repeat=n)
        sums = [abs(sum(s * d for s, d in zip(signs, differences, strict=True))) for signs in choices]
    else:
        sums = [
            abs(sum(d if keyed.key("sign", i, j) & 1 else -d for j, d in enumerate(differences))) for i in range(16384)
        ]
    return sum(s >= observed for s in sums) / len(sums)


def markdown(lines: Sequence[Mapping[str, str]]) -> str:
    """Lines of equal keys as a table of Markdown."""
    if not lines:
        return ""
    rows = [list(lines[0]), ["---"] * len(lines[0]), *(list(line.values()) for line in lines)]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


Curves = dict[str, list[list[tuple[int, float]]]]
"""By variant, of each seed the validations' (step, monitored value)."""


def curves(sweep: SweepConfig, name: str, rows: Sequence[Mapping[str, Any]]) -> Curves:
    """The validations of finished runs."""
    found: Curves = {}
    for row in rows:
        metrics = read_lines(sweep.runs_dir / name / row["run"] / "metrics.jsonl")
        values = [
            (r["step"], r[row["monitor"]])
            for r in metrics
            if r["kind"] == "validation" and r.get(row["monitor"]) is not None
        ]
        found.setdefault(row["variant"], []).append(values)
    return found
