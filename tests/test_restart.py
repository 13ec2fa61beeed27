"""New starts after a fault: as often as allowed, not in vain, and from what is known of the attempt before."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from trainer import restart
from trainer.errors import UserError
from trainer.launch import Outcome


class Done:
    """A job that has ended."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome

    def poll(self) -> Outcome | None:
        return self.outcome

    def signal(self, number: int) -> None:
        raise AssertionError("there is nothing left to stop")

    def close(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "PAUSES_SECONDS", (0.0,))


def attempts(*outcomes: Outcome) -> tuple[Callable[[bool], Done], list[bool]]:
    """What starts them one after the other, and what it was told each time."""
    told: list[bool] = []
    coming: Iterator[Outcome] = iter(outcomes)

    def start(first: bool) -> Done:
        told.append(first)
        return Done(next(coming))

    return start, told


def fault(saved: int = -1, step: int = 5, error: str = "", code: int = 137) -> Outcome:
    return Outcome(code, step, saved, error, "rank 0 was ended")


DONE = Outcome(0)


@pytest.mark.parametrize(
    ("outcomes", "code", "message"),
    [
        ([DONE], 0, ""),
        ([fault(), fault(), DONE], 0, "(2 of 2)"),
        ([fault(), fault(), fault()], 137, "gave up after 2 new starts without a new checkpoint"),
        ([fault(1), fault(2), fault(3), fault(4), fault(5), DONE], 0, "(1 of 2)"),
        ([fault(1), fault(2), fault(2), fault(2), DONE], 137, "gave up after 2"),
        ([fault(40), fault(), fault(40), DONE], 137, "gave up after 2"),  # the second never came to load it
        ([fault(1, 5, "E: #", 1), fault(1, 5, "E: #", 1), DONE], 1, "the same error twice at step 5 (E: #)"),
        ([fault(1, 5, "E: #", 1), fault(2, 6, "E: #", 1), DONE], 0, "(1 of 2)"),
        ([fault(1, 5, "E", 1), fault(1, 5, "F", 1), DONE], 0, "(2 of 2)"),
        ([fault(1, 5, "E", 1), fault(1, 4), fault(2, 5, "E", 1), DONE], 1, "the same error twice"),
        ([Outcome(75), DONE], 75, ""),
        ([Outcome(2), DONE], 2, ""),
        ([fault(), Outcome(75), DONE], 75, "(1 of 2)"),
    ],
)
def test_it_starts_again_as_long_as_that_helps(
    capsys: pytest.CaptureFixture[str], outcomes: list[Outcome], code: int, message: str
) -> None:
    start, told = attempts(*outcomes)
    assert restart.supervise(start, max_restarts=2) == code
    assert told == [True] + [False] * (len(told) - 1)
    assert len(told) == len(outcomes) - (outcomes[-1] is DONE and code != 0)
    said = capsys.readouterr().err
    assert message in said
    assert bool(said) == bool(message)


def test_without_new_starts_nothing_is_said_of_them(capsys: pytest.CaptureFixture[str]) -> None:
    start, told = attempts(fault())
    assert restart.supervise(start, max_restarts=0) == 137
    assert (told, capsys.readouterr().err) == ([True], "launch: rank 0 was ended\n")


def test_a_signal_in_the_pause_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(restart, "PAUSES_SECONDS", (1000.0,))
    start, told = attempts(fault(), DONE)
    monkeypatch.setattr(restart.time, "sleep", lambda _: os.kill(os.getpid(), signal.SIGUSR1))
    assert restart.supervise(start, max_restarts=2) == 75
    assert told == [True]


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that only goes on in pauses, which have their true length."""
    monkeypatch.undo()
    now = [0.0]
    monkeypatch.setattr(restart.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(restart.time, "sleep", lambda _: now.__setitem__(0, now[0] + 1))
    return now


def test_hosts_that_restart_are_waited_for(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """They cost no new start; ones that never come back end the run."""
    away = Outcome(1, text="1 of 2 hosts answer, wanted 2", began=False)
    start, told = attempts(fault(3), *[away] * 20, fault(3), *[away] * 20, DONE)
    assert restart.supervise(start, max_restarts=2) == 0
    assert told == [True] + [False] * 42
    said = capsys.readouterr().err
    assert "asks the hosts again in 30 s, for 15 minutes at most (no new start)" in said
    assert "(2 of 2)" in said

    start, _ = attempts(fault(3), *[away] * 99)
    now[0] = begin = 10_000.0
    assert restart.supervise(start, max_restarts=2) == 1
    assert restart.AWAY_SECONDS <= now[0] - begin < restart.AWAY_SECONDS + 100
    assert "gave up after 15 minutes in which too few hosts answered" in capsys.readouterr().err


def test_pauses_grow(now: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    start, _ = attempts(*[fault()] * 6, DONE)
    assert restart.supervise(start, max_restarts=9) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "starts again" in line]
    assert [float(line.split()[4]) for line in lines] == [1, 5, 15, 30, 30, 30]


def test_the_settings_are_read_without_the_rest() -> None:
    settings = restart.read("speech/tones", ["launch.max_restarts=7", "model.no_such_key=1"])
    assert (settings.max_restarts, settings.min_hosts) == (7, None)
    with pytest.raises(UserError, match=r"the command line: launch.deadline_seconds = 1: .*20"):
        restart.read("speech/tones", ["launch.deadline_seconds=1"])
    with pytest.raises(UserError, match=r"launch.max_restart: unknown key; did you mean launch.max_restarts\?"):
        restart.read("speech/tones", ["launch.max_restart=1"])
