"""Finding the largest budget: it grows to the limit, and a process that has to be ended costs nothing."""

import json
import multiprocessing
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.data.test_plan import make_lengths
from tests.helpers import overrides, run_ranks
from trainer import memory
from trainer.__main__ import main
from trainer.bench import batch_size
from trainer.bench.batch_size import Trial, of_the_longest
from trainer.data.buckets import BucketedConfig, BucketedPlan
from trainer.errors import EXIT_USER_MISTAKE, UserError


class Device:
    """A child whose budgets take so many bytes a second, up to what it really has."""

    def __init__(self, base: float, slope: float, square: float = 0.0, whole: float = 1e9) -> None:
        self.base, self.slope, self.square, self.whole = base, slope, square, whole
        self.tried: list[float] = []

    def ask(self) -> dict[str, object]:
        return {"device": "cpu", "free_bytes": 1000, "least_seconds": 10.0}

    def attempt(self, budget: float, limit: int) -> Trial:
        self.tried.append(budget)
        seconds = min(budget, self.whole)
        peak = self.base + self.slope * seconds + self.square * seconds**2
        return Trial(budget, peak <= limit, int(min(peak, limit)), whole_epoch=budget >= self.whole)

    def close(self) -> None:
        pass


@pytest.mark.parametrize("square", [0.0, 0.002], ids=["grows evenly", "grows with the square"])
def test_the_search_ends_near_the_limit(monkeypatch: pytest.MonkeyPatch, square: float) -> None:
    device = Device(100, 2.0, square)
    monkeypatch.setattr(batch_size, "_Child", lambda *_: device)
    found = batch_size.largest("any", [], None, 0.8, lambda trial: None)
    best = found["micro_batch_seconds"]
    assert device.base + 2 * best + square * best**2 <= 800 == found["limit_bytes"]
    assert device.base + 2 * best * 1.15 + square * (1.15 * best) ** 2 > 800
    assert len(device.tried) < 15
    if not square:
        assert all(100 + 2 * budget <= 800 for budget in device.tried)  # foreseen, so nothing had to be ended


def test_the_search_ends_with_the_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "_Child", lambda *_: Device(100, 0.1, whole=70))
    found = batch_size.largest("any", [], 1000, 0.8, lambda trial: None)
    assert found["trials"][-1]["whole_epoch"]
    assert found["micro_batch_seconds"] == 80


def test_the_longest_clip_fits_the_first_budget() -> None:
    """Where the budget has a quadratic term, that is more than its seconds."""
    config = BucketedConfig(micro_batch_seconds=600, quadratic_seconds=5.0)
    lengths = make_lengths()
    longest, least = of_the_longest(config, BucketedPlan(config, lengths, seed=1).epoch(0))
    first = config.model_copy(update={"micro_batch_seconds": least, "max_seconds": longest})
    assert BucketedPlan(first, lengths, seed=1).epoch(0).totals()["samples"] == len(lengths)


def slow(pipe: Connection, *_: object) -> None:
    """A child that starts, and never ends its steps."""
    pipe.send({"device": "cpu", "free_bytes": 1000, "least_seconds": 10.0})
    pipe.recv()
    threading.Event().wait()


def test_what_is_slow_is_not_called_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batch_size, "_run", slow)
    monkeypatch.setattr(batch_size, "START_METHOD", "fork")
    child = batch_size._Child("any", [])
    monkeypatch.setattr(batch_size, "START_SECONDS", 0.05)
    assert child.attempt(10.0, 2**40) == Trial(10.0, fits=False, timed_out=True)
    assert not child.process.is_alive()
    monkeypatch.setattr(child, "attempt", lambda budget, limit: Trial(budget, fits=False, timed_out=True))
    monkeypatch.setattr(batch_size, "_Child", lambda *_: child)
    with pytest.raises(UserError, match=r"any: a batch of the longest clip takes longer than 0\.05 s"):
        batch_size.largest("any", [], 1000, 0.8, lambda trial: None)


def test_a_plan_that_counts_no_seconds_is_refused() -> None:
    ours, theirs = multiprocessing.Pipe()
    batch_size._run(theirs, "copying/t1000", [])
    error = ours.recv()
    assert isinstance(error, UserError)
    assert "copying/t1000: plan.kind = generated: its batches are no seconds of sound" in str(error)


@pytest.mark.slow
def test_real_steps_are_watched(corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit that the very first batch passes: the child is ended and the user told what to do."""
    out = tmp_path / "found.json"
    arguments = ["bench", "batch-size", "speech/tones", *overrides(corpus, tmp_path)]
    assert main([*arguments, "--gib=4", f"--json={out}"]) == 0
    result = json.loads(out.read_text())
    assert result["trials"][-1]["whole_epoch"]
    assert all(t["fits"] and t["step_seconds"] > 0 and t["peak_bytes"] > 2**27 for t in result["trials"])
    assert "plan.micro_batch_seconds=" in capsys.readouterr().out
    assert main([*arguments, "--gib=0.2"]) == EXIT_USER_MISTAKE
    assert "a batch of the longest clip" in capsys.readouterr().err


def taken(ranks: Any) -> tuple[float, int, int]:
    big, peak, new = memory.taken(torch.device("cpu"), lambda: torch.ones(2**24).sum())
    return float(big), peak, new


def test_memory_that_is_taken_is_counted() -> None:
    """In a process of its own: another test may have left free pages here, which are taken again without being new."""
    big, peak, new = run_ranks(1, taken)[0]
    assert big == 2**24
    assert 2**25 < new < 2**27
    assert peak > new
