"""Where the time of a training step goes, and how much of it is our own code.

    python bench/profile_step.py                      the bench model of trainer_table.py, REDI
    python bench/profile_step.py --objective sft --steps 8 --tokens 1024

cProfile over `Loop.step`, the first step left out. "Ours, beside model and loss" is what a step
spends in the trainer itself: waiting for packs, counting, metrics, Python between the calls.
"""

import argparse
import cProfile
import pstats
import tempfile
import time
from pathlib import Path

import torch
import trainer_table

# Parts of a step by the function that holds them: (end of the file's name, function).
PARTS = {
    "forward, loss included": ("redi/training/model.py", "forward"),
    "  of it attention": ("redi/training/attention.py", "varlen_attention"),
    "  of it the loss": ("redi/training/objectives.py", "objective"),
    "backward": ("torch/_tensor.py", "backward"),
    "clipping": ("torch/nn/utils/clip_grad.py", "clip_grad_norm_"),
    "optimizer": ("torch/optim/optimizer.py", "wrapper"),
    "zero_grad": ("torch/optim/optimizer.py", "zero_grad"),
}
OURS = "ours, beside model and loss"
WAITING = "  of it waiting for packs"


def profile_steps(
    folder: Path, objective: str, tokens: int, steps: int, cpu_time: bool
) -> pstats.Stats:
    from redi.config import TrainConfig
    from redi.recipe import make_config
    from redi.training.distributed import setup
    from redi.training.logging import TrainState
    from redi.training.loop import Loop, load_data
    from redi.training.model import load_model, load_tokenizer

    trainer_table.make_input(folder, trainer_table.Case())
    settings = {
        "model_name_or_path": str(folder / "model"),
        "dataset_name": str(folder / "pairs.jsonl"),
        "output_dir": str(folder / "out"),
        "objective": objective,
        "train_batch_size": trainer_table.BATCH,
        "max_tokens_per_batch": tokens,
        "max_steps": steps + 1,
    }
    config = make_config(TrainConfig, settings, "profile_step")
    data = load_data(config, load_tokenizer(config))
    loop = Loop(config, load_model(config), data, {}, setup())
    state = TrainState(total_steps=steps + 1)
    loop.step(state)
    profile = cProfile.Profile(time.process_time if cpu_time else time.perf_counter)
    for _ in range(steps):
        profile.runcall(loop.step, state)
    loop.work.close()
    return pstats.Stats(profile)


def shares(stats: pstats.Stats) -> dict[str, float]:
    """Seconds by part, and by part of a part."""

    def cumulative(file: str, function: str) -> float:
        rows = stats.stats.items()  # type: ignore[attr-defined]
        return sum(v[3] for k, v in rows if k[0].endswith(file) and k[2] == function)

    seconds = {"step": cumulative("redi/training/loop.py", "step")}
    seconds |= {part: cumulative(*place) for part, place in PARTS.items()}
    if not seconds["  of it the loss"]:  # SFT's objective is a plain function
        seconds["  of it the loss"] = cumulative("redi/training/objectives.py", "sft")
    whole_parts = sum(v for k, v in seconds.items() if not k.startswith(("  ", "step")))
    seconds[OURS] = seconds["step"] - whole_parts
    seconds[WAITING] = cumulative("redi/training/prefetch.py", "get")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--objective", default="redi")
    parser.add_argument("--tokens", type=int, default=trainer_table.TOKENS, help="a pack")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--cpu-time", action="store_true", help="for a machine that others use too")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        stats = profile_steps(Path(folder), args.objective, args.tokens, args.steps, args.cpu_time)
    seconds = shares(stats)
    print(f"{torch.get_num_threads()} threads, {args.objective}, {args.steps} steps")
    print("\n| part of a step | share |\n| --- | ---: |")
    for part, value in seconds.items():
        label = part if not part.startswith("  ") else f"&nbsp; {part.strip()}"
        print(f"| {label} | {value / seconds['step']:.1%} |")


if __name__ == "__main__":
    main()
