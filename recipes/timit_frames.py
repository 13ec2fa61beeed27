"""The next frame of a spectrum: log-magnitudes of speech, each predicted from all before it.

Sound at 8 kHz; frames of 256 samples each 128, Hann window; 129 bins of 10 log10(1e-5 + |X|^2), in dB of sound within
[-1, 1], not normalised. The error is the squared one, averaged over bins and over the frames that exist: padding is not
in the mean, other than in the code of Wisdom et al., so their figures are smaller by the share of frames that are real.
On TIMIT: sentences SA are left out, the development set (50 speakers) validates, the core test set (24) tests.

Source: Wisdom et al. 2016, arXiv:1611.00035, section 5.4; settings of Helfrich, Willmott & Ye 2018, arXiv:1707.09520.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import model_validator
from torch import Tensor, nn

from trainer.data.audio import FeaturesConfig
from trainer.data.buckets import BucketedConfig
from trainer.data.dataset import Batch
from trainer.data.prepare import prepare
from trainer.data.prepared import SpeechDataConfig
from trainer.data.speech import SpeechDataset
from trainer.metrics import Loss, Mean
from trainer.models.linear import Linear
from trainer.models.normalization import frame_mask
from trainer.models.rnn import RNNConfig
from trainer.recipe import Inputs, Recipe, Row, RunConfig, Split, State, StepOutput, wants_scores

WINDOW, HOP = 256, 128
BINS = WINDOW // 2 + 1


class FramesRunConfig(RunConfig):
    """A run of the timit_frames recipe."""

    data: SpeechDataConfig = SpeechDataConfig(sample_rate_hz=8000, features=FeaturesConfig(where="model"))
    plan: BucketedConfig = BucketedConfig()
    model: RNNConfig = RNNConfig()

    @model_validator(mode="after")
    def _takes_sound(self) -> "FramesRunConfig":
        if self.data.features.kind != "log_mel" or self.data.features.where != "model":
            raise ValueError(
                f"data.features = {{kind: {self.data.features.kind}, where: {self.data.features.where}}}: this recipe "
                "makes its spectra from sound; set data.features={kind: log_mel, where: model}"
            )
        return self


class Frames(nn.Module):
    """Sound to spectra, and a prediction of each frame but the first.

    Shape:
        audio: (B, N), lengths: (B,) samples, noise_keys: (B,) int64 or None
        returns: predictions and what they should have been, both (B, T - 1, 129), and how many frames of each row
        there are to predict (B,)
    """

    window: Tensor

    def __init__(self, config: RNNConfig) -> None:
        super().__init__()
        self.register_buffer("window", torch.hann_window(WINDOW), persistent=False)
        self.rnn = config.build(BINS)
        self.output = Linear(config.output_size, BINS)

    def spectra(self, audio: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """dB (B, T, 129) and the number of whole frames of each row (B,)."""
        audio = nn.functional.pad(audio.float(), (0, max(0, 2 * HOP + WINDOW - audio.shape[1])))  # two frames at least
        frames = audio.unfold(1, WINDOW, HOP) * self.window
        decibels = 10 * torch.log10(1e-5 + torch.fft.rfft(frames).abs().square())
        return decibels, ((lengths - WINDOW) // HOP + 1).clamp(min=0)

    def forward(
        self, audio: Tensor, lengths: Tensor, noise_keys: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        decibels, frames = self.spectra(audio, lengths)
        predicted = (frames - 1).clamp(min=0)
        y, _ = self.rnn(decibels[:, :-1], predicted, noise_keys)
        return self.output(y).float(), decibels[:, 1:], predicted


class TimitFrames(Recipe[FramesRunConfig]):
    """Spectra from spectra; the best checkpoint is that of the lowest squared error a bin."""

    monitor = "mse"

    def prepare(self) -> None:
        prepare(self.config.data)

    def build_model(self) -> Frames:
        return Frames(self.config.model)

    def inputs(self) -> Inputs:
        return Inputs("audio", low=-1.0, high=1.0, relative=True, frame=HOP)

    def describe(self, model: nn.Module) -> dict[str, str]:
        assert isinstance(model, Frames)
        return model.rnn.describe()

    def build_dataset(self, split: Split) -> SpeechDataset:
        config = self.config
        return SpeechDataset(config.data, split, config.plan, config.seed, _enough)

    def step(self, model: nn.Module, batch: Batch, state: State | None = None) -> StepOutput:
        outputs, targets, frames = model(batch["audio"], batch["lengths"] * batch["valid"], batch["noise_keys"])
        mask = frame_mask(frames, targets.shape[1])
        errors = ((outputs - targets).square().mean(-1) * mask).sum(1)  # (B,)
        count, rate = float(frames.sum()), self.config.data.sample_rate_hz / HOP
        # The plan counts seconds: a frame is 1 / rate of one.
        output = StepOutput({"squared_error": Loss(errors.sum() / rate, count / rate, "seconds")})
        if wants_scores(model):
            output.metrics["mse"] = Mean(errors.sum(), count)
            output.rows = [
                Row(key, float(error), float(n), {"frames": str(int(n))})
                for key, error, n, valid in zip(batch["keys"], errors, frames, batch["valid"], strict=True)
                if valid
            ]
        return output


def _enough(frames: NDArray[np.int64]) -> NDArray[np.int64]:
    """Output frames, as CTC would ask for them: nothing is too short here."""
    return np.full_like(frames, 1 << 30)


recipe = TimitFrames
