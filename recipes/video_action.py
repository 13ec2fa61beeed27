"""Which action a clip shows: from joints of a body, from sensors on it, or from the frames of a video.

A stack of recurrent layers reads the segment of a clip that `data.sampling` takes; the class is read from the mean of
its outputs over time, or from the last one. The default data are gestures measured by a watch: motion, not video.

Sources: Li et al. 2018, arXiv:1803.04831, and Li et al. 2019, arXiv:1910.06251 (deep residual IndRNN on skeletons);
Donahue et al. 2015, arXiv:1411.4389 (a recurrent net over a convolutional one).
"""

from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from rich.console import Console
from torch import Tensor, nn

from trainer.config import Config
from trainer.data.actions import ActionsConfig, ActionsDataset
from trainer.data.dataset import Batch
from trainer.data.frames import CNNConfig
from trainer.data.generated import GeneratedConfig
from trainer.data.parallel import Display
from trainer.data.videos import VideosConfig
from trainer.metrics import Loss, Mean
from trainer.models.readout import Output
from trainer.models.rnn import RNNConfig
from trainer.recipe import Inputs, Recipe, Row, RunConfig, Split, State, StepOutput, wants_scores


class ActionModelConfig(Config):
    """A recurrent stack, and what reads the class from it."""

    rnn: RNNConfig = RNNConfig()
    head: Literal["mean", "last"] = "mean"
    """Of the stack's outputs: their mean over the frames that exist, or the last one (of each direction)."""
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Share of the target that is spread over all classes in training (Szegedy et al. 2016, arXiv:1512.00567)."""


class ActionsRunConfig(RunConfig):
    """A run of the video_action recipe."""

    data: ActionsConfig = ActionsConfig()
    plan: GeneratedConfig = GeneratedConfig(micro_batch_samples=16)
    model: ActionModelConfig = ActionModelConfig()


class ActionNet(nn.Module):
    """Segments to logits of classes.

    Args:
        config: of the stack and the head.
        frame_shape: (D,), or (rows, columns, 3) of pictures.
        num_classes: V.
        cnn: of pictures.

    Shape:
        x: (B, T, ...), lengths: (B,), noise_keys: (B,) int64 or None -> (B, V)
    """

    def __init__(
        self, config: ActionModelConfig, frame_shape: tuple[int, ...], num_classes: int, cnn: CNNConfig | None
    ) -> None:
        super().__init__()
        self.head, self.directions = config.head, config.rnn.directions
        self.cnn = cnn.build() if cnn is not None else None
        self.rnn = config.rnn.build(frame_shape[0] if self.cnn is None else self.cnn.num_features)
        self.output = Output(config.rnn.output_size, num_classes)

    def forward(self, x: Tensor, lengths: Tensor, noise_keys: Tensor | None = None) -> Tensor:
        if self.cnn is not None:
            x = self.cnn(x)
        y, _ = self.rnn(x, lengths, noise_keys)  # zeros past each length
        logits: Tensor = self.output(self._read(y, lengths.clamp(min=1)))
        return logits.float()

    def _read(self, y: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, H) -> (B, H)."""
        if self.head == "mean":
            return y.sum(1) / lengths[:, None]
        last = y[torch.arange(len(y), device=y.device), lengths - 1]
        if self.directions == "forward":
            return last
        if self.directions == "sum":  # what came from behind is read where it ends
            return last + y[:, 0]
        forward, _ = last.chunk(2, -1)
        return torch.cat([forward, y[:, 0].chunk(2, -1)[1]], -1)


class VideoAction(Recipe[ActionsRunConfig]):
    """Classes of clips; the best checkpoint is that of the lowest share of errors."""

    monitor = "error"

    def prepare(self) -> None:
        with Display(Console()) as progress:
            said = self.config.data.prepare(progress)
        print(said)

    def build_model(self) -> ActionNet:
        data = self.config.data
        clips = data.clips("train", self.config.seed)
        return ActionNet(self.config.model, data.frame_shape(clips), len(clips.classes), self._trained_cnn())

    def _trained_cnn(self) -> CNNConfig | None:
        corpus = self.config.data.corpus
        return corpus.cnn if isinstance(corpus, VideosConfig) and corpus.cnn.where == "model" else None

    def build_dataset(self, split: Split) -> ActionsDataset:
        config = self.config
        return ActionsDataset(config.data, split, config.plan, config.seed)

    def inputs(self) -> Inputs | None:
        return Inputs("inputs", relative=True) if self._trained_cnn() is None else None

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, ActionNet)
        clips = self.config.data.clips("test", self.config.seed)
        most = max((clips.labels == label).mean() for label in range(len(clips.classes)))
        return {**model.rnn.describe(), "to beat": f"{100 * most:.1f} % of the test are of the most frequent class"}

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        valid, targets, lengths = batch["valid"], batch["targets"], batch["lengths"]
        segments = len(lengths) // len(targets)  # of each clip
        lengths = lengths * valid.repeat_interleave(segments)
        logits = model(batch["inputs"], lengths, batch["noise_keys"].repeat_interleave(segments))  # (B S, V)
        each = logits.log_softmax(-1).unflatten(0, (-1, segments))  # (B, S, V)
        log_p = each.logsumexp(1)  # of the mean probability, up to a constant
        smoothing = self.config.model.label_smoothing if model.training else 0.0
        nats = F.cross_entropy(log_p, targets, reduction="none", label_smoothing=smoothing)
        count = float(valid.sum())
        output = StepOutput({"classes": Loss(torch.where(valid, nats, 0.0).sum(), count, "samples")})
        if wants_scores(model):
            guesses = log_p.argmax(-1)
            wrong = (guesses != targets) & valid
            output.metrics["error"] = Mean(float(wrong.sum()), count)
            output.metrics["accuracy"] = Mean(count - float(wrong.sum()), count)
            alone = (each.argmax(-1) == targets[:, None]) & valid[:, None]
            output.metrics["segment_accuracy"] = Mean(float(alone.sum()), count * segments)
            names = self.config.data.clips("train", self.config.seed).classes
            output.rows = [
                Row(key, float(bad), 1.0, {"class": names[target], "guess": names[guess], "clip": name})
                for key, bad, target, guess, name, real in zip(
                    batch["keys"],
                    wrong.tolist(),
                    targets.tolist(),
                    guesses.tolist(),
                    batch["names"],
                    valid.tolist(),
                    strict=True,
                )
                if real
            ]
        return output


recipe = VideoAction
