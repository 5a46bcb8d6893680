"""Both demo tasks over several seeds: the tables of docs/results.md.

    python bench/demo_seeds.py --seeds 1 2 3 4 --output_dir runs/seeds

Every seed has its own problems, teacher traces, pretraining, SFT model, arms and samples, and its
own folder. What is done is skipped, so the command can be interrupted and repeated.
"""

import argparse
import json
from math import sqrt
from pathlib import Path
from statistics import mean, stdev

from redi.config import RunConfig, load_config
from redi.data.arithmetic import is_leap
from redi.monitor import read_metrics
from redi.report import Table
from redi.results import EvalResult, load_result, paired_difference
from redi.run import run

# Student's t, 97.5% quantile, by degrees of freedom.
T975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


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
            run(load_config(RunConfig, recipe, {"seed": seed, "output_dir": str(folder)}))
            folders[recipe].append(folder)
    for recipe in options.recipes:
        config = load_config(RunConfig, recipe, {})
        print(table(recipe, ["sft", *config.arms], config.baseline or "sft", folders[recipe]))


def table(title: str, models: list[str], baseline: str, folders: list[Path]) -> str:
    """Markdown: means over seeds with 95% t-intervals, then each seed with its own interval."""
    results = {m: [load_result(folder / "eval" / m) for folder in folders] for m in models}
    means, seeds = [], []
    for model in models:
        pairs = list(zip(results[model], results[baseline], strict=True))
        last = [read_metrics(folder / model / "metrics.jsonl")[-1] for folder in folders]
        means.append([
            model,
            interval([a.pass_at_1 for a, _ in pairs]),
            interval([a.pass_at_1 - b.pass_at_1 for a, b in pairs]) if model != baseline else "",
            f"{mean(leaps(folder / 'eval' / model) for folder in folders):.2f}",
            f"{mean(float(a.num_tokens_PN.mean()) for a, _ in pairs):.1f}",
            *(
                f"{mean(row[key] for row in last):.2f}" if key in last[0] else ""
                for key in ("logps/chosen", "logps/rejected")
            ),
        ])  # fmt: skip
        seeds.append([model, *(each(a, b, model != baseline) for a, b in pairs)])
    problems, samples = results[baseline][0].correct_PN.shape
    over_seeds = Table(
        ["model", "pass@1", f"minus {baseline}", "leaps", "tokens", "chosen", "rejected"],
        means,
        f"{len(folders)} seeds, {problems} held-out problems x {samples} samples each; ± is a 95% "
        "t-interval over seeds. leaps: share of samples that take two terms in a step. chosen, "
        "rejected: log-probs per token of the last training step.",
    )
    by_seed = Table(
        ["model", *(folder.name for folder in folders)],
        seeds,
        f"pass@1 (95% bootstrap interval over problems of the difference to {baseline})",
    )
    return f"### {title}\n\n{over_seeds.markdown()}\n{by_seed.markdown()}"


def interval(values: list[float]) -> str:
    """Mean over seeds and the half-width of its 95% t-interval."""
    if len(values) < 2:
        return f"{mean(values):.3f}"
    return f"{mean(values):.3f} ± {T975[len(values) - 1] * stdev(values) / sqrt(len(values)):.3f}"


def each(result: EvalResult, baseline: EvalResult, compare: bool) -> str:
    if not compare:
        return f"{result.pass_at_1:.3f}"
    difference = paired_difference(result, baseline)
    return f"{result.pass_at_1:.3f} ({difference.low:+.3f} to {difference.high:+.3f})"


def leaps(evaluation: Path) -> float:
    """Share of samples that take more than one term in some step."""
    rows = [json.loads(line) for line in (evaluation / "generations.jsonl").open()]
    return mean(is_leap(row["text"]) for row in rows)


if __name__ == "__main__":
    main()
