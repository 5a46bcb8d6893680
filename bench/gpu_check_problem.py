"""What the GPU checks of the kernels share: the device, made-up problems, errors and times."""

import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from redi_kernels import token_logprobs
from redi_kernels.logprobs import weighted_logprobs
from torch import Tensor

REHEARSAL = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if REHEARSAL else "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32, "fp16": torch.float16}
PATHS = ("fused", "primitive")

if REHEARSAL:
    import interpreter

    interpreter.install()


def is_alive() -> bool:
    """False after an illegal access or a device-side assertion: nothing runs in this process."""
    if REHEARSAL:
        return True
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError:
        return False
    return True


def synchronize() -> None:
    if not REHEARSAL:
        torch.cuda.synchronize()


@dataclass
class Problem:
    """One call: tensors on the device, and the head's options."""

    x_TH: Tensor
    w_VH: Tensor
    y_T: Tensor
    weight_T: Tensor  # signed; of each log-prob in the sum that is differentiated
    bias_V: Tensor | None
    options: dict[str, Any]  # softcap, logit_scale


def problem(shape: tuple[int, int, int], dtype: torch.dtype, *, full: bool = False) -> Problem:
    """Random states; logits of standard deviation 3. `full`: a bias, a cap and a scale."""
    T, H, V = shape
    random = torch.Generator(DEVICE).manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=random, device=DEVICE)
    x_TH, w_VH = normal(T, H).to(dtype), (normal(V, H) * 3 * H**-0.5).to(dtype)
    y_T = torch.randint(0, V, (T,), generator=random, device=DEVICE)
    bias_V = normal(V).to(dtype) if full else None
    options = {"softcap": 20.0, "logit_scale": 0.7} if full else {}
    return Problem(x_TH, w_VH, y_T, normal(T), bias_V, options)


def gradients(p: Problem, path: str, backend: str, dtype: torch.dtype) -> dict[str, Tensor]:
    """logp and the gradients of sum(weight * logp), by "fused" or "primitive"; the latter's sum has
    the log-sum-exps in it too."""
    named = {"dx": p.x_TH, "dw": p.w_VH, "db": p.bias_V}
    leaves = {k: t.detach().to(dtype).requires_grad_() for k, t in named.items() if t is not None}
    inputs = (leaves["dx"], leaves["dw"], p.y_T)
    bias = leaves.get("db")
    if path == "fused":
        total, logp_T, _ = weighted_logprobs(
            *inputs, p.weight_T, bias, backend=backend, **p.options
        )
    else:
        out = token_logprobs(*inputs, bias=bias, backend=backend, **p.options)
        logp_T = out.logp_T
        total = (logp_T * p.weight_T.to(logp_T)).sum() + out.lse_T.sum()
    found = torch.autograd.grad(total, list(leaves.values()))
    return {"logp": logp_T.detach(), **dict(zip(leaves, found, strict=True))}


def ratios(p: Problem, ours: dict[str, Tensor], path: str) -> tuple[dict[str, float], bool]:
    """Errors against fp64 over those of a dense implementation in the same dtype; whether each is
    at most 1.5. A NaN is not."""
    dtype = p.x_TH.dtype
    truth = gradients(p, path, "reference", torch.float64)
    dense = gradients(p, path, "reference", dtype)
    floor = 1e-6 if dtype == torch.float32 else 1e-3
    found = {
        key: rms(ours[key] - truth[key])
        / (rms(dense[key] - truth[key]) + floor * rms(truth[key]) + 1e-300)
        for key in truth
    }
    return found, all(ratio <= 1.5 for ratio in found.values())


def rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return all(torch.equal(a[key], b[key]) for key in a)


def timed(function: Callable[[], Any], rounds: int) -> list[float]:
    """Milliseconds of each round, ascending, after two to warm up."""
    function(), function()
    times = []
    for _ in range(1 if REHEARSAL else rounds):
        if REHEARSAL:
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
        else:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
    return sorted(times)


def median(function: Callable[[], Any], rounds: int) -> float:
    return statistics.median(timed(function, rounds))
