"""The trainer's part of `make gpu-check`; `python bench/gpu_check_trainer.py [--rehearse]` alone.

20 REDI steps of Qwen2.5-1.5B's shape (random weights, traces up to 32k tokens): FlashAttention
against SDPA, peak memory beside the plan's, SIGKILL and resume, and FSDP2 over NCCL where there are
several GPUs. No network, no files but its own, under a temporary folder (30 GB).
"""

import argparse
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests/tools")]

import tiny  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402

from redi.config import TrainConfig  # noqa: E402
from redi.model import load_model_config  # noqa: E402
from redi.monitor import read_metrics  # noqa: E402
from redi.plan import GIB, Planner  # noqa: E402

QWEN = {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 300000.0,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 3,
        "pad_token_id": 0}  # fmt: skip
STEPS = 20
KEYS = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
# Log-probs of random weights are about -12; bf16 attention in another order moves them by its
# rounding (2^-8) averaged over thousands of tokens. Gradient norms see the rounding undamped.
TOLERANCE = {"loss": 5e-3, "logps/chosen": 5e-3, "logps/rejected": 5e-3, "grad_norm": 2e-2}


@dataclass
class Row:
    name: str
    result: str
    passed: bool


class Bench:
    def __init__(self, folder: Path, rehearse: bool):
        self.folder, self.rehearse = folder, rehearse
        self.length = 300 if rehearse else 32768
        tiny.save_tokenizer(folder / "tokenizer")
        tiny.write_jsonl(folder / "pairs.jsonl", self.pairs())

    def pairs(self) -> list[dict]:
        """Uneven lengths, the longest as long as allowed; a character is a token."""
        draw, rows = random.Random(0), []
        for i in range(STEPS):
            sizes = (self.length - 40, draw.randrange(self.length // 8, self.length // 2))
            chosen, rejected = ("".join(draw.choices("0123456789+=", k=n)) for n in sizes)
            prompt = [{"role": "user", "content": f"{i}+{i}=?"}]
            sides = {"chosen": chosen, "rejected": rejected}
            rows.append({"id": f"pair-{i}", "prompt": prompt} | {
                k: [{"role": "assistant", "content": v}] for k, v in sides.items()})  # fmt: skip
        return rows

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        small = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
                 "num_attention_heads": 4, "vocab_size": 128}  # fmt: skip
        settings = {
            "architecture": QWEN | (small if self.rehearse else {}),
            "tokenizer_name_or_path": str(self.folder / "tokenizer"),
            "dataset_name": str(self.folder / "pairs.jsonl"),
            "output_dir": str(self.folder / name),
            "max_length": self.length,
            "max_tokens_per_batch": self.length,
            "train_batch_size": 2,
            "max_steps": STEPS,
            "learning_rate": 1e-6,
            "gradient_checkpointing": "selective",
            "save_steps": 10,
            "save_total_limit": 1,
            "collapse_guard": "off",
        }
        return settings | changes

    def command(self, settings: dict[str, Any], *, gpus: int = 1, sdpa: bool = False) -> list[str]:
        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(settings))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        worker = [str(Path(__file__).resolve()), "--worker", str(recipe)] + ["--sdpa"] * sdpa
        return [sys.executable, *(launcher if gpus > 1 else []), *worker]

    def train(self, name: str, *, gpus: int = 1, sdpa: bool = False) -> list[dict]:
        settings = self.settings(name)
        shutil.rmtree(settings["output_dir"], ignore_errors=True)
        self.run(self.command(settings, gpus=gpus, sdpa=sdpa))
        return self.finish(name)

    def run(self, command: list[str]) -> None:
        done = subprocess.run(command, env=environment(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")

    def finish(self, name: str) -> list[dict]:
        """The metrics; the weights go, so that the disk holds one run at a time."""
        rows = read_metrics(self.folder / name / "metrics.jsonl")
        shutil.rmtree(self.folder / name)
        return rows

    def killed(self, name: str) -> list[dict]:
        """SIGKILL once the step after the first save is logged, then the same command again."""
        settings = self.settings(name)
        command = self.command(settings)
        process = subprocess.Popen(
            command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        file = self.folder / name / "metrics.jsonl"
        while len(read_metrics(file)) <= 10 and process.poll() is None:
            time.sleep(0.01)
        process.kill()
        process.wait()
        if len(read_metrics(file)) >= STEPS:
            raise RuntimeError("the run ended before it was killed")
        self.run(command)
        return self.finish(name)


def environment() -> dict[str, str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests/tools")])
    offline = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    return {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | offline


def compare(name: str, got: list[dict], want: list[dict]) -> Row:
    if [r["step"] for r in got] != [r["step"] for r in want] or len(got) != STEPS:
        return Row(name, f"{len(got)} steps against {len(want)}", False)
    worst = {}
    for key in KEYS:
        # relative to the log-probs: the loss is a difference of two and may pass through 0
        scale = [abs(w["logps/chosen" if key == "loss" else key]) for w in want]
        pairs = zip(got, want, scale, strict=True)
        worst[key] = max(abs(g[key] - w[key]) / s for g, w, s in pairs)
    passed = all(worst[key] <= TOLERANCE[key] for key in KEYS)
    return Row(name, ", ".join(f"{key} {off:.1e}" for key, off in worst.items()), passed)


def memory(bench: Bench, rows: list[dict], gpus: int) -> Row:
    planned = Planner(TrainConfig(**bench.settings("plan"))).memory(gpus)
    measured = max(row["memory/peak_gib"] for row in rows)
    text = f"measured {measured:.1f} GiB, planned {planned.peak / GIB:.1f} GiB"
    if bench.rehearse:
        return Row(f"peak memory, {gpus} GPU", f"{text} (rehearsal: not compared)", True)
    return Row(f"peak memory, {gpus} GPU", text, abs(planned.peak / GIB / measured - 1) <= 0.10)


def check(rehearse: bool) -> tuple[str, bool]:
    """(markdown, whether all passed)."""
    gpus = torch.cuda.device_count()
    flash = find_spec("flash_attn") is not None and not rehearse
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), rehearse)
        straight = bench.train("straight")
        rows = [memory(bench, straight, 1)]
        if flash:
            rows.append(compare("FlashAttention, SDPA", straight, bench.train("sdpa", sdpa=True)))
        elif rehearse:
            rows.append(compare("the same run twice", straight, bench.train("sdpa", sdpa=True)))
        else:
            rows.append(Row("FlashAttention, SDPA", "flash-attn is not installed: SDPA only", True))
        rows.append(compare("SIGKILL and resume", bench.killed("killed"), straight))
        ranks = 2 if rehearse else gpus
        if ranks > 1:
            many = bench.train("many", gpus=ranks)
            rows.append(compare(f"FSDP2 on {ranks} ranks, 1 rank", many, straight))
            if not rehearse:
                rows.append(memory(bench, many, ranks))
    layers = load_model_config(TrainConfig(**bench.settings("plan"))).num_hidden_layers
    speed = sum(row["tokens_per_second"] for row in straight[5:]) / (STEPS - 5)
    mfu = straight[-1].get("mfu")
    about = f"{STEPS} REDI steps, {layers} blocks, traces up to {bench.length:,} tokens"
    about += f": {speed:,.0f} tokens/s" + (f", MFU {mfu:.0%}" if mfu else "")
    lines = [
        "\n## Trainer\n",
        f"{about}. Differences are relative, the largest over steps.\n",
        "| check | result | passed |", "|---|---|---|",
        *(f"| {row.name} | {row.result} | {'yes' if row.passed else 'NO'} |" for row in rows),
    ]  # fmt: skip
    return "\n".join(lines) + "\n", all(row.passed for row in rows)


def worker(recipe: str, sdpa: bool) -> None:
    from redi import attention, distributed
    from redi.train import train

    if sdpa:
        attention._flash_varlen = lambda: None
    try:
        train(recipe)
    finally:
        distributed.teardown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rehearse", action="store_true")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--sdpa", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args.worker, args.sdpa)
        return 0
    if not args.rehearse and not torch.cuda.is_available():
        print("no GPU here; `--rehearse` tries the script itself on a CPU")
        return 2
    text, passed = check(args.rehearse)
    print(text)
    return not passed


if __name__ == "__main__":
    sys.exit(main())
