"""A transducer: an acoustic model, a recurrent net over the labels so far, and what joins them.

Source: Graves 2012, arXiv:1211.3711; the joining layer as in Graves, Mohamed & Hinton 2013, arXiv:1303.5778.
"""

from collections.abc import Sequence

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from trainer.config import Config
from trainer.models.acoustic import AcousticConfig, AcousticModel
from trainer.models.cells import LSTMConfig
from trainer.models.linear import Linear
from trainer.models.recurrence import State
from trainer.models.rnn import RNNConfig

BLANK = 0


class TransducerConfig(Config):
    """Encoder, predictor and joint network."""

    encoder: AcousticConfig = AcousticConfig(rnn=RNNConfig(directions="concat"))
    """Its own output, by CTC, is trained too: see `ctc`."""
    predictor: RNNConfig = RNNConfig(hidden_size=128, num_layers=1, cell=LSTMConfig(), norm="none")
    """Over the labels so far; forward."""
    embedding_size: PositiveInt = 64
    """Numbers that stand for a label."""
    joint_size: PositiveInt = 192
    """Width at which sound and labels are added."""
    ctc: float = Field(0.3, ge=0, lt=1)
    """Weight of the encoder's own CTC loss, the transducer's having the rest."""
    most_labels: PositiveInt = 4
    """That decoding may find in a frame."""

    @model_validator(mode="after")
    def _predictor_goes_on(self) -> "TransducerConfig":
        if self.predictor.directions != "forward":
            raise ValueError(
                f"predictor.directions = {self.predictor.directions}: no label to come is known; take forward"
            )
        if self.predictor.regularizers.fast_dropout is not None:
            raise ValueError("predictor.regularizers.fast_dropout: decoding has no moments to go on from; take null")
        return self

    @model_validator(mode="after")
    def _one_ctc_loss(self) -> "TransducerConfig":
        if self.encoder.intermediate_ctc:
            raise ValueError(
                f"encoder.intermediate_ctc = {self.encoder.intermediate_ctc}: a transducer trains the encoder's last "
                "layer by CTC (ctc), not its middle one; leave it out"
            )
        return self


class Transducer(nn.Module):
    """Probabilities of the next label or blank, for each frame and each number of labels before.

    Args:
        config: see there.
        encoder: of `config.encoder`.
        num_classes: V.

    Shape:
        audio, lengths, noise_keys, valid: see `AcousticModel`; labels: (B, U), 0 past each row's own
        returns: logits (B, T', U + 1, V) in float32, CTC log-probabilities (B, T', V), lengths (B,)
    """

    def __init__(self, config: TransducerConfig, encoder: AcousticModel, num_classes: int) -> None:
        super().__init__()
        self.config, self.encoder = config, encoder
        self.embedding = nn.Embedding(num_classes, config.embedding_size)
        self.predictor = config.predictor.build(config.embedding_size)
        self.of_sound = Linear(config.encoder.rnn.output_size, config.joint_size)
        self.of_labels = Linear(config.predictor.output_size, config.joint_size)
        self.output = Linear(config.joint_size, num_classes)

    def forward(
        self,
        audio: Tensor,
        lengths: Tensor,
        labels: Tensor,
        noise_keys: Tensor | None = None,
        valid: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, lengths, _ = self.encoder.encode(audio, lengths, noise_keys, valid)
        log_probs = self.encoder.output(x).float().log_softmax(-1)
        before = nn.functional.pad(labels, (1, 0), value=BLANK)  # the blank stands for the beginning
        y, _ = self.predictor(self.embedding(before), None, noise_keys)
        joint = self.of_sound(x)[:, :, None] + self.of_labels(y)[:, None]
        return self.output(joint.tanh()).float(), log_probs, lengths

    @torch.no_grad()
    def decode(self, audio: Tensor, lengths: Tensor) -> list[list[int]]:
        """The best label at each place, one after the other (Graves 2012, section 2.5, with a beam of one)."""
        x, lengths, _ = self.encoder.encode(audio, lengths)
        sound = self.of_sound(x)
        found: list[list[int]] = [[] for _ in x]
        last = x.new_full((len(x), 1), BLANK, dtype=torch.long)
        y, _, states = self.predictor.carry(self.embedding(last), None, None)
        for t in range(x.shape[1]):
            open_rows = t < lengths
            for _ in range(self.config.most_labels):
                best = self.output((sound[:, t] + self.of_labels(y[:, 0])).tanh()).argmax(-1)
                open_rows = open_rows & (best != BLANK)
                if not bool(open_rows.any()):
                    break
                for b in open_rows.nonzero()[:, 0].tolist():
                    found[b].append(int(best[b]))
                new_y, _, new_states = self.predictor.carry(self.embedding(best[:, None]), None, states)
                y = torch.where(open_rows[:, None, None], new_y, y)
                states = _moved(open_rows, states, new_states)
        return found


def _moved(rows: Tensor, old: Sequence[State], new: Sequence[State]) -> list[State]:
    """The new states of some rows, the old ones of the others."""
    pairs = [zip(a, b, strict=True) for a, b in zip(old, new, strict=True)]
    return [tuple(torch.where(rows[:, None], n, o) for o, n in pair) for pair in pairs]
