"""Data damaged on purpose, and programs that show at length what the tests show in short.

python -m tests.damage fuzz --count 1000      tars cut, flipped and reordered at random: nothing wrong passes
python -m tests.damage train                  50 shards with a hundredth of the samples and two shards damaged
python -m tests.damage ledger                 world sizes 1, 2, 4, workers 0 to 4, and ten random kills: one ledger
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.helpers import contents, encoded, fit, overrides, repack, run_ranks
from trainer.run import read_ledger, read_lines

RATE = 16000
PATIENCE = 1800.0
"""Seconds that a run may take on a busy machine."""
READ = {
    "zero bytes": "zero bytes",
    "flipped": "checksum differs from the index",
    "noise": "not audio",
    "text": "transcript's checksum differs from the index",
}
"""Damage done to a finished shard, and the reason that reading finds."""
MADE = {
    "undecodable": "not audio",
    "wrong rate": "wrong sample rate",
    "stereo": "several channels",
    "NaN": "NaN or infinite samples",
    "shorter": "another length than the index says",
    "not UTF-8": "transcript is not UTF-8",
    "unknown character": "transcript holds what is not in the alphabet",
    "longer text": "another number of labels than the index says",
}
"""Damage that was there before the shard was indexed, and the reason that reading finds."""
PLANNED = {"missing text": "no label", "infeasible": "more labels than output frames (CTC)"}
"""Damage that the index shows, and the reason that the plan gives."""


def damage(shard: Path, kinds: dict[str, str]) -> None:
    """Damage samples of a shard.

    Args:
        kinds: of each key the kind, one of `READ`, `MADE`, `PLANNED`.
    """
    samples = contents(shard)
    changes = {key: _made(kind, *samples[key]) for key, kind in kinds.items() if kind not in READ}
    if changes:
        repack(shard, changes)
    samples = contents(shard)
    whole = bytearray(shard.read_bytes())
    for key, kind in kinds.items():
        entry = samples[key][0]
        sound = slice(entry.audio_offset, entry.audio_offset + entry.audio_size)
        if kind == "zero bytes":
            whole[sound] = bytes(entry.audio_size)
        elif kind == "flipped":  # in the MD5 sum of a FLAC header, which decoders do not look at
            whole[sound.start + 30] ^= 0x10
        elif kind == "noise":
            whole[sound] = random.Random(0).randbytes(entry.audio_size)
        elif kind == "text":
            whole[entry.text_offset] ^= 1
    shard.write_bytes(whole)


def _made(kind: str, entry: Any, sound: bytes, text: bytes) -> dict[str, Any]:
    count = entry.num_samples
    return {
        "undecodable": {"sound": b"this is no sound at all" * 20},
        "wrong rate": {"sound": encoded(np.zeros(count, np.float32), 8000)},
        "stereo": {"sound": encoded(np.zeros((count, 2), np.float32))},
        "NaN": {"sound": encoded(np.full(count, np.nan, np.float32))},
        "shorter": {"sound": encoded(np.zeros(count - 1, np.float32))},
        "not UTF-8": {"text": b"\xff" * len(text)},
        "unknown character": {"text": b"?" * len(text)},
        "longer text": {"text": text * 2},
        "missing text": {"text": b"", "label_length": 0, "ctc_frames": 0},
        "infeasible": {"ctc_frames": 100_000},
    }[kind]


# --- fuzzing ---------------------------------------------------------------------------------------------------------


def fuzz(shard: Path, seed: int) -> str:
    """Damage a finished tar at random, its index left as it was; returns what was done."""
    draw = random.Random(seed)
    whole = bytearray(shard.read_bytes())
    what = draw.choice(["cut", "cut at a member", "bits", "letters", "reordered", "cut and bits"])
    if what == "reordered":
        _reorder(shard, draw)
        return what
    if what == "letters":  # few of a tar's bytes are text, and one text in place of another is the worst that can be
        for entry, *_ in contents(shard).values():
            whole[entry.text_offset + draw.randrange(entry.text_size)] = draw.choice(b"abcdefgh ")
    if "bits" in what:
        for _ in range(draw.choice([1, 10, 1000])):
            whole[draw.randrange(len(whole))] ^= 1 << draw.randrange(8)
    if what.startswith("cut"):
        ends = [entry.audio_offset - 512 for entry, *_ in contents(shard).values()]
        size = draw.choice(ends) if what == "cut at a member" else draw.randrange(len(whole) + 1)
        whole = whole[:size]
    shard.write_bytes(whole)
    return what


def _reorder(shard: Path, draw: random.Random) -> None:
    import io
    import tarfile

    with tarfile.open(shard) as old:
        members = [(member, old.extractfile(member).read()) for member in old]  # type: ignore[union-attr]
    draw.shuffle(members)
    with tarfile.open(shard, "w", format=tarfile.USTAR_FORMAT) as new:
        for member, content in members:
            new.addfile(member, io.BytesIO(content))


def check_fuzzed(task: Any, data: Path, count: int, first_seed: int = 0) -> dict[str, int]:
    """Read every sample of fuzzed shards; returns how many came through and how many were found out.

    Raises:
        AssertionError: something wrong passed for right.
    """
    from trainer.data.audio import AudioError, decode

    dataset = task.build_dataset("train")
    shards = sorted((data / "train").glob("*.tar"))
    originals = {shard: (shard.read_bytes(), contents(shard)) for shard in shards}
    ends = [0, *dataset.index.shard_end.tolist()]
    found = {"right": 0, "found out": 0}
    for seed in range(first_seed, first_seed + count):
        number = seed % len(shards)
        whole, samples = originals[shards[number]]
        what = fuzz(shards[number], seed)
        dataset._reader._open.clear()
        for row in range(ends[number], ends[number + 1]):
            entry, sound, text = samples[dataset.index.keys[row]]
            try:
                wave, labels = dataset.wave(row), dataset.labels(row)
            except AudioError:
                found["found out"] += 1
                continue
            same = np.array_equal(wave.numpy(), decode(sound, RATE))
            assert same, (seed, what, entry.key)
            assert labels == dataset.tokens.encode(text.decode()), (seed, what, entry.key)
            found["right"] += 1
        shards[number].write_bytes(whole)
    return found


# --- training on damaged data ----------------------------------------------------------------------------------------


def spread(data: Path, kinds: Sequence[str], every: int) -> dict[str, str]:
    """Damage samples all over the training shards, every so many; of each key the kind."""
    wanted: dict[str, str] = {}
    kind = itertools.cycle(kinds)
    count = 0
    for shard in sorted((data / "train").glob("*.tar")):
        here = {}
        for key in contents(shard):
            count += 1
            if count % every == 0:
                here[key] = next(kind)
        damage(shard, here)
        wanted |= here
    return wanted


def cut(data: Path, number: int, on_a_boundary: bool) -> list[str]:
    """Cut a shard short, in the middle of a sample or where a member ends; keys of what is lost."""
    shard = sorted((data / "train").glob("*.tar"))[number]
    entries = [entry for entry, *_ in contents(shard).values()]
    middle = entries[len(entries) // 2]
    with shard.open("r+b") as file:
        file.truncate(middle.audio_offset - 512 if on_a_boundary else middle.audio_offset + middle.audio_size // 2)
    return [entry.key for entry in entries[len(entries) // 2 :]]


def masked_fit(ranks: Any, arguments: list[str], keys: Sequence[str]) -> dict[str, Any]:
    """Train on whole data with the places of some keys masked: their sound is there, and counts nothing."""
    from trainer.data.speech import SpeechDataset

    load = SpeechDataset.load

    def masked(self: Any, micro_batch: Any) -> Any:
        batch = load(self, micro_batch)
        if self.training:
            labels = list(batch["labels"].split(batch["label_lengths"].tolist()))
            for i, key in enumerate(batch["keys"]):
                if key in keys:
                    batch["valid"][i] = False
                    labels[i] = labels[i][:0]
            batch["labels"] = torch.cat(labels)
            batch["label_lengths"] = torch.tensor([len(label) for label in labels])
        return batch

    SpeechDataset.load = masked  # type: ignore[method-assign]
    return fit(ranks, arguments)


def compare_training(
    whole: Path, folder: Path, every: int, shards_cut: Sequence[int], arguments: list[str], world_size: int = 2
) -> dict[str, Any]:
    """Train an epoch on damaged data, and on the same data whole with those places masked.

    Args:
        whole: prepared data; it is copied.
        every: which samples are damaged, in turn in all ways.
        shards_cut: shards that are cut short, the first on a boundary of a member.

    Returns:
        the greatest relative difference of the losses, and the number of samples damaged and steps.

    Raises:
        AssertionError: a damaged sample is not on record with its reason, or a good one was not seen exactly once.
    """
    by_plan, damaged = folder / "by_plan", folder / "damaged"
    shutil.copytree(whole, by_plan)
    shutil.copytree(whole, damaged)
    reasons = {**READ, **MADE, **PLANNED}
    kinds = spread(damaged, list(reasons), every)
    for shard in sorted((by_plan / "train").glob("*.tar")):  # what the index shows changes the plan: here as there
        damage(shard, {key: kinds[key] for key in contents(shard) if kinds.get(key) in PLANNED})
    lost = [key for n, number in enumerate(shards_cut) for key in cut(damaged, number, on_a_boundary=n == 0)]
    wanted = {key: reasons[kind] for key, kind in kinds.items()}
    wanted |= {key: "shard is cut short" for key in lost if wanted.get(key) not in PLANNED.values()}

    common = [*arguments, "max_epochs=1", "validation.every_steps=1000000", "max_bad_share=1"]
    run = run_ranks(world_size, fit, overrides(damaged, folder, *common, "name=damaged"), seconds=PATIENCE)[0]["run"]
    rows = [row for row in read_lines(run / "quarantine.jsonl") if row["split"] == "train"]
    got = {row["key"]: row["reason"] for row in rows}
    assert len(rows) == len(got)
    assert got == wanted, {
        k: (got.get(k), wanted.get(k)) for k in got.keys() | wanted.keys() if got.get(k) != wanted.get(k)
    }
    ledger = read_ledger(run / "ledger")
    bad = [key for row in ledger for key in row["bad"]]
    seen = [key for row in ledger for key in row["keys"]]
    planned = {key for key, reason in wanted.items() if reason in PLANNED.values()}
    assert sorted(bad) == sorted(wanted.keys() - planned)
    every_key = {key for shard in sorted((whole / "train").glob("*.tar")) for key in contents(shard)}
    assert sorted(seen) == sorted(every_key - planned)

    reference = overrides(by_plan, folder, *common, "name=masked")
    other = run_ranks(world_size, masked_fit, reference, bad, seconds=PATIENCE)[0]["run"]
    losses = [
        [row["loss"] for row in read_lines(path / "metrics.jsonl") if row["kind"] == "train"] for path in (run, other)
    ]
    assert len(losses[0]) == len(losses[1])
    differences = [abs(a - b) / abs(b) for a, b in zip(*losses, strict=True)]
    return {"difference": max(differences), "damaged": len(wanted), "samples": len(every_key), "steps": len(losses[0])}


# --- ledgers ---------------------------------------------------------------------------------------------------------


def compare_ledgers(data: Path, folder: Path, worlds: Sequence[int], workers: Sequence[int], kills: int) -> None:
    """Train at every world size and number of workers, and once with random kills; all ledgers must be the same."""
    common = ["max_epochs=4", "validation.every_steps=1000000", "tracking.log_every_steps=1000000"]
    first: list[dict[str, Any]] | None = None
    for world, number in itertools.product(worlds, workers):
        arguments = overrides(data, folder, *common, f"name=w{world}-{number}", f"num_workers={number}")
        run = run_ranks(world, fit, arguments, seconds=PATIENCE)[0]["run"]
        ledger = read_ledger(run / "ledger")
        first = first or ledger
        assert ledger == first, (world, number)
        print(f"{world} processes, {number} workers each: {len(ledger)} micro-batches, the same", flush=True)
    if kills and first:
        draw = random.Random(0)
        name = [*common, "name=killed", "checkpoint.every_steps=2"]
        done = 0
        while done < kills or not _finished(folder / "killed"):
            world, number = draw.choice(worlds), draw.choice(workers)
            arguments = overrides(data, folder, *name, f"num_workers={number}", f"nproc={world}")
            command = [sys.executable, "-m", "trainer", "train", "speech/tones", *arguments]
            steps = _steps(folder / "killed") + draw.randrange(1, 4)
            log = (folder / "log").open("w+b")
            process = subprocess.Popen(command, start_new_session=True, stderr=log, stdout=log)
            while process.poll() is None and (done >= kills or _steps(folder / "killed") < steps):
                time.sleep(draw.random() * 0.05)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                done += 1
            process.wait()
            log.close()
            if process.returncode not in (0, -signal.SIGKILL):
                said = (folder / "log").read_text(errors="replace")
                raise AssertionError(f"exit code {process.returncode}: {said[-2000:]}")
            if process.returncode == 0 and done < kills:
                raise AssertionError(f"the run was done after {done} kills; make it longer")
        assert read_ledger(folder / "killed" / "ledger") == first
        print(f"killed {done} times at random, resumed at random sizes: the same", flush=True)


def _steps(run: Path) -> int:
    """The last step on the ledger."""
    return max((row["step"] for row in read_ledger(run / "ledger")), default=0)


def _finished(run: Path) -> bool:
    rows = [row for row in read_lines(run / "metrics.jsonl") if row.get("kind") == "validation"]
    return bool(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["fuzz", "train", "ledger"])
    parser.add_argument("--count", type=int, default=1000, help="fuzzed tars")
    parser.add_argument("--kills", type=int, default=10)
    arguments = parser.parse_args()
    from trainer import recipe

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {"fuzz": 60, "ledger": 120, "train": 6000}
        data = folder / "data"
        more = [f"data.corpus.num_utterances={sizes[arguments.what]}"]
        if arguments.what == "train":
            more.append("data.samples_per_shard=100")
        task = recipe.load("speech/tones", overrides(data, folder, *more))
        task.prepare()
        run: dict[str, Callable[[], Any]] = {
            "fuzz": lambda: check_fuzzed(task, data, arguments.count),
            "train": lambda: compare_training(data, folder, 100, (3, 17), [*more, "plan.micro_batch_seconds=60"]),
            "ledger": lambda: compare_ledgers(data, folder, (1, 2, 4), range(5), arguments.kills),
        }
        print(json.dumps(run[arguments.what]()))


if __name__ == "__main__":
    main()
