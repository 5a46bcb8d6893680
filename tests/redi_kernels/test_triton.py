"""The Triton kernels on CPU: their tests run in the interpreter, in a process of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from redi_kernels import token_logprobs
from redi_kernels.logprobs import weighted_logprobs

ROOT = Path(__file__).parents[2]


@pytest.mark.linux
def test_interpreted_kernels():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "tests/triton_interpreted"],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    passed = re.search(r"(\d+) passed", result.stdout)
    assert passed and int(passed[1]) >= 90, result.stdout[-2000:]
    assert "skipped" not in result.stdout


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
