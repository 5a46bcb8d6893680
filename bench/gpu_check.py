"""Everything to do on the day there is a GPU, in one command: correctness, memory, speed, roofline.

    python bench/gpu_check.py                   writes docs/gpu.md and docs/gpu.json
    python bench/gpu_check.py --rehearse        tiny, in the interpreter on CPU; writes nothing

Needs torch >= 2.8 and triton >= 3.4, no network. Peers (CCE, Liger, TRL, torch's own) join if they
are installed. The trainer's part is bench/gpu_check_trainer.py. Exit 1 if a gradient is further
from fp64 than a dense implementation allows, or a check of the trainer fails.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REHEARSAL = "--rehearse" in sys.argv
if REHEARSAL and os.environ.get("TRITON_INTERPRET") != "1":  # chosen when triton is imported
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})
sys.path[:0] = [str(ROOT / "kernels"), str(ROOT / "tests/tools"), str(ROOT / "bench")]

import gpu_check_trainer  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from gradcheck_tools import errors, text  # noqa: E402
from redi_kernels import sft_loss, token_logprobs  # noqa: E402
from redi_kernels.logprobs import weighted_logprobs  # noqa: E402
from redi_kernels.triton import config as configs  # noqa: E402

FAST_HEADING = """
## Fast mode

bf16, forward and backward. f: share of d(logits) computed; the error of dX that fast mode states,
and what it and dW are off from exact mode's.

| T, H, V | states | tolerance | f | stated | dX | dW | ms |
|---|---|---|---|---|---|---|---|
"""
DEVICE = "cpu" if REHEARSAL else "cuda"
SHAPES = [(70, 32, 200)] if REHEARSAL else [(1, 64, 1000), (1000, 72, 5003), (4100, 1536, 50257)]
SPEED = [(128, 64, 512)] if REHEARSAL else [(8192, 1536, 151936), (32768, 1536, 151936),
                                            (8192, 4096, 128256)]  # fmt: skip


@dataclass
class Check:
    """RMS errors of one output over those of a dense implementation in the same dtype."""

    shape: tuple[int, int, int]
    dtype: str
    path: str
    ratio: dict[str, float]
    non_positive: bool
    deterministic: bool

    @property
    def passed(self) -> bool:
        good = all(r <= 1.5 for r in self.ratio.values())
        return good and self.non_positive and self.deterministic


@dataclass
class Speed:
    method: str
    shape: tuple[int, int, int]
    milliseconds: float
    low: float  # 20th and 80th percentile
    high: float
    extra_gb: float  # peak memory beyond inputs and gradients
    units: int | None = None  # matmuls of 2 T V H FLOP that the method needs; None: not known


def problem(shape, dtype):
    T, H, V = shape
    random = torch.Generator(DEVICE).manual_seed(0)
    normal = lambda *size: torch.randn(*size, generator=random, device=DEVICE)
    x_TH, w_VH = normal(T, H).to(dtype), (normal(V, H) * 3 * H**-0.5).to(dtype)
    y_T = torch.randint(0, V, (T,), generator=random, device=DEVICE)
    return x_TH, w_VH, y_T, normal(V).to(dtype), normal(T)


def run_path(path: str, backend: str, dtype, x, w, y, bias, weight) -> list[torch.Tensor]:
    """logp and the gradients of a signed sum, by "primitive" or "fused"."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (x, w, bias)]
    options = {"softcap": 20.0, "backend": backend}
    if path == "fused":
        total, logp, _ = weighted_logprobs(*leaves[:2], y, weight, leaves[2], **options)
    else:
        out = token_logprobs(*leaves[:2], y, bias=leaves[2], **options)
        total, logp = (out.logp_T * weight.to(out.logp_T)).sum() + out.lse_T.sum(), out.logp_T
    total.backward()
    return [logp.detach(), *(leaf.grad for leaf in leaves)]


def check(shape, name: str, path: str) -> Check:
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[name]
    tensors = problem(shape, dtype)
    truth = run_path(path, "reference", torch.float64, *tensors)
    dense = run_path(path, "reference", dtype, *tensors)
    ours = run_path(path, "triton", dtype, *tensors)
    again = run_path(path, "triton", dtype, *tensors)
    rms = lambda t: t.double().square().mean().sqrt().item()
    floor = 1e-3 if dtype == torch.bfloat16 else 1e-6
    ratio = {
        key: rms(a - t) / (rms(d - t) + floor * rms(t))
        for key, a, d, t in zip(("logp", "dx", "dw", "db"), ours, dense, truth, strict=True)
    }
    same = all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))
    return Check(shape, name, path, ratio, bool((ours[0] <= 0).all()), same)


def large_slab(x, w, y):
    """The fused path with a slab of 1.2 GB: chunks of 4096 tokens at a vocabulary of 152k."""
    select = configs.select
    configs.select = lambda *args: replace(select(*args), slab_bytes=1200 << 20)
    try:
        return sft_loss(x, w, y, backend="triton").loss
    finally:
        configs.select = select


def methods() -> dict[str, tuple[Callable, int | None]]:
    """Name -> (mean cross entropy of x, w, y; its matmuls in units of 2 T V H FLOP)."""
    import torch.nn.functional as F

    found: dict[str, tuple[Callable, int | None]] = {
        "ours, fused": (lambda x, w, y: sft_loss(x, w, y, backend="triton").loss, 3),
        "ours, fused, 1.2 GB slab": (large_slab, 3),
        "ours, primitive": (
            lambda x, w, y: -token_logprobs(x, w, y, backend="triton").logp_T.mean(),
            4,
        ),
        "torch": (lambda x, w, y: F.cross_entropy((x @ w.T).float(), y), 3),
    }
    if hasattr(F, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions()
        found["torch, chunked"] = (
            lambda x, w, y: F.linear_cross_entropy(x, w, y, options=options),
            3,
        )
    if REHEARSAL:
        return found
    try:
        from cut_cross_entropy import linear_cross_entropy

        found["CCE"] = (linear_cross_entropy, None)
    except ImportError:
        pass
    try:
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        found["Liger"] = (lambda x, w, y: liger(x, w, y), 3)
    except ImportError:
        pass
    try:
        from trl.kernels.chunked_logprob import ChunkedLogProbFunction as chunked

        arguments = (32768, None, 1.0, ())  # columns per chunk, as TRL's trainers pass
        found["TRL chunked"] = (
            lambda x, w, y: -chunked.apply(x, w, None, y, 1.0, *arguments)[0].mean(), 4
        )  # fmt: skip
    except ImportError:
        pass
    return found


def timed(function: Callable[[], None], rounds: int) -> list[float]:
    """Milliseconds of each round, after two to warm up."""
    function(), function()
    times = []
    for _ in range(rounds):
        if DEVICE == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
            start.record()
            function()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        else:
            begin = time.perf_counter()
            function()
            times.append(1e3 * (time.perf_counter() - begin))
    return sorted(times)


def measure(name: str, loss: Callable, units: int | None, shape) -> Speed:
    x, w, y, *_ = problem(shape, torch.bfloat16)
    x.requires_grad_(), w.requires_grad_()

    def step() -> None:
        x.grad = w.grad = None
        loss(x, w, y).backward()

    step()
    extra = 0.0
    if DEVICE == "cuda":
        x.grad = w.grad = None
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        gradients = 2 * (x.numel() + w.numel())
        extra = (torch.cuda.max_memory_allocated() - before - gradients) / 1e9
    times = timed(step, 1 if REHEARSAL else 20)
    at = lambda q: times[min(int(q * len(times)), len(times) - 1)]
    return Speed(name, shape, statistics.median(times), at(0.2), at(0.8), extra, units)


def fast_mode(shape) -> str:
    """Rows of exact and fast mode on text that leaves something out and on text that does not."""
    T, H, V = shape
    lines = []
    for what in ("likely targets", "random"):
        x, w, y, *_ = problem(shape, torch.bfloat16)
        if what == "likely targets":  # in 96 of the hidden dimensions; time does not depend on it
            made = text(torch.bfloat16, T, V, min(H, 96))
            x, w = (t.new_zeros(len(t), H) for t in (x, w))
            x[:, :96], w[:, :96], y = made.x_TH, made.w_VH, made.y_T.to(DEVICE).clamp(min=0)
        x.requires_grad_(), w.requires_grad_()
        exact = None
        for tolerance in (0.0, 2.0):

            def step(tolerance=tolerance, x=x, w=w, y=y):
                out = sft_loss(x, w, y, backend="triton", tolerance=tolerance)
                return *torch.autograd.grad(out.loss, (x, w)), out.fast

            dx, dw, report = step()
            exact = exact or (dx, dw)
            cells = ["1", "", "", ""]
            if report:
                off = [errors(g, e).rms for g, e in zip((dx, dw), exact, strict=True)]
                values = (report.active, report.error, *off)
                cells = [f"{float(value):.2g}" for value in values]
            ms = statistics.median(timed(step, 1 if REHEARSAL else 20))
            lines.append(f"| {shape} | {what} | {tolerance:g} | {' | '.join(cells)} | {ms:.2f} |")
    return "\n".join(lines) + "\n"


def matmul_rate(shape) -> float:
    """FLOP/s of the bare logits matmul in cuBLAS, in token chunks of 4096: the roofline's roof."""
    x, w, *_ = problem(shape, torch.bfloat16)
    T, H, V = shape
    chunk = min(T, 4096)
    out = torch.empty(chunk, V, dtype=x.dtype, device=DEVICE)
    times = timed(lambda: torch.mm(x[:chunk], w.T, out=out), 3 if REHEARSAL else 30)
    return 2 * chunk * V * H / (statistics.median(times) * 1e-3)


def machine() -> dict[str, str]:
    found = {"torch": torch.__version__, "triton": triton.__version__}
    if DEVICE == "cuda":
        properties = torch.cuda.get_device_properties(0)
        found |= {"device": properties.name, "sm": f"{properties.major}{properties.minor}"}
        found |= {"sms": str(properties.multi_processor_count), "cuda": str(torch.version.cuda)}
    return found


def markdown(checks: list[Check], speeds: list[Speed], rates: dict) -> str:
    about = ", ".join(f"{k} {v}" for k, v in machine().items())
    lines = [f"<!-- made by bench/gpu_check.py -->\n# On a GPU\n\n{about}\n\n## Correctness\n"]
    lines += [
        "RMS error against fp64, over that of a dense implementation in the same dtype (plus 1e-3 "
        "or, in fp32, 1e-6 of the value's RMS); at most 1.5.\n",
        "| T, H, V | dtype | path | logp | dX | dW | db | logp <= 0 | same bits twice |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in checks:
        ratios = " | ".join(f"{r:.2f}" for r in c.ratio.values())
        flags = f"{c.non_positive} | {c.deterministic}"
        lines.append(f"| {c.shape} | {c.dtype} | {c.path} | {ratios} | {flags} |")
    lines.append(
        "\n## Speed and memory\n\nbf16, forward and backward, median (20th to 80th percentile). "
        "Memory beyond inputs and gradients. Share: time of the method's own matmuls at the rate "
        "of the bare logits matmul, over its time.\n"
    )
    for shape, rate in rates.items():
        T, H, V = shape
        lines.append(f"\nT = {T}, H = {H}, V = {V}; logits matmul at {rate / 1e12:.0f} TFLOP/s\n")
        lines.append(
            "| method | ms | 20-80% | extra GB | share of roofline |\n|---|---|---|---|---|"
        )
        for s in speeds:
            if s.shape != shape:
                continue
            floor = 1e3 * (s.units or 0) * 2 * T * V * H / rate
            share = f"{floor / s.milliseconds:.0%} of {s.units} U" if s.units else ""
            lines.append(
                f"| {s.method} | {s.milliseconds:.2f} | {s.low:.2f}-{s.high:.2f} "
                f"| {s.extra_gb:.2f} | {share} |"
            )
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "docs")
    args = parser.parse_args()
    if REHEARSAL:
        import interpreter

        interpreter.install()
    elif not torch.cuda.is_available():
        print("no GPU here; `--rehearse` tries the script itself in the interpreter")
        return 2

    checks = [
        check(shape, name, path)
        for shape in SHAPES for name in ("fp32", "bf16") for path in ("primitive", "fused")
    ]  # fmt: skip
    speeds, rates = [], {}
    for shape in SPEED:
        rates[shape] = matmul_rate(shape)
        for name, (loss, units) in methods().items():
            try:
                speeds.append(measure(name, loss, units, shape))
            except Exception as error:  # a peer that fails must not cost the others their figures
                if name.startswith("ours"):
                    raise
                print(f"{name} at {shape}: {type(error).__name__}: {error}")
    sparse = FAST_HEADING + "".join(map(fast_mode, SPEED))
    trainer, trains = gpu_check_trainer.check(REHEARSAL)
    text = markdown(checks, speeds, rates) + sparse + trainer
    print(text)
    if not REHEARSAL:
        args.output.mkdir(exist_ok=True)
        (args.output / "gpu.md").write_text(text)
        figures = {"machine": machine(), "checks": [asdict(c) for c in checks]}
        figures["speed"] = [asdict(s) for s in speeds]
        (args.output / "gpu.json").write_text(json.dumps(figures, indent=1))
    return not (trains and all(c.passed for c in checks))


if __name__ == "__main__":
    sys.exit(main())
