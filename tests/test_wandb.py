"""W&B online, against a stand-in for its server: one run over resumes, and an outage costs neither time nor numbers."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import fit, overrides, run_ranks
from tests.wandb_server import KEY, Run, Server
from trainer import recipe, tracking
from trainer.analysis import run as analysis
from trainer.run import RunDirectory
from trainer.tracking import Tracker, TrackingConfig

SOON = 10.0
"""Seconds; a hundred times what a call takes here, and a tenth of what W&B waits by itself."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    started = Server().start()
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    monkeypatch.setenv("WANDB_BASE_URL", started.url)
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 3.0)
    monkeypatch.setattr(tracking, "ANSWER_SECONDS", 1.0)
    yield started
    started.stop()


def track(folder: Path, steps: range, between: Any = None, patience: float = 60.0) -> float:
    """A run that logs some steps; the longest that a call took."""
    folder.mkdir(exist_ok=True)
    start = time.monotonic()
    tracker = Tracker(TrackingConfig(), folder, "run", {"seed": 3}, 99, active=True, patience_seconds=patience)
    longest = time.monotonic() - start
    for step in steps:
        start = time.monotonic()
        tracker.train({"step": step, "epoch": 0, "loss": 1.0 / step}, "")
        longest = max(longest, time.monotonic() - start)
        if between is not None and step == steps[len(steps) // 2]:
            between()
    start = time.monotonic()
    tracker.finish()
    return max(longest, time.monotonic() - start)


def steps(run: Run) -> list[int]:
    """Steps that the server has; one that was sent twice counts once, and must be equal."""
    seen: dict[int, float] = {}
    for row in run.rows():
        assert seen.setdefault(row["trainer/step"], row["train/loss"]) == row["train/loss"]
    return sorted(seen)


def test_a_run_and_its_resume_are_one_run(server: Server, tmp_path: Path) -> None:
    track(tmp_path / "run", range(1, 4))
    (run,) = server.runs.values()
    assert (steps(run), run.exit_code, run.name) == ([1, 2, 3], 0, "run")
    assert '"seed"' in run.config
    track(tmp_path / "run", range(4, 6))
    assert list(server.runs) == [(tmp_path / "run" / "wandb" / "run-id").read_text()]
    assert [row["trainer/step"] for row in run.rows()] == [1, 2, 3, 4, 5]  # nothing twice
    assert [row["_step"] for row in run.rows()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("away", ["refused", "black hole", "out of order"])
def test_a_server_that_is_away_at_the_start(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away: str
) -> None:
    """The run goes offline at once; the next start, with the server back, sends everything."""
    if away == "out of order":
        server.silent = True
        monkeypatch.setattr(tracking, "INIT_SECONDS", 1.0)
    else:
        server.stop()
    with socket.socket() as hole:
        hole.bind(("127.0.0.1", 0))
        hole.listen()  # and never accepts
        if away == "black hole":
            monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{hole.getsockname()[1]}")
        assert track(tmp_path / "run", range(1, 4)) < (3 * SOON if server.up else SOON)
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    server.silent = False
    monkeypatch.setenv("WANDB_BASE_URL", server.url if server.up else server.start().url)
    track(tmp_path / "run", range(4, 6))
    (run,) = server.runs.values()
    assert steps(run) == [1, 2, 3, 4, 5]


def test_a_server_that_is_away_in_the_middle(server: Server, tmp_path: Path) -> None:
    """No call waits for it, and all that was logged meanwhile arrives."""
    server_steps = range(1, 301)
    folder = tmp_path / "run"
    folder.mkdir()
    tracker = Tracker(TrackingConfig(), folder, "run", {}, 300, active=True)
    longest = 0.0
    for step in server_steps:
        if step == 100:
            server.stop()
        if step == 250:
            server.start()
        start = time.monotonic()
        tracker.train({"step": step, "epoch": 0, "loss": 1.0 / step}, "")
        longest = max(longest, time.monotonic() - start)
    tracker.finish()
    assert longest < 1.0
    (run,) = server.runs.values()
    if steps(run) != list(server_steps):  # the client may still be waiting before it tries again
        assert not (folder / "wandb" / "complete-online").exists()
        track(folder, range(301, 302))
    assert set(server_steps) <= set(steps(run))


@pytest.mark.parametrize(("at_most", "patience"), [(3.0, 60.0), (60.0, 3.0)], ids=["as ever", "in a short deadline"])
def test_a_server_that_is_away_at_the_end(
    server: Server,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    at_most: float,
    patience: float,
) -> None:
    """The run ends in the time that W&B is given, says where the numbers are, and the next start sends them."""
    monkeypatch.setattr(tracking, "FINISH_SECONDS", at_most)
    assert track(tmp_path / "run", range(1, 5), between=server.stop, patience=patience) < 3.0 + SOON
    assert "W&B did not finish" in caplog.text
    assert "wandb sync" in caplog.text
    server.start()
    track(tmp_path / "run", range(5, 7))
    (run,) = server.runs.values()
    assert steps(run) == [1, 2, 3, 4, 5, 6]


KILLED = """
import os, signal, sys
from pathlib import Path
from trainer.tracking import Tracker, TrackingConfig
tracker = Tracker(TrackingConfig(), Path(sys.argv[1]), "run", {}, 9, active=True)
for step in range(1, 5):
    tracker.train({"step": step, "epoch": 0, "loss": 1.0 / step}, "")
sys.stdin.read()
os.kill(os.getpid(), signal.SIGKILL)
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 6 * SOON
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def services(folder: Path) -> list[str]:
    """What W&B has running for a run: it is in their environment, where its files are."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(folder).encode() in (process / "environ").read_bytes():
                found.append((process / "cmdline").read_text().replace("\0", " "))
    return [command for command in found if command]


def test_a_killed_run_goes_on_as_the_same(server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    killed = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdin=subprocess.PIPE)
    wait_for(lambda: "wandb-core" in " ".join(services(folder)))
    killed.communicate(timeout=60)
    assert killed.returncode == -signal.SIGKILL
    wait_for(lambda: not services(folder))
    track(folder, range(5, 7))
    (run,) = server.runs.values()
    assert steps(run) == [1, 2, 3, 4, 5, 6]


def test_an_analysis_joins_the_run(server: Server, tmp_path: Path) -> None:
    """Its numbers and pictures, beside the steps."""
    track(tmp_path / "run", range(1, 4))
    (tmp_path / "run/analysis").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "run/analysis/powers.png")
    made = recipe.load("copying/t1000", [f"runs_dir={tmp_path}", "name=run"])
    values = {"step": 3, "epoch": 0, "summary": {"radius": 0.5, "kreiss": None}}
    analysis._track(RunDirectory(tmp_path / "run"), made, values)
    (run,) = server.runs.values()
    last = run.rows()[-1]
    assert (last["trainer/step"], last["analysis/radius"]) == (3, 0.5)
    assert last["analysis/powers"]["_type"] == "image-file"
    assert "analysis/kreiss" not in last  # it has no finite value


@pytest.mark.distributed
def test_only_rank_0_tracks(server: Server, corpus: Path, tmp_path: Path) -> None:
    """A whole run on two processes: one run at the server, with as many points as there are rows of metrics."""
    arguments = overrides(
        corpus, tmp_path, "name=run", "max_steps=4", "tracking.wandb=online", "launch.deadline_seconds=50"
    )
    environment = {name: value for name, value in os.environ.items() if name.startswith(("WANDB_", "NETRC"))}
    result = run_ranks(2, fit_online, arguments, environment)[0]
    (run,) = server.runs.values()
    rows = run.rows()
    assert [row["trainer/step"] for row in rows if "train/loss" in row] == [1, 2, 3, 4]
    assert len(rows) == len((result["run"] / "metrics.jsonl").read_text().splitlines()) == 5
    assert server.operations.count("RunResumeStatus") == 1
    assert result["patience"] == [15.0], "less than the watchdog's"
    assert KEY not in "".join(
        path.read_text(errors="replace") for path in result["run"].rglob("*") if path.is_file() and path.suffix != ".pt"
    )


def fit_online(ranks: Any, arguments: list[str], environment: dict[str, str]) -> dict[str, Any]:
    os.environ.update(environment)
    begin, given = Tracker.__init__, []

    def noted(self: Tracker, *more: Any, **named: Any) -> None:
        given.append(named["patience_seconds"])
        begin(self, *more, **named)

    Tracker.__init__ = noted
    return fit(ranks, arguments) | {"patience": given}
