"""Finding the largest budget: it grows to the limit, and a process that has to be ended costs nothing."""

import json
from pathlib import Path

import pytest
import torch

from tests.helpers import overrides
from trainer import batch_size, memory
from trainer.__main__ import main
from trainer.batch_size import Trial
from trainer.errors import EXIT_USER_MISTAKE


class Device:
    """A child whose budgets take so many bytes a second, up to what it really has."""

    def __init__(self, base: float, slope: float, square: float = 0.0, whole: float = 1e9) -> None:
        self.base, self.slope, self.square, self.whole = base, slope, square, whole
        self.tried: list[float] = []

    def ask(self) -> dict[str, object]:
        return {"device": "cpu", "free_bytes": 1000, "longest_seconds": 10.0}

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


def test_memory_that_is_taken_is_counted() -> None:
    big, peak, new = memory.taken(torch.device("cpu"), lambda: torch.ones(2**24).sum())
    assert float(big) == 2**24
    assert 2**25 < new < 2**27
    assert peak > new
