"""`verify-resume`: real runs are killed and moved, and a difference is found where there is one."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.helpers import overrides
from trainer.__main__ import main
from trainer.errors import EXIT_CHECK_FOUND_SOMETHING, EXIT_DONE, UserError
from trainer.run import RunDirectory
from trainer.verbs import verify_resume as verb
from trainer.verify_resume import Comparison, compare, schedule, verify

NUMBERS = ("weights", "optimizer", "metrics")


@pytest.mark.distributed
@pytest.mark.slow
def test_killed_runs_go_on_exactly_and_a_difference_is_found(
    corpus: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = overrides(corpus, tmp_path, "plan.micro_batch_seconds=4")
    told: list[str] = []
    found: list[Comparison] = []

    def watched(*given: Any) -> list[Comparison]:
        found.extend(verify(*given[:-1], told.append))
        return found

    runs = tmp_path / "runs"  # what the verb deletes is looked at below
    monkeypatch.setattr(verb, "shutil", SimpleNamespace(rmtree=lambda folder: folder.rename(runs)))
    monkeypatch.setattr("trainer.verify_resume.verify", watched)
    assert main(["verify-resume", "speech/tones", "--steps=8", "--kills=1", *arguments]) == EXIT_DONE
    shown = capsys.readouterr().out
    assert "8 steps, beside the run without faults" in shown
    assert "equal bit for bit" in shown
    assert runs.exists()
    kept, moved = found
    assert (kept.name, kept.moved, moved.name, moved.moved) == ("killed", False, "killed and moved", True)
    assert len(kept.resumed) == len(moved.resumed) == 1
    assert len(told) == 5
    assert kept.wrong(0.0) == []
    assert moved.wrong(1e-3) == []
    assert {s.processes for s in moved.starts} == {1, 2}

    whole, other = RunDirectory(runs / "whole"), RunDirectory(runs / "killed")
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


def test_a_difference_ends_with_its_own_code_and_keeps_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def different(config: str, overrides: list[str], folder: Path, *_: object) -> list[Comparison]:
        folder.mkdir()
        return [
            Comparison("killed", schedule(0, 8, 1, [1]), [3], ledger=False, differences=dict.fromkeys(NUMBERS, 0.0))
        ]

    monkeypatch.setattr("trainer.verify_resume.verify", different)
    assert main(["verify-resume", "speech/tones", f"runs_dir={tmp_path}"]) == EXIT_CHECK_FOUND_SOMETHING
    shown = capsys.readouterr().out
    assert "DIFFERS" in shown
    assert "killed: ledger differs" in shown
    assert len(list(tmp_path.glob("verify-resume-*"))) == 1


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
