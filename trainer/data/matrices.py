"""Files of precomputed features: NumPy's .npy, and the .mfc of CMU Sphinx."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from trainer.data.audio import AudioError, decode_matrix

ENDINGS = (".npy", ".mfc")


def read_matrix(path: Path, num_bands: int) -> NDArray[np.float32]:
    """The feature matrix (T, F) of a file.

    Args:
        num_bands: F.

    Raises:
        AudioError: it is of another kind or width, or damaged.
        OSError: it cannot be read.
    """
    ending = path.suffix.lower()
    if ending == ".npy":
        return decode_matrix(path.read_bytes(), num_bands)
    if ending == ".mfc":
        return sphinx_matrix(path.read_bytes(), num_bands)
    raise AudioError(f"ends in {ending!r}, wanted {' or '.join(ENDINGS)} where data.features.kind is precomputed")


def sphinx_matrix(content: bytes, num_bands: int) -> NDArray[np.float32]:
    """The matrix (T, F) of a Sphinx file: a count as a 32-bit integer, then so many 32-bit floats, row after row.

    The byte order is that of the machine which wrote it, and shows in the count.

    Raises:
        AudioError: the count is not that of the floats, or no multiple of the width; no rows; NaN.
    """
    num_floats = (len(content) - 4) // 4
    order = next((o for o in "><" if content[:4] == np.array(num_floats, dtype=f"{o}i4").tobytes()), None)
    if order is None or len(content) != 4 + 4 * num_floats:
        raise AudioError(f"not a Sphinx feature file, or cut: {len(content):,} bytes are not what its count says")
    if num_floats % num_bands:
        raise AudioError(f"{num_floats:,} values are no rows of {num_bands} (data.features.num_bands)")
    if not num_floats:
        raise AudioError("no rows")
    matrix = np.frombuffer(content, f"{order}f4", offset=4).reshape(-1, num_bands).astype(np.float32)
    if not np.isfinite(matrix).all():
        raise AudioError("NaN or infinite values")
    return matrix
