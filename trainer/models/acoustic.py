"""An acoustic model: features, convolutional subsampling, a recurrent stack, a look ahead, log-probabilities of labels.

Source: the shape follows Amodei et al. 2016 (Deep Speech 2), arXiv:1512.02595.
"""

from pydantic import Field
from torch import Tensor, nn

from trainer import keyed
from trainer.config import Config
from trainer.models.encoders import Conv2dConfig, SubsamplingConfig
from trainer.models.linear import Linear
from trainer.models.normalization import KeyedDropout
from trainer.models.rnn import RNNConfig


class AcousticConfig(Config):
    """Subsampling, recurrence, output layer."""

    subsampling: SubsamplingConfig = Conv2dConfig()
    rnn: RNNConfig = RNNConfig(directions="concat")
    lookahead_frames: int = Field(0, ge=0)
    """Coming frames that the output sees of a stack that runs forward, by a row convolution; 0: none."""
    input_dropout: float = Field(0.0, ge=0, lt=1)
    """Dropout between the subsampling and the recurrence."""
    intermediate_ctc: float = Field(0.0, ge=0, lt=1)
    """Weight of a second CTC loss on the middle layer (Lee & Watanabe 2021, arXiv:2102.03216); 0: none."""

    def cannot_stream(self) -> str | None:
        """The key, below `model`, that keeps a model of this shape from running chunk by chunk, with the cure; None if
        it can."""
        if self.rnn.directions != "forward":
            return (
                f"rnn.directions = {self.rnn.directions}: the backward direction begins at the end of the sound; train "
                "with forward, and lookahead_frames for what comes next"
            )
        if self.rnn.regularizers.fast_dropout is not None:
            return "rnn.regularizers.fast_dropout: means and variances are computed over whole clips; train without"
        return None


class RowConvolution(nn.Conv1d):
    """Each unit's weighted sum of its present and coming frames, within each clip (Amodei et al. 2016, section 3.6).

    Args:
        size: D.
        frames: coming ones; the weights start with the present one alone.

    Shape:
        x: (B, T, D) with zeros past each length -> (B, T, D), the same; (B, T - frames, D) if `inside`: of the frames
        all of whose coming ones are there
    """

    def __init__(self, size: int, frames: int) -> None:
        super().__init__(size, size, frames + 1, groups=size, bias=False)
        self.frames = frames

    def reset_parameters(self) -> None:
        nn.init.dirac_(self.weight, groups=self.groups)

    def forward(self, x: Tensor, inside: bool = False) -> Tensor:
        x = x.transpose(1, 2)
        return super().forward(x if inside else nn.functional.pad(x, (0, self.frames))).transpose(1, 2)


class AcousticModel(nn.Module):
    """Features or waveforms to log-probabilities of labels.

    Args:
        config: see there.
        features: computes features from waveforms; part of the model wherever it runs, so that the statistics travel
            with the weights.
        num_classes: V.
        features_here: the batches are of waveforms.
        augment: masks features while training, None for nothing; used with `features_here`.

    Shape:
        audio: (B, T, F) features, or (B, N) waveforms if the features are computed here; lengths: (B,) of it;
        noise_keys: (B,) int64; valid: (B,) bool, a place that is not has no real frame and leaves no trace in any
        statistics, None: all are
        returns: (B, T', V) log-probabilities in float32, lengths (B,) in output frames, and while training with an
        intermediate loss the same log-probabilities of the middle layer, else None
    """

    def __init__(
        self,
        config: AcousticConfig,
        features: nn.Module,
        num_classes: int,
        features_here: bool = False,
        augment: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.features_here = features_here
        self.log_mel = features
        self.spec_augment = augment
        self.subsampling = config.subsampling.build(int(features.num_bands))  # type: ignore[arg-type]
        self.input_dropout = KeyedDropout(config.input_dropout, "input")
        self.rnn = config.rnn.build(self.subsampling.output_size)
        width = config.rnn.output_size
        self.lookahead = RowConvolution(width, config.lookahead_frames) if config.lookahead_frames else None
        self.output = Linear(width, num_classes)
        self.middle = (config.rnn.num_layers + 1) // 2 - 1
        size = config.rnn.of_layer(self.middle).output_size
        self.middle_output = Linear(size, num_classes) if config.intermediate_ctc else None

    def forward(
        self, audio: Tensor, lengths: Tensor, noise_keys: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        x, lengths, hidden = self.encode(audio, lengths, noise_keys, valid)
        middle = None
        if self.training and self.middle_output is not None:
            middle = self.middle_output(hidden[self.middle]).float().log_softmax(-1)
        return self.output(x).float().log_softmax(-1), lengths, middle

    def encode(
        self, audio: Tensor, lengths: Tensor, noise_keys: Tensor | None = None, valid: Tensor | None = None
    ) -> tuple[Tensor, Tensor, list[Tensor]]:
        """What the output layer reads (B, T', D), its lengths, and the states of every layer."""
        if self.features_here:
            audio, lengths = self.log_mel(audio, lengths)
            if self.training and self.spec_augment is not None and noise_keys is not None:
                audio = self.spec_augment(audio, lengths, keyed.fold(noise_keys, "spec_augment"))
        if valid is not None:
            lengths = lengths * valid
        x, lengths = self.subsampling(audio, lengths)
        x, hidden = self.rnn(self.input_dropout(x, noise_keys), lengths, noise_keys, all_layers=True)
        return (x if self.lookahead is None else self.lookahead(x)), lengths, hidden
