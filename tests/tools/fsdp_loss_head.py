"""Two processes on CPU: LossHead under FSDP2 must give the gradient of the unsharded loss."""

import os
import sys

import pytest
import torch
import torch.distributed as dist
from redi_kernels import LossHead, redi_loss, sft_loss
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.multiprocessing import spawn

T, V, H = 24, 38, 8  # 38 rows: two uneven shards after padding
CU = torch.arange(0, T + 1, 6)
IS_CHOSEN = torch.tensor([True, False, True, False])


def work(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=2)
    g = torch.Generator().manual_seed(0)
    x_TH, w_VH = torch.randn(T, H, generator=g), torch.randn(V, H, generator=g)
    y_T = torch.randint(V, (T,), generator=g)

    whole = w_VH.clone().requires_grad_()
    redi_loss(x_TH, whole, y_T, CU, IS_CHOSEN).loss.backward()

    mesh = dist.init_device_mesh("cpu", (2,))
    head = fully_shard(LossHead(nn.Parameter(w_VH)), mesh=mesh)
    assert isinstance(head.weight, DTensor)
    with pytest.raises(TypeError, match=r"DTensor.*LossHead"):
        sft_loss(x_TH, head.weight, y_T)

    mine = slice(12 * rank, 12 * rank + 12)
    counts = {"num_chosen": 2, "num_rejected": 2}
    sequences = slice(2 * rank, 2 * rank + 2)
    out = head(redi_loss, x_TH[mine], y_T[mine], CU[:3], IS_CHOSEN[sequences], **counts)
    out.loss.backward()
    assert isinstance(head.weight.grad, DTensor)
    summed = 2 * head.weight.grad.full_tensor()  # FSDP averages over ranks
    torch.testing.assert_close(summed, whole.grad, rtol=1e-5, atol=1e-7)
    print("gradient is whole", flush=True)
    os._exit(0)  # gloo's destructors now and then abort, where the other rank went first


if __name__ == "__main__":
    spawn(work, args=(sys.argv[1],), nprocs=2)
