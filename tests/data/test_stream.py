"""A stream plan gives each token once, in order, on any number of ranks, and its windows are named by hashes."""

import dataclasses

import numpy as np
import pytest
import torch

from trainer.data.loader import Loader
from trainer.data.plan import mine
from trainer.data.stream import NOTHING, SHORTEST, StreamConfig, StreamDataset, StreamPlan

SIZES = StreamConfig(micro_batch_streams=2, micro_batches_per_step=3, window=10, jitter=3, evaluation_streams=4)
N = 601


def plan(training: bool = True, seed: int = 0, num_tokens: int = N, **changes) -> StreamPlan:
    return StreamPlan(SIZES.model_copy(update=changes), num_tokens, seed, training)


def dataset(**options) -> StreamDataset:
    made = plan(**options)
    return StreamDataset(made, np.arange(1, made.num_tokens + 1, dtype=np.uint16), 0, {}, {})


@pytest.mark.parametrize("num_tokens", [N, 600, 5, 1])
@pytest.mark.parametrize("training", [True, False])
def test_an_epoch_predicts_each_token_once_from_the_one_before_it(training: bool, num_tokens: int) -> None:
    data = dataset(training=training, num_tokens=num_tokens)
    steps = data.plan.epoch(1)
    rows: dict[str, list[int]] = {}
    for step in steps:
        assert step.counts["tokens"] == sum((data.load(m)["targets"] != NOTHING).sum() for m in step.micro_batches)
        for batch in map(data.load, step.micro_batches):
            wanted = batch["targets"]
            inside = wanted != NOTHING
            assert torch.equal(batch["inputs"][inside], wanted[inside] - 1)  # 0 stands before the text
            for key, row in zip(batch["keys"], wanted, strict=True):
                rows.setdefault(key.partition(".")[0], []).extend(row[row != NOTHING].tolist())
    assert [token for stream in sorted(rows, key=int) for token in rows[stream]] == list(range(1, num_tokens + 1))
    assert steps.totals()["tokens"] == num_tokens
    assert [step.last for step in steps] == [False] * (len(steps) - 1) + [True]
    assert len(rows) == min(6 if training else 4, num_tokens)
    assert len({len(row) for row in rows.values()}) <= 2


def test_a_micro_batch_has_the_same_streams_in_every_step_and_rank_r_of_n_takes_every_nth() -> None:
    steps = plan().epoch(0)
    assert {tuple(m.samples for m in step.micro_batches) for step in steps} == {((0, 1), (2, 3), (4, 5))}
    assert [m.samples for m in mine(steps[3], 0, 2, 2) if m] == [(0, 1), (4, 5)]
    assert steps[3:][1].micro_batches == steps[4].micro_batches
    assert steps.num_micro_batches() == 3 * len(steps)
    assert steps.worst()[0].cost == max(m.cost for step in steps for m in step.micro_batches)


def test_windows_are_functions_of_seed_and_epoch() -> None:
    long = {"num_tokens": 60_000}
    edges = plan(**long).edges(2)
    again = plan(**long)
    again.edges(0)
    assert np.array_equal(again.edges(2), edges)
    assert not np.array_equal(plan(**long, seed=1).edges(2)[:50], edges[:50])
    assert not np.array_equal(plan(**long).edges(1)[:50], edges[:50])
    lengths = np.diff(edges)[:-1]
    assert lengths.min() == SHORTEST
    assert lengths.mean() == pytest.approx(10, abs=0.5)
    assert lengths.std() == pytest.approx(3, abs=0.5)
    assert lengths.max() > 15
    for number, step in enumerate(plan(**long).epoch(2)):
        assert step.lr_share == (edges[number + 1] - edges[number]) / 10
        if number > 30:
            break


def test_windows_are_equal_without_jitter_and_in_an_evaluation() -> None:
    for made in (plan(jitter=0), plan(training=False)):
        steps = made.epoch(5)
        assert {m.cost / len(m.samples) for step in steps[:-1] for m in step.micro_batches} == {10}
        assert {step.lr_share for step in steps} == {1.0}
    assert [len(part) for part in plan(training=False).parts] == [2, 1, 1]


def test_the_loader_gives_each_rank_its_own_and_dummies_count_nothing() -> None:
    data = dataset()
    steps = data.plan.epoch(0)[:2]
    for rank, wanted in ((0, [("0.0", "1.0"), ("4.0", "5.0")]), (1, [("2.0", "3.0"), ("",)])):
        _, batches = next(iter(Loader(data, steps, rank, 2, 2, 0)))
        assert [tuple(b["keys"]) for b in batches] == wanted
    assert not batches[1]["valid"].any()
    assert batches[1]["targets"].tolist() == [[NOTHING]]


def test_the_name_of_a_sample_has_seed_epoch_stream_and_place_in_it() -> None:
    data, other = dataset(jitter=0), dataset(jitter=0, seed=1)
    first, second = (data.plan.epoch(0)[i].micro_batches[0] for i in (0, 1))
    found = [data.load(first), data.load(second), data.load(dataclasses.replace(first, epoch=1)), other.load(first)]
    assert len({key for batch in found for key in batch["noise_keys"].tolist()}) == 8
    assert found[0]["checksums"] == found[2]["checksums"] == found[3]["checksums"] != found[1]["checksums"]
