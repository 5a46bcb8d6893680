"""Time and memory of a step against its tokens, 1k to 64k: both must be straight lines.

    python bench/scaling.py --write docs/scaling.png --json runs/scaling.json

REDI on a small Qwen2, traces of 512 tokens. Time: packs of 2,048 tokens. Memory, each figure from a
fresh process: once with packs of 2,048 tokens (flat: a step may be as large as one likes), once
with the whole step as one pack (what a micro-batch of that size needs).
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import torch
from loss_table import resident

TRACE, PACK = 512, 2048
TOKENS = [1024 * 2**i for i in range(7)]
MODEL = {
    "hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 4096, "tie_word_embeddings": True,
}  # fmt: skip


def one(tokens: int, pack: int, rounds: int) -> dict[str, float]:
    """Seconds of a step (median) and its peak memory in MiB beyond weights and gradients."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from redi.data.pack import pack_traces
    from redi.data.tokenize import Trace
    from redi.training.model import PackedLM
    from redi.training.objectives import StepCounts, redi

    torch.manual_seed(0)
    model = PackedLM(Qwen2ForCausalLM(Qwen2Config(**MODEL))).train()
    rng = np.random.default_rng(0)
    ids = rng.integers(0, MODEL["vocab_size"], (tokens // TRACE, TRACE)).astype(np.int32)
    traces = [Trace(row, 16, i % 2 == 0, i // 2) for i, row in enumerate(ids)]
    objective = redi(alpha=0.8)

    def step(traces: list) -> float:
        started = time.perf_counter()
        model.zero_grad(set_to_none=True)
        counts = StepCounts.of(traces)
        for piece in pack_traces(traces, pack):
            model(piece, partial(objective, counts)).loss.backward()
        return time.perf_counter() - started

    step(traces[:2])
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    seconds = statistics.median(step(traces) for _ in range(rounds))
    return {"seconds": seconds, "mib": (resident("VmHWM") - before) / 2**20}


def apart(tokens: int, pack: int, rounds: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", *map(str, (tokens, pack, rounds))]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def straightness(x: list[float], y: list[float]) -> tuple[float, float, float]:
    """Slope and intercept of the line through the points (least relative squares), and the largest
    relative distance from it."""
    x, y = np.array(x, dtype=float), np.array(y, dtype=float)
    design = np.stack([x, np.ones_like(x)], 1) / y[:, None]
    slope, intercept = np.linalg.lstsq(design, np.ones_like(y), rcond=None)[0]
    return slope, intercept, float(np.abs((slope * x + intercept) / y - 1).max())


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tokens = [row["tokens"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    seconds = [row["seconds"] for row in rows]
    slope, intercept, _ = straightness(tokens, seconds)
    left.loglog(tokens, [slope * t + intercept for t in tokens], color="0.7", label="straight line")
    left.loglog(tokens, seconds, "o", color="C0", label="measured")
    left.set(xlabel="tokens a step", ylabel="seconds a step", title="Time")
    right.loglog(tokens, [row["mib_one_pack"] for row in rows], "o-", color="C1",
                 label="whole step in one pack")  # fmt: skip
    right.loglog(tokens, [row["mib"] for row in rows], "o-", color="C0", label=f"packs of {PACK:,}")
    right.set(xlabel="tokens a step", ylabel="MiB beyond weights", title="Peak memory")
    for axes in (left, right):
        axes.set_xticks(tokens, [f"{t // 1024}k" for t in tokens])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--passes", type=int, default=3, help="over all sizes; the quickest counts")
    parser.add_argument("--json", type=Path, default=Path("runs/scaling.json"))
    parser.add_argument("--write", type=Path, help="draw the plot into this file")
    parser.add_argument("--one", type=int, nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one)))
        return
    # A machine's pace changes from minute to minute: each size is timed in several of them.
    passes = [{t: apart(t, PACK, args.rounds) for t in TOKENS} for _ in range(args.passes)]
    print("| tokens a step | seconds | tokens/s | MiB, packs of 2,048 | MiB, one pack |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    rows = []
    for tokens in TOKENS:
        timed = min((one_pass[tokens] for one_pass in passes), key=lambda row: row["seconds"])
        row = {"tokens": tokens, **timed}
        row["mib_one_pack"] = apart(tokens, tokens, 1)["mib"]
        rows.append(row)
        print(
            f"| {tokens:,} | {row['seconds']:.2f} | {tokens / row['seconds']:,.0f} "
            f"| {row['mib']:.0f} | {row['mib_one_pack']:.0f} |",
            flush=True,
        )
    x = [row["tokens"] for row in rows]
    for what in ("seconds", "mib_one_pack"):
        slope, _, off = straightness(x, [row[what] for row in rows])
        print(
            f"\n{what}: {1000 * slope:.3g} per 1,000 tokens, at most {off:.0%} off a straight line"
        )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(rows, indent=1))
    if args.write:
        plot(rows, args.write)


if __name__ == "__main__":
    main()
