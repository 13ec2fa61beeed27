"""A trained language model as a scorer for search: states and tokens in, log-probabilities and states out, in batches.

    scorer = Scorer.load("runs/language_model-ptb")
    log_probabilities, state = scorer.start(2)  # (2, V): what may begin a line
    log_probabilities, state = scorer.step(tokens, state)  # (2,) -> (2, V)
    state = scorer.select(state, rows)  # which of them are kept, and how often

A state is a dictionary of tensors (B, ...), so a search may keep, copy and drop rows as it likes.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer import checkpoint
from trainer.config import show
from trainer.data.vocabulary import Vocabulary
from trainer.errors import UserError
from trainer.models.language import Carried, LanguageModel
from trainer.recipe import from_plain
from trainer.run import RunDirectory


class Scorer:
    """Scores of the next token.

    Args:
        model: in evaluation mode from now on.
        vocabulary: what its tokens mean.
    """

    def __init__(self, model: LanguageModel, vocabulary: Vocabulary) -> None:
        self.model, self.vocabulary = model.eval(), vocabulary

    @classmethod
    def load(cls, run: str | Path, overrides: tuple[str, ...] = (), device: str | torch.device = "cpu") -> "Scorer":
        """The best checkpoint of a run.

        Args:
            run: a run directory, or its name under runs/.
            overrides: `key=value`, e.g. data.path=... where the prepared text lies elsewhere now.

        Raises:
            UserError: there is no such run, it has no checkpoint, it is no language model, or its vocabulary is
                not the one at hand.
        """
        directory = RunDirectory.existing(str(run))
        recipe: Any = from_plain(directory.saved_config(), show(directory.config), overrides)
        model = recipe.build_model()
        if not isinstance(model, LanguageModel):
            raise UserError(
                f"{show(directory.path)}: recipe = {recipe.config.recipe}: wanted a run of a language model"
            )
        best = checkpoint.best(directory.checkpoints)
        best.check_shapes(checkpoint.shapes_of(model))
        best.check_labels({"tokens": recipe.vocabulary.identity})
        model.load_state_dict(best.weights())
        return cls(model.to(device), recipe.vocabulary)

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def start(self, batch_size: int) -> tuple[Tensor, Carried]:
        """What comes at the beginning of a line, for so many rows: as `step` after the end of a line."""
        return self.step(torch.full((batch_size,), self.vocabulary.start), None)

    @torch.inference_mode()
    def step(self, tokens: Tensor, state: Carried | None) -> tuple[Tensor, Carried]:
        """Read a token a row.

        Args:
            state: what an earlier call returned for these rows; None: nothing was read yet.

        Shape:
            tokens: (B,) int64 -> (B, V) log-probabilities of the token after it, in nats, float32; and the state
        """
        log_probabilities, state = self.model(tokens[:, None].to(self.device), None, state)
        return log_probabilities[:, 0], state

    @torch.inference_mode()
    def score(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """Log-probabilities, in nats, of the tokens of whole lines, each from the beginning of a line.

        Shape:
            tokens: (B, T) int64, lengths: (B,) -> (B, T) float32, zeros past each length
        """
        tokens, lengths = tokens.to(self.device), lengths.to(self.device)
        before = torch.full_like(tokens[:, :1], self.vocabulary.start)
        log_probabilities, _ = self.model(torch.cat([before, tokens[:, :-1]], 1))
        found = log_probabilities.gather(-1, tokens[..., None])[..., 0]
        return found * (torch.arange(tokens.shape[1], device=self.device) < lengths[:, None])

    @staticmethod
    def select(state: Carried, rows: Tensor) -> Carried:
        """The state of some rows, (K,) int64, any of them once, often or not at all."""
        return {name: values.index_select(0, rows) for name, values in state.items()}
