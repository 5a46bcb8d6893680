"""The checker finds planted bugs; our kernels come out clean, in any program order."""

import dataclasses

import pytest
import torch
import triton
import triton.language as tl
from races import OutOfBounds, Race, checked
from redi_kernels import triton as kernels
from redi_kernels.head import Head
from redi_kernels.triton import config as configs


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr, MASK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=(i < n) | (MASK != "both"))
    tl.store(y_ptr + i, x, mask=(i < n) | (MASK == "none"))


@triton.jit
def same_place_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y_ptr + i, tl.load(x_ptr + i) + tl.program_id(0))


@triton.jit
def neighbour_kernel(x_ptr, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    program = tl.program_id(0)
    x = tl.load(x_ptr + (program + 1) % 4 * BLOCK + i)
    tl.store(x_ptr + program * BLOCK + i, x)


@triton.jit
def sum_kernel(x_ptr, total_ptr, BLOCK: tl.constexpr, PEEK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.atomic_add(total_ptr, tl.sum(tl.load(x_ptr + i), 0))
    if PEEK:
        tl.store(x_ptr + i, tl.load(total_ptr) + tl.zeros((BLOCK,), tl.float32))


def test_planted_bugs_are_found():
    x, y = torch.randn(50), torch.zeros(50)
    whole = torch.zeros(100)  # a view's neighbours in its storage are out of bounds too
    with checked():
        copy_kernel[(4,)](x, y, 50, BLOCK=16, MASK="both")
        sum_kernel[(4,)](torch.ones(64), torch.zeros(1), BLOCK=16, PEEK=False)
    with pytest.raises(OutOfBounds, match=r"loads 14 elements .* of x_ptr"), checked():
        copy_kernel[(4,)](x, torch.zeros(64), 50, BLOCK=16, MASK="store")
    with pytest.raises(OutOfBounds, match="stores"), checked():
        copy_kernel[(4,)](torch.randn(64), whole[:50], 50, BLOCK=16, MASK="none")
    with pytest.raises(Race, match="store the same address"), checked():
        same_place_kernel[(4,)](x, y, BLOCK=16)
    with pytest.raises(Race, match=r"program \d loads what program \d stores"), checked():
        neighbour_kernel[(4,)](torch.zeros(64), BLOCK=16)
    with pytest.raises(Race, match=r"loads what program \d updates"), checked():
        sum_kernel[(4,)](torch.ones(64), torch.zeros(1), BLOCK=16, PEEK=True)


@pytest.mark.parametrize(
    ("dtype", "tma"), [(torch.bfloat16, True), (torch.float32, False)], ids=["tma", "pointers"]
)
def test_our_kernels_are_clean(monkeypatch, dtype, tma):
    config = dataclasses.replace(configs.INTERPRETER, tma=tma)
    monkeypatch.setattr(configs, "select", lambda *_: config)
    random = torch.Generator().manual_seed(0)
    T, H, V = 100, 40, 200
    x_TH = torch.randn(T, H, generator=random).to(dtype)
    w_VH = torch.randn(V, H, generator=random).to(dtype)
    y_T, v_T = torch.randint(0, V, (T,), generator=random), torch.randn(T, generator=random)
    bias = torch.randn(V, generator=random).to(dtype)
    bias[5] = -90.0
    y_T[70] = 5  # the second launch of the fused path has a block to redo
    head, needs = Head(bias, 200.0, 0.5), (True, True, True)

    results = []
    for order in (None, "shuffled"):
        with checked(order):
            logp_T, lse_T, *rest = kernels.forward(x_TH, w_VH, y_T, head)
            grads = kernels.backward(x_TH, w_VH, y_T, logp_T, lse_T, v_T, v_T, head, needs)
            fused = kernels.weighted(x_TH, w_VH, y_T, v_T, head, needs)
            results.append([logp_T, lse_T, *rest, *grads, *fused])
            for tolerance in (1e-3, 200.0):  # all rows, and a list of some
                *fast, report = kernels.gradients(
                    x_TH, w_VH, y_T, v_T, v_T / 2, head, needs, tolerance
                )
                results[-1] += [*fast, report.dropped_N]
                assert (report.active == 1) == (tolerance < 1)
    for in_order, shuffled in zip(*results, strict=True):
        assert torch.equal(in_order, shuffled)
