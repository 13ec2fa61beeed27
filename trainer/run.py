"""The run directory: everything about a run in one place, and what a resumed run must agree with.

runs/NAME/
  config.yaml        resolved configuration
  checkpoints/       see trainer.checkpoint
  ledger/            rank-00000.jsonl: which samples were in which step, with checksums
  metrics.jsonl      numbers of each step and validation
  quarantine.jsonl   samples of every split that were left out: a row is {"split", "key", "reason", "detail", "found",
                     "epoch", "step"}, found "by the plan", "by reading" or "before this run"
  suspicious.jsonl   samples that are used and look odd: {"split", "key", "reason", "detail"}
  refused.jsonl      steps whose gradient was not finite, and their samples
  spikes.jsonl       steps after which the run went back to an older checkpoint
  requeue            there if the last start was stopped by a signal and saved: what exit code 75 says, for launchers
                     that lose it
  analysis/          analysis.json and pictures: what `analyze` found
  logs/ wandb/ profile/ export/ report.html
"""

import contextlib
import fcntl
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trainer import config as configuration
from trainer.config import show
from trainer.data.dataset import MISSING, Batch, Fault
from trainer.errors import UserError

log = logging.getLogger(__name__)


class RunDirectory:
    """Paths and files of one run.

    Args:
        path: need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.quarantine = path / "quarantine.jsonl"
        self.suspicious = path / "suspicious.jsonl"
        self.refused = path / "refused.jsonl"
        self.spikes = path / "spikes.jsonl"
        self.ledger = path / "ledger"
        self.logs = path / "logs"
        self.report = path / "report.html"
        self.requeue = path / "requeue"
        self._lock: IO[str] | None = None
        self._quarantined: set[tuple[str, str]] | None = None  # what is on record, once it was read

    @classmethod
    def existing(cls, name: str) -> "RunDirectory":
        """The run named on the command line: a path, or a name under runs/.

        Raises:
            UserError: there is no such run.
        """
        for path in (Path(name), Path("runs") / name, Path("runs") / name.replace("/", "-")):
            if os.path.isfile(path / "config.yaml"):  # takes any name; that of Path, only one that a folder can have
                return cls(path)
        known = sorted(p.parent.name for p in Path("runs").glob("*/config.yaml"))
        raise UserError(
            f"{name[:100]}: is not a run directory (no config.yaml in it, nor in runs/{name[:100]}); "
            + (f"known runs: {', '.join(known)}" if known else "there is no run yet: `./launch.sh train CONFIG`")
        )

    def saved_config(self) -> dict[str, Any]:
        """The configuration the run was started with."""
        return configuration.load_yaml(self.config)

    def claim(self, config: configuration.Config) -> None:
        """Make the directory, or check that it belongs to the same run, if that has begun; rank 0 only.

        Raises:
            UserError: it holds a run of another configuration, or another process is at work in it.
        """
        try:
            self.logs.mkdir(parents=True, exist_ok=True)
            self.ledger.mkdir(exist_ok=True)
            self._lock = (self.path / ".lock").open("w")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.requeue.unlink(missing_ok=True)
        except BlockingIOError as error:
            raise UserError(
                f"{show(self.path)}: another process trains this run; wait for it or take another name="
            ) from error
        except OSError as error:
            raise UserError(f"{show(self.path)}: cannot be written: {error.strerror}; set runs_dir=FOLDER") from error
        if self.config.is_file() and self._has_begun():
            different = configuration.differences(self.saved_config(), config)
            if different:
                lines = [f"{show(self.config)}: {name} = {old!r}, now {new!r}" for name, old, new in different]
                raise UserError(
                    "\n".join(lines)
                    + f"\nthis would be another run than the one in {show(self.path)}: put the values back to resume, "
                    f"or start a new one with name=OTHER (and init_from={show(self.path)} to take its weights)"
                )

    def save_config(self, config: configuration.Config) -> None:
        """Keep what the run goes by from now on: once its data are there, so that a refused start changes nothing."""
        temporary = self.config.with_suffix(".tmp")
        temporary.write_text(configuration.dump_yaml(configuration.plain(config)), encoding="utf-8")
        temporary.replace(self.config)

    def _has_begun(self) -> bool:
        """Whether there is anything that goes by the saved configuration; a start that was refused leaves nothing."""
        return self.metrics.is_file() or any(self.ledger.iterdir()) or any(self.checkpoints.glob("*"))

    def stopped(self) -> None:
        """Say in a file what exit code 75 says; rank 0 only."""
        with contextlib.suppress(OSError):  # a full disk: the exit code is still there
            self.requeue.touch()

    def add_to_quarantine(self, rows: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
        """Record samples that are left out and are not on record yet; returns those. Rank 0 only."""
        if self._quarantined is None:
            self._quarantined = {(row.get("split", "train"), row["key"]) for row in read_lines(self.quarantine)}
        new = {(row["split"], row["key"]): row for row in rows}
        new = {name: row for name, row in new.items() if name not in self._quarantined}
        append(self.quarantine, list(new.values()))
        self._quarantined |= new.keys()
        return list(new.values())

    def write_suspicious(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Record samples that are used and look odd, in place of what was on record; rank 0 only."""
        self.suspicious.unlink(missing_ok=True)
        append(self.suspicious, rows)

    def cut_back(self, step: int, validated: bool = True) -> None:
        """Forget what was written after a step, in every file, and its validation if it is still due; rank 0 only."""
        self._quarantined = None
        for path in [self.metrics, self.quarantine, self.refused, self.spikes, *sorted(self.ledger.glob("*.jsonl"))]:
            _keep_lines(path, lambda row: row["step"] <= step)
        if not validated:
            _keep_lines(self.metrics, lambda row: row["step"] < step or row["kind"] != "validation")


CLOCKS = frozenset({"seconds", "step_seconds", "data_wait_percent", "audio_hours_per_second", "tokens_per_second"})
"""Numbers of `metrics.jsonl` that a clock has measured: two runs that do the same differ in these alone."""

PLAN, READING, BEFORE = "by the plan", "by reading", "before this run"
"""How a row of a quarantine was found. What a plan leaves out follows from its settings; another run asks its own, and
asks again for what was missing."""


def read_quarantine(path: Path | None, split: str) -> list[Fault]:
    """The samples of a split that were found to be bad before this run.

    Args:
        path: a quarantine of another run, or lines {"key": ...}, which hold for every split; None: there is none.

    Raises:
        UserError: no such file, or a line of it is something else.
    """
    if path is None:
        return []
    try:
        with path.open(encoding="utf-8") as file:  # not `splitlines`, for which some signs in a line end it
            lines = list(file)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"quarantine = {path}: cannot be read: {error}; name another file, or null") from error
    found = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            fault = Fault(str(row["key"]), str(row.get("reason", "listed")), str(row.get("detail", "")))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{show(path)} line {number}: {line.strip()[:80]!r}: "
                'wanted {"key": ..., "reason": ...}; mend or remove it'
            ) from error
        if row.get("split", split) == split and row.get("found") != PLAN and fault.reason != MISSING:
            found[fault.key] = fault
    return list(found.values())


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSONL file; a torn last line, left by a killed process, is skipped."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                yield json.loads(line)
            except ValueError:
                continue


def _keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> None:
    if not path.is_file():
        return
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        for row in read_lines(path):
            if wanted(row):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def append(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add rows to a JSONL file; where that fails (a full disk) they go to the log, and the run goes on."""
    if rows:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write("".join(lines))
        except OSError as error:
            log.error("%s: could not be written (%s), so it lacks:\n%s", show(path), error.strerror, "".join(lines))


class LogFile(logging.FileHandler):
    """A log that says nothing where it cannot be written (a full disk): the console has the line too."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


class Lines:
    """A JSONL file that rows are added to. Where they cannot be written (a full disk), they wait in memory.

    Args:
        path: need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("ab", buffering=0)
        self._waiting: list[str] = []
        self._failed = False

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row."""
        self._waiting.append(json.dumps(row, ensure_ascii=False) + "\n")
        self.flush()

    def flush(self) -> bool:
        """Write what waits; whether nothing is left."""
        if not self._waiting:
            return True
        content = "".join(self._waiting).encode()
        end = os.fstat(self._file.fileno()).st_size
        try:
            while content:
                content = content[self._file.write(content) :]
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file.fileno(), end)  # no half of a row
            if not self._failed:
                log.warning("%s: cannot be written (%s); what is new waits in memory", show(self.path), error.strerror)
            self._failed = True
            return False
        self._waiting.clear()
        self._failed = False
        return True

    def close(self) -> None:
        self.flush()
        self._file.close()


class Ledger(Lines):
    """Which samples this rank trained on, written from the batches themselves.

    A row: {"epoch", "step", "micro_batch", "keys", "checksums", "bad"}, the step counted from the start of the run; a
    dummy leaves none.

    Args:
        folder: `ledger/` of the run.
        rank: one file a rank, so nobody waits.
    """

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder / f"rank-{rank:05d}.jsonl")

    def record(self, epoch: int, step: int, micro_batch: int, batch: Batch) -> None:
        """Add the row of one batch that was handed to the recipe."""
        bad = [k for k, ok in zip(batch["keys"], batch["valid"].tolist(), strict=True) if not ok]
        self.write(
            {
                "epoch": epoch,
                "step": step,
                "micro_batch": micro_batch,
                "keys": batch["keys"],
                "checksums": batch["checksums"],
                "bad": bad,
            }
        )


def read_ledger(folder: Path) -> list[dict[str, Any]]:
    """All rows of a ledger in the order of the plan, whatever the number of ranks that wrote it."""
    rows = [row for path in sorted(folder.glob("rank-*.jsonl")) for row in read_lines(path)]
    return sorted(rows, key=lambda row: (row["step"], row["micro_batch"]))
