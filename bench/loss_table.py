"""Time, memory and gradient error of the loss, ours and peers', in one run.

    python bench/loss_table.py --tokens 2048 8192 --dtype float32 bfloat16 --json runs/loss.json

Times are ratios to the yardstick of the same round, the bare logits matmul in blocks that stay in
cache (U = 2 T V H FLOP): median, and the 20th and 80th percentile over rounds. An exact log-prob
with both gradients needs 3 U when the weights are known, 4 U (or all logits kept) when not. Extra
memory is a fresh process's peak beyond inputs, gradients and one fp32 [V, H] accumulator.
Errors are against fp64: the RMS of dX and dW, and of dX summed over tokens (coherent bias).
Hidden states come from runs/activations.pt where bench/activations.py has made it, else random.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from loss_peers import IMPLEMENTATIONS, Loss
from torch import Tensor

ACTIVATIONS = Path("runs/activations.pt")
YARDSTICK_BLOCK = (256, 512)


def load(tokens: int, dtype: torch.dtype, vocab: int | None) -> tuple[Tensor, Tensor, Tensor, str]:
    if ACTIVATIONS.is_file() and vocab is None:
        made = torch.load(ACTIVATIONS)
        times = -(-tokens // len(made["y_T"]))  # states repeat when too few were collected
        x_TH, y_T = made["x_TH"].repeat(times, 1)[:tokens], made["y_T"].repeat(times)[:tokens]
        return x_TH.to(dtype), made["w_VH"].to(dtype), y_T, made["source"]
    g = torch.Generator().manual_seed(0)
    w_VH = torch.randn(vocab or 49_152, 576, generator=g).to(dtype)
    x_TH = (torch.randn(tokens, 576, generator=g) / 8).to(dtype)
    y_T = torch.randint(len(w_VH), (tokens,), generator=g)
    return x_TH, w_VH, y_T, "random states"


def yardstick(x_TH: Tensor, w_VH: Tensor) -> None:
    T_block, V_block = YARDSTICK_BLOCK
    for x in x_TH.split(T_block):
        z = x.new_empty(len(x), V_block)
        for w in w_VH.split(V_block):
            torch.mm(x, w.T, out=z[:, : len(w)])


def step(loss: Loss, x_TH: Tensor, w_VH: Tensor, y_T: Tensor) -> tuple[Tensor, Tensor]:
    x, w = (t.detach().requires_grad_() for t in (x_TH, w_VH))
    loss(x, w, y_T).backward()
    return x.grad, w.grad


def timed(clock, function, *args) -> float:
    start = clock()
    function(*args)
    return clock() - start


def truth(x_TH: Tensor, w_VH: Tensor, y_T: Tensor) -> tuple[Tensor, Tensor]:
    """Blocked fp64; the tests hold this path to the textbook."""
    return step(IMPLEMENTATIONS["redi_kernels, fused"].make(), x_TH.double(), w_VH.double(), y_T)


def compare(got: tuple[Tensor, Tensor], exact: tuple[Tensor, Tensor]) -> dict[str, float]:
    (dx, dw), (exact_dx, exact_dw) = got, exact
    error = dx - exact_dx
    return {
        "dx_rms": float(error.norm() / exact_dx.norm()),
        "dw_rms": float((dw - exact_dw).norm() / exact_dw.norm()),
        "bias": float(error.sum(dim=0).norm() / exact_dx.sum(dim=0).norm()),
    }


def peak_memory(name: str, args: argparse.Namespace, tokens: int, dtype: str) -> float | None:
    """MiB, in a process that does one step of this implementation and nothing else."""
    command = [sys.executable, __file__, "--tokens", str(tokens), "--dtype", dtype, "--peak", name]
    command += ["--vocab", str(args.vocab)] if args.vocab else []
    result = subprocess.run(command, capture_output=True, text=True)
    return json.loads(result.stdout.splitlines()[-1]) if result.returncode == 0 else None


def print_peak(name: str, tokens: int, dtype: torch.dtype, vocab: int | None) -> None:
    x_TH, w_VH, y_T, _ = load(tokens, dtype, vocab)
    loss = IMPLEMENTATIONS[name].make()
    step(loss, x_TH[:64], w_VH[:64], y_T[:64] % 64)  # imports, threads, workspaces
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present size
    before = resident("VmRSS")
    grads = step(loss, x_TH, w_VH, y_T)
    extra = resident("VmHWM") - before - sum(g.nbytes for g in grads)
    accumulator = 0 if dtype == torch.float32 else 4 * w_VH.numel()
    print(round((extra - accumulator) / 2**20, 1))


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(args: argparse.Namespace, tokens: int, dtype_name: str) -> dict:
    dtype = getattr(torch, dtype_name)
    x_TH, w_VH, y_T, source = load(tokens, dtype, args.vocab)
    losses, absent = {}, {}
    for name, implementation in IMPLEMENTATIONS.items():
        if not any(part in name for part in args.only):
            continue
        try:
            losses[name] = implementation.make()
            step(losses[name], x_TH[:512], w_VH, y_T[:512])
        except Exception as error:
            losses.pop(name, None)
            absent[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    clock = time.process_time if args.cpu_time else time.perf_counter
    seconds = {name: [] for name in ("yardstick", *losses)}
    exact = truth(x_TH, w_VH, y_T)
    errors = {}
    for _ in range(args.rounds):  # every implementation in every round, beside its yardstick
        seconds["yardstick"].append(timed(clock, yardstick, x_TH, w_VH))
        for name, loss in losses.items():
            start = clock()
            grads = step(loss, x_TH, w_VH, y_T)
            seconds[name].append(clock() - start)
            if name not in errors:
                errors[name] = compare(grads, exact)
    rows = {}
    for name in losses:
        ratios = [a / b for a, b in zip(seconds[name], seconds["yardstick"], strict=True)]
        rows[name] = {
            "kind": IMPLEMENTATIONS[name].kind,
            "ratio": quantiles(ratios),
            "seconds": seconds[name],
            "extra_mib": peak_memory(name, args, tokens, dtype_name),
            **errors[name],
        }
    V, H = w_VH.shape
    yard = statistics.median(seconds["yardstick"])
    return {
        "shape": {"T": tokens, "V": V, "H": H, "dtype": dtype_name, "states": source},
        "yardstick_s": yard,
        "gflops": 2 * tokens * V * H / yard / 1e9,
        "rows": rows,
        "absent": absent,
    }


def quantiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    at = lambda q: ordered[min(int(q * len(ordered)), len(ordered) - 1)]
    return [at(0.2), statistics.median(ordered), at(0.8)]


def table(result: dict) -> str:
    shape = result["shape"]
    lines = [
        f"T={shape['T']} V={shape['V']} H={shape['H']} {shape['dtype']}, {shape['states']}; "
        f"1 U = {result['yardstick_s']:.2f} s = {result['gflops']:.0f} GFLOP/s",
        "",
        "| | weights | time / U | 20..80% | extra MiB | dX rms | dW rms | coherent bias |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        low, mid, high = row["ratio"]
        extra = "-" if row["extra_mib"] is None else f"{row['extra_mib']:.0f}"
        errors = " | ".join(f"{row[k]:.1e}" for k in ("dx_rms", "dw_rms", "bias"))
        spread = f"{low:.2f}..{high:.2f}"
        lines.append(f"| {name} | {row['kind']} | {mid:.2f} | {spread} | {extra} | {errors} |")
    lines += [f"| {name} | - | {why} | | | | | |" for name, why in result["absent"].items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--vocab", type=int, help="random states with this vocabulary")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of implementations' names")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use too")
    parser.add_argument("--json", type=Path, default=Path("runs/loss.json"))
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        print_peak(args.peak, args.tokens[0], getattr(torch, args.dtype[0]), args.vocab)
        return
    results = []
    for tokens in args.tokens:
        for dtype in args.dtype:
            results.append(measure(args, tokens, dtype))
            print(table(results[-1]), flush=True)
    machine = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "clock": "cpu" if args.cpu_time else "wall",
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
