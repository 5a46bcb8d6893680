"""Hypothesis looks for shapes, masks and options that break the specification."""

import torch
from gradcheck_tools import Problem, Result, check, make_problem
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from redi_kernels import redi_loss, sequence_logprobs, token_logprobs
from redi_kernels.logprobs import weighted_logprobs

FEW = settings(
    max_examples=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)


@st.composite
def problems(draw) -> Problem:
    return make_problem(
        draw(st.integers(1, 300)),
        draw(st.integers(2, 700)),
        draw(st.integers(8, 80)),
        draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16])),
        seed=draw(st.integers(0, 2**16)),
        peak=draw(st.floats(0.1, 8.0)),
        ignored=draw(st.sampled_from([0.0, 0.3, 0.9, 1.0])),
        bias=draw(st.booleans()),
        softcap=draw(st.sampled_from([None, 4.0, 30.0])),
        logit_scale=draw(st.sampled_from([1.0, 0.5, 1.7])),
        dlse=draw(st.sampled_from([0.0, 0.3])),
    )


@FEW
@given(problems())
def test_the_primitive_matches_the_truth(problem: Problem) -> None:
    check(problem, run_primitive(problem))


@FEW
@given(problems())
def test_the_fused_path_matches_the_primitive(problem: Problem) -> None:
    """Not only to rounding: logp bit for bit."""
    x_TH, w_VH, bias = leaves(problem)
    options = {"softcap": problem.head.softcap, "logit_scale": problem.head.logit_scale}
    _, logp_T, _ = weighted_logprobs(x_TH, w_VH, problem.y_T, problem.dlogp_T, bias, **options)
    assert torch.equal(logp_T, run_primitive(problem).logp_T)


@FEW
@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=12),
    alpha=st.floats(0, 2),
    seed=st.integers(0, 1000),
)
def test_redi_equals_its_definition_for_any_packing(lengths, alpha: float, seed: int) -> None:
    problem = make_problem(sum(lengths), 53, 12, torch.float64, seed=seed, ignored=0.4)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    is_chosen_S = torch.arange(len(lengths)) % 3 != 1
    x_TH, w_VH, _ = leaves(problem)
    out = redi_loss(x_TH, w_VH, problem.y_T, cu_seqlens, is_chosen_S, alpha=alpha)
    logp_T = token_logprobs(x_TH, w_VH, problem.y_T).logp_T
    mean_S = sequence_logprobs(logp_T, cu_seqlens, problem.y_T).mean_S
    num_chosen, num_rejected = is_chosen_S.sum(), (~is_chosen_S).sum().clamp(min=1)
    want = alpha * mean_S[~is_chosen_S].sum() / num_rejected
    want = want - mean_S[is_chosen_S].sum() / num_chosen
    torch.testing.assert_close(out.loss, want, rtol=1e-12, atol=1e-12)
    got = torch.autograd.grad(out.loss, (x_TH, w_VH))
    for a, b in zip(got, torch.autograd.grad(want, (x_TH, w_VH)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-14)


def leaves(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    tensors = (problem.x_TH, problem.w_VH, problem.head.bias_V)
    return tuple(None if t is None else t.clone().requires_grad_() for t in tensors)


def run_primitive(problem: Problem) -> Result:
    x_TH, w_VH, bias = leaves(problem)
    options = {"softcap": problem.head.softcap, "logit_scale": problem.head.logit_scale}
    out = token_logprobs(x_TH, w_VH, problem.y_T, bias=bias, **options)
    ((out.logp_T * problem.dlogp_T).sum() + (out.lse_T * problem.dlse_T).sum()).backward()
    db_V = None if bias is None else bias.grad
    return Result(out.logp_T.detach(), out.lse_T.detach(), x_TH.grad, w_VH.grad, db_V)
