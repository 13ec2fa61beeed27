"""What a sweep's file says."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from trainer import config as configuration
from trainer import keyed
from trainer.config import PROJECT, Config, Source

OWN_KEYS = ("seed", "name", "runs_dir")
"""Keys of a run that the sweep sets itself."""


class DrawConfig(Config):
    """Random values of one key: one of `choices`, or a number between `low` and `high`."""

    choices: tuple[Any, ...] = ()
    low: float | None = None
    high: float | None = None
    log: bool = False
    """Uniform in the logarithm."""
    whole: bool = False
    """Round to whole numbers."""

    @model_validator(mode="after")
    def _one_of_both(self) -> "DrawConfig":
        bounds = self.low is not None and self.high is not None
        if bounds == bool(self.choices):
            raise ValueError("wanted either choices, or low and high")
        if self.low is not None and self.high is not None and (self.low > self.high or (self.log and self.low <= 0)):
            raise ValueError(f"low = {self.low} and high = {self.high}: wanted low <= high, and above 0 where log")
        return self

    def draw(self, *parts: int | str) -> Any:
        """The value that the parts name."""
        share = keyed.number(*parts)
        if self.low is None or self.high is None:
            return self.choices[int(share * len(self.choices))]
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = low + share * (high - low)
        value = math.exp(value) if self.log else value
        return round(value) if self.whole else value


class VariantConfig(Config):
    """One line of the table: settings that belong together."""

    config: str | None = None
    """Null: that of the sweep."""
    overrides: tuple[str, ...] = ()
    """key=value, after those of the sweep."""
    paper: str = ""
    """What a paper reports, for the table."""
    wanted: str = ""
    """The bar that was set, for the table."""
    chance: float | None = None
    """What no learning gives, drawn as a line."""
    family: str = ""
    """Variants of one family differ in a strength. The one whose mean on validation is best stands for it: the table
    marks it with a star."""


class SweepConfig(Config):
    """A sweep."""

    config: str | tuple[str, ...] | None = None
    """CONFIG of `train`; several of them: every variant is run with each, and compared with the first variant of it."""
    overrides: tuple[str, ...] = ()
    """key=value for every run."""
    test: bool = False
    """Score the best checkpoint of each run, as validation chose it, on the test split too."""
    variants: dict[str, VariantConfig] = Field(default_factory=dict)
    """Settings by name."""
    grid: dict[str, tuple[Any, ...]] = Field(default_factory=dict)
    """Values by key: every combination is run."""
    random: dict[str, DrawConfig] = Field(default_factory=dict)
    """Draws by key, instead of a grid."""
    samples: PositiveInt = 20
    """Combinations drawn, where `random` is given; equal ones are run once."""
    seeds: tuple[int, ...] = Field((0, 1, 2), min_length=1)
    analyze: NonNegativeInt = 0
    """So many samples of the test split are perturbed once a run is trained, as by `analyze`; 0: no analysis."""
    conclusion: str | None = None
    """A file in recipes/, without its ending, whose `conclude` makes tables and pictures of all finished runs."""
    workers: PositiveInt | None = None
    """Processes; null: one a core, or one a GPU."""
    runs_dir: Path = Path("runs")

    @model_validator(mode="after")
    def _complete(self) -> "SweepConfig":
        if self.conclusion is not None and not (PROJECT / "recipes" / f"{self.conclusion}.py").is_file():
            raise ValueError(f"conclusion = {self.conclusion!r}: there is no such file in recipes/")
        if self.grid and self.random:
            raise ValueError("grid and random are both given: leave one out")
        given = [
            o.partition("=")[0] for o in (*self.overrides, *(o for v in self.variants.values() for o in v.overrides))
        ]
        if own := [key for key in (*self.grid, *self.random, *given) if key in OWN_KEYS]:
            raise ValueError(
                f"{own[0]}: is set by the sweep itself; take seeds, runs_dir and the file's own name instead"
            )
        if self.config is None and any(v.config is None for v in [*self.variants.values()] or [VariantConfig()]):
            raise ValueError("config is missing: name it, or one in each of the variants")
        return self


def load(path: Path, arguments: Sequence[str] = ()) -> SweepConfig:
    """A sweep's file.

    Args:
        arguments: key=value, of the file where it knows the key, and else for every run.

    Raises:
        UserError: anything wrong with it.
    """
    own = [text for text in arguments if text.partition("=")[0].split(".")[0] in SweepConfig.model_fields]
    source = configuration.gather(path, own)
    sweep = configuration.validate(SweepConfig, source)
    if rest := [text for text in arguments if text not in own]:
        configuration.override(Source(), rest)  # refuses what is no key=value
        source.set("overrides", [*sweep.overrides, *rest], "the command line")
        sweep = configuration.validate(SweepConfig, source)
    return sweep
