"""A run does not depend on how its batches are split over processes, and resuming changes nothing."""

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.damage import compare_training
from tests.helpers import contents, fit, fit_and_listen, overrides, repack, run_ranks, spoil
from trainer import checkpoint, checkpoint_writer, distributed
from trainer.errors import UserError
from trainer.run import CLOCKS, read_ledger, read_lines, read_quarantine

pytestmark = pytest.mark.distributed


def gradients(ranks: Any, arguments: list[str]) -> dict[str, Tensor]:
    """Loss and gradient of the first step, as the optimizer would get them (before clipping)."""
    from trainer import recipe
    from trainer.engine import Training

    training = Training(recipe.load("speech/tones", arguments), ranks)
    optimizer, caught = training.trained.optimizer, {}

    def catch(closure: Any = None) -> None:
        for p, name in training.trained.names.items():
            caught[name] = p.grad.clone()

    optimizer.step = catch
    training.fit()
    row = next(read_lines(training.run.metrics)) if ranks.first else {"loss": 0.0}
    return caught | {"loss": torch.tensor(row["loss"])}


def one_batch(data: Path, runs: Path) -> dict[str, Tensor]:
    """The same by a bare PyTorch pass over all samples of the step at once."""
    from trainer import recipe
    from trainer.data.plan import MicroBatch
    from trainer.engine import initialise

    task = recipe.load("speech/tones", overrides(data, runs))
    dataset = task.build_dataset("train")
    step = dataset.plan.epoch(0)[0]
    assert len(step.micro_batches) == 4
    rows = tuple(r for m in step.micro_batches for r in m.samples)
    speeds = tuple(s for m in step.micro_batches for s in m.speeds)
    model = task.build_model().train()
    initialise(model, 0)
    output = task.step(model, dataset.load(MicroBatch(0, 0, 0, rows, speeds, 0.0)))
    loss = output.losses["ctc"].sum / output.losses["ctc"].count
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters()} | {"loss": loss.detach()}


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_loss_and_gradient_do_not_depend_on_the_split(corpus: Path, tmp_path: Path, world_size: int) -> None:
    """1 x 4 micro-batches, 2 x 2 and 3 ranks (with dummies) equal one big batch: dropout, SpecAugment and all."""
    want = one_batch(corpus, tmp_path)
    got = run_ranks(world_size, gradients, overrides(corpus, tmp_path, "max_steps=1", "validation.every_steps=9"))[0]
    assert got.keys() == want.keys()
    assert float(want["loss"]) > 0.1
    for name, value in want.items():
        scale = value.abs().max().item()
        torch.testing.assert_close(
            got[name].to(value), value, rtol=1e-4, atol=1e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


VARIANTS = {
    "adamw-zero0": ["zero.stage=0"],
    "adamw-zero1": ["zero.stage=1"],
    "rmsprop-zero0": ["zero.stage=0", "optimizer={kind: rmsprop, lr: 1e-3, average_decay: 0.9, momentum: 0.5}"],
    "rmsprop-zero1": ["zero.stage=1", "optimizer={kind: rmsprop, lr: 1e-3, average_decay: 0.9, momentum: 0.5}"],
    "adamw-zero3": ["zero.stage=3", "model.rnn.hidden_size=64"],  # else every weight is below distributed.SMALL
    "rmsprop-zero3-offload": ["zero={stage: 3, offload: true}", "optimizer={kind: rmsprop, lr: 1e-3, momentum: 0.5}"],
    "adamw-zero2-offload": ["zero={stage: 2, offload: true}"],
    "bf16-zero3-recompute": ["zero.stage=3", "precision=bf16", "activation_checkpointing=true"],
    "batchnorm-zero2": ["zero.stage=2", "model.rnn.norm=batch", "model.subsampling.norm=batch"],
    "bf16-zero1": ["zero.stage=1", "precision=bf16"],
}


def numbers(run: Path) -> list[dict[str, Any]]:
    """Rows of metrics.jsonl without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in CLOCKS} for row in read_lines(run / "metrics.jsonl")]


@pytest.mark.parametrize("variant", VARIANTS)
def test_four_steps_are_two_and_resume_and_two(corpus: Path, tmp_path: Path, variant: str) -> None:
    """Bit for bit at the same world size; on another one the same ledger and the same weights to float tolerance."""
    common = [*VARIANTS[variant], "validation.every_steps=2"]
    constant = "schedule={kind: constant}"  # the length of a cosine is fixed when a run begins: at two steps
    whole = run_ranks(2, fit, overrides(corpus, tmp_path, *common, "name=whole", constant, "max_steps=4"))[0]
    parts = overrides(corpus, tmp_path, *common, "name=parts", constant)
    first = run_ranks(2, fit, [*parts, "max_steps=2"])[0]
    assert first["position"]["total_steps"] == 2
    resumed = run_ranks(2, fit, [*parts, "max_steps=4"])[0]
    assert resumed["position"]["step"] == 4
    for name, value in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], value), name
    assert read_ledger(resumed["run"] / "ledger") == read_ledger(whole["run"] / "ledger")
    assert numbers(resumed["run"]) == numbers(whole["run"])

    other = overrides(corpus, tmp_path, *common, "name=other", constant)
    run_ranks(2, fit, [*other, "max_steps=2"])
    moved = [*other, "max_steps=4", "zero={stage: 0, offload: false}"]  # another world size and another stage
    alone = run_ranks(1, fit, moved)[0]
    assert read_ledger(alone["run"] / "ledger") == read_ledger(whole["run"] / "ledger")
    loose = 0.02 if "bf16" in variant else 2e-3  # AdamW turns rounding of near-zero gradients into whole steps
    for name, value in whole["raw"].items():
        torch.testing.assert_close(alone["raw"][name], value, rtol=0, atol=loose, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("world_size", [2, 3])
def test_batch_normalisation_does_not_depend_on_the_number_of_processes(
    corpus: Path, tmp_path: Path, world_size: int
) -> None:
    """Running statistics too: some rounds are dummies, and the last step of an epoch is short."""
    more = ["model.rnn.norm=batch", "model.subsampling.norm=batch", "optimizer.lr=1e-9", "max_epochs=1"]
    more.append("plan.micro_batches_per_step=5")
    want = run_ranks(1, fit, overrides(corpus, tmp_path, *more, "name=one"))[0]
    got = run_ranks(world_size, fit, overrides(corpus, tmp_path, *more, f"name=n{world_size}"))[0]
    steps = [row["step"] for row in read_ledger(want["run"] / "ledger")]
    assert 0 < steps.count(max(steps)) < 5 == steps.count(1)
    assert any("running_mean" in name for name in want["weights"])
    for name, value in want["weights"].items():
        torch.testing.assert_close(got["weights"][name], value, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    assert got["values"]["loss"] == pytest.approx(want["values"]["loss"], rel=1e-5)


@pytest.mark.parametrize("world_size", [1, 3])
def test_validation_is_equal_on_any_number_of_processes(corpus: Path, tmp_path: Path, world_size: int) -> None:
    """Every utterance once; best, plateau and rate decided alike on every rank."""
    arguments = [
        "max_steps=4",
        "schedule={kind: plateau, patience: 1}",
        "optimizer.lr=1e-9",
        "validation.every_steps=1",
    ]
    want = run_ranks(2, fit, overrides(corpus, tmp_path, *arguments, "name=two"))
    got = run_ranks(world_size, fit, overrides(corpus, tmp_path, *arguments, f"name=n{world_size}"))
    assert all(r["values"] == got[0]["values"] and r["plateau"] == got[0]["plateau"] for r in got)
    assert all(r["values"] == want[0]["values"] for r in want)
    for name, value in want[0]["values"].items():
        assert got[0]["values"][name] == pytest.approx(value, abs=1e-6)
    assert got[0]["plateau"]["scale"] == want[0]["plateau"]["scale"]


def test_the_ledger_does_not_depend_on_processes_and_workers(corpus: Path, tmp_path: Path) -> None:
    """Two epochs at 1 and 2 processes and with 0, 1 and 3 loader workers."""
    ledgers = {}
    for world_size, workers in [(1, 0), (2, 0), (1, 3), (2, 1)]:
        arguments = [
            f"name=w{world_size}-{workers}",
            f"num_workers={workers}",
            "max_epochs=2",
            "validation.every_steps=99",
        ]
        run = run_ranks(world_size, fit, overrides(corpus, tmp_path, *arguments))[0]["run"]
        ledgers[world_size, workers] = read_ledger(run / "ledger")
    first = ledgers[1, 0]
    assert len(first) > 4
    for key, ledger in ledgers.items():
        assert ledger == first, key
    for epoch in (0, 1):
        keys = [k for row in first if row["epoch"] == epoch for k in row["keys"]]
        assert len(keys) == len(set(keys)) > 40
    assert len({c for row in first for c in row["checksums"]}) > 50  # speeds differ between the epochs


def poisoned(ranks: Any, arguments: list[str], poison: str = "gradient") -> dict[str, Any]:
    """Train with a loss that is NaN in step 3, on one rank only; its gradient may be finite all the same."""
    from recipes.speech import Speech

    original, calls = Speech.step, [0]

    def step(self: Any, model: Any, batch: Any, state: Any = None) -> Any:
        output = original(self, model, batch, state)
        if model.training:
            calls[0] += 1
            if calls[0] == 2 * 2 + 1 and ranks.rank == ranks.world_size - 1:
                if poison == "gradient":
                    output.losses["ctc"].sum.mul_(float("nan"))
                else:
                    output.losses["ctc"].sum.add_(float("inf"))
        return output

    Speech.step = step
    seen = []
    from trainer.engine import Training

    original_step = Training.step

    def watch(self: Any, *args: Any) -> None:
        original_step(self, *args)
        slots = {n: t.clone() for n, t in self.trained.full("average").items()}
        seen.append(
            ({n: t.clone() for n, t in self.trained.full("weight").items()}, slots, self.position.applied_steps)
        )

    Training.step = watch
    return fit(ranks, arguments) | {"seen": seen}


@pytest.mark.parametrize("poison", ["gradient", "loss alone"])
@pytest.mark.parametrize("zero", ["{stage: 0}", "{stage: 1}", "{stage: 2, offload: true}", "{stage: 3}"])
def test_a_step_that_is_not_finite_is_refused_on_every_rank(
    corpus: Path, tmp_path: Path, zero: str, poison: str
) -> None:
    """Weights, average and schedule stay; the run goes on; the samples are on record."""
    arguments = overrides(corpus, tmp_path, f"zero={zero}", "max_steps=4", "validation.every_steps=9")
    results = run_ranks(2, poisoned, arguments, poison)
    for result in results:
        before, after, last = result["seen"][1], result["seen"][2], result["seen"][3]
        for part in (0, 1):
            assert all(torch.equal(before[part][n], after[part][n]) for n in before[part])
            assert not torch.equal(after[part]["output.weight"], last[part]["output.weight"])
        assert [s[2] for s in result["seen"]] == [1, 2, 2, 3]
        assert result["position"]["refused_steps"] == 1
        assert all(bool(t.isfinite().all()) for t in result["weights"].values())
    (row,) = read_lines(results[0]["run"] / "refused.jsonl")
    assert row["step"] == 3
    assert len(row["keys"]) > 3
    assert list(read_lines(results[0]["run"] / "metrics.jsonl"))[2]["loss"] is None


def test_too_many_refused_steps_end_the_run(corpus: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="max_refused_steps = 0"):
        run_ranks(2, poisoned, overrides(corpus, tmp_path, "max_steps=4", "max_refused_steps=0"))


def interrupted(ranks: Any, arguments: list[str]) -> dict[str, Any]:
    """Train, and send rank 0 a SIGTERM in step 2; all ranks must agree."""
    from trainer.engine import Training

    original = Training.step

    def step(self: Any, *args: Any) -> None:
        if self.position.step == 1 and ranks.first:
            os.kill(os.getpid(), signal.SIGTERM)
        original(self, *args)

    Training.step = step
    return fit(ranks, arguments)


def test_a_signal_to_one_rank_saves_and_stops_all(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, "max_steps=4", "validation.every_steps=9")
    stopped = run_ranks(2, interrupted, [*arguments, "name=stopped"])
    assert [r["stopped"] for r in stopped] == [True, True]
    assert checkpoint.newest(stopped[0]["run"] / "checkpoints").state["position"]["step"] == 2
    resumed = run_ranks(2, fit, [*arguments, "name=stopped"])[0]
    whole = run_ranks(2, fit, [*arguments, "name=whole"])[0]
    assert all(torch.equal(resumed["weights"][n], w) for n, w in whole["weights"].items())
    assert numbers(resumed["run"]) == numbers(whole["run"])


def interrupted_around_a_validation(ranks: Any, arguments: list[str], rank: int, step: int, batch: int) -> Any:
    """Train, and send a rank a SIGTERM in a step, or in a batch that it validates (else 0); how many it validated."""
    from trainer import evaluation
    from trainer.engine import Training

    train, move, validated = Training.step, evaluation.to_device, []

    def in_step(self: Any, *args: Any) -> None:
        if self.position.step + 1 == step and ranks.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        train(self, *args)

    def in_validation(*args: Any) -> Any:
        validated.append(1)
        if len(validated) == batch and ranks.rank == rank:
            os.kill(os.getpid(), signal.SIGTERM)
        return move(*args)

    Training.step, evaluation.to_device = in_step, in_validation
    return fit(ranks, arguments) | {"validated": len(validated)}


def test_a_signal_does_not_wait_for_a_validation(corpus: Path, tmp_path: Path) -> None:
    """It comes just before one, in the same one when it is made up for, and in the last one: nothing is lost."""
    arguments = overrides(corpus, tmp_path, "max_steps=4", "validation.every_steps=2", "plan.micro_batch_seconds=2.5")
    arguments.append("plan.micro_batches_per_step=2")
    whole = run_ranks(2, interrupted_around_a_validation, [*arguments, "name=whole"], 0, 0, 0)
    once = whole[0]["validated"] // 2
    assert once == 2  # in two steps of the plan
    for rank, step, batch, done, saved in [(0, 2, 0, 0, 2), (1, 0, 1, 1, 2), (0, 0, once + 1, once + 1, 4)]:
        parts = run_ranks(2, interrupted_around_a_validation, [*arguments, "name=parts"], rank, step, batch)
        assert [r["stopped"] for r in parts] == [True, True]
        assert parts[rank]["validated"] == done
        found = checkpoint.newest(parts[0]["run"] / "checkpoints")
        assert (found.state["position"]["step"], found.state["position"]["validation_due"]) == (saved, 0)
    resumed = run_ranks(2, fit, [*arguments, "name=parts"])[0]
    assert resumed["values"] == whole[0]["values"]
    assert all(torch.equal(resumed["weights"][n], w) for n, w in whole[0]["weights"].items())
    assert numbers(resumed["run"]) == numbers(whole[0]["run"])
    states = [checkpoint.newest(run / "checkpoints").state for run in (resumed["run"], whole[0]["run"])]
    for name in ("best", "validated", "plateau", "gradient_norms"):
        assert states[0][name] == states[1][name], name
    assert states[0]["position"]["validation_due"] is None


def on_a_broken_disk(ranks: Any, arguments: list[str], failures: int, stop: bool) -> dict[str, Any]:
    """Train where the first attempts to write a checkpoint fail on the last rank."""
    checkpoint_writer.RETRY_SECONDS = (0.0, 0.0)
    original, left = checkpoint.write_tensors, [failures if ranks.rank == ranks.world_size - 1 else 0]

    def write(path: Path, slices: Any) -> Any:
        if left[0]:
            left[0] -= 1
            raise OSError(28, "No space left on device")
        return original(path, slices)

    checkpoint.write_tensors = write
    return (interrupted if stop else fit)(ranks, arguments)


@pytest.mark.parametrize("stop", [False, True], ids=["to the end", "stopped"])
def test_a_run_that_could_not_be_saved_does_not_end_well(corpus: Path, tmp_path: Path, stop: bool) -> None:
    """Three attempts each: at the new best of step 4 (or at none) and at the end (or when stopped)."""
    arguments = overrides(corpus, tmp_path, "name=run", "max_steps=4")
    run = tmp_path / "run"
    with pytest.raises(RuntimeError, match="SystemExit: 1"):
        run_ranks(2, on_a_broken_disk, arguments, 9, stop)
    assert checkpoint.newest(run / "checkpoints") is None
    result = run_ranks(2, on_a_broken_disk, arguments, 2, stop)[0]  # the third attempt does it
    assert result["stopped"] == stop
    assert checkpoint.newest(run / "checkpoints").state["position"]["step"] == (2 if stop else 4)


def blind(ranks: Any, arguments: list[str]) -> dict[str, Any]:
    """Train where the second rank cannot tell which checkpoints there are."""
    if not ranks.first:
        checkpoint.newest = lambda folder: None
    return fit(ranks, arguments)


def test_rank_0_chooses_the_checkpoint_for_all(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, "name=run", "validation.every_steps=9")
    run_ranks(2, fit, [*arguments, "max_steps=1"])
    results = run_ranks(2, blind, [*arguments, "max_steps=2"])
    assert [r["position"]["step"] for r in results] == [2, 2]


def test_starting_a_finished_run_again_does_nothing(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, "max_steps=2", "validation.every_steps=9")
    first = run_ranks(2, fit, arguments)[0]
    again = run_ranks(2, fit, arguments)[0]
    assert again["position"] == first["position"]
    assert again["values"] == first["values"] != {}  # what it says of itself is not lost either
    assert len(list(read_lines(first["run"] / "metrics.jsonl"))) == 3  # two steps and a validation


def test_a_run_stops_early_where_it_gets_no_better(corpus: Path, tmp_path: Path) -> None:
    """Alike on every rank, and for good: started again it does nothing."""
    more = ["optimizer.lr=1e-12", "validation.every_steps=1", "validation.early_stop_after=2", "max_steps=20"]
    for _ in range(2):
        results = run_ranks(2, fit_and_listen, overrides(corpus, tmp_path, *more))
        assert [r["position"]["step"] for r in results] == [3, 3]
        assert len([text for text in results[0]["said"] if "stopped early" in text]) == 1


def test_another_configuration_in_the_same_directory_is_refused(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, "name=run", "max_steps=1", "validation.every_steps=9")
    run_ranks(1, fit, arguments)
    with pytest.raises(RuntimeError, match="UserError") as error:
        run_ranks(2, fit, [*arguments, "seed=5", "model.rnn.num_layers=1"])
    for text in ("model.rnn.num_layers = 2, now 1", "seed = 0, now 5", "init_from="):
        assert text in str(error.value)
    run_ranks(1, fit, [*arguments, "max_steps=2"])  # nothing was lost


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Corpora that differ from `corpus` in one thing."""
    from trainer import recipe

    folder = tmp_path_factory.mktemp("others")
    changes = {"smaller": "data.corpus.num_utterances=40", "fewer letters": "data.corpus.alphabet=abcd"}
    for name, change in changes.items():
        recipe.load("speech/tones", overrides(folder / name, folder, change)).prepare()
    return {name: folder / name for name in changes}


@pytest.mark.parametrize(
    ("name", "wanted"),
    [("smaller", "train: samples: saved '50 of index "), ("fewer letters", "alphabet: saved ' abcdefgh', now ' abcd'")],
)
def test_a_run_does_not_go_on_with_other_data(
    corpus: Path, others: dict[str, Path], tmp_path: Path, name: str, wanted: str
) -> None:
    arguments = overrides(corpus, tmp_path, "name=run", "validation.every_steps=9")
    run_ranks(1, fit, [*arguments, "max_steps=1"])
    with pytest.raises(RuntimeError, match="UserError") as error:
        run_ranks(2, fit, [*arguments, f"data.path={others[name]}"])
    assert wanted in str(error.value)
    assert "init_from=" in str(error.value)
    moved = tmp_path / "moved"
    shutil.copytree(corpus, moved)
    assert run_ranks(1, fit, [*arguments, f"data.path={moved}", "max_steps=2"])[0]["position"]["step"] == 2


def fit_on_their_own(ranks: Any, paths: list[str], arguments: list[str]) -> dict[str, Any]:
    return fit(ranks, [*arguments, f"data.path={paths[ranks.rank]}"])


def test_ranks_that_see_other_data_are_told(corpus: Path, others: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"UserError: rank 1 finds other data than rank 0"):
        run_ranks(2, fit_on_their_own, [str(corpus), str(others["smaller"])], overrides(corpus, tmp_path))


@pytest.mark.parametrize(
    ("count", "share", "wanted"),
    [
        (2, "0.01", r"2 bad samples of 3, more than max_bad_share = 0.01 allows \(1\)"),
        (3, "1", "no sample of the split valid can be scored"),
    ],
)
def test_bad_validation_data_ends_the_run(corpus: Path, tmp_path: Path, count: int, share: str, wanted: str) -> None:
    data = shutil.copytree(corpus, tmp_path / "data")
    keys = spoil(data / "valid", count)
    with pytest.raises(RuntimeError, match=f"UserError: .*{wanted}"):
        run_ranks(2, fit, overrides(data, tmp_path, "name=run", "max_steps=2", f"max_bad_share={share}"))
    rows = list(read_lines(tmp_path / "run" / "quarantine.jsonl"))
    assert sorted(row["key"] for row in rows) == sorted(keys)
    assert {(row["split"], row["step"]) for row in rows} == {("valid", 2)}


def test_bad_validation_data_is_on_record_once(corpus: Path, tmp_path: Path) -> None:
    """One bad clip is allowed; what the plan leaves out is told too."""
    data = shutil.copytree(corpus, tmp_path / "data")
    keys = spoil(data / "valid", 1)
    more = ["name=run", "max_steps=3", "validation.every_steps=1", "plan.max_seconds=2.5"]
    run = run_ranks(2, fit, overrides(data, tmp_path, *more))[0]["run"]
    rows = list(read_lines(run / "quarantine.jsonl"))
    assert [(row["key"], row["step"]) for row in rows if row["split"] == "valid"] == [(keys[0], 1)]
    long = [row for row in rows if row["reason"] == "longer than 2.5 s"]
    assert long
    assert {(row["step"], row["found"]) for row in long} == {(0, "by the plan")}


def no_media(ranks: Any, arguments: list[str]) -> dict[str, Any]:
    from trainer.data.speech import SpeechDataset
    from trainer.tracking import Tracker

    def fail(self: Any, key: str) -> Any:
        raise OSError(5, "Input/output error")

    tables = []
    SpeechDataset.media = fail
    Tracker.table = lambda *a: tables.append(list(a[-1]))
    return fit(ranks, arguments) | {"tables": tables}


def test_a_picture_that_cannot_be_had_ends_nothing(corpus: Path, tmp_path: Path) -> None:
    results = run_ranks(2, no_media, overrides(corpus, tmp_path, "max_steps=1", "validation.table_rows=2"))
    assert [r["tables"] for r in results] == [[[]], []]
    assert results[0]["position"]["step"] == 1


def test_an_epoch_without_samples_ends_the_run(corpus: Path, tmp_path: Path) -> None:
    data = shutil.copytree(corpus, tmp_path / "data")
    spoil(data / "train", 50)
    with pytest.raises(RuntimeError, match=r"UserError: run: epoch 2 holds no sample: 50 of 50 are left out as bad"):
        run_ranks(2, fit, overrides(data, tmp_path, "name=run", "max_bad_share=1", "validation.every_steps=99"))


def count_loaders(ranks: Any, arguments: list[str]) -> dict[str, Any]:
    from trainer import engine

    made = []
    original = engine.Loader
    engine.Loader = lambda *a: made.append(a) or original(*a)
    return fit(ranks, arguments) | {"loaders": len(made)}


def test_the_loader_goes_on_over_the_end_of_an_epoch(corpus: Path, tmp_path: Path) -> None:
    result = run_ranks(1, count_loaders, overrides(corpus, tmp_path, "max_epochs=3", "num_workers=1"))[0]
    assert (result["loaders"], result["position"]["epoch"]) == (1, 3)


def test_bad_samples_are_skipped_recorded_and_left_out(corpus: Path, tmp_path: Path) -> None:
    """A damaged recording counts nothing in the epoch that finds it and is absent from the next."""
    damaged = tmp_path / "damaged"
    shutil.copytree(corpus, damaged)
    shard = sorted((damaged / "train").glob("*.tar"))[0]
    entry = json.loads(shard.with_suffix(".index.jsonl").read_text().splitlines()[2])
    content = bytearray(shard.read_bytes())
    content[entry["audio_offset"] + 500] ^= 0xFF
    shard.write_bytes(content)
    arguments = overrides(damaged, tmp_path, "max_epochs=2", "validation.every_steps=99", "max_bad_share=0.05")
    arguments.append("num_workers=1")  # they are ahead of the training, in the next epoch
    result = run_ranks(2, count_loaders, [*arguments, "name=damaged", "max_epochs=3"])[0]
    assert result["loaders"] == 2
    (row,) = read_lines(result["run"] / "quarantine.jsonl")
    assert row["key"] == entry["key"]
    assert "its bytes are not those that were indexed" in row["detail"]
    assert row["found"] == "by reading"
    ledger = read_ledger(result["run"] / "ledger")
    seen = {epoch: [k for r in ledger if r["epoch"] == epoch for k in r["keys"]] for epoch in (0, 1, 2)}
    assert entry["key"] in seen[0]
    assert set(seen[2]) == set(seen[1])
    assert [k for r in ledger for k in r["bad"]] == [entry["key"]]
    assert set(seen[0]) - set(seen[1]) == {entry["key"]}
    assert result["position"]["bad"] == [entry["key"]]
    second = json.loads(shard.with_suffix(".index.jsonl").read_text().splitlines()[3])
    content[second["audio_offset"] + 500] ^= 0xFF
    shard.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"more than max_bad_share = 0 "):
        run_ranks(2, fit, [*arguments, "name=worse", "max_bad_share=0"])


def test_each_damage_is_masked_and_put_on_record(corpus: Path, tmp_path: Path) -> None:
    """Damaged in all ways and with two shards cut, a run ends normally, sees every good sample once, and has the losses
    of a run on whole data with those places masked; `python -m tests.damage train` is the long form."""
    found = compare_training(corpus, tmp_path, 3, (1, 4), [])
    assert found["damaged"] > 15
    assert found["difference"] < 1e-5  # the padding of a batch may differ, and with it the order of float sums


def keys_in(run: Path) -> set[str]:
    return {key for row in read_ledger(run / "ledger") for key in row["keys"]}


def test_the_quarantine_of_another_run_is_honoured(corpus: Path, tmp_path: Path) -> None:
    """From the start, in every split, and not as part of the budget; what a plan left out is left to the next plan."""
    data = shutil.copytree(corpus, tmp_path / "data")
    bad = [*spoil(data / "train", 2), *spoil(data / "valid", 1)]
    more = ["max_epochs=1", "validation.every_steps=99"]
    first = run_ranks(2, fit, overrides(data, tmp_path, *more, "name=first", "plan.max_seconds=2.5", "max_bad_share=1"))
    quarantine = first[0]["run"] / "quarantine.jsonl"
    rows = list(read_lines(quarantine))
    assert {row["key"] for row in rows if row["found"] == "by reading"} == set(bad)
    assert {row["found"] for row in rows} == {"by reading", "by the plan"}

    second = overrides(data, tmp_path, *more, "name=second", f"quarantine={quarantine}", "max_bad_share=0")
    result = run_ranks(2, fit_and_listen, [*second, "max_steps=2"])[0]
    known = [row for row in read_lines(result["run"] / "quarantine.jsonl") if row["found"] == "before this run"]
    assert {(row["key"], row["split"]) for row in known} == {(k, s) for k, s in zip(bad, SPLITS_OF_BAD, strict=True)}
    assert {row["reason"] for row in known} == {row["reason"] for row in rows if row["found"] == "by reading"}
    assert any(text.startswith("train: left out as ") for text in result["said"])
    assert result["position"]["excluded"] == result["position"]["known"] == sorted(bad[:2])
    resumed = run_ranks(1, fit, [*second[:-2], "quarantine=null"])[0]  # the checkpoint knows
    assert not resumed["position"]["bad"]
    assert resumed["position"]["known"] == sorted(bad[:2])
    seen = keys_in(result["run"])
    assert len(seen) == 48
    assert not seen & set(bad)


SPLITS_OF_BAD = ("train", "train", "valid")


def test_a_quarantine_named_on_resume_counts_from_the_next_epoch(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, "name=run", "max_epochs=2", "validation.every_steps=99")
    whole = run_ranks(1, fit, [*arguments, "name=whole"])[0]
    run_ranks(1, fit, [*arguments, "max_steps=2"])
    key = read_ledger(whole["run"] / "ledger")[-1]["keys"][0]
    (tmp_path / "list.jsonl").write_text(json.dumps({"key": key}) + "\n")
    result = run_ranks(1, fit, [*arguments, f"quarantine={tmp_path / 'list.jsonl'}"])[0]
    epochs = [[k for r in read_ledger(result["run"] / "ledger") if r["epoch"] == e for k in r["keys"]] for e in (0, 1)]
    assert [key in keys for keys in epochs] == [True, False]
    assert len(epochs[0]) == len(epochs[1]) + 1


@pytest.mark.parametrize("content", ["no json\n", "[1]\n", '{"reason": "x"}\n', None])
def test_a_quarantine_that_is_none_is_a_mistake(corpus: Path, tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "list.jsonl").write_text(content)
    with pytest.raises(RuntimeError, match=r"UserError: .*list\.jsonl"):
        run_ranks(1, fit, overrides(corpus, tmp_path, f"quarantine={tmp_path / 'list.jsonl'}"))


def test_odd_samples_are_told_and_used(corpus: Path, tmp_path: Path) -> None:
    data = shutil.copytree(corpus, tmp_path / "data")
    shard = sorted((data / "train").glob("*.tar"))[0]
    key = max(contents(shard).items(), key=lambda item: item[1][0].num_samples)[0]
    repack(shard, {key: {"text": b"a", "label_length": 1, "ctc_frames": 1}})
    more = ["max_epochs=1", "validation.every_steps=99"]
    result = run_ranks(1, fit_and_listen, overrides(data, tmp_path, *more))[0]
    (row,) = read_lines(result["run"] / "suspicious.jsonl")
    assert (row["key"], row["split"], row["reason"]) == (key, "train", "implausible speaking rate")
    assert any("1 implausible speaking rate" in text for text in result["said"])
    assert key in keys_in(result["run"])


def test_steps_past_the_end_of_a_schedule_are_announced(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, "name=run", "schedule={kind: cosine, final: 0.1}")
    run_ranks(1, fit, [*arguments, "max_steps=2"])
    wanted = "the schedule that the run began with ended at step 2: what follows has its last learning rate, 0.1 of"
    said = [run_ranks(1, fit_and_listen, [*arguments, f"max_steps={steps}"])[0]["said"] for steps in (2, 3)]
    assert [any(wanted in text for text in texts) for texts in said] == [False, True]


def test_collectives_raise_alike() -> None:
    assert run_ranks(2, on_first_fails) == ["UserError: no", "UserError: no"]


def on_first_fails(ranks: Any) -> str:
    def action() -> None:
        raise UserError("no")

    try:
        distributed.on_first(action)
    except UserError as error:
        return f"UserError: {error}"
    return "nothing"


def fit_without_pauses(ranks: Any, arguments: list[str]) -> dict[str, Any]:
    """`fit`, where a shard that does not come is given up at once."""
    from trainer.data import transfer

    transfer.BACK_OFF_SECONDS = 0.0
    return fit(ranks, arguments)


def test_what_did_not_come_is_asked_for_again_in_the_next_epoch(corpus: Path, tmp_path: Path) -> None:
    """One shard of seven is away for an epoch: no sample of it is bad for ever, nor part of that budget."""
    there = shutil.copytree(corpus, tmp_path / "there")
    away = (there / "train" / "shard-000001.tar").rename(tmp_path / "away.tar")
    lost = set(contents(corpus / "train" / "shard-000001.tar"))
    more = ["name=run", f"data.remote.url=pipe:cat {there}/{{}}", "max_missing_share=0.2", "max_epochs=1"]
    first = run_ranks(2, fit_without_pauses, overrides(tmp_path / "copy", tmp_path, *more))[0]
    assert (first["position"]["bad"], first["position"]["missing"]) == ([], 0)
    rows = list(read_lines(first["run"] / "quarantine.jsonl"))
    assert {(row["key"], row["reason"]) for row in rows} == {(key, "missing") for key in lost}
    assert read_quarantine(first["run"] / "quarantine.jsonl", "train") == []

    away.rename(there / "train" / "shard-000001.tar")
    second = run_ranks(2, fit_without_pauses, overrides(tmp_path / "copy", tmp_path, *more, "max_epochs=2"))[0]
    for row in read_ledger(second["run"] / "ledger"):
        assert set(row["bad"]) == (lost & set(row["keys"]) if row["epoch"] == 0 else set())
    assert lost < {key for row in read_ledger(second["run"] / "ledger") if row["epoch"] == 1 for key in row["keys"]}


def test_a_run_from_which_too_much_stays_away_ends(corpus: Path, tmp_path: Path) -> None:
    there = shutil.copytree(corpus, tmp_path / "there")
    (there / "train" / "shard-000001.tar").unlink()
    more = ["name=run", f"data.remote.url=pipe:cat {there}/{{}}"]
    wanted = r"did not come of 50, more than max_missing_share = 0.1 allows \(5\); mend the way to data.remote.url"
    with pytest.raises(RuntimeError, match=wanted):
        run_ranks(2, fit_without_pauses, overrides(tmp_path / "copy", tmp_path, *more))
