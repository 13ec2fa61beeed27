"""Reading samples: whatever is wrong with one is found and named, and nothing wrong passes for right."""

import io
import json
import shutil
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.damage import MADE, PLANNED, READ, check_fuzzed, cut, damage
from tests.data import layouts
from tests.helpers import contents, overrides
from trainer import recipe
from trainer.data.index import write_index
from trainer.data.plan import MicroBatch
from trainer.errors import UserError


@pytest.fixture
def data(corpus: Path, tmp_path: Path) -> Path:
    return shutil.copytree(corpus, tmp_path / "data")


def task(data: Path, *more: str) -> Any:
    return recipe.load("speech/tones", overrides(data, data.parent, *more))


def load_all(dataset: Any) -> dict[str, Any]:
    """Every sample of a data set in one batch."""
    rows = tuple(range(len(dataset)))
    return dataset.load(MicroBatch(0, 0, 0, rows, (1.0,) * len(rows), 0.0))


def test_every_damage_is_named(data: Path) -> None:
    """Each of its place's own kind; the samples beside it come through."""
    shards = sorted((data / "train").glob("*.tar"))
    kinds = {**READ, **MADE}
    wanted = {}
    for n in range(3):
        here = dict(zip(contents(shards[n]), list(kinds)[n::3], strict=False))
        damage(shards[n], here)
        wanted |= {key: kinds[kind] for key, kind in here.items()}
    assert len(wanted) == len(kinds)
    batch = load_all(task(data).build_dataset("train"))
    assert {fault.key: fault.reason for fault in batch["faults"]} == wanted
    assert [k for k, ok in zip(batch["keys"], batch["valid"].tolist(), strict=True) if not ok] == [
        k for k in batch["keys"] if k in wanted
    ]
    assert all(bool(batch["audio"][i].isfinite().all()) for i in range(len(batch["keys"])))


def test_damaged_bytes_are_told_from_what_was_always_so(data: Path) -> None:
    shard = sorted((data / "train").glob("*.tar"))[0]
    first, second = list(contents(shard))[:2]
    damage(shard, {first: "noise", second: "undecodable"})
    details = {f.key: f.detail for f in load_all(task(data).build_dataset("train"))["faults"]}
    assert "its bytes are not those that were indexed" in details[first]
    assert "indexed" not in details[second]


@pytest.mark.parametrize("on_a_boundary", [True, False])
def test_a_shard_that_was_cut_gives_up_only_what_is_missing(data: Path, on_a_boundary: bool) -> None:
    dataset = task(data).build_dataset("train")
    before = load_all(dataset)
    lost = cut(data, 2, on_a_boundary)
    dataset._reader._open.clear()
    batch = load_all(dataset)
    assert [f.key for f in batch["faults"]] == lost
    assert {f.reason for f in batch["faults"]} == {"shard is cut short"}
    kept = [(k, c) for k, c in zip(batch["keys"], batch["checksums"], strict=True) if k not in lost]
    assert kept == [(k, c) for k, c in zip(before["keys"], before["checksums"], strict=True) if k not in lost]


def test_a_shard_that_is_gone_costs_its_samples(data: Path) -> None:
    dataset = task(data).build_dataset("train")
    shard = sorted((data / "train").glob("*.tar"))[1]
    keys = list(contents(shard))
    shard.unlink()
    assert {(f.key, f.reason, f.detail) for f in load_all(dataset)["faults"]} == {
        (key, "shard cannot be read", "No such file or directory") for key in keys
    }


def test_what_the_index_shows_is_left_out_by_the_plan(data: Path) -> None:
    shard = sorted((data / "train").glob("*.tar"))[0]
    kinds = dict(zip(contents(shard), PLANNED, strict=False))
    damage(shard, kinds)
    plan = task(data).build_dataset("train").plan
    assert {r.key: r.reason for r in plan.rejections} == {key: PLANNED[kind] for key, kind in kinds.items()}


def test_fuzzed_tars_never_pass_off_wrong_for_right(data: Path) -> None:
    """A hundred of them, cut, with bits flipped, or with their members in another order."""
    found = check_fuzzed(task(data), data, 100)
    assert found["right"] > 100
    assert found["found out"] > 100


def test_an_alphabet_that_lacks_letters_of_the_shards_is_refused(data: Path) -> None:
    made = json.loads((data / "corpus.json").read_text())["alphabet"]
    more = made + "éß"
    assert task(data, f"data.text.alphabet={json.dumps(more)}").build_dataset("train").tokens.identity == more
    with pytest.raises(UserError, match=r"data.text.alphabet = 'abc': lacks ' ' .*; add that, or run"):
        task(data, "data.text.alphabet=abc").build_dataset("train")


def test_a_long_clip_is_cut_with_its_labels(data: Path) -> None:
    """In training only; the plan counts what is left."""
    cut_task = task(data, "plan.too_long=cut", "plan.max_seconds=1.5")
    dataset, whole = cut_task.build_dataset("train"), task(data).build_dataset("train")
    assert not dataset.plan.rejections
    long = [row for row in range(len(whole)) if whole.index.num_samples[row] > 1.5 * 16000]
    assert len(long) > 5
    for row in long:
        wave, labels = dataset.wave(row), dataset.labels(row)
        entry = whole.index.entries[row]
        assert np.array_equal(wave.numpy(), whole.waveform(row)[:24000])
        all_labels = whole.labels(row)
        assert labels == all_labels[: len(all_labels) * 24000 // entry.num_samples]
    for step in dataset.plan.epoch(0):
        lengths = [dataset.load(m) for m in step.micro_batches]
        assert step.counts["tokens"] == sum(int(batch["label_lengths"].sum()) for batch in lengths)
        assert step.counts["seconds"] == pytest.approx(sum(float(batch["seconds"].sum()) for batch in lengths))
    assert {r.reason for r in cut_task.build_dataset("valid").plan.rejections} == {"longer than 1.5 s"}


@pytest.mark.parametrize("order", [None, ("flac", "txt", "json"), ("json", "txt", "flac")])
@pytest.mark.parametrize("name", ["digits", "an4_cepstra"])
def test_the_speaker_is_known_wherever_the_tar_has_it(name: str, order: tuple[str, ...] | None, tmp_path: Path) -> None:
    """None: as `prepare` writes it, whose members webdataset sorts by their endings."""
    getattr(layouts, name)(tmp_path)
    settings = [f"data.corpus.path={tmp_path}", f"data.path={tmp_path / 'made'}", f"runs_dir={tmp_path}"]
    recognition = recipe.load(f"speech/{name}", [*settings, "data.text.unknown=drop"])
    recognition.prepare()
    if order is not None:
        for shard in (tmp_path / "made").glob("*/*.tar"):
            reorder(shard, tuple("npy" if e == "flac" and name != "digits" else e for e in order))
    found = {}
    for split in ("train", "valid", "test"):
        dataset: Any = recognition.build_dataset(split)
        found |= {dataset.index.keys[row]: dataset.speaker(row) for row in range(len(dataset))}
    assert len(found) >= 3
    assert found == {key: key.split("_")[0] if name == "digits" else key.split("-")[1] for key in found}


def reorder(shard: Path, order: tuple[str, ...]) -> None:
    """Write the members of each sample in another order, and the index that goes with it."""
    with tarfile.open(shard) as tar:
        members = {member.name: tar.extractfile(member).read() for member in tar}  # type: ignore[union-attr]
    keys = list(contents(shard))
    with tarfile.open(shard, "w") as tar:
        for name in (f"{key}.{ending}" for key in keys for ending in order):
            info = tarfile.TarInfo(name)
            info.size = len(members[name])
            tar.addfile(info, io.BytesIO(members[name]))
    with tarfile.open(shard) as tar:
        places = {member.name: member.offset_data for member in tar}
    entries = [
        replace(
            entry,
            text_offset=places[f"{key}.txt"],
            audio_offset=next(places[f"{key}.{ending}"] for ending in order if ending in ("flac", "npy")),
        )
        for key, (entry, _, _) in contents(shard).items()
    ]
    write_index(shard, entries)
