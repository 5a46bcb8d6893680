"""Fast mode's kernels: the CPU's plan, its gradients, and the error it promises."""

import dataclasses

import pytest
import torch
from gradcheck_tools import Problem, errors, make_problem, text, textbook
from redi_kernels import cpu, dpo_loss, fast, scan, sft_loss, token_logprobs
from redi_kernels import triton as kernels
from redi_kernels.logprobs import weighted_logprobs
from redi_kernels.triton import config as configs
from redi_kernels.triton import launch

ROUNDING = 2**-9  # of d(logits) to bf16, at most
BLOCK = 64  # tokens of a CPU's block and of a chunk here
SIZE = {"T": 150, "V": 1000, "H": 64, "likely": 0.2}
NAMES = ("dx_TH", "dw_VH", "db_V")
HEADS = {"plain": {}, "all": {"bias": True, "softcap": 60.0, "logit_scale": 1.1}}


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """And a CPU that sees all logits in full and, as a GPU, rounds none of them to bf16 and asks
    every block."""
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", (16, BLOCK))
    monkeypatch.setattr(scan, "_pays", lambda x_NH: False)
    monkeypatch.setattr(fast, "BF16_LOGIT", torch.inf)
    monkeypatch.setattr(fast, "PROBE", 1 << 20)
    _configure(monkeypatch, tma=False)


def _configure(monkeypatch, tma):
    def select(device, dtype):
        slab_bytes = BLOCK * SIZE["V"] * dtype.itemsize
        return dataclasses.replace(configs.INTERPRETER, slab_bytes=slab_bytes, tma=tma)

    monkeypatch.setattr(configs, "select", select)


def run(gradients, problem: Problem, tolerance=2.0, needs=None):
    """(logp, dx, dw, db, report) of a backend's function, over the tokens that have a target."""
    valid_T = problem.y_T >= 0
    rows = (t[valid_T] for t in (problem.x_TH, problem.y_T, problem.dlogp_T, problem.dlse_T))
    x_NH, y_N, dlogp_N, dlse_N = rows
    needs = needs or (True, True, problem.head.bias_V is not None)
    return gradients(
        x_NH, problem.w_VH, y_N, dlogp_N, dlse_N, problem.head, needs, tolerance
    )  # fmt: skip


@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_plan_and_gradients_are_the_cpus(monkeypatch, dtype, head, tma):
    """With chunks of the CPU's blocks: signed, tiny and zero weights, and a z-loss."""
    _configure(monkeypatch, tma)
    problem = text(dtype, **SIZE, **HEADS[head], dlse=0.1)
    logp_N, *ours, report = run(kernels.gradients, problem)
    _, *cpus, cpu_report = run(fast.gradients, problem)
    rough = dtype == torch.bfloat16
    assert 0.05 < report.active < 0.5
    assert report.active == pytest.approx(float(cpu_report.active), rel=0.02 if rough else 1e-6)
    assert report.error == pytest.approx(float(cpu_report.error), rel=0.02 if rough else 1e-4)
    others_N = -logp_N.expm1()  # where the model is sure, the target's rounding is not in it
    allowed_N = (4 * ROUNDING if rough else 0) * others_N + 2e-6
    assert ((report.dropped_N - cpu_report.dropped_N).abs() < allowed_N).all()
    valid_T = problem.y_T >= 0
    forward = kernels.forward(
        problem.x_TH[valid_T], problem.w_VH, problem.y_T[valid_T], problem.head
    )
    assert torch.equal(logp_N, forward[0])
    truth, dense = textbook(problem.double()), textbook(problem)
    for name, mine, its in zip(NAMES, ours, cpus, strict=True):
        if mine is None:
            continue
        true, floor = getattr(truth, name), getattr(dense, name)
        if name == "dx_TH":
            true, floor = true[valid_T], floor[valid_T]
        if not rough:
            assert errors(mine, its).rms < 2e-5, name
        got, exact = errors(mine, true), errors(floor, true)
        assert got.rms <= ((1.2 * exact.rms) ** 2 + (2 * ROUNDING) ** 2) ** 0.5, name
        assert got.bias <= 1.5 * exact.bias + (1e-4 if name == "dx_TH" else 1e-2), name


def test_flat_text_is_done_exactly():
    problem = make_problem(150, 300, 32, peak=0.3, bias=True)
    *ours, report = run(kernels.gradients, problem)
    assert report.active == 1 and report.error == 0 and not report.dropped_N.any()
    valid_T = problem.y_T >= 0
    exact = kernels.weighted(
        problem.x_TH[valid_T], problem.w_VH, problem.y_T[valid_T], problem.dlogp_T[valid_T],
        problem.head, (True, True, True),
    )  # fmt: skip
    for got, want in zip(ours, exact, strict=True):
        assert errors(got, want).rms < 1e-6


def test_targets_without_weight_on_the_softmax():
    """dlse = dlogp leaves the gradient of the target's logit alone: exactly representable."""
    problem = text(**SIZE, bias=True)
    same = dataclasses.replace(problem, dlse_T=problem.dlogp_T)
    truth, (_, dx_NH, dw_VH, db_V, _) = textbook(same.double()), run(kernels.gradients, same)
    for got, want in ((dx_NH, truth.dx_TH[problem.y_T >= 0]), (dw_VH, truth.dw_VH)):
        assert errors(got, want).rms < 1e-5
    assert errors(db_V, truth.db_V).rms < 1e-5


def test_unlikely_targets_and_no_weights():
    """exp(z - c) is made again for blocks with a target 150 nats down; no weight, no gradient."""
    problem = text(**SIZE, bias=True)
    problem.head.bias_V[7], problem.y_T[[3, 120]] = -150.0, 7
    problem.dlogp_T[[3, 120]] = 1e-2
    _, *ours, report = run(kernels.gradients, problem)
    _, *cpus, _ = run(fast.gradients, problem)
    assert report.active < 0.5
    for mine, its in zip(ours, cpus, strict=True):
        assert errors(mine, its).rms < 2e-5
    zero = dataclasses.replace(problem, dlogp_T=torch.zeros_like(problem.dlogp_T))
    _, *ours, report = run(kernels.gradients, zero)
    assert not any(g.any() for g in ours) and report.error == 0 and report.active.isfinite()


def test_bits():
    """Twice the same; and frozen inputs change nothing for the others."""
    problem = text(torch.bfloat16, **SIZE, bias=True)
    _, *whole, report = run(kernels.gradients, problem)
    _, *again, report_again = run(kernels.gradients, problem)
    for a, b in zip((*whole, report.dropped_N), (*again, report_again.dropped_N), strict=True):
        assert torch.equal(a, b)
    for needs in ((True, False, False), (False, True, False)):
        for got, need, full in zip(
            run(kernels.gradients, problem, needs=needs)[1:4], needs, whole, strict=True
        ):
            assert torch.equal(got, full) if need else got is None


def test_compacting_in_place():
    """Over several blocks of columns, of which later ones lie where earlier ones write."""
    T, V, A = 5, 3000, 2300
    random = torch.Generator().manual_seed(0)
    x_TH, w_VH = torch.zeros(T, 16), torch.zeros(V, 16)
    y_T = torch.zeros(T, dtype=torch.long)
    problem = launch.Problem(x_TH, w_VH, y_T, None, None, 1.0, configs.INTERPRETER)
    slab_TV = problem.slab(V).zero_()
    slab_TV[:T, :V] = torch.rand(T, V, generator=random)
    before_TV, total_T = slab_TV.clone(), slab_TV[:T].sum(dim=1)
    index_V = torch.randperm(V, generator=random)[:A].sort()[0]
    padded_V = torch.cat([index_V, torch.full((V - A,), -1)])
    listed = launch.Listed(padded_V, torch.tensor(A, dtype=torch.int32))
    lost_T = launch.compact(problem, slab_TV, listed, total_T)
    assert torch.equal(slab_TV[:T, :A], before_TV[:T, index_V])
    assert not slab_TV[:T, A : launch.padded(A, 64)].any() and not slab_TV[T:].any()
    outside = torch.ones(V, dtype=torch.bool).index_fill(0, index_V, False)
    want = before_TV[:T, :V][:, outside].sum(dim=1)
    torch.testing.assert_close(lost_T, want, rtol=1e-4, atol=0)


def test_public_api():
    problem = text(**SIZE)
    y_T, weight_T = problem.y_T, problem.dlogp_T
    cu_seqlens, ref_S = torch.tensor([0, 50, 90, 120, 150]), torch.zeros(4)
    chosen_S = torch.tensor([True, False, True, False])
    results = []
    for backend in ("triton", "cpu"):
        options = {"tolerance": 2.0, "backend": backend}
        leaves = [t.clone().requires_grad_() for t in (problem.x_TH, problem.w_VH)]
        grad = lambda loss, leaves=leaves: torch.autograd.grad(loss, leaves)
        total, logp_T, report = weighted_logprobs(*leaves, y_T, weight_T, None, **options)
        out = token_logprobs(*leaves, y_T, **options)
        grads = [*grad(total), *grad((out.logp_T * weight_T).sum())]
        dpo = dpo_loss(*leaves, y_T, cu_seqlens, chosen_S, ref_S, **options)
        results.append([logp_T, *grads, *grad(dpo.loss), report.dropped_T, out.fast.dropped_T])
        assert 0 < dpo.fast.active < 0.5 and out.fast.active == report.active
        assert not grads[0][y_T < 0].any()
        empty = sft_loss(*leaves, torch.full_like(y_T, -100), **options)
        assert not any(g.any() for g in grad(empty.loss))
    for ours, cpus in zip(*results, strict=True):
        assert errors(ours, cpus).rms < 1e-4


def test_refused():
    problem = text(torch.float16, **SIZE)
    for backend, dtype in (("triton", torch.float16), ("reference", torch.float32)):
        x_TH, w_VH = problem.x_TH.to(dtype), problem.w_VH.to(dtype)
        with pytest.raises(ValueError, match=r'tolerance=2.0: .*"triton", and not for'):
            sft_loss(x_TH, w_VH, problem.y_T, tolerance=2.0, backend=backend)
