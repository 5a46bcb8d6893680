"""The Triton kernels on a GPU; on the CPU, tests/triton_interpreted runs them."""

import pytest
import torch
from redi_kernels import token_logprobs
from redi_kernels.logprobs import weighted_logprobs


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", [(1, 64, 1000), (300, 72, 5003), (1000, 576, 49152)], ids=str)
def test_on_a_gpu(shape, dtype):
    """Compiled, not interpreted; `make gpu-check` does more."""
    T, H, V = shape
    x_TH = torch.randn(T, H, device="cuda").to(dtype)
    w_VH = (3 * H**-0.5 * torch.randn(V, H, device="cuda")).to(dtype)
    y_T, weight_T = torch.randint(0, V, (T,), device="cuda"), torch.randn(T, device="cuda")
    results = []
    for backend, wide in (("triton", dtype), ("reference", torch.float64)):
        leaves = [t.to(wide, copy=True).requires_grad_() for t in (x_TH, w_VH)]
        out = token_logprobs(*leaves, y_T, backend=backend)
        (out.logp_T * weight_T).sum().backward()
        fused = [t.to(wide, copy=True).requires_grad_() for t in (x_TH, w_VH)]
        weighted_logprobs(*fused, y_T, weight_T, None, backend=backend)[0].backward()
        results.append([out.logp_T.detach(), *(leaf.grad for leaf in (*leaves, *fused))])
    assert (results[0][0] <= 0).all()
    tolerance = 5e-3 if dtype == torch.bfloat16 else 1e-5
    for found, truth in zip(*results, strict=True):
        assert (found.double() - truth).norm() < tolerance * truth.norm()
