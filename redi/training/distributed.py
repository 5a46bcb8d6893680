"""Ranks, devices and sharding: one process, or many started by torchrun or accelerate.

CUDA always shards with FSDP2 (`fully_shard`), on one GPU too: fp32 master weights, bf16 compute,
fp32 gradient reduction. One CPU process runs the plain module; several CPU processes shard over
gloo.
"""

import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from redi.errors import RediError

T = TypeVar("T")
PATIENCE = timedelta(hours=2)  # the others wait while rank 0 exports


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def gather(self, value: T) -> list[T]:
        """Every rank's value (small, of plain types), by rank. A collective."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], T], *, main: bool = False) -> list[T]:
        """Does `work` on every rank, or on the main one only, and waits for all; returns what each
        got. Raises RediError or OSError on all ranks when it did on any, so that none goes on
        alone."""
        result: T | None = None
        problem: Exception | None = None
        try:
            if self.is_main or not main:
                result = work()
        except RediError as error:
            problem = RediError(str(error))
        except OSError as error:
            problem = OSError(f"rank {self.rank}: {error}" if self.world_size > 1 else str(error))
        outcomes = self.gather((result, problem))
        for kind in (RediError, OSError):
            texts = [str(problem) for _, problem in outcomes if isinstance(problem, kind)]
            if texts:
                raise kind("; ".join(dict.fromkeys(texts)))
        return [result for result, _ in outcomes]  # type: ignore[misc]


def setup() -> Ranks:
    """Joins the process group that torchrun / accelerate described in the environment, if any."""
    world_size, rank, local = (_told(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
    world_size = max(world_size, 1)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    is_alone = world_size == 1 or dist.is_initialized()
    if not is_alone and (missing or rank >= world_size):  # else: a wait for others without end
        why = f"{missing[0]} is not set" if missing else f"RANK {rank} is beyond the last"
        raise RediError(f"WORLD_SIZE is {world_size}, but {why}: start the ranks by torchrun")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and (cuda or world_size > 1):
        backend = "nccl" if cuda else "gloo"
        if world_size > 1:
            dist.init_process_group(backend, timeout=PATIENCE)
        else:  # FSDP2 wants a group of one
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(rank, world_size, device)


def _told(name: str) -> int:
    value = os.environ.get(name) or "0"
    if not value.isdecimal():
        raise RediError(f"{name} is {value!r} in the environment, where torchrun sets a number")
    return int(value)


def teardown() -> None:
    """The end of a rank's process: leaves the group.

    Over gloo it ends the process here, with exit code 0: gloo's destructors now and then abort
    ("terminate called without an active exception"), most likely when another rank went first.
    """
    if not dist.is_initialized():
        return
    if dist.get_backend() == "gloo":
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
    dist.destroy_process_group()


def shard(model: nn.Module, blocks: list[nn.Module], ranks: Ranks, *, bf16: bool) -> None:
    """Shards in place, from the CPU to the ranks' device, block by block: each transformer block is
    a group; what is left (embeddings, final norm, head) is the outermost group, so that tied
    embeddings stay in one group (torch >= 2.13 requires it)."""
    if not dist.is_initialized():
        return
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bf16 and ranks.device.type == "cuda"
        else MixedPrecisionPolicy()
    )
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    # a pack's log-probs of DPO's reference must arrive in float32; its ids need no cast
    fully_shard(model, mp_policy=replace(policy, cast_forward_inputs=False))


def reshard(model: nn.Module) -> None:
    """After a forward without backward: the outermost group would stay gathered, hide its shards'
    gradients from clipping, and miss the optimizer's step."""
    for module in model.modules():  # all of them: a forward that failed left the inner ones too
        if isinstance(module, FSDPModule):
            module.reshard()


def local_part(tensor: Tensor) -> tuple[Tensor, list[int]]:
    """The part of a (possibly sharded) tensor that this rank holds, and where in the whole tensor
    it starts."""
    if not isinstance(tensor, DTensor):
        return tensor, [0] * tensor.ndim
    (chunk,) = tensor.__create_chunk_list__()  # how torch.distributed.checkpoint asks
    return tensor.to_local(), list(chunk.offsets)


def full_tensors(
    named: Mapping[str, Tensor], *, dtype: torch.dtype | None = None, keep: bool = True
) -> dict[str, Tensor]:
    """Whole tensors on the CPU, those of floating numbers as `dtype`, for ranks that `keep` them;
    the others get an empty dictionary and hold one whole tensor at a time. A tensor under several
    names (a tied one) is gathered once and stays one.

    A collective: all ranks call it in the same order.
    """
    gathered: dict[str, Tensor] = {}
    first_name: dict[int, str] = {}  # by the tensor's id
    for name, tensor in named.items():
        known = first_name.setdefault(id(tensor), name)
        value = whole(tensor).detach() if known == name else None
        if keep:
            wanted = dtype if tensor.is_floating_point() else None
            gathered[name] = gathered[known] if value is None else value.to("cpu", wanted)
    return gathered


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value, on its device. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_sum(values: Tensor) -> Tensor:
    """Sum over ranks, in place."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(values)
    return values


def any_rank(flag: bool, ranks: Ranks) -> bool:
    """True on all ranks if it is on one, so that ranks stop at the same step."""
    if ranks.world_size == 1:
        return flag
    return bool(all_sum(torch.tensor(float(flag), device=ranks.device)).item())
