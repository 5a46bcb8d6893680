"""torch.compile, autocast, fake tensors, double backward, DTensor and FSDP2."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gradcheck_tools import text
from redi_kernels import (
    LossHead,
    dpo_loss,
    redi_loss,
    sequence_logprobs,
    sft_loss,
    simpo_loss,
    token_logprobs,
)
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_flatten, tree_unflatten

T, V, H = 96, 37, 16
CU = torch.arange(0, T + 1, 12, dtype=torch.int32)
IS_CHOSEN = torch.arange(8) % 2 == 0


def leaves(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = (T, H), (V, H), (V,)
    made = (torch.randn(s, generator=g).to(dtype).requires_grad_() for s in shapes)
    y_T = torch.randint(V, (T,), generator=g)
    y_T[:20] = -100
    return *made, y_T


def redi(x_TH: Tensor, w_VH: Tensor, bias: Tensor, y_T: Tensor) -> Tensor:
    return redi_loss(2 * x_TH, w_VH, y_T, CU, IS_CHOSEN, bias=bias, softcap=6.0).loss


def sft(x_TH: Tensor, w_VH: Tensor, bias: Tensor, y_T: Tensor) -> Tensor:
    return sft_loss(2 * x_TH, w_VH, y_T, bias=bias).loss


def z_loss(x_TH: Tensor, w_VH: Tensor, bias: Tensor, y_T: Tensor) -> Tensor:
    out = token_logprobs(2 * x_TH, w_VH, y_T, bias=bias)
    return sequence_logprobs(out.logp_T, CU, y_T).mean_S.sum() + (out.lse_T**2).mean()


def pair(x_TH: Tensor, w_VH: Tensor, bias: Tensor, y_T: Tensor) -> Tensor:
    return simpo_loss(2 * x_TH, w_VH, y_T, CU[::4], IS_CHOSEN[:2], bias=bias).loss


def pairs(x_TH: Tensor, w_VH: Tensor, bias: Tensor, y_T: Tensor) -> Tensor:
    reference_S = torch.arange(8.0)
    return dpo_loss(2 * x_TH, w_VH, y_T, CU, IS_CHOSEN, reference_S, bias=bias).loss


@pytest.mark.parametrize("function", [redi, sft, z_loss, pair, pairs])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_equals_eager_bit_for_bit(function, dtype: torch.dtype) -> None:
    """Without the inductor, which needs a C++ compiler: graph capture, fakes and AOT autograd."""
    *params, y_T = leaves(dtype)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    got, want = compiled(*params, y_T), function(*params, y_T)
    assert torch.equal(got, want)
    for a, b in zip(
        torch.autograd.grad(got, params), torch.autograd.grad(want, params), strict=True
    ):
        assert torch.equal(a, b)


@pytest.mark.parametrize("tolerance", [0.0, 2.0])
def test_operators_obey_torch_library(tolerance: float) -> None:
    *params, y_T = leaves()
    x_TH, w_VH, bias = (p.detach() for p in params)
    weight_T = torch.randn(T)
    head = bias, 6.0, 1.0, -100, 76, tolerance, "cpu"
    ops = torch.ops.redi_kernels
    torch.library.opcheck(ops.logprobs, (x_TH, w_VH, y_T, *head))
    torch.library.opcheck(ops.weighted, (x_TH, w_VH, y_T, weight_T, *head, True, True, True))
    torch.library.opcheck(ops.weighted, (x_TH, w_VH, y_T, weight_T, *head, False, True, False))
    torch.library.opcheck(ops.weighted, (x_TH, w_VH, y_T, weight_T, *head, False, False, False))
    per_token = [torch.randn(T) for _ in range(4)]
    torch.library.opcheck(
        ops.logprobs_backward, (x_TH, w_VH, y_T, *per_token, *head, True, False, True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tolerance", [0.0, 1e-9, 8.0])  # exact, asked in vain, fast
def test_gradients_have_the_strides_that_torch_compile_was_told(
    dtype: torch.dtype, tolerance: float
) -> None:
    """Of a head that is a view of its transpose."""
    problem = text(dtype, bias=True)
    x_TH, w_VH, y_T = problem.x_TH, problem.w_VH.T.contiguous().T, problem.y_T
    head = problem.head.bias_V, None, 1.0, -100, None, tolerance, "cpu"
    ops, needs, each = torch.ops.redi_kernels, (True, True, True), [problem.dlogp_T] * 4
    for op, values in ((ops.weighted, each[:1]), (ops.logprobs_backward, each)):
        args = x_TH, w_VH, y_T, *values, *head, *needs
        torch.library.opcheck(op, args, test_utils="test_faketensor")
    grads = ops.weighted(x_TH, w_VH, y_T, each[0], *head, *needs)
    assert tolerance < 8 or 0 < grads[6] < 0.5  # the share of rows computed
    want = ops.weighted(x_TH, w_VH.contiguous(), y_T, each[0], *head, *needs)
    for got, right in zip(grads, want, strict=True):
        torch.testing.assert_close(got, right)


def test_autocast_casts_both_and_keeps_master_gradients() -> None:
    x_TH, w_VH, _, y_T = leaves()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sft_loss(x_TH, w_VH, y_T).loss
        logp_T = token_logprobs(x_TH, w_VH, y_T).logp_T
    low = [t.detach().bfloat16().requires_grad_() for t in (x_TH, w_VH)]
    want = sft_loss(*low, y_T).loss
    assert torch.equal(loss, want) and loss.dtype == logp_T.dtype == torch.float32
    grads = torch.autograd.grad(loss, (x_TH, w_VH))
    for a, b in zip(grads, torch.autograd.grad(want, low), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b.float())


@pytest.mark.parametrize("function", [redi, z_loss])
def test_double_backward_says_what_to_do(function) -> None:
    *params, y_T = leaves()
    with pytest.raises(RuntimeError, match=r"differentiated once.*reference"):
        torch.autograd.grad(function(*params, y_T), params, create_graph=True)


def test_full_scale_shapes_without_memory() -> None:
    """T * V = 2e10 > 2^31: shapes and dtypes of every output, by fake tensors."""
    with FakeTensorMode():
        x_TH = torch.empty(131_072, 1536, dtype=torch.bfloat16, requires_grad=True)
        w_VH = torch.empty(151_936, 1536, dtype=torch.bfloat16, requires_grad=True)
        y_T = torch.empty(131_072, dtype=torch.int64)
        out = token_logprobs(x_TH, w_VH, y_T)
        assert out.logp_T.shape == out.lse_T.shape == (131_072,)
        grads = torch.autograd.grad(out.logp_T.sum(), (x_TH, w_VH))
        assert [g.shape for g in grads] == [x_TH.shape, w_VH.shape]
        loss = sft_loss(x_TH, w_VH, y_T).loss
        grads = torch.autograd.grad(loss, (x_TH, w_VH))
        assert [g.dtype for g in grads] == [torch.bfloat16] * 2


def test_dw_of_more_than_2_31_elements_is_addressed_right() -> None:
    """x and W expanded from one row by strides: 2^31 products of T and V without 2^31 elements."""
    tokens, vocab = 66_000, 32_768
    assert tokens * vocab > 2**31
    x_TH = torch.tensor([[0.5, -0.25]]).expand(tokens, 2)
    w_VH = torch.tensor([[1.0, 2.0]]).expand(vocab, 2)
    y_T = torch.zeros(tokens, dtype=torch.long)
    y_T[: tokens - 300] = -100
    y_T[-1] = vocab - 1
    out = token_logprobs(x_TH, w_VH, y_T)
    want = torch.full((300,), -float(torch.tensor(float(vocab)).log()))
    torch.testing.assert_close(out.logp_T[-300:], want)
    assert not out.logp_T[:-300].any()


def test_loss_head_is_the_plain_call() -> None:
    x_TH, w_VH, bias, y_T = leaves()
    head = LossHead(nn.Parameter(w_VH.detach()), nn.Parameter(bias.detach()), softcap=6.0)
    out = head(redi_loss, 2 * x_TH, y_T, CU, IS_CHOSEN)
    assert torch.equal(out.loss, redi(x_TH, w_VH, bias, y_T))
    out.loss.backward()
    assert head.weight.grad is not None and head.bias.grad is not None
    assert set(dict(head.named_parameters())) == {"weight", "bias"}
    assert "vocab=37, hidden=16" in repr(head)


def test_results_are_pytrees() -> None:
    """Where FSDP2 of torch 2.11 looks for the tensors of LossHead's output."""
    x_TH, w_VH, _, y_T = leaves()
    head = LossHead(nn.Parameter(w_VH.detach()))
    results = [
        head(sft_loss, x_TH, y_T),
        head(redi_loss, x_TH, y_T, CU, IS_CHOSEN),
        head(dpo_loss, x_TH, y_T, CU, IS_CHOSEN, torch.zeros(len(IS_CHOSEN))),
        head(token_logprobs, x_TH, y_T, tolerance=2.0),
        sequence_logprobs(head(token_logprobs, x_TH, y_T).logp_T, CU),
    ]
    for result in results:
        tensors, spec = tree_flatten(result)
        assert any(isinstance(t, torch.Tensor) and t.requires_grad for t in tensors)
        assert not any(dataclasses.is_dataclass(t) for t in tensors)
        again = tree_unflatten(tensors, spec)
        assert type(again) is type(result)
        assert all(a is b for a, b in zip(tree_flatten(again)[0], tensors, strict=True))


def test_fsdp2_shards_the_head_and_gives_the_whole_gradient(tmp_path: Path) -> None:
    """Two gloo processes, each with half of the sequences and half of the weight."""
    script = Path(__file__).parents[1] / "tools" / "fsdp_loss_head.py"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, str(script), str(tmp_path / "rendezvous")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.count("gradient is whole") == 2
