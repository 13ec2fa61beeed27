"""Ranks, collectives, and the model under DeepSpeed. The only module that knows DeepSpeed.

DeepSpeed is used at every world size, one included. Its checkpoints are not used: `Trained.slices` names the piece of
each weight and optimizer slot that this rank owns, at any ZeRO stage, and `trainer.checkpoint` writes and fills those.
"""

import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from pydantic import Field
from torch import Tensor, nn
from torch.distributed import distributed_c10d

from trainer.config import Config
from trainer.optim import AVERAGE, AdamWConfig, Guarded, RMSpropConfig, build_optimizer

STORE = "OSTINATO_STORE"
"""Environment variable: the file through which the processes of one host meet."""


class ZeroConfig(Config):
    """What DeepSpeed partitions over the ranks (Rajbhandari et al. 2020, arXiv:1910.02054)."""

    stage: Literal[0, 1, 2] = 0
    """0: nothing; 1: optimizer state; 2: gradients too. Checkpoints do not depend on it."""
    bucket_megabytes: float = Field(100.0, gt=0)
    """Gradients are reduced in pieces of this size."""


@dataclass(frozen=True)
class Ranks:
    """This process among all."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def first(self) -> bool:
        return self.rank == 0


def start(timeout_seconds: float = 1800.0) -> Ranks:
    """Join the process group that the environment names (spawner, torchrun, srun), or be alone.

    Args:
        timeout_seconds: after which a collective fails that another rank does not join, DeepSpeed's too.

    Returns:
        this process's place. NCCL with a GPU, gloo without.
    """
    rank = int(os.environ.get("RANK", "0"))
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    timeout = timedelta(seconds=timeout_seconds)
    # DeepSpeed makes its groups without a time-out, so that torch's default is theirs.
    distributed_c10d.default_pg_timeout = timeout
    distributed_c10d.default_pg_nccl_timeout = timeout  # type: ignore[attr-defined]
    gpu = torch.cuda.is_available()
    device = torch.device("cuda", local_rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        arguments: dict[str, Any] = {
            "backend": "nccl" if gpu else "gloo",
            "rank": rank,
            "world_size": world_size,
            "timeout": timeout,
        }
        if world_size == 1:
            arguments["store"] = dist.HashStore()  # type: ignore[attr-defined]
        elif STORE in os.environ:
            arguments["store"] = dist.FileStore(os.environ[STORE], world_size)  # type: ignore[attr-defined]
        dist.init_process_group(**arguments)
    return Ranks(rank, world_size, local_rank, device)


LOST_PEER = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "TCPStore")


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says only that another rank cannot be reached any more."""
    lost = isinstance(error, dist.DistError) or any(text in str(error) for text in LOST_PEER)
    return isinstance(error, RuntimeError) and lost


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first_of_host() -> bool:
    """Whether this rank is number 0 of its host."""
    return os.environ.get("LOCAL_RANK", "0") == "0"


def barrier() -> None:
    if dist.get_world_size() > 1:
        dist.barrier()


def sum_over_ranks(values: Tensor) -> Tensor:
    """Add a tensor over all ranks, in place."""
    if dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def gather(value: Any) -> list[Any]:
    """One picklable value from each rank, in rank order, on every rank."""
    if dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_first(value: Any) -> Any:
    """The value of rank 0, on every rank."""
    box = [value]
    if dist.get_world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    return box[0]


def on_first(action: Callable[[], Any]) -> Any:
    """Do something on rank 0 and give its result to all; an exception is raised on every rank alike."""
    outcome: tuple[Any, BaseException | None] = (None, None)
    if dist.get_rank() == 0:
        try:
            outcome = (action(), None)
        except Exception as error:
            outcome = (None, error)
    result, failure = from_first(outcome)
    if failure is not None:
        raise failure
    return result


def deepspeed_config(
    zero: ZeroConfig, optimizer: AdamWConfig | RMSpropConfig, precision: str, rounds: int
) -> dict[str, Any]:
    """The DeepSpeed JSON that follows from a run's configuration.

    Args:
        rounds: micro-batches that each rank runs a step.
    """
    stage = zero.stage
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # nominal: the plan decides how many samples a micro-batch holds
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": optimizer.clip_norm if stage else 0.0,  # at stage 0 by `Guarded`, with the norm it needs
        "zero_optimization": {"stage": stage, "reduce_bucket_size": int(zero.bucket_megabytes * 2**18)},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":  # `bf16.enabled` would cast the weights themselves, and what is parametrised by them
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return derived


@dataclass(frozen=True)
class Slice:
    """A piece of a named tensor that this rank holds."""

    name: str
    slot: str
    """ "weight", a slot of the optimizer ("exp_avg", "average", ...), "buffer" (frozen weights too), or "carried"."""
    start: int
    """Place of the first element in the flattened tensor."""
    values: Tensor
    """(n,) a view: writing into it changes what is trained."""


WEIGHT = "weight"
BUFFER = "buffer"
CARRIED = "carried"


@dataclass(frozen=True)
class Applied:
    """What came of an optimizer step."""

    applied: bool
    """False: the gradient was not finite, and nothing changed on any rank."""
    grad_norm: float
    """Of the whole gradient before clipping; NaN or infinite if refused."""


class Trained:
    """A model with its optimizer under DeepSpeed.

    Args:
        model: on any device; weights equal on all ranks.
        zero, optimizer, precision: see their configs.
        rounds: micro-batches of each rank a step.

    Attributes:
        model: call this; `module` is the bare one.
        names: of the trained parameters; a tied one has the first of its names.
        ties: other name of a tied parameter -> its name in `names`.
    """

    def __init__(
        self,
        model: nn.Module,
        zero: ZeroConfig,
        optimizer: AdamWConfig | RMSpropConfig,
        precision: str,
        rounds: int,
    ) -> None:
        deepspeed = _import_deepspeed()
        self.stage = zero.stage
        self.module = model
        self.names = {p: name for name, p in model.named_parameters() if p.requires_grad}
        everywhere = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        self.ties = {n: self.names[p] for n, p in everywhere if n != self.names[p]}
        self.optimizer: Guarded = build_optimizer(optimizer, model, guards=zero.stage == 0)
        self.model, self._wrapper, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=self.optimizer,
            config=deepspeed_config(zero, optimizer, precision, rounds),
        )

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; DeepSpeed divides by the rounds and averages over the ranks."""
        self.model.backward(loss)

    def step(self) -> Applied | None:
        """After each `backward`; the last round of a step moves the weights, the others return None."""
        boundary = self.model.is_gradient_accumulation_boundary()
        self.model.step()
        if not boundary:
            return None
        if self.stage == 0:
            return Applied(not self.optimizer.refused, self.optimizer.grad_norm)
        return Applied(bool(self.model.was_step_applied()), float(self._wrapper._global_grad_norm))

    # What a checkpoint saves and fills

    def _holders(self, everything: bool) -> Iterator[tuple[str, int, int, Tensor, int, int]]:
        """(name, group, start in the tensor, optimizer's tensor, start in that, length) of what this rank owns."""
        if self.stage == 0:
            number = 0
            for g, group in enumerate(self.optimizer.param_groups):
                for p in group["params"]:
                    if everything or number % dist.get_world_size() == dist.get_rank():
                        yield self.names[p], g, 0, p, 0, p.numel()
                    number += 1
            return
        for g, params in enumerate(self._wrapper.bit16_groups):
            flat = self._wrapper.single_partition_of_fp32_groups[g]
            for p in params:
                if (mapping := p._hp_mapping) is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield self.names[p], g, here.start, flat, there.start, there.numel

    def slices(self, everything: bool = False) -> Iterator[Slice]:
        """Pieces that this rank owns; at stage 0, where all hold all, each rank owns every N-th tensor.

        Args:
            everything: also what other ranks own, as far as this rank holds it (for filling).
        """
        for name, _, start, holder, offset, length in self._holders(everything):
            flat = holder.detach().view(-1)
            yield Slice(name, WEIGHT, start, flat[offset : offset + length])
            for slot, values in self.optimizer.state.get(holder, {}).items():
                if torch.is_tensor(values) and values.numel() == holder.numel() and values.ndim:
                    yield Slice(name, slot, start, values.view(-1)[offset : offset + length])
        if everything or dist.get_rank() == 0:
            trained = {*self.names.values(), *self.ties}
            for name, values in self.module.state_dict().items():
                if name not in trained:
                    yield Slice(name, BUFFER, 0, values.view(-1))

    def scalars(self) -> list[dict[str, float]]:
        """For each parameter group, the optimizer's numbers that are not tensors of the weights' shape."""
        groups = []
        for group in self.optimizer.param_groups:
            state = self.optimizer.state.get(group["params"][0], {}) if group["params"] else {}
            numbers = {k: float(v) for k, v in state.items() if not torch.is_tensor(v) or v.ndim == 0}
            groups.append({**numbers, "steps": float(group["steps"])})
        return groups

    def allocate(self, slots: set[str], scalars: list[dict[str, float]]) -> None:
        """Make the optimizer's slots, so that `slices` shows them and they can be filled."""
        for group, numbers in zip(self.optimizer.param_groups, scalars, strict=True):
            group["steps"] = int(numbers["steps"])
            for p in group["params"]:
                state = self.optimizer.state[p]
                for slot in slots:
                    state[slot] = torch.zeros_like(p, memory_format=torch.preserve_format)
                for name, value in numbers.items():
                    if name != "steps":
                        state[name] = torch.tensor(value)

    def filled(self) -> None:
        """After the slices were filled: bring what is computed with in line with the masters."""
        if self.stage:
            self._wrapper.update_lp_params()

    def full(self, slot: str = AVERAGE) -> dict[str, Tensor]:
        """One slot of every trained weight as a whole, by every name, on every rank; weights where the slot does not
        exist."""
        weights = {name: p.detach() for p, name in self.names.items()}
        found = [] if slot == WEIGHT else [s for s in self.slices(everything=True) if s.slot == slot]
        if slot == WEIGHT or not sum(gather(len(found))):
            return weights | {other: weights[name] for other, name in self.ties.items()}
        whole = {name: torch.zeros_like(w) for name, w in weights.items()}
        for piece in found:
            whole[piece.name].view(-1)[piece.start : piece.start + len(piece.values)] = piece.values
        if self.stage:
            for values in whole.values():
                sum_over_ranks(values)  # every element is zero on all ranks but its owner
        return whole | {other: whole[name] for other, name in self.ties.items()}


def _import_deepspeed() -> Any:
    os.environ.setdefault("LOCAL_RANK", "0")  # it refuses to start without
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # This op serves inference only, and compiling it takes half a minute at the first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(verbose=False)
    return deepspeed
