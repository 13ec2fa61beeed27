"""The weights of a beam search, chosen by the errors on the validation split."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from trainer import config as configuration
from trainer.config import show
from trainer.decoding.base import greedy
from trainer.errors import UserError
from trainer.run import RunDirectory

TUNED = "decoder=tuned"
FILE = "decoder.yaml"
"""In a run directory: the decoder that `tune` recorded."""
MAX_WEIGHT = 4.0


class Recorder:
    """A decoder that keeps what it was given, and takes the best path.

    Attributes:
        utterances: (T, V) log-probabilities of each, on the CPU, in the order in which they came.
    """

    def __init__(self) -> None:
        self.utterances: list[Tensor] = []

    def __call__(self, log_probs: Tensor, lengths: Tensor) -> list[list[int]]:
        rows = zip(log_probs.float().cpu(), lengths.tolist(), strict=True)
        self.utterances += [row[:n].clone() for row, n in rows]
        return greedy(log_probs, lengths)


@dataclass(frozen=True)
class Trial:
    """A setting and its errors."""

    weight: float
    word_score: float
    error: float
    """Rate on the validation split."""


def search(
    errors: Callable[[float, float], float],
    weight: float,
    word_score: float,
    rounds: int = 3,
    axes: Sequence[int] = (0, 1),
) -> list[Trial]:
    """Look for the two numbers with the fewest errors, one at a time, in steps that get smaller.

    Args:
        errors: (weight, word_score) -> rate.
        weight, word_score: where to begin.
        rounds: how often the steps are halved.
        axes: which of the two are looked for.

    Returns:
        every setting that was tried; the best is the first of those with the lowest rate.
    """
    trials: dict[tuple[float, float], Trial] = {}

    def attempt(at: tuple[float, float]) -> float:
        at = (round(min(max(at[0], 0.0), MAX_WEIGHT), 4), round(at[1], 4))
        if at not in trials:
            trials[at] = Trial(*at, errors(*at))
        return trials[at].error

    attempt((weight, word_score))
    steps = (0.4, 1.0)
    for _ in range(rounds):
        for axis in axes:
            for sign in (1, -1):
                while True:  # on, as long as it gets better
                    now = best(list(trials.values()))
                    at = [now.weight, now.word_score]
                    at[axis] += sign * steps[axis]
                    if attempt((at[0], at[1])) >= now.error:
                        break
        steps = (steps[0] / 2, steps[1] / 2)
    return list(trials.values())


def best(trials: Sequence[Trial]) -> Trial:
    """The first trial with the lowest rate."""
    return min(trials, key=lambda t: t.error)


def record(run: RunDirectory, decoder: dict[str, Any], facts: dict[str, Any]) -> None:
    """Write the decoder into the run directory.

    Args:
        decoder: its configuration, the chosen numbers in it.
        facts: how it was found.
    """
    text = configuration.dump_yaml({"decoder": decoder, "tuned": facts})
    temporary = run.path / f"{FILE}.tmp"
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(run.path / FILE)


def with_recorded(overrides: Sequence[str], run: RunDirectory) -> list[str]:
    """The overrides with what `record` wrote in place of `decoder=tuned`.

    Raises:
        UserError: nothing was recorded, or it is damaged.
    """
    if TUNED not in overrides:
        return list(overrides)
    path = run.path / FILE
    if not path.is_file():
        raise UserError(f"{show(path)}: is missing; decoder=tuned needs `./launch.sh tune {run.path.name}` before it")
    found = configuration.load_yaml(path).get("decoder")
    if not isinstance(found, dict):
        raise UserError(f"{show(path)}: is not what `tune` writes; delete it and tune again")
    tuned = f"decoder={json.dumps(found, ensure_ascii=False)}"
    return [tuned if override == TUNED else override for override in overrides]
