"""pytest-benchmark suites of the loss, ours and peers', speed and memory.

    pytest bench -k "memory and redi" --benchmark-json FILE

The device is a GPU where there is one, else the CPU; peers that are not installed are skipped.
`loss_table.py` is the careful comparison on real states; these are for regressions. `peak_mib` in
the JSON is memory beyond the inputs; on a CPU beyond the gradients too, of a fresh process.
"""

from collections.abc import Callable

import pytest
import torch
from loss_peers import IMPLEMENTATIONS
from loss_table import peak_mib

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
T, H, V = (16_384, 1536, 151_936) if ON_GPU else (1024, 128, 16_384)
DTYPES = [torch.bfloat16] if ON_GPU else [torch.float32, torch.bfloat16]


each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
each_implementation = pytest.mark.parametrize("name", IMPLEMENTATIONS)


@each_dtype
@each_implementation
def test_speed(benchmark, name: str, dtype: torch.dtype) -> None:
    step = forward_and_backward(name, dtype)
    benchmark.extra_info["shape"] = f"T={T} H={H} V={V} {dtype} {DEVICE}"
    benchmark.pedantic(step, rounds=5, warmup_rounds=1)


@each_dtype
@each_implementation
def test_memory(benchmark, name: str, dtype: torch.dtype) -> None:
    step = forward_and_backward(name, dtype)  # skips what cannot run

    def measure() -> float | None:
        if not ON_GPU:
            short = str(dtype).removeprefix("torch.")
            return peak_mib(name, T, short, ["--vocab", str(V)])
        step()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return (torch.cuda.max_memory_allocated() - held) / 2**20

    peak = benchmark.pedantic(measure, rounds=1)
    assert peak is not None
    benchmark.extra_info["peak_mib"] = peak
    if "redi_kernels" in name:
        assert peak < (400 if ON_GPU else 64)


def forward_and_backward(name: str, dtype: torch.dtype) -> Callable[[], None]:
    """One step of an implementation on random states, which fills the gradients."""
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

    return step
