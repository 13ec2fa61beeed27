"""Random sparse recurrence: a hidden unit sees some others, chosen once."""

from typing import Literal

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor

from trainer import keyed
from trainer.config import Config
from trainer.models.structure.base import Structure, uniform


class SparseConfig(Config):
    kind: Literal["sparse"] = "sparse"
    density: float = Field(0.1, gt=0, le=1)
    """Share of the entries that exist."""
    pattern: NonNegativeInt = 0
    """Another number chooses other entries; it does not follow the run's seed, so runs of several seeds are alike."""

    def build(self, hidden_size: int, num_gates: int) -> "Sparse":
        return Sparse(hidden_size, num_gates, self.density, self.pattern)


class Sparse(Structure):
    """Map h to W h, where each gate's W has round(density H^2) entries, at least one, at places drawn by hashes.

    Args:
        hidden_size: H.
        num_gates: G.
        density: in (0, 1].
        pattern: names the draw.
    """

    has_kernel = False

    def __init__(self, hidden_size: int, num_gates: int, density: float, pattern: int) -> None:
        self.pattern = pattern
        self.num_entries = max(1, round(density * hidden_size**2))
        super().__init__(hidden_size, num_gates, (num_gates, self.num_entries))
        self.reset_parameters()

    def own_start(self) -> Tensor:
        return uniform(self.weight.shape, (self.num_entries / self.hidden_size) ** -0.5)

    def places(self) -> Tensor:
        area = self.hidden_size**2
        gates = []
        for gate in range(self.num_gates):
            drawn = keyed.permutation(area, self.pattern, self.hidden_size, gate, "sparse")[: self.num_entries]
            gates.append(torch.from_numpy(drawn).sort().values + gate * area)
        return torch.cat(gates)
