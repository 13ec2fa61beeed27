"""Cells: what a recurrent layer makes of its input and its last state."""

from typing import Annotated, Literal

from pydantic import Field

from trainer.config import Config


class ElmanConfig(Config):
    """h_t = f(W x_t + U h_{t-1} + b) (Elman 1990).

    modrelu(z) = sign(z) relu(|z| + b) has its bias inside (Arjovsky et al. 2016; Helfrich et al. 2018) and no other.
    """

    kind: Literal["rnn"] = "rnn"
    activation: Literal["tanh", "relu", "modrelu", "identity"] = "tanh"

    @property
    def name(self) -> str:
        """What the kernels call it."""
        return f"rnn_{self.activation}"


class GRUConfig(Config):
    """Gated recurrent unit (Cho et al. 2014)."""

    kind: Literal["gru"] = "gru"
    reset: Literal["after", "before"] = "after"
    """The reset gate scales what the recurrent weights gave (as torch and cuDNN have it), or the state that goes into
    them (as the paper has it)."""

    @property
    def name(self) -> str:
        """What the kernels call it."""
        return "gru" if self.reset == "after" else "gru_original"


class LSTMConfig(Config):
    """Long short-term memory (Hochreiter & Schmidhuber 1997)."""

    kind: Literal["lstm"] = "lstm"
    forget_bias: float = 0.0
    """Added to the forget gate's bias at the start (Jozefowicz et al. 2015 advise 1)."""

    @property
    def name(self) -> str:
        """What the kernels call it."""
        return "lstm"


CellConfig = Annotated[ElmanConfig | GRUConfig | LSTMConfig, Field(discriminator="kind")]
GATES = {"rnn": 1, "gru": 3, "lstm": 4}
TORCH = ("rnn_tanh", "rnn_relu", "gru", "lstm")
"""Cells that torch has too, by the kernels' names."""
