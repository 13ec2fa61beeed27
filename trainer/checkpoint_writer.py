"""Writes a run's checkpoints while the run goes on.

A step waits only for the copy of its tensors in memory. A thread of each rank writes that rank's file and reads it
back; when all have, a thread of rank 0 gives the checkpoint its name and moves `latest`. The threads touch files and
nothing else: every collective is made by the training loop, at moments that are the same on all ranks.
"""

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer import checkpoint, distributed
from trainer.checkpoint import LATEST, BrokenCheckpointError, CheckpointConfig
from trainer.config import show
from trainer.distributed import Slice
from trainer.place import board

log = logging.getLogger(__name__)

RETRY_SECONDS = (1.0, 5.0)
"""Waits before a file that could not be written is tried again."""
PAUSE_SECONDS = 30.0
"""After a checkpoint that could not be written at all, time to the next attempt; on a full disk, at the least."""


class _Job(threading.Thread):
    """Runs an action on files, with retries.

    Attributes:
        result: what it returned.
        failure: why it did not succeed, or None.
    """

    def __init__(self, action: Callable[[], Any]) -> None:
        super().__init__(daemon=True)
        self.action = action
        self.result: Any = None
        self.failure: str | None = None
        self.start()

    def run(self) -> None:
        for seconds in (0.0, *RETRY_SECONDS):
            time.sleep(seconds)
            try:
                self.result, self.failure = self.action(), None
                return
            except (OSError, RuntimeError, BrokenCheckpointError) as error:  # RuntimeError: torch could not write
                self.failure = str(error)


REPLACED = ".replaced"
"""Of the name of a whole checkpoint that another one of the same step takes the place of."""


class Writer:
    """Writes checkpoints, one at a time. Every rank has one and calls the same methods at the same steps.

    Args:
        folder: `checkpoints/` of the run.
        config: see there.

    Attributes:
        written_step: of the newest checkpoint that is whole.
        busy: a write is in flight.
        paused: the last one could not be written. The loop asks `may_try` then instead of its calendar.
    """

    def __init__(self, folder: Path, config: CheckpointConfig) -> None:
        self.folder, self.config = folder, config
        self.written_step = -1
        self.paused = False
        self._step = -1
        self._state: dict[str, Any] = {}
        self._job: _Job | None = None
        self._publishing = False
        self.busy = False
        self._own_bytes = self._needed_bytes = 0
        self._next_try = 0.0

    def clean(self) -> None:
        """Delete what a killed run left half-written; rank 0 only, before any rank reads or writes.

        A checkpoint that was being written anew gets its name back where the new one had not yet come by it.
        """
        for old in self.folder.glob(f".step-*{REPLACED}"):
            name = old.name.removeprefix(".").removesuffix(REPLACED)
            if not (self.folder / name).exists():
                old.rename(self.folder / name)
        for left in self.folder.glob(".step-*"):
            shutil.rmtree(left, ignore_errors=True)

    @property
    def ready(self) -> bool:
        """Whether this rank has done its part of the write in flight: once all have, `advance` is due."""
        return self.busy and (self._job is None or not self._job.is_alive())

    def start(self, step: int, slices: Iterable[Slice], state: dict[str, Any], obstacle: str | None = None) -> None:
        """Begin to write a checkpoint; waits for the one before and for the copy.

        Args:
            slices: what this rank owns.
            state: everything else, JSON values, equal on all ranks. `state["best"]` maps steps to their monitored
                value.
            obstacle: why it must not become a checkpoint, if this rank knows a reason.
        """
        self.wait()
        self._step, self.busy, self._publishing = step, True, False
        copied = [(s.name, s.slot, s.start, s.values.detach().to("cpu", copy=True)) for s in slices]
        self._own_bytes = sum(values.nbytes for *_, values in copied)
        self._state = {"format": checkpoint.FORMAT, **json.loads(json.dumps(state)), "saved_at": time.time()}
        file = self._partial / f"rank-{dist.get_rank():05d}.pt"

        def write_own() -> dict[str, Any]:
            if obstacle is not None:
                raise OSError(obstacle)
            file.parent.mkdir(parents=True, exist_ok=True)
            facts = checkpoint.write_tensors(file, copied)
            checkpoint.check_file(file, facts)
            return facts

        self._job = _Job(write_own)

    def advance(self) -> None:
        """Once all ranks are ready: go on to the next part of the write in flight, or end it."""
        if self._publishing:
            failure = distributed.from_first(self._job.failure if self._job else None)
        else:
            job = self._job
            assert job is not None
            parts = distributed.gather((dist.get_rank(), job.result, job.failure, self._own_bytes))
            self._needed_bytes = sum(size for *_, size in parts)
            failure = "; ".join(f"rank {rank}: {why}" for rank, _, why, _ in parts if why) or None
            if failure is None:
                files = {f"rank-{rank:05d}.pt": facts for rank, facts, *_ in parts}
                self._publishing, self._job = True, None
                if dist.get_rank() == 0:
                    self._job = _Job(lambda: self._publish(files))
                return
        self.busy, self._job = False, None
        self.paused = failure is not None
        if failure is None:
            self.written_step = self._step
            board.saved(self._step)
        else:
            self._give_up(failure)

    def wait(self) -> bool:
        """Wait for the write in flight; whether the last one that was begun is whole."""
        while self.busy:
            if self._job is not None:
                self._job.join()
            self.advance()
        return self.written_step == self._step

    def may_try(self) -> bool:
        """Rank 0's word for all, where writing is paused: it is worth another attempt."""
        if dist.get_rank() != 0 or self.busy or not self.paused or time.monotonic() < self._next_try:
            return False
        free = _free_bytes(self.folder)
        if free >= self._needed_bytes:
            return True
        self._next_try = time.monotonic() + PAUSE_SECONDS
        log.warning(
            "%s: no checkpoint is written: %.0f MB are free and one takes %.0f MB; make room. The run goes on, and "
            "would resume from step %s",
            show(self.folder),
            free / 1e6,
            self._needed_bytes / 1e6,
            max(self.written_step, 0),
        )
        return False

    def _give_up(self, failure: str) -> None:
        self._next_try = time.monotonic() + PAUSE_SECONDS
        if dist.get_rank() == 0:
            shutil.rmtree(self._partial, ignore_errors=True)
            log.warning(
                "checkpoint of step %d was not written: %s. Checkpoints pause, the run goes on; it is tried again "
                "in %g s and as soon as there is room",
                self._step,
                failure,
                PAUSE_SECONDS,
            )

    @property
    def _partial(self) -> Path:
        return self.folder / f".{checkpoint.step_folder(self.folder, self._step).name}.partial"

    def _publish(self, files: dict[str, dict[str, Any]]) -> None:
        """Complete the checkpoint, give it its name, and move `latest`; may be called again after a failure."""
        partial, final = self._partial, checkpoint.step_folder(self.folder, self._step)
        if partial.exists():
            for stray in set(partial.iterdir()) - {partial / name for name in files}:
                stray.unlink()  # of a run that was killed in the middle, maybe on more ranks
            checkpoint.write_state(partial, self._state, files)
            checkpoint.sync_folder(partial)
            if final.exists():  # gone for an instant, see `clean`; deleted below
                final.rename(final.with_name(f".{final.name}{REPLACED}"))
            partial.rename(final)
            checkpoint.sync_folder(self.folder)
        pointer = self.folder / f".{LATEST}"
        checkpoint.write(pointer, f"{final.name}\n".encode())
        pointer.replace(self.folder / LATEST)
        checkpoint.sync_folder(self.folder)
        try:
            checkpoint.prune(self.folder, self.config, {int(s): v for s, v in self._state.get("best", {}).items()})
            for left in self.folder.glob(".step-*"):
                shutil.rmtree(left, ignore_errors=True)
        except OSError as error:
            log.warning("an old checkpoint was not deleted: %s", error)


def _free_bytes(folder: Path) -> int:
    """Room on the disk of a folder; none if it cannot be asked."""
    try:
        return shutil.disk_usage(folder if folder.exists() else folder.parent).free
    except OSError:
        return 0
