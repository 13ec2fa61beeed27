"""What several tests need: ranks without a launcher, a tiny corpus, a tiny run."""

import contextlib
import io
import json
import multiprocessing
import os
import pickle
import subprocess
import tarfile
import tempfile
import traceback
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import soundfile
from webdataset import TarWriter

from trainer.data.index import Entry, index_path, write_index

PRELOADED = [
    "trainer.engine",
    "trainer.verbs.train",
    "recipes.speech",
    # What torch and DeepSpeed import when the first optimizer is made: seconds in every forked rank.
    "torch._dynamo",
    "deepspeed.runtime.zero.stage_1_and_2",
    "deepspeed.runtime.zero.muon.muon_optimizer",
]

TINY = [
    "model.subsampling.layers=[{channels: 16, kernel: 3, stride: 2}, {channels: 16, kernel: 3, stride: 2}]",
    "model.rnn.hidden_size=16",
    "model.rnn.num_layers=2",
    "model.rnn.dropout=0.1",
    "data.features.num_bands=20",
    "data.samples_per_shard=8",
    "data.corpus.num_utterances=60",
    "data.augment.speeds=[0.9, 1.0, 1.1]",
    "data.augment.time_masks=1",
    "data.augment.frequency_masks=1",
    "data.augment.frequency_mask_bands=5",
    "plan.micro_batch_seconds=8",
    "plan.micro_batches_per_step=4",
    "plan.num_buckets=3",
    "plan.window_shards=3",
    "num_workers=0",
    "tracking.wandb=disabled",
    "optimizer.lr=1e-3",
    "optimizer.average_decay=0.9",
    "schedule.warmup_steps=2",
    "validation.every_steps=4",
    "validation.table_rows=0",
]
"""Overrides of speech/tones that make a run of a second."""


def overrides(data: Path, runs: Path, *more: str) -> list[str]:
    """The tiny run on a prepared corpus."""
    return [*TINY, f"data.path={data}", f"runs_dir={runs}", *more]


def spoil(folder: Path, count: int) -> list[str]:
    """Change a byte in the first recordings of a split; their keys."""
    keys = []
    for shard in sorted(folder.glob("*.tar")):
        content = bytearray(shard.read_bytes())
        for line in shard.with_suffix(".index.jsonl").read_text().splitlines()[1:]:
            if len(keys) < count:
                entry = json.loads(line)
                content[entry["audio_offset"] + 500] ^= 0xFF
                keys.append(entry["key"])
        shard.write_bytes(content)
    return keys


def contents(shard: Path) -> dict[str, tuple[Entry, bytes, bytes]]:
    """Of each sample of a shard its entry, its sound and its transcript."""
    whole = shard.read_bytes()
    lines = index_path(shard).read_text(encoding="utf-8").splitlines()[1:]
    found = {}
    for entry in (Entry(**json.loads(line)) for line in lines):
        sound = whole[entry.audio_offset :][: entry.audio_size]
        found[entry.key] = (entry, sound, whole[entry.text_offset :][: entry.text_size])
    return found


def repack(shard: Path, changes: dict[str, dict[str, Any]]) -> None:
    """Write a shard and its index anew with some samples changed, as if the corpus had been like that.

    Args:
        changes: of a key, what to replace: `sound` and `text` (bytes), and fields of the index.
    """
    samples = contents(shard)
    with shard.open("wb") as stream, TarWriter(stream, mode=0o644, mtime=0, user="", group="") as tar:
        for key, (_, sound, text) in samples.items():
            new = changes.get(key, {})
            tar.write({"__key__": key, "flac": new.get("sound", sound), "txt": new.get("text", text)})
    with tarfile.open(shard) as opened:
        members = {member.name: member for member in opened}
    entries = []
    for key, (entry, sound, text) in samples.items():
        new = changes.get(key, {})
        sound, text = new.get("sound", sound), new.get("text", text)
        facts = {
            "audio_offset": members[f"{key}.flac"].offset_data,
            "audio_size": len(sound),
            "audio_crc32": zlib.crc32(sound),
            "text_offset": members[f"{key}.txt"].offset_data,
            "text_size": len(text),
            "text_crc32": zlib.crc32(text),
            **{name: value for name, value in new.items() if name not in ("sound", "text")},
        }
        entries.append(replace(entry, **facts))
    write_index(shard, entries)


def encoded(samples: Any, sample_rate_hz: int = 16000, subtype: str = "FLOAT") -> bytes:
    """A WAV file of some samples."""
    stream = io.BytesIO()
    soundfile.write(stream, samples, sample_rate_hz, format="WAV", subtype=subtype)
    return stream.getvalue()


@contextlib.contextmanager
def small_disk(folder: Path, megabytes: int) -> Iterator[Path]:
    """A file system of its own, in memory; needs root."""
    if os.geteuid() != 0:
        pytest.skip("mounting a small disk needs root")
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", str(folder)])
    if mounted.returncode:
        pytest.skip("this container may not mount a small disk")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def _child(rank: int, world_size: int, store: str, pipe: Any, function: Callable[..., Any], arguments: tuple) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OSTINATO_STORE": store,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    import torch

    torch.set_num_threads(1)
    from trainer import distributed

    try:
        ranks = distributed.start(timeout_seconds=60)
        # Plain pickles: a connection would send tensors as handles that end with this process.
        pipe.send_bytes(pickle.dumps((True, function(ranks, *arguments))))
        distributed.stop()
    except BaseException as error:
        pipe.send_bytes(pickle.dumps((False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")))
    finally:
        pipe.close()


def run_ranks(world_size: int, function: Callable[..., Any], *arguments: Any, seconds: float = 120) -> list[Any]:
    """Call `function(ranks, *arguments)` in a process group of its own; the result of each rank.

    The processes are forked from a server that has imported torch and DeepSpeed once.

    Raises:
        RuntimeError: a rank raised; the text holds its traceback.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(world_size):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(
                target=_child, args=(rank, world_size, f"{folder}/store", theirs, function, arguments)
            )
            process.start()
            theirs.close()
            children.append((process, ours))
        results = []
        try:
            for process, pipe in children:
                if not pipe.poll(seconds):
                    raise RuntimeError(f"a rank gave no answer in {seconds:g} s")
                try:
                    results.append(pickle.loads(pipe.recv_bytes()))
                except EOFError:
                    process.join(10)
                    results.append((False, f"a rank ended with exit code {process.exitcode}"))
        finally:
            for process, _ in children:
                process.join(10)
                if process.is_alive():
                    process.kill()
                    process.join()
    failures = [text for ok, text in results if not ok]
    if failures:
        raise RuntimeError("\n".join(failures))
    return [value for _, value in results]


def fit(ranks: Any, arguments: list[str], config: str = "speech/tones") -> dict[str, Any]:
    """Train a configuration with overrides to the end; what a test wants to know of it."""
    from trainer import recipe
    from trainer.engine import Training
    from trainer.errors import RequeueError

    training = Training(recipe.load(config, arguments), ranks)
    stopped = False
    try:
        values = training.fit()
    except RequeueError:
        stopped, values = True, {}
    weights = {name: t.clone() for name, t in training.weights().items()}
    raw = {name: t.clone() for name, t in training.trained.full("weight").items()}
    return {
        "values": values,
        "weights": weights,
        "raw": raw,
        "position": dict(training.position.__dict__),
        "plateau": training.plateau.state(),
        "run": training.run.path,
        "stopped": stopped,
    }


def fit_and_listen(ranks: Any, arguments: list[str]) -> dict[str, Any]:
    """The same, and what was said to the person who watches."""
    from trainer.tracking import Tracker

    said: list[str] = []
    Tracker.say = lambda self, text: said.append(text)
    return fit(ranks, arguments) | {"said": said}
