"""Index and plan of a corpus larger than any that is at hand: time, memory, padding and disorder.

`generate` writes a synthetic corpus in the true layout: an index beside each of many shards, the shards themselves
being links to a few tars, so that any batch can be read and decoded. `measure` then does what the ranks of one host do:
merge the indexes, plan an epoch, and load the first batch from somewhere in it, each rank with its loader workers.
"""

import json
import multiprocessing
import os
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer import keyed
from trainer.data.buckets import BucketedConfig, BucketedPlan, EpochSteps, Lengths, Measures
from trainer.errors import UserError

LIBRISPEECH = {
    0: 1.3, 0.1: 1.9, 0.5: 2.2, 1: 2.5, 5: 4.2, 10: 6.4, 25: 11.4, 50: 13.8, 75: 15.3, 90: 16.7, 95: 17.3, 99: 18.1,
    99.5: 18.4, 99.9: 18.8, 100: 27.2,
}  # fmt: skip
"""Seconds at each percentile of LibriSpeech's train-clean-100 (from icefall's display_manifest_statistics.py)."""
TEMPLATES = 16
"""Tars that the shards are links to."""
CLIPS = 256
"""Different recordings in them."""
CHARACTERS_A_SECOND = 14
TINY = 1000
"""Utterances of the corpus whose processes are the base that memory is counted from."""
PLAIN = ("data.text.alphabet=null", "data.text.tokens.kind=characters", "data.features.kind=log_mel")
"""What is made up is sound with letters, whatever the configuration's own corpus holds."""
SAMPLING_SECONDS = 0.05
START_METHOD = "spawn"
"""Of the ranks: what a forked one shares with this process would not be counted."""


def librispeech_seconds(count: int, *name: int | str) -> NDArray[np.float64]:
    """Durations like LibriSpeech's: percentiles joined by straight lines."""
    keys = np.arange(count, dtype=np.uint64)
    return np.interp(100 * keyed.uniform(keys, "librispeech", *name), list(LIBRISPEECH), list(LIBRISPEECH.values()))


def generate(folder: Path, utterances: int, per_shard: int, sample_rate_hz: int, features: Any) -> int:
    """Write a corpus; returns the number of shards.

    Args:
        folder: to become `data.path`.
        per_shard: utterances in a shard.
        features: of the configuration, for which the band statistics are made up.
    """
    from trainer.data.prepared import BandStatistics, Prepared, SplitInfo, write_prepared

    train = folder / "train"
    train.mkdir(parents=True)
    templates = folder / "templates"
    templates.mkdir()
    clips = _clips(sample_rate_hz)
    made = [_template(templates / f"{i}.tar", i, per_shard, clips) for i in range(TEMPLATES)]
    shards = -(-utterances // per_shard)
    total = 0
    for shard in range(shards):
        template = made[shard % TEMPLATES]
        count = min(per_shard, utterances - shard * per_shard)
        name = train / f"shard-{shard:06d}"
        try:
            os.link(templates / f"{shard % TEMPLATES}.tar", name.with_suffix(".tar"))
        except OSError as error:
            raise UserError(f"{folder}: has no hard links ({error.strerror}); name another with --folder") from error
        header = {"format": 2, "shard": f"{name.name}.tar", "bytes": template[0], "samples": count}
        reader, chapter = 1000 + shard // 50, 100000 + shard
        lines = [f'{{"key": "{reader}-{chapter}-{i:04d}", {template[1][i]}' for i in range(count)]
        name.with_suffix(".index.jsonl").write_text("\n".join([json.dumps(header), *lines, ""]))
        total += sum(template[2][:count])
    bands = features.num_bands
    write_prepared(
        Prepared(
            corpus="synthetic",
            sample_rate_hz=sample_rate_hz,
            alphabet=" abcdefghijklmnopqrstuvwxyz",
            splits={"train": SplitInfo(samples=utterances, hours=total / sample_rate_hz / 3600, shards=shards)},
            statistics=BandStatistics(
                num_bands=bands,
                window_ms=features.window_ms,
                hop_ms=features.hop_ms,
                mean=[0.0] * bands,
                deviation=[1.0] * bands,
            ),
        ),
        folder,
    )
    return shards


@contextmanager
def stand_in(config: str, overrides: Sequence[str], utterances: int, per_shard: int = 256) -> Iterator[list[str]]:
    """A made-up corpus in place of that of a configuration: the `key=value` that name it.

    Raises:
        UserError: the configuration is not of speech.
    """
    from trainer import recipe
    from trainer.data.prepared import SpeechDataConfig

    loaded = recipe.load(config, [*overrides, *PLAIN]).config
    if not isinstance(data := getattr(loaded, "data", None), SpeechDataConfig):
        raise UserError(f"the command line: utterances = {utterances}: {config} is not of speech; leave it out")
    with tempfile.TemporaryDirectory(prefix="ostinato-") as folder:
        path = Path(folder) / "corpus"
        generate(path, utterances, per_shard, data.sample_rate_hz, data.features)
        yield [*PLAIN, f"data.path={path}"]


Clip = tuple[bytes, str, int]
"""FLAC, transcript, samples."""


def _clips(sample_rate_hz: int) -> list[Clip]:
    import io

    import soundfile

    generator = np.random.default_rng(0)
    noise = (1000 * generator.standard_normal(int(max(LIBRISPEECH.values()) + 1) * sample_rate_hz)).astype(np.int16)
    clips: list[Clip] = []
    for seconds in librispeech_seconds(CLIPS, "clips"):
        stream = io.BytesIO()
        samples = noise[: int(seconds * sample_rate_hz)]
        soundfile.write(stream, samples, sample_rate_hz, format="FLAC", subtype="PCM_16")
        letters = keyed.hashes(np.arange(int(seconds * CHARACTERS_A_SECOND), dtype=np.uint64), "letters", len(clips))
        text = "".join(chr(97 + int(n) % 26) for n in letters)
        clips.append((stream.getvalue(), text, len(samples)))
    return clips


def _template(path: Path, number: int, count: int, clips: list[Clip]) -> tuple[int, list[str], list[int]]:
    """Write a tar; its size, the line of each utterance in an index after the key, and the samples of each."""
    import io
    import tarfile
    import zlib

    from trainer.data.text import ctc_frames

    lines, lengths = [], []
    chosen = (keyed.hashes(np.arange(count, dtype=np.uint64), "clips", number) % np.uint64(len(clips))).tolist()
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i, clip in enumerate(chosen):
            audio, text, samples = clips[clip]
            offsets = []
            for ending, content in (("flac", audio), ("txt", text.encode())):
                member = tarfile.TarInfo(f"{i:04d}.{ending}")
                member.size = len(content)
                offsets.append(tar.offset + tarfile.BLOCKSIZE)
                tar.addfile(member, io.BytesIO(content))
            facts = {
                "audio_offset": offsets[0],
                "audio_size": len(audio),
                "audio_crc32": zlib.crc32(audio),
                "text_offset": offsets[1],
                "text_size": len(text),
                "text_crc32": zlib.crc32(text.encode()),
                "num_samples": samples,
                "label_length": len(text),
                "ctc_frames": ctc_frames(text),
            }
            lines.append(json.dumps(facts)[1:])
            lengths.append(samples)
    return path.stat().st_size, lines, lengths


# --- one host -----------------------------------------------------------------------------------------------------


def _rank(pipe: Any, config: str, overrides: list[str], rank: int, world_size: int) -> None:
    """A rank: does what it is told, and answers with the seconds it took."""
    import math

    import torch

    from trainer import recipe as recipes
    from trainer.data.loader import Loader

    torch.set_num_threads(1)
    recipe = recipes.load(config, overrides)
    pipe.send("ready")
    dataset: Any = None
    steps: Any = None
    while (order := pipe.recv()) is not None:
        start, used = time.perf_counter(), time.process_time()
        if order[0] == "open":
            dataset = recipe.build_dataset("train")
            answer: Any = len(dataset)
        elif order[0] == "plan":
            steps = dataset.plan.epoch(order[1])
            answer = len(steps)
        else:
            rounds = math.ceil(dataset.plan.micro_batches_per_step / world_size)
            left = steps[order[1] :]
            step, loaded = next(iter(Loader(dataset, left, rank, world_size, rounds, recipe.config.num_workers)))
            wanted = [m.samples for m in step.micro_batches[rank::world_size]]
            got = [batch["keys"] for batch in loaded if batch["keys"] != [""]]
            if got != [[dataset.index.keys[row] for row in rows] for rows in wanted]:
                raise AssertionError(f"step {order[1]}: {got} was loaded")
            answer = sum(len(batch["faults"]) for batch in loaded)
        pipe.send((time.perf_counter() - start, time.process_time() - used, answer))


class _Answer(NamedTuple):
    seconds: float
    """Of the slowest rank."""
    cpu_seconds: float
    """Of all ranks together."""
    value: Any
    """Of the first."""


class _Host:
    """The ranks of one host."""

    def __init__(self, config: str, overrides: list[str], world_size: int) -> None:
        context: Any = multiprocessing.get_context(START_METHOD)
        self.pipes, self.processes = [], []
        for rank in range(world_size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_rank, args=(theirs, config, overrides, rank, world_size))
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        for pipe in self.pipes:
            pipe.recv()
        self.peak = 0
        self._done = threading.Event()
        self._watch = threading.Thread(target=self._sample, daemon=True)
        self._watch.start()

    def _sample(self) -> None:
        while not self._done.wait(SAMPLING_SECONDS):
            self.peak = max(self.peak, self.memory())

    def memory(self) -> int:
        """Bytes of all ranks; a page that several share counts once."""
        return sum(_memory(process.pid or 0) for process in self.processes)

    def tell(self, *order: Any) -> "_Answer":
        """Give an order to all."""
        for pipe in self.pipes:
            pipe.send(order)
        answers = [pipe.recv() for pipe in self.pipes]
        self.peak = max(self.peak, self.memory())
        return _Answer(max(a[0] for a in answers), sum(a[1] for a in answers), answers[0][2])

    def close(self) -> None:
        self._done.set()
        self._watch.join()
        for pipe in self.pipes:
            pipe.send(None)
        for process in self.processes:
            process.join(30)
            if process.is_alive():
                process.terminate()


@contextmanager
def _host(config: str, overrides: list[str], world_size: int) -> Iterator[_Host]:
    host = _Host(config, overrides, world_size)
    try:
        yield host
    finally:
        host.close()


def _memory(pid: int) -> int:
    """Proportional set size: private pages, and of shared ones the part that falls to this process."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass  # it has ended
    return 0


def measure(
    config: str,
    overrides: Sequence[str],
    sizes: Sequence[int],
    per_shard: int,
    world_size: int,
    places: int,
    folder: Path | None = None,
) -> list[dict[str, Any]]:
    """Time and memory of index, plan and first batch for corpora of several sizes; a row each.

    Args:
        sizes: utterances.
        world_size: ranks on the host; each has `num_workers` loader threads.
        places: from which the first batch is loaded, spread over the epoch.
        folder: where the corpora are made (and deleted again); None: the folder for temporary files.
    """
    from trainer import recipe as recipes

    settings = recipes.load(config, [*overrides, *PLAIN]).config
    rows: list[dict[str, Any]] = []
    base = merge_base = 0
    for utterances in (TINY, *sizes):
        with tempfile.TemporaryDirectory(dir=folder, prefix="ostinato-plan-") as name:
            data = Path(name) / "data"
            start = time.perf_counter()
            shards = generate(data, utterances, per_shard, settings.data.sample_rate_hz, settings.data.features)
            generated = time.perf_counter() - start
            of_corpus = [*overrides, *PLAIN, f"data.path={data}"]
            with _host(config, of_corpus, world_size) as host:
                merge = host.tell("open")
                merged_peak = host.peak
            for kept in (data / "train" / ".columns").glob("survey-*"):
                kept.unlink()  # it is part of planning, and is measured there
            with _host(config, of_corpus, world_size) as host:
                opened = host.tell("open")
                planned = host.tell("plan", 0)
                steps = planned.value
                first = [host.tell("load", int(steps * (i + 0.5) / places)).seconds for i in range(places)]
                peak = host.peak
                resumed = host.tell("open").seconds + host.tell("plan", 0).seconds  # as a resumed run does
            files = {
                kind: sum(f.stat().st_size for f in (data / "train" / ".columns").glob(f"{kind}*.columns"))
                for kind in ("index", "survey", "plan")
            }
            if utterances == TINY:
                base, merge_base = peak, merged_peak
                continue
            rows.append(
                {
                    "utterances": utterances,
                    "shards": shards,
                    "steps": steps,
                    "processes": world_size,
                    "generate_seconds": generated,
                    "merge_seconds": merge.seconds,
                    "merge_cpu_seconds": merge.cpu_seconds,
                    "merge_bytes_an_utterance": (merged_peak - merge_base) / utterances,
                    "open_and_plan_seconds": opened.seconds + planned.seconds,
                    "open_and_plan_cpu_seconds": opened.cpu_seconds + planned.cpu_seconds,
                    "bytes_an_utterance": (peak - base) / utterances,
                    "base_bytes": base,
                    "reopen_seconds": resumed,
                    "first_batch_seconds": {"median": float(np.median(first)), "worst": max(first)},
                    "file_bytes_an_utterance": {kind: size / utterances for kind, size in files.items()},
                }
            )
    return rows


# --- padding and disorder -----------------------------------------------------------------------------------------


def disorder(plan: BucketedPlan, epochs: tuple[int, int] = (0, 1)) -> dict[str, float]:
    """How well an epoch is packed, and how random its order is.

    Returns:
        `padding_percent`: share of what the devices compute that is padding;
        `balance_percent`: mean over largest cost of the micro-batches of a step, over all full steps: what is left of
            the speed of as many ranks as a step has micro-batches, if nothing else holds them up;
        `displacement`: mean distance of a sample from its place in the corpus, as a share of the corpus, and
        `displacement_between_epochs`: from its place in the epoch before; both 1/3 for an order drawn uniformly;
        `bucket_bits`: entropy of the bucket of a step, and `bucket_bits_given_the_last`: of the same where the bucket
        of the step before is known; they are equal where each step's bucket is drawn anew.
    """
    first, second = plan.epoch(epochs[0]), plan.epoch(epochs[1])
    totals = first.totals()
    a, b = (_places(steps, len(plan.lengths)) for steps in (first, second))
    both = (a >= 0) & (b >= 0)
    count = int(totals["samples"])
    rank_in_corpus = np.cumsum(a >= 0) - 1
    buckets = _buckets(plan, first)
    pairs = np.zeros((plan.config.num_buckets, plan.config.num_buckets))
    np.add.at(pairs, (buckets[:-1], buckets[1:]), 1)
    alone = _bits(np.bincount(buckets))
    return {
        "padding_percent": 100 * (1 - totals["seconds"] / totals["padded_seconds"]),
        "balance_percent": 100 * _balance(first),
        "budget_filled_percent": 100
        * totals["padded_seconds"]
        / (plan.config.micro_batch_seconds * len(first.planned["batch_end"])),
        "displacement": float(np.abs(a - rank_in_corpus)[a >= 0].mean()) / count,
        "displacement_between_epochs": float(np.abs(a - b)[both].mean()) / count,
        "bucket_bits": alone,
        "bucket_bits_given_the_last": _bits(pairs.ravel()) - _bits(pairs.sum(1)),
    }


def _places(steps: EpochSteps, count: int) -> NDArray[np.int64]:
    """The place of each row in the epoch; -1: it is not in it."""
    places = np.full(count, -1, dtype=np.int64)
    rows = steps.planned["rows"]
    places[rows] = np.arange(len(rows))
    return places


def _buckets(plan: BucketedPlan, steps: EpochSteps) -> NDArray[np.int64]:
    """The bucket of the longest clip in the first micro-batch of each step."""
    p = steps.planned
    first = np.concatenate([[0], p["step_end"][:-1]]).astype(np.int64)
    sizes = np.diff(p["batch_end"].astype(np.int64), prepend=0)
    longest = p["batch_cost"][first] / sizes[first]
    return np.searchsorted(plan.edges, longest * (1 + 1e-12), side="right")


def _balance(steps: EpochSteps) -> float:
    costs, ends = steps.planned["batch_cost"].astype(np.float64), steps.planned["step_end"].astype(np.int64)
    sizes = np.diff(ends, prepend=0)
    full = sizes == sizes.max()
    together, largest = (f.reduceat(costs, ends - sizes)[full] for f in (np.add, np.maximum))
    return float(together.sum() / (largest.sum() * sizes.max()))


def _bits(counts: NDArray[Any]) -> float:
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log2(shares)).sum())


def librispeech_plan(config: BucketedConfig, utterances: int, per_shard: int) -> BucketedPlan:
    """A plan over durations like LibriSpeech's, with no audio behind it."""
    seconds = librispeech_seconds(utterances, "corpus")
    keys = np.arange(utterances, dtype=np.uint64)
    tokens = np.maximum(1, (seconds * CHARACTERS_A_SECOND).astype(np.int64))

    def look(rows: NDArray[np.int64]) -> Measures:
        return Measures(seconds[rows][None], np.ones((1, len(rows)), dtype=bool), tokens[rows])

    ends = np.minimum(np.arange(per_shard, utterances + per_shard, per_shard), utterances)
    return BucketedPlan(config, Lengths([str(k) for k in keys], keyed.hashes(keys, "names"), ends, look), seed=0)
