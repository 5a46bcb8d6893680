"""Losses on packed sequences. Each is a few lines on the two paths of `logprobs.py`.

REDI and SFT are weighted sums of log-probs with weights known beforehand: the fused path, 3 U.
DPO, SimPO and REDI with bounded negatives learn their weights from the log-probs themselves: the
primitive, 4 U. (A single pair of DPO's or SimPO's learns but a common factor: fused again.)
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from redi_kernels.checks import check_cu_seqlens, integer, number, require
from redi_kernels.head import accumulator, weigh
from redi_kernels.logprobs import (
    Fast,
    segment_sum,
    sequence_logprobs,
    token_logprobs,
    weighted_logprobs,
)

# Unlikelihood's loss and its derivative by log p are infinite at p = 1; what comes this near in
# 1 - p counts as this near and is not pushed (as in fairseq's; fp32 tells 1 - p no finer at ease).
SUREST = 1e-5


@dataclass(frozen=True)
class RediOutput:
    loss: Tensor
    logps_S: Tensor  # sum of each sequence's log-probs; detached
    lengths_S: Tensor  # number of valid targets of each sequence, int64
    logp_T: Tensor  # of each token, 0 where ignored; detached
    fast: Fast | None = None  # what fast mode left out, with a tolerance


@dataclass(frozen=True)
class SftOutput:
    loss: Tensor
    logps_S: Tensor | None  # None when called without cu_seqlens
    lengths_S: Tensor | None
    logp_T: Tensor
    fast: Fast | None = None


@dataclass(frozen=True)
class PreferenceOutput:
    loss: Tensor
    logps_S: Tensor
    lengths_S: Tensor
    margins: Tensor  # [S / 2]: what the sigmoid sees, per pair; detached
    logp_T: Tensor
    fast: Fast | None = None  # of several pairs: filled in by the backward


def redi_loss(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    cu_seqlens: Tensor,
    is_chosen_S: Tensor,
    *,
    alpha: float = 0.8,
    rejected_loss: Literal["logp", "unlikelihood"] = "logp",
    rejected_floor: float | None = None,
    pushed_T: Tensor | None = None,
    num_chosen: int | Tensor | None = None,
    num_rejected: int | Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> RediOutput:
    """REDI's asymmetric loss (arXiv 2505.24850, stage 2), fused: 3 U; bounded: 4 U.

        -1/num_chosen sum_chosen logp(y)/|y|  +  alpha/num_rejected sum_rejected logp(y)/|y|

    Args:
        x_TH, w_VH, y_T, bias, options: as in `token_logprobs`.
        cu_seqlens: [S + 1] boundaries of the packed sequences, as in FlashAttention.
        is_chosen_S: bool [S]. Sequences need not come in pairs.
        alpha: weight of the rejected ones; 0 is the mean of per-sequence NLL.
        rejected_loss: what is pushed down of a rejected token: "logp", as above, or "unlikelihood",
            -log(1 - p) instead of log p (arXiv 1908.04319), which lets go of what is unlikely.
        rejected_floor: a log-prob, below 0; max(log p, floor) instead of log p for rejected tokens.
        pushed_T: bool [T], the rejected sequences' targets that are pushed down, all by default;
            the others add 0. |y| counts them all the same.
        num_chosen, num_rejected: counts of the whole optimizer step, so that micro-batches add up;
            this call's own by default.

    |y| counts valid targets; a sequence without any adds 0 and still counts. The loss can be
    differentiated once; `logps_S` is detached.
    """
    _check_packed(x_TH, cu_seqlens, is_chosen_S)
    if pushed_T is not None and (pushed_T.dtype != torch.bool or pushed_T.shape != y_T.shape):
        raise ValueError(
            f"pushed_T must be bool [{y_T.shape[0]}], not {pushed_T.dtype} {list(pushed_T.shape)}"
        )
    alpha, bound = number("alpha", alpha), _bound(rejected_loss, rejected_floor)
    num_chosen = _count("num_chosen", num_chosen, is_chosen_S)
    num_rejected = _count("num_rejected", num_rejected, ~is_chosen_S)
    one = x_TH.new_ones((), dtype=accumulator(x_TH.dtype))
    sign_S = torch.where(is_chosen_S, -one / num_chosen, alpha * one / num_rejected)
    ignore_index = _ignore_index(options)
    lengths_S = _lengths(y_T, cu_seqlens, ignore_index)
    weight_S = sign_S / lengths_S.clamp(min=1)
    weight_T, is_chosen_T = (_spread(v, cu_seqlens, x_TH.shape[0]) for v in (weight_S, is_chosen_S))
    if pushed_T is not None:
        weight_T = torch.where(is_chosen_T | pushed_T, weight_T, 0)
    if bound is None:
        loss, logp_T, fast = weighted_logprobs(x_TH, w_VH, y_T, weight_T, bias, **options)
    else:
        out = token_logprobs(x_TH, w_VH, y_T, bias=bias, **options)
        as_it_is_T = is_chosen_T | (y_T == ignore_index)
        score_T = torch.where(as_it_is_T, out.logp_T, bound(out.logp_T))
        weight_T = weight_T.masked_fill(y_T == ignore_index, 0)
        loss, logp_T, fast = weigh(weight_T, score_T).sum(), out.logp_T.detach(), out.fast
    return RediOutput(loss, segment_sum(logp_T, cu_seqlens), lengths_S, logp_T, fast)


def _bound(rejected_loss: str, floor: float | None) -> Callable[[Tensor], Tensor] | None:
    """What takes the place of a rejected token's log p; None: log p itself."""
    if rejected_loss not in ("logp", "unlikelihood"):
        raise ValueError(f'rejected_loss must be "logp" or "unlikelihood", not {rejected_loss!r}')
    if floor is not None and not (rejected_loss == "logp" and number("rejected_floor", floor) < 0):
        raise ValueError(f'rejected_floor={floor}: must be below 0, with rejected_loss="logp"')
    if rejected_loss == "unlikelihood":
        return lambda logp_T: -torch.log(-torch.expm1(logp_T.clamp(max=math.log1p(-SUREST))))
    return None if floor is None else lambda logp_T: logp_T.clamp(min=floor)


def sft_loss(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    num_tokens: int | Tensor | None = None,
    bias: Tensor | None = None,
    **options: Any,
) -> SftOutput:
    """Cross-entropy, mean over valid tokens: -1/num_tokens sum logp. Fused: 3 U.

    `num_tokens`: valid targets in the whole optimizer step, this call's own by default.
    `cu_seqlens` only adds per-sequence sums to the result. The rest as in `token_logprobs`.
    """
    ignore_index = _ignore_index(options)
    valid_T = y_T != ignore_index
    num_tokens = _count("num_tokens", num_tokens, valid_T)
    weight_T = -torch.ones_like(valid_T, dtype=accumulator(x_TH.dtype)) / num_tokens
    loss, logp_T, fast = weighted_logprobs(x_TH, w_VH, y_T, weight_T, bias, **options)
    if cu_seqlens is None:
        return SftOutput(loss, None, None, logp_T, fast)
    sequences = sequence_logprobs(logp_T, cu_seqlens, y_T, ignore_index=ignore_index)
    return SftOutput(loss, sequences.sum_S, sequences.length_S, logp_T, fast)


def dpo_loss(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    cu_seqlens: Tensor,
    is_chosen_S: Tensor,
    ref_logps_S: Tensor,
    *,
    beta: float = 0.1,
    num_pairs: int | Tensor | None = None,
    **options: Any,
) -> PreferenceOutput:
    """DPO (arXiv 2305.18290): mean over pairs of -log sigmoid(beta * (gap - reference's gap)).

    The i-th chosen sequence and the i-th rejected one are a pair. A call with one pair is fused,
    3 U; with more, 4 U. `ref_logps_S`: the reference model's sums, from
    `sequence_logprobs(token_logprobs(...).logp_T, cu_seqlens).sum_S`; not in half precision.
    `num_pairs`: pairs in the whole optimizer step, this call's own by default.
    """
    if ref_logps_S.dtype in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"ref_logps_S is {ref_logps_S.dtype}, too coarse for sums of log-probs; keep float32. "
            "(FSDP2's MixedPrecisionPolicy casts a forward's inputs: cast_forward_inputs=False)"
        )
    target = weigh(number("beta", beta), _gap(ref_logps_S, is_chosen_S))
    packed = x_TH, w_VH, y_T, cu_seqlens, is_chosen_S
    return _preference(*packed, beta, target, num_pairs, "sum_S", options)


def simpo_loss(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    cu_seqlens: Tensor,
    is_chosen_S: Tensor,
    *,
    beta: float = 2.0,
    gamma: float = 1.0,
    num_pairs: int | Tensor | None = None,
    **options: Any,
) -> PreferenceOutput:
    """SimPO (arXiv 2405.14734): -log sigmoid(beta * gap of length-normalised log-probs - gamma).

    Pairs and cost as in `dpo_loss`; no reference model. `gamma` is the target margin,
    `num_pairs` as in `dpo_loss`.
    """
    beta, gamma = number("beta", beta), number("gamma", gamma)
    packed = x_TH, w_VH, y_T, cu_seqlens, is_chosen_S
    return _preference(*packed, beta, gamma, num_pairs, "mean_S", options)


def _preference(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    cu_seqlens: Tensor,
    is_chosen_S: Tensor,
    beta: float,
    target: float | Tensor,
    num_pairs: int | Tensor | None,
    score: Literal["sum_S", "mean_S"],
    options: dict[str, Any],
) -> PreferenceOutput:
    """Mean over pairs of -log sigmoid(beta * gap - target), the gap being that of the scores.

    In the gradient of one pair everything is known beforehand but one factor, sigmoid(-margin). So
    a pair on its own takes the fused path, whose backward multiplies by that. (Several would each
    need a [V, H] gradient until then.)
    """
    _check_packed(x_TH, cu_seqlens, is_chosen_S)
    num_pairs = _count("num_pairs", num_pairs, is_chosen_S)
    ignore_index = _ignore_index(options)
    total = None
    if cu_seqlens.shape[0] == 3:
        one = x_TH.new_ones((), dtype=accumulator(x_TH.dtype))
        weight_S = torch.where(is_chosen_S, one, -one) * beta
        if score == "mean_S":
            weight_S = weight_S / _lengths(y_T, cu_seqlens, ignore_index).clamp(min=1)
        weight_T = _spread(weight_S, cu_seqlens, x_TH.shape[0])
        args = x_TH, w_VH, y_T, weight_T
        total, logp_T, fast = weighted_logprobs(*args, **{"bias": None, **options})
    else:
        out = token_logprobs(x_TH, w_VH, y_T, **options)
        logp_T, fast = out.logp_T, out.fast
    sequences = sequence_logprobs(logp_T, cu_seqlens, y_T, ignore_index=ignore_index)
    margins = weigh(beta, _gap(getattr(sequences, score), is_chosen_S)) - target
    if total is not None:
        margins = _WithGradientOf.apply(margins, total)
    loss = -(F.logsigmoid(margins) / num_pairs).sum()
    logps_S, lengths_S = sequences.sum_S.detach(), sequences.length_S
    return PreferenceOutput(loss, logps_S, lengths_S, margins.detach(), logp_T.detach(), fast)


class _WithGradientOf(torch.autograd.Function):
    """The value of one (sums of fp64, which may be infinite), and both gradients: the other is the
    same number by the fused path. (value + other - other would be NaN at infinity.)"""

    @staticmethod
    def forward(ctx: Any, value: Tensor, other: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad.sum()


def _gap(score_S: Tensor, is_chosen_S: Tensor) -> Tensor:
    """[S / 2]. Sorted instead of masked: a mask's length is on the device, and asking for it
    waits."""
    pairs = 2 * is_chosen_S.sum() == score_S.shape[0]
    require(pairs, "is_chosen_S has not as many chosen sequences as rejected ones: not pairs")
    order_S = torch.argsort(~is_chosen_S, stable=True)
    chosen, rejected = score_S[order_S].tensor_split(2)
    return chosen - rejected


def _check_packed(x_TH: Tensor, cu_seqlens: Tensor, is_chosen_S: Tensor) -> None:
    check_cu_seqlens(cu_seqlens, x_TH.shape[0], x_TH.device)
    if is_chosen_S.dtype != torch.bool or is_chosen_S.shape != cu_seqlens[1:].shape:
        raise ValueError(
            f"is_chosen_S must be bool [{cu_seqlens.shape[0] - 1}], one for each of cu_seqlens, "
            f"not {is_chosen_S.dtype} {list(is_chosen_S.shape)}"
        )


def _lengths(y_T: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Tensor:
    """Valid targets of each sequence, int64."""
    return segment_sum((y_T != ignore_index).float(), cu_seqlens).long()


def _spread(v_S: Tensor, cu_seqlens: Tensor, T: int) -> Tensor:
    """A sequence's value to each of its tokens."""
    return torch.repeat_interleave(v_S, cu_seqlens.diff(), output_size=T)


def _ignore_index(options: dict[str, Any]) -> int:
    """Checked here, too: the losses compare targets with it before the log-probs check anything."""
    return integer("ignore_index", options.get("ignore_index", -100))


def _count(name: str, given: int | Tensor | None, mask: Tensor) -> int | Tensor:
    if given is None:
        return mask.sum().clamp(min=1)
    if not isinstance(given, Tensor):
        if not number(name, given) > 0:
            raise ValueError(f"{name} must be positive, not {given}: it divides the loss")
        return given
    if given.numel() != 1 or given.requires_grad or given.dtype == torch.bool:
        raise ValueError(
            f"{name} must be one number without gradient, not {given.dtype} {list(given.shape)}"
        )
    # 0 is right where there is nothing to count: each weight is then 1 / 0 of nothing
    require(given.isfinite() & (given >= 0), f"{name} must be finite and not negative")
    return given.detach().reshape(())
