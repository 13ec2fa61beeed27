"""What a recipe is: a config, a model, data, and the loss of one micro-batch. A new task is one file in `recipes/`.

The engine calls `build_model`, `build_dataset` and `step`, and knows nothing else of the task.
"""

import difflib
import importlib
import math
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Literal, TypeVar

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from trainer import config as configuration
from trainer.checkpoint import CheckpointConfig
from trainer.config import PROJECT, Config, Free
from trainer.data.buckets import BucketedConfig
from trainer.data.dataset import Batch, Dataset, Media
from trainer.data.generated import GeneratedConfig
from trainer.data.stream import StreamConfig
from trainer.distributed import Precision, ZeroConfig
from trainer.errors import UserError
from trainer.metrics import Loss, Mean
from trainer.optim import AdamWConfig, CosineConfig, OptimizerConfig, ScheduleConfig
from trainer.restart import LaunchConfig
from trainer.spikes import SpikeConfig
from trainer.tracking import TrackingConfig

Split = Literal["train", "valid", "test"]

FEATURES = ("kind", "num_bands", "window_ms", "hop_ms")
MADE_FOR = ("model.", "data.sample_rate_hz", *(f"data.features.{name}" for name in FEATURES))
"""Keys on which it depends what trained weights compute."""

State = dict[str, Tensor]
"""What a micro-batch hands to the next one of its number: the last hidden states of a stream, by name."""


@dataclass
class Row:
    """One sample of an evaluation, for tables: its key, its errors (more is worse), and what to show."""

    key: str
    errors: float
    length: float
    columns: dict[str, str]
    aligned_by: Literal["character", "word"] = "character"
    """What is put under what, where the columns are a reference and a hypothesis."""
    facts: dict[str, Any] = field(default_factory=dict)
    """More that the file of an evaluation holds, as JSON values: `seconds` and `speaker`, by which errors are grouped,
    and what the recipe likes to add."""

    @property
    def rate(self) -> float:
        return self.errors / max(self.length, 1.0)


@dataclass
class StepOutput:
    """What a recipe returns for one micro-batch."""

    losses: dict[str, Loss]
    metrics: dict[str, Mean] = field(default_factory=dict)
    penalty: Tensor | None = None
    """Added once a step, whatever the accumulation and the number of ranks: a function of the weights alone. What the
    model's regularisers ask for is not in it: the engine adds that."""
    rows: list[Row] = field(default_factory=list)
    """In evaluation: a row a sample."""
    state: State | None = None
    """For the next micro-batch of this number; the engine detaches it."""

    def loss(self) -> Tensor:
        """Of this micro-batch by itself: the sum of its losses, each over its own count. A training does otherwise."""
        terms = (x.sum * (x.weight / max(x.count, 1.0)) for x in self.losses.values())
        return sum(terms, start=torch.zeros(()))


def wants_scores(model: nn.Module) -> bool:
    """Whether metrics and rows are asked for: in evaluation, unless its loss is differentiated, as attacks do."""
    return not model.training and not torch.is_grad_enabled()


@dataclass(frozen=True)
class Wish:
    """What a recipe is asked to generate."""

    seed: int = 0
    length: int | None = None
    """Of what is new, in the recipe's own steps (frames, characters, words); None: what the recipe finds fitting."""
    temperature: float = 1.0
    """Below 1 the likely becomes more likely."""
    prompt: str | None = None
    """What to go on from: text, or a file's name, as the recipe says."""


@dataclass(frozen=True)
class Generated:
    """One piece of text, music, ... that a model wrote."""

    text: str
    """What a person reads on the console: the piece itself, or what there is to say of it."""
    files: dict[str, bytes]
    """Contents by ending, such as ".mid"; the text is kept as it is."""
    media: Media = field(default_factory=Media)
    """To hear or see in W&B."""


@dataclass(frozen=True)
class Inputs:
    """What of a batch `analyze` may perturb."""

    name: str
    """Of the entry: floating point, (B, T, ...); what is past `lengths`, if a batch has them, stays as it is."""
    low: float = -math.inf
    """Perturbed values are kept within low .. high."""
    high: float = math.inf
    relative: bool = False
    """Sizes are shares of each sample's root mean square, which in dB are signal-to-noise ratios."""
    frame: int = 1
    """Steps of T that are lost together where frames are dropped."""
    binary: bool = False
    """Zeros and ones: some are turned into the other, too."""
    overrides: tuple[str, ...] = ()
    """key=value that bring the entry into the batch, e.g. sound in place of features."""

    @classmethod
    def sound(cls, frame: int) -> "Inputs":
        """Of speech: the sound, from which the model computes its features then."""
        overrides = ("data.features.where=model",)
        return cls("audio", low=-1.0, high=1.0, relative=True, frame=frame, overrides=overrides)


class ValidationConfig(Config):
    """When the validation split is scored and what follows from it."""

    every_steps: Free[int | None] = Field(None, ge=1)
    """Null: at the end of each epoch."""
    early_stop_after: Free[int | None] = Field(None, ge=1)
    """Stop after so many validations without a new best; null: never."""
    table_rows: Free[int] = Field(8, ge=0)
    """Samples in the table of W&B, with sound and pictures: half of them the worst, half the same each time."""
    samples: Free[int] = Field(0, ge=0)
    """Pieces that the model writes after each validation, from the seeds 0, 1, ..., for W&B; see the verb generate."""


class RunConfig(Config):
    """Everything about a run. A recipe adds `data` and `model`."""

    recipe: str
    """File in `recipes/`, without the ending."""
    name: Free[str | None] = None
    """Name of the run directory; null: that of the config file."""
    runs_dir: Free[Path] = Path("runs")
    """Where run directories are made."""
    seed: int = Field(0, ge=0)
    max_epochs: Free[PositiveInt] = 20
    """Passes over the training data. The schedule keeps the length it had when the run began."""
    max_steps: Free[int | None] = Field(None, ge=1)
    """Stop after so many optimizer steps; null: at `max_epochs`."""
    num_workers: Free[int] = Field(1, ge=0)
    """Loader threads of each rank; 0 loads a batch when it is wanted."""
    max_bad_share: Free[float] = Field(0.01, ge=0, le=1)
    """Stop when more than this share of the samples turned out bad."""
    max_missing_share: Free[float] = Field(0.1, ge=0, le=1)
    """Stop when more than this share of an epoch's samples did not come from where they lie (`data.remote`). They count
    nothing in that epoch and are asked for again in the next."""
    quarantine: Free[Path | None] = None
    """quarantine.jsonl of another run, or lines {"key": ...} of your own: these samples are left out from the start. A
    file that is named when a run is resumed counts from its next epoch on."""
    max_refused_steps: Free[int] = Field(20, ge=0)
    """Stop after so many steps with a non-finite gradient."""
    init_from: Free[Path | None] = None
    """Take the weights (nothing else) of another run's best checkpoint. Only parts that depend on the labels may have
    another shape there; what was not taken is told."""
    freeze: tuple[str, ...] = ()
    """Names of modules or weights that are not trained, as [subsampling, rnn.layers.0]."""
    precision: Precision = "fp32"
    """bf16, fp16 (GPUs only): matrix products in that type; weights, losses and reductions stay in float32."""
    activation_checkpointing: Free[bool] = False
    """Compute a recurrent layer again in the backward pass instead of keeping its activations: less memory, more time,
    the same numbers."""
    profile: Free[bool] = False
    """Write a trace of a few steps to RUN/profile/."""
    plan: BucketedConfig | GeneratedConfig | StreamConfig = BucketedConfig()
    """A recipe says which of them its data follows."""
    optimizer: OptimizerConfig = AdamWConfig()
    schedule: ScheduleConfig = CosineConfig()
    zero: Free[ZeroConfig] = ZeroConfig()
    validation: ValidationConfig = ValidationConfig()
    checkpoint: Free[CheckpointConfig] = CheckpointConfig()
    spikes: Free[SpikeConfig] = SpikeConfig()
    tracking: Free[TrackingConfig] = TrackingConfig()
    launch: Free[LaunchConfig] = LaunchConfig()

    @model_validator(mode="after")
    def _enough_checkpoints(self) -> "RunConfig":
        back, kept = self.spikes.checkpoints_back, self.checkpoint.keep_last
        if self.spikes.factor is not None and back > kept:
            raise ValueError(
                f"spikes.checkpoints_back = {back} with checkpoint.keep_last = {kept}: raise the second to {back}"
            )
        return self


C = TypeVar("C", bound=RunConfig)


class Recipe(Generic[C]):
    """A task.

    Args:
        config: of the run.

    Attributes:
        monitor: the metric or loss of the validation by which the best checkpoint is chosen; lower is better.
        heads: names of the model's modules that depend on the labels: a run with `init_from` may draw them anew.
    """

    monitor: str
    heads: tuple[str, ...] = ("output",)

    def __init__(self, config: C) -> None:
        self.config = config

    @classmethod
    def config_class(cls) -> type[RunConfig]:
        """The `C` of `Recipe[C]`."""
        for base in getattr(cls, "__orig_bases__", ()):
            if typing.get_origin(base) is Recipe:
                found: type[RunConfig] = typing.get_args(base)[0]
                return found
        raise TypeError(f"{cls.__name__} does not say Recipe[ItsRunConfig]")

    def prepare(self) -> None:
        """Make the data set that `build_dataset` reads; nothing by default."""

    def build_model(self) -> nn.Module:
        """The model, with any weights: the engine draws them anew from (seed, name)."""
        raise TypeError(f"{type(self).__name__} lacks build_model")

    def build_dataset(self, split: Split) -> Dataset:
        """One split."""
        raise TypeError(f"{type(self).__name__} lacks build_dataset")

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        """Losses, and where `wants_scores(model)` metrics and rows, of one micro-batch.

        `state` is what the micro-batch of the same number left in the step before; None in the first step of an epoch
        or evaluation, after a refused step, and in a dummy. A recipe that carries nothing ignores it.

        Places with `valid` false count 0 and still go through the model, so that all ranks run the same passes.
        """
        raise TypeError(f"{type(self).__name__} lacks step")

    def media(self, model: nn.Module, dataset: Dataset, key: str) -> Media:
        """What a person would hear and see of a sample, and what `model`, in evaluation mode, made of it where that can
        be drawn."""
        return dataset.media(key)

    def generate(self, model: nn.Module, wish: Wish) -> Generated:
        """One piece, drawn from the wish's seed alone; `model` is in evaluation mode, on the CPU or a GPU.

        Raises:
            UserError: the task has nothing to generate, or the wish cannot be met.
        """
        raise UserError(f"{self.config.name}: the recipe {self.config.recipe} has nothing to generate")

    def recogniser(self, weights: dict[str, Tensor], labels: dict[str, str], folder: Path) -> Any:
        """A `trainer.recogniser.Recogniser` with these weights.

        Args:
            labels: what the outputs stand for, as checkpoints say.
            folder: where a vocabulary may lie, else with the data.

        Raises:
            UserError: the task is no recognition of speech, or the labels cannot be had.
        """
        raise UserError(f"{self.config.name}: the recipe {self.config.recipe} recognises no speech")

    def utterances(self, split: Split, count: int) -> list[tuple[Tensor, str]]:
        """Some recordings of a split, as samples (N,), and what is said in them.

        Raises:
            UserError: there are none here.
        """
        raise UserError(f"{self.config.name}: the recipe {self.config.recipe} recognises no speech")

    def derive(self, values: dict[str, float]) -> dict[str, float]:
        """Numbers of an evaluation that follow from its means, such as the perplexity; none by default."""
        return {}

    def inputs(self) -> Inputs | None:
        """What noise and attacks of `analyze` change; None: the inputs are no numbers that bear it."""
        return None

    def describe(self, model: nn.Module) -> dict[str, str]:
        """Facts about the model for `plan` and the report, e.g. the share of the weights that is recurrent."""
        return {}


def known_recipes() -> list[str]:
    """Names of the files in `recipes/` that end in `recipe = TheirTask`; others draw conclusions from such runs."""
    files = (PROJECT / "recipes").glob("*.py")
    return sorted(p.stem for p in files if "\nrecipe = " in p.read_text(encoding="utf-8"))


def find_recipe(name: Any, origin: str) -> type[Recipe[Any]]:
    """The recipe class of a file in `recipes/`.

    Raises:
        UserError: there is no such file.
    """
    known = known_recipes()
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        hint = f"did you mean {near[0]}?" if near else "known recipes: " + ", ".join(known)
        raise UserError(f"{origin}: recipe = {name!r}: there is no such file in recipes/; {hint}")
    found: type[Recipe[Any]] = importlib.import_module(f"recipes.{name}").recipe
    return found


def load(config: str, overrides: Sequence[str] = ()) -> Recipe[Any]:
    """The recipe with its configuration, from a config name and `key=value` arguments.

    Raises:
        UserError: anything wrong with either, all at once.
    """
    path = configuration.find_file(config)
    source = configuration.gather(path, overrides)
    if "recipe" not in source.values:
        raise UserError(f"{configuration.show(path)}: recipe: is missing; add one of {', '.join(known_recipes())}")
    cls = find_recipe(source.values["recipe"], source.origin("recipe"))
    if source.values.get("name") is None:
        name = path.resolve().with_suffix("")
        configs = PROJECT / "configs"
        source.set("name", "-".join(name.relative_to(configs).parts) if configs in name.parents else name.stem, "")
    return cls(configuration.validate(cls.config_class(), source))


def from_plain(values: dict[str, Any], origin: str, overrides: Sequence[str] = ()) -> Recipe[Any]:
    """The recipe of a configuration saved in a run directory or checkpoint."""
    source = configuration.Source()
    for name, value in values.items():
        source.set(name, value, origin)
    configuration.override(source, overrides)
    cls = find_recipe(source.values.get("recipe"), origin)
    return cls(configuration.validate(cls.config_class(), source))


def of_trained(values: dict[str, Any], origin: str, overrides: Sequence[str]) -> Recipe[Any]:
    """The same of a run that is trained, with overrides.

    Raises:
        UserError: they change what its weights were made for.
    """
    trained, recipe = from_plain(values, origin), from_plain(values, origin, overrides)
    changed = configuration.differences(configuration.plain(trained.config), recipe.config)
    lines = [
        f"the command line: {name} = {new!r}: the run was trained with {old!r}"
        for name, old, new in changed
        if name.startswith(MADE_FOR)
    ]
    if lines:
        raise UserError("\n".join(lines) + "\na trained model keeps its shape: leave it out, or train another run")
    return recipe
