"""Both demo tasks over several seeds: the tables of docs/results.md.

    python bench/demo_seeds.py --seeds 1 2 3 4 --output_dir runs/seeds

Every seed has its own problems, teacher traces, pretraining, SFT model, arms and samples, and its
own folder. What is done is skipped, so the command can be interrupted and repeated.

One more model is trained than the recipes say, `own`: the SFT model goes on with right samples of
its own, one a problem. It sees no wrong trace: a second control, stronger than the recipes' one.
"""

import argparse
import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from redi.config import EvalConfig, RunConfig, TrainConfig, load_config
from redi.data.arithmetic import is_leap
from redi.data.read import read_rows
from redi.evaluate import evaluate
from redi.monitor import read_metrics
from redi.report import Table
from redi.results import EvalResult, load_result, paired_difference
from redi.run import run
from redi.train import train

# Student's t, 97.5% quantile, by degrees of freedom.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}
OWN_RATE = 3e-4  # best of 1e-4, 3e-4, 1e-3 on the demo's validation split, seed 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", nargs="+", default=["recipes/demo.yaml", "recipes/slip.yaml"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3, 4])
    parser.add_argument("--output_dir", type=Path, default=Path("runs/seeds"))
    options = parser.parse_args()
    folders: dict[str, list[Path]] = {recipe: [] for recipe in options.recipes}
    for seed in options.seeds:
        for recipe in options.recipes:
            folder = options.output_dir / f"{Path(recipe).stem}-{seed}"
            config = load_config(RunConfig, recipe, {"seed": seed, "output_dir": str(folder)})
            run(config)
            own(config, folder)
            folders[recipe].append(folder)
    for recipe in options.recipes:
        config = load_config(RunConfig, recipe, {})
        print(
            table(recipe, ["sft", *config.arms, "own"], config.baseline or "sft", folders[recipe])
        )


def own(config: RunConfig, folder: Path) -> None:
    """Samples the SFT model on its training problems; trains on the first right sample of each."""
    train_file, test_file = (str(folder / "task" / name) for name in ("train.jsonl", "test.jsonl"))
    common = {"num_samples": 4, "max_new_tokens": 64, "batch_size": 1000, "seed": config.seed}
    sampling = EvalConfig(dataset_name=train_file, temperature=1.0, top_p=1.0, **common)
    evaluate(folder / "sft", sampling, folder / "own-samples")
    rows = [json.loads(line) for line in (folder / "own-samples" / "generations.jsonl").open()]
    right = {}
    for row in sorted(rows, key=lambda row: (row["problem"], row["sample"])):
        if row["finished"] and row["verdict"] == "correct":
            right.setdefault(row["problem"], row["text"])
    problems = [row["prompt"] for _, row in read_rows(train_file)]
    with (folder / "own.jsonl").open("w") as file:
        for i, text in sorted(right.items()):
            prompt = [{"role": "user", "content": problems[i]}]
            completion = [{"role": "assistant", "content": text}]
            file.write(json.dumps({"prompt": prompt, "completion": completion}) + "\n")
    settings = {
        "model_name_or_path": str(folder / "sft"),
        "dataset_name": str(folder / "own.jsonl"),
        "output_dir": str(folder / "own"),
        "objective": "sft",
        "learning_rate": OWN_RATE,
        "seed": config.seed,
    }
    train(TrainConfig(**(config.defaults | settings)), name="own")
    evaluate(folder / "own", EvalConfig(dataset_name=test_file, **common), folder / "eval" / "own")


def table(title: str, models: list[str], baseline: str, folders: list[Path]) -> str:
    """Markdown: means over seeds with 95% t-intervals, then each seed with its own interval."""
    results = {m: [load_result(folder / "eval" / m) for folder in folders] for m in models}
    means, seeds = [], []
    for model in models:
        pairs = list(zip(results[model], results[baseline], strict=True))
        logs = [read_metrics(folder / model / "metrics.jsonl")[-5:] for folder in folders]
        last = [row for rows in logs for row in rows]
        working = [ways(folder / "eval" / model) for folder in folders]
        means.append([
            model,
            interval([a.pass_at_1 for a, _ in pairs]),
            interval([a.pass_at_1 - b.pass_at_1 for a, b in pairs]) if model != baseline else "",
            *(f"{100 * mean(share):.0f}" for share in zip(*working, strict=True)),
            f"{mean(float(a.num_tokens_PN.mean()) for a, _ in pairs):.1f}",
            *(
                f"{mean(row[key] for row in last):.2f}" if key in last[0] else ""
                for key in ("logps/chosen", "logps/rejected")
            ),
        ])  # fmt: skip
        seeds.append([model, *(each(a, b, model != baseline) for a, b in pairs)])
    problems, samples = results[baseline][0].correct_PN.shape
    over_seeds = Table(
        ["model", "pass@1", f"minus {baseline}", "leaps", "steps", "tokens", "chosen", "rejected"],
        means,
        f"{len(folders)} seeds, {problems} held-out problems x {samples} samples each; in percent, "
        "± is a 95% t-interval over seeds. leaps: share of samples that take two terms in some "
        "step; steps: how many of the others are right; tokens: mean length; chosen, rejected: "
        "log-probs per token at the end of training.",
    )
    by_seed = Table(
        ["model", *(folder.name for folder in folders)],
        seeds,
        f"pass@1 in percent (95% bootstrap interval over problems of the difference to {baseline})",
    )
    return f"### {title}\n\n{over_seeds.markdown()}\n{by_seed.markdown()}"


def interval(shares: list[float]) -> str:
    """In percent: the mean over seeds and the half-width of its 95% t-interval."""
    percent = [100 * share for share in shares]
    if len(percent) < 2:
        return f"{mean(percent):.1f}"
    half = T975[len(percent) - 1] * stdev(percent) / sqrt(len(percent))
    return f"{mean(percent):.1f} ± {half:.1f}"


def each(result: EvalResult, baseline: EvalResult, compare: bool) -> str:
    if not compare:
        return f"{100 * result.pass_at_1:.1f}"
    difference = paired_difference(result, baseline)
    low, high = 100 * difference.low, 100 * difference.high
    return f"{100 * result.pass_at_1:.1f} ({low:+.1f} to {high:+.1f})"


def ways(evaluation: Path) -> tuple[float, float]:
    """Share of samples that take two terms in some step, and of right ones among the others."""
    rows = [json.loads(line) for line in (evaluation / "generations.jsonl").open()]
    others = [row for row in rows if not is_leap(row["text"])]
    right = [row["finished"] and row["verdict"] == "correct" for row in others]
    return 1 - len(others) / len(rows), mean(right) if right else 0.0


if __name__ == "__main__":
    main()
