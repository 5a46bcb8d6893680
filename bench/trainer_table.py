"""The whole trainer against TRL's, on a CPU: useful tokens a second, and peak memory.

    python bench/trainer_table.py                                       every objective
    python bench/trainer_table.py --objectives dpo --json runs/trainer.json --write docs/trainer.md

Model: Qwen2 in the proportions of Qwen2.5-1.5B's (vocabulary 4 x layers x hidden) at 1/6 of its
width. Pairs: the lengths of the paper's (Qwen2.5-Math-1.5B on OpenR1 traces, cut at 800 + 19,000
tokens; log-normal, since only the limits are published), divided by 32. A useful token is one of
the data; padding is not. Each row is a fresh process: its first step warms up, the others count.
Memory is the peak beyond weights, gradients and AdamW's moments. Both checkpoint activations.

Where the difference comes from: the same with traces of equal length (nothing to pad), and with a
vocabulary of 256 on top of that (hardly any logits).
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trainer_peers
from loss_table import resident
from trainer_peers import Job

SCALE = 32
BATCH, STEPS = 8, 4
CHECKPOINTING = "full"  # as in the paper's runs, and TRL's default
VOCAB = 8192
MODEL = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 4, "pad_token_id": 0,
}  # fmt: skip
MICRO_BATCHES = {"redi": [640], "trl": [1, 2, 4, 8], "trl packed": [1, 2, 4]}
CASES = {
    "paper lengths": {"vocab": VOCAB, "equal": False},
    "equal lengths": {"vocab": VOCAB, "equal": True},
    "equal lengths, vocabulary of 256": {"vocab": 256, "equal": True},
}


def paper_lengths(count: int, median: int, limit: int, rng: np.random.Generator) -> np.ndarray:
    """Log-normal (sigma 0.7: a quarter of R1's traces are longer than 8k), redrawn above the
    limit, divided by SCALE."""
    drawn = rng.lognormal(np.log(median), 0.7, 4 * count)
    return np.ceil(drawn[drawn <= limit][:count] / SCALE).astype(int)


def make_input(folder: Path, vocab: int, equal: bool) -> None:
    """A model with its tokenizer, and pairs of random digits, one a token."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from redi.data.arithmetic import write_tokenizer

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocab, **MODEL))
    model.save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    rng = np.random.default_rng(0)
    count = BATCH * STEPS
    prompts = paper_lengths(count, 120, 800, rng)
    sides = [paper_lengths(count, 5000, 19_000, rng) for _ in ("chosen", "rejected")]
    if equal:
        prompts = np.full(count, prompts.mean().round().astype(int))
        sides = [np.full(count, np.mean(sides).round().astype(int))] * 2
    text = lambda n: "".join(rng.choice(list("0123456789"), n))
    message = lambda role, n: [{"role": role, "content": text(n)}]
    with (folder / "pairs.jsonl").open("w") as file:
        for p, c, r in zip(prompts, *sides, strict=True):
            row = {"prompt": message("user", p)}
            row |= {"chosen": message("assistant", c), "rejected": message("assistant", r)}
            file.write(json.dumps(row) + "\n")


class Watch:
    """Counts tokens on their way into the decoder; notes time and peak memory a step."""

    def __init__(self, lm: Any, cpu_time: bool):
        self.lm, self.useful, self.computed = lm, 0, 0
        self.clock = time.process_time if cpu_time else time.perf_counter
        self.seconds = self.base = self.peak = 0.0
        self.started: float | None = None
        lm.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: Any, args: tuple, kwargs: dict) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        self.computed += ids.numel()
        self.useful += ids.numel() if mask is None else int(mask.sum())

    def on_step_end(self) -> None:
        if self.started is not None:
            self.seconds += self.clock() - self.started
            self.peak = resident("VmHWM")
        else:  # the first step: imports, optimizer state and workspaces are there now
            self.useful = self.computed = 0
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)
            weights = list(self.lm.parameters())
            alive = sum(w.grad.nbytes for w in weights if w.grad is not None)
            self.base = resident("VmRSS") - alive + sum(w.nbytes for w in weights)
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
        self.started = self.clock()

    def row(self) -> dict:
        return {
            "tokens_per_second": self.useful / self.seconds,
            "computed_per_useful": self.computed / self.useful,
            "above_mib": (self.peak - self.base) / 2**20,
            "tokens": self.useful,
            "seconds": self.seconds,
        }


def run_here(job: dict) -> None:
    """One row, printed as the last line: what the fresh process does."""
    job["folder"] = Path(job["folder"])
    cpu_time = job.pop("cpu_time")
    watch: Watch | None = None

    def watched(lm: Any):
        nonlocal watch
        watch = Watch(lm, cpu_time)
        return watch.on_step_end

    run = trainer_peers.redi if job["trainer"] == "redi" else trainer_peers.trl
    run(Job(**job), watched)
    assert watch is not None
    print(json.dumps(watch.row()))


def run_apart(job: Job, cpu_time: bool) -> dict:
    content = json.dumps({**asdict(job), "cpu_time": cpu_time}, default=str)
    command = [sys.executable, __file__, "--run", content]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode != 0:
        return {"error": result.stderr.strip().splitlines()[-1]}
    return json.loads(result.stdout.splitlines()[-1])


def measure(objective: str, case: str, cpu_time: bool) -> list[dict]:
    trainers = ["redi", "trl", *(["trl packed"] if objective == "sft" else [])]
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        make_input(Path(folder), **CASES[case])
        for trainer in trainers:
            best = 0.0
            for micro_batch in MICRO_BATCHES[trainer]:
                job = Job(
                    Path(folder), objective, trainer, micro_batch, CHECKPOINTING, BATCH, STEPS
                )
                row = {"case": case, **asdict(job), **run_apart(job, cpu_time)}
                del row["folder"]
                rows.append(row)
                print(line(row), file=sys.stderr, flush=True)
                speed = row.get("tokens_per_second", 0.0)
                if speed < 0.8 * best:  # larger micro-batches only pad more
                    break
                best = max(best, speed)
    return rows


def line(row: dict) -> str:
    if "error" in row:
        return f"| {row['trainer']} | {row['micro_batch']} | {row['error'][:90]} | | |"
    return (
        f"| {row['trainer']} | {row['micro_batch']} | {row['tokens_per_second']:,.0f} "
        f"| {row['computed_per_useful']:.2f} | {row['above_mib']:,.0f} |"
    )


def best_of(rows: list[dict], objective: str, case: str, ours: bool) -> dict | None:
    fits = [
        row
        for row in rows
        if (row["objective"], row["case"], row["trainer"] == "redi") == (objective, case, ours)
        and "error" not in row
    ]
    return max(fits, key=lambda row: row["tokens_per_second"], default=None)


def report(result: dict) -> str:
    rows = result["rows"]
    objectives = list(dict.fromkeys(row["objective"] for row in rows))
    lines = [
        "| objective | redi tokens/s | TRL tokens/s | ratio | redi MiB | TRL MiB | ratio |"
        " TRL's best: pairs a forward | padding |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    factors = [
        "| objective | " + " | ".join(CASES) + " |",
        "| --- |" + " ---: |" * len(CASES),
    ]
    for objective in objectives:
        speedups = []
        for case in CASES:
            ours, theirs = (best_of(rows, objective, case, side) for side in (True, False))
            if ours is None or theirs is None:
                speedups.append("-")
                continue
            speed = ours["tokens_per_second"] / theirs["tokens_per_second"]
            memory = ours["above_mib"] / theirs["above_mib"]
            speedups.append(f"{speed:.2f} x speed, {memory:.2f} x memory")
            if case == "paper lengths":
                lines.append(
                    f"| {objective} | {ours['tokens_per_second']:,.0f} "
                    f"| {theirs['tokens_per_second']:,.0f} | {speed:.2f} "
                    f"| {ours['above_mib']:,.0f} | {theirs['above_mib']:,.0f} | {memory:.2f} "
                    f"| {theirs['micro_batch']}{theirs['trainer'].removeprefix('trl')} "
                    f"| {theirs['computed_per_useful'] - 1:.0%} |"
                )
        factors.append(f"| {objective} | " + " | ".join(speedups) + " |")
    detail = ["| trainer | a forward | tokens/s | computed / useful | MiB |"]
    detail += ["| --- | ---: | ---: | ---: | ---: |"]
    for objective in objectives:
        detail.append(f"| **{objective}**, paper lengths | | | | |")
        chosen = [r for r in rows if r["objective"] == objective and r["case"] == "paper lengths"]
        detail += [line(row) for row in chosen]
    return "\n".join([*lines, "", *factors, "", *detail, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", default=["redi", "dpo", "simpo", "sft"])
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--json", type=Path, default=Path("runs/trainer.json"))
    parser.add_argument("--write", type=Path, help="put the tables into this file")
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use too")
    parser.add_argument("--run", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run:
        run_here(args.run)
        return
    result: dict[str, Any] = {"rows": []}
    if args.json.is_file():  # measured before, in part
        result = json.loads(args.json.read_text())
    for objective in args.objectives:
        for case in args.cases:
            print(f"{objective}, {case}", file=sys.stderr)
            fresh = measure(objective, case, args.cpu_time)
            same = lambda row, o=objective, c=case: (row["objective"], row["case"]) == (o, c)
            result["rows"] = [row for row in result["rows"] if not same(row)] + fresh
    result["machine"] = {
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "clock": "cpu" if args.cpu_time else "wall",
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1))
    print(report(result))
    if args.write:
        args.write.write_text(report(result))


if __name__ == "__main__":
    main()
