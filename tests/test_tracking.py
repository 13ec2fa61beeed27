"""Tracking keeps to what the user's environment says, keeps runs apart, and never ends a run."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb

from trainer import tracking
from trainer.data.dataset import Media
from trainer.tracking import Markup, Tracker, TrackingConfig

ROW = {"step": 1, "epoch": 0, "loss": 1.0}


@pytest.fixture(autouse=True)
def _clean(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def track(folder: Path, mode: Any = "auto") -> Tracker:
    folder.mkdir(exist_ok=True)
    return Tracker(TrackingConfig(wandb=mode, group="study", tags=("sweep",)), folder, "[/red]", {}, 3, active=True)


@pytest.mark.parametrize(
    ("variable", "key", "mode", "tried"),
    [
        ("", "", "auto", ["offline"]),
        ("", "x" * 40, "auto", ["online", "offline"]),
        ("disabled", "x" * 40, "auto", []),
        ("offline", "x" * 40, "auto", ["offline"]),
        ("dryrun", "x" * 40, "auto", ["offline"]),
        ("online", "", "auto", ["online", "offline"]),
        ("on", "x" * 40, "auto", ["offline"]),
        ("disabled", "", "offline", ["offline"]),
        ("online", "", "disabled", []),
    ],
)
def test_the_mode_of_the_environment_is_honoured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, key: str, mode: str, tried: list[str]
) -> None:
    seen, marks = [], []

    def init(**settings: Any) -> None:
        seen.append(settings["mode"])
        marks.append((settings["group"], settings["tags"]))
        raise RuntimeError("no server")

    monkeypatch.setattr(wandb, "init", init)
    monkeypatch.setattr(tracking, "answers", lambda url: True)
    if variable:
        monkeypatch.setenv("WANDB_MODE", variable)
    monkeypatch.setenv("WANDB_API_KEY", key)
    track(tmp_path / "run", mode).finish()
    assert seen == tried
    assert marks == [("study", ["sweep"])] * len(tried)
    assert "WANDB_DATA_DIR" not in os.environ


def test_each_run_of_a_process_stages_its_sound_in_its_own_folder(tmp_path: Path) -> None:
    before = dict(os.environ)
    media = Media(np.zeros(800, np.float32), 8000, np.zeros((2, 2), np.float32))
    for name in ("first", "second"):
        tracker = track(tmp_path / name, "offline")
        tracker.train(dict(ROW), "")
        tracker.table(1, 0, "valid/table", [({"key": "a", "aligned": Markup("<b>b</b>")}, media)])
        tracker.finish()
        assert {k: v for k, v in os.environ.items() if k in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR")} == {}
        staged = list((tmp_path / name / "wandb" / "data" / "artifacts" / "staging").iterdir())
        assert {b"RIFF", b"\x89PNG", b"<b>b"} <= {path.read_bytes()[:4] for path in staged}, name
        assert list((tmp_path / name / "wandb" / "cache").rglob("*.log")), name
        assert list((tmp_path / name / "wandb").glob("offline-run-*"))
        (table,) = (tmp_path / name / "wandb").rglob("*.table.json")
        assert json.loads(table.read_text())["columns"] == ["key", "aligned", "audio", "image"]
    assert {k: v for k, v in os.environ.items() if k in before} == before


@pytest.mark.parametrize("place", ["wandb", "elsewhere"])
def test_a_folder_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / place).write_text("a file where a folder should be")
    if place != "wandb":
        monkeypatch.setenv("WANDB_DATA_DIR", str(run / place / "data"))
    tracker = track(run)
    tracker.train(dict(ROW), "")
    tracker.finish()
    assert json.loads((run / "metrics.jsonl").read_text())["loss"] == 1.0


CLOSED = """
import sys
from pathlib import Path
from trainer.tracking import Tracker, TrackingConfig
tracker = Tracker(TrackingConfig(wandb="disabled", console_seconds=1e-9), Path(sys.argv[1]), "run", {}, 3, active=True)
for step in (1, 2):
    tracker.say("hello")
    tracker.train({"step": step, "epoch": 0}, "loss 1")
tracker.finish()
"""


def test_a_console_that_nobody_reads_ends_nothing(tmp_path: Path) -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run([sys.executable, "-c", CLOSED, str(tmp_path)], stdout=write, stderr=write, timeout=60)
    os.close(write)
    assert done.returncode == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2
