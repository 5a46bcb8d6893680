"""pytest-benchmark suite of the loss, ours and peers': `make bench`, or `pytest bench -k fused`.

The device is a GPU where there is one, else the CPU; peers that are not installed are skipped.
`loss_table.py` is the careful comparison on real states; this one is for regressions. `peak_mib` in
the JSON is the memory allocated beyond the inputs (CUDA only).
"""

import pytest
import torch
from loss_peers import IMPLEMENTATIONS

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
T, H, V = (16_384, 1536, 151_936) if ON_GPU else (1024, 128, 16_384)
DTYPES = [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_forward_and_backward(benchmark, name: str, dtype: torch.dtype) -> None:
    try:
        loss = IMPLEMENTATIONS[name].make()
    except (ImportError, RuntimeError, AttributeError) as error:
        pytest.skip(f"{name}: {error}")
    generator = torch.Generator(DEVICE).manual_seed(0)
    new = {"device": DEVICE, "dtype": dtype, "generator": generator}
    x_TH = torch.randn(T, H, **new).requires_grad_()
    w_VH = (torch.randn(V, H, **new) / H**0.5).requires_grad_()
    y_T = torch.randint(V, (T,), device=DEVICE, generator=generator)

    def step() -> None:
        x_TH.grad = w_VH.grad = None
        loss(x_TH, w_VH, y_T).backward()
        if ON_GPU:
            torch.cuda.synchronize()

    if ON_GPU:
        step()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        benchmark.extra_info["peak_mib"] = (torch.cuda.max_memory_allocated() - held) / 2**20
    benchmark.extra_info["shape"] = f"T={T} H={H} V={V} {dtype} {DEVICE}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
