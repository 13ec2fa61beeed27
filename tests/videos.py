"""Small real videos, encoded by FFmpeg's libraries."""

from pathlib import Path

import numpy as np

WIDTH, FRAMES = 48, 12


def disc(t: int, seed: int, down: bool) -> np.ndarray:
    """A frame (WIDTH, WIDTH, 3): a dark disc on its way to the right, or a bright one on its way down."""
    rows, columns = np.mgrid[:WIDTH, :WIDTH]
    along, across = 6 + 3 * t, 12 + (seed * 7) % 24
    y, x = (along, across) if down else (across, along)
    inside = (rows - y) ** 2 + (columns - x) ** 2 < 100
    shade = 10 * (seed % 4)
    disc, around = ([220, 200, 40], [30, 40 + shade, 60]) if down else ([30, 40, 60], [220, 200 - shade, 140])
    return np.where(inside[..., None], disc, around).astype(np.uint8)


def write_video(path: Path, seed: int, down: bool) -> Path:
    """A file of the kind that its ending names, 25 frames a second."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=25)
        stream.width = stream.height = WIDTH
        stream.pix_fmt, stream.bit_rate = "yuv420p", 1_000_000
        for t in range(FRAMES):
            for packet in stream.encode(av.VideoFrame.from_ndarray(disc(t, seed, down), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path
