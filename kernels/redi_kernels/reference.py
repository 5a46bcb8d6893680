"""The truth: textbook torch, one `[T, V]` tensor and plain autograd, in whatever dtype it is given.

Tests and docs compare everything else with this file in fp64. Nothing here is meant to be fast.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from redi_kernels.head import Head, weigh


def logits(x_TH: Tensor, w_VH: Tensor, head: Head) -> Tensor:
    z_TV = head.logit_scale * (x_TH @ w_VH.T)
    if head.bias_V is not None:
        z_TV = z_TV + head.bias_V
    if head.softcap is not None:
        z_TV = head.softcap * torch.tanh(z_TV / head.softcap)
    return z_TV


def token_logprobs(
    x_TH: Tensor, w_VH: Tensor, y_T: Tensor, head: Head | None = None, *, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp_T, lse_T, entropy_T, correct_T); zero and False where `y_T == ignore_index`."""
    z_TV = logits(x_TH, w_VH, head or Head())
    z_TV = z_TV.to(torch.promote_types(z_TV.dtype, torch.float32))
    valid_T = y_T != ignore_index
    y_T1 = y_T.where(valid_T, 0).unsqueeze(1)
    logp_TV = F.log_softmax(z_TV, dim=1)
    logp_T = logp_TV.gather(1, y_T1).squeeze(1)
    lse_T = z_TV.logsumexp(dim=1)
    entropy_T = torch.special.entr(logp_TV.exp()).sum(dim=1).detach()
    correct_T = z_TV.gather(1, y_T1).squeeze(1) >= z_TV.amax(dim=1)
    zero = logp_T.new_zeros(())
    return (
        logp_T.where(valid_T, zero),
        lse_T.where(valid_T, zero),
        entropy_T.where(valid_T, zero),
        correct_T & valid_T,
    )


def sequence_means(
    logp_T: Tensor, y_T: Tensor, cu_seqlens: Tensor, *, ignore_index: int = -100
) -> Tensor:
    """Mean log-prob of each sequence's valid targets; 0 for a sequence that has none."""
    bounds = cu_seqlens.tolist()
    means = []
    for start, end in pairwise(bounds):
        length = int((y_T[start:end] != ignore_index).sum())
        means.append(logp_T[start:end].sum() / max(length, 1))
    return torch.stack(means) if means else logp_T.new_zeros(0)


def redi_loss(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    cu_seqlens: Tensor,
    is_chosen_S: Tensor,
    *,
    alpha: float = 0.8,
    head: Head | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """REDI (arXiv 2505.24850): -mean over chosen + alpha * mean over rejected of logp(y) / |y|."""
    logp_T = token_logprobs(x_TH, w_VH, y_T, head, ignore_index=ignore_index)[0]
    mean_S = sequence_means(logp_T, y_T, cu_seqlens, ignore_index=ignore_index)
    chosen, rejected = mean_S[is_chosen_S], mean_S[~is_chosen_S]
    return -chosen.sum() / max(len(chosen), 1) + weigh(alpha, rejected.sum()) / max(
        len(rejected), 1
    )


def sft_loss(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    *,
    head: Head | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Mean negative log-likelihood over valid targets."""
    logp_T = token_logprobs(x_TH, w_VH, y_T, head, ignore_index=ignore_index)[0]
    return -logp_T.sum() / (y_T != ignore_index).sum().clamp(min=1)


def dpo_loss(chosen: Tensor, rejected: Tensor, ref_gap: Tensor, *, beta: float = 0.1) -> Tensor:
    """DPO (arXiv 2305.18290) from per-pair sums; `ref_gap`: the reference's chosen - rejected."""
    return -F.logsigmoid(weigh(beta, chosen - rejected - ref_gap)).mean()


def simpo_loss(
    chosen: Tensor, rejected: Tensor, *, beta: float = 2.0, gamma: float = 1.0
) -> Tensor:
    """SimPO (arXiv 2405.14734) from per-pair means; `gamma` is the target margin, in nats."""
    return -F.logsigmoid(weigh(beta, chosen - rejected) - gamma).mean()
