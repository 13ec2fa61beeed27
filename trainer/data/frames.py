"""Frames of videos as small pictures, and what a convolutional net makes of each.

A video is a file of any kind that FFmpeg's libraries read (PyAV brings them along), or a folder of pictures in the
order of their names.
"""

import hashlib
import pickle
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from trainer.config import Config, Free, show
from trainer.data.motions import ClipError
from trainer.errors import UserError

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".webp"}
VIDEOS = {".avi", ".mp4", ".mkv", ".mov", ".webm", ".mpg", ".mpeg", ".m4v", ".ogv", ".wmv"}
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Of the colours of ImageNet, with which torchvision's weights were trained."""
HELD = 64
"""Times as many frames of a video in memory as are kept in the end: of longer ones every other is dropped again."""
AT_A_TIME = 64
"""Frames that a net looks at together in `prepare`."""

Name = Literal["resnet18", "resnet34", "resnet50", "mobilenet_v3_small", "mobilenet_v3_large", "efficientnet_b0"]


class CNNConfig(Config):
    """A net of torchvision without its classes, which looks at each frame by itself."""

    name: Name = "resnet18"
    weights: Literal["imagenet"] | Free[Path] | None = "imagenet"
    """imagenet: torchvision's, which `prepare` downloads; a file that holds such a state dict; null: random ones."""
    where: Literal["prepare", "model"] = "prepare"
    """prepare: it stays as it is, and its features lie in the shards; model: frames lie there, and the net is the first
    part of the model, trained with the rest (or not: freeze=[cnn])."""

    def digest(self) -> str:
        """Of all that its features depend on."""
        if not isinstance(self.weights, Path):
            return f"{self.name} {self.weights}"
        try:
            content = self.weights.read_bytes()
        except OSError as error:
            raise UserError(
                f"data.corpus.cnn.weights = {self.weights}: cannot be read ({error.strerror}); name a state dict of "
                f"torchvision's {self.name}, or imagenet"
            ) from error
        return f"{self.name} {hashlib.sha256(content).hexdigest()[:16]}"

    def build(self) -> "FrameCNN":
        return FrameCNN(self)


class _Pretrained(nn.Module):
    """Draws no weights but loads them into its neighbour, which the engine has drawn just before: it goes through the
    modules in order."""

    def __init__(self, net: nn.Module, config: CNNConfig) -> None:
        super().__init__()
        self._net, self._config = (net,), config

    def reset_parameters(self) -> None:
        if self._config.weights is not None:
            _load(self._net[0], self._config)


class FrameCNN(nn.Module):
    """Frames to features.

    Without weights to start from, groups of channels are normalised, and with them the statistics that came with the
    weights are kept: those of a batch would depend on how it is spread over processes.

    Shape:
        frames: (..., rows, columns, 3) bytes -> (..., F)
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: CNNConfig) -> None:
        super().__init__()
        models = _torchvision()
        from torchvision.ops.misc import FrozenBatchNorm2d

        trained = partial(FrozenBatchNorm2d, eps=1e-3) if "mobilenet" in config.name else FrozenBatchNorm2d
        norm = trained if config.weights is not None else _groups
        self.net = models.get_model(config.name, weights=None, norm_layer=norm)
        head = "fc" if hasattr(self.net, "fc") else "classifier"
        layers = [m for m in getattr(self.net, head).modules() if isinstance(m, nn.Linear)]
        self.num_features: int = layers[0].in_features
        setattr(self.net, head, nn.Identity())
        self.pretrained = _Pretrained(self.net, config)
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(DEVIATION)[:, None, None], persistent=False)

    def forward(self, frames: Tensor) -> Tensor:
        lead = frames.shape[:-3]
        x = frames.flatten(0, -4).permute(0, 3, 1, 2).float() / 255
        y: Tensor = self.net((x - self.mean) / self.deviation)
        return y.unflatten(0, lead)


def _groups(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


def _torchvision() -> Any:
    try:
        from torchvision import models
    except ImportError as error:
        raise UserError("data.corpus.kind = videos: needs torchvision; pip install 'ostinato[video]'") from error
    return models


def _load(net: nn.Module, config: CNNConfig) -> None:
    """Take trained weights; those of the classes are left."""
    cure = f"name a state dict of torchvision's {config.name} (data.corpus.cnn.weights), or null for random weights"
    try:
        if isinstance(config.weights, Path):
            values = torch.load(config.weights, map_location="cpu", weights_only=True)
        else:
            best = _torchvision().get_model_weights(config.name).DEFAULT
            values = best.get_state_dict(check_hash=True, weights_only=True)
        wanted = net.state_dict()
        net.load_state_dict({name: values[name] for name in wanted})
    except Exception as error:  # a download, a file, or what is in it
        torn = isinstance(error, pickle.UnpicklingError)  # torch's advice is to read it unsafely
        reason = "not a file of tensors alone" if torn else " ".join(str(error).split())[:200]
        raise UserError(
            f"data.corpus.cnn.weights = {config.weights}: cannot be loaded ({type(error).__name__}: {reason}); {cure}"
        ) from error


@lru_cache(maxsize=1)
def _ready(config: CNNConfig) -> FrameCNN:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        cnn = config.build().eval()
        cnn.pretrained.reset_parameters()
    return cnn


@torch.inference_mode()
def features(frames: NDArray[np.uint8], config: CNNConfig) -> NDArray[np.float16]:
    """What the net makes of frames (T, rows, columns, 3): (T, F)."""
    cnn = _ready(config)
    parts = [cnn(torch.from_numpy(frames[i : i + AT_A_TIME])) for i in range(0, len(frames), AT_A_TIME)]
    found: NDArray[np.float16] = torch.cat(parts).half().numpy()
    return found


# Pictures


def read_frames(path: Path, size: int, every: int, max_frames: int) -> NDArray[np.uint8]:
    """Every so many frames of a video, (T, size, size, 3): the middle square, scaled.

    Args:
        path: a video file, or a folder of pictures.
        size: rows and columns.
        every: 2 takes every other frame.
        max_frames: of more, so many that are spread evenly over the video are taken.

    Raises:
        ClipError: it cannot be read, or has no frame.
    """
    pictures = _pictures_of(path) if path.is_dir() else _frames_of(path)
    found: list[NDArray[np.uint8]] = []
    try:
        for n, picture in enumerate(pictures):
            if n % every == 0:
                found.append(_square(picture, size))
            if len(found) > HELD * max_frames:
                found, every = found[::2], 2 * every
    except (ClipError, UserError):
        raise
    except Exception as error:  # PIL's and FFmpeg's readers raise all kinds of them at damaged files
        raise ClipError("cannot be decoded", f"{type(error).__name__}: {error}") from error
    if not found:
        raise ClipError("has no frames")
    if len(found) > max_frames:
        found = [found[int(n)] for n in np.linspace(0, len(found) - 1, max_frames).round()]
    return np.stack(found)


def _square(picture: Image.Image, size: int) -> NDArray[np.uint8]:
    side = min(picture.size)
    left, top = ((length - side) // 2 for length in picture.size)
    box = (left, top, left + side, top + side)
    return np.asarray(picture.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box))


def _pictures_of(folder: Path) -> Iterator[Image.Image]:
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in PICTURES):
        with Image.open(path) as picture:
            yield picture


def _frames_of(path: Path) -> Iterator[Image.Image]:
    try:
        import av
    except ImportError as error:
        raise UserError(f"{show(path)}: needs PyAV; pip install 'ostinato[video]'") from error
    with av.open(str(path)) as container:
        if not container.streams.video:
            raise ClipError("has no pictures")
        for frame in container.decode(container.streams.video[0]):
            yield frame.to_image()
