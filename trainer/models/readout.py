"""A recurrent stack with a linear readout of each frame, or of the last."""

from torch import Tensor, nn

from trainer.models.linear import Linear, linear
from trainer.models.rnn import RNNConfig


class Output(Linear):
    """The linear map, fast where its result is thin. A module of its own: ZeRO 3 gathers weights by module."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias) if x.ndim == 3 else super().forward(x)


class Readout(nn.Module):
    """Rows of one length to numbers.

    Args:
        config: of the stack.
        input_size: D.
        output_size: V.
        last: read the last frame alone.

    Shape:
        x: (B, T, D), noise_keys: (B,) int64 or None -> (B, T, V), or (B, V) of the last frame
    """

    def __init__(self, config: RNNConfig, input_size: int, output_size: int, last: bool = False) -> None:
        super().__init__()
        self.last = last
        self.rnn = config.build(input_size)
        self.output = Output(config.output_size, output_size)

    def forward(self, x: Tensor, noise_keys: Tensor | None = None) -> Tensor:
        y, _ = self.rnn(x, None, noise_keys)
        if self.last:
            return self.output(y[:, -1]).float()
        # The stack's output lies in the order of time: read as (T, B, H) it needs no copy.
        numbers: Tensor = self.output(y.transpose(0, 1)).transpose(0, 1)
        return numbers.float()
