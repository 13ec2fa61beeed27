"""An acoustic model over sound that arrives piece by piece, with the outputs of a pass over the whole.

What lies between two pieces is carried: frames that convolutions still need, the state of the recurrence, frames that
wait for what comes after them. The pieces may have any size, also none.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import kernels
from trainer.models.acoustic import AcousticModel
from trainer.models.encoders import Subsampling
from trainer.models.recurrence import State


def for_inference(model: AcousticModel) -> AcousticModel:
    """A copy that only computes: parametrised matrices are formed and packed once and for all, and what only trains is
    left out.

    Its weights are no longer those of a checkpoint by name, and must not be changed.
    """
    model = copy.deepcopy(model).eval().requires_grad_(False)
    model.middle_output = None
    for layer in model.rnn.recurrent_layers():
        layer.make_plain()
        matrix = layer.weights()[1]
        if matrix.ndim == 4 and kernels.unsupported(matrix, layer.cell.name) is None:
            layer.packed = kernels.pack(matrix, layer.cell.name)
    return model.requires_grad_(False)


class _Frames:
    """Frames that a convolution has not done with.

    Args:
        kernel, stride: of the convolution.
        before: frames of zeros in front of the first.
    """

    def __init__(self, kernel: int, stride: int, before: int) -> None:
        self.kernel, self.stride, self.before = kernel, stride, before
        self.waiting: Tensor | None = None
        self.seen = self.given = 0

    def push(self, x: Tensor, last: bool) -> Tensor | None:
        """Take new frames (B, n, D); the frames of all outputs that can be computed now, for a convolution without
        padding over time, or None."""
        if self.waiting is None:
            self.waiting = x.new_zeros(x.shape[0], self.before, x.shape[2])
        self.seen += x.shape[1]
        x = torch.cat([self.waiting, x], 1)
        if last:
            outputs = -(-self.seen // self.stride) - self.given
            lacking = (outputs - 1) * self.stride + self.kernel - x.shape[1]
            x = nn.functional.pad(x, (0, 0, 0, max(lacking, 0)))
        else:
            most = max(self.kernel, self.stride)
            outputs = max(0, (x.shape[1] - most) // self.stride + 1)
        self.waiting = x[:, outputs * self.stride :]
        self.given += outputs
        return x[:, : (outputs - 1) * self.stride + self.kernel] if outputs else None


class AcousticStream:
    """Log-probabilities of one batch of clips of equal length, whose frames come piece by piece.

    Args:
        model: in evaluation mode; `for_inference` makes it fast.

    Raises:
        ValueError: it cannot run piece by piece; the text names the key.
    """

    def __init__(self, model: AcousticModel) -> None:
        if (reason := model.config.cannot_stream()) is not None:
            raise ValueError(f"model.{reason}")
        self.model = model
        subsampling = model.subsampling
        self._frames = [_Frames(c.kernel, c.stride, c.kernel // 2) for c in subsampling.config.layers]
        self._ahead = _Frames(model.config.lookahead_frames + 1, 1, 0)
        self._states: list[State] | None = None

    @torch.inference_mode()
    def push(self, x: Tensor, last: bool = False) -> Tensor:
        """Feature frames (B, n, F) -> log-probabilities (B, n', V) of the output frames that are known now.

        Args:
            last: nothing comes after them.
        """
        model = self.model
        subsampling: Subsampling = model.subsampling
        empty = x.new_zeros(x.shape[0], 0, model.output.out_features)
        y: Tensor | None = x
        for i, frames in enumerate(self._frames):
            y = _computed(frames, y, last, x, subsampling.width(i), partial(subsampling.inside, i))
        y = None if y is None else subsampling.projection(y)
        if y is not None:
            y, _, self._states = model.rnn.carry(y, None, self._states)
        if model.lookahead is not None:
            y = _computed(self._ahead, y, last, x, model.lookahead.in_channels, partial(model.lookahead, inside=True))
        return empty if y is None else model.output(y).float().log_softmax(-1)


def _computed(
    frames: _Frames, y: Tensor | None, last: bool, like: Tensor, width: int, compute: Callable[[Tensor], Tensor]
) -> Tensor | None:
    """Outputs of a convolution for new frames, None for none of either."""
    if y is None and not last:
        return None
    window = frames.push(like.new_zeros(like.shape[0], 0, width) if y is None else y, last)
    return None if window is None else compute(window)
