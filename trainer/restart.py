"""Starts a job again after a fault: from the newest whole checkpoint, with a growing pause, and not for ever."""

import sys
import time
from collections.abc import Callable, Sequence

from pydantic import ConfigDict, Field

from trainer import config as configuration
from trainer.config import Config
from trainer.errors import EXIT_CHECK_FOUND_SOMETHING, EXIT_DONE, EXIT_REQUEUE, EXIT_USER_MISTAKE
from trainer.launch import POLL_SECONDS, Job, Outcome, catching_signals, wait

PAUSES_SECONDS = (1.0, 5.0, 15.0, 30.0)
"""Before the first, second, ... start in a row that led to no new checkpoint, or for which too few hosts answered."""
AWAY_SECONDS = 900.0
"""Time that hosts which do not answer are waited for: the restart of one takes minutes, and costs no new start."""
FINAL = (EXIT_DONE, EXIT_USER_MISTAKE, EXIT_CHECK_FOUND_SOMETHING, EXIT_REQUEUE)
"""Exit codes after which a new start would change nothing."""


class LaunchConfig(Config):
    """What becomes of a run when something fails."""

    deadline_seconds: float = Field(600.0, ge=20)
    """From the moment at which a rank, a host or the network stops until every process has ended. More than the longest
    piece of work takes: opening the data, one micro-batch, writing a checkpoint."""
    max_restarts: int = Field(3, ge=0)
    """New starts in a row that lead to no new checkpoint; one that does makes the count begin anew."""
    min_hosts: int | None = Field(None, ge=1)
    """Go on with so many hosts if the others do not answer; null: with all or not at all."""


class _Front(Config):
    """What is to be known before the ranks are started, which check everything else."""

    model_config = ConfigDict(extra="ignore")

    launch: LaunchConfig = LaunchConfig()


def read(config: str, overrides: Sequence[str]) -> LaunchConfig:
    """The settings of a run, without importing what trains it.

    Raises:
        UserError: the file or one of these keys is wrong.
    """
    source = configuration.gather(configuration.find_file(config), overrides)
    return configuration.validate(_Front, source).launch


def say(text: str) -> None:
    print(f"launch: {text}", file=sys.stderr, flush=True)


def supervise(start: Callable[[bool], Job], max_restarts: int) -> int:
    """Run a job to its end, over as many attempts as it takes.

    Args:
        start: begins an attempt; told whether it is the first.
        max_restarts: see `LaunchConfig`.

    Returns:
        the exit code of the last attempt.
    """
    own: Outcome | None = None  # the last one that failed for a reason of its own
    first, newest = True, -1
    number = in_vain = 0
    away_since = None
    with catching_signals() as came:
        while True:
            outcome = _attempt(start, first, came)
            first = False
            for message in outcome.messages:
                print(message, file=sys.stderr, flush=True)
            if outcome.text:
                say(outcome.text)
            if outcome.code in FINAL or came:
                return outcome.code
            if not outcome.began:
                away_since = time.monotonic() if away_since is None else away_since
                if time.monotonic() - away_since > AWAY_SECONDS:
                    say(f"gave up after {AWAY_SECONDS / 60:g} minutes in which too few hosts answered")
                    return outcome.code
                pause = PAUSES_SECONDS[min(in_vain, len(PAUSES_SECONDS) - 1)]
                in_vain += 1
                say(f"asks the hosts again in {pause:g} s, for {AWAY_SECONDS / 60:g} minutes at most (no new start)")
                if not _pause(pause, came):
                    return EXIT_REQUEUE
                continue
            in_vain, away_since = 0, None
            if outcome.saved > newest:
                number, newest = 0, outcome.saved
            if own is not None and (outcome.step, outcome.error) == (own.step, own.error):
                say(
                    f"the same error twice at step {outcome.step} ({outcome.error}): a new start would meet it again; "
                    "mend the cause, the same command goes on from the last checkpoint"
                )
                return outcome.code
            if number >= max_restarts:
                if max_restarts:
                    say(f"gave up after {number} new starts without a new checkpoint (launch.max_restarts)")
                return outcome.code
            pause = PAUSES_SECONDS[min(number, len(PAUSES_SECONDS) - 1)]
            number, own = number + 1, outcome if outcome.error else own
            say(f"starts again in {pause:g} s from the newest checkpoint ({number} of {max_restarts})")
            if not _pause(pause, came):
                return EXIT_REQUEUE


def _pause(seconds: float, came: list[int]) -> bool:
    """Wait; false if a signal came."""
    until = time.monotonic() + seconds
    while time.monotonic() < until and not came:
        time.sleep(POLL_SECONDS)
    return not came


def _attempt(start: Callable[[bool], Job], first: bool, came: list[int]) -> Outcome:
    passed = len(came)
    job = start(first)
    try:
        return wait(job, came, passed)
    finally:
        job.close()
