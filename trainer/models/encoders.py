"""From feature frames to fewer, wider frames: convolutional subsampling."""

import math
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from trainer.config import Config
from trainer.models.linear import Linear
from trainer.models.normalization import NormKind, build_norm, frame_mask


class ConvLayerConfig(Config):
    """One convolution over time (and, in two dimensions, over bands)."""

    channels: PositiveInt = 64
    kernel: PositiveInt = 3
    """Frames; odd, so that a frame has as many neighbours before as after."""
    stride: PositiveInt = 2
    """Frames advanced: the time subsampling of this layer."""
    kernel_bands: PositiveInt = 3
    """Bands (two dimensions only); odd."""
    stride_bands: PositiveInt = 2
    """Bands advanced (two dimensions only)."""

    @field_validator("kernel", "kernel_bands")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value


class _SubsamplingConfig(Config):
    layers: tuple[ConvLayerConfig, ...] = (ConvLayerConfig(), ConvLayerConfig())
    norm: NormKind = "none"
    """After each convolution."""
    projection: int | None = Field(None, ge=1)
    """Width of a linear map after the last convolution; null: none."""
    activation: Literal["relu", "gelu"] = "relu"

    @property
    def stride(self) -> int:
        """Feature frames an output frame."""
        return math.prod(layer.stride for layer in self.layers)

    def num_frames(self, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """Output frames of clips of so many feature frames."""
        for layer in self.layers:
            frames = -(-frames // layer.stride)
        return frames


class Conv1dConfig(_SubsamplingConfig):
    """Convolutions over time; the bands are channels."""

    kind: Literal["conv1d"] = "conv1d"

    def build(self, input_size: int) -> "Subsampling":
        return Subsampling(self, input_size, two_dimensional=False)


class Conv2dConfig(_SubsamplingConfig):
    """Convolutions over time and bands (Amodei et al. 2016, arXiv:1512.02595, section 3.5)."""

    kind: Literal["conv2d"] = "conv2d"

    def build(self, input_size: int) -> "Subsampling":
        return Subsampling(self, input_size, two_dimensional=True)


SubsamplingConfig = Annotated[Conv1dConfig | Conv2dConfig, Field(discriminator="kind")]


class Subsampling(nn.Module):
    """A stack of convolutions; what is past a clip's length is zero before each, so padding changes nothing.

    Args:
        config: layers, normalisation, activation.
        input_size: F.
        two_dimensional: convolve over bands too.

    Shape:
        x: (B, T, F), lengths: (B,) -> (B, T', output_size), lengths (B,) where T' = ceil(T / strides)
    """

    def __init__(self, config: _SubsamplingConfig, input_size: int, two_dimensional: bool) -> None:
        super().__init__()
        self.config, self.two_dimensional, self.input_size = config, two_dimensional, input_size
        self.widths: list[int] = []
        self.convolutions, self.norms = nn.ModuleList(), nn.ModuleList()
        channels, bands = (1, input_size) if two_dimensional else (input_size, 1)
        for layer in config.layers:
            if two_dimensional:
                kernel, stride = (layer.kernel, layer.kernel_bands), (layer.stride, layer.stride_bands)
                padding = (layer.kernel // 2, layer.kernel_bands // 2)
                self.convolutions.append(nn.Conv2d(channels, layer.channels, kernel, stride, padding))
                bands = (bands - 1) // layer.stride_bands + 1
            else:
                self.convolutions.append(
                    nn.Conv1d(channels, layer.channels, layer.kernel, layer.stride, layer.kernel // 2)
                )
            channels = layer.channels
            self.norms.append(build_norm(config.norm, channels * bands))
            self.widths.append(channels * bands)
        self.output_size = config.projection or channels * bands
        self.projection = Linear(channels * bands, config.projection) if config.projection else nn.Identity()

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        x = x * frame_mask(lengths, x.shape[1])[..., None]
        for i, (convolution, layer) in enumerate(zip(self.convolutions, self.config.layers, strict=True)):
            mask = frame_mask((lengths + layer.stride - 1) // layer.stride, -(-x.shape[1] // layer.stride))
            lengths = (lengths + layer.stride - 1) // layer.stride
            x = self._activated(i, self._columns(convolution(self._maps(x, convolution))), mask) * mask[..., None]
        return self.projection(x), lengths

    def width(self, layer: int) -> int:
        """Numbers in a frame that goes into a layer."""
        return self.input_size if layer == 0 else self.widths[layer - 1]

    def inside(self, layer: int, x: Tensor) -> Tensor:
        """One layer in evaluation, without padding over time: (B, n, D) -> (B, (n - kernel) // stride + 1, D')."""
        convolution = self.convolutions[layer]
        y = self._maps(x, convolution)
        if isinstance(convolution, nn.Conv2d):
            padding = (0, int(convolution.padding[1]))
            y = nn.functional.conv2d(y, convolution.weight, convolution.bias, convolution.stride, padding)
        else:
            assert isinstance(convolution, nn.Conv1d)
            y = nn.functional.conv1d(y, convolution.weight, convolution.bias, convolution.stride)
        return self._activated(layer, self._columns(y), None)

    def _maps(self, x: Tensor, convolution: nn.Module) -> Tensor:
        """(B, T, D) as a convolution takes it: (B, C, T) or (B, C, T, F)."""
        if not self.two_dimensional:
            return x.transpose(1, 2)
        return x.unflatten(-1, (-1, int(convolution.in_channels))).permute(0, 3, 1, 2)  # type: ignore[arg-type]

    def _columns(self, y: Tensor) -> Tensor:
        """What a convolution gave as (B, T', D)."""
        return y.permute(0, 2, 3, 1).flatten(2) if self.two_dimensional else y.transpose(1, 2)

    def _activated(self, layer: int, y: Tensor, mask: Tensor | None) -> Tensor:
        activation = nn.functional.relu if self.config.activation == "relu" else nn.functional.gelu
        return activation(self.norms[layer](y, mask))
