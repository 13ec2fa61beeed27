"""What decodes: rows of log-probabilities in, labels out; and the search without any language model."""

from collections.abc import Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from trainer.config import Config
from trainer.data.text import BLANK


class Decoder(Protocol):
    """A way from log-probabilities to labels.

    Shape:
        log_probs: (B, T, V), lengths: (B,) frames

    Returns:
        the labels of each row, without blanks.
    """

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]: ...


class GreedyConfig(Config):
    """The likeliest label of each frame."""

    kind: Literal["greedy"] = "greedy"

    def build(self, source: object) -> "Decoder":
        return greedy


def greedy(log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
    """Best path of CTC: the likeliest label of each frame, repeats merged, blanks dropped; see `Decoder`.

    Source: Graves et al. 2006, section 3.2.
    """
    rows = zip(log_probs.argmax(-1).cpu(), lengths.tolist(), strict=True)
    return [without_blanks(torch.unique_consecutive(path[:n]).tolist()) for path, n in rows]


def without_blanks(labels: Sequence[int]) -> list[int]:
    return [label for label in labels if label != BLANK]
