"""A trace of a few steps, to look at in chrome://tracing or ui.perfetto.dev."""

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

FIRST, STEPS = 2, 3
"""Steps that pass first (caches fill, memory is taken), and steps that are traced."""


class Profile:
    """Traces steps of this process.

    Args:
        path: of the trace (JSON).
    """

    def __init__(self, path: Path) -> None:
        def write(profile: Any) -> None:
            path.parent.mkdir(exist_ok=True)
            profile.export_chrome_trace(str(path))

        self._profile: Any = torch.profiler.profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])],
            schedule=torch.profiler.schedule(wait=FIRST - 1, warmup=1, active=STEPS, repeat=1),
            on_trace_ready=write,
        )
        self._steps = 0
        self._profile.start()

    def step(self) -> None:
        """After each step."""
        if self._profile is not None:
            self._steps += 1
            self._profile.step()
            if self._steps == FIRST + STEPS:
                self.stop()

    def stop(self) -> None:
        """At the end of the run: a run that was shorter has a shorter trace."""
        if self._profile is not None:
            self._profile.stop()
            self._profile = None
