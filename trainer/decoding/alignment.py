"""When each word was said, and how sure the net was of it: a hypothesis aligned with the log-probabilities of CTC."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torchaudio.functional import forced_align

from trainer.data.text import BLANK, Tokens


@dataclass(frozen=True)
class Word:
    """One word of a hypothesis."""

    word: str
    start: float
    """Seconds from the beginning of the recording to the first frame of its first label."""
    end: float
    """To the end of the last frame of its last label. CTC labels are peaks, mostly a frame wide, inside of what they
    stand for: words end later than this says."""
    confidence: float
    """Geometric mean of the probabilities of its labels, each the highest among the frames the label was aligned with;
    no calibrated probability."""


def spans(log_probs: Tensor, labels: Sequence[int]) -> list[tuple[int, int, float]]:
    """The likeliest alignment of labels with frames.

    Shape:
        log_probs: (T, V), T at least what CTC needs for these labels

    Returns:
        of each label its first frame, the frame after its last one, and its highest log-probability among them.

    Source: Graves et al. 2006; the path is found by torchaudio's `forced_align`.
    """
    if not labels:
        return []
    log_probs = log_probs.detach().float().cpu()
    targets = torch.tensor([list(labels)], dtype=torch.int32)
    path = forced_align(log_probs[None], targets, blank=BLANK)[0][0].tolist()
    found: list[tuple[int, int, float]] = []
    before = BLANK
    for t, label in enumerate(path):
        if label != BLANK:
            value = float(log_probs[t, label])
            if label != before:
                found.append((t, t + 1, value))
            else:
                found[-1] = (found[-1][0], t + 1, max(found[-1][2], value))
        before = label
    return found


def words(log_probs: Tensor, labels: Sequence[int], tokens: Tokens, frame_seconds: float) -> list[Word]:
    """The words of a hypothesis with their times.

    Args:
        labels: of the hypothesis, without blanks.
        frame_seconds: between two output frames.

    Shape:
        log_probs: (T, V)
    """
    return of_spans(spans(log_probs, labels), labels, tokens, frame_seconds)


def of_spans(
    aligned: Sequence[tuple[int, int, float]], labels: Sequence[int], tokens: Tokens, frame_seconds: float
) -> list[Word]:
    """The same of labels that are aligned already, see `spans`."""
    found = []
    for word, first, end in tokens.words(labels):
        part = aligned[first:end]
        mean = sum(value for *_, value in part) / len(part)
        times = (round(part[0][0] * frame_seconds, 4), round(part[-1][1] * frame_seconds, 4))
        found.append(Word(word, *times, confidence=round(math.exp(mean), 4)))
    return found
