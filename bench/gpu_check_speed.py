"""Times and memory: losses beside their peers, each kernel beside cuBLAS, fast mode, slabs."""

import contextlib
import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import loss_peers
import torch
import triton
from gpu_check_problem import DEVICE, PATHS, REHEARSAL, is_alive, median, problem, timed
from gpu_check_rows import CannotRun, Row, Values
from gradcheck_tools import text
from redi_kernels import sft_loss, token_logprobs
from redi_kernels.triton import config as configs
from torch import Tensor

BF16 = torch.bfloat16
Shape = tuple[int, int, int]
SHAPES = [(8192, 1536, 151936), (32768, 1536, 151936), (8192, 4096, 128256)]
if REHEARSAL:
    SHAPES = [(128, 64, 512)]
ROUNDS = 10
SLABS = (172, 820, 1200)  # MB; 820: 2816 tokens at Qwen2.5-1.5B's vocabulary


def fused(x_TH: Tensor, w_VH: Tensor, y_T: Tensor) -> Tensor:
    return sft_loss(x_TH, w_VH, y_T, backend="triton").loss


def primitive(x_TH: Tensor, w_VH: Tensor, y_T: Tensor) -> Tensor:
    return -token_logprobs(x_TH, w_VH, y_T, backend="triton").logp_T.mean()


OURS = {"fused": fused, "primitive": primitive}
METHODS = {  # name -> (how to get it, its matmuls in units of 2 T V H FLOP; None: not known)
    "ours, fused": (lambda: fused, 3),
    "ours, primitive": (lambda: primitive, 4),
    "torch, all logits": (loss_peers.naive, 3),
    "torch, linear_cross_entropy": (loss_peers.torch_chunked("compact"), 3),
    "CCE": (loss_peers.cce_triton, None),
    "Liger": (loss_peers.liger, 3),
    "TRL, chunked": (loss_peers.trl, 4),
}


def rows(part: str, rehearse: bool) -> list[Row]:
    if part == "speed":
        return [
            Row(f"{name}, {shape}", functools.partial(speed, shape, *method), 2 + big(shape),
                counts=name.startswith("ours"))
            for shape in SHAPES for name, method in METHODS.items()
        ]  # fmt: skip
    if part == "kernels":
        return [Row(f"{path}, {shape}", functools.partial(kernels, path, shape), 3 + big(shape))
                for shape in SHAPES for path in PATHS]  # fmt: skip
    if part == "fast":
        return [
            Row(f"{what}, {shape}", functools.partial(fast_mode, what, shape), 4 + 2 * big(shape))
            for shape in SHAPES for what in ("likely targets", "random")
        ]  # fmt: skip
    return [Row(f"{megabytes} MB, {shape}", functools.partial(slab, megabytes, shape),
                2 + big(shape), counts=False)
            for shape in SHAPES for megabytes in SLABS]  # fmt: skip


def big(shape: Shape) -> float:
    """Seconds that 13 rounds of 4 U take at 300 TFLOP/s."""
    T, H, V = shape
    return 13 * 4 * 2 * T * H * V / 3e14


def leaves(shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    p = problem(shape, BF16)
    return p.x_TH.requires_grad_(), p.w_VH.requires_grad_(), p.y_T


@functools.cache
def matmul_ms(M: int, N: int, K: int, layout: str) -> float:
    """cuBLAS for [M, K] @ [K, N] in bf16; "t": that operand lies transposed ("nt": x @ w.T)."""
    a = torch.randn(K, M, device=DEVICE, dtype=BF16).T if layout[0] == "t" else \
        torch.randn(M, K, device=DEVICE, dtype=BF16)  # fmt: skip
    b = torch.randn(N, K, device=DEVICE, dtype=BF16).T if layout[1] == "t" else \
        torch.randn(K, N, device=DEVICE, dtype=BF16)  # fmt: skip
    out = torch.empty(M, N, device=DEVICE, dtype=BF16)
    return median(lambda: torch.mm(a, b, out=out), 20)


def logits_ms(shape: Shape) -> float:
    """cuBLAS's time for the logits matmul, in chunks of 4096 tokens: one U."""
    T, H, V = shape
    chunk = min(T, 4096)
    return matmul_ms(chunk, V, H, "nt") * T / chunk


# ------------------------------------------------------------------------------------ whole losses


def speed(shape: Shape, make: Callable[[], Callable], units: int | None) -> tuple[Values, bool]:
    try:
        loss = make()
    except (ImportError, AttributeError, RuntimeError) as error:  # as loss_peers says it
        raise CannotRun(str(error).splitlines()[0].removeprefix("needs ")) from None
    return measure(loss, shape, units), True


def measure(loss: Callable, shape: Shape, units: int | None) -> dict[str, Any]:
    x_TH, w_VH, y_T = leaves(shape)

    def step() -> None:
        x_TH.grad = w_VH.grad = None
        loss(x_TH, w_VH, y_T).backward()

    step()
    extra = 0.0
    if not REHEARSAL:
        x_TH.grad = w_VH.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        torch.cuda.synchronize()
        results = 2 * (x_TH.numel() + w_VH.numel())
        extra = (torch.cuda.max_memory_allocated() - before - results) / 1e9
    times = timed(step, ROUNDS)
    at = lambda q: times[min(int(q * len(times)), len(times) - 1)]
    unit = logits_ms(shape)
    middle = statistics.median(times)
    share = f"{units * unit / middle:.0%} of {units} U" if units else ""
    return {
        "ms": middle, "20%": at(0.2), "80%": at(0.8), "GB": extra,
        "times cuBLAS's logits": middle / unit, "share": share,
    }  # fmt: skip


def slab(megabytes: int, shape: Shape) -> tuple[Values, bool]:
    """The fused path with another room for d(logits) than its own choice."""
    select = configs.select
    configs.select = lambda *args: replace(select(*args), slab_bytes=megabytes << 20)
    try:
        return measure(fused, shape, 3), True
    finally:
        configs.select = select


# ------------------------------------------------------------------------------------- each kernel


@contextlib.contextmanager
def launches() -> Iterator[list[tuple[str, Any, Any]]]:
    """(kernel and the flags that are on, event before, event after) of every Triton launch."""
    if REHEARSAL:
        from triton.runtime.interpreter import InterpretedFunction as Kernel
    else:
        from triton.runtime.jit import JITFunction as Kernel
    found: list[tuple[str, Any, Any]] = []
    run = Kernel.run

    def timed_run(self, *args, grid, warmup, **kwargs):
        before = mark()
        result = run(self, *args, grid=grid, warmup=warmup, **kwargs)
        found.append((label(self.__name__, kwargs), before, mark()))
        return result

    Kernel.run = timed_run
    try:
        yield found
    finally:
        Kernel.run = run


def mark() -> Any:
    if REHEARSAL:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before: Any, after: Any) -> float:
    return 1e3 * (after - before) if REHEARSAL else before.elapsed_time(after)


def label(name: str, kwargs: dict[str, Any]) -> str:
    hidden = {"FLATTEN", "EVEN_H", "EVEN_N", "TMA", "HAS_BIAS", "HAS_SOFTCAP", "HAS_SCALE"}
    on = sorted(k.lower() for k, v in kwargs.items() if v is True and k not in hidden)
    return " ".join([name.removesuffix("_kernel"), *on])


def kernels(path: str, shape: Shape) -> tuple[Values, bool]:
    """One line a kernel: its time in one forward and backward, and cuBLAS's for the same matmul."""
    x_TH, w_VH, y_T = leaves(shape)
    call = lambda: torch.autograd.grad(OURS[path](x_TH, w_VH, y_T), [x_TH, w_VH])
    call(), call()
    sums: dict[str, list[float]] = defaultdict(list)
    counts: dict[str, int] = {}
    for _ in range(1 if REHEARSAL else 3):
        with launches() as found:
            call()
        if not REHEARSAL:
            torch.cuda.synchronize()
        once: dict[str, list[float]] = defaultdict(list)
        for name, before, after in found:
            once[name].append(between(before, after))
        for name, times in once.items():
            sums[name].append(sum(times))
            counts[name] = len(times)
    lines = []
    for name, totals in sums.items():
        ms, peer = statistics.median(totals), cublas(name, path, shape, counts[name])
        share = f"{peer / ms:.0%}" if peer else ""
        lines.append({"kernel": name, "launches": counts[name], "ms": ms,
                      "cuBLAS ms": peer or "", "share": share})  # fmt: skip
    return lines, True


def cublas(name: str, path: str, shape: Shape, launched: int) -> float | None:
    """Its time for all of a kernel's launches; None for what is no matmul, or works on a part that
    only the device knows. The fused path cuts the tokens, the primitive's backward the columns."""
    T, H, V = shape
    kind, *flags = name.split()
    if kind not in ("logits", "matmul") or {"has_active", "listed"} & set(flags):
        return None
    cut = lambda size: triton.cdiv(size, launched)
    T, V = (cut(T), V) if path == "fused" else (T, cut(V))
    if kind == "logits":
        return launched * matmul_ms(T, V, H, "nt")
    if "transposed" in flags:
        return launched * matmul_ms(V, H, T, "tn")
    return launched * matmul_ms(T, H, V, "nn")


# --------------------------------------------------------------------------------------- fast mode


def fast_mode(what: str, shape: Shape) -> tuple[Values, bool]:
    """Exact and fast mode on text that leaves something out, and on text that does not."""
    T, H, V = shape
    x_TH, w_VH, y_T = leaves(shape)
    if what == "likely targets":  # in 96 of the hidden dimensions; time does not depend on it
        made = text(BF16, T, V, min(H, 96))
        with torch.no_grad():
            for whole, part in ((x_TH, made.x_TH), (w_VH, made.w_VH)):
                whole.zero_()[:, : part.shape[1]].copy_(part)
        y_T = made.y_T.to(DEVICE).clamp(min=0)

    def step(tolerance: float):
        out = sft_loss(x_TH, w_VH, y_T, backend="triton", tolerance=tolerance)
        return torch.autograd.grad(out.loss, (x_TH, w_VH)), out.fast

    exact, _ = step(0.0)
    grads, report = step(2.0)
    off = [relative(g, e) for g, e in zip(grads, exact, strict=True)]
    values = {"f": report.active.item(), "stated": report.error.item(), "dX": off[0], "dW": off[1]}
    del grads, exact
    values["exact ms"] = median(lambda: step(0.0), ROUNDS)
    values["fast ms"] = median(lambda: step(2.0), ROUNDS)
    # both modes round to bf16: that much they may differ by where nothing is left out
    return values, off[0] <= values["stated"] + 6e-3


def relative(got: Tensor, want: Tensor) -> float:
    """RMS of the difference over RMS, in blocks: an fp64 copy of a head is gigabytes."""
    total = norm = 0.0
    for g, w in zip(got.split(8192), want.split(8192), strict=True):
        total += (g.double() - w.double()).square().sum().item()
        norm += w.double().square().sum().item()
    return (total / norm) ** 0.5


__all__ = ["is_alive", "rows"]
