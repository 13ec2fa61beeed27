"""Where DeepSpeed keeps what a rank owns: the pieces of each weight, at each stage of ZeRO.

The only place that knows attributes of DeepSpeed's optimizers: the resume tests fail if they move
(docs/decisions/0001).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """A run of elements of one weight that this rank holds, for the optimizer, in `holder`."""

    parameter: Tensor
    start: int
    """In the flattened weight."""
    holder: Tensor
    """What the optimizer knows: its state is kept under this tensor."""
    offset: int
    """In the flattened `holder`."""
    length: int


class Whole:
    """Stage 0: every rank holds everything; for a checkpoint each owns every N-th tensor.

    The other stages answer the same questions.

    Args:
        optimizer: that steps.
        wrapper: DeepSpeed's optimizer around it.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, wrapper: Any) -> None:
        self.optimizer, self.wrapper = optimizer, wrapper

    def holders(self) -> list[list[Tensor]]:
        """The tensors that the optimizer steps, for each of its parameter groups."""
        return [list(group["params"]) for group in self.optimizer.param_groups]

    def pieces(self, everything: bool) -> Iterator[Piece]:
        """What this rank owns; `everything`: what it holds."""
        for number, p in enumerate(p for group in self.holders() for p in group):
            if everything or number % dist.get_world_size() == dist.get_rank():
                yield Piece(p, 0, p, 0, p.numel())

    def publish(self) -> None:
        """After values were written into the pieces: bring what is computed with in line with them."""


class Flat(Whole):
    """Stages 1 and 2: the weights of a group lie one behind the other, and a rank owns a stretch of that."""

    def holders(self) -> list[list[Tensor]]:
        return [[flat] for flat in self.wrapper.single_partition_of_fp32_groups]

    def pieces(self, everything: bool) -> Iterator[Piece]:
        for [flat], parameters in zip(self.holders(), self.wrapper.bit16_groups, strict=True):
            for p in parameters:
                if (mapping := p._hp_mapping) is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Piece(p, here.start, flat, there.start, there.numel)

    def publish(self) -> None:
        self.wrapper.update_lp_params()


class Sharded(Whole):
    """Stage 3: each weight is cut into as many equal pieces as there are ranks, the last one padded."""

    def holders(self) -> list[list[Tensor]]:
        groups: list[list[Tensor]] = [[] for _ in self.optimizer.param_groups]
        for number, flat in enumerate(self.wrapper.fp32_partitioned_groups_flat):
            groups[self.wrapper.sub_group_to_group_id[number]].append(flat)
        return groups

    def pieces(self, everything: bool) -> Iterator[Piece]:
        for flat, parameters in zip(self.wrapper.fp32_partitioned_groups_flat, self.wrapper.fp16_groups, strict=True):
            for p in parameters:
                _, offset, size = self.wrapper.grad_position[self.wrapper.get_param_id(p)]
                start = size * dist.get_rank()
                if start < p.ds_numel:
                    yield Piece(p, start, flat, offset, min(size, p.ds_numel - start))

    def publish(self) -> None:
        wrapper = self.wrapper
        wrapper._partition_all_parameters()
        for number in range(len(wrapper.fp16_groups)):
            wrapper._reassign_or_swap_out_partitioned_parameters(number)
        if whole := wrapper.persistent_parameters:  # small ones are never given up
            whole[0].all_gather(whole)


BY_STAGE: dict[int, type[Whole]] = {0: Whole, 1: Flat, 2: Flat, 3: Sharded}
