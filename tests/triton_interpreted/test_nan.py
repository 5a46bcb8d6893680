"""What is no number stays none, in every output of every kernel: as dense has it, or more."""

import dataclasses

import pytest
import torch
from redi_kernels import cpu, fast, reference
from redi_kernels import triton as kernels
from redi_kernels.head import Head
from redi_kernels.triton import config as configs
from redi_kernels.triton import launch

T, H, V = 20, 24, 140  # two tiles of the vocabulary
NAN, INF = float("nan"), float("inf")
HEADS = {
    "plain": {},
    "bias": {"bias": True},
    "all": {"bias": True, "softcap": 6.0, "logit_scale": 0.7},
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# what is spoiled, where: a last row is the one that repeats below a tile's end
PLACES = {"x": ("x", (19, 3)), "w": ("w", (139, 3)), "w of a target": ("w", (7, 3)),
          "bias": ("bias", (100,)), "weight": ("weight", (5,))}  # fmt: skip
NAMES = ("logp", "lse", "entropy", "dx", "dw", "db")


def problem(dtype, *, bias=False, **options):
    random = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=random)
    x_TH, w_VH = normal(T, H).to(dtype), (normal(V, H) * 0.4).to(dtype)
    y_T = torch.randint(0, V, (T,), generator=random)
    y_T[4] = 7
    bias_V = normal(V).to(dtype) if bias else None
    return x_TH, w_VH, y_T, normal(T), Head(bias_V, **options)


def all_outputs(backend, x_TH, w_VH, y_T, weight_T, head):
    """By path: what each of a backend's functions returns."""
    needs = (True, True, head.bias_V is not None)
    args, zero_T = (x_TH, w_VH, y_T), torch.zeros_like(weight_T)
    forward = backend.forward(*args, head)
    logp_T, *grads = backend.weighted(*args, weight_T, head, needs)
    found = {
        "primitive": (
            *forward, *backend.backward(*args, *forward[:2], weight_T, zero_T, head, needs)
        ),
        "fused": (logp_T, None, None, None, *grads),
    }  # fmt: skip
    if x_TH.dtype != torch.float16:
        gradients = fast.gradients if backend is cpu else backend.gradients
        for tolerance in (1e-3, 500.0):  # all rows, and some
            logp_T, *grads, report = gradients(*args, weight_T, zero_T, head, needs, tolerance)
            found[f"fast {tolerance}"] = (logp_T, None, None, None, *grads)
            assert report.error.isnan() or forward[0].isfinite().all()
    return found


def dense(x_TH, w_VH, y_T, weight_T, head):
    leaf = lambda t: None if t is None else t.double().requires_grad_()
    x_TH, w_VH, bias_V = leaf(x_TH), leaf(w_VH), leaf(head.bias_V)
    out = reference.token_logprobs(x_TH, w_VH, y_T, dataclasses.replace(head, bias_V=bias_V))
    (out[0] * weight_T).sum().backward()
    grads = (x_TH.grad, w_VH.grad, None if bias_V is None else bias_V.grad)
    return *(o.detach() for o in out), *grads


CASES = [
    (dtype, options, place, value)
    for dtype, options in (("fp32", "plain"), ("fp32", "bias"), ("bf16", "all"), ("fp16", "bias"))
    for place in PLACES
    for value in ((NAN, INF, -INF) if dtype == "fp32" else (NAN,))
    if place != "bias" or options != "plain"
]


@pytest.mark.parametrize(("dtype", "options", "place", "value"), CASES)
def test_no_number_stays_none(monkeypatch, dtype, options, place, value):
    """Wherever dense has NaN in fp64, every path of both backends has it too, or an infinity from
    an infinity. (Not the reverse: an infinite logit's logsumexp is infinite, ours NaN.)"""
    small = dataclasses.replace(configs.INTERPRETER, tma=place == "w")
    monkeypatch.setattr(configs, "select", lambda *_: small)
    monkeypatch.setattr(cpu, "BLOCK_TOKENS", (16, 64))
    x_TH, w_VH, y_T, weight_T, head = problem(DTYPES[dtype], **HEADS[options])
    tensors = {"x": x_TH, "w": w_VH, "bias": head.bias_V, "weight": weight_T}
    name, where = PLACES[place]
    tensors[name][where] = value
    masks = place == "bias" and value == -INF  # a token that is not there
    args = x_TH, w_VH, y_T, weight_T, head
    truth = dense(*args)
    for backend in (kernels, cpu):
        for path, found in all_outputs(backend, *args).items():
            for what, got, true in zip(
                (*NAMES[:3], "correct", *NAMES[3:]), found, truth, strict=True
            ):
                if got is None:
                    continue
                said = f"{backend.__name__} {path} {what}"
                if what == "correct":
                    assert not (got & found[0].isnan() & ~true).any(), said
                    continue
                kept = got.isnan() if value != value else ~got.isfinite()
                assert not (true.isnan() & ~kept).any(), said
                if masks and what != "db":
                    assert got.isfinite().all(), said


def test_a_target_outside_the_vocabulary_is_loud():
    """Callers refuse it first; should one come through, its log-prob is NaN and nothing is read."""
    x_TH, w_VH, y_T, weight_T, head = problem(torch.float32, bias=True)
    outside = torch.tensor([-1, V, V + 70, 2**40, 2**32 + 5])
    y_T[:5] = outside
    logp_T, _, _, correct_T = kernels.forward(x_TH, w_VH, y_T, head)
    fused_T = kernels.weighted(x_TH, w_VH, y_T, weight_T, head, (True, True, True))[0]
    for found_T in (logp_T, fused_T):
        assert found_T[:5].isnan().all() and found_T[5:].isfinite().all()
    assert not correct_T[:5].any()


@pytest.mark.parametrize("value", [NAN, INF], ids=str)
def test_lost_mass_that_is_no_number(value):
    spoiled = launch.Problem(
        torch.zeros(2, 16), torch.zeros(40, 16), torch.zeros(2, dtype=torch.long), None, None, 1.0,
        configs.INTERPRETER,
    )  # fmt: skip
    slab_TV = spoiled.slab(40).zero_()
    listed = launch.Listed(torch.arange(40), torch.tensor(3, dtype=torch.int32))
    lost_T = launch.compact(spoiled, slab_TV, listed, torch.tensor([value, -1.0]))
    assert not lost_T[0].isfinite() and lost_T[1] == 0


@pytest.mark.parametrize("form", ["strided", "expanded"])
@pytest.mark.parametrize("tma", [False, True], ids=["pointers", "tma"])
def test_vectors_may_lie_anywhere(monkeypatch, form, tma):
    """Per token or per column, strided or one number for all: as their contiguous copies."""
    small = dataclasses.replace(configs.INTERPRETER, tma=tma)
    monkeypatch.setattr(configs, "select", lambda *_: small)
    x_TH, w_VH, y_T, weight_T, head = problem(torch.float32, bias=True)
    if form == "strided":
        spread = lambda t: torch.stack([t, t + 1], dim=1)[:, 0]
    else:
        spread = lambda t: t[:1].expand(len(t))
    vectors = [spread(t) for t in (y_T, weight_T, head.bias_V, weight_T.flip(0))]
    results = []
    for y_T, weight_T, bias_V, dlse_T in (vectors, [t.contiguous() for t in vectors]):
        args, head, needs = (x_TH, w_VH, y_T), Head(bias_V), (True, True, True)
        logp_T, lse_T, *rest = kernels.forward(*args, head)
        stats = spread(logp_T.clone()), spread(lse_T.clone())
        results.append([
            logp_T, lse_T, *rest,
            *kernels.backward(*args, *stats, weight_T, dlse_T, head, needs),
            *kernels.weighted(*args, weight_T, head, needs),
            *kernels.gradients(*args, weight_T, dlse_T, head, needs, 200.0)[:4],
        ])  # fmt: skip
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("columns", [9, 12])
def test_padded_rows_that_tma_could_read(monkeypatch, columns):
    """16-byte rows of which only some are used: what is made of them is dense, and is not."""
    small = dataclasses.replace(configs.INTERPRETER, tma=True)
    x_TH, w_VH, y_T, weight_T, head = problem(torch.bfloat16)
    wide = x_TH[:, :16].contiguous(), w_VH[:, :16].contiguous()
    padded = [m[:, :columns] for m in wide]
    needs, results = (True, True, False), []
    for config, (x, w) in ((small, padded), (configs.SM80, [m.contiguous() for m in padded])):
        monkeypatch.setattr(configs, "select", lambda *_, config=config: config)
        results.append([
            *kernels.weighted(x, w, y_T, weight_T, head, needs)[:3],
            *kernels.gradients(x, w, y_T, weight_T, weight_T, head, needs, 200.0)[:3],
        ])  # fmt: skip
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
