"""What a data set answers, whatever it holds: a plan, and the batch of any micro-batch of it."""

from dataclasses import dataclass, field
from typing import Any, Protocol

from numpy.typing import NDArray

from trainer.data.plan import MicroBatch, Plan

Batch = dict[str, Any]
"""What `step` gets. A collated micro-batch holds, beside what its recipe needs:

- `keys`: list of B sample names, `valid`: (B,) bool, false where a sample was bad or the whole batch is a dummy that
  keeps the ranks in step; such a place counts 0;
- `noise_keys`: (B,) int64, the name of (seed, epoch, sample), from which all randomness of a sample is drawn;
- `checksums`: B integers, of each sample as it was handed over, for the ledger;
- `faults`: list of `Fault`, one for each bad sample.
"""


MISSING = "missing"
"""Reason of a fault: the sample's shard did not come from where it lies. It may come next time."""


@dataclass(frozen=True)
class Fault:
    """A sample that could not be used."""

    key: str
    reason: str
    """One of few texts, by which faults are counted."""
    detail: str = ""
    """What is particular to this one."""


@dataclass(frozen=True)
class Media:
    """What a person would hear and see of one sample."""

    audio: NDArray[Any] | None = None
    """(N,) float32 in [-1, 1]."""
    sample_rate_hz: int = 16000
    image: NDArray[Any] | None = None
    """(bands, frames), drawn with time to the right."""
    picture: NDArray[Any] | None = None
    """(rows, columns) grey from 0 to 255, shown as it is."""
    captions: dict[str, str] = field(default_factory=dict)
    outputs: NDArray[Any] | None = None
    """(classes, frames) what a model made of it, as probabilities, drawn under the image with the same time."""
    classes: tuple[str, ...] = ()
    """Names of the outputs; the first is that of none."""


class Dataset(Protocol):
    """One split of a corpus."""

    @property
    def plan(self) -> Plan: ...

    @property
    def identity(self) -> dict[str, str]:
        """What a resumed run must find again, as short texts that are compared: `samples` says which they are, the
        rest what the model's inputs and outputs mean."""
        ...

    def __len__(self) -> int: ...

    def load(self, micro_batch: MicroBatch) -> Batch:
        """Read, augment and collate; never raises for a bad sample: it is marked invalid and named in `faults`."""
        ...

    def dummy(self) -> Batch:
        """The smallest batch a model can run, with nothing valid in it."""
        ...

    def media(self, key: str) -> Media:
        """Audio and picture of a sample, for tables and reports."""
        ...
