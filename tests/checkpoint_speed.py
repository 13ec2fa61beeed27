"""How long a step waits for a checkpoint, how long the write takes, and how long a start checks it.

python -m tests.checkpoint_speed 10 /some/folder        10 million weights: 160 MB with two moments and an average
"""

import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from trainer import checkpoint, distributed
from trainer.checkpoint_writer import Writer
from trainer.distributed import Slice

REPEATS = 5


def main(millions: int, parent: Path) -> None:
    distributed.start()
    torch.set_num_threads(1)
    size = millions * 10**6
    tensors = {slot: torch.randn(size) for slot in ("weight", "exp_avg", "exp_avg_sq", "average")}
    times: dict[str, list[float]] = {"a step waits": [], "written and published": [], "checked at a start": []}
    with tempfile.TemporaryDirectory(dir=parent) as name:
        writer = Writer(Path(name), checkpoint.CheckpointConfig())
        for step in range(1, REPEATS + 1):
            start = time.perf_counter()
            writer.start(step, [Slice("w", slot, 0, x) for slot, x in tensors.items()], {"shapes": {"w": [size]}})
            times["a step waits"].append(time.perf_counter() - start)
            assert writer.wait()
            times["written and published"].append(time.perf_counter() - start)
            start = time.perf_counter()
            checkpoint.Checkpoint.open(checkpoint.step_folder(Path(name), step))
            times["checked at a start"].append(time.perf_counter() - start)
    for what, seconds in times.items():
        print(f"{what}: median {statistics.median(seconds):.3f} s, least {min(seconds):.3f} s")


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
