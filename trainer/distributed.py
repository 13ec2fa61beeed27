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
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous

from trainer.config import Config
from trainer.errors import UserError
from trainer.optim import AVERAGE, AnyOptimizerConfig, Guarded, build_optimizer
from trainer.partitions import BY_STAGE

STORE = "OSTINATO_STORE"
"""Environment variable: the file through which the processes of one host meet."""


class ZeroConfig(Config):
    """What DeepSpeed partitions over the ranks (Rajbhandari et al. 2020, arXiv:1910.02054)."""

    stage: Literal[0, 1, 2, 3] = 0
    """0: nothing; 1: optimizer state; 2: gradients too; 3: weights too. Checkpoints do not depend on it."""
    offload: bool = False
    """Keep the optimizer's state in the memory of the host, and step there (stages 1 to 3)."""
    bucket_megabytes: float = Field(100.0, gt=0)
    """Gradients are reduced in pieces of this size."""

    @model_validator(mode="after")
    def _offload_needs_a_stage(self) -> "ZeroConfig":
        if self.offload and not self.stage:
            raise ValueError("offload = True with stage = 0, which partitions nothing; set zero.stage to 1, 2 or 3")
        return self


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

    Raises:
        UserError: another process has the same place.
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
        elif "TORCHELASTIC_RUN_ID" not in os.environ:  # torchrun numbers its ranks itself, and keeps its store
            arguments["store"] = _meet(rank, timeout)
        dist.init_process_group(**arguments)
    return Ranks(rank, world_size, local_rank, device)


def _meet(rank: int, timeout: timedelta) -> Any:
    """The store at MASTER_ADDR and MASTER_PORT.

    Raises:
        UserError: another process has this rank.
    """
    # A tenth early, so that the reason is told before a watchdog ends this process.
    store, *_ = next(rendezvous("env://", timeout=0.9 * timeout))
    if store.add(f"started/{rank}", 1) > 1:
        raise UserError(f"rank {rank} was started twice: is the number after --node another one on each host?")
    return PrefixStore("default_pg", store)  # as torch does


LOST_PEER = ("gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Timed out waiting", "TCPStore")


def is_lost_peer(error: BaseException) -> bool:
    """Whether an error says only that another rank cannot be reached any more."""
    lost = isinstance(error, dist.DistError) or any(text in str(error) for text in LOST_PEER)
    return isinstance(error, RuntimeError) and lost


def stop() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_first() -> bool:
    """Whether this is rank 0."""
    return dist.get_rank() == 0


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


Precision = Literal["fp32", "bf16", "fp16"]
AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
SMALL = 10_000
"""At stage 3, weights of so many elements stay whole on every rank: fetching them would cost more than it saves."""
ONE_GROUP = 10**15
"""At stage 3, more elements than any model has: a parameter group is stepped at once."""


def check_precision(precision: Precision, device: torch.device) -> None:
    """Refuse what the device cannot do.

    Raises:
        UserError: fp16 without a GPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision = 'fp16': this host has no GPU, and fp16 needs one; set precision=bf16 or fp32")


def deepspeed_config(
    zero: ZeroConfig, optimizer: AnyOptimizerConfig, precision: Precision, rounds: int, whole: bool = False
) -> dict[str, Any]:
    """The DeepSpeed JSON that follows from a run's configuration.

    Args:
        rounds: micro-batches that each rank runs a step.
        whole: keep every weight on every rank at stage 3, for penalties, which look at them outside of a pass.
    """
    stage = zero.stage
    partition: dict[str, Any] = {"stage": stage, "reduce_bucket_size": int(zero.bucket_megabytes * 2**18)}
    if stage == 3:
        partition |= {"stage3_param_persistence_threshold": ONE_GROUP if whole else SMALL, "sub_group_size": ONE_GROUP}
    if zero.offload:
        partition["offload_optimizer"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    derived: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,  # nominal: the plan decides how many samples a micro-batch holds
        "gradient_accumulation_steps": rounds,
        "gradient_clipping": optimizer.clip_norm if stage else 0.0,  # at stage 0 by `Guarded`, with the norm it needs
        "zero_optimization": partition,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
        "wall_clock_breakdown": False,
    }
    if dtype := AUTOCAST.get(precision):  # `bf16.enabled` would cast the weights themselves, and what they parametrise
        derived["torch_autocast"] = {"enabled": True, "dtype": dtype, "lower_precision_safe_modules": []}
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
    rescaled: bool = False
    """Refused, and what the loss was multiplied by (fp16) has been halved: the next step may do."""


class LossScale:
    """What losses are multiplied by in fp16, so that small gradients do not vanish (Micikevicius et al. 2018,
    arXiv:1710.03740): halved when a gradient overflows, doubled after many steps without.

    DeepSpeed's own for autocast is not used: it clips the scaled gradient, and never lowers the scale at stages 1 to 3.

    Args:
        enabled: else it is 1 for good.
    """

    GROW_AFTER = 2000

    def __init__(self, enabled: bool) -> None:
        self.enabled = enabled
        self.value = 2.0**16 if enabled else 1.0
        self.steps_since = 0

    def observe(self, applied: bool) -> bool:
        """Take in a step; true if it was refused and the scale could be lowered for it."""
        self.steps_since = self.steps_since + 1 if applied else 0
        if not self.enabled or (not applied and self.value == 1):
            return False
        if not applied:
            self.value /= 2
        elif self.steps_since % self.GROW_AFTER == 0:
            self.value *= 2
        return not applied

    def state(self) -> list[float]:
        return [self.value, self.steps_since]

    def restore(self, state: list[float]) -> None:
        self.value, self.steps_since = state[0], int(state[1])


class Trained:
    """A model with its optimizer under DeepSpeed.

    Args:
        model: on any device; weights equal on all ranks.
        zero, optimizer, precision: see their configs.
        rounds: micro-batches of each rank a step.
        whole: see `deepspeed_config`.

    Attributes:
        model: call this; `module` is the bare one, whose weights at stage 3 are there only while it is called.
        names: of the trained parameters; a tied one has the first of its names.
        ties: other name of a tied parameter -> its name in `names`.
        shapes: of every tensor of the model by name.
        num_trained: elements of all trained parameters.
    """

    def __init__(
        self,
        model: nn.Module,
        zero: ZeroConfig,
        optimizer: AnyOptimizerConfig,
        precision: Precision,
        rounds: int,
        whole: bool = False,
    ) -> None:
        deepspeed = _import_deepspeed()
        self.stage, self._whole = zero.stage, whole
        self.module = model
        self.names: dict[Tensor, str] = {p: name for name, p in model.named_parameters() if p.requires_grad}
        everywhere = [(n, p) for n, p in model.named_parameters(remove_duplicate=False) if p.requires_grad]
        self.ties = {n: self.names[p] for n, p in everywhere if n != self.names[p]}
        self.shapes = {name: list(t.shape) for name, t in model.state_dict().items()}
        self.num_trained = sum(p.numel() for p in self.names)
        self.scale = LossScale(precision == "fp16")
        self.optimizer: Guarded = build_optimizer(optimizer, model, guards=zero.stage == 0)
        self._frozen = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not p.requires_grad}
        self._copies: dict[str, Tensor] = {}
        if zero.stage == 3:
            self._copies = {n: p.detach().clone() for n, p in self._frozen.items()}
        self.model, self._wrapper, _, _ = deepspeed.initialize(
            model=model,
            model_parameters=[p for p in model.parameters() if p.requires_grad],
            optimizer=self.optimizer,
            config=deepspeed_config(zero, optimizer, precision, rounds, whole),
        )
        if not self.stage and dist.get_world_size() == 1:
            self.model.enable_backward_allreduce = False  # with itself: it copies all gradients into one, and back
        self._gathered = deepspeed.zero.GatheredParameters
        self._partition = BY_STAGE[zero.stage](self.optimizer, self._wrapper)
        self.model.torch_autocast_z0_gradscaler = self._wrapper.torch_autocast_gradscaler = None  # see LossScale

    def hold_weights(self) -> None:
        """Where `whole` was asked for: have every weight on this rank, as at stage 3 the first pass gives back all
        that it took."""
        if self._whole and self.stage == 3:
            missing: list[Any] = [p for p in self.names if p.shape != p.ds_shape]  # type: ignore[attr-defined]
            if missing:
                missing[0].all_gather(missing)

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of one micro-batch; DeepSpeed divides by the rounds and averages over the ranks."""
        if self.scale.enabled and self.stage:
            self._wrapper.override_loss_scale(self.scale.value)  # it multiplies, and divides before it clips
        self.optimizer.scale = self.scale.value
        self.model.backward(loss if self.stage else loss * self.scale.value)

    def step(self) -> Applied | None:
        """After each `backward`; the last round of a step moves the weights, the others return None."""
        boundary = self.model.is_gradient_accumulation_boundary()
        self.model.step()
        if not boundary:
            return None
        applied, norm = not self.optimizer.refused, self.optimizer.grad_norm
        if self.stage:
            applied, norm = bool(self.model.was_step_applied()), float(self._wrapper._global_grad_norm)
        return Applied(applied, norm, self.scale.observe(applied))

    def gradient_norms(self) -> dict[str, float]:
        """Norm of the last step's gradient of each trained parameter, before clipping; empty at ZeRO 1 to 3, where no
        rank has whole gradients."""
        return {self.names[p]: float(norm) for p, norm in getattr(self.optimizer, "norms", {}).items()}

    # What a checkpoint saves and fills

    def slices(self, everything: bool = False) -> Iterator[Slice]:
        """Pieces that this rank owns; at stage 0, where all hold all, each rank owns every N-th tensor.

        Args:
            everything: also what other ranks own, as far as this rank holds it (for filling).
        """
        for piece in self._partition.pieces(everything):
            name, holder = self.names[piece.parameter], piece.holder
            inside = slice(piece.offset, piece.offset + piece.length)
            yield Slice(name, WEIGHT, piece.start, holder.detach().view(-1)[inside])
            for slot, values in self.optimizer.state.get(holder, {}).items():
                if torch.is_tensor(values) and values.numel() == holder.numel() and values.ndim:
                    yield Slice(name, slot, piece.start, values.view(-1)[inside])
        if everything or dist.get_rank() == 0:
            for name, values in self.untrained().items():
                yield Slice(name, BUFFER, 0, values.view(-1))

    def untrained(self) -> dict[str, Tensor]:
        """Frozen weights and buffers by name; writing into them counts from `filled` on."""
        trained = {*self.names.values(), *self.ties}
        state = {name: values for name, values in self.module.state_dict().items() if name not in trained}
        return state | self._copies

    def scalars(self) -> list[dict[str, float]]:
        """For each parameter group, the optimizer's numbers that are not tensors of the weights' shape."""
        groups = []
        for group, holders in zip(self.optimizer.param_groups, self._partition.holders(), strict=True):
            state = self.optimizer.state.get(holders[0], {}) if holders else {}
            numbers = {k: float(v) for k, v in state.items() if not torch.is_tensor(v) or v.ndim == 0}
            groups.append({**numbers, "steps": float(group["steps"])})
        return groups

    def allocate(self, slots: set[str], scalars: list[dict[str, float]]) -> None:
        """Make the optimizer's slots, so that `slices` shows them and they can be filled."""
        holders = self._partition.holders()
        for group, tensors, numbers in zip(self.optimizer.param_groups, holders, scalars, strict=True):
            group["steps"] = int(numbers["steps"])
            for p in tensors:
                state = self.optimizer.state[p]
                state.clear()
                for slot in slots:
                    state[slot] = torch.zeros_like(p, memory_format=torch.preserve_format)
                for name, value in numbers.items():
                    if name != "steps":
                        state[name] = torch.tensor(value)

    def filled(self) -> None:
        """After the slices were filled: bring what is computed with in line with the masters."""
        self._partition.publish()
        if self._copies:
            with self._gathered(list(self._frozen.values()), modifier_rank=0), torch.no_grad():
                for name, p in self._frozen.items():
                    p.copy_(self._copies[name])

    def full(self, slot: str = AVERAGE) -> dict[str, Tensor]:
        """One slot of every trained weight as a whole, by every name, on every rank; weights where the slot does not
        exist."""
        found = [s for s in self.slices(everything=True) if s.slot == slot]
        if not sum(gather(len(found))):
            return self.full(WEIGHT)
        device = self.model.device
        whole = {name: torch.zeros(self.shapes[name], device=device) for name in self.names.values()}
        for piece in found:
            whole[piece.name].view(-1)[piece.start : piece.start + len(piece.values)] = piece.values.to(device)
        if self.stage:
            for values in whole.values():
                sum_over_ranks(values)  # every element is zero on all ranks but its owner
        return whole | {other: whole[name] for other, name in self.ties.items()}

    def weights(self) -> dict[str, Tensor]:
        """State dict to evaluate with, on every rank: averaged weights (if kept), the other weights, and buffers."""
        return {**self.untrained(), **self.full()}


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
