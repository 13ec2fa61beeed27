"""The plan is a pure function: every sample once, similar lengths together, nothing of the world in it."""

from dataclasses import replace

import numpy as np
import pytest

from trainer import keyed
from trainer.data.plan import BucketedConfig, BucketedPlan, Lengths, Step, mine

CONFIG = BucketedConfig(micro_batch_seconds=60, micro_batches_per_step=4, num_buckets=10, window_shards=4)


def make_lengths(count: int = 700, speeds: tuple[float, ...] = (1.0,)) -> Lengths:
    keys = [f"utterance-{i}" for i in range(count)]
    sample_keys = np.array([keyed.key(k) for k in keys], dtype=np.uint64)
    seconds = 2 + 16 * keyed.uniform(sample_keys, "a") * keyed.uniform(sample_keys, "b")
    return Lengths(
        keys=keys,
        sample_keys=sample_keys,
        shard=(np.arange(count) // 32).astype(np.int32),
        tokens=(seconds * 14).astype(np.int64),
        seconds=np.stack([seconds / s for s in speeds]),
        feasible=np.ones((len(speeds), count), dtype=bool),
        speeds=speeds,
    )


def rows(steps: list[Step]) -> list[int]:
    return [row for step in steps for m in step.micro_batches for row in m.samples]


def test_every_sample_is_used_once_an_epoch() -> None:
    plan = BucketedPlan(CONFIG, make_lengths(), seed=1)
    for epoch in (0, 1, 7):
        assert sorted(rows(plan.epoch(epoch))) == list(range(700))


def test_it_is_the_same_for_the_same_inputs_and_another_for_others() -> None:
    lengths = make_lengths(speeds=(0.9, 1.0, 1.1))
    steps = BucketedPlan(CONFIG, lengths, seed=1).epoch(3)
    assert BucketedPlan(CONFIG, lengths, seed=1).epoch(3) == steps
    assert rows(BucketedPlan(CONFIG, lengths, seed=1).epoch(4)) != rows(steps)
    assert rows(BucketedPlan(CONFIG, lengths, seed=2).epoch(3)) != rows(steps)


def test_a_known_order_never_changes() -> None:
    """A resumed run on another machine or library version must find the order that the first one had."""
    plan = BucketedPlan(CONFIG, make_lengths(), seed=1)
    assert keyed.key(*rows(plan.epoch(0))) == 3170660767527547023


def test_the_budget_holds_and_steps_are_full_but_one() -> None:
    lengths = make_lengths()
    steps = BucketedPlan(CONFIG, lengths, seed=1).epoch(0)
    for step in steps:
        for m in step.micro_batches:
            longest = max(lengths.seconds[0][list(m.samples)])
            assert longest * len(m.samples) <= 60 + 1e-9
            assert m.cost == pytest.approx(longest * len(m.samples))
    assert sum(len(step.micro_batches) < 4 for step in steps) <= 1


def test_micro_batches_of_a_step_are_of_similar_length() -> None:
    lengths = make_lengths(4000)
    config = CONFIG.model_copy(update={"window_shards": 32})
    steps = BucketedPlan(config, lengths, seed=1).epoch(0)
    padded = sum(s.counts["padded_seconds"] for s in steps)
    assert 1 - sum(s.counts["seconds"] for s in steps) / padded < 0.1

    def spread(plan: BucketedPlan) -> float:
        longest = [[max(lengths.seconds[0][list(m.samples)]) for m in s.micro_batches] for s in plan.epoch(0)]
        return float(np.median([np.ptp(x) for x in longest]))

    one_bucket = BucketedPlan(config.model_copy(update={"num_buckets": 1}), lengths, seed=1)
    assert spread(BucketedPlan(config, lengths, seed=1)) < 0.4 * spread(one_bucket)


def test_order_is_mixed() -> None:
    """Long and short steps alternate, and a bucket is not sorted inside."""
    lengths = make_lengths()
    steps = BucketedPlan(CONFIG, lengths, seed=1).epoch(0)
    longest = [max(lengths.seconds[0][list(m.samples)].max() for m in s.micro_batches) for s in steps[:-1]]
    assert abs(np.corrcoef(np.arange(len(longest)), longest)[0, 1]) < 0.5
    assert any(
        list(m.samples) != sorted(m.samples, key=lambda r: lengths.seconds[0][r]) for m in steps[0].micro_batches
    )


def test_counts_are_those_of_the_samples() -> None:
    lengths = make_lengths()
    for step in BucketedPlan(CONFIG, lengths, seed=1).epoch(0):
        chosen = rows([step])
        assert step.counts["samples"] == len(chosen)
        assert step.counts["tokens"] == lengths.tokens[chosen].sum()
        assert step.counts["seconds"] == pytest.approx(lengths.seconds[0][chosen].sum())


def test_excluded_keys_are_left_out() -> None:
    plan = BucketedPlan(CONFIG, make_lengths(), seed=1)
    chosen = rows(plan.epoch(0, ["utterance-5", "utterance-600"]))
    assert sorted(chosen) == [i for i in range(700) if i not in (5, 600)]


def test_the_speed_is_drawn_before_the_budget_is_filled() -> None:
    lengths = make_lengths(speeds=(0.9, 1.0, 1.1))
    steps = BucketedPlan(CONFIG, lengths, seed=1).epoch(0)
    drawn = {row: s for step in steps for m in step.micro_batches for row, s in zip(m.samples, m.speeds, strict=True)}
    for s in lengths.speeds:
        assert list(drawn.values()).count(s) / 700 == pytest.approx(1 / 3, abs=0.06)
    for step in steps:
        for m in step.micro_batches:
            seconds = [lengths.seconds[lengths.speeds.index(s)][r] for r, s in zip(m.samples, m.speeds, strict=True)]
            assert max(seconds) * len(seconds) <= 60 + 1e-9
    again = BucketedPlan(CONFIG, lengths, seed=1).epoch(1)
    assert {r: s for x in again for m in x.micro_batches for r, s in zip(m.samples, m.speeds, strict=True)} != drawn


def test_a_speed_that_ctc_cannot_follow_is_not_taken() -> None:
    lengths = make_lengths(speeds=(0.9, 1.0, 1.1))
    lengths.feasible[2, :100] = False  # too fast for these
    steps = BucketedPlan(CONFIG, lengths, seed=1).epoch(0)
    drawn = {row: s for step in steps for m in step.micro_batches for row, s in zip(m.samples, m.speeds, strict=True)}
    assert all(drawn[row] != 1.1 for row in range(100))
    assert sorted(drawn) == list(range(700))


def test_what_cannot_be_learnt_is_rejected_with_its_reason() -> None:
    lengths = make_lengths()
    lengths.seconds[0, 3] = 61
    lengths.seconds[0, 4] = 0.05
    lengths.feasible[0, 5] = False
    plan = BucketedPlan(CONFIG, lengths, seed=1)
    assert {r.key: r.reason for r in plan.rejections} == {
        "utterance-3": "longer than 60 s",
        "utterance-4": "shorter than 0.1 s",
        "utterance-5": "more labels than output frames (CTC)",
    }
    assert sorted(rows(plan.epoch(0))) == [i for i in range(700) if i not in (3, 4, 5)]


def test_validation_has_one_order_sorted_by_length() -> None:
    lengths = make_lengths()
    plan = BucketedPlan(CONFIG, lengths, seed=1, shuffle=False)
    assert rows(plan.epoch(0)) == rows(plan.epoch(5)) == np.argsort(lengths.seconds[0], kind="stable").tolist()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_ranks_share_a_step_in_equal_rounds(world_size: int) -> None:
    steps = BucketedPlan(CONFIG, make_lengths(), seed=1).epoch(0)
    rounds = -(-4 // world_size)
    for step in steps:
        shares = [mine(step, rank, world_size, rounds) for rank in range(world_size)]
        assert {len(s) for s in shares} == {rounds}
        merged = [shares[i % world_size][i // world_size] for i in range(world_size * rounds)]
        assert tuple(m for m in merged if m is not None) == step.micro_batches


def test_an_empty_split_has_no_steps() -> None:
    assert BucketedPlan(CONFIG, make_lengths(0), seed=1).epoch(0) == []


def test_a_speed_that_is_only_there_to_fall_back_on_is_not_drawn() -> None:
    """What `augment.speeds: [0.9, 1.1]` means: 1 is for samples that 1.1 leaves too short."""
    lengths = make_lengths(speeds=(0.9, 1.1, 1.0))
    lengths.feasible[1, :50] = False
    plan = BucketedPlan(CONFIG, replace(lengths, num_drawn=2), seed=1)
    speeds = {
        row: s for step in plan.epoch(0) for m in step.micro_batches for row, s in zip(m.samples, m.speeds, strict=True)
    }
    drawn = [speeds[row] for row in range(50, 700)]
    assert set(drawn) == {0.9, 1.1}
    assert 250 < drawn.count(0.9) < 400
    assert {speeds[row] for row in range(50)} == {0.9, 1.0}
