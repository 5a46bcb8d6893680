"""Fast mode against the truth: its error, what it says of it, and each stand-in by itself."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import torch
from gradcheck_tools import Problem, Result, errors, make_problem, text, textbook
from redi_kernels import cpu, dpo_loss, fast, fast_plan, scan, sft_loss, token_logprobs
from redi_kernels.logprobs import Fast, weighted_logprobs
from torch import Tensor

ROUNDING = 2**-9  # of d(logits) to bf16, at most: its RMS is about 0.8 of it


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A small vocabulary would otherwise get blocks so long that every row is active in each."""
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", (16, 64))
    monkeypatch.setattr(cpu, "GROUP_BYTES", 512 * 64 * 4)
    monkeypatch.setattr(scan, "TILE_BYTES", 512 * 64 * 4)
    monkeypatch.setattr(scan, "WEIGHT_BYTES", 100 * 96 * 4)
    monkeypatch.setattr(fast_plan, "LEAST_TOKENS", 0)
    for module in (fast, fast_plan):
        monkeypatch.setattr(module, "ROWS", 100)


@pytest.fixture(autouse=True, params=["int8", "full"])
def source(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both looks at the logits, whatever this CPU would take."""
    in_int8 = (torch.float32, torch.bfloat16) if request.param == "int8" else ()
    monkeypatch.setattr(scan, "_pays", lambda x_NH: x_NH.dtype in in_int8)
    if not scan.is_exact(64):  # this CPU's int8 matmul saturates
        monkeypatch.setattr(torch, "_int_mm", _int_mm)
    return request.param


def _int_mm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    return torch.mm(a.int(), b.int(), out=out)


def fused(problem: Problem, tolerance: float) -> tuple[Result, Fast | None]:
    tensors = (problem.x_TH, problem.w_VH, problem.head.bias_V)
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    options = {"softcap": problem.head.softcap, "logit_scale": problem.head.logit_scale}
    total, logp_T, report = weighted_logprobs(
        *leaves[:2], problem.y_T, problem.dlogp_T, leaves[2], tolerance=tolerance, **options
    )
    total.backward()
    db_V = None if leaves[2] is None else leaves[2].grad
    return Result(logp_T, torch.empty(0), leaves[0].grad, leaves[1].grad, db_V), report


def never_active(problem: Problem, tolerance: float) -> Tensor:
    """Rows in no block's active list: those that only the stand-in for dW reaches."""
    seen: list[Tensor] = []
    active = fast._Sparse._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fast._Sparse, "_active", lambda *a: (seen.append(a[4].clone()), active(*a))[1]
        )
        fused(problem, tolerance)
    mask_V = torch.ones(len(problem.w_VH), dtype=torch.bool)
    mask_V[torch.cat(seen)] = False
    return mask_V


def complaints(
    problem: Problem, tolerance: float, never_V: Tensor, source: str = "int8"
) -> list[str]:
    """What fast mode promises, held against the truth."""
    truth, exact = textbook(problem.double()), fused(problem, 0)[0]
    got, report = fused(problem, tolerance)
    found = []
    for name in ("dx_TH", "dw_VH"):
        mine, dense = (errors(getattr(r, name), getattr(truth, name)) for r in (got, exact))
        if not mine.rms <= (dense.rms**2 + (tolerance * ROUNDING) ** 2) ** 0.5:
            found.append(f"{name}: rms {mine.rms:.1e}, exact {dense.rms:.1e}")
        allowed = 1e-2 if name == "dw_VH" else ROUNDING / 8 if source == "int8" else 1e-4
        if not mine.bias <= 1.5 * dense.bias + allowed:
            found.append(f"{name}: bias {mine.bias:.1e}, exact {dense.bias:.1e}")
    tail = errors(got.dw_VH[never_V], truth.dw_VH[never_V])
    if not tail.cosine > 0.9:
        found.append(f"dw of rows never active: cosine {tail.cosine:.2f}, rms {tail.rms:.2f}")
    if got.db_V is not None:
        mine, dense = (errors(r.db_V, truth.db_V).rms for r in (got, exact))
        if not mine <= dense + ROUNDING / 4:
            found.append(f"db: rms {mine:.1e}, exact {dense:.1e}")
    if source == "int8" and problem.x_TH.dtype != torch.float64:
        found += _logp_complaints(problem, got, truth)
    elif not torch.equal(got.logp_T, exact.logp_T):
        found.append("logp is not the exact mode's")
    assert 0 < report.active < 0.5, "nothing was left out: the test shows nothing"
    return found


def _logp_complaints(problem: Problem, got: Result, truth: Result) -> Iterator[str]:
    """int8's log-probs are far nearer to the truth than those of a dense bf16 implementation."""
    bias = problem.head.bias_V
    head = replace(problem.head, bias_V=None if bias is None else bias.bfloat16())
    x_TH, w_VH = problem.x_TH.bfloat16(), problem.w_VH.bfloat16()
    rounded = replace(problem, x_TH=x_TH, w_VH=w_VH, head=head)
    dense_T = textbook(rounded).logp_T - textbook(rounded.double()).logp_T
    error_T = got.logp_T - truth.logp_T
    if not error_T.norm() <= dense_T.norm() / 4:
        yield f"logp: error {error_T.norm():.1e}, dense bf16's {dense_T.norm():.1e}"
    if not abs(error_T.mean()) <= 2.5e-4 or (got.logp_T > 0).any():
        yield f"logp: mean error {error_T.mean():.1e}, largest {got.logp_T.max():.1e}"


HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"bias": True, "softcap": 60.0, "logit_scale": 1.1},
    "capped": {"softcap": 10.0, "logit_scale": 2.5, "likely": 0.1},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("head", HEADS)
def test_the_error_stays_within_the_tolerance(dtype: torch.dtype, head: str, source: str) -> None:
    problem = text(dtype, **HEADS[head])
    for tolerance in (1.0, 4.0):
        found = complaints(problem, tolerance, never_active(problem, tolerance), source)
        assert not found, (tolerance, found)


FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "dW's stand-in missing": lambda patch: _moments(patch, 2, None, 0.0),
    "dW's stand-in turned round": lambda patch: _moments(patch, 2, None, -1.0),
    "dX's stand-in missing": lambda patch: _moments(patch, 0, 2, 0.0),
    "a random basis": lambda patch: patch.setattr(fast_plan, "BASIS_ROUNDS", 0),
    "active rows put back too": lambda patch: patch.setattr(
        Tensor, "index_fill_", lambda self, *_: self
    ),
    "too much dropped": lambda patch: patch.setattr(fast_plan, "BUDGET", 8 * fast_plan.BUDGET),
}


INT8_FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a sum too large": lambda patch: _scanned(patch, lambda self: self.sum_B.mul_(1.01)),
    "a sum of other tokens": lambda patch: _scanned(patch, lambda self: self.sum_B.copy_(
        self.sum_B.roll(1))),
    "a step too large": lambda patch: _scanned(patch, lambda self: self.step_B.mul_(1.02)),
}  # fmt: skip


def _scanned(patch: pytest.MonkeyPatch, then: Callable) -> None:
    """Something goes wrong between the look at all rows and that at active ones."""
    look = scan.Int8.scan
    patch.setattr(scan.Int8, "scan", lambda self, *args: (look(self, *args), then(self))[0])


def _moments(patch: pytest.MonkeyPatch, first: int, last: int | None, factor: float) -> None:
    result = fast._Sparse.result

    def wrong(self):
        self.moments_VK[:, first:last] *= factor
        if last is not None:
            self.dropped_P *= factor
        return result(self)

    patch.setattr(fast._Sparse, "result", wrong)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(fault: str, source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = text(bias=True)
    never_V = never_active(problem, 4.0)
    assert 0.5 < never_V.float().mean() < 0.95
    FAULTS[fault](monkeypatch)
    assert complaints(problem, 4.0, never_V, source)


@pytest.mark.parametrize("fault", INT8_FAULTS)
@pytest.mark.parametrize("source", ["int8"], indirect=True)
def test_a_fault_planted_in_int8_is_found(fault: str, source: str, monkeypatch) -> None:
    problem = text()
    never_V = never_active(problem, 4.0)
    INT8_FAULTS[fault](monkeypatch)
    assert complaints(problem, 4.0, never_V)


@pytest.mark.parametrize("source", ["int8"], indirect=True)
def test_int8_logits_are_near_the_truth(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far nearer than those of states and head in int8 as they are."""
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", (512, 512))
    problem = text()
    x_TH, w_VH = problem.x_TH, problem.w_VH
    w_VH[:, 0] /= 8  # what tokens have in common is not one column
    x_TH[:, 0] *= 2
    x_TH[:, 1:4] += torch.tensor([3.0, -2.0, 4.0])
    x_TH[:, 4:8] *= 8
    blocks = cpu.Blocks(x_TH, w_VH, problem.head)
    _, x_nH, x_BH = next(iter(blocks))
    seen = scan.Int8(blocks, None).scan(x_BH, blocks.pad(problem.y_T.clamp(min=0)))
    ((_, scale_B),) = seen.scales
    p_Vn = (seen.e_VB * scale_B)[:, : len(x_nH)].double()
    z_Vn = w_VH.double() @ x_nH.double().T
    w8_VH, x8_nH = (
        levels * step for levels, step in map(scan._levels, (w_VH.clone(), x_nH.clone()))
    )
    errors_Vn = p_Vn.log() - z_Vn.log_softmax(dim=0), w8_VH @ x8_nH.T - z_Vn
    ours, plain = (float((e - e.mean(dim=0)).square().mean().sqrt()) for e in errors_Vn)
    assert ours < 0.06 and ours < plain / 2


@pytest.mark.parametrize("source", ["int8"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_int8_is_no_good_the_block_is_exact(dtype: torch.dtype, source: str, monkeypatch):
    monkeypatch.setattr(scan, "LEVELS", 4)
    problem = text(dtype, bias=True)
    (got, report), (exact, _) = fused(problem, 2.0), fused(problem, 0)
    assert report.active == 1 and not report.dropped_T.any()
    for name in ("logp_T", "dx_TH", "dw_VH", "db_V"):
        assert torch.equal(getattr(got, name), getattr(exact, name)), name


@pytest.mark.parametrize("likely", [0.2, 0.25, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_where_the_model_is_sure(dtype: torch.dtype, likely: float, source: str) -> None:
    """0.03 to 3e-5 nats a token: 1 - p of a target is far below the error of its coarse logit."""
    problem = text(dtype, likely=likely)
    truth, exact = textbook(problem.double()), fused(problem, 0)[0]
    got, report = fused(problem, 2.0)
    assert 0.02 < report.active < 0.1
    mine, dense = (errors(r.dx_TH, truth.dx_TH).rms for r in (got, exact))
    assert mine <= (1.1 * dense**2 + (2 * ROUNDING) ** 2) ** 0.5
    if dtype == torch.float32:
        assert mine < report.error
    if dtype == torch.bfloat16 and source == "int8":  # whose active logits are fp32
        assert mine < dense


@pytest.mark.parametrize("source", ["int8"], indirect=True)
def test_int8_knows_what_it_must_not_trust(source: str) -> None:
    """One token whose logits it got wrong, or whose sum overflowed; one of few active rows, where
    each is looked at. Padding may be anything."""
    problem = text(T=50)
    blocks = cpu.Blocks(problem.x_TH, problem.w_VH, problem.head)
    _, x_nH, x_BH = next(iter(blocks))
    y_B, other_B = blocks.pad(problem.y_T.clamp(min=0)), torch.ones(blocks.B)
    active_A = y_B.unique()
    look = scan.Int8(blocks, None)

    def found(spoil: Callable[[], object] = lambda: None) -> bool:
        look.scan(x_BH, y_B)
        spoil()
        args = active_A, problem.w_VH[active_A], x_BH, y_B, other_B, len(x_nH)
        return look.find(*args) is not None

    assert blocks.B > len(x_nH) == 50 and found()
    assert not found(lambda: look.sum_B[49].fill_(torch.inf))
    assert not found(lambda: look.sum_B[49].fill_(2.0**65))
    assert not found(lambda: look.x8_BH[49].neg_())
    for row in active_A[[3, 8, 21]]:
        assert not found(lambda row=row: look.w8_VH[row].neg_())
        look.w8_VH[row].neg_()
    assert found(lambda: (look.sum_B[50].fill_(torch.inf), look.x8_BH[50].neg_()))


@pytest.mark.parametrize("source", ["int8"], indirect=True)
def test_a_token_that_int8_misreads_is_not_lost_in_the_mean(source: str) -> None:
    """Its block is done exactly, and the three after it; the others as ever."""
    problem = text()
    t = int((problem.y_T >= 0).nonzero()[70])
    problem.x_TH[t, 3] = 400.0  # its largest element leaves few steps to the others
    (got, report), (exact, _) = fused(problem, 2.0), fused(problem, 0)
    assert 0.5 < report.active < 1
    assert abs(got.logp_T[t] - exact.logp_T[t]) < 1e-4
    assert errors(got.dx_TH, exact.dx_TH).rms < 2 * ROUNDING


@pytest.mark.parametrize("T", [50, 400])  # less than a block: the rest of it is padding
@pytest.mark.parametrize("weight", [1.0, 2**-30])
@pytest.mark.parametrize("nats", [(-120, -120), (-85, -85), (85, 85), (120, 120), (76, -76)])
def test_what_all_logits_of_a_token_share_is_nothing(
    nats: tuple[float, float], weight: float, T: int, source: str
) -> None:
    """In turns, so that neither a token's own nor the mean token's shows in its neighbour."""
    plain = text(T=T)
    plain.w_VH[:, 1], plain.x_TH[:, 1] = 1.0, 0.0
    plain.dlogp_T[:] *= weight
    problem = replace(plain, x_TH=plain.x_TH.clone())
    problem.x_TH[:, 1] = torch.tensor(nats).repeat(T)[:T]
    truth, (got, report) = textbook(problem.double()), fused(problem, 2.0)
    expected = fused(plain, 2.0)[1]
    assert expected.active < 0.5 and abs(report.active / expected.active - 1) < 0.1
    error = errors(got.dx_TH, truth.dx_TH).rms
    assert error <= 2 * ROUNDING and error < report.error
    assert (got.logp_T - truth.logp_T).abs().amax() < 5e-3


@pytest.mark.parametrize("source", ["int8"], indirect=True)
def test_the_likeliest_rows_may_come_late(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Far above what the first tile of rows and the target show of a token: up to 44 nats are
    borne, more are done exactly."""
    monkeypatch.setattr(scan, "TILE_BYTES", 100 * 64 * 4)  # 30 tiles
    problem = text(bias=True)
    for nats, exact in ((30.0, False), (60.0, True), (100.0, True)):
        problem.head.bias_V[:200] = -nats
        problem.y_T[problem.y_T >= 0] = problem.y_T[problem.y_T >= 0] % 100 + 100
        _is_as_good_as_exact(problem)
        look = scan.Int8(blocks := cpu.Blocks(problem.x_TH, problem.w_VH, problem.head), None)
        look.scan(next(iter(blocks))[2], problem.y_T[: blocks.B].clamp(min=0))
        assert bool((look.sum_B > scan.LARGEST_SUM).any()) == exact


@pytest.mark.parametrize("source", ["int8"], indirect=True)
def test_a_token_without_weight_keeps_its_log_prob(source: str) -> None:
    """No row is active for its sake, and its target lies 130 nats below those that are not."""
    problem = text(bias=True)
    t = int((problem.y_T >= 0).nonzero()[70])
    problem.head.bias_V[-1] = -130
    problem.y_T[t], problem.dlogp_T[t] = len(problem.w_VH) - 1, 0.0
    problem.x_TH[t] = problem.x_TH[problem.y_T >= 0].mean(dim=0)
    (got, report), (exact, _) = fused(problem, 2.0), fused(problem, 0)
    assert report.active < 0.5 and report.dropped_T[t] > 0.001
    assert abs(got.logp_T[t] - exact.logp_T[t]) < 0.1


@pytest.mark.parametrize("source", ["int8"], indirect=True)
@pytest.mark.parametrize("nats", [20.0, 100.0, 1e9, torch.inf])
def test_rows_far_below_the_others(nats: float, source: str) -> None:
    """As a mask leaves them, or a bias; in the latter case one is a target."""
    problem = text(bias=True)
    problem.head.bias_V[-512:] -= nats if nats > 1e3 else torch.linspace(0.5, 1, 512) * nats
    has = problem.y_T >= 0
    problem.y_T[has] %= len(problem.w_VH) - 512
    if nats < 1e3:
        problem.y_T[has.nonzero()[5]] = len(problem.w_VH) - 1
    _is_as_good_as_exact(problem)
    assert fused(problem, 2.0)[1].active < 0.5


def _is_as_good_as_exact(problem: Problem) -> None:
    (got, _), (exact, _) = fused(problem, 2.0), fused(problem, 0)
    for name in ("logp_T", "dx_TH", "dw_VH", "db_V"):
        assert getattr(got, name).isfinite().all(), name
    assert errors(got.dx_TH, exact.dx_TH).rms < 2 * ROUNDING
    torch.testing.assert_close(got.logp_T, exact.logp_T, rtol=0, atol=5e-3)


@pytest.mark.parametrize(("H", "turned", "lent"), [(96, 0, True), (32, 0, False), (96, 1, False)])
def test_blocks_live_where_dw_is_rounded_to(
    H: int, turned: bool, lent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If that is large enough, and has its rows in order."""
    problem = text(torch.bfloat16, H=H)
    w_VH = problem.w_VH.T.contiguous().T if turned else problem.w_VH
    moments, blocks = fast._Sparse._moments, []
    monkeypatch.setattr(
        fast._Sparse,
        "_moments",
        lambda self, seen, *rest: (
            blocks.append(seen.e_VB.data_ptr()),
            moments(self, seen, *rest),
        )[1],
    )
    args = problem.x_TH, w_VH, problem.y_T.clamp(min=0), problem.dlogp_T
    options = torch.zeros_like(problem.dlogp_T), problem.head, (True, True, False), 2.0
    dw_VH = fast.gradients(*args, *options)[2]
    assert blocks and all((ptr == dw_VH.data_ptr()) == lent for ptr in blocks)


def test_int8_keeps_something_back_for_its_own_error(monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[Tensor] = []
    plan = fast_plan.active_rows
    monkeypatch.setattr(
        fast_plan, "active_rows", lambda s, y, limit: (limits.append(limit), plan(s, y, limit))[1]
    )
    for in_int8 in (False, True):
        monkeypatch.setattr(scan, "_pays", lambda x_NH, in_int8=in_int8: in_int8)
        fused(text(T=50), 2.0)  # too few to be asked first whether they are flat
    full, int8 = limits
    assert abs(int8 / full - 0.875) < 0.02


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_state_that_is_no_number_spoils_no_other_token(bad: float) -> None:
    problem = text()
    t = int((problem.y_T >= 0).nonzero()[3])
    problem.x_TH[t, 5] = bad
    (got, _), (exact, _) = fused(problem, 2.0), fused(problem, 0)
    others = torch.arange(len(problem.y_T)) != t
    assert not got.logp_T[t].isfinite() and got.logp_T[others].isfinite().all()
    torch.testing.assert_close(got.logp_T[others], exact.logp_T[others], rtol=0, atol=5e-3)


@pytest.mark.parametrize(("likely", "cap"), [(0.06, None), (0.15, 30.0)], ids=["text", "sure"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_report_is_true(dtype, likely, cap, source) -> None:
    """The share is what was computed, the mass what lies outside, the error from above.

    Of many tokens the model is sure: there the target's own rounding would be most of the mass.
    """
    problem = text(dtype, likely=likely, softcap=cap)
    counted, active = [], fast._Sparse._active
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast._Sparse, "_active", lambda *a: (counted.append(a), active(*a))[1])
        got, report = fused(problem, 4.0)
    valid_T = problem.y_T >= 0
    x_NH = problem.x_TH[valid_T]
    elements = sum(len(a[2]) * len(a[4]) for a in counted)
    assert float(report.active) == pytest.approx(elements / (len(x_NH) * 3000), rel=1e-6)
    z_NV = x_NH.double() @ problem.w_VH.double().T
    slope_NV = torch.ones_like(z_NV) if cap is None else 1 - (z_NV / cap).tanh() ** 2
    p_NV = (z_NV if cap is None else cap * (z_NV / cap).tanh()).softmax(dim=1)
    inside = torch.zeros_like(z_NV, dtype=torch.bool)
    for a in counted:
        inside[a[1] : a[1] + len(a[2])].index_fill_(1, a[4], True)
    outside_N = (p_NV * slope_NV).masked_fill(inside, 0).sum(dim=1)
    others_N = 1 - p_NV.gather(1, problem.y_T[valid_T, None])[:, 0]
    rounding = 2**-8 * others_N if dtype == torch.bfloat16 else 1e-6
    rounding = rounding + (0.3 if source == "int8" else 0.05) * outside_N + 1e-6
    assert ((report.dropped_T[valid_T] - outside_N).abs() < rounding).all()
    assert not report.dropped_T[~valid_T].any()
    exact = fused(problem, 0)[0]
    if dtype == torch.float32:
        truth = errors(got.dx_TH, exact.dx_TH).rms
        assert truth < report.error < 4 * truth


def test_the_estimate_is_from_above() -> None:
    """Of calls that leave much out and calls that leave little: never below 0.9 of the error."""
    for seed in range(12):
        options = [{}, {"bias": True}, {"softcap": 20.0}, {"logit_scale": 1.5}][seed % 4]
        size = (300, 800, 1500)[seed % 3], (1500, 3000)[seed % 2], (48, 96)[seed % 2]
        problem = text(torch.float32, *size, likely=(0.1, 0.3, 0.6)[seed % 3], **options)
        problem = replace(problem, y_T=problem.y_T.roll(seed))
        tolerance = (1.0, 2.0, 4.0, 8.0)[seed // 3]
        (got, report), (exact, _) = fused(problem, tolerance), fused(problem, 0)
        assert report.error >= 0.9 * errors(got.dx_TH, exact.dx_TH).rms, (seed, report.active)


def test_the_plan() -> None:
    """Smallest first up to the limit's energy; a target without weight is active, and so is NaN."""
    s_V = torch.tensor([0.0, 5.0, 0.5, 0.5, 0.7, 1.2, torch.nan, 0.0])
    active_V, left = fast_plan.active_rows(s_V, torch.tensor([0]), torch.tensor(1.0).double())
    assert active_V.tolist() == [True, True, False, False, False, True, True, False]
    assert float(left) == pytest.approx(0.99, rel=1e-6)


FLAT = {**HEADS, "capped": {"softcap": 0.5}}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head", FLAT)
def test_flat_text_is_done_exactly(dtype: torch.dtype, head: str, monkeypatch) -> None:
    """Without asking any block; where a few tokens do not tell, most of them: the first is asked,
    and the fifth after a rest of three."""
    moments, asked = fast._Sparse._moments, []
    monkeypatch.setattr(fast._Sparse, "_moments", lambda *a: (asked.append(a), moments(*a))[1])
    options = FLAT[head]
    problem = make_problem(400, 300, 32, dtype=dtype, peak=0.3, **options)
    (got, report), (exact, _) = fused(problem, 2.0), fused(problem, 0)
    assert not asked and torch.equal(got.dw_VH, exact.dw_VH)
    monkeypatch.setattr(fast, "PROBE", 1 << 20)
    got, report = fused(problem, 2.0)
    assert len(asked) == 2
    assert report.active == 1 and report.error == 0 and not report.dropped_T.any()
    assert torch.equal(got.logp_T, exact.logp_T)
    truth = textbook(problem.double())
    for name in ("dx_TH", "dw_VH", *(("db_V",) if "bias" in options else ())):
        mine, dense = (errors(getattr(r, name), getattr(truth, name)) for r in (got, exact))
        assert mine.rms < 1.5 * dense.rms, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flat_block_among_others(dtype: torch.dtype) -> None:
    """One block is done exactly, and adds to what others computed of some rows."""
    problem = text(dtype, bias=True)
    problem.x_TH[-80:] = 0  # the last 64 tokens with a target or so: a block
    (got, report), (exact, _) = fused(problem, 2.0), fused(problem, 0)
    truth = textbook(problem.double())
    assert 0.2 < report.active < 0.6
    for name in ("dx_TH", "dw_VH", "db_V"):
        mine, dense = (errors(getattr(r, name), getattr(truth, name)) for r in (got, exact))
        assert mine.rms <= (dense.rms**2 + (2 * ROUNDING) ** 2) ** 0.5, name


def test_dw_written_afresh_is_dw_added_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where no block was done exactly, dW is written row by row, tail and all."""
    problem = text()
    fresh, _ = fused(problem, 4.0)
    result = fast._Sparse.result

    def with_accumulator(self):
        self.grads.dw_VH = torch.zeros_like(problem.w_VH)
        return result(self)

    monkeypatch.setattr(fast._Sparse, "result", with_accumulator)
    added, _ = fused(problem, 4.0)
    assert errors(fresh.dw_VH, added.dw_VH).rms < 1e-6


def test_two_runs_give_the_same_bits() -> None:
    problem = text(torch.bfloat16, bias=True)
    (a, report_a), (b, report_b) = (fused(problem, 2.0) for _ in range(2))
    for name in ("dx_TH", "dw_VH", "db_V"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert torch.equal(report_a.dropped_T, report_b.dropped_T)


def test_the_primitive_does_the_same_once_its_coefficients_arrive() -> None:
    problem = text()
    x_TH, w_VH = (t.clone().requires_grad_() for t in (problem.x_TH, problem.w_VH))
    out = token_logprobs(x_TH, w_VH, problem.y_T, tolerance=2.0)
    assert out.fast.active == 0 and not out.fast.dropped_T.any()
    (out.logp_T * problem.dlogp_T).sum().backward()
    want, report = fused(problem, 2.0)
    assert torch.equal(x_TH.grad, want.dx_TH) and torch.equal(w_VH.grad, want.dw_VH)
    assert out.fast.active == report.active and out.fast.error == report.error
    assert torch.equal(out.fast.dropped_T, report.dropped_T)


def test_z_loss_and_dpo() -> None:
    problem = text(dlse=0.02)
    grads = []
    for tolerance in (0.0, 2.0):
        x_TH, w_VH = (t.clone().requires_grad_() for t in (problem.x_TH, problem.w_VH))
        out = token_logprobs(x_TH, w_VH, problem.y_T, tolerance=tolerance)
        ((out.logp_T * problem.dlogp_T).sum() + (out.lse_T * problem.dlse_T).sum()).backward()
        cu_seqlens, ref_S = torch.tensor([0, 90, 200, 310, 400]), torch.zeros(4)
        chosen_S = torch.tensor([True, False, True, False])
        dpo = dpo_loss(x_TH, w_VH, problem.y_T, cu_seqlens, chosen_S, ref_S, tolerance=tolerance)
        grads.append([x_TH.grad, w_VH.grad, *torch.autograd.grad(dpo.loss, (x_TH, w_VH))])
    assert 0 < dpo.fast.active < 0.5
    for exact, got in zip(*grads, strict=True):
        assert 0 < errors(got, exact).rms < 2 * ROUNDING


def test_frozen_ignored_and_empty_inputs() -> None:
    problem = text()
    x_TH, w_VH, y_T = problem.x_TH, problem.w_VH, problem.y_T
    both, _ = fused(problem, 2.0)
    for frozen in (0, 1):
        leaves = [t.clone().requires_grad_(i != frozen) for i, t in enumerate((x_TH, w_VH))]
        weighted_logprobs(*leaves, y_T, problem.dlogp_T, None, tolerance=2.0)[0].backward()
        assert leaves[frozen].grad is None
        assert torch.equal(leaves[1 - frozen].grad, (both.dw_VH, both.dx_TH)[frozen])
    assert not both.dx_TH[y_T < 0].any()
    for n, y in ((0, y_T[:0]), (3, torch.full((3,), -100)), (1, torch.tensor([7]))):
        leaves = [t.clone().requires_grad_() for t in (x_TH[:n], w_VH)]
        out = sft_loss(*leaves, y, tolerance=2.0)
        out.loss.backward()
        exact = torch.autograd.grad(sft_loss(*leaves, y).loss, leaves)
        for leaf, want in zip(leaves, exact, strict=True):
            torch.testing.assert_close(leaf.grad, want, rtol=0, atol=2e-3 * float(want.norm()))
    with torch.no_grad():
        nothing = sft_loss(x_TH, w_VH, y_T, tolerance=2.0).fast
    assert nothing.active == 0 and torch.equal(nothing.dropped_T, torch.zeros(len(x_TH)))


def test_autocast_casts_the_inputs_and_nothing_else() -> None:
    problem = text(bias=True)
    bias = problem.head.bias_V
    bf16 = replace(problem, x_TH=problem.x_TH.bfloat16(), w_VH=problem.w_VH.bfloat16())
    (want, report), grads = fused(bf16, 2.0), []
    leaves = [t.clone().requires_grad_() for t in (problem.x_TH, problem.w_VH)]
    with torch.autocast("cpu", torch.bfloat16):
        args = *leaves, problem.y_T, problem.dlogp_T, bias
        total, logp_T, got = weighted_logprobs(*args, tolerance=2.0)
        grads.append(torch.autograd.grad(total, leaves))
        out = token_logprobs(*leaves, problem.y_T, bias=bias, tolerance=2.0)
        grads.append(torch.autograd.grad((out.logp_T * problem.dlogp_T).sum(), leaves))
    assert torch.equal(logp_T, want.logp_T) and got.active == report.active == out.fast.active
    for dx_TH, dw_VH in grads:
        assert torch.equal(dx_TH, want.dx_TH.float()) and torch.equal(dw_VH, want.dw_VH.float())


def test_compiled_equals_eager() -> None:
    problem = text()
    loss = lambda x, w: sft_loss(x, w, problem.y_T, num_tokens=300, tolerance=2.0).loss
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaves = [t.clone().requires_grad_() for t in (problem.x_TH, problem.w_VH)]
        function(*leaves).backward()
        grads.append([leaf.grad for leaf in leaves])
    for eager, compiled in zip(*grads, strict=True):
        assert torch.equal(eager, compiled)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_short_and_narrow_calls_are_exact(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # as shipped
    for T, H, is_exact in ((255, 64, True), (300, 31, True), (300, 64, False)):
        problem = text(dtype, T, 1000, H, likely=0.3)
        problem = replace(problem, y_T=problem.y_T.clamp(min=0))
        result, report = fused(problem, 2.0)
        assert report is not None
        assert (report.active == 1) == (report.error == 0) == is_exact
        if is_exact:
            exact, _ = fused(problem, 0.0)
            assert torch.equal(result.dx_TH, exact.dx_TH) and torch.equal(result.dw_VH, exact.dw_VH)
