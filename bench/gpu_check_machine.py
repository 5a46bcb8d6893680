"""What is measured on, the kernels compiled ahead, and the GPU tests of the suite."""

import dataclasses
import os
import platform
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path

import torch
import triton
from gpu_check_problem import DTYPES, REHEARSAL, is_alive
from gpu_check_rows import ROOT, CannotRun, Row, Values, environment

# (dtype, T, H, V, with bias, cap and scale) of the checks that run first; V, and T where it is
# large, only alike in what a kernel is specialised on: divisible by 16, 1, or neither.
AHEAD = [
    ("bf16", 2048, 1536, 8192, False), ("bf16", 2048, 4096, 8192, False),
    ("bf16", 1000, 576, 8192, False), ("bf16", 1000, 576, 8192, True),
    *((dtype, T, H, 5003, full) for dtype in DTYPES for full in (False, True)
      for T, H in ((4100, 1536), (1000, 72))),
    *((dtype, 1, 64, 1000, full) for dtype in DTYPES for full in (False, True)),
]  # fmt: skip


def rows(part: str, rehearse: bool) -> list[Row]:
    if part == "machine":
        return [Row("torch, triton and the GPU", machine)]
    if part == "compile":
        return [Row("on all cores at once", compile_ahead, seconds=25.0, counts=False)]
    return [Row("pytest -m gpu", gpu_tests, seconds=45.0)]


def machine() -> tuple[Values, bool]:
    found = {"torch": torch.__version__, "triton": triton.__version__}
    found |= {"python": platform.python_version(), "cores": len(os.sched_getaffinity(0))}
    if REHEARSAL:
        return found | {"device": "none: a rehearsal in the interpreter"}, True
    if not torch.cuda.is_available():
        raise RuntimeError("no GPU here; --rehearse tries the script itself in the interpreter")
    properties = torch.cuda.get_device_properties(0)
    found |= {"device": properties.name, "sm": f"{properties.major}{properties.minor}"}
    found |= {"sms": properties.multi_processor_count, "cuda": str(torch.version.cuda)}
    return found | {"GB": properties.total_memory / 1e9, "gpus": torch.cuda.device_count()}, True


def compile_ahead(arch: str = "") -> tuple[Values, bool]:
    """Fills Triton's cache from processes that compile and never launch (bench/aot.py's way): what
    the other parts' processes would otherwise compile one after the other."""
    if REHEARSAL:
        raise CannotRun("a GPU; the interpreter compiles nothing")
    arch = arch or "{}{}".format(*torch.cuda.get_device_capability())
    start, jobs = time.perf_counter(), []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for dtype, *sizes in AHEAD:
            command = [sys.executable, str(Path(__file__).resolve()), arch, dtype]
            jobs.append(pool.submit(output_of, [*command, *(str(int(n)) for n in sizes)]))
    found = [job.result() for job in jobs]
    values = {"kernels": sum(int(out.split()[-1]) for out in found if out.strip()),
              "processes that failed": sum(not out.strip() for out in found),
              "seconds": time.perf_counter() - start}  # fmt: skip
    return values, not values["processes that failed"]


def output_of(command: list[str]) -> str:
    """Empty where it fails or takes too long."""
    own = environment(CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    try:
        return subprocess.run(
            command, env=own, stdout=subprocess.PIPE, text=True, timeout=90
        ).stdout
    except subprocess.TimeoutExpired:
        return ""


def compile_one(arch: str, dtype: str, T: int, H: int, V: int, full: bool) -> int:
    """Compiles all that the backend's functions launch on such tensors; how many kernels."""
    import aot
    from redi_kernels import triton as backend
    from redi_kernels.head import Head
    from redi_kernels.triton import config as configs
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    triton.runtime.driver.set_active(aot.Driver(GPUTarget("cuda", int(arch), 32)))
    run, seen = JITFunction.run, set()

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen.add(kernel.hash)
        return kernel

    JITFunction.run = compile_only
    small = (T // 3 + 1) * V * 2  # several chunks of tokens, as the real sizes have
    configs.select = lambda _, dtype: dataclasses.replace(
        configs.for_target("cuda", int(arch), dtype), slab_bytes=small
    )
    kind = DTYPES[dtype]
    zeros = lambda *size: torch.zeros(*size, dtype=kind)
    x_TH, w_VH, y_T, v_T = zeros(T, H), zeros(V, H), torch.zeros(T, dtype=torch.long), torch.ones(T)
    head = Head(zeros(V), 20.0, 0.7) if full else Head()
    needs = (True, True, full)
    logp_T, lse_T, *_ = backend.forward(x_TH, w_VH, y_T, head)
    backend.backward(x_TH, w_VH, y_T, logp_T, lse_T, v_T, v_T, head, needs)
    backend.weighted(x_TH, w_VH, y_T, v_T, head, needs)
    if kind == torch.bfloat16 and not full:
        backend.gradients(x_TH, w_VH, y_T, v_T, v_T, head, needs, 2.0)
    return len(seen)


def gpu_tests() -> tuple[Values, bool]:
    """Those files alone that have such a test: the others may need what is not installed."""
    if find_spec("pytest") is None:
        raise CannotRun("pytest")
    files = [f for f in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in f.read_text()]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *map(str, files)], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    last = (done.stdout.strip() or done.stderr.strip() or "no output").splitlines()[-1]
    if done.returncode:
        print(done.stdout[-4000:], done.stderr[-2000:], file=sys.stderr)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", last)}
    return counts or {"said": last[:200]}, done.returncode == 0


__all__ = ["is_alive", "rows"]

if __name__ == "__main__":
    print(compile_one(*sys.argv[1:3], *map(int, sys.argv[3:6]), full=sys.argv[6] == "1"))
