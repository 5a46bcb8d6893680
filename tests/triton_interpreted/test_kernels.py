"""The kernels against fp64 truth, judged by a dense implementation in the same dtype."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from interpreter import row_invariant_product
from redi_kernels import reference, token_logprobs
from redi_kernels import triton as kernels
from redi_kernels.head import Head
from redi_kernels.logprobs import weighted_logprobs
from redi_kernels.triton import config as configs

TMA = dataclasses.replace(configs.INTERPRETER, tma=True)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ALL = (True, True, True)


@pytest.fixture(params=["pointers", "tma"])
def form(request, monkeypatch):
    chosen = {"pointers": configs.INTERPRETER, "tma": TMA}[request.param]
    monkeypatch.setattr(configs, "select", lambda *_: chosen)
    return chosen


def problem(T, H, V, dtype, *, seed=0, spread=3.0, bias=False):
    """Hidden states, weights, targets, bias and signed weights of very different sizes."""
    random = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=random)
    x_TH = normal(T, H).to(dtype)
    w_VH = (normal(V, H) * spread * H**-0.5).to(dtype)
    y_T = torch.randint(0, V, (T,), generator=random)
    weight_T = normal(T) * 10.0 ** (-6 * torch.rand(T, generator=random))
    weight_T[::5] = 0.0
    return x_TH, w_VH, y_T, normal(V).to(dtype) if bias else None, weight_T


def gradients(x_TH, w_VH, y_T, head, dlogp_T, dlse_T, dtype):
    """Outputs and gradients of the textbook in `dtype`, from the same (rounded) inputs."""
    leaf = lambda t: t.detach().to(dtype, copy=True).requires_grad_()
    leaves = [leaf(x_TH), leaf(w_VH)]
    bias = None if head.bias_V is None else leaf(head.bias_V)
    out = reference.token_logprobs(*leaves, y_T, Head(bias, head.softcap, head.logit_scale))
    (out[0] * dlogp_T.to(out[0]) + out[1] * dlse_T.to(out[1])).sum().backward()
    grads = [*leaves, bias] if bias is not None else leaves
    return [o.detach() for o in out], [g.grad for g in grads]


def rms(error):
    return error.double().square().mean().sqrt().item()


def judge(actual, dense, truth, name, factor=1.5):
    """RMS error at most `factor` times the dense one's, or 1e-3 (fp32: 1e-6) of the truth's RMS."""
    assert actual.isfinite().all(), name
    floor = (1e-3 if dense.dtype == torch.bfloat16 else 1e-6) * rms(truth)
    limit = factor * rms(dense - truth) + floor
    assert rms(actual - truth) <= limit, f"{name}: {rms(actual - truth):.2e} > {limit:.2e}"


def compare(x_TH, w_VH, y_T, head, dlogp_T, dlse_T=None):
    """The primitive's outputs and gradients, and the fused path's, against the truth."""
    fused_only = dlse_T is None
    dlse_T = torch.zeros_like(dlogp_T) if fused_only else dlse_T
    args = x_TH, w_VH, y_T, head
    needs = (True, True, head.bias_V is not None)
    out, grads = gradients(*args, dlogp_T, dlse_T, torch.float64)
    dense_out, dense_grads = gradients(*args, dlogp_T, dlse_T, x_TH.dtype)

    if fused_only:
        logp_T, *found = kernels.weighted(*args[:3], dlogp_T, head, needs)
        judge(logp_T, dense_out[0], out[0], "logp")
    else:
        logp_T, lse_T, entropy_T, correct_T = kernels.forward(*args)
        judge(lse_T, dense_out[1], out[1], "lse")
        judge(entropy_T, dense_out[2], out[2], "entropy")
        assert torch.equal(correct_T, out[3])
        found = kernels.backward(*args[:3], logp_T, lse_T, dlogp_T, dlse_T, head, needs)
    judge(logp_T, dense_out[0], out[0], "logp")
    assert (logp_T <= 0).all()
    for name, *three in zip(("dx", "dw", "db"), found, dense_grads, grads, strict=False):
        judge(*three, name)


# T, H, V: one of each; rows TMA cannot read; ragged everywhere; T and V one past whole tiles
SHAPES = [(1, 8, 1), (33, 9, 40), (70, 72, 333), (129, 64, 257)]
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "softcap": {"softcap": 4.0},
    "all": {"bias": True, "softcap": 6.0, "logit_scale": 0.7},
}


@pytest.mark.parametrize("path", ["primitive", "fused"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_shapes_and_tails(form, dtype, shape, path):
    x_TH, w_VH, y_T, _, weight_T = problem(*shape, DTYPES[dtype])
    dlse_T = torch.linspace(-1, 1, len(x_TH)) if path == "primitive" else None
    compare(x_TH, w_VH, y_T, Head(), weight_T, dlse_T)


@pytest.mark.parametrize("path", ["primitive", "fused"])
@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(dtype, options, path):
    options = dict(HEADS[options])
    x_TH, w_VH, y_T, bias, weight_T = problem(
        90, 48, 300, DTYPES[dtype], bias=options.pop("bias", False)
    )
    dlse_T = torch.linspace(-1, 1, len(x_TH)) if path == "primitive" else None
    compare(x_TH, w_VH, y_T, Head(bias, **options), weight_T, dlse_T)


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
@pytest.mark.parametrize("path", ["primitive", "fused"])
def test_far_from_zero(offset, path):
    """A vocabulary tail of phantom zero logits, or a maximum that starts at 0, shows here."""
    x_TH, w_VH, y_T, _, weight_T = problem(70, 32, 200, torch.float32)
    bias = torch.full((200,), offset)
    dlse_T = weight_T.flip(0) if path == "primitive" else None
    compare(x_TH, w_VH, y_T, Head(bias), weight_T, dlse_T)


def test_large_logits_lose_nothing():
    """Logits near 1024, all exact in fp32: log-probs as exact as near 0, and never above it."""
    random = torch.Generator().manual_seed(0)
    x_TH = torch.randint(-1, 2, (40, 32), generator=random).float()
    w_VH = torch.randint(-64, 65, (200, 32), generator=random) / 64
    y_T = (x_TH @ w_VH.T).argmax(1)

    head = Head(torch.full((200,), 1024.0))
    truth = reference.token_logprobs(x_TH.double(), w_VH.double(), y_T, Head(head.bias_V.double()))[
        0
    ]
    logp_T = kernels.forward(x_TH, w_VH, y_T, head)[0]
    fused_T = kernels.weighted(x_TH, w_VH, y_T, torch.ones(40), head, (True, False, False))[0]
    assert torch.equal(logp_T, fused_T)
    assert (logp_T - truth).abs().max() < 2e-6
    assert (logp_T <= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_unlikely_targets_are_done_again(dtype):
    """exp(z - c) would overflow from a target's own logit 150 nats down: its block uses lse."""
    x_TH, w_VH, y_T, _, weight_T = problem(150, 32, 300, DTYPES[dtype])
    bias = torch.zeros(300, dtype=DTYPES[dtype])
    bias[7] = -150.0
    y_T[y_T == 7] = 8
    y_T[[3, 140]] = 7  # row blocks 0 and 2 of three
    logp_T = kernels.forward(x_TH, w_VH, y_T, Head(bias))[0]
    assert (logp_T < -100).sum() == 2
    compare(x_TH, w_VH, y_T, Head(bias), weight_T + 1.0)


@pytest.mark.parametrize("path", ["primitive", "fused"])
def test_certain_targets(path):
    """p -> 1: the gradient is -(1 - p), not what rounding leaves of 1 - 1."""
    x_TH, w_VH, y_T, _, _ = problem(64, 32, 100, torch.float32, spread=0.5)
    y_T[:] = 3
    bias = torch.zeros(100)
    bias[3] = 12.0
    head, ones_T = Head(bias), torch.ones(64)
    out, (dx, _, db) = gradients(x_TH, w_VH, y_T, head, ones_T, ones_T * 0, torch.float64)
    assert (out[0] > -2e-3).all()
    logp_T, lse_T, *_ = kernels.forward(x_TH, w_VH, y_T, head)
    if path == "fused":
        _, found_dx, _, found_db = kernels.weighted(x_TH, w_VH, y_T, ones_T, head, ALL)
    else:
        found_dx, _, found_db = kernels.backward(
            x_TH, w_VH, y_T, logp_T, lse_T, ones_T, ones_T * 0, head, ALL
        )
    assert (logp_T <= 0).all()
    assert rms(found_dx - dx) < 1e-3 * rms(dx)
    assert rms(found_db - db) < 1e-3 * rms(db)


def test_masked_vocabulary():
    """A bias of -inf removes tokens, here a whole tile of them: finite results, zero gradient."""
    x_TH, w_VH, y_T, _, weight_T = problem(20, 32, 300, torch.float32)
    bias = torch.zeros(300)
    bias[128:290] = float("-inf")
    y_T %= 128
    head, needs = Head(bias), (True, True, False)
    keep = torch.cat([torch.arange(128), torch.arange(290, 300)])
    small = kernels.forward(x_TH, w_VH[keep], y_T, Head())
    out = kernels.forward(x_TH, w_VH, y_T, head)
    torch.testing.assert_close(out, small, rtol=1e-5, atol=1e-5)
    dx_small, dw_small, _ = kernels.weighted(x_TH, w_VH[keep], y_T, weight_T, Head(), needs)[1:]
    backward = kernels.backward(x_TH, w_VH, y_T, *out[:2], weight_T, weight_T * 0, head, needs)
    for dx, dw, _ in (backward, kernels.weighted(x_TH, w_VH, y_T, weight_T, head, needs)[1:]):
        torch.testing.assert_close(dx, dx_small, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(dw[keep], dw_small, rtol=1e-4, atol=1e-6)
        assert (dw[128:290] == 0).all()


@pytest.mark.parametrize("shape", [(64, 64, 128), (33, 9, 40), (1, 1, 1)], ids=str)
def test_the_interpreters_dot_knows_no_place(shape):
    """Any row, anywhere, among any others: the same bits, whatever BLAS numpy has."""
    M, K, N = shape
    random = np.random.default_rng(0)
    a_MK, b_KN = (random.standard_normal(s).astype(np.float32) for s in ((M, K), (K, N)))
    whole_MN = row_invariant_product(a_MK, b_KN)
    np.testing.assert_allclose(whole_MN, a_MK.astype(float) @ b_KN, rtol=1e-4, atol=1e-5)
    for m in range(M):
        assert np.array_equal(row_invariant_product(a_MK[m : m + 1], b_KN)[0], whole_MN[m])
        assert np.array_equal(row_invariant_product(a_MK[m:], b_KN), whole_MN[m:])
        moved_MN = row_invariant_product(np.roll(a_MK, m, axis=0), b_KN)
        assert np.array_equal(moved_MN, np.roll(whole_MN, m, axis=0))
    columns_first = np.asfortranarray(a_MK), np.asfortranarray(b_KN)
    assert np.array_equal(row_invariant_product(*columns_first), whole_MN)


@pytest.mark.parametrize("dtype", DTYPES)
def test_logprobs_do_not_depend_on_the_batch(form, dtype):
    """Bitwise: twice, permuted, alone, in another place of a longer batch, and on both paths."""
    x_TH, w_VH, y_T, _, weight_T = problem(130, 72, 260, DTYPES[dtype])
    logp_T, lse_T, entropy_T, _ = kernels.forward(x_TH, w_VH, y_T, Head())
    order = torch.randperm(130, generator=torch.Generator().manual_seed(1))
    for index in (slice(None), order, slice(77, 78), slice(30, 120)):
        again = kernels.forward(x_TH[index].contiguous(), w_VH, y_T[index], Head())
        for a, b in zip(again, (logp_T, lse_T, entropy_T), strict=False):
            assert torch.equal(a, b[index])
    runs = [kernels.weighted(x_TH, w_VH, y_T, weight_T, Head(), (True, True, False)) for _ in "ab"]
    for a, b in zip(*runs, strict=True):
        assert a is b is None or torch.equal(a, b)
    assert torch.equal(runs[0][0], logp_T)


@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=3)), ids=str)
def test_only_what_is_needed(needs):
    """Frozen head, frozen body, frozen bias: None, and the others keep their bits."""
    x_TH, w_VH, y_T, bias, weight_T = problem(70, 32, 150, torch.bfloat16, bias=True)
    head = Head(bias)
    logp_T, lse_T, *_ = kernels.forward(x_TH, w_VH, y_T, head)
    run = {
        "primitive": lambda needs: kernels.backward(
            x_TH, w_VH, y_T, logp_T, lse_T, weight_T, weight_T, head, needs
        ),
        "fused": lambda needs: kernels.weighted(x_TH, w_VH, y_T, weight_T, head, needs)[1:],
    }
    for call in run.values():
        for found, need, full in zip(call(needs), needs, call(ALL), strict=True):
            assert torch.equal(found, full) if need else found is None


def test_slices_and_chunks_change_only_the_rounding(monkeypatch):
    """One slab for everything, or many: the log-probs' bits stay, gradients differ by rounding."""
    x_TH, w_VH, y_T, _, weight_T = problem(130, 40, 400, torch.float32)
    results = []
    for slab_bytes in (1 << 10, 1 << 30):
        config = dataclasses.replace(configs.INTERPRETER, slab_bytes=slab_bytes)
        monkeypatch.setattr(configs, "select", lambda *_, config=config: config)
        logp_T, lse_T, *_ = kernels.forward(x_TH, w_VH, y_T, Head())
        args = (x_TH, w_VH, y_T), Head(), (True, True, False)
        results.append(
            (
                *kernels.backward(*args[0], logp_T, lse_T, weight_T, weight_T, *args[1:])[:2],
                *kernels.weighted(*args[0], weight_T, *args[1:])[1:3],
            )
        )
        assert torch.equal(logp_T, results[0][-1]) or results[0][-1].dim() == 2
    for many, one in zip(*results, strict=True):
        assert rms(many - one) < 1e-6 * rms(one)


def test_rows_far_apart():
    """Offsets beyond 2^31 elements: rows of x, w and their gradients may lie anywhere."""
    x_TH, w_VH, y_T, _, weight_T = problem(70, 32, 150, torch.bfloat16)

    def spread_out(m):
        stride = 2**31 // (len(m) // 2)  # untouched pages cost nothing
        far = torch.empty(stride * (len(m) - 1) + m.shape[1], dtype=m.dtype)
        return far.as_strided(m.shape, (stride, 1)).copy_(m)

    far_x, far_w = spread_out(x_TH), spread_out(w_VH)
    needs = (True, True, False)
    near = kernels.weighted(x_TH, w_VH, y_T, weight_T, Head(), needs)
    far = kernels.weighted(far_x, far_w, y_T, weight_T, Head(), needs)
    for a, b in zip(near[:3], far[:3], strict=True):
        assert torch.equal(a, b)
    columns_first = kernels.weighted(x_TH.T.contiguous().T, w_VH, y_T, weight_T, Head(), needs)
    for a, b in zip(near[:3], columns_first[:3], strict=True):
        assert torch.equal(a, b)


def test_fp16():
    x_TH, w_VH, y_T, bias, weight_T = problem(70, 32, 150, torch.float16, bias=True)
    compare(x_TH, w_VH, y_T, Head(bias), weight_T + 1.0, weight_T)
    compare(x_TH, w_VH, y_T, Head(bias), weight_T + 1.0)


def test_public_api():
    """Ignored tokens, none left, and autograd around both paths."""
    x_TH, w_VH, y_T, _, weight_T = problem(60, 32, 150, torch.float32)
    for ignored in (slice(0, 60, 3), slice(None)):
        y = y_T.clone()
        y[ignored] = -100
        grads = {}
        for backend in ("triton", "reference"):
            leaves = [t.clone().requires_grad_() for t in (x_TH, w_VH)]
            out = token_logprobs(*leaves, y, backend=backend)
            total, logp_T, _ = weighted_logprobs(*leaves, y, weight_T, None, backend=backend)
            (3.0 * total + (out.logp_T * weight_T).sum() + out.lse_T.square().sum()).backward()
            grads[backend] = (out.logp_T.detach(), logp_T, *(leaf.grad for leaf in leaves))
        for a, b in zip(grads["triton"], grads["reference"], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        assert (grads["triton"][2][ignored] == 0).all()


@pytest.mark.parametrize("path", ["primitive", "fused"])
def test_targets_and_bias_that_are_not_contiguous(path, form):
    x_TH, w_VH, y_T, bias, weight_T = problem(40, 32, 100, torch.float32, bias=True)
    strided = torch.stack([y_T, 0 * y_T], dim=1)[:, 0], torch.stack([bias, 0 * bias], dim=1)[:, 0]
    dlse_T = weight_T.flip(0) if path == "primitive" else None
    compare(x_TH, w_VH, strided[0], Head(strided[1]), weight_T, dlse_T)


@pytest.mark.parametrize(
    ("capability", "tiles"),
    [(80, "SM80"), (89, "SM80"), (90, "SM90"), (100, "SM90"), (120, "SM80")],
)
def test_tiles_fit_the_card(capability, tiles):
    """12x, consumer Blackwell, has half of Hopper's shared memory."""
    chosen = configs.for_target("cuda", capability, torch.bfloat16)
    assert chosen == getattr(configs, tiles)
