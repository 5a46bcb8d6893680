"""The loss kernels in Triton: NVIDIA from sm_80, AMD by the pointer form.

    logits.py      the logits matmul; statistics and d(logits) in its epilogue
    reduce.py      the small launches per token and per column
    matmul.py      dX and dW
    primitive.py   log-probs, and gradients for coefficients that come later (4 U in all)
    weighted.py    gradients for weights known beforehand, made in the forward (3 U)
    fast.py        gradients of either kind with a tolerance (1 + 2f U)
    config.py, launch.py, tiles.py   shapes, launches, device functions

This module is the backend: four functions over tensors on one device, called by the custom ops in
logprobs.py, which have dropped ignored rows and validated everything.
"""

from __future__ import annotations

import torch
from torch import Tensor

from redi_kernels import fast_plan
from redi_kernels.fast_plan import Report
from redi_kernels.head import Head
from redi_kernels.triton import config as configs
from redi_kernels.triton import fast, launch, primitive
from redi_kernels.triton import weighted as fused

Needs = tuple[bool, bool, bool]


def forward(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, head: Head) -> tuple[Tensor, ...]:
    """(logp_N, lse_N, entropy_N, correct_N); logp <= 0."""
    with launch.on_device(x_NH):
        return primitive.forward(_problem(x_NH, w_VH, y_N, head))


def backward(
    x_NH: Tensor, w_VH: Tensor, y_N: Tensor, logp_N: Tensor, lse_N: Tensor, dlogp_N: Tensor,
    dlse_N: Tensor, head: Head, needs: Needs,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx_NH, dw_VH, db_V) in the inputs' dtypes, None where not needed."""
    with launch.on_device(x_NH):
        problem = _problem(x_NH, w_VH, y_N, head)
        logp_N, lse_N, dlogp_N, dlse_N = map(_vector, (logp_N, lse_N, dlogp_N, dlse_N))
        return primitive.backward(problem, logp_N, lse_N, dlogp_N, dlse_N, needs)


def weighted(
    x_NH: Tensor, w_VH: Tensor, y_N: Tensor, weight_N: Tensor, head: Head, needs: Needs
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logp_N, dx_NH, dw_VH, db_V): gradient of sum(weight * logp), made in the forward.

    fp16 has no room for exp(z - c), so it takes the primitive's path.
    """
    with launch.on_device(x_NH):
        problem, weight_N = _problem(x_NH, w_VH, y_N, head), _vector(weight_N)
        if any(needs) and x_NH.dtype != torch.float16:
            return fused.weighted(problem, weight_N, needs)
        logp_N, lse_N, *_ = primitive.forward(problem)
        if not any(needs):
            return logp_N, None, None, None
        return logp_N, *primitive.backward(
            problem, logp_N, lse_N, weight_N, torch.zeros_like(lse_N), needs
        )


def gradients(
    x_NH: Tensor, w_VH: Tensor, y_N: Tensor, dlogp_N: Tensor, dlse_N: Tensor, head: Head,
    needs: Needs, tolerance: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Report]:  # fmt: skip
    """(logp_N, dx_NH, dw_VH, db_V, report) of sum(dlogp * logp + dlse * lse), in fast mode."""
    with launch.on_device(x_NH):
        problem = _problem(x_NH, w_VH, y_N, head)
        dlogp_N, dlse_N = _vector(dlogp_N), _vector(dlse_N)
        if fast_plan.pays(*x_NH.shape):
            return fast.gradients(problem, dlogp_N, dlse_N, needs, tolerance)
        logp_N, lse_N, *_ = primitive.forward(problem)
        grads = primitive.backward(problem, logp_N, lse_N, dlogp_N, dlse_N, needs)
        none_N = torch.zeros_like(logp_N)
        return logp_N, *grads, Report(none_N, none_N.new_ones(()), none_N.new_zeros(()))


def _vector(v_N: Tensor) -> Tensor:
    """As kernels read numbers per token: fp32, side by side (`.float()` alone copies no fp32)."""
    return v_N.float().contiguous()


def _problem(x_NH: Tensor, w_VH: Tensor, y_N: Tensor, head: Head) -> launch.Problem:
    config = configs.select(x_NH.device, x_NH.dtype)
    x_NH, w_VH = (m if launch.has_rows(m) else m.contiguous() for m in (x_NH, w_VH))
    y_N, bias_V = y_N.contiguous(), None if head.bias_V is None else head.bias_V.contiguous()
    if not launch.can_use_tma(x_NH, w_VH):
        config = configs.without_tma(config)
    return launch.Problem(x_NH, w_VH, y_N, bias_V, head.softcap, head.logit_scale, config)


__all__ = ["backward", "forward", "gradients", "weighted"]
