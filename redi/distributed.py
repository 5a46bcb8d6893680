"""Ranks, devices and sharding: one process, or many started by torchrun or accelerate.

CUDA always shards with FSDP2 (`fully_shard`), on one GPU too: fp32 master weights, bf16 compute,
fp32 gradient reduction. One CPU process runs the plain module; several CPU processes shard over
gloo.
"""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor


@dataclass(frozen=True)
class Ranks:
    rank: int
    world_size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()


def setup() -> Ranks:
    """Joins the process group that torchrun / accelerate described in the environment, if any."""
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    cuda = torch.cuda.is_available()
    device = (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if cuda
        else torch.device("cpu")
    )
    if cuda:
        torch.cuda.set_device(device)
    if not dist.is_initialized() and (cuda or world_size > 1):
        backend = "nccl" if cuda else "gloo"
        if world_size > 1:
            dist.init_process_group(backend)
        else:  # FSDP2 wants a group of one
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return Ranks(rank, world_size, device)


def teardown() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(model: nn.Module, blocks: list[nn.Module], ranks: Ranks, *, bf16: bool) -> None:
    """Shards in place: each transformer block is a group; what is left (embeddings, final norm,
    head) is the outermost group, so that tied embeddings stay in one group (torch >= 2.13 requires
    it)."""
    if not dist.is_initialized():
        return
    policy = (
        MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
        if bf16 and ranks.device.type == "cuda"
        else MixedPrecisionPolicy()
    )
    for block in blocks:
        fully_shard(block, mp_policy=policy)
    fully_shard(model, mp_policy=policy)


def full_tensors(named: Mapping[str, Tensor], *, keep: bool = True) -> dict[str, Tensor]:
    """Whole tensors on the CPU, for ranks that `keep` them; the others get an empty dictionary.

    A collective: all ranks call it in the same order.
    """
    gathered = {}
    for name, tensor in named.items():
        value = whole(tensor)
        if keep:
            gathered[name] = value.detach().cpu()
    return gathered


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor's full value, on its device. A collective."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def load_full_tensors(named: Mapping[str, Tensor], source: Callable[[str], Tensor]) -> None:
    """Copies whole tensors into (possibly sharded) ones of the same name and shape."""
    for name, target in named.items():
        value = source(name).to(target.device, target.dtype)
        if isinstance(target, DTensor):
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)


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
