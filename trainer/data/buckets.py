"""The plan of samples of many lengths: buckets of similar duration, in a random order that needs no state.

The shards are shuffled, then windows of shards are pooled, cut into buckets of similar duration, shuffled inside each
and filled into micro-batches up to a budget of padded seconds. Those of a step come from one bucket, and are the
nearest there in padded seconds, so that no rank waits for a long one. What does not fill a step of its bucket waits for
the same bucket of the next window; in the last window what is left of a bucket joins the next longer one, so at most
one step of an epoch is short.

A window is planned at a time, with columns of numbers, so the memory that planning takes does not grow with the corpus;
the result, some ten bytes a sample, is a file that all processes of a host map (`trainer.data.columns`).
"""

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt

from trainer import keyed
from trainer.config import Config, plain
from trainer.data import columns
from trainer.data.columns import Columns
from trainer.data.index import Rows
from trainer.data.plan import MicroBatch, Rejection, Step, Steps
from trainer.errors import UserError

FORMAT = 3
"""Of the plan: another number where the same inputs give another order, so that no kept plan is taken for it."""
PLANS_KEPT = 8
"""Files of planned epochs in a folder."""
CHUNK = 65536
"""Rows that are looked at together where their order does not matter."""
_TOO_LONG = 2
"""Number of this reason to leave a sample out."""
ODD_RATE = 6.0
"""A speaking rate so many deviations (of the logarithm, by the median) from the corpus's is suspicious ..."""
ODD_RATE_FACTOR = 2.0
"""... if it is also so many times the median, or less than one over it."""


class BucketedConfig(Config):
    """Batches of similar length under a budget of padded seconds."""

    kind: Literal["bucketed"] = "bucketed"
    micro_batch_seconds: PositiveFloat = 60.0
    """Most padded seconds of sound in one forward pass on one device; `bench batch-size` finds what fits."""
    quadratic_seconds: float | None = Field(None, gt=0)
    """For models whose memory grows with the square of the length: a clip of this length takes twice its seconds of the
    budget (t + t^2 / quadratic_seconds); null: no such term."""
    micro_batches_per_step: PositiveInt = 2
    """G: the global batch is up to this many micro-batches, spread over however many processes there are."""
    num_buckets: PositiveInt = 20
    """Length classes with equally many samples, cut by the index; more of them pad less and mix less."""
    window_shards: PositiveInt = 16
    """Shards that are pooled: reading stays inside a window."""
    max_seconds: float | None = Field(None, gt=0)
    """Longest clip; null: what fills `micro_batch_seconds` alone."""
    too_long: Literal["drop", "cut", "error"] = "drop"
    """What becomes of longer clips: left out and put on record, cut (the labels in proportion: the last word may be
    wrong; training only, elsewhere they are left out), or an error."""
    min_seconds: float = Field(0.1, ge=0)
    """Leave shorter samples out."""

    def effective(self, seconds: NDArray[np.float64]) -> NDArray[np.float64]:
        """What clips take of the budget."""
        return seconds if self.quadratic_seconds is None else seconds + seconds**2 / self.quadratic_seconds

    @property
    def longest_seconds(self) -> float:
        """Longest clip that is used."""
        alone = self.micro_batch_seconds
        if (q := self.quadratic_seconds) is not None:
            alone = q * (math.sqrt(1 + 4 * alone / q) - 1) / 2
        return min(self.max_seconds or alone, alone)


@dataclass(frozen=True)
class Measures:
    """Some samples as the plan sees them: n samples at each of S speeds."""

    seconds: NDArray[np.float64]
    """(S, n): duration."""
    feasible: NDArray[np.bool_]
    """(S, n): whether the sample can be learnt (CTC: enough output frames)."""
    tokens: NDArray[np.int64]
    """(n,): labels."""


@dataclass(frozen=True)
class Lengths:
    """What a plan needs to know of N samples, which are sorted by shard."""

    keys: Sequence[str]
    sample_keys: NDArray[np.uint64]
    shard_end: NDArray[np.int64]
    """Row after the last one of each shard."""
    measure: Callable[[NDArray[np.int64]], Measures]
    """Of the samples in some rows."""
    speeds: tuple[float, ...] = (1.0,)
    num_drawn: int | None = None
    """So many of the speeds, from the first on, are drawn; the rest are there to fall back on. None: all are."""
    identity: str = ""
    """Text that differs where anything above does."""
    folder: Path | None = None
    """Where plans are kept for all processes of a host; None: nowhere, each computes its own."""

    def __len__(self) -> int:
        return len(self.sample_keys)


class EpochSteps(Steps):
    """The steps of a planned epoch, made from its columns when they are asked for.

    Args:
        epoch: its number.
        planned: `rows` and `speed` (a number each sample, in order), `batch_end` and `batch_cost` (each micro-batch),
            `step_end`, `tokens` and `seconds` (each step).
        speeds: by number.
        config: by which they were planned.
        numbers: which of the steps; None: all.
    """

    def __init__(
        self,
        epoch: int,
        planned: Columns,
        speeds: tuple[float, ...],
        config: BucketedConfig,
        numbers: range | None = None,
    ) -> None:
        self._epoch, self.planned, self._speeds, self._config = epoch, planned, speeds, config
        self._numbers = range(len(planned["step_end"])) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, place: int) -> Step: ...
    @overload
    def __getitem__(self, place: slice) -> "EpochSteps": ...
    def __getitem__(self, place: int | slice) -> "Step | EpochSteps":
        if isinstance(place, slice):
            return EpochSteps(self._epoch, self.planned, self._speeds, self._config, self._numbers[place])
        return self._step(self._numbers[place])

    def __iter__(self) -> Iterator[Step]:
        return map(self._step, self._numbers)

    def _step(self, number: int) -> Step:
        p = self.planned
        first, end = _span(p["step_end"], number)
        micro_batches = tuple(self._micro_batch(number, m, place) for m, place in enumerate(range(first, end)))
        counts = {
            "samples": float(sum(len(m.samples) for m in micro_batches)),
            "tokens": float(p["tokens"][number]),
            "seconds": float(p["seconds"][number]),
            "padded_seconds": sum(m.cost for m in micro_batches),
        }
        return Step(micro_batches, counts, last=number == len(p["step_end"]) - 1)

    def _micro_batch(self, step: int, number: int, place: int) -> MicroBatch:
        p = self.planned
        rows = slice(*_span(p["batch_end"], place))
        return MicroBatch(
            self._epoch,
            step,
            number,
            tuple(p["rows"][rows].tolist()),
            tuple(self._speeds[s] for s in p["speed"][rows].tolist()),
            float(p["batch_cost"][place]),
        )

    def _batches(self) -> tuple[int, int]:
        """The micro-batches of these steps: first, and the one after the last."""
        if not self._numbers:
            return 0, 0
        ends = self.planned["step_end"]
        return _span(ends, self._numbers[0])[0], int(ends[self._numbers[-1]])

    def totals(self) -> dict[str, float]:
        """The counts of all steps, added up."""
        p, (first, end) = self.planned, self._batches()
        steps = slice(self._numbers.start, self._numbers.stop)
        samples = int(p["batch_end"][end - 1]) - _span(p["batch_end"], first)[0] if end > first else 0
        return {
            "samples": float(samples),
            "tokens": float(p["tokens"][steps].sum()),
            "seconds": float(p["seconds"][steps].sum()),
            "padded_seconds": float(p["batch_cost"][first:end].sum()),
        }

    def num_micro_batches(self) -> int:
        """Of all steps together."""
        first, end = self._batches()
        return end - first

    def worst(self) -> list[MicroBatch]:
        """See `Steps`; and that which takes the most of the budget, where that grows with the square of the length."""
        p, (first, end) = self.planned, self._batches()
        if first == end:
            return []
        cost = p["batch_cost"][first:end]
        samples = np.diff(p["batch_end"][first:end].astype(np.int64), prepend=_span(p["batch_end"], first)[0])
        longest = cost / samples
        sizes = (cost, longest, samples, self._config.effective(longest) * samples)
        found = []
        for place in dict.fromkeys(first + int(np.argmax(size)) for size in sizes):
            step = int(np.searchsorted(p["step_end"], place, side="right"))
            found.append(self._micro_batch(step, place - _span(p["step_end"], step)[0], place))
        return found


def _span(ends: NDArray[Any], number: int) -> tuple[int, int]:
    """Where group `number` begins and ends."""
    return (int(ends[number - 1]) if number else 0), int(ends[number])


class BucketedPlan:
    """See the module's text.

    Args:
        config: budget, buckets, windows.
        lengths: columns of the index.
        seed: of the run.
        shuffle: false keeps one order for ever (validation and test: sorted by length, no speed drawn).

    Raises:
        UserError: there are longer samples than `config` allows and it says so.
    """

    def __init__(self, config: BucketedConfig, lengths: Lengths, seed: int, shuffle: bool = True) -> None:
        self.config = config
        self.lengths = lengths
        self.seed = seed
        self.shuffle = shuffle
        self._plain = lengths.speeds.index(1.0)
        self._longest = config.longest_seconds
        self._reasons = (  # why a sample is left out, by number; 0: it is not
            "",
            "no label",
            f"longer than {self._longest:g} s",
            f"shorter than {config.min_seconds:g} s",
            "more labels than output frames (CTC)",
        )
        settings = plain(config)
        self._identity = json.dumps([FORMAT, settings, lengths.identity, lengths.speeds, lengths.num_drawn, shuffle])
        self._survey = self._kept("survey", [], self._look)
        self.edges: NDArray[np.float64] = self._survey["edges"]
        self._latest: tuple[Any, Columns] | None = None
        rejected, reason = self._survey["rejected"], self._survey["reason"]
        self.rejections: Sequence[Rejection] = Rows(
            len(rejected), lambda i: self._rejection(int(rejected[i]), int(reason[i]))
        )
        odd, rate = self._survey["odd"], self._survey["rate"]
        usual = f"{float(self._survey['usual_rate'][0]):.1f} is usual" if len(odd) else ""
        self.suspicions: Sequence[Rejection] = Rows(
            len(odd),
            lambda i: Rejection(
                lengths.keys[int(odd[i])], "implausible speaking rate", f"{rate[i]:.1f} labels a second, {usual}"
            ),
        )
        long = np.flatnonzero(reason == _TOO_LONG)
        if config.too_long == "error" and len(long):
            shown = ", ".join(f"{r.key} ({r.detail})" for r in (self.rejections[int(i)] for i in long[:3]))
            raise UserError(
                f"plan.too_long = error: {len(long)} samples are longer than {self._longest:g} s: {shown}"
                f"{', ...' if len(long) > 3 else ''}; raise plan.max_seconds or plan.micro_batch_seconds, set "
                "plan.too_long to drop or cut, or take them out of the corpus"
            )

    @property
    def micro_batches_per_step(self) -> int:
        return self.config.micro_batches_per_step

    def epoch(self, epoch: int, excluded: Collection[str] = ()) -> EpochSteps:
        """The steps of an epoch; `excluded` keys are left out."""
        if not self.shuffle:
            epoch = 0  # of an order that never changes there is one plan
        out = np.unique(np.array([keyed.key(k) for k in excluded], dtype=np.uint64))
        name = [self.seed, epoch, hashlib.blake2b(out.data, digest_size=16).hexdigest()]
        if self._latest is None or self._latest[0] != name:
            self._latest = (name, self._kept("plan", name, lambda: self._plan(epoch, out)))
        return EpochSteps(epoch, self._latest[1], self.lengths.speeds, self.config)

    def _kept(self, kind: str, name: list[Any], build: Callable[[], dict[str, NDArray[Any]]]) -> Columns:
        """Columns that other processes of this host may have computed already."""
        if self.lengths.folder is None:
            return Columns(build(), {})
        facts = {"what": kind, "of": hashlib.sha256(json.dumps([self._identity, name]).encode()).hexdigest()}
        path = self.lengths.folder / f"{kind}-{facts['of'][:16]}{columns.ENDING}"
        found = columns.shared(path, facts, lambda: Columns(build(), {}))
        columns.keep_newest(path.parent, f"{kind}-*{columns.ENDING}", PLANS_KEPT)
        return found

    # What can be used, and the buckets

    def _judge(self, m: Measures) -> NDArray[np.uint8]:
        """Number of the reason to leave each sample out."""
        seconds = m.seconds[self._plain]
        bad = (m.tokens == 0, seconds > self._longest, seconds < self.config.min_seconds, ~m.feasible[self._plain])
        return np.select(bad, (1, _TOO_LONG, 3, 4), 0).astype(np.uint8)

    def _rejection(self, row: int, reason: int) -> Rejection:
        m = self.lengths.measure(np.array([row]))
        seconds, tokens = float(m.seconds[self._plain, 0]), int(m.tokens[0])
        return Rejection(self.lengths.keys[row], self._reasons[reason], f"{tokens} labels in {seconds:.2f} s")

    def _look(self) -> dict[str, NDArray[Any]]:
        """Look at every sample once: what is left out, what is odd, and where the buckets end."""
        count = len(self.lengths)
        seconds, rate = np.empty(count), np.empty(count, dtype=np.float32)
        judged = np.empty(count, dtype=np.uint8)
        for start in range(0, count, CHUNK):
            rows = np.arange(start, min(start + CHUNK, count))
            m = self.lengths.measure(rows)
            judged[rows] = self._judge(m)
            seconds[rows] = m.seconds[self._plain]
            rate[rows] = m.tokens / np.maximum(seconds[rows], 1e-9)
        rejected = np.flatnonzero(judged)
        seconds = seconds[judged == 0]
        seconds.sort()
        cuts = np.arange(1, self.config.num_buckets) * len(seconds) // self.config.num_buckets
        edges = seconds[cuts] if len(seconds) else seconds
        del seconds
        odd, usual = _odd(rate, judged)
        return {
            "edges": edges,
            "rejected": rejected.astype(np.uint32),
            "reason": judged[rejected],
            "odd": odd.astype(np.uint32),
            "rate": rate[odd],
            "usual_rate": np.array([usual]),
        }

    # One epoch

    def _plan(self, epoch: int, excluded: NDArray[np.uint64]) -> dict[str, NDArray[Any]]:
        written = _Planned()
        if self.shuffle:
            self._shuffled(epoch, excluded, written)
        else:
            pools = [self._pool(epoch, excluded, np.arange(a, b)) for a, b in _chunks(len(self.lengths))]
            pool = _Pool.joined(pools)
            pool = pool.at(np.argsort(pool.seconds, kind="stable"))
            ends = self._cut(pool, close=True)
            written.add(pool, ends, self._groups(len(ends)))
        return written.arrays()

    def _pool(self, epoch: int, excluded: NDArray[np.uint64], rows: NDArray[np.int64]) -> "_Pool":
        """The usable ones of some rows, each at the speed drawn for it."""
        lengths = self.lengths
        m = lengths.measure(rows)
        usable = self._judge(m) == 0
        if len(excluded):
            usable &= ~np.isin(lengths.sample_keys[rows], excluded)
        speed = self._draw_speeds(epoch, lengths.sample_keys[rows], m)
        seconds = np.take_along_axis(m.seconds, speed[None], 0)[0]
        return _Pool(rows, speed.astype(np.uint8), seconds, m.tokens).at(np.flatnonzero(usable))

    def _draw_speeds(self, epoch: int, sample_keys: NDArray[np.uint64], m: Measures) -> NDArray[np.int64]:
        """Number of the speed of each sample: 1 where the drawn one leaves too little time or takes too much."""
        speeds = self.lengths.speeds
        if not self.shuffle or len(speeds) == 1:
            return np.full(len(sample_keys), self._plain, dtype=np.int64)
        choices = self.lengths.num_drawn or len(speeds)
        drawn = (keyed.uniform(sample_keys, self.seed, epoch, "speed") * choices).astype(np.int64)
        fits = np.take_along_axis(m.feasible, drawn[None], 0)[0]
        seconds = np.take_along_axis(m.seconds, drawn[None], 0)[0]
        fits &= self.config.effective(seconds) <= self.config.micro_batch_seconds
        return np.where(fits, drawn, self._plain)

    def _shuffled(self, epoch: int, excluded: NDArray[np.uint64], written: "_Planned") -> None:
        size = self.config.micro_batches_per_step
        num_buckets = self.config.num_buckets
        num_shards = len(self.lengths.shard_end)
        shards = keyed.permutation(num_shards, self.seed, epoch, "shards")
        windows = [shards[i : i + self.config.window_shards] for i in range(0, num_shards, self.config.window_shards)]
        waiting = [_Pool.empty()] * num_buckets  # of each bucket what did not fill a step
        for w, window in enumerate(windows):
            rows = np.concatenate([np.arange(*_span(self.lengths.shard_end, int(s))) for s in window])
            pool = self._pool(epoch, excluded, rows)
            order = np.argsort(keyed.hashes(self.lengths.sample_keys[pool.rows], self.seed, epoch, "order"))
            pool = pool.at(order)
            bucket = np.searchsorted(self.edges, pool.seconds, side="right")
            by_bucket = np.argsort(bucket, kind="stable")
            ends_of_buckets = np.searchsorted(bucket[by_bucket], np.arange(num_buckets), side="right")
            used: list[_Pool] = []
            ends: list[NDArray[np.int64]] = []
            taken = 0
            left = _Pool.empty()
            for b in range(num_buckets):
                here = pool.at(by_bucket[slice(*_span(ends_of_buckets, b))])
                here = _Pool.joined([left, waiting[b], here])
                cut = self._cut(here, close=False)
                cut = cut[: len(cut) - len(cut) % size]
                stop = int(cut[-1]) if len(cut) else 0
                alike, cut = _by_cost(here.at(slice(stop)), cut)
                used.append(alike)
                ends.append(cut + taken)
                taken += stop
                waiting[b] = here.at(slice(stop, None))
                if w == len(windows) - 1:
                    left, waiting[b] = waiting[b], left.at(slice(0))
                else:
                    left = _Pool.empty()
            batches = np.concatenate(ends)
            order = keyed.permutation(len(batches) // size, self.seed, epoch, w, "steps")
            written.add(*_in_order(_Pool.joined(used), batches, order, size), self._groups(len(batches)))
        if windows:
            ends_of_rest = self._cut(left, close=True)
            written.add(left, ends_of_rest, self._groups(len(ends_of_rest)))

    def _cut(self, pool: "_Pool", close: bool) -> NDArray[np.int64]:
        """Cut samples into micro-batches up to the budget: where each ends.

        Args:
            close: count the last one, which has room left, too.
        """
        budget = self.config.micro_batch_seconds
        ends: list[int] = []
        count, longest = 0, 0.0
        for i, seconds in enumerate(self.config.effective(pool.seconds).tolist()):  # an epoch's only loop over samples
            if seconds > longest:
                longest = seconds
            count += 1
            if longest * count > budget and count > 1:
                ends.append(i)
                count, longest = 1, seconds
        if close and count:
            ends.append(len(pool.rows))
        return np.array(ends, dtype=np.int64)

    def _groups(self, batches: int) -> NDArray[np.int64]:
        """Where the steps end that so many micro-batches make."""
        size = self.config.micro_batches_per_step
        return np.minimum(np.arange(size, batches + size, size), batches)


@dataclass(frozen=True)
class _Pool:
    """Samples with what was drawn for them."""

    rows: NDArray[np.int64]
    speed: NDArray[np.uint8]
    seconds: NDArray[np.float64]
    tokens: NDArray[np.int64]

    def at(self, places: NDArray[np.int64] | slice) -> "_Pool":
        return _Pool(self.rows[places], self.speed[places], self.seconds[places], self.tokens[places])

    @classmethod
    def empty(cls) -> "_Pool":
        none = np.empty(0, dtype=np.int64)
        return cls(none, none.astype(np.uint8), none.astype(np.float64), none)

    @classmethod
    def joined(cls, pools: Sequence["_Pool"]) -> "_Pool":
        if not pools:
            return cls.empty()
        names = ("rows", "speed", "seconds", "tokens")
        return cls(*(np.concatenate([getattr(pool, name) for pool in pools]) for name in names))


class _Planned:
    """Gathers the columns of an epoch, a window after the other."""

    def __init__(self) -> None:
        self._parts: dict[str, list[NDArray[Any]]] = {
            name: [np.empty(0, dtype)]
            for name, dtype in {
                "rows": np.uint32,
                "speed": np.uint8,
                "batch_end": np.uint32,
                "batch_cost": np.float64,
                "step_end": np.uint32,
                "tokens": np.uint32,
                "seconds": np.float64,
            }.items()
        }
        self._samples = self._batches = 0

    def add(self, pool: _Pool, batch_end: NDArray[np.int64], step_end: NDArray[np.int64]) -> None:
        """Add samples in their order, with the places where micro-batches and (in those) steps end."""
        if not len(step_end):
            return
        starts = np.concatenate([[0], batch_end[:-1]])
        steps = starts[np.concatenate([[0], step_end[:-1]])]
        self._put("rows", pool.rows)
        self._put("speed", pool.speed)
        self._put("batch_end", batch_end + self._samples)
        self._put("batch_cost", _costs(pool, batch_end))
        self._put("step_end", step_end + self._batches)
        self._put("tokens", np.add.reduceat(pool.tokens, steps))
        self._put("seconds", np.add.reduceat(pool.seconds, steps))
        self._samples += len(pool.rows)
        self._batches += len(batch_end)

    def _put(self, name: str, values: NDArray[Any]) -> None:
        self._parts[name].append(values.astype(self._parts[name][0].dtype))

    def arrays(self) -> dict[str, NDArray[Any]]:
        return {name: np.concatenate(self._parts.pop(name)) for name in list(self._parts)}


def _in_order(
    pool: _Pool, batch_end: NDArray[np.int64], order: NDArray[np.int64], size: int
) -> tuple[_Pool, NDArray[np.int64]]:
    """Put steps of `size` micro-batches into another order."""
    lengths = np.diff(batch_end, prepend=0).reshape(-1, size)
    ends = batch_end[size - 1 :: size]
    counts = lengths.sum(1)[order]
    starts = (ends - lengths.sum(1))[order]
    before = np.cumsum(counts) - counts
    places = np.arange(len(pool.rows)) + np.repeat(starts - before, counts)
    return pool.at(places), np.cumsum(lengths[order])


def _by_cost(pool: _Pool, batch_end: NDArray[np.int64]) -> tuple[_Pool, NDArray[np.int64]]:
    """Put the micro-batches of a bucket in the order of their cost, so that those of a step take equally long."""
    cost = _costs(pool, batch_end)
    return _in_order(pool, batch_end, np.argsort(cost, kind="stable"), 1)


def _costs(pool: _Pool, batch_end: NDArray[np.int64]) -> NDArray[np.float64]:
    """Padded seconds of each micro-batch."""
    if not len(batch_end):
        return np.empty(0)
    starts = np.concatenate([[0], batch_end[:-1]])
    longest: NDArray[np.float64] = np.maximum.reduceat(pool.seconds, starts)
    return longest * (batch_end - starts)


def _chunks(count: int) -> Iterator[tuple[int, int]]:
    for start in range(0, count, CHUNK):
        yield start, min(start + CHUNK, count)


def _odd(rate: NDArray[np.float32], judged: NDArray[np.uint8]) -> tuple[NDArray[np.int64], float]:
    """Rows of usable samples that are spoken implausibly fast or slowly, and the usual rate (labels a second)."""
    usable = rate[judged == 0]
    if not len(usable):
        return np.empty(0, dtype=np.int64), 0.0
    usual = float(np.median(usable))
    deviation = 1.4826 * float(np.median(np.abs(np.log(usable / usual))))
    bound = math.exp(max(ODD_RATE * deviation, math.log(ODD_RATE_FACTOR)))
    return np.flatnonzero((judged == 0) & ((rate > usual * bound) | (rate < usual / bound))), usual
