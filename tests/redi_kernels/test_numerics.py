"""Both hand-written paths against the truth, over shapes, dtypes, options and extremes."""

from dataclasses import replace

import pytest
import torch
from gradcheck_tools import Problem, Result, check, make_problem, textbook
from redi_kernels import cpu, reference, token_logprobs
from redi_kernels.head import Head
from redi_kernels.logprobs import weighted_logprobs

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 5.0},
    "all": {"bias": True, "softcap": 8.0, "logit_scale": 0.7},
}


def leaves(problem: Problem) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    bias = problem.head.bias_V
    tensors = (problem.x_TH, problem.w_VH, bias)
    return tuple(None if t is None else t.detach().clone().requires_grad_() for t in tensors)


def options(problem: Problem) -> dict:
    return {"softcap": problem.head.softcap, "logit_scale": problem.head.logit_scale}


def primitive(problem: Problem, **kwargs) -> Result:
    x_TH, w_VH, bias = leaves(problem)
    out = token_logprobs(x_TH, w_VH, problem.y_T, bias=bias, **options(problem), **kwargs)
    ((out.logp_T * problem.dlogp_T).sum() + (out.lse_T * problem.dlse_T).sum()).backward()
    db_V = None if bias is None else bias.grad
    return Result(out.logp_T.detach(), out.lse_T.detach(), x_TH.grad, w_VH.grad, db_V)


def fused(problem: Problem, **kwargs) -> Result:
    """The fused path makes no lse: the truth's stands in."""
    x_TH, w_VH, bias = leaves(problem)
    total, logp_T, _ = weighted_logprobs(
        x_TH, w_VH, problem.y_T, problem.dlogp_T, bias, **options(problem), **kwargs
    )
    total.backward()
    lse_T = textbook(problem.double()).lse_T
    db_V = None if bias is None else bias.grad
    return Result(logp_T, lse_T, x_TH.grad, w_VH.grad, db_V)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", HEADS)
def test_options(dtype: torch.dtype, head: str) -> None:
    problem = make_problem(300, 517, 64, dtype, **HEADS[head])
    check(problem, fused(problem))
    check(problem, primitive(problem))
    z_loss = make_problem(300, 517, 64, dtype, dlse=0.5, **HEADS[head])
    check(z_loss, primitive(z_loss))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("V", [1, 2, 127, 128, 129, 1000, 1025, 4097, 50_257])
def test_vocabulary_tails(dtype: torch.dtype, V: int) -> None:
    problem = make_problem(50, V, 32, dtype, seed=V)
    check(problem, primitive(problem))
    check(problem, fused(problem))


@pytest.mark.parametrize("V", [151_643, 151_936])
def test_qwen_vocabulary(V: int) -> None:
    problem = make_problem(20, V, 16, torch.bfloat16, seed=V)
    check(problem, fused(problem))


@pytest.mark.parametrize("T", [1, 2, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025, 2500])
def test_token_tails(T: int) -> None:
    problem = make_problem(T, 131, 24, seed=T, ignored=0.0)
    check(problem, primitive(problem))
    check(problem, fused(problem))


def test_more_than_65535_tokens() -> None:
    problem = make_problem(65_537, 5, 4)
    check(problem, primitive(problem))
    check(problem, fused(problem))


def test_several_blocks_of_a_large_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    from redi_kernels import cpu

    monkeypatch.setattr(cpu, "BUFFER_BYTES", 32 * 1000 * 4)
    monkeypatch.setattr(cpu, "GROUP_BYTES", 8 * 1000 * 4)
    monkeypatch.setattr(cpu, "DW_ROWS", 64)
    for dtype in (torch.float32, torch.bfloat16):
        problem = make_problem(150, 1000, 48, dtype, bias=True, softcap=6.0)
        check(problem, primitive(problem))
        check(problem, fused(problem))


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_near_a_thousand(dtype: torch.dtype, offset: float) -> None:
    """Nothing may be lost to the rounding of an lse that large."""
    problem = make_problem(100, 300, 32, dtype, bias=True)
    problem.head.bias_V.add_(offset)
    for path in (primitive, fused):
        check(problem, path(problem))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_certain_targets(dtype: torch.dtype) -> None:
    """p -> 1: the target's gradient is 1 - p, and rounding p to bf16 first would lose all of it."""
    g = torch.Generator().manual_seed(0)
    w_VH = torch.randn(40, 64, generator=g)
    y_T = torch.randint(40, (30,), generator=g)
    x_TH = w_VH[y_T] * torch.linspace(0.05, 0.3, 30)[:, None]
    weights = torch.full((30,), -1 / 30)
    problem = Problem(x_TH.to(dtype), w_VH.to(dtype), y_T, weights, torch.zeros(30), Head())
    logp_T = textbook(problem.double()).logp_T
    assert logp_T.max() > -1e-6
    for path in (primitive, fused):
        check(problem, path(problem))


def test_logp_is_never_positive() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for peak in (1.0, 10.0, 60.0):
            problem = make_problem(400, 50, 32, dtype, peak=peak)
            assert (primitive(problem).logp_T <= 0).all()
            assert (fused(problem).logp_T <= 0).all()


def test_dw_accumulates_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of blocks: a bf16 sum of them would stop growing at 256 times a block's share."""
    from redi_kernels import cpu

    monkeypatch.setattr(cpu, "BLOCK_TOKENS", (4, 4))
    problem = make_problem(2000, 40, 16, torch.bfloat16, ignored=0.0)
    problem.dlogp_T.copy_(problem.dlogp_T.abs())
    check(problem, primitive(problem))
    check(problem, fused(problem))


@pytest.mark.parametrize("factor", [1 / 3, -1.003])
def test_upstream_factor_is_not_rounded_to_bf16(factor: float) -> None:
    """A factor rounded first would bend every element by the same 0.2%: bias, not noise."""
    problem = make_problem(300, 200, 64, torch.bfloat16)
    x_TH, w_VH, _ = leaves(problem)
    total, *_ = weighted_logprobs(x_TH, w_VH, problem.y_T, problem.dlogp_T, None)
    one = torch.autograd.grad(total, (x_TH, w_VH), retain_graph=True)
    scaled = torch.autograd.grad(total, (x_TH, w_VH), torch.tensor(factor))
    for a, b in zip(one, scaled, strict=True):
        a, b = a.double(), b.double()
        assert ((a * b).sum() / (a * a).sum()).item() == pytest.approx(factor, rel=3e-4)


def test_masked_vocabulary_by_infinite_bias() -> None:
    problem = make_problem(60, 100, 16, bias=True)
    problem.head.bias_V[50:] = -torch.inf
    problem.y_T[problem.y_T >= 50] = 3
    out = token_logprobs(problem.x_TH, problem.w_VH, problem.y_T, bias=problem.head.bias_V)
    truth = reference.token_logprobs(problem.x_TH, problem.w_VH, problem.y_T, problem.head)
    for got, want in zip((out.logp_T, out.lse_T, out.entropy_T), truth[:3], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert not fused(problem).dw_VH[50:].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("head", HEADS)
def test_entropy_and_correct(dtype: torch.dtype, head: str) -> None:
    problem = make_problem(300, 211, 32, dtype, **HEADS[head])
    x_TH, w_VH, bias = leaves(problem)
    out = token_logprobs(x_TH, w_VH, problem.y_T, bias=bias, **options(problem))
    wide = problem.double()
    _, _, entropy_T, correct_T = reference.token_logprobs(wide.x_TH, wide.w_VH, wide.y_T, wide.head)
    assert out.logp_T.requires_grad and out.lse_T.requires_grad
    torch.testing.assert_close(out.entropy_T.double(), entropy_T, rtol=1e-5, atol=1e-5)
    assert torch.equal(out.correct_T, correct_T)
    assert 0.02 < correct_T[problem.y_T >= 0].float().mean() < 0.98
    assert not out.entropy_T.requires_grad and not out.correct_T[problem.y_T < 0].any()


def test_fused_and_primitive_agree_to_rounding() -> None:
    """They are two implementations of one formula; they must not drift."""
    problem = make_problem(300, 517, 64, bias=True, softcap=7.0)
    a, b = fused(problem), primitive(problem)
    assert torch.equal(a.logp_T, b.logp_T)
    for name in ("dx_TH", "dw_VH", "db_V"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-4, atol=1e-9)


def test_the_forced_backends_agree() -> None:
    problem = make_problem(100, 70, 16, torch.float64, bias=True, softcap=7.0)
    for path in (fused, primitive):
        a, b = path(problem, backend="reference"), path(problem, backend="cpu")
        for name in ("logp_T", "dx_TH", "dw_VH", "db_V"):
            torch.testing.assert_close(getattr(a, name), getattr(b, name), rtol=1e-10, atol=1e-14)


def test_strided_inputs() -> None:
    """A head stored transposed, states sliced out of a wider tensor, int32 targets."""
    problem = make_problem(70, 90, 32)
    strided = replace(
        problem,
        x_TH=torch.cat([problem.x_TH, problem.x_TH], dim=1)[:, :32],
        w_VH=problem.w_VH.T.contiguous().T,
        y_T=problem.y_T.int(),
    )
    check(problem, primitive(strided))
    check(problem, fused(strided))


def test_log_probs_have_no_common_bias() -> None:
    """torch.softmax's fp32 rows sum to 1 within 2e-5 on CPU, all to one side; these must not."""
    problem = make_problem(300, 30_000, 32, ignored=0.0)
    z_TV = problem.x_TH @ problem.w_VH.T  # its own rounding is not in question
    exact_T = torch.log_softmax(z_TV.double(), dim=1).gather(1, problem.y_T[:, None])[:, 0]
    error_T = primitive(problem).logp_T.double() - exact_T
    assert error_T.mean().abs() < 3e-7


@pytest.mark.parametrize("R", [1, 15, 16, 17, 100, 160])
def test_over_rows(R: int) -> None:
    """In parts, some of them short, as in one."""
    f_RB = torch.randn(R, 4096, generator=torch.Generator().manual_seed(R), dtype=torch.float64)
    for reduce in (torch.sum, torch.amax):
        torch.testing.assert_close(cpu.over_rows(reduce, f_RB), reduce(f_RB, dim=0))
