"""Where numbers go: `metrics.jsonl` always, a progress line, and Weights & Biases. Only rank 0 tracks.

W&B never blocks a run and never ends it: without a key, a server or the package itself it goes offline or stays away,
and says so once. This is the only module that knows it.
"""

import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trainer.config import Config
from trainer.data.dataset import Media

log = logging.getLogger(__name__)


class TrackingConfig(Config):
    """Weights & Biases and the console."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online if a key is at hand, offline otherwise."""
    project: str = "ostinato"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    log_every_steps: int = Field(1, ge=1)
    """Steps between two rows of `metrics.jsonl` and two points in W&B."""
    console_seconds: float = Field(15.0, gt=0)
    """Seconds between two lines where the output is not a terminal."""


class Tracker:
    """Writes a run's numbers.

    Args:
        config: see there.
        folder: the run directory.
        name: of the run.
        settings: the run's configuration, shown in W&B.
        total_steps: for the progress bar.
        active: false on every rank but the first: does nothing.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        name: str,
        settings: dict[str, Any],
        total_steps: int,
        active: bool,
    ) -> None:
        self.config = config
        self.folder = folder
        self.active = active
        self._run: Any = None
        self._last_line = 0.0
        self._last_step = 0
        if not active:
            return
        self._metrics = (folder / "metrics.jsonl").open("a", encoding="utf-8")
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}"),
            TimeElapsedColumn(),
            console=self._console,
            disable=not sys.stderr.isatty(),
        )
        self._task = self._progress.add_task(name, total=total_steps, numbers="")
        self._progress.start()
        self._complete = folder / "wandb" / "complete-to-step"
        if config.wandb != "disabled":
            self._run = self._start_wandb(name, settings)
            self._send_what_was_lost()

    def _identity(self) -> str:
        """What W&B knows this run by; it lies beside what was sent, and was there before the first checkpoint."""
        path = self.folder / "wandb" / "run-id"
        path.parent.mkdir(exist_ok=True)
        if not path.is_file():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(secrets.token_hex(4), encoding="utf-8")
            temporary.replace(path)
        return path.read_text(encoding="utf-8")

    def _start_wandb(self, name: str, settings: dict[str, Any]) -> Any:
        # Audio in tables is staged in these two folders; inside the run directory it can be moved and synced with it.
        for variable, part in (("WANDB_DATA_DIR", "data"), ("WANDB_CACHE_DIR", "cache")):
            os.environ.setdefault(variable, str((self.folder / "wandb" / part).resolve()))
            Path(os.environ[variable]).mkdir(parents=True, exist_ok=True)
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb

            identity, mode = self._identity(), self.config.wandb
            if mode == "auto":
                mode = "online" if has_key() else "offline"
            for attempt in dict.fromkeys((mode, "offline")):
                try:
                    run = wandb.init(
                        project=self.config.project,
                        entity=self.config.entity,
                        group=self.config.group,
                        tags=list(self.config.tags),
                        name=name,
                        id=identity,
                        resume="allow",
                        dir=self.folder,
                        mode=attempt,
                        config=settings,
                        settings=wandb.Settings(init_timeout=20, finish_timeout=60, finish_timeout_raises=False),
                    )
                except Exception as error:
                    log.warning("W&B %s failed (%s)", attempt, str(error).strip().splitlines()[:1])
                    continue
                if attempt == "offline":
                    log.info("W&B is offline: look at it with `wandb leet %s`, send it with `wandb sync`", run.dir)
                run.define_metric("trainer/step")
                run.define_metric("*", step_metric="trainer/step")
                return run
        except Exception as error:
            log.warning("W&B is not used (%s)", error)
        return None

    def _send_what_was_lost(self) -> None:
        """After a kill, send again what W&B may still have had in memory; after a graceful end there is nothing."""
        try:
            complete = int(self._complete.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            complete = 0
        for line in (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["step"] > complete:
                self._send(row)

    def train(self, row: dict[str, Any], line: str) -> None:
        """One step: a row of numbers, and what the progress line says."""
        if not self.active:
            return
        self._progress.update(self._task, completed=row["step"], numbers=line)
        now = time.monotonic()
        if self._progress.disable and now - self._last_line >= self.config.console_seconds:
            self._last_line = now
            print(f"step {row['step']}  {line}", file=sys.stderr, flush=True)
        if row["step"] % self.config.log_every_steps == 0:
            self._row({"kind": "train", **row})

    def validation(self, row: dict[str, Any]) -> None:
        """One validation: a row of numbers."""
        if not self.active:
            return
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
        self.say(f"validation at step {row['step']}: {numbers}")
        self._row({"kind": "validation", **row})

    def _row(self, row: dict[str, Any]) -> None:
        # JSON has no NaN: a number that is not finite becomes null.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        self._last_step = row["step"]
        self._send(row)

    def _send(self, row: dict[str, Any]) -> None:
        prefix = "train" if row["kind"] == "train" else "valid"
        numbers = {f"{prefix}/{k}": v for k, v in row.items() if k not in ("kind", "step", "epoch")}
        self._wandb({**numbers, "trainer/step": row["step"], "trainer/epoch": row["epoch"]})

    def table(self, step: int, epoch: int, name: str, rows: Sequence[tuple[dict[str, str | float], Media]]) -> None:
        """A table with sound in W&B."""
        if self._run is None or not rows:
            return
        try:
            import wandb

            columns = [*rows[0][0], *(["audio"] if rows[0][1].audio is not None else [])]
            table = wandb.Table(columns=columns)
            for cells, media in rows:
                sound = [] if media.audio is None else [wandb.Audio(media.audio, sample_rate=media.sample_rate_hz)]
                table.add_data(*cells.values(), *sound)
        except Exception as error:
            log.warning("the W&B table was not made: %s", error)
            return
        self._wandb({name: table, "trainer/step": step, "trainer/epoch": epoch})

    def _wandb(self, values: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(values)
        except Exception as error:
            log.warning("W&B stopped taking numbers, it is left alone from here on: %s", error)
            self._run = None

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self.active:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def finish(self, exit_code: int = 0) -> None:
        """Close everything; waits for W&B a minute at most."""
        if not self.active:
            return
        self._progress.stop()
        self._metrics.close()
        if self._run is not None:
            try:
                self._run.finish(exit_code=exit_code)
                if self._last_step:
                    self._complete.write_text(str(self._last_step), encoding="utf-8")
            except Exception as error:
                log.warning("W&B did not finish: %s", error)


def has_key() -> bool:
    """Whether W&B would find a key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    netrc = Path(os.environ.get("NETRC", Path.home() / ".netrc"))
    try:
        return "wandb" in netrc.read_text(encoding="utf-8")
    except OSError:
        return False
