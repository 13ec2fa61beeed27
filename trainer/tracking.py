"""Where numbers go: `metrics.jsonl` always, a progress line, and Weights & Biases. Only rank 0 tracks.

W&B never blocks a run and never ends it: without a key, a server or the package itself it goes offline or stays away,
and says so once. This is the only module that knows it.
"""

import contextlib
import json
import logging
import math
import os
import secrets
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from trainer.config import Config
from trainer.data.dataset import Media
from trainer.run import Lines

log = logging.getLogger(__name__)


Mode = Literal["online", "offline", "disabled"]
MODES: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}
"""Values of WANDB_MODE, with W&B's older names."""
ANSWER_SECONDS = 5.0
"""A server of W&B that gives no answer in this time is away."""
INIT_SECONDS = 20.0
"""Time W&B gets to begin a run with a server that answers."""
FINISH_SECONDS = 60.0
"""Time W&B gets at the end of a run to send what is left."""


class TrackingConfig(Config):
    """Weights & Biases and the console."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: what WANDB_MODE says, else online if a key is at hand, and offline otherwise."""
    project: str = "ostinato"
    entity: str | None = None
    group: str | None = None
    tags: tuple[str, ...] = ()
    log_every_steps: int = Field(1, ge=1)
    """Steps between two rows of `metrics.jsonl` and two points in W&B."""
    console_seconds: float = Field(15.0, gt=0)
    """Seconds between two lines where the output is not a terminal."""


class Markup(str):
    """A cell that is HTML."""


class Tracker:
    """Writes a run's numbers.

    Args:
        config: see there.
        folder: the run directory.
        name: of the run.
        settings: the run's configuration, shown in W&B.
        total_steps: for the progress bar.
        active: false on every rank but the first: does nothing.
        bar: show how far the run is, where somebody watches.
        patience_seconds: W&B gets no longer than this to begin or to end the run.
    """

    def __init__(
        self,
        config: TrackingConfig,
        folder: Path,
        name: str,
        settings: dict[str, Any],
        total_steps: int,
        active: bool,
        bar: bool = True,
        patience_seconds: float = math.inf,
    ) -> None:
        self.config = config
        self._patience = patience_seconds
        self.folder = folder
        self.active = active
        self._run: Any = None
        self._variables: list[str] = []  # of the environment, set for this run
        self._last_line = 0.0
        self._last_step = 0
        if not active:
            return
        self._metrics = Lines(folder / "metrics.jsonl")
        self._console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TextColumn("{task.fields[numbers]}", markup=False),
            TimeElapsedColumn(),
            console=self._console,
            disable=not (bar and sys.stderr.isatty()),
        )
        self._task = self._progress.add_task(name, total=total_steps, numbers="")
        self._progress.start()
        self._complete = folder / "wandb" / "complete-offline"
        mode = self._mode()
        if mode != "disabled":
            self._run = self._start_wandb(mode, name, settings)
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

    def _mode(self) -> Mode:
        """online, offline or disabled."""
        if (given := self.config.wandb) != "auto":
            return given
        wanted = os.environ.get("WANDB_MODE", "").lower()
        if wanted and wanted not in MODES:
            log.warning("WANDB_MODE = %r is none of %s: W&B stays offline", wanted, ", ".join(MODES))
            return "offline"
        return MODES.get(wanted) or ("online" if has_key() else "offline")

    def _set_environment(self) -> None:
        """Stage the audio of tables inside the run directory, so that it can be moved and synced as a whole."""
        for variable, value in {
            "WANDB_DATA_DIR": str((self.folder / "wandb" / "data").resolve()),
            "WANDB_CACHE_DIR": str((self.folder / "wandb" / "cache").resolve()),
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_SILENT": "true",
        }.items():
            if variable not in os.environ:
                os.environ[variable] = value
                self._variables.append(variable)
        for variable in ("WANDB_DATA_DIR", "WANDB_CACHE_DIR"):
            Path(os.environ[variable]).mkdir(parents=True, exist_ok=True)

    def _restore_environment(self) -> None:
        """The next run of this process has folders of its own."""
        while self._variables:
            os.environ.pop(self._variables.pop(), None)

    def _start_wandb(self, mode: Mode, name: str, settings: dict[str, Any]) -> Any:
        try:
            self._set_environment()
            import wandb

            identity = self._identity()
            attempts: dict[Mode, None] = dict.fromkeys((mode, "offline"))
            for attempt in attempts:
                try:
                    if attempt == "online" and not answers(url := wandb.setup().settings.base_url):
                        raise ConnectionError(f"{url} gives no answer")
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
                        settings=wandb.Settings(
                            init_timeout=min(INIT_SECONDS, self._patience),
                            finish_timeout=min(FINISH_SECONDS, self._patience),
                            finish_timeout_raises=True,
                        ),
                    )
                except Exception as error:
                    log.warning("W&B %s failed (%s)", attempt, str(error).strip().splitlines()[:1])
                    wandb.teardown()  # else the run counts as in use, and the next attempt fails for that
                    continue
                if attempt == "offline":
                    log.info("W&B is offline: look at it with `wandb leet %s`, send it with `wandb sync`", run.dir)
                self._complete = self.folder / "wandb" / f"complete-{attempt}"
                run.define_metric("trainer/step")
                run.define_metric("*", step_metric="trainer/step")
                return run
        except Exception as error:
            log.warning("W&B is not used (%s)", error)
        self._restore_environment()
        return None

    def _send_what_was_lost(self) -> None:
        """Send again what W&B does not have for sure: after a kill, after an end without the server, and online what
        was offline before. After a graceful end there is nothing."""
        complete = 0
        for path in {self._complete, self.folder / "wandb" / "complete-online"}:  # who has seen it online has seen it
            with contextlib.suppress(OSError, ValueError):
                complete = max(complete, int(path.read_text(encoding="utf-8")))
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
            self._show(lambda: print(f"step {row['step']}  {line}", file=sys.stderr, flush=True))
        if row["step"] % self.config.log_every_steps == 0:
            self._row({"kind": "train", **row})

    def validation(self, row: dict[str, Any], more: dict[str, float]) -> None:
        """One validation: a row of numbers, and more for it that nobody wants to read as they come."""
        if not self.active:
            return
        numbers = "  ".join(f"{k} {v:.4g}" for k, v in row.items() if isinstance(v, float))
        self.say(f"validation at step {row['step']}: {numbers}")
        self._row({"kind": "validation", **row, **more})

    def _row(self, row: dict[str, Any]) -> None:
        # JSON has no NaN: a number that is not finite becomes null.
        row = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}
        self._metrics.write(row)
        self._last_step = row["step"]
        self._send(row)

    def _send(self, row: dict[str, Any]) -> None:
        prefix = "train" if row["kind"] == "train" else "valid"
        numbers = {f"{prefix}/{k}": v for k, v in row.items() if k not in ("kind", "step", "epoch")}
        self._wandb({**numbers, "trainer/step": row["step"], "trainer/epoch": row["epoch"]})

    def flush(self) -> bool:
        """Write numbers that could not be written before; whether none is left."""
        return not self.active or self._metrics.flush()

    def table(self, step: int, epoch: int, name: str, rows: Iterable[tuple[dict[str, str | float], Media]]) -> None:
        """A table with sound and pictures in W&B; the rows are asked for only if it has one."""
        if self._run is None or not (rows := list(rows)):
            return
        try:
            import wandb

            from trainer.plots import seen

            kinds = [kind for kind in ("audio", "picture", "image") if getattr(rows[0][1], kind) is not None]
            table = wandb.Table(columns=[*rows[0][0], *kinds])
            show = {
                "audio": lambda media: wandb.Audio(media.audio, sample_rate=media.sample_rate_hz),
                "picture": lambda media: wandb.Image(media.picture),
                "image": lambda media: wandb.Image(seen(media).convert("RGB")),
            }
            for cells, media in rows:
                texts = [wandb.Html(x, inject=False) if isinstance(x, Markup) else x for x in cells.values()]
                table.add_data(*texts, *(show[kind](media) for kind in kinds))
        except Exception as error:
            log.warning("the W&B table was not made: %s", error)
            return
        self._wandb({name: table, "trainer/step": step, "trainer/epoch": epoch})

    def show(self, step: int, epoch: int, prefix: str, numbers: dict[str, float], pictures: dict[str, Path]) -> None:
        """Numbers and pictures in W&B, beside the steps."""
        if self._run is None:
            return
        try:
            import wandb

            images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
        except Exception as error:
            log.warning("the pictures for W&B were not made: %s", error)
            images = {}
        values = {f"{prefix}/{name}": value for name, value in {**numbers, **images}.items()}
        self._wandb({**values, "trainer/step": step, "trainer/epoch": epoch})

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
            self._show(lambda: self._console.print(text, markup=False, highlight=False, soft_wrap=True))

    def _show(self, write: Callable[[], None]) -> None:
        """Write to the console; where nobody reads it any more (`| head`), the run goes on without one."""
        try:
            write()
        except (OSError, SystemExit):  # the second is rich's answer to a closed pipe
            with contextlib.suppress(OSError):  # else what is left in it is tried, and fails, at the very end
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())

    def finish(self, exit_code: int = 0) -> None:
        """Close everything; waits for W&B a minute at most."""
        if not self.active:
            return
        self._progress.stop()
        self._metrics.close()
        if self._run is not None:
            try:
                import wandb

                try:
                    self._run.finish(exit_code=exit_code)
                finally:
                    wandb.teardown()  # its service keeps the folders it was started with
                if self._last_step:
                    self._complete.write_text(str(self._last_step), encoding="utf-8")
            except Exception as error:
                log.warning(
                    "W&B did not finish (%s): its numbers are in %s; `wandb sync` or a new start of the run sends them",
                    error,
                    self.folder / "wandb",
                )
        self._restore_environment()


def answers(url: str) -> bool:
    """Whether a server gives any answer, soon: W&B itself would wait for minutes at the start of a run."""
    import requests

    try:
        requests.head(url, timeout=ANSWER_SECONDS, allow_redirects=False)
    except requests.RequestException:
        return False
    return True


def has_key() -> bool:
    """Whether W&B would find a key without asking."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        netrc = Path(os.environ.get("NETRC") or Path.home() / ".netrc")
        return "wandb" in netrc.read_text(encoding="utf-8")
    except (OSError, ValueError, RuntimeError):  # none, not text, no home
        return False
