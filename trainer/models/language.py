"""A recurrent language model: embedding, recurrent stack, softmax. It reads a text on and on, from state to state."""

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from trainer import keyed
from trainer.config import Config
from trainer.errors import UserError
from trainer.models.linear import Linear
from trainer.models.recurrence import State
from trainer.models.regularizers.dropout import drop
from trainer.models.rnn import RNNConfig
from trainer.models.softmax import AdaptiveConfig, FullConfig, SoftmaxConfig

Carried = dict[str, Tensor]
"""The last state of each layer, (B, H) each: "0.h", for an LSTM "0.c", "1.h" and so on."""


class LanguageModelConfig(Config):
    """Embedding, recurrence, softmax."""

    embedding_size: PositiveInt = 400
    rnn: RNNConfig = RNNConfig(num_layers=2, hidden_size=400, norm="none")
    tied: bool = True
    """Embedding and softmax share their weights (Press & Wolf 2017, arXiv:1608.05859). Where the stack's output has
    another width, a linear map without bias goes between."""
    softmax: SoftmaxConfig = FullConfig()
    embedding_dropout: float = Field(0.0, ge=0, lt=1)
    """Share of the vocabulary that is not seen, each word in all its places of a window or in none (Gal & Ghahramani
    2016, arXiv:1512.05287)."""

    output_dropout: float = Field(0.0, ge=0, lt=1)
    """Of the stack's output, one mask a window; besides what `rnn.regularizers` does to each layer's."""

    @model_validator(mode="after")
    def _one_way(self) -> "LanguageModelConfig":
        if self.rnn.directions != "forward":
            raise ValueError(
                f"rnn.directions = {self.rnn.directions}: a language model that reads backwards sees what it is to "
                "predict; set forward"
            )
        if self.rnn.regularizers.fast_dropout is not None:
            raise ValueError("rnn.regularizers.fast_dropout: carries no state from window to window; leave it out")
        return self

    def build(self, num_tokens: int) -> "LanguageModel":
        """The model of a vocabulary.

        Raises:
            UserError: a cluster of the softmax would begin behind it.
        """
        if isinstance(self.softmax, AdaptiveConfig) and self.softmax.cutoffs[-1] >= num_tokens:
            raise UserError(
                f"model.softmax.cutoffs = {list(self.softmax.cutoffs)}: wanted all below {num_tokens}, the size of the "
                "vocabulary; lower them, or take model.softmax.kind = full"
            )
        return LanguageModel(self, num_tokens)


class Embedding(nn.Embedding):
    """Rows that start small, as they are the softmax's too; some words are not seen while training.

    Shape:
        tokens: (B, T) int64, noise_keys: (B,) int64 or None -> (B, T, E)
    """

    def __init__(self, num_tokens: int, size: int, dropout: float) -> None:
        super().__init__(num_tokens, size)
        self.dropout = dropout

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor, noise_keys: Tensor | None = None) -> Tensor:
        x = F.embedding(tokens, self.weight)
        if not self.training or not self.dropout or noise_keys is None:
            return x
        keys = np.array(keyed.fold(noise_keys, "embedding"), np.uint64)[:, None]
        drawn = keyed.uniform(keys ^ keyed.mix(tokens.cpu().numpy().astype(np.uint64)))
        keep = torch.from_numpy((drawn >= self.dropout) / (1 - self.dropout)).to(x.device, x.dtype)
        return x * keep[..., None]


class LanguageModel(nn.Module):
    """Probabilities of the next token.

    Args:
        config: see there.
        num_tokens: V.

    Shape:
        tokens: (B, T) int64; targets: (B, T) int64, below 0 where nothing counts; state: what an earlier call returned
        for the same rows, None at the start; noise_keys: (B,) int64
        returns: the sum of the cross-entropies in nats, or without targets (B, T, V) log-probabilities; the state
    """

    def __init__(self, config: LanguageModelConfig, num_tokens: int) -> None:
        super().__init__()
        self.output_dropout = config.output_dropout
        self.embedding = Embedding(num_tokens, config.embedding_size, config.embedding_dropout)
        self.rnn = config.rnn.build(config.embedding_size)
        width = config.rnn.output_size
        self.projection: nn.Module | None = None
        if config.tied and width != config.embedding_size:
            self.projection = Linear(width, config.embedding_size, bias=False)
            width = config.embedding_size
        self.output = config.softmax.build(num_tokens, width, self.embedding.weight if config.tied else None)

    def forward(
        self,
        tokens: Tensor,
        targets: Tensor | None = None,
        state: Carried | None = None,
        noise_keys: Tensor | None = None,
    ) -> tuple[Tensor, Carried]:
        x = self.embedding(tokens, noise_keys)
        x, _, states = self.rnn.carry(x, None, None if state is None else unpack(state), noise_keys)
        if self.training and noise_keys is not None:
            x = drop(x, self.output_dropout, "output", noise_keys, per_sequence=True)
        rows = x.transpose(0, 1).flatten(0, 1)  # (T B, H): the stack's output lies in the order of time
        if self.projection is not None:
            rows = self.projection(rows)
        found = self.output(rows, None if targets is None else targets.T.flatten())
        if targets is None:
            found = found.unflatten(0, x.shape[1::-1]).transpose(0, 1)
        return found, pack(states)


def pack(states: list[State]) -> Carried:
    """States of the layers by name."""
    return {f"{i}.{name}": t for i, state in enumerate(states) for name, t in zip("hc", state, strict=False)}


def unpack(carried: Carried) -> list[State]:
    """The states of each layer from their names."""
    layers = {int(name.partition(".")[0]) for name in carried}
    return [tuple(carried[f"{i}.{name}"] for name in "hc" if f"{i}.{name}" in carried) for i in sorted(layers)]
