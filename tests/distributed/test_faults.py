"""Disks and numbers that go wrong: the run goes on, or goes back, loudly, and never from something wrong."""

import logging
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers import fit, fit_and_listen, overrides, run_ranks, small_disk
from trainer import checkpoint, checkpoint_writer
from trainer.run import read_ledger, read_lines

pytestmark = pytest.mark.distributed
EVERY = ["checkpoint.every_steps=1", "validation.every_steps=99", "max_epochs=9", "schedule={kind: constant}"]


def between_steps(ranks: Any, arguments: list[str], actions: dict[int, Any]) -> dict[str, Any]:
    """Train, and let rank 0 do something to the disk after some steps."""
    from trainer.engine import Training

    checkpoint_writer.RETRY_SECONDS, checkpoint_writer.PAUSE_SECONDS = (), 0.0
    original, paused = Training.step, []
    told: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("trainer").addHandler(handler)

    def step(self: Any, *more: Any) -> None:
        self.writer.wait()  # so that an action comes between two known checkpoints
        if self.position.step:
            paused.append(self.writer.paused)
        if ranks.first and (action := actions.get(self.position.step)):
            action(self.run.path)
        torch.distributed.barrier()
        original(self, *more)

    Training.step = step
    return fit(ranks, arguments) | {"paused": paused, "told": told}


def blow_up(run: Path) -> None:
    """Fill the disk of a run to the last byte."""
    with (run.parent / "balloon").open("wb", buffering=0) as file:
        while (free := shutil.disk_usage(run).free) > 0:
            file.write(bytes(free))


def let_go(run: Path) -> None:
    (run.parent / "balloon").unlink()


def make_read_only(run: Path) -> None:
    folder = str(run / "checkpoints")
    subprocess.run(["mount", "--bind", folder, folder], check=True)
    subprocess.run(["mount", "-o", "remount,bind,ro", folder], check=True)


def make_writable(run: Path) -> None:
    subprocess.run(["umount", str(run / "checkpoints")], check=True)


@pytest.mark.parametrize(
    ("break_it", "mend_it"), [(blow_up, let_go), (make_read_only, make_writable)], ids=["full disk", "read-only"]
)
def test_a_disk_that_refuses_pauses_checkpoints_and_not_the_run(
    corpus: Path, tmp_path: Path, break_it: Any, mend_it: Any
) -> None:
    """Broken after step 2, mended after step 5: the run ends at step 8 with all its checkpoints, ledger and metrics."""
    whole = run_ranks(2, fit, overrides(corpus, tmp_path, *EVERY, "name=whole", "max_steps=8"))[0]
    with small_disk(tmp_path / "disk", megabytes=24) as disk:
        arguments = overrides(corpus, disk, *EVERY, "name=run", "max_steps=8")
        results = run_ranks(2, between_steps, arguments, {2: break_it, 5: mend_it})
        run = results[0]["run"]
        assert [r["paused"] for r in results] == [[False, False, True, True, True, False, False]] * 2
        assert checkpoint.newest(run / "checkpoints").state["position"]["step"] == 8
        assert read_ledger(run / "ledger") == read_ledger(whole["run"] / "ledger")
        steps = [row["step"] for row in read_lines(run / "metrics.jsonl") if row["kind"] == "train"]
        assert steps == list(range(1, 9))
        for name, value in whole["weights"].items():
            assert torch.equal(results[0]["weights"][name], value), name
        told = [text for text in results[0]["told"] if "was not written" in text]
        assert told[0].startswith("checkpoint of step 3 was not written: rank 0: [Errno ")


@pytest.mark.parametrize("break_it", [blow_up, make_read_only], ids=["full disk", "read-only"])
def test_a_run_on_a_disk_that_stays_broken_resumes_from_the_last_good_step(
    corpus: Path, tmp_path: Path, break_it: Any
) -> None:
    """It does not end as if all were well; what was on the disk is whole, and goes on to the same end."""
    whole = run_ranks(2, fit, overrides(corpus, tmp_path, *EVERY, "name=whole", "max_steps=5"))[0]
    with small_disk(tmp_path / "disk", megabytes=24) as disk:
        arguments = overrides(corpus, disk, *EVERY, "name=run", "max_steps=5")
        with pytest.raises(RuntimeError, match="SystemExit: 1"):
            run_ranks(2, between_steps, arguments, {2: break_it})
        run = disk / "run"
        assert checkpoint.newest(run / "checkpoints").state["position"]["step"] == 2
        (let_go if break_it is blow_up else make_writable)(run)
        result = run_ranks(2, fit, arguments)[0]
        assert result["position"]["step"] == 5
        assert read_ledger(run / "ledger") == read_ledger(whole["run"] / "ledger")
        assert all(torch.equal(result["weights"][n], value) for n, value in whole["weights"].items())


def test_a_run_directory_that_cannot_be_written_is_a_mistake(corpus: Path, tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", megabytes=1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        with pytest.raises(RuntimeError, match=r"UserError: .*cannot be written: Read-only file system; set runs_dir="):
            run_ranks(2, fit, overrides(corpus, disk, "name=run"))


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "cut short": lambda folder: os.truncate(folder / "rank-00001.pt", 1000),
    "a bit of the tensors": lambda folder: flip(folder / "rank-00000.pt"),
    "a bit of the state": lambda folder: flip(folder / "state.json"),
    "a file missing": lambda folder: (folder / "rank-00001.pt").unlink(),
    "gone": shutil.rmtree,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_costs_a_step_and_nothing_else(corpus: Path, tmp_path: Path, damage: str) -> None:
    """Whatever was done to the newest: the run goes on from the one before, says so, and ends where it would have."""
    arguments = overrides(corpus, tmp_path, *EVERY, "zero.stage=3", "name=run")
    run = run_ranks(2, fit, [*arguments, "max_steps=3"])[0]["run"]
    DAMAGE[damage](run / "checkpoints" / "step-00000003")
    result = run_ranks(2, fit_and_listen, [*arguments, "max_steps=4"])[0]
    whole = run_ranks(2, fit, [*arguments, "max_steps=4", "name=whole"])[0]
    assert all(torch.equal(result["weights"][n], value) for n, value in whole["weights"].items())
    assert read_ledger(run / "ledger") == read_ledger(whole["run"] / "ledger")
    log = (run / "logs" / "rank-00000.log").read_text()
    assert "WARNING" in log
    assert "step-00000003" in log
    assert "resumed at step 2 (epoch 1) of 3" in result["said"]


def spiking(ranks: Any, arguments: list[str], spikes: tuple[int, ...]) -> dict[str, Any]:
    """Train with losses that are far too high in some steps; what was there after each step."""
    from recipes.speech import Speech
    from trainer.engine import Training

    original, original_step, seen = Speech.step, Training.step, []
    factor = [1.0]

    def step(self: Any, model: Any, batch: Any, state: Any = None) -> Any:
        output = original(self, model, batch, state)
        if model.training:
            loss = output.losses["ctc"]
            output.losses["ctc"] = replace(loss, sum=loss.sum * factor[0])
        return output

    def watch(self: Any, *more: Any) -> None:
        factor[0] = 50.0 if self.position.step + 1 in spikes else 1.0
        original_step(self, *more)
        slots = {(s.name, s.slot): s.values.clone() for s in self.trained.slices(everything=True)}
        seen.append((slots, self.position.applied_steps))

    Speech.step, Training.step = step, watch
    return fit_and_listen(ranks, arguments) | {"seen": seen}


SPIKES = ["spikes.factor=4", "spikes.window_steps=3", "checkpoint.every_steps=2", "validation.every_steps=99"]


@pytest.mark.parametrize(("stage", "back", "to"), [(0, 1, 4), (1, 2, 2), (3, 1, 4)])
def test_a_spike_is_taken_back(corpus: Path, tmp_path: Path, stage: int, back: int, to: int) -> None:
    """To the k-th newest checkpoint: weights, moments, averages and the schedule; the plan goes on after the spike."""
    more = [f"zero.stage={stage}", f"spikes.checkpoints_back={back}", "model.rnn.hidden_size=64"]
    arguments = overrides(corpus, tmp_path, *SPIKES, *more, "max_steps=8", "max_epochs=9")
    results = run_ranks(2, spiking, [*arguments, "name=run"], (6,))
    for result in results:
        before, after, later = (result["seen"][i] for i in (to - 1, 5, 6))
        assert before[0].keys() == after[0].keys()
        assert {slot for _, slot in before[0]} >= {"weight", "exp_avg", "exp_avg_sq", "average"}
        assert all(torch.equal(after[0][key], value) for key, value in before[0].items())
        assert any(not torch.equal(later[0][key], value) for key, value in after[0].items())
        assert (before[1], after[1], later[1]) == (to, to, to + 1)
        assert result["position"]["taken_back"] == [[to + 1, 6]]
        assert result["position"]["step"] == 8
    run = results[0]["run"]
    (row,) = read_lines(run / "spikes.jsonl")
    assert (row["step"], row["taken_back_from"]) == (6, to + 1)
    assert row["loss"] > 4 * row["usual"]
    assert any(f"took back the steps from {to + 1} on" in text for text in results[0]["said"])
    untouched = run_ranks(2, spiking, [*arguments, "name=without", "spikes.factor=null"], (6,))[0]
    assert untouched["position"]["taken_back"] == []
    assert read_ledger(run / "ledger") == read_ledger(untouched["run"] / "ledger")  # the plan did not notice


def test_a_resumed_run_knows_what_was_usual(corpus: Path, tmp_path: Path) -> None:
    """A spike in the first step after a resume, and one that was taken back before it: bit for bit as in one go."""
    arguments = overrides(corpus, tmp_path, *SPIKES, "max_epochs=9", "schedule={kind: constant}")
    whole = run_ranks(2, spiking, [*arguments, "max_steps=9", "name=whole"], (5, 7))[0]
    assert whole["position"]["taken_back"] == [[5, 5], [7, 7]]
    run_ranks(2, spiking, [*arguments, "max_steps=6", "name=parts"], (5, 7))
    parts = run_ranks(2, spiking, [*arguments, "max_steps=9", "name=parts"], (5, 7))[0]
    assert parts["position"]["taken_back"] == whole["position"]["taken_back"]
    assert all(torch.equal(parts["weights"][n], value) for n, value in whole["weights"].items())


@pytest.mark.parametrize(
    ("more", "wanted"),
    [
        ("spikes.max_rollbacks=1", r"2 spikes, more than spikes\.max_rollbacks = 1"),
        ("spikes.checkpoints_back=3", r"spikes\.checkpoints_back = 3 with checkpoint\.keep_last = 2"),
    ],
)
def test_spikes_have_a_budget(corpus: Path, tmp_path: Path, more: str, wanted: str) -> None:
    arguments = overrides(corpus, tmp_path, *SPIKES, "max_steps=9", "max_epochs=9", more)
    with pytest.raises(RuntimeError, match=f"UserError: .*{wanted}"):
        run_ranks(2, spiking, arguments, (5, 7))


def test_a_spike_before_the_first_checkpoint_is_only_told(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, *SPIKES, "checkpoint.every_steps=99", "max_steps=6", "name=run")
    result = run_ranks(2, spiking, arguments, (5,))[0]
    assert result["position"]["taken_back"] == []
    assert "there is no checkpoint to go back to" in (result["run"] / "logs" / "rank-00000.log").read_text()
