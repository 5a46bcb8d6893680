"""Bits: the same twice, and a token's log-prob owes nothing to its batch."""

import pytest
import torch
from gradcheck_tools import Problem, make_problem
from redi_kernels import cpu, redi_loss, sequence_logprobs, token_logprobs
from redi_kernels.logprobs import weighted_logprobs

SHAPES = [(1100, 20, 64), (700, 517, 48), (300, 4099, 96)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 128 tokens and groups of a few rows, as a real vocabulary has."""
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", (16, 128))
    monkeypatch.setattr(cpu, "GROUP_BYTES", 1 << 16)
    monkeypatch.setattr(cpu, "TILE_BYTES", 1 << 18)


def logps(problem: Problem, rows: slice | torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        out = token_logprobs(problem.x_TH[rows], problem.w_VH, problem.y_T[rows])
        _, fused_T, _ = weighted_logprobs(
            problem.x_TH[rows], problem.w_VH, problem.y_T[rows], problem.dlogp_T[rows], None
        )
    assert torch.equal(out.logp_T, fused_T)
    return torch.stack([out.logp_T, out.lse_T, out.entropy_T])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_log_prob_is_independent_of_its_batch(dtype: torch.dtype, shape: tuple) -> None:
    problem = make_problem(*shape, dtype)
    T = shape[0]
    whole = logps(problem, slice(None))
    g = torch.Generator().manual_seed(0)
    permutation = torch.randperm(T, generator=g)
    assert torch.equal(logps(problem, permutation), whole[:, permutation])
    for start, stop in ((0, 1), (5, 8), (T - 17, T), (100, 229), (1, T)):
        assert torch.equal(logps(problem, slice(start, stop)), whole[:, start:stop])


def test_independence_holds_with_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows on several threads: a reduction may then be split along the vocabulary."""
    monkeypatch.setattr(cpu, "GROUP_BYTES", 4 * 70_000 * 4)
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", (16, 16))
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        problem = make_problem(19, 70_000, 16)
        whole = logps(problem, slice(None))
        for start, stop in ((0, 1), (16, 19), (5, 18)):
            assert torch.equal(logps(problem, slice(start, stop)), whole[:, start:stop])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", DTYPES)
def test_two_runs_are_equal(dtype: torch.dtype) -> None:
    problem = make_problem(500, 517, 48, dtype)
    cu_seqlens = torch.arange(0, 501, 50)
    is_chosen_S = torch.arange(10) % 2 == 0

    def run() -> tuple[torch.Tensor, ...]:
        x_TH, w_VH = (t.clone().requires_grad_() for t in (problem.x_TH, problem.w_VH))
        out = redi_loss(x_TH, w_VH, problem.y_T, cu_seqlens, is_chosen_S)
        out.loss.backward()
        primitive = token_logprobs(x_TH, w_VH, problem.y_T)
        grads = torch.autograd.grad((primitive.logp_T * problem.dlogp_T).sum(), (x_TH, w_VH))
        return out.loss, out.logps_S, x_TH.grad, w_VH.grad, *grads

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_sequence_sums_owe_nothing_to_their_neighbours() -> None:
    problem = make_problem(500, 517, 48)
    cu_seqlens = torch.tensor([0, 10, 210, 210, 500], dtype=torch.int32)
    is_chosen_S = torch.tensor([True, False, True, False])
    packed = redi_loss(problem.x_TH, problem.w_VH, problem.y_T, cu_seqlens, is_chosen_S)
    for s, (start, stop) in enumerate(((0, 10), (10, 210), (210, 210), (210, 500))):
        rows = slice(start, stop)
        alone = redi_loss(
            problem.x_TH[rows],
            problem.w_VH,
            problem.y_T[rows],
            torch.tensor([0, stop - start]),
            is_chosen_S[s : s + 1],
        )
        assert torch.equal(alone.logps_S[0], packed.logps_S[s])


def test_long_sequences_lose_nothing_to_summation() -> None:
    logp_T = -torch.rand(1_000_000, generator=torch.Generator().manual_seed(0))
    got = sequence_logprobs(logp_T, torch.tensor([0, len(logp_T)])).sum_S
    assert got.item() == pytest.approx(logp_T.double().sum().item(), rel=1e-7)


def test_powers_of_two_scale_exactly() -> None:
    """Weights enter linearly: doubling them doubles every gradient, bit for bit."""
    problem = make_problem(300, 517, 48)

    def grads(factor: float) -> tuple[torch.Tensor, ...]:
        x_TH, w_VH = (t.clone().requires_grad_() for t in (problem.x_TH, problem.w_VH))
        weights = factor * problem.dlogp_T
        total, *_ = weighted_logprobs(x_TH, w_VH, problem.y_T, weights, None)
        return torch.autograd.grad(total, (x_TH, w_VH))

    for a, b, c in zip(grads(1.0), grads(2.0), grads(-0.25), strict=True):
        assert torch.equal(2 * a, b) and torch.equal(-0.25 * a, c)
