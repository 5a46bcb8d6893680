"""`redi plan` against real steps on a CPU: what it foresees beyond weights, gradients and AdamW.

    python bench/plan_check.py                  print the table
    python bench/plan_check.py --write FILE     and put it into FILE, between its markers

Counted: every allocation of PyTorch's CPU allocator during the second optimizer step of the real
loop (two packs a step), as its profiler reports them; not the tensors that the plan knows of.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pages import replace_between
from torch.profiler import ProfilerActivity, profile

from redi.config import TrainConfig
from redi.data.tokenize import Tokenized, Trace
from redi.training.distributed import Ranks
from redi.training.logging import TrainState
from redi.training.loop import Loop
from redi.training.model import load_model
from redi.training.plan import Planner

LIMIT = 0.10
BASE = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 5, "vocab_size": 2048,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 8192, "tie_word_embeddings": True,
        "bos_token_id": None, "eos_token_id": None, "pad_token_id": None}  # fmt: skip
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"tie_word_embeddings": False},
    "qwen2": {},
    "qwen3": {"num_hidden_layers": 8},
    "gemma2": {"sliding_window": 256, "num_hidden_layers": 4},
    "gemma3_text": {"sliding_window": 256, "num_hidden_layers": 7},
}
CASES = [
    (family, tokens, checkpointing, bf16)
    for family in FAMILIES
    for tokens, checkpointing, bf16 in (
        (512, "none", False), (2048, "none", False), (2048, "selective", False),
        (2048, "selective, 3 kept", False), (2048, "full", False), (2048, "none", True),
    )
]  # fmt: skip


def make_config(family: str, tokens: int, checkpointing: str, bf16: bool) -> TrainConfig:
    how, _, kept = checkpointing.partition(", ")
    blocks = {"kept_blocks": int(kept.split()[0])} if kept else {}
    return TrainConfig(
        architecture={"model_type": family, **BASE, **FAMILIES[family]},
        tokenizer_name_or_path="none",
        dataset_name="none",
        output_dir="none",
        train_batch_size=2,
        max_tokens_per_batch=tokens,
        max_length=tokens // 2,
        gradient_checkpointing=how,
        **blocks,
        bf16=bf16,
        max_steps=2,
    )


def count(config: TrainConfig) -> int:
    """Bytes at the peak of the second step, beyond 16 a parameter."""
    length = config.max_length
    ids = np.arange(length, dtype=np.int32) % 2048
    traces = [[Trace(ids, 8, chosen, i) for chosen in (True, False)] for i in range(2)]
    model = load_model(config)
    data = Tokenized(traces, ["a", "b"], [])
    loop = Loop(config, model, data, {}, Ranks(0, 1, torch.device("cpu")))
    state = TrainState(total_steps=2)
    loop.step(state)
    loop.optimizer.zero_grad(set_to_none=True)  # the profiler misses when older memory is freed
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        loop.step(state)
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    gradients = sum(4 * p.numel() for p in model.parameters())
    live = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak - gradients


def check(case: tuple[str, int, str, bool]) -> tuple[float, float]:
    """(planned, counted) MiB."""
    config = make_config(*case)
    return Planner(config).memory(0).activations / 2**20, count(config) / 2**20


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    lines = [
        "| model | tokens | checkpointing | compute | planned MiB | counted MiB | off by |",
        "|---|---|---|---|---|---|---|",
    ]
    worst = 0.0
    for case in CASES:
        family, tokens, checkpointing, bf16 = case
        planned, counted = check(case)
        off = planned / counted - 1
        worst = max(worst, abs(off))
        lines.append(
            f"| {family} | {tokens:,} | {checkpointing} "
            f"| {'bf16' if bf16 else 'fp32'} | {planned:.1f} | {counted:.1f} | {off:+.1%} |"
        )
        print(lines[-1], flush=True)
    text = "\n".join(lines) + f"\n\nFurthest off: {worst:.1%}."
    if args.write:
        replace_between(args.write, "plan_check", text)
    print(f"furthest off: {worst:.1%}")
    return worst > LIMIT


if __name__ == "__main__":
    sys.exit(main())
