"""Any length in one graph, any log-prob, any weight; and what is no number is refused."""

import math

import pytest
import torch
from redi_kernels import LossHead, cpu, dpo_loss, redi_loss, sft_loss, simpo_loss, token_logprobs
from redi_kernels.logprobs import weighted_logprobs
from torch._dynamo.utils import counters

LENGTHS = (20, 33, 57, 64, 21, 90, 34, 128, 47, 11)
H, V = 8, 50


def packed(T, S=4, seed=0):
    random = torch.Generator().manual_seed(seed + T)
    x_TH = torch.randn(T, H, generator=random, requires_grad=True)
    y_T = torch.randint(0, V, (T,), generator=random)
    y_T[::3] = -100
    cu_seqlens = torch.tensor([0, *(T * (i + 1) // S for i in range(S))])
    return x_TH, y_T, cu_seqlens, torch.tensor([True, False] * (S // 2))


W_VH = torch.randn(V, H, generator=torch.Generator().manual_seed(0), requires_grad=True)
BIAS = torch.randn(V, generator=torch.Generator().manual_seed(1), requires_grad=True)
LOSSES = {
    "sft": (lambda x, w, y, cu, chosen: sft_loss(x, w, y).loss, 1),
    "sft, bias, num_valid": (
        lambda x, w, y, cu, chosen: sft_loss(
            x, w, y, bias=BIAS, num_valid=y.shape[0] - (y.shape[0] + 2) // 3  # every third is none
        ).loss, 1
    ),
    "redi": (lambda x, w, y, cu, chosen: redi_loss(x, w, y, cu, chosen).loss, 1),
    "redi, floor": (
        lambda x, w, y, cu, chosen: redi_loss(x, w, y, cu, chosen, rejected_floor=-4.0).loss, 1
    ),
    "log-probs": (lambda x, w, y, cu, chosen: token_logprobs(x, w, y).logp_T.sum(), 1),
    "dpo": (
        lambda x, w, y, cu, chosen: dpo_loss(x, w, y, cu, chosen, torch.zeros(len(chosen))).loss, 2
    ),
    "simpo": (lambda x, w, y, cu, chosen: simpo_loss(x, w, y, cu, chosen).loss, 2),
}  # fmt: skip


QUICK = ("redi", "dpo", "log-probs")  # a compilation takes seconds


@pytest.mark.parametrize(
    "name",
    [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in LOSSES],
)
def test_one_graph_for_all_lengths(name):
    """At most two for losses of pairs, of which a single one takes the fused path."""
    torch._dynamo.reset()
    loss, most = LOSSES[name]
    counters.clear()
    compiled = torch.compile(loss, backend="aot_eager", dynamic=True, fullgraph=True)
    for T in LENGTHS:
        for S in (4,) if most == 1 else (4, 2):
            tensors = packed(T, S)
            found = torch.autograd.grad(compiled(tensors[0], W_VH, *tensors[1:]), tensors[0])
            expected = torch.autograd.grad(loss(tensors[0], W_VH, *tensors[1:]), tensors[0])
            torch.testing.assert_close(found, expected)
    assert counters["stats"]["unique_graphs"] <= most


def gradients(backend, dtype, m, upstream, path, softcap=None):
    """Of a token whose target has a bias of -m."""
    random = torch.Generator().manual_seed(0)
    x = torch.randn(6, H, generator=random).to(dtype).requires_grad_()
    w = torch.randn(V, H, generator=random).to(dtype).requires_grad_()
    bias = torch.zeros(V, dtype=dtype)
    bias[3] = -m
    bias.requires_grad_()
    y, upstream_T = torch.tensor([1, 3, 3, 0, 7, 3]), torch.full((6,), upstream)
    if dtype == torch.float64:
        upstream_T = upstream_T.double()
    options = {"backend": backend, "softcap": softcap}
    if path == "fused":
        loss, _, _ = weighted_logprobs(x, w, y, upstream_T, bias, **options)
    else:
        loss = (
            token_logprobs(x, w, y, bias=bias, **options).logp_T.nan_to_num() * upstream_T
        ).sum()
    return torch.autograd.grad(loss, (x, w, bias))


@pytest.mark.parametrize("m", [0.0, 1e2, 1e4, 1e6, 1e8])
@pytest.mark.parametrize("path", ["primitive", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradients_of_very_unlikely_targets_are_as_good_as_dense(dtype, path, m):
    m = float(torch.tensor(m).to(torch.bfloat16))
    truth = gradients("reference", torch.float64, m, 1.0, path)
    if dtype == torch.bfloat16:  # from the same rounded inputs
        truth = [t.double() for t in gradients("reference", torch.float32, m, 1.0, path)]
        return _near(gradients("cpu", dtype, m, 1.0, path), truth, 3e-2)
    _near(gradients("cpu", dtype, m, 1.0, path), truth, 2e-6)


def _near(found, truth, limit):
    for a, b in zip(found, truth, strict=True):
        assert (a.double() - b.double()).norm() <= limit * b.double().norm()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_rows_ruled_out_before_all_others(backend, monkeypatch):
    """A whole first group of the vocabulary at -inf is as if it was not there."""
    monkeypatch.setattr(cpu, "GROUP_BYTES", 4096)  # groups of two rows and more
    x_TH, y_T, *_ = packed(12)
    y_T = torch.where(y_T == -100, y_T, 40 + y_T % 10)
    bias = torch.zeros(V)
    bias[:40] = -math.inf
    outs, grads = [], []
    for w_VH, y, b in ((W_VH, y_T, bias), (W_VH[40:], y_T - 40 * (y_T >= 0), None)):
        out = token_logprobs(x_TH, w_VH, y, bias=b, backend=backend)
        outs.append((out.logp_T, out.lse_T, out.entropy_T))
        for loss in (out.logp_T.sum(), sft_loss(x_TH, w_VH, y, bias=b, backend=backend).loss):
            grads.append(torch.autograd.grad(loss, x_TH)[0])
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(grads[:2], grads[2:])


@pytest.mark.parametrize("path", ["primitive", "fused"])
@pytest.mark.parametrize("m", [math.inf, 1e8])
def test_no_weight_is_no_gradient_whatever_the_log_prob(path, m):
    for grad in gradients("cpu", torch.float32, m, 0.0, path):
        assert torch.equal(grad, torch.zeros_like(grad))


def masked_out(T=12):
    """A target that cannot be: its log-prob is -inf."""
    x_TH, y_T, cu_seqlens, chosen = packed(T, 2)
    y_T[:] = 5
    bias = torch.zeros(V)
    bias[7] = -math.inf
    y_T[-1] = 7  # in the rejected sequence
    return x_TH, y_T, cu_seqlens, chosen, bias


@pytest.mark.parametrize(
    "options", [{"alpha": 0.0}, {"pushed_T": True}, {"alpha": 0.0, "floor": 1}]
)
def test_weight_0_adds_0(options):
    x_TH, y_T, cu_seqlens, chosen, bias = masked_out()
    if "pushed_T" in options:
        pushed_T = torch.ones(len(y_T), dtype=torch.bool)
        pushed_T[-1] = False
        options = {"pushed_T": pushed_T}
    if "floor" in options:
        options = {"alpha": 0.0, "rejected_floor": -3.0}
    out = redi_loss(x_TH, W_VH, y_T, cu_seqlens, chosen, bias=bias, **options)
    assert out.loss.isfinite()
    assert torch.autograd.grad(out.loss, x_TH)[0].isfinite().all()


def test_a_pair_whose_rejected_trace_cannot_be_has_the_margin_of_its_sums():
    x_TH, y_T, cu_seqlens, chosen, bias = masked_out()
    out = dpo_loss(x_TH, W_VH, y_T, cu_seqlens, chosen, torch.zeros(2), bias=bias)
    assert out.margins[0] == math.inf and out.loss == 0
    out = simpo_loss(x_TH, W_VH, y_T, cu_seqlens, ~chosen, bias=bias)
    assert out.margins[0] == -math.inf and out.loss == math.inf


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("T", [12, 24], ids=["one pair", "two"])
def test_a_beta_of_0_compares_nothing(T, backend):
    """Whatever the log-probs."""
    x_TH, y_T, cu_seqlens, chosen = packed(T, T // 6)
    bias = torch.zeros(V)
    bias[7] = -math.inf
    y_T[y_T == 7] = 8
    y_T[-1] = 7
    args = x_TH, W_VH, y_T, cu_seqlens, chosen
    options = {"beta": 0.0, "bias": bias, "backend": backend}
    out = dpo_loss(*args, torch.zeros(len(chosen)), **options)
    assert out.loss.item() == pytest.approx(math.log(2)) and not out.margins.any()
    assert not torch.autograd.grad(out.loss, x_TH)[0].any()
    out = simpo_loss(*args, gamma=1.0, **options)
    assert (out.margins == -1).all()
    assert not torch.autograd.grad(out.loss, x_TH)[0].any()


def test_a_reference_that_rules_a_trace_out():
    x_TH, y_T, cu_seqlens, chosen = packed(12, 2)
    ref_S = torch.tensor([0.0, -math.inf])
    assert dpo_loss(x_TH, W_VH, y_T, cu_seqlens, chosen, ref_S).margins[0] == -math.inf
    assert dpo_loss(x_TH, W_VH, y_T, cu_seqlens, chosen, ref_S, beta=0.0).margins[0] == 0


def test_nothing_to_count_is_0():
    x_TH, y_T, *_ = packed(9)
    out = sft_loss(x_TH, W_VH, torch.full_like(y_T, -100), num_tokens=torch.tensor(0))
    assert out.loss == 0
    assert not torch.autograd.grad(out.loss, x_TH)[0].any()


NO_NUMBERS = [math.nan, math.inf, True, "1", torch.tensor(2.0)]
NO_NUMBERS += [torch.nn.Parameter(torch.tensor(2.0))]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
@pytest.mark.parametrize("name", ["logit_scale", "softcap", "alpha", "beta", "gamma", "floor"])
def test_what_is_no_number_is_refused(name, value):
    """A learnable one would get no gradient, in silence."""
    x_TH, y_T, cu_seqlens, chosen = packed(12, 2)
    every = (x_TH, W_VH, y_T, cu_seqlens, chosen)
    calls = {
        "logit_scale": lambda: token_logprobs(x_TH, W_VH, y_T, logit_scale=value),
        "softcap": lambda: sft_loss(x_TH, W_VH, y_T, softcap=value),
        "alpha": lambda: redi_loss(*every, alpha=value),
        "beta": lambda: dpo_loss(*every, torch.zeros(2), beta=value),
        "gamma": lambda: simpo_loss(*every, gamma=value),
        "floor": lambda: redi_loss(*every, rejected_floor=value),
    }
    said = f"{name}.* is a tensor" if isinstance(value, torch.Tensor) else name
    with pytest.raises((TypeError, ValueError), match=said):
        calls[name]()
    if name in ("logit_scale", "softcap"):
        with pytest.raises((TypeError, ValueError), match=name):
            LossHead(torch.nn.Parameter(W_VH.detach()), **{name: value})
