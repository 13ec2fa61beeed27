"""The streaming step of an acoustic model as one graph of fixed shapes and plain operators, for other runtimes.

A call takes so many new samples and everything that is carried, and gives so many output frames and what is carried on.
No operator of ours is in it: the recurrence is written out step by step, the spectrum is a product with sines.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from kernels import reference
from trainer.models.acoustic import AcousticModel
from trainer.models.encoders import Subsampling
from trainer.models.recurrence import RecurrentLayer


class Delay:
    """Where the outputs of a convolution over a stream lie, if each call gives as many as its new inputs make.

    A convolution gives output j once inputs up to j * stride - before + kernel are there, so in a stream the outputs
    come some places late: place i of the stream holds output i - delay.

    Args:
        kernel, stride: of the convolution.
        before: zeros in front of its first input.
        inputs: delay of what it reads.

    Attributes:
        kept: inputs that are carried from call to call.
    """

    def __init__(self, kernel: int, stride: int, before: int, inputs: int) -> None:
        self.kernel, self.stride = kernel, stride
        self.delay = math.ceil((max(kernel - stride, 0) - before + inputs) / stride)
        self.kept = self.delay * stride + before - inputs

    def window(self, kept: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        """The inputs of this call's outputs, and what is carried on: (B, n, D) each."""
        x = torch.cat([kept, x], 1)
        outputs = (x.shape[1] - self.kept) // self.stride
        return x[:, : (outputs - 1) * self.stride + self.kernel], x[:, x.shape[1] - self.kept :]


class FixedStep(nn.Module):
    """A chunk of one recording.

    Args:
        model: what `for_inference` made, whose features are of sound.
        chunk_frames: C, feature frames of a chunk; a multiple of the subsampling.

    Shape:
        samples: (1, C hop) new ones, zeros past the end; valid: (1,) int64, how many of them are real
        state: what `start` gives, in its order
        returns: log-probabilities (1, M, V) of M = C / subsampling frames, (M,) which of them there are, and the state.
        After the end, `flush_chunks` chunks of zeros with valid = 0 bring the rest. A recording shorter than a window
        has no frame

    Raises:
        ValueError: another chunk.
    """

    cosines_and_sines: Tensor
    places: Tensor
    mel: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, model: AcousticModel, chunk_frames: int) -> None:
        super().__init__()
        log_mel: Any = model.log_mel
        self.subsampling: Subsampling = model.subsampling
        layers = self.subsampling.config.layers
        self.stride = self.subsampling.config.stride
        if chunk_frames < 1 or chunk_frames % self.stride:
            raise ValueError(f"a chunk of {chunk_frames} frames: wanted a multiple of {self.stride}, the subsampling")
        self.chunk_frames, self.hop, self.n_fft = chunk_frames, int(log_mel.hop), int(log_mel.n_fft)
        self.floor = float(log_mel.floor)
        angles = torch.arange(self.n_fft)[:, None] * torch.arange(self.n_fft // 2 + 1).double()
        angles *= 2 * math.pi / self.n_fft
        waves = torch.cat([angles.cos(), angles.sin()], 1)
        self.register_buffer("cosines_and_sines", (log_mel.window.double()[:, None] * waves).float())
        self.register_buffer("places", self.hop * torch.arange(chunk_frames)[:, None] + torch.arange(self.n_fft))
        for name in ("mel", "mean", "deviation"):
            self.register_buffer(name, getattr(log_mel, name).clone())
        rnn = model.rnn
        self.norms, self.final_norm, self.residual = rnn.norms, rnn.final_norm, rnn.config.residual
        self.scales = rnn.scales
        later = rnn.config.regularizers.later
        self.cells = nn.ModuleList(FixedCell(x, (later.zoneout, later.zoneout_cell)) for x in rnn.recurrent_layers())
        self.lookahead, self.output = model.lookahead, model.output
        self.sound = Delay(self.n_fft, self.hop, 0, 0)
        self.frames, late = [], self.sound.delay
        for layer in layers:
            self.frames.append(Delay(layer.kernel, layer.stride, layer.kernel // 2, late))
            late = self.frames[-1].delay
        self.ahead = Delay(model.config.lookahead_frames + 1, 1, 0, late)

    @property
    def chunk_samples(self) -> int:
        """New samples of a call."""
        return self.chunk_frames * self.hop

    @property
    def flush_chunks(self) -> int:
        """Chunks of zeros after the last sound, until all outputs came."""
        return math.ceil(self.ahead.delay / (self.chunk_frames // self.stride))

    def start(self) -> dict[str, Tensor]:
        """What is carried into the first chunk, by name."""
        state = {
            "place": torch.zeros(1, dtype=torch.int64),  # samples of the stream so far
            "length": torch.zeros(1, dtype=torch.int64),  # ... and of the recording
            "sound": torch.zeros(1, self.sound.kept, 1),
        }
        for i, delay in enumerate(self.frames):
            state[f"frames_{i}"] = torch.zeros(1, delay.kept, self.subsampling.width(i))
        for i, cell in enumerate(self.cells):
            assert isinstance(cell, FixedCell)
            state |= {f"{name}_{i}": torch.zeros(1, cell.size) for name in ("hc" if cell.name == "lstm" else "h")}
        if self.lookahead is not None:
            state["ahead"] = torch.zeros(1, self.ahead.kept, self.lookahead.in_channels)
        return state

    def forward(self, samples: Tensor, valid: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        carried = dict(zip(self.start(), state, strict=True))
        place, new = carried["place"], dict[str, Tensor]()
        new["place"], new["length"] = place + self.chunk_samples, carried["length"] + valid
        place, frames = _quotient(place, self.hop), _quotient(new["length"] - self.n_fft + self.hop, self.hop)
        wave, new["sound"] = self.sound.window(carried["sound"], samples[..., None])
        x = self._features(wave[0, :, 0][self.places])[None]
        x = x * _present(x, place, self.sound, frames)[:, None]
        for i, (delay, layer) in enumerate(zip(self.frames, self.subsampling.config.layers, strict=True)):
            window, new[f"frames_{i}"] = delay.window(carried[f"frames_{i}"], x)
            x = self.subsampling.inside(i, window)
            place, frames = _quotient(place, layer.stride), _quotient(frames + layer.stride - 1, layer.stride)
            x = x * _present(x, place, delay, frames)[:, None]
        x = self.subsampling.projection(x)
        present = _present(x, place, (self.frames or [self.sound])[-1], frames)
        for i, (norm, cell) in enumerate(zip(self.norms, self.cells, strict=True)):
            h, c = carried[f"h_{i}"], carried.get(f"c_{i}")
            y, new[f"h_{i}"], c = cell(norm(x, None), h, c, present)
            if c is not None:
                new[f"c_{i}"] = c
            y = self.scales[i](y)
            x = x + y if self.residual and x.shape == y.shape else y
        x = self.final_norm(x, None) * present[:, None]
        if self.lookahead is not None:
            window, new["ahead"] = self.ahead.window(carried["ahead"], x)
            x = self.lookahead(window, inside=True)
        log_probs = self.output(x).log_softmax(-1)
        return log_probs, _present(x, place, self.ahead, frames), *(new[name] for name in carried)

    def _features(self, windows: Tensor) -> Tensor:
        """Normalised log-mel energies of windows of sound (C, n_fft): (C, F)."""
        real, imaginary = (windows @ self.cosines_and_sines).square().chunk(2, -1)
        return (((real + imaginary) @ self.mel + self.floor).log() - self.mean) / self.deviation


def _quotient(numbers: Tensor, divisor: int) -> Tensor:
    """Whole quotients, from 0 on; as integers, in which hours of samples are exact."""
    return numbers.clamp(min=0) // divisor


def _present(x: Tensor, place: Tensor, delay: Delay, frames: Tensor) -> Tensor:
    """Which of the outputs x (1, M, D) of a delayed convolution are of frames that there are: (M,) bool.

    Args:
        place: of the first in the stream.
        frames: of the recording, as far as it came.
    """
    numbers = torch.arange(x.shape[1]) + place - delay.delay
    return (numbers >= 0) & (numbers < frames)


class FixedCell(nn.Module):
    """One layer that runs forward, frame by frame.

    Args:
        layer: whose weights it takes as they are now.
        zoneout: rates of h and c; evaluation takes the mean.

    Shape:
        x: (1, M, D), h: (1, H), c: (1, H) of an LSTM, else None; present: (M,), frames at which the state moves
        returns: outputs (1, M, H), and the last h and c
    """

    weight_ih: Tensor
    bias_ih: Tensor | None
    bias_hh: Tensor

    def __init__(self, layer: RecurrentLayer, zoneout: tuple[float, float] = (0.0, 0.0)) -> None:
        super().__init__()
        self.name, self.size, self.zoneout = layer.cell.name, layer.hidden_size, zoneout
        weight_ih, matrix = layer.weights()
        self.register_buffer("weight_ih", weight_ih.detach().T.contiguous())
        self.register_buffer("bias_ih", None if layer.bias_ih is None else layer.bias_ih.detach())
        self.register_buffer("bias_hh", layer.bias_hh.detach())
        self.num_blocks = 0 if matrix.ndim == 2 else matrix.shape[1]
        parts = [slice(0, 2), slice(2, 3)] if self.name == "gru_original" else [slice(None)]
        for part in parts:
            chosen = matrix.detach()[part]
            if self.num_blocks:  # (G, K, P, P) -> (K, P, G P), and for one block a matrix
                chosen = chosen.permute(1, 3, 0, 2).flatten(2)
                chosen = chosen[0] if self.num_blocks == 1 else chosen
            self.register_buffer(f"weight_{part.start or 0}", chosen.contiguous())

    def forward(self, x: Tensor, h: Tensor, c: Tensor | None, present: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        u = x @ self.weight_ih
        u = u if self.bias_ih is None else u + self.bias_ih
        outputs = []
        for t in range(x.shape[1]):
            h, c = self._step(u[:, t], h, c, present[t])
            outputs.append(h)
        return torch.stack(outputs, 1), h, c

    def _step(self, u: Tensor, h: Tensor, c: Tensor | None, moves: Tensor) -> tuple[Tensor, Tensor | None]:
        def recurrent(scale: Tensor | float, gates: slice) -> Tensor:
            v = self._product(h * scale, getattr(self, f"weight_{gates.start or 0}"))
            bias = self.bias_hh.unflatten(0, (-1, self.size))[gates].flatten()
            return v if self.name == "rnn_modrelu" else v + bias

        new_h, new_c = reference.CELLS[self.name](u, recurrent, h, c, self.bias_hh, 1.0)
        new_h = self._mixed(0, h, new_h)
        h = torch.where(moves, new_h, h)
        if c is None or self.name != "lstm":
            return h, None
        return h, torch.where(moves, self._mixed(1, c, new_c), c)

    def _mixed(self, which: int, old: Tensor, new: Tensor) -> Tensor:
        rate = self.zoneout[which]
        return rate * old + (1 - rate) * new if rate else new

    def _product(self, h: Tensor, weight: Tensor) -> Tensor:
        """(1, H) -> (1, G H)."""
        if self.num_blocks == 0:
            return (weight * h[:, None]).flatten(1)
        if self.num_blocks == 1:
            return h @ weight
        v = h.view(self.num_blocks, 1, -1) @ weight  # (K, 1, G P)
        return v.view(self.num_blocks, -1, self.size // self.num_blocks).transpose(0, 1).reshape(1, -1)
