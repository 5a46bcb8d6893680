"""Forward and backward of the REDI loss against plain torch with full logits: `make bench`.

Runs on a GPU where there is one, else on the CPU. Times are pytest-benchmark's; `peak_mib` in the
JSON is the memory allocated beyond the inputs (CUDA only).
"""

import pytest
import torch
import torch.nn.functional as F
from redi_kernels import redi_loss, sequence_logprobs, token_logprobs

ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
T, H, V = (16_384, 1536, 151_936) if ON_GPU else (1024, 128, 16_384)
LENGTHS = [T // 8] * 8
ALPHA = 0.8


def full_logits(x_TH, w_VH, y_T, cu_seqlens, is_chosen_S):
    """What most trainers do: all logits at once, log-softmax in float32."""
    logp_T = -F.cross_entropy((x_TH @ w_VH.T).float(), y_T, reduction="none")
    mean_S = torch.stack([logp.mean() for logp in logp_T.split(LENGTHS)])
    return -mean_S[is_chosen_S].mean() + ALPHA * mean_S[~is_chosen_S].mean()


def primitive(x_TH, w_VH, y_T, cu_seqlens, is_chosen_S):
    logp_T = token_logprobs(x_TH, w_VH, y_T).logp_T
    mean_S = sequence_logprobs(logp_T, cu_seqlens).mean_S
    return -mean_S[is_chosen_S].mean() + ALPHA * mean_S[~is_chosen_S].mean()


def fused(x_TH, w_VH, y_T, cu_seqlens, is_chosen_S):
    return redi_loss(x_TH, w_VH, y_T, cu_seqlens, is_chosen_S, alpha=ALPHA).loss


@pytest.mark.parametrize("loss", [full_logits, primitive, fused])
def test_forward_and_backward(benchmark, loss):
    generator = torch.Generator(DEVICE).manual_seed(0)
    new = {"device": DEVICE, "dtype": DTYPE, "generator": generator}
    x_TH = torch.randn(T, H, **new).requires_grad_()
    w_VH = (torch.randn(V, H, **new) / H**0.5).requires_grad_()
    y_T = torch.randint(V, (T,), device=DEVICE, generator=generator)
    cu_seqlens = torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
    is_chosen_S = torch.arange(len(LENGTHS), device=DEVICE) % 2 == 0

    def step():
        x_TH.grad = w_VH.grad = None
        loss(x_TH, w_VH, y_T, cu_seqlens, is_chosen_S).backward()
        if ON_GPU:
            torch.cuda.synchronize()

    if ON_GPU:
        step()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        benchmark.extra_info["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    benchmark.extra_info["shape"] = f"T={T} H={H} V={V} {DTYPE} {DEVICE}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
