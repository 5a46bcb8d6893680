"""The trainer on a GPU; `python bench/gpu_check_trainer.py [--rehearse]` alone is the long form.

REDI steps of a Qwen2.5 shape with random weights: FlashAttention against SDPA, peak memory beside
the plan's, SIGKILL and resume, and FSDP2 over NCCL where there are several GPUs. bench/gpu_check.py
takes 6 steps of 0.5B and traces up to 8k tokens, about 2 minutes; alone it is 20 steps of 1.5B and
32k, about 10. No network, no files but its own, under a temporary folder (8 or 30 GB).
"""

import argparse
import atexit
import contextlib
import functools
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from gpu_check_rows import CannotRun, Row, Values, environment

NEEDS = ("torch", "numpy", "jinja2", "pyarrow", "pydantic", "rich", "safetensors", "tokenizers",
         "transformers", "typer", "yaml")  # fmt: skip
QWEN = {"model_type": "qwen2", "hidden_size": 1536, "intermediate_size": 8960,
        "num_hidden_layers": 28, "num_attention_heads": 12, "num_key_value_heads": 2,
        "vocab_size": 151936, "max_position_embeddings": 32768, "rope_theta": 300000.0,
        "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 3,
        "pad_token_id": 0}  # fmt: skip
KEYS = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
# Log-probs of random weights are about -12; bf16 attention in another order moves them by its
# rounding (2^-8) averaged over thousands of tokens. Gradient norms see the rounding undamped.
TOLERANCE = {"loss": 5e-3, "logps/chosen": 5e-3, "logps/rejected": 5e-3, "grad_norm": 2e-2}


@dataclass(frozen=True)
class Size:
    """How much is trained. It saves once on the way, at `save`."""

    length: int
    steps: int
    save: int
    seconds: float  # a run, on an H200
    shape: dict[str, int]  # beside QWEN's


LONG = Size(32768, 20, 10, 100.0, {})
SHORT = Size(8192, 6, 3, 30.0, {"hidden_size": 896, "intermediate_size": 4864,
                                "num_hidden_layers": 24, "num_attention_heads": 14})  # fmt: skip
REHEARSAL = Size(300, 6, 3, 10.0, {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 128,
                                   "num_hidden_layers": 2, "num_attention_heads": 4})  # fmt: skip


class Bench:
    def __init__(self, folder: Path, size: Size, gpus: int):
        import tiny

        self.folder, self.size, self.gpus = folder, size, gpus
        tiny.save_tokenizer(folder / "tokenizer")
        tiny.write_jsonl(folder / "pairs.jsonl", self.pairs())

    def pairs(self) -> list[dict]:
        """Uneven lengths, the longest as long as allowed; a character is a token."""
        draw, rows = random.Random(0), []
        length = self.size.length
        for i in range(self.size.steps):
            sizes = (length - 40, draw.randrange(length // 8, length // 2))
            chosen, rejected = ("".join(draw.choices("0123456789+=", k=n)) for n in sizes)
            prompt = [{"role": "user", "content": f"{i}+{i}=?"}]
            sides = {"chosen": chosen, "rejected": rejected}
            rows.append({"id": f"pair-{i}", "prompt": prompt} | {
                k: [{"role": "assistant", "content": v}] for k, v in sides.items()})  # fmt: skip
        return rows

    def settings(self, name: str, **changes: Any) -> dict[str, Any]:
        settings = {
            "architecture": QWEN | self.size.shape,
            "tokenizer_name_or_path": str(self.folder / "tokenizer"),
            "dataset_name": str(self.folder / "pairs.jsonl"),
            "output_dir": str(self.folder / name),
            "max_length": self.size.length,
            "max_tokens_per_batch": self.size.length,
            "train_batch_size": 2,
            "max_steps": self.size.steps,
            "learning_rate": 1e-6,
            "gradient_checkpointing": "selective",
            "save_steps": self.size.save,
            "save_total_limit": 1,
            "collapse_guard": "off",
        }
        return settings | changes

    def command(self, settings: dict[str, Any], *, gpus: int = 1, sdpa: bool = False) -> list[str]:
        import yaml

        recipe = self.folder / "recipe.yaml"
        recipe.write_text(yaml.safe_dump(settings))
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(gpus)]
        worker = [str(Path(__file__).resolve()), "--worker", str(recipe)] + ["--sdpa"] * sdpa
        return [sys.executable, *(launcher if gpus > 1 else []), *worker]

    @functools.cached_property
    def straight(self) -> list[dict]:
        """The run that the others are held against."""
        return self.train("straight")

    def train(self, name: str, *, gpus: int = 1, sdpa: bool = False) -> list[dict]:
        settings = self.settings(name)
        shutil.rmtree(settings["output_dir"], ignore_errors=True)
        self.run(self.command(settings, gpus=gpus, sdpa=sdpa))
        return self.finish(name)

    def run(self, command: list[str]) -> None:
        done = subprocess.run(command, env=offline(), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")

    def finish(self, name: str) -> list[dict]:
        """The metrics; the weights go, so that the disk holds one run at a time."""
        from redi.training.logging import read_metrics

        rows = read_metrics(self.folder / name / "metrics.jsonl")
        shutil.rmtree(self.folder / name)
        return rows

    def killed(self, name: str) -> list[dict]:
        """SIGKILL once the step after the first save is logged, then the same command again."""
        from redi.training.logging import read_metrics

        settings = self.settings(name)
        command = self.command(settings)
        process = subprocess.Popen(
            command, env=offline(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        file = self.folder / name / "metrics.jsonl"
        try:
            while len(read_metrics(file)) <= self.size.save and process.poll() is None:
                time.sleep(0.01)
        finally:
            ended = process.poll()
            process.kill()
            process.wait()
        done = len(read_metrics(file))
        if ended is not None or not self.size.save < done < self.size.steps:
            raise RuntimeError(f"not killed on the way: exit code {ended}, {done} steps were done")
        self.run(command)
        return self.finish(name)


def offline() -> dict[str, str]:
    """Of a training run, also in a rehearsal: the trainer takes its own way on a CPU."""
    own = environment(HF_HUB_OFFLINE="1")
    own.pop("TRITON_INTERPRET", None)
    return own


def compare(got: list[dict], want: list[dict], steps: int) -> tuple[Values, bool]:
    if [r["step"] for r in got] != [r["step"] for r in want] or len(got) != steps:
        return {"steps": len(got), "of": len(want)}, False
    worst = {}
    for key in KEYS:
        # relative to the log-probs: the loss is a difference of two and may pass through 0
        scale = [abs(w["logps/chosen" if key == "loss" else key]) for w in want]
        pairs = zip(got, want, scale, strict=True)
        worst[key] = max(abs(g[key] - w[key]) / s for g, w, s in pairs)
    return worst, all(worst[key] <= TOLERANCE[key] for key in KEYS)


def memory(bench: Bench, rows: list[dict], gpus: int, rehearse: bool) -> tuple[Values, bool]:
    """Measured within a tenth of the plan; a rehearsal's CPU has no such measure."""
    from redi.config import TrainConfig
    from redi.training.plan import GIB, Planner

    planned = Planner(TrainConfig(**bench.settings("plan"))).memory(gpus).peak / GIB
    measured = max(row["memory/peak_gib"] for row in rows)
    values = {"measured GiB": measured, "planned GiB": planned}
    return values, rehearse or abs(planned / measured - 1) <= 0.10


def speed(bench: Bench) -> tuple[Values, bool]:
    rows = bench.straight
    steady = rows[len(rows) // 2 :]
    rate = sum(row["tokens_per_second"] for row in steady) / len(steady)
    return {"steps": len(rows), "tokens/s": rate, "mfu": rows[-1].get("mfu") or ""}, True


@contextlib.contextmanager
def checks(size: Size, rehearse: bool) -> Iterator[dict[str, Callable[[], tuple[Values, bool]]]]:
    """Name -> check; all share one temporary folder and one straight run."""
    import torch

    with tempfile.TemporaryDirectory() as folder:
        gpus = torch.cuda.device_count()
        bench = Bench(Path(folder), size, gpus)
        again = lambda name, **options: compare(
            bench.train(name, **options), bench.straight, size.steps
        )
        found = {
            "a straight run": lambda: speed(bench),
            "peak memory": lambda: memory(bench, bench.straight, 1, rehearse),
            "SIGKILL and resume": lambda: compare(
                bench.killed("killed"), bench.straight, size.steps
            ),
        }
        if rehearse:
            found["the same run twice"] = lambda: again("twice")
        elif find_spec("flash_attn"):
            found["FlashAttention, SDPA"] = lambda: again("sdpa", sdpa=True)
        ranks = 2 if rehearse else gpus
        if ranks > 1:
            found[f"FSDP2 on {ranks} ranks, 1 rank"] = lambda: again("many", gpus=ranks)
        yield found


def rows(part: str, rehearse: bool) -> list[Row]:
    missing = [name for name in NEEDS if find_spec(name) is None]
    if missing:
        return [Row("all of it", functools.partial(cannot, ", ".join(missing)), seconds=0.0)]
    size = REHEARSAL if rehearse else SHORT
    context = contextlib.ExitStack()
    atexit.register(context.close)
    made = context.enter_context(checks(size, rehearse))
    return [Row(name, run, seconds=0.0 if name == "peak memory" else size.seconds)
            for name, run in made.items()]  # fmt: skip


def cannot(missing: str) -> tuple[Values, bool]:
    raise CannotRun(missing)


def worker(recipe: str, sdpa: bool) -> None:
    from redi.training import attention, distributed
    from redi.training.loop import train

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
    import torch

    if not args.rehearse and not torch.cuda.is_available():
        print("no GPU here; `--rehearse` tries the script itself on a CPU")
        return 2
    good = True
    with checks(REHEARSAL if args.rehearse else LONG, args.rehearse) as found:
        for name, run in found.items():
            values, passed = run()
            good &= passed
            print(f"{'passed' if passed else 'FAILED'} {name}: {values}", flush=True)
    return not good


if __name__ == "__main__":
    sys.exit(main())
