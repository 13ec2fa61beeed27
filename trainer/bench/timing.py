"""Ways of doing one thing, timed in turn, so that what a machine does meanwhile hits all of them alike."""

import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Timing:
    """Seconds of one way of doing a thing, a value a repetition."""

    name: str
    seconds: list[float]
    cpu_seconds: list[float]
    """Of this process and of the workers it has waited for."""

    def over(self, other: "Timing") -> list[float]:
        """Ratios, repetition by repetition: the two stood side by side each time."""
        return [a / b for a, b in zip(self.seconds, other.seconds, strict=True)]

    def cpu_over(self, other: "Timing") -> list[float]:
        """The same of processor time."""
        return [a / b for a, b in zip(self.cpu_seconds, other.cpu_seconds, strict=True)]


def cpu_seconds() -> float:
    """Processor time of this process and of its children that have ended."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def interleaved(ways: dict[str, Callable[[], object]], repetitions: int) -> dict[str, Timing]:
    """Time each way in turn, A B C A B C ..., after one warm-up of each."""
    for run in ways.values():
        run()
    timings = {name: Timing(name, [], []) for name in ways}
    for i in range(repetitions):
        for name in list(ways)[:: 1 if i % 2 else -1]:  # whoever comes first alternates
            start, cpu_start = time.perf_counter(), cpu_seconds()
            ways[name]()
            timings[name].seconds.append(time.perf_counter() - start)
            timings[name].cpu_seconds.append(cpu_seconds() - cpu_start)
    return timings


def describe(values: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(values) == 1:
        return dict.fromkeys(("median", "low", "high"), values[0])
    low, middle, high = statistics.quantiles(values, n=4)
    return {"median": middle, "low": low, "high": high}
