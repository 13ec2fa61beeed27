"""The plan is a pure function: every sample once, similar lengths together, nothing of the world in it."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer import keyed
from trainer.bench.plan import disorder, librispeech_plan
from trainer.data.buckets import PLANS_KEPT, BucketedConfig, BucketedPlan, Lengths, Measures
from trainer.data.plan import MicroBatch, Step, Steps, mine
from trainer.errors import UserError

CONFIG = BucketedConfig(micro_batch_seconds=60, micro_batches_per_step=4, num_buckets=10, window_shards=4)


@dataclass(frozen=True)
class Samples(Lengths):
    """Lengths in memory, which a test may change before it makes a plan."""

    seconds: NDArray[np.float64] = field(kw_only=True)
    feasible: NDArray[np.bool_] = field(kw_only=True)
    tokens: NDArray[np.int64] = field(kw_only=True)


def make_lengths(count: int = 700, speeds: tuple[float, ...] = (1.0,), per_shard: int = 32) -> Samples:
    keys = [f"utterance-{i}" for i in range(count)]
    sample_keys = np.array([keyed.key(k) for k in keys], dtype=np.uint64)
    seconds = 2 + 16 * keyed.uniform(sample_keys, "a") * keyed.uniform(sample_keys, "b")
    lengths = Samples(
        keys=keys,
        sample_keys=sample_keys,
        shard_end=np.minimum(np.arange(per_shard, count + per_shard, per_shard), count),
        measure=lambda rows: Measures(lengths.seconds[:, rows], lengths.feasible[:, rows], lengths.tokens[rows]),
        speeds=speeds,
        seconds=np.stack([seconds / s for s in speeds]),
        feasible=np.ones((len(speeds), count), dtype=bool),
        tokens=(seconds * 14).astype(np.int64),
    )
    return lengths


def rows(steps: Iterable[Step]) -> list[int]:
    return [row for step in steps for m in step.micro_batches for row in m.samples]


def test_every_sample_is_used_once_an_epoch() -> None:
    plan = BucketedPlan(CONFIG, make_lengths(), seed=1)
    for epoch in (0, 1, 7):
        assert sorted(rows(plan.epoch(epoch))) == list(range(700))


def test_it_is_the_same_for_the_same_inputs_and_another_for_others() -> None:
    lengths = make_lengths(speeds=(0.9, 1.0, 1.1))
    steps = BucketedPlan(CONFIG, lengths, seed=1).epoch(3)
    assert list(BucketedPlan(CONFIG, lengths, seed=1).epoch(3)) == list(steps)
    assert rows(BucketedPlan(CONFIG, lengths, seed=1).epoch(4)) != rows(steps)
    assert rows(BucketedPlan(CONFIG, lengths, seed=2).epoch(3)) != rows(steps)


def test_a_known_order_never_changes() -> None:
    """A resumed run on another machine or library version must find the order that the first one had."""
    plan = BucketedPlan(CONFIG, make_lengths(), seed=1)
    assert keyed.key(*rows(plan.epoch(0))) == 263989244965303484


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


def test_micro_batches_of_a_step_are_of_similar_cost() -> None:
    """Of a bucket's micro-batches the nearest in padded seconds: ranks wait for each other less than a hundredth."""
    config = CONFIG.model_copy(update={"window_shards": 32, "micro_batches_per_step": 2})
    costs = [[m.cost for m in s.micro_batches] for s in BucketedPlan(config, make_lengths(4000), seed=1).epoch(0)]
    assert sum(map(sum, costs)) > 0.99 * sum(max(c) * len(c) for c in costs)


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
    assert len(BucketedPlan(CONFIG, make_lengths(0), seed=1).epoch(0)) == 0


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


def test_steps_are_made_when_they_are_asked_for() -> None:
    """A part, a sum and the worst batches of an epoch are those of its steps."""
    config = CONFIG.model_copy(update={"quadratic_seconds": 10.0})
    steps = BucketedPlan(config, make_lengths(speeds=(0.9, 1.0, 1.1)), seed=1).epoch(0)
    every = list(steps)

    def taken(m: MicroBatch) -> float:
        seconds = m.cost / len(m.samples)
        return (seconds + seconds**2 / 10) * len(m.samples)

    assert [step.last for step in every] == [False] * (len(every) - 1) + [True]
    for part in (slice(5, None), slice(0, 3), slice(4, 4), slice(None)):
        assert list(steps[part]) == every[part]
        batches = [m for step in every[part] for m in step.micro_batches]
        assert steps[part].num_micro_batches() == len(batches)
        for name, value in steps[part].totals().items():
            assert value == pytest.approx(sum(step.counts[name] for step in every[part]))
        worst = steps[part].worst()
        assert {m.cost for m in worst[:1]} == ({max(m.cost for m in batches)} if batches else set())
        assert all(len(m.samples) <= max(len(w.samples) for w in worst) for m in batches)
        assert all(m.cost / len(m.samples) <= max(w.cost / len(w.samples) for w in worst) for m in batches)
        assert all(taken(m) <= max(taken(w) for w in worst) for m in batches)
        assert set(worst) <= set(batches)
        assert set(Steps.worst(every[part])) <= set(batches)  # what a plan that is a list has by itself
    assert steps[-1] == every[-1]


def refuse(self: BucketedPlan, *_: object) -> None:
    raise AssertionError("it was planned already")


def test_a_plan_is_computed_once_a_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process finds it by everything it depends on, and by nothing else."""
    lengths = replace(make_lengths(), folder=tmp_path, identity="of this index")
    first = BucketedPlan(CONFIG, lengths, seed=1).epoch(3, ["utterance-7"])
    monkeypatch.setattr(BucketedPlan, "_plan", refuse)
    monkeypatch.setattr(BucketedPlan, "_look", refuse)
    again = BucketedPlan(CONFIG, lengths, seed=1)
    assert list(again.epoch(3, ["utterance-7"])) == list(first)
    for other in ((4, ["utterance-7"]), (3, []), (3, ["utterance-8"])):
        with pytest.raises(AssertionError, match="planned already"):
            again.epoch(*other)
    config = CONFIG.model_copy(update={"num_buckets": 11})
    for build in (
        lambda: BucketedPlan(CONFIG, lengths, seed=2).epoch(3, ["utterance-7"]),
        lambda: BucketedPlan(config, lengths, seed=1),
        lambda: BucketedPlan(CONFIG, replace(lengths, identity="of another"), seed=1),
        lambda: BucketedPlan(CONFIG, lengths, seed=1, shuffle=False),
    ):
        with pytest.raises(AssertionError, match="planned already"):
            build()


def test_few_plans_are_kept(tmp_path: Path) -> None:
    plan = BucketedPlan(CONFIG, replace(make_lengths(), folder=tmp_path), seed=1)
    for epoch in range(PLANS_KEPT + 3):
        plan.epoch(epoch)
    assert len(list(tmp_path.glob("plan-*.columns"))) == PLANS_KEPT


def test_what_does_not_fill_a_step_waits_for_its_bucket() -> None:
    """Only in the last window may a step mix buckets."""
    plan = BucketedPlan(CONFIG, make_lengths(4000), seed=1)
    steps = list(plan.epoch(0))
    mixed = []
    for i, step in enumerate(steps):
        seconds = plan.lengths.seconds[0][rows([step])]  # type: ignore[attr-defined]
        mixed.append(len(set(np.searchsorted(plan.edges, seconds, side="right"))) > 1 and i)
    assert sum(bool(m) for m in mixed) <= CONFIG.num_buckets
    assert min(m for m in mixed if m) > 0.8 * len(steps)


@pytest.mark.parametrize("size", [2, 16, 64])
def test_librispeech_pads_little_in_a_random_order(size: int) -> None:
    """At most 5 %, however large the global batch; places and buckets as an order drawn uniformly has them."""
    config = BucketedConfig(micro_batches_per_step=size)
    found = disorder(librispeech_plan(config, 40_000, per_shard=64))
    assert found["padding_percent"] < 5
    assert found["budget_filled_percent"] > 85
    assert found["balance_percent"] > 97
    assert found["displacement"] == pytest.approx(1 / 3, abs=0.05)
    assert found["displacement_between_epochs"] == pytest.approx(1 / 3, abs=0.05)
    assert found["bucket_bits"] > 0.9 * np.log2(20)
    if size == 2:  # of larger steps there are too few to tell
        assert found["bucket_bits_given_the_last"] > 0.95 * found["bucket_bits"]


def test_long_clips_cost_more_where_memory_grows_with_the_square() -> None:
    config = CONFIG.model_copy(update={"quadratic_seconds": 20.0})
    lengths = make_lengths()
    for m in (m for step in BucketedPlan(config, lengths, seed=1).epoch(0) for m in step.micro_batches):
        longest = max(lengths.seconds[0][list(m.samples)])
        assert len(m.samples) * (longest + longest**2 / 20) <= 60 + 1e-9
        assert m.cost == pytest.approx(longest * len(m.samples))
    longest = config.longest_seconds
    assert longest + longest**2 / 20 == pytest.approx(60)
    lengths.seconds[0, 3] = 1.01 * longest
    assert [r.key for r in BucketedPlan(config, lengths, seed=1).rejections] == ["utterance-3"]


def test_a_long_clip_may_be_an_error() -> None:
    lengths = make_lengths()
    lengths.seconds[0, 3] = 61
    with pytest.raises(UserError, match=r"too_long = error: 1 samples are longer than 60 s: utterance-3 \(.* 61\.00 s"):
        BucketedPlan(CONFIG.model_copy(update={"too_long": "error"}), lengths, seed=1)


def test_an_implausible_speaking_rate_is_told_and_used() -> None:
    lengths = make_lengths()
    lengths.tokens[5] = int(lengths.seconds[0, 5] * 60)
    lengths.tokens[6] = 1
    lengths.tokens[7] = 0
    plan = BucketedPlan(CONFIG, lengths, seed=1)
    assert [s.key for s in plan.suspicions] == ["utterance-5", "utterance-6"]
    assert plan.suspicions[0].reason == "implausible speaking rate"
    assert "labels a second, 13." in plan.suspicions[0].detail
    assert [(r.key, r.reason) for r in plan.rejections] == [("utterance-7", "no label")]
    assert sorted(rows(plan.epoch(0))) == [i for i in range(700) if i != 7]
