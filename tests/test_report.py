"""The report is one file, whole on its own, and shows what data says without believing it."""

import json
import re
from pathlib import Path

import pytest

from tests.helpers import overrides
from trainer import doctor, recipe, report
from trainer.run import RunDirectory, append

EVIL = "<script>alert(1)</script>"


def make_run(folder: Path, corpus: Path, finished: bool) -> tuple[RunDirectory, recipe.Recipe]:
    task = recipe.load("speech/tones", overrides(corpus, folder, "name=run"))
    run = RunDirectory(folder / "run")
    run.claim(task.config)
    if finished:
        keys = task.build_dataset("test").index.keys
        append(
            run.metrics,
            [
                {
                    "kind": "train",
                    "step": s,
                    "epoch": 0,
                    "loss": 3 / s,
                    "lr": 1e-3,
                    "grad_norm": None if s == 3 else 1.0,
                    "audio_hours": s / 10,
                    "audio_hours_per_second": 0.02,
                    "padding_percent": 3.0,
                    "data_wait_percent": 1.0,
                    "step_seconds": 0.5,
                }
                for s in range(1, 9)
            ],
        )
        rates = {f"cer{kind}": 0.1 for kind in ("", "_insertions", "_deletions", "_substitutions")}
        append(run.metrics, [{"kind": "validation", "step": 8, "epoch": 0, "loss": 0.5, **rates}])
        append(run.refused, [{"step": 3, "epoch": 0, "keys": ["a"]}])
        append(run.quarantine, [{"key": EVIL, "reason": EVIL, "epoch": 0, "step": 2}])
        rows = [
            {"key": k, "errors": 1, "length": 4, "columns": {"reference": "abcd", "hypothesis": EVIL}} for k in keys
        ]
        (run.path / "evaluation").mkdir()
        result = {"split": "test", "step": 8, "metrics": {**rates, "loss": 0.5}, "rows": rows}
        (run.path / "evaluation" / "test.json").write_text(json.dumps(result))
    return run, task


def test_a_finished_run(corpus: Path, tmp_path: Path) -> None:
    run, task = make_run(tmp_path, corpus, finished=True)
    assert report.write(run, task, "test")["cer"] == 0.1
    text = run.report.read_text(encoding="utf-8")
    assert "10.00 %" in text
    assert "<script" not in text
    assert "&lt;script&gt;" in text
    assert not re.search(r'(src|href)="(?!data:)|url\(|@import', text)  # nothing is loaded from anywhere
    assert text.count("<audio") == text.count("data:audio/mpeg;base64,") > 3
    assert (run.path / "report" / "curves.png").stat().st_size > 20_000


def test_a_run_that_has_only_begun_or_lost_its_data(corpus: Path, tmp_path: Path) -> None:
    run, task = make_run(tmp_path, corpus, finished=False)
    assert report.write(run, task, "test") == {}
    assert "not evaluated" in run.report.read_text()
    finished, _ = make_run(tmp_path / "other", corpus, finished=True)
    gone = recipe.load("speech/tones", overrides(tmp_path / "nowhere", tmp_path, "name=run"))
    report.write(finished, gone, "test")
    assert "Without sound" in finished.report.read_text()


def test_an_alignment_shows_each_kind_of_error() -> None:
    assert report.aligned("abcd", "axcde") == "a<em>b&gt;x</em>cd<ins>e</ins>"
    assert report.aligned("ab", "b") == "<del>a</del>b"


def test_doctor_counts_problems_and_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []

    def broken() -> str:
        raise ImportError("nothing here")

    quick = [c for c in doctor.CHECKS if c.name in ("audio", "kernels", "shared memory", "cores", "import names")]
    assert doctor.run([doctor.Check("broken", broken), *quick], lines.append) == 1
    assert lines[0] == "PROBLEM  broken: ImportError: nothing here"
    assert all(line.startswith("ok") for line in lines[1:])


def test_doctor_names_a_clash_of_import_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor.metadata, "packages_distributions", lambda: {"kernels": ["ostinato", "kernels"]})
    with pytest.raises(doctor.Problem, match="pip uninstall kernels"):
        doctor.import_names()


def test_doctor_names_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    with pytest.raises(doctor.Problem, match="set runs_dir=FOLDER"):
        doctor.disk(blocked / "runs")
