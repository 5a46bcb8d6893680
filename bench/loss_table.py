"""Time, memory and gradient error of the loss, ours and peers', in one run: docs/benchmarks.md.

    python bench/loss_table.py --tokens 2048 8192       time and error, to runs/loss.json
    python bench/loss_table.py --memory                 peak memory, into the same file
    python bench/loss_table.py --report docs/benchmarks.md

Times are ratios to the yardstick of the same round, the bare logits matmul in blocks that stay in
cache (U = 2 T V H FLOP): median, and the 20th and 80th percentile over rounds; what takes more than
SLOW of them has one round. An exact log-prob with both gradients needs 3 U when the weights are
known, 4 U (or all logits kept) when not. Memory is a fresh process's peak beyond inputs, gradients
and one fp32 [V, H] accumulator; it can be measured on a busy machine, the time cannot. Errors are
against fp64: the RMS of dX and dW, and of dX summed over tokens (coherent bias).
Hidden states come from runs/activations.pt where bench/activations.py has made it, else random.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from loss_peers import IMPLEMENTATIONS, Loss
from torch import Tensor

SLOW = 8.0
YARDSTICK_BLOCK = (256, 512)


def load(
    tokens: int, dtype: torch.dtype, activations: Path, vocab: int | None
) -> tuple[Tensor, Tensor, Tensor, str]:
    if activations.is_file() and vocab is None:
        made = torch.load(activations)
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


def fill_memory(results: list[dict]) -> None:
    """Adds `extra_mib` to every row that lacks it."""
    for result in results:
        shape = result["shape"]
        states = ["--activations", shape["activations"]]
        states += ["--vocab", str(shape["V"])] if shape["random"] else []
        lacking = {k: row for k, row in result["rows"].items() if row.get("extra_mib") is None}
        for name, row in lacking.items():
            row["extra_mib"] = peak_mib(name, shape["T"], shape["dtype"], states)
            print(f"{shape['T']} {shape['dtype']} {name}: {row['extra_mib']} MiB", flush=True)


def peak_mib(name: str, tokens: int, dtype: str, states: list[str]) -> float | None:
    """Of a fresh process that does one step of this implementation; None where it fails."""
    command = [sys.executable, __file__, "--peak", name, "--dtype", dtype, "--tokens", str(tokens)]
    done = subprocess.run([*command, *states], capture_output=True, text=True)
    return json.loads(done.stdout) if done.returncode == 0 else None


def print_peak(name: str, x_TH: Tensor, w_VH: Tensor, y_T: Tensor) -> None:
    """MiB of one step of this implementation, in this process, which has done nothing else."""
    loss = IMPLEMENTATIONS[name].make()
    step(loss, x_TH[:64], w_VH[:64], y_T[:64] % 64)  # imports, threads, workspaces
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again at the present size
    before = resident("VmRSS")
    grads = step(loss, x_TH, w_VH, y_T)
    extra = resident("VmHWM") - before - sum(g.nbytes for g in grads)
    accumulator = 0 if x_TH.dtype == torch.float32 else 4 * w_VH.numel()
    print(round((extra - accumulator) / 2**20, 1))


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"no {field} in /proc/self/status")


def measure(args: argparse.Namespace, tokens: int, dtype_name: str) -> dict:
    x_TH, w_VH, y_T, source = load(tokens, getattr(torch, dtype_name), args.activations, args.vocab)
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
    yard: list[float] = []
    rows: dict[str, dict] = {}
    exact = truth(x_TH, w_VH, y_T)
    for _ in range(args.rounds):  # every implementation in every round, beside its yardstick
        start = clock()
        yardstick(x_TH, w_VH)
        yard.append(clock() - start)
        for name, loss in losses.items():
            if name in rows and rows[name]["ratios"][0] > SLOW:
                continue
            start = clock()
            grads = step(loss, x_TH, w_VH, y_T)
            ratio = (clock() - start) / yard[-1]
            if name not in rows:
                kind = IMPLEMENTATIONS[name].kind
                rows[name] = {"kind": kind, "ratios": [], **compare(grads, exact)}
            rows[name]["ratios"].append(ratio)
    V, H = w_VH.shape
    return {
        "shape": {"T": tokens, "V": V, "H": H, "dtype": dtype_name, "states": source,
                  "activations": str(args.activations), "random": "random" in source},
        "yardstick_s": statistics.median(yard),
        "gflops": 2 * tokens * V * H / statistics.median(yard) / 1e9,
        "rows": rows,
        "absent": absent,
    }  # fmt: skip


def quantiles(values: list[float]) -> list[float]:
    ordered = sorted(values)
    at = lambda q: ordered[min(int(q * len(ordered)), len(ordered) - 1)]
    return [at(0.2), statistics.median(ordered), at(0.8)]


def table(result: dict) -> str:
    shape = result["shape"]
    lines = [
        f"T = {shape['T']:,}, V = {shape['V']:,}, H = {shape['H']}, {shape['dtype']}, "
        f"{shape['states']}; 1 U = {result['yardstick_s']:.2f} s = {result['gflops']:.0f} GFLOP/s",
        "",
        "| | weights | time / U | 20..80% | rounds | extra MiB | dX rms | dW rms | bias |",
        "| :--- | :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, row in result["rows"].items():
        low, mid, high = quantiles(row["ratios"])
        extra = "-" if row.get("extra_mib") is None else f"{row['extra_mib']:,.0f}"
        errors = " | ".join(f"{row[k]:.1e}" for k in ("dx_rms", "dw_rms", "bias"))
        spread = f"{low:.2f}..{high:.2f}" if len(row["ratios"]) > 1 else ""
        label = f"**{name}**" if "redi_kernels" in name else name
        lines.append(
            f"| {label} | {row['kind']} | {mid:.2f} | {spread} | {len(row['ratios'])} | {extra} "
            f"| {errors} |"
        )
    lines += [f"| {name} | | {why} | | | | | | |" for name, why in result["absent"].items()]
    return "\n".join(lines) + "\n"


HEADING = """<!-- made by bench/loss_table.py --report -->
# The loss on a CPU, ours and peers'

Mean NLL of real hidden states, forward and backward, all in every round. {machine}.

- **time / U**: U is the bare logits matmul, 2 T V H FLOP in cache-sized blocks, in the same round.
  The limits are 3 where weights are known before the forward and 4 where they come later, 3 again
  for those that keep all logits ("keeps").
- **extra MiB**: a fresh process's peak beyond inputs, gradients and one fp32 [V, H] accumulator.
- **dX, dW, bias**: errors against fp64 from the same rounded inputs; bias is the error of dX summed
  over tokens.

`python bench/activations.py MODEL DATA.jsonl` makes the states; `make bench` makes this page.
Tables of one round were added with `--append`: read them as indications.
"""


def report(content: dict) -> str:
    m = content["machine"]
    clock = "Processor time" if m["clock"] == "cpu" else "Wall time"
    machine = f"{clock}, {m['threads']} threads on {m['cores']} cores, torch {m['torch']}"
    return "\n".join([HEADING.format(machine=machine), *map(table, content["results"])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048])
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--activations", type=Path, default=Path("runs/activations.pt"))
    parser.add_argument("--vocab", type=int, help="random states with this vocabulary")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of implementations' names")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use too")
    parser.add_argument("--json", type=Path, default=Path("runs/loss.json"))
    parser.add_argument("--append", action="store_true", help="add to what the JSON file holds")
    parser.add_argument("--memory", action="store_true", help="fill in the JSON file's memory")
    parser.add_argument("--report", type=Path, help="write the JSON file's tables as Markdown")
    parser.add_argument("--peak", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak:
        dtype = getattr(torch, args.dtype[0])
        print_peak(args.peak, *load(args.tokens[0], dtype, args.activations, args.vocab)[:3])
        return
    if args.memory or args.report:
        content = json.loads(args.json.read_text())
        if args.memory:
            fill_memory(content["results"])
            args.json.write_text(json.dumps(content, indent=1))
        if args.report:
            args.report.write_text(report(content))
        return
    machine = {
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "clock": "cpu" if args.cpu_time else "wall",
    }
    results = json.loads(args.json.read_text())["results"] if args.append else []
    args.json.parent.mkdir(parents=True, exist_ok=True)
    for tokens in args.tokens:
        for dtype_name in args.dtype:
            results.append(measure(args, tokens, dtype_name))
            print(table(results[-1]), flush=True)
            args.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))


if __name__ == "__main__":
    main()
