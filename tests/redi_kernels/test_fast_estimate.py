"""Fast mode's estimate of its own error, over many calls of every kind: "from above" must hold."""

import random
from dataclasses import replace

import pytest
import torch
from gradcheck_tools import Problem, make_problem, text
from redi_kernels import scan
from redi_kernels.head import accumulator
from redi_kernels.logprobs import Fast, weighted_logprobs
from torch import Tensor

BF16_ROUNDING = 2**-8  # of each of the two results that are compared


def a_call(seed: int) -> tuple[Problem, float]:
    """A problem and a tolerance at which fast mode mostly finds something to leave out."""
    draw = random.Random(seed)
    T, V = draw.choice([400, 520, 640, 800]), draw.choice([1000, 2000, 4000])
    head = {
        "bias": draw.random() < 0.4,
        "softcap": draw.choice([None, None, 10.0, 30.0]),
        "logit_scale": draw.choice([1.0, 1.0, 0.5, 1.7]),
        "seed": seed,
    }
    if draw.random() < 0.2:
        H, peak = draw.choice([16, 32, 48]), draw.choice([6.0, 10.0])
        problem = make_problem(T, V, H, peak=peak, ignored=0.0, **head)
    else:
        H, likely = draw.choice([48, 64, 96, 128]), draw.choice([0.1, 0.2, 0.3])
        problem = text(T=T, V=V, H=H, likely=likely, **head)
    if draw.random() < 0.4:
        problem = replace(problem, dlogp_T=torch.full((T,), -1 / T))
    return problem, draw.choice([1.0, 2.0, 4.0, 8.0])


def rounded(problem: Problem, dtype: torch.dtype) -> Problem:
    bias_V = problem.head.bias_V
    head = replace(problem.head, bias_V=None if bias_V is None else bias_V.to(dtype))
    x_TH, w_VH = problem.x_TH.to(dtype), problem.w_VH.to(dtype)
    return replace(problem, x_TH=x_TH, w_VH=w_VH, head=head)


def dx(problem: Problem, tolerance: float) -> tuple[Tensor, Fast | None]:
    x_TH, head = problem.x_TH.clone().requires_grad_(), problem.head
    args = (x_TH, problem.w_VH, problem.y_T, problem.dlogp_T, head.bias_V)
    options = {"softcap": head.softcap, "logit_scale": head.logit_scale}
    total, _, report = weighted_logprobs(*args, tolerance=tolerance, **options)
    total.backward()
    return x_TH.grad.double(), report


def resolution(problem: Problem) -> float:
    """dX of a change of each log-prob, and so of 1 - p, by the last digit of a sum in fp32."""
    valid_T = problem.y_T >= 0
    w_NH = problem.w_VH[problem.y_T[valid_T]].double()
    each_N = problem.dlogp_T[valid_T].double() * w_NH.norm(dim=1) * problem.head.logit_scale
    return torch.finfo(accumulator(problem.x_TH.dtype)).eps * float(each_N.norm())


def exact_int_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(a.int(), b.int(), out=out)


@pytest.mark.parametrize("calls", [8, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["float32, int8", "float32", "float64", "bfloat16"])
def test_the_estimate_is_from_above(kind, calls, monkeypatch, capsys):
    """dX's error is at most the estimate / 0.9, but for what rounding alone does."""
    name, *int8 = kind.split(", ")
    dtype = getattr(torch, name)
    monkeypatch.setattr(scan, "_pays", lambda x_NH: bool(int8))
    if not scan.is_exact(64):  # this CPU's int8 matmul saturates
        monkeypatch.setattr(torch, "_int_mm", exact_int_mm)
    ratios = []
    for seed in range(calls):
        problem, tolerance = a_call(seed)
        problem = rounded(problem, dtype)
        got, report = dx(problem, tolerance)
        assert report is not None
        if report.active == 1:
            continue
        exact, truth = dx(problem, 0.0)[0], dx(problem.double(), 0.0)[0]
        size = float(truth.norm())
        error, rounding = (float((a - b).norm()) for a, b in ((got, exact), (exact, truth)))
        rounding = max(2 * rounding, 4 * resolution(problem)) / size
        error /= size
        beyond = max(error**2 - rounding**2, 0.0) ** 0.5
        assert beyond <= float(report.error) / 0.9, (seed, error, rounding, float(report.error))
        if rounding < error / 5:
            ratios.append((float(report.error) / error, seed))
    ratios.sort()
    least = ", ".join(f"{ratio:.2f} (seed {seed})" for ratio, seed in ratios[:3])
    if calls > 8:
        with capsys.disabled():
            print(f"\n{kind}: {len(ratios)} of {calls} calls show their error; the least: {least}")
    assert len(ratios) > (0.2 if name != "bfloat16" else -1) * calls, "nothing is shown"
