"""Training with exact and with fast gradients, same seeds: docs/fast-mode.md quotes this.

    python bench/fast_training.py runs/gsm8k-smollm2-input runs/fast-training --demo 0 1 2 3 4

The input is what recipes/gsm8k_smollm2.py writes. Every run is SmolLM2-135M, SFT on GSM8K's
solutions, then REDI on right and wrong ones: `exact` and `fast` (--tolerance) for each seed, which
shuffles the data, and `repacked`, exact runs (--repacked: of which seeds) in smaller micro-batches.
What `repacked` differs by is rounding alone; what two seeds differ by is chance. --demo trains
recipes/demo.yaml both ways and evaluates it. Whatever is finished is kept: the same command goes
on, then prints the tables and writes results.json and curves.png. Steps, sizes and rates are short
on purpose: STAGES.

Rows of the (tied) embedding by what reaches them: targets; other words of the data; rows that were
active in some block of a fast run; rows that never were, which only the stand-in for dW moves.
"""

import argparse
import json
import math
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from activations import collect
from redi_kernels import fast
from safetensors.torch import load_file
from torch import Tensor

from redi.config import DataConfig, RunConfig, TrainConfig
from redi.data.build import build
from redi.recipe import load_config, make_config
from redi.run import run as run_recipe
from redi.training.logging import Callback, TrainState, read_metrics, say
from redi.training.loop import load_data, load_tokenizer, train

LONGEST = 160  # tokens; longer traces are left out
HELD_OUT = 32  # pairs
STAGES: dict[str, dict[str, Any]] = {
    "sft": {"objective": "sft", "learning_rate": 1e-4, "max_steps": 24, "train_batch_size": 6},
    "redi": {"objective": "redi", "learning_rate": 2e-5, "max_steps": 16, "train_batch_size": 4},
}
CLASSES = ("targets", "words", "active", "never")
EMBEDDING = "model.embed_tokens.weight"


@dataclass(frozen=True)
class Run:
    kind: str  # exact, fast, repacked
    seed: int

    @property
    def name(self) -> str:
        return f"{self.kind}-{self.seed}"

    def train(self, args: argparse.Namespace) -> None:
        start = args.input / "smollm2"
        for stage, settings in STAGES.items():
            folder = args.output_dir / self.name / stage
            common = {
                "model_name_or_path": str(start),
                "dataset_name": str(args.output_dir / DATA[stage]),
                "eval_dataset_name": str(args.output_dir / "heldout.jsonl"),
                "output_dir": str(folder),
                "seed": self.seed,
                "bf16": not args.fp32,
                "max_length": LONGEST,
                "max_tokens_per_batch": 512 if self.kind == "repacked" else 2048,
                "loss_tolerance": args.tolerance if self.kind == "fast" else 0.0,
                "collapse_guard": "off",
                "save_steps": 12,
                "save_total_limit": 1,
            }
            config = make_config(TrainConfig, common | settings, stage)
            with Watch(folder) as watch:
                train(config, [watch], name=f"{self.name} {stage}")
            for checkpoint in folder.glob("checkpoint-*"):  # 1.6 GB each
                shutil.rmtree(checkpoint)
            start = folder


DATA = {"sft": "sft.jsonl", "redi": "data/pairs.parquet"}


class Watch(Callback):
    """What fast mode did in each step, into fast.pt beside the run's metrics."""

    def __init__(self, folder: Path):
        self.file = folder / "fast.pt"
        self.rows: list[dict[str, float]] = []
        self.masks: dict[str, Tensor] = {}
        self.reports: list[fast.Report] = []

    def __enter__(self) -> "Watch":
        self.kept = fast.gradients, fast._Sparse._active
        gradients, active = self.kept

        def note_report(x: Tensor, w: Tensor, y: Tensor, *rest: Any) -> Any:
            out = gradients(x, w, y, *rest)
            self.reports.append(out[-1])
            self.mark("targets", y, len(w))
            return out

        def note_active(sparse: Any, start: int, x: Tensor, y: Tensor, rows: Tensor, *rest: Any):
            self.mark("active", rows, len(sparse.blocks.w_VH))
            return active(sparse, start, x, y, rows, *rest)

        fast.gradients, fast._Sparse._active = note_report, note_active
        return self

    def __exit__(self, *_: Any) -> None:
        fast.gradients, fast._Sparse._active = self.kept

    def mark(self, name: str, rows: Tensor, num_rows: int) -> None:
        self.masks.setdefault(name, torch.zeros(num_rows, dtype=torch.bool))[rows] = True

    def on_train_begin(self, state: TrainState) -> None:
        if state.step and self.file.exists():
            saved = torch.load(self.file)
            self.rows, self.masks = saved["rows"][: state.step], saved["masks"]

    def on_step_end(self, state: TrainState) -> None:
        if not self.reports:
            return
        row = {name: _mean(getattr(r, name) for r in self.reports) for name in ("active", "error")}
        self.rows.append(row)
        self.reports.clear()
        torch.save({"rows": self.rows, "masks": self.masks}, self.file)


def _mean(values: Any) -> float:
    return float(torch.stack(list(values)).mean())


def prepare(args: argparse.Namespace) -> None:
    args.output_dir.mkdir(parents=True, exist_ok=True)
    shutil.copy(args.input / "sft.jsonl", args.output_dir / "sft.jsonl")
    pairs = (args.input / "heldout.jsonl").read_text().splitlines()
    short = sorted(pairs, key=len)[:HELD_OUT]
    (args.output_dir / "heldout.jsonl").write_text("\n".join(short) + "\n")
    data = DataConfig(path=str(args.input / "traces.jsonl"))
    tokenizer = load_tokenizer(_any_config(args))
    build(data, args.output_dir / "data", tokenizer=tokenizer)


def _any_config(args: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        model_name_or_path=str(args.input / "smollm2"),
        dataset_name=str(args.output_dir / "data/pairs.parquet"),
        output_dir=str(args.output_dir),
        max_length=LONGEST,
    )


def result_of(run: Run, args: argparse.Namespace) -> dict[str, Any]:
    """What a finished run shows but for its weights; kept in its folder."""
    file = args.output_dir / run.name / "result.json"
    if file.exists():
        return json.loads(file.read_text())
    result: dict[str, Any] = {}
    for stage in STAGES:
        folder = args.output_dir / run.name / stage
        result[stage] = {"steps": read_metrics(folder / "metrics.jsonl")}
        if (folder / "fast.pt").exists():
            rows = torch.load(folder / "fast.pt")["rows"]
            result[stage]["fast"] = {name: [row[name] for row in rows] for name in rows[0]}
    result["other_text"] = nll(str(folder), args)
    file.write_text(json.dumps(result, indent=1))
    return result


def nll(model: str, args: argparse.Namespace) -> dict[str, float]:
    """Of other text: nats a token, and of those tokens that the training never had as targets."""
    if args.other is None:
        return {}
    made = collect(model, args.other, 2048)
    nll_T = F.cross_entropy(made["x_TH"] @ made["w_VH"].T, made["y_T"], reduction="none")
    is_new_T = ~classes(args)["targets"][made["y_T"]]
    return {"all": float(nll_T.mean()), "new": float(nll_T[is_new_T].mean())}


def classes(args: argparse.Namespace) -> dict[str, Tensor]:
    """[V] masks over both stages of all fast runs: of CLASSES, each row is in one."""
    files = sorted(args.output_dir.glob("fast-*/*/fast.pt"))
    masks = [torch.load(file)["masks"] for file in files]
    targets, active = (
        torch.stack([m[name] for m in masks]).any(dim=0) for name in ("targets", "active")
    )
    words_V = torch.zeros_like(targets)
    for stage, settings in STAGES.items():
        data = {"dataset_name": str(args.output_dir / DATA[stage])}
        config = _any_config(args).model_copy(update=data | {"objective": settings["objective"]})
        for example in load_data(config, load_tokenizer(config)).traces:
            for trace in example:
                words_V[torch.from_numpy(trace.input_ids).long()] = True
    words_V &= ~targets
    active &= ~targets & ~words_V
    return dict(
        zip(CLASSES, (targets, words_V, active, ~(targets | words_V | active)), strict=True)
    )


def drift(run: Run, stage: str, args: argparse.Namespace) -> Tensor:
    """[V, H]: how a stage moved the embedding."""
    before = args.input / "smollm2" if stage == "sft" else args.output_dir / run.name / "sft"
    after = args.output_dir / run.name / stage
    return _embedding(after) - _embedding(before)


def _embedding(folder: Path) -> Tensor:
    return load_file(folder / "model.safetensors")[EMBEDDING].float()


def compare(a_VH: Tensor, b_VH: Tensor, rows_V: Tensor) -> dict[str, float]:
    a, b = a_VH[rows_V], b_VH[rows_V]
    return {
        "rows": len(a),
        "moved": float(a.square().mean().sqrt()),
        "apart": float((a - b).norm() / a.norm()),
        "cosine": float(F.cosine_similarity(a, b, dim=1).median()),
        "signs": float((a.sign() == b.sign()).float().mean()),
    }


def drifts(runs: list[Run], args: argparse.Namespace) -> list[dict[str, Any]]:
    """Drifts of fast and repacked runs against the exact run of their seed, those of other seeds'
    exact runs against the first's."""
    of_class, rows = classes(args), []
    for stage in STAGES:
        first = drift(runs[0], stage, args)
        for run in runs[1:]:
            own = runs[0] if run.kind == "exact" else Run("exact", run.seed)
            base = first if own == runs[0] else drift(own, stage, args)
            other = drift(run, stage, args)
            for name, rows_V in of_class.items():
                row = {"stage": stage, "run": run.name, "against": own.name, "class": name}
                rows.append(row | compare(base, other, rows_V))
    return rows


def demo(seed: int, args: argparse.Namespace) -> dict[str, Any]:
    """recipes/demo.yaml with one arm, exact and fast, from the same pretrained model."""
    results: dict[str, Any] = {}
    for kind in ("exact", "fast"):
        folder = args.output_dir / "demo" / f"{kind}-{seed}"
        recipe = load_config(RunConfig, Path(__file__).parents[1] / "recipes/demo.yaml", {})
        tolerance = {"loss_tolerance": args.tolerance if kind == "fast" else 0.0}
        arm = recipe.arms["redi-0.8"] | tolerance
        changes = {"arms": {"redi-0.8": arm}, "sft": recipe.sft | tolerance, "baseline": None}
        recipe = recipe.model_copy(
            update={**changes, "seed": seed, "output_dir": str(folder)}, deep=True
        )
        if kind == "fast":
            for shared in ("task", "pretrain"):
                source = args.output_dir / "demo" / f"exact-{seed}" / shared
                shutil.copytree(source, folder / shared, dirs_exist_ok=True)
        with Watch(folder) as watch:
            evaluations = run_recipe(recipe, [watch])
        results[kind] = {
            name: {
                "accuracy": evaluation.pass_at_1,
                "last": read_metrics(folder / name / "metrics.jsonl")[-1],
            }
            for name, evaluation in evaluations.items()
        }
        if watch.rows:
            results[kind]["active"] = min(row["active"] for row in watch.rows)
    return results


def table(header: str, rows: list[list[Any]]) -> None:
    """A Markdown table; numbers to four digits."""
    names = header.split(", ")
    print(f"\n| {' | '.join(names)} |\n| :--- {'| ---: ' * (len(names) - 1)}|")
    for row in rows:
        print("| " + " | ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in row) + " |")


def show(content: dict[str, Any]) -> None:
    results = content["runs"]
    rows = []
    for stage in STAGES:
        for name, result in results.items():
            steps, own = result[stage]["steps"], results[f"exact-{name[-1]}"][stage]["steps"]
            apart = [abs(a["loss"] - b["loss"]) for a, b in zip(steps, own, strict=True)]
            last, noted = steps[-1], result[stage].get("fast")
            f = sum(noted["active"]) / len(noted["active"]) if noted else "-"
            held_out = [last.get(f"eval_logps/{side}", "-") for side in ("chosen", "rejected")]
            of_other = result["other_text"] if stage == "redi" else {}
            rows.append([f"{stage}: {name}", f, last["loss"], max(apart), *held_out])
            rows[-1] += [of_other.get(kind, "-") for kind in ("all", "new")]
    table(
        "run, f, last loss, furthest from exact, held-out right, wrong, other text, new words", rows
    )
    keys = ("rows", "moved", "apart", "cosine", "signs")
    drifts = content["drifts"]
    rows = [[f"{d['stage']}: {d['class']}", d["run"], *(d[k] for k in keys)] for d in drifts]
    table("rows of, run, number, moved by (RMS), apart, cosine, same sign", rows)
    rows = []
    for seed, kinds in content["demo"].items():
        for stage in ("sft", "redi-0.8"):
            exact, other = kinds["exact"][stage], kinds["fast"][stage]
            rows.append([f"{seed}: {stage}", kinds["fast"]["active"]])
            rows[-1] += [r[k] for k in ("accuracy",) for r in (exact, other)]
            rows[-1] += [r["last"]["loss"] for r in (exact, other)]
    if rows:
        table("demo seed, least f, accuracy: exact, fast, last loss: exact, fast", rows)


def plot(content: dict[str, Any], path: Path) -> None:
    """How far fast mode leads from exact mode, beside what rounding and the data's order do."""
    import matplotlib.pyplot as plt

    colours = {"repacked": "#009E73", "fast": "#D55E00", "exact": "#999999"}
    names = {"repacked": "exact, repacked", "fast": "fast", "exact": "exact, another seed"}
    runs, first = content["runs"], next(iter(content["runs"]))
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    for name, result in runs.items():
        kind, seed = name.split("-")
        base = first if kind == "exact" else f"exact-{seed}"
        if name != first:
            sides = [
                [r["loss"] for s in STAGES for r in x[s]["steps"]] for x in (result, runs[base])
            ]
            apart = [
                abs(a - b) or math.nan for a, b in zip(*sides, strict=True)
            ]  # first: no step yet
            axes[0].semilogy(range(1, len(apart) + 1), apart, color=colours[kind], alpha=0.7)
    end = len(runs[first]["sft"]["steps"]) + 0.5
    axes[0].axvline(end, color="black", linewidth=0.6)
    axes[0].set(title="distance of the loss from the exact run's", xlabel="step: SFT | REDI")

    held_out = {name: result["redi"]["steps"][-1] for name, result in runs.items()}
    for side, marker in (("chosen", "o"), ("rejected", "s")):
        for name in runs:
            kind, seed = name.split("-")
            points = [held_out[run][f"eval_logps/{side}"] for run in (f"exact-{seed}", name)]
            if kind != "exact":
                axes[1].plot(*points, marker, color=colours[kind], alpha=0.8)
    axes[1].axline([axes[1].get_xlim()[0]] * 2, slope=1, color="black", linewidth=0.6)
    axes[1].annotate("wrong traces", (0.28, 0.07), xycoords="axes fraction", fontsize=9)
    axes[1].annotate("right traces", (0.5, 0.92), xycoords="axes fraction", fontsize=9)
    title = "held-out log-prob after REDI, a point a seed"
    axes[1].set(title=title, xlabel="exact mode", ylabel="fast mode, or repacked")

    kinds = ["repacked", "fast", "exact"]
    for i, stage in enumerate(STAGES):
        for k, kind in enumerate(kinds):
            for c, rows in enumerate(CLASSES):
                signs = [
                    d["signs"]
                    for d in content["drifts"]
                    if (d["stage"], d["class"], d["run"].split("-")[0]) == (stage, rows, kind)
                ]
                x = c + i * (len(CLASSES) + 0.5) + 0.25 * (k - 1)
                axes[2].bar(x, sum(signs) / len(signs), 0.23, color=colours[kind], alpha=0.5)
                axes[2].plot([x] * len(signs), signs, ".", color=colours[kind], markersize=4)
    places = [c + i * (len(CLASSES) + 0.5) for i in range(len(STAGES)) for c in range(len(CLASSES))]
    axes[2].set_xticks(places, CLASSES * len(STAGES), rotation=45)
    axes[2].set(title="embedding: coordinates gone the same way", ylim=(0.5, 1))
    axes[2].set(xlabel="rows of the vocabulary: SFT | REDI")
    handles = [plt.Line2D([], [], color=colours[kind], linewidth=4, alpha=0.7) for kind in kinds]
    figure.legend(handles, [names[k] for k in kinds], loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("input", type=Path)
    parser.add_argument("output_dir", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--repacked", type=int, nargs="+", help="seeds; default: the first")
    parser.add_argument("--tolerance", type=float, default=2.0)
    parser.add_argument("--fp32", action="store_true", help="compute in fp32 instead of bf16")
    parser.add_argument("--other", type=Path, help="text to measure what else the model knows")
    parser.add_argument("--demo", type=int, nargs="*", default=[], help="seeds of the demo's task")
    args = parser.parse_args()
    runs = [Run(kind, seed) for seed in args.seeds for kind in ("exact", "fast")]
    runs += [Run("repacked", seed) for seed in args.repacked or args.seeds[:1]]
    prepare(args)
    for run in runs:
        run.train(args)
        say(f"{run.name}: done")
    content = {
        "tolerance": args.tolerance,
        "runs": {run.name: result_of(run, args) for run in runs},
        "drifts": drifts(runs, args),
        "demo": {seed: demo(seed, args) for seed in args.demo},
    }
    (args.output_dir / "results.json").write_text(json.dumps(content, indent=1))
    show(content)
    plot(content, args.output_dir / "curves.png")


if __name__ == "__main__":
    main()
