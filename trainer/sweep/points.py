"""The runs of a sweep, and what they left in their folders."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer import config as configuration
from trainer.config import Config, show
from trainer.errors import UserError
from trainer.run import RunDirectory
from trainer.sweep.config import SweepConfig, VariantConfig

RESULT = "result.json"
LENGTHS = ("max_steps", "max_epochs", "validation.early_stop_after")
"""Keys that a resumed run may change, and that its result depends on."""


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    name: str
    """Of its run directory."""
    variant: str
    """Of its line in the table: all but the seed."""
    seed: int
    config: str
    overrides: tuple[str, ...]
    label: str = ""
    """Of the variant in the file."""
    test: bool = False
    """See `SweepConfig`; `analyze` too."""
    analyze: int = 0

    def command(self) -> str:
        """The same run by hand."""
        return " ".join(["./launch.sh train", self.config, *(f"'{o}'" if " " in o else o for o in self.overrides)])


def points(sweep: SweepConfig, name: str) -> list[Point]:
    """All runs, equal ones once; seed by seed, so that what is stopped early has every variant of the first seeds.

    Args:
        name: of the sweep.
    """
    found = dict[str, Point]()
    for label, variant in (sweep.variants or {"": VariantConfig()}).items():
        given = variant.config or sweep.config
        assert given is not None
        configs = (given,) if isinstance(given, str) else given
        for config, settings in itertools.product(configs, _settings(sweep, name)):
            chosen = [f"{key}={json.dumps(value)}" for key, value in settings.items()]
            where = [config] if len(configs) > 1 else []
            line = ", ".join([*where, *([label] if label else []), *chosen]) or config
            overrides = (*sweep.overrides, *variant.overrides, *chosen)
            digest = hashlib.sha256(json.dumps([config, overrides]).encode()).hexdigest()[:6]
            slug = re.sub(r"[^A-Za-z0-9.]+", "-", line).strip("-")[:60]
            for seed in sweep.seeds:
                more = (f"seed={seed}", f"runs_dir={sweep.runs_dir / name}", f"name={slug}-{digest}-s{seed}")
                quiet = (f"tracking.group={name}", "tracking.tags=[sweep]")
                every = (*quiet, *overrides, *more)
                run = more[2][5:]
                found[run] = Point(run, line, seed, config, every, label, sweep.test, sweep.analyze)
    return sorted(found.values(), key=lambda point: sweep.seeds.index(point.seed))


def _settings(sweep: SweepConfig, name: str) -> Iterator[dict[str, Any]]:
    if sweep.random:
        for i in range(sweep.samples):
            yield {key: draw.draw(name, i, key) for key, draw in sweep.random.items()}
        return
    for values in itertools.product(*sweep.grid.values()):
        yield dict(zip(sweep.grid, values, strict=True))


def result_of(sweep: SweepConfig, name: str, point: Point) -> dict[str, Any] | None:
    """What a finished run left; None where it lacks what the point asks for."""
    path = sweep.runs_dir / name / point.name / RESULT
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    lacks = (point.analyze and "analysis" not in found) or (point.test and not found["test"])
    return None if lacks else found


def check_same(folder: Path, config: Config) -> None:
    """A run's name holds what the sweep sets: what its CONFIG file said then must still be so.

    Raises:
        UserError: the run in the folder is of another configuration.
    """
    run = RunDirectory(folder)
    if not run.config.is_file():
        return
    saved = run.saved_config()
    old, new = configuration.flatten(saved), configuration.flatten(configuration.plain(config))
    different = configuration.differences(saved, config)
    different += [(key, old[key], new[key]) for key in LENGTHS if key in old and old[key] != new[key]]
    if different:
        lines = "".join(f"{show(run.config)}: {key} = {old!r}, now {new!r}\n" for key, old, new in different)
        raise UserError(
            f"{lines}the run is of before the configuration changed: put the values back, or move {show(folder)} away"
        )
