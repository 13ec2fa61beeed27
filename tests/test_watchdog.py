"""A late rank says where it is, shows its stacks and ends in time; what waits for it is not blamed."""

import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from trainer import place
from trainer.config import PROJECT
from trainer.place import BACKWARD, CHECKPOINT, COLLECTIVE, DATA, FORWARD, Board, Place, latest_of, published

DEADLINE = 2.0

LATE = """
import ctypes, os, sys, time
from trainer.place import board
from trainer.watchdog import Watchdog
def stuck_here():
    {stuck}
with Watchdog(3, {deadline}, lambda *error: print("told", *error, flush=True)):
    for step in range(20):  # longer than the deadline in all, and in time
        board.at("data", step)
        time.sleep({deadline} / 8)
    board.at({phase!r}, 7, lambda: "sample k of shard s")
    print(time.monotonic(), flush=True)
    stuck_here()
"""
HOLDS_THE_INTERPRETER = "ctypes.PyDLL(None).usleep(60_000_000)"


@pytest.mark.parametrize(
    ("phase", "stuck", "told"),
    [
        (DATA, "time.sleep(60)", "late in data False"),
        (FORWARD, "time.sleep(60)", "late in forward False"),
        (CHECKPOINT, "time.sleep(60)", "late in checkpoint False"),
        (COLLECTIVE, "time.sleep(60)", "late in collective True"),
        (DATA, HOLDS_THE_INTERPRETER, None),
    ],
)
def test_a_late_rank_is_ended_with_its_stacks(phase: str, stuck: str, told: str | None) -> None:
    code = LATE.format(phase=phase, stuck=stuck, deadline=DEADLINE)
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, timeout=60)
    ended = time.monotonic()
    assert done.returncode == 1
    began, *rest = done.stdout.splitlines()
    assert ended - float(began) < DEADLINE
    assert "in stuck_here" in done.stderr
    if told is None:
        return
    assert rest == [f"told {told}"]
    assert f"rank 3 is late: in {phase} of step 7" in done.stderr
    assert "sample k of shard s" in done.stderr
    assert ("waits for other ranks" in done.stderr) == (phase == COLLECTIVE)


@pytest.mark.parametrize("variable", ["TORCHELASTIC_RUN_ID", "CROSS_RANK"])
def test_an_orphan_of_torchrun_or_deepspeed_ends(tmp_path: Path, variable: str) -> None:
    """The launcher is killed; nobody tells the rank."""
    rank = f"""
import os, time
from trainer.watchdog import Watchdog
with Watchdog(0, 4.0, print):
    open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
    time.sleep(60)
"""
    launcher = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    environment = os.environ | {variable: "0", "PYTHONPATH": str(PROJECT)}
    process = subprocess.Popen([sys.executable, "-c", launcher], env=environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.wait()
    pid = int((tmp_path / "pid").read_text())

    def alive() -> bool:
        try:
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
        except OSError:
            return False

    while alive():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_place_is_shown_in_a_file(tmp_path: Path) -> None:
    board = Board()
    board.publish(tmp_path, 3)
    board.at(DATA, 12)
    board.saved(10)
    board.at(FORWARD)
    (found,) = published(tmp_path).items()
    assert found == (3, board.place)
    assert (board.place.phase, board.place.step, board.place.saved) == (FORWARD, 12, 10)
    (tmp_path / "place-00004").write_text("{")
    assert list(published(tmp_path)) == [3]


@pytest.mark.parametrize(
    ("places", "late"),
    [
        ([(COLLECTIVE, 5), (DATA, 5)], [1]),
        ([(DATA, 6), (COLLECTIVE, 5)], [1]),  # it is late behind the collective that it shows
        ([(BACKWARD, 5), (BACKWARD, 5), (FORWARD, 5)], [2]),
        ([(CHECKPOINT, 5), (CHECKPOINT, 5)], [0, 1]),
        ([], []),
    ],
)
def test_who_is_late(places: list[tuple[str, int]], late: list[int]) -> None:
    assert latest_of({rank: Place(phase, step) for rank, (phase, step) in enumerate(places)}) == late


def test_what_is_being_read_is_known() -> None:
    def look() -> str:
        with place.reading() as now:
            now.shard, now.key = "train/00001.tar", "one"
            return place.being_read()

    with ThreadPoolExecutor(1, "loader") as pool, place.reading() as here:
        assert place.being_read() == ""  # nothing yet
        here.shard, here.key = "train/00002.tar", "two"
        assert pool.submit(look).result() == (
            "MainThread reads sample two of shard train/00002.tar; loader 0 reads sample one of shard train/00001.tar"
        )
        assert place.being_read() == "MainThread reads sample two of shard train/00002.tar"
    assert place.being_read() == ""
