"""`verify-resume`: real runs are killed and moved, and a difference is found where there is one."""

import json
from pathlib import Path

import pytest

from tests.helpers import overrides
from trainer.__main__ import main
from trainer.errors import UserError
from trainer.run import RunDirectory
from trainer.verify_resume import Comparison, compare, schedule, verify

NUMBERS = ("weights", "optimizer", "metrics")


@pytest.mark.distributed
@pytest.mark.slow
def test_killed_runs_go_on_exactly_and_a_difference_is_found(corpus: Path, tmp_path: Path) -> None:
    arguments = overrides(corpus, tmp_path, "plan.micro_batch_seconds=4")
    told: list[str] = []
    kept, moved = verify("speech/tones", arguments, tmp_path / "runs", 8, 1, [1, 2], 0, told.append)
    assert (kept.name, kept.moved, moved.name, moved.moved) == ("killed", False, "killed and moved", True)
    assert len(kept.resumed) == len(moved.resumed) == 1
    assert len(told) == 5
    assert kept.wrong(0.0) == []
    assert moved.wrong(1e-3) == []
    assert {s.processes for s in moved.starts} == {1, 2}

    whole, other = RunDirectory(tmp_path / "runs" / "whole"), RunDirectory(tmp_path / "runs" / "killed")
    ledger = next(other.ledger.glob("*.jsonl"))
    lines = ledger.read_text().splitlines(keepends=True)
    row = json.loads(lines[0])
    ledger.write_text("".join([json.dumps({**row, "checksums": [c + 1 for c in row["checksums"]]}) + "\n", *lines[1:]]))
    metrics = other.metrics.read_text().splitlines(keepends=True)
    row = json.loads(metrics[-1])
    other.metrics.write_text("".join([*metrics[:-1], json.dumps({**row, "loss": row["loss"] * 1.5}) + "\n"]))
    same, apart = compare(other, whole)
    assert not same
    assert apart["metrics"] == pytest.approx(0.5)
    assert apart["weights"] == apart["optimizer"] == 0


def test_what_is_judged() -> None:
    equal = dict.fromkeys(NUMBERS, 0.0)
    near = {**equal, "weights": 1e-5}
    assert Comparison("", [], moved=False, ledger=True, differences=equal).wrong(1e-3) == []
    assert Comparison("", [], moved=False, ledger=True, differences=near).wrong(1e-3) == ["weights"]
    assert Comparison("", [], moved=True, ledger=True, differences=near).wrong(1e-3) == []
    assert Comparison("", [], moved=True, ledger=False, differences=near).wrong(1e-6) == ["ledger", "weights"]
    assert Comparison("", [], moved=True, ledger=True, differences={"weights": float("nan")}).wrong(1) == ["weights"]


def test_moments_are_random_in_order_and_go_through_all_numbers_of_processes() -> None:
    starts = schedule(0, 20, 4, [1, 2, 3])
    moments = [s.kill_after for s in starts[:-1]]
    assert moments == sorted(set(moments))
    assert all(0 < m < 19 for m in moments)
    assert [s.processes for s in starts] == [1, 2, 3, 1, 2]
    assert starts[-1].kill_after is None
    assert schedule(1, 20, 4, [1, 2, 3]) != starts
    with pytest.raises(UserError, match="--kills 4"):
        schedule(0, 5, 4, [1])


@pytest.mark.parametrize(
    ("option", "text", "wanted"),
    [
        *(("processes", text, "numbers from 1 to 16") for text in ("0", "1,", "two", "1,17", "-1")),
        ("kills", "-1", "0 or more"),
        ("tolerance", "nan", "a number from 0 on"),
        ("tolerance", "-0.1", "a number from 0 on"),
    ],
)
def test_wrong_numbers_are_explained(option: str, text: str, wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-resume", "speech/tones", f"--{option}={text}"]) == 2
    assert f"--{option} {text}: wanted {wanted}" in capsys.readouterr().err


@pytest.mark.distributed
@pytest.mark.slow
def test_a_run_that_fails_by_itself_is_told(corpus: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    arguments = overrides(corpus, tmp_path, "data.path=/nowhere")
    assert main(["verify-resume", "speech/tones", "--steps=4", "--kills=1", *arguments]) == 2
    assert "ended with exit code 2" in capfd.readouterr().err
