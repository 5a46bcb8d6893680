"""The whole trainer against TRL's, on a CPU: useful tokens a second, and peak memory.

    python bench/trainer_table.py --write docs/trainer.md       every row, half an hour
    python bench/trainer_table.py --objectives dpo --cases "equal lengths" --micro-batches 1

Model: Qwen2 in the proportions of Qwen2.5-1.5B's (vocabulary 4 x layers x hidden) at 1/6 of its
width. Pairs: the paper's lengths as bench/packing.py assumes them, divided by 6 too, so that
attention has the share of the work that it has there. Every step trains the same pairs, so both
trainers are timed on the same tokens. A useful token is one of the data; padding is not. Each row
is a fresh process: its first step warms up, the quickest of the others counts. Memory is the peak
beyond weights, gradients and AdamW's moments. Both compute in float32.

TRL gets more pairs a forward until that no longer makes it quicker; its best is compared. The two
take turns, `--rounds` times, since a machine's pace changes over minutes: a ratio is the median of
the rounds' ratios, with the smallest and the largest. Where the
difference comes from, for DPO: the same with traces of equal length (nothing to pad), with a
vocabulary of 256 on top of that (hardly any logits), and other checkpointing. Redi's is selective,
which TRL has not: it keeps attention's output.
"""

import argparse
import ctypes
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import packing
import torch
import trainer_peers
from loss_table import resident
from pages import replace_between
from trainer_peers import Job

SCALE = 6
BATCH, STEPS = 6, 3
VOCAB = 8192
MODEL = {
    "hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    "max_position_embeddings": 4096, "bos_token_id": None, "eos_token_id": 4, "pad_token_id": 0,
}  # fmt: skip
MICRO_BATCHES = [1, 2, 3, 6]  # TRL's
TOKENS = 3328  # ours; about the longest trace


@dataclass(frozen=True)
class Case:
    vocab: int = VOCAB
    equal: bool = False  # lengths
    checkpointing: str = "full"  # TRL's; as in the paper's runs, and its default
    ours: str = "selective"


KEPT = "3 blocks kept"  # the memory that TRL's half leaves, spent on speed
CASES = {
    "paper lengths": Case(),
    KEPT: Case(ours="selective, 3 kept"),
    "full checkpointing in both": Case(ours="full"),
    "no checkpointing": Case(checkpointing="none", ours="none"),
    "equal lengths": Case(equal=True),
    "equal lengths, vocabulary of 256": Case(equal=True, vocab=256),
}


def step_lengths(rng: np.random.Generator) -> np.ndarray:
    """[BATCH, (prompt, chosen, rejected)]: even quantiles of the paper's lengths, so that few pairs
    stand for many. Of 100 ways to pair them up, the one whose padding is nearest to the paper's."""

    def padding(lengths_P3: np.ndarray) -> float:  # a pair's two traces, one as long as the other
        traces = lengths_P3[:, :1] + lengths_P3[:, 1:]
        return 2 * traces.max(1).sum() / traces.sum()

    many = np.hstack(packing.paper_pairs(4000, rng))
    few = np.quantile(many, (np.arange(BATCH) + 0.5) / BATCH, axis=0)
    ways = [rng.permuted(few, axis=0) for _ in range(100)]
    return min(ways, key=lambda way: abs(padding(way) - padding(many)))


def make_input(folder: Path, case: Case) -> None:
    """A model with its tokenizer, and a step's pairs of random digits, one a token."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from redi.data.arithmetic import write_tokenizer

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(Qwen2Config(vocab_size=case.vocab, **MODEL))
    model.save_pretrained(folder / "model")
    write_tokenizer(folder / "model")
    rng = np.random.default_rng(0)
    lengths = step_lengths(rng) / SCALE
    if case.equal:
        prompt, *sides = lengths.mean(0)
        lengths = np.tile([prompt, np.mean(sides), np.mean(sides)], (BATCH, 1))
    text = lambda n: "".join(rng.choice(list("0123456789"), n))
    message = lambda role, n: [{"role": role, "content": text(n)}]
    with (folder / "pairs.jsonl").open("w") as file:
        for p, c, r in np.ceil(lengths).astype(int):
            row = {"prompt": message("user", p)}
            row |= {"chosen": message("assistant", c), "rejected": message("assistant", r)}
            file.write(json.dumps(row) + "\n")


class Watch:
    """Counts tokens on their way into the decoder; notes the quickest step and the peak memory."""

    def __init__(self, lm: Any, cpu_time: bool):
        self.lm, self.useful, self.computed, self.steps = lm, 0, 0, 0
        self.clock = time.process_time if cpu_time else time.perf_counter
        self.seconds, self.base, self.peak = math.inf, 0.0, 0.0
        self.started: float | None = None
        lm.model.register_forward_pre_hook(self.count, with_kwargs=True)

    def count(self, module: Any, args: tuple, kwargs: dict) -> None:
        ids, mask = kwargs["input_ids"], kwargs.get("attention_mask")
        self.computed += ids.numel()
        self.useful += ids.numel() if mask is None else int(mask.sum())

    def on_step_end(self) -> None:
        if self.started is not None:
            self.seconds = min(self.seconds, self.clock() - self.started)
            self.peak = resident("VmHWM")
            self.steps += 1
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
            "tokens_per_second": self.useful / self.steps / self.seconds,
            "computed_per_useful": self.computed / self.useful,
            "above_mib": (self.peak - self.base) / 2**20,
            "tokens": self.useful // self.steps,
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


def measure(args: argparse.Namespace, objective: str, case: str) -> list[dict]:
    rows = []

    def run(round: int, trainer: str, micro_batch: int) -> dict:
        how = CASES[case].ours if trainer == "redi" else CASES[case].checkpointing
        job = Job(Path(folder), objective, trainer, micro_batch, how, BATCH, args.steps)
        row = {"case": case, "round": round, **asdict(job), **run_apart(job, args.cpu_time)}
        del row["folder"]
        rows.append(row)
        print(line(row), file=sys.stderr, flush=True)
        return row

    with tempfile.TemporaryDirectory() as folder:
        make_input(Path(folder), CASES[case])
        run(0, "redi", TOKENS)
        for trainer in ("trl", "trl packed")[: 2 if objective == "sft" else 1]:
            best = 0.0
            for micro_batch in args.micro_batches:
                if speed(run(0, trainer, micro_batch)) < best:  # more pairs only pad more
                    break
                best = speed(rows[-1])
        theirs = max(rows[1:], key=speed)
        for round in range(1, args.rounds):
            run(round, "redi", TOKENS)
            run(round, theirs["trainer"], theirs["micro_batch"])
    return rows


def speed(row: dict) -> float:
    return row.get("tokens_per_second", 0.0)


def line(row: dict) -> str:
    if "error" in row:
        return f"| {row['trainer']} | {row['micro_batch']} | {row['error'][:90]} | | | |"
    return (
        f"| {row['trainer']} | {row['micro_batch']} | {row['tokens_per_second']:,.0f} "
        f"| {row['computed_per_useful']:.2f} | {row['above_mib']:,.0f} | {row['seconds']:.1f} |"
    )


def ratios(label: str, rows: list[dict]) -> str:
    """A table's row: ours beside the quickest of TRL's, round by round."""
    best: dict[tuple[int, bool], dict] = {}
    for row in rows:
        key = row["round"], row["trainer"] == "redi"
        best[key] = max(best.get(key, row), row, key=speed)
    pairs = [(best[n, True], best[n, False]) for n, is_ours in best if is_ours]
    if not all(speed(ours) and speed(theirs) for ours, theirs in pairs):
        return f"| {label} |" + " - |" * 8
    cells = []
    for name in ("tokens_per_second", "above_mib"):
        ours, theirs = ([pair[side][name] for pair in pairs] for side in (0, 1))
        of = [a / b for a, b in zip(ours, theirs, strict=True)]
        cells += [f"{statistics.median(side):,.0f}" for side in (ours, theirs)]
        span = f" ({min(of):.2f}..{max(of):.2f})" if len(of) > 1 else ""
        cells += [f"**{statistics.median(of):.2f}**{span}"]
    theirs = pairs[0][1]
    cells += [f"{theirs['micro_batch']}{theirs['trainer'].removeprefix('trl')}"]
    cells += [f"{theirs['computed_per_useful'] - 1:.0%}"]
    return f"| {label} | " + " | ".join(cells) + " |"


def report(result: dict) -> str:
    rows, machine = result["rows"], result["machine"]
    groups: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["objective"], row["case"]), []).append(row)
    paper = next(iter(CASES))
    heads = (
        "redi tokens/s | TRL tokens/s | ratio | redi MiB | TRL MiB | ratio"
        " | TRL's best: pairs a forward | it pads |\n| --- |" + " ---: |" * 8
    )
    lines = [f"{machine['threads']} threads, torch {machine['torch']}, {machine['clock']} clock.\n"]
    lines += [f"| objective, {paper} | {heads}"]
    lines += [ratios(o, group) for (o, case), group in groups.items() if case == paper]
    lines += ["", f"| other cases | {heads}"]
    cases = [(f"{o}, {case}", group) for (o, case), group in groups.items() if case != paper]
    lines += [ratios(*case) for case in cases]
    lines += ["", "Every run:", ""]
    lines += ["| trainer | a forward | tokens/s | computed / useful | MiB | seconds |"]
    lines += ["| --- | ---: | ---: | ---: | ---: | ---: |"]
    for (objective, case), group in groups.items():
        lines += [f"| **{objective}**, {case} | | | | | |", *map(line, group)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objectives", nargs="+", default=["redi", "dpo", "simpo", "sft"])
    parser.add_argument(
        "--cases", nargs="+", choices=list(CASES), help="default: all for DPO, two for others"
    )
    parser.add_argument("--micro-batches", nargs="+", type=int, default=MICRO_BATCHES)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS, help="the first warms up")
    parser.add_argument("--json", type=Path, default=Path("runs/trainer.json"))
    parser.add_argument("--write", type=Path, help="put the tables into this page")
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
        for case in args.cases or list(CASES)[: None if objective == "dpo" else 2]:
            print(f"{objective}, {case}", file=sys.stderr, flush=True)
            this = [objective, case]
            others = [r for r in result["rows"] if [r["objective"], r["case"]] != this]
            result["rows"] = others + measure(args, objective, case)
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
        replace_between(args.write, "trainer_table", report(result))


if __name__ == "__main__":
    main()
