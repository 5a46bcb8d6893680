"""`redi report`: a run as one page, from what it has left in its folder, finished or not."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from redi.errors import RediError
from redi.evaluation.results import EvalResult, bootstrap, load_result
from redi.evaluation.tables import Table, model_table, pairs_table
from redi.files import read_json
from redi.pages.charts import POINTS, line_chart
from redi.pages.html import write_page
from redi.pages.plots import PANELS, points
from redi.training.logging import PARTS, read_metrics

RECIPE = "recipe.yaml"  # what `redi run` ran, in its output folder
HELD_OUT = (
    ("eval_loss", "held-out loss"),
    ("eval_logps/chosen", "held-out chosen: log-prob per token"),
    ("eval_logps/rejected", "held-out rejected: log-prob per token"),
)
SAMPLES = 6  # problems shown with every model's answer


@dataclass(frozen=True)
class Stage:
    """One training stage, finished or not."""

    folder: Path
    rows: list[dict[str, float]]  # of metrics.jsonl
    result: dict[str, Any]  # of train_result.json; empty while it is not finished

    @property
    def has_rejected(self) -> bool:
        return any("logps/rejected" in row for row in self.rows)

    def column(self, key: str) -> list[float]:
        return [row[key] for row in self.rows if key in row]


def write_run_page(root: Path, file: Path | None = None) -> Path:
    """Writes the page of a folder of `redi run`, or of one training stage; default: results.html.

    Raises RediError for a folder that holds no run.
    """
    recipe = _read_recipe(root)
    arms = list(recipe.get("arms", {}))
    stages = read_stages(root, arms)
    results = read_results(root, arms)
    if not stages and not results:
        raise RediError(
            f"{root}: no run: neither it nor a folder in it holds metrics.jsonl, nor eval/ a result"
        )
    baseline = recipe.get("baseline") if recipe.get("baseline") in results else None
    return write_page(
        file or root / "results.html",
        "run.html",
        title=recipe.get("name") or root.resolve().name,
        root=root,
        models=model_table(results, baseline) if results else None,
        baseline=baseline,
        best=_best(results, baseline),
        scores=score_bars(results),
        pairs=pairs_table(results, baseline),
        groups=_groups(stages),
        training=_training_table(stages),
        thinned=any(len(stage.rows) > POINTS for stage in stages.values()),
        points=POINTS,
        times=_times(stages),
        legend_of_parts=[(part, f"b{i}") for i, part in enumerate(PARTS)],
        warnings=[text for name, stage in stages.items() for text in _warnings(name, stage)],
        data=read_json(root / "data" / "report.json"),
        samples=samples_of(results, {n: root / "eval" / n for n in results}, root / "task"),
        recipe=yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True) if recipe else "",
    )


def read_stages(root: Path, arms: list[str]) -> dict[str, Stage]:
    """The stages that have logged anything, in the order in which they are trained."""
    alone = (root / "metrics.jsonl").exists()
    folders = [root.resolve()] if alone else [f.parent for f in root.glob("*/metrics.jsonl")]
    stages = {}
    for folder in folders:
        rows = read_metrics(folder / "metrics.jsonl")
        if rows:
            stages[folder.name] = Stage(folder, rows, _read_result(folder / "train_result.json"))
    return {name: stages[name] for name in _in_order(stages, arms)}


def _read_result(file: Path) -> dict[str, Any]:
    result = read_json(file)
    for name in ("steps", "num_examples", "num_dropped") if result else ():
        if type(result.get(name)) is not int:
            raise RediError(f"{file}: not the result of redi train ({name} is no number)")
    return result


def read_results(root: Path, arms: list[str]) -> dict[str, EvalResult]:
    """The finished evaluations in root/eval."""
    folders = {file.parent.name: file.parent for file in root.glob("eval/*/metrics.json")}
    return {name: load_result(folders[name]) for name in _in_order(folders, arms)}


def _in_order(names: Iterable[str], arms: list[str]) -> list[str]:
    """As `redi run` takes them; what the recipe does not name comes last."""
    order = ["pretrain", "sft", *arms]
    return sorted(names, key=lambda name: (order.index(name) if name in order else 99, name))


def colours_of(names: Iterable[str]) -> dict[str, int]:
    """The same colour for a model in all charts of a page; grey where the others come from."""
    arms = [name for name in names if name not in ("pretrain", "sft")]
    return {"pretrain": 6, "sft": 6} | {name: i + (i >= 6) for i, name in enumerate(arms)}


def score_bars(results: Mapping[str, EvalResult]) -> list[dict[str, Any]]:
    """A bar a model: pass@1 in percent with its 95% interval over problems."""
    colours, bars = colours_of(results), []
    for name, result in results.items():
        score = bootstrap(100 * result.correct_PN.mean(axis=1))
        figures = {"mean": 100 * result.pass_at_1, "low": score.low, "high": score.high}
        bars.append({"name": name, "colour": f"b{colours[name] % 7}", **figures})
    return bars


def _groups(stages: Mapping[str, Stage]) -> list[dict[str, Any]]:
    """Charts of the stages: those on pairs side by side, since they are compared."""
    both = {name: stage for name, stage in stages.items() if stage.has_rejected}
    alone = [{name: stage} for name, stage in stages.items() if not stage.has_rejected]
    colours = colours_of(stages)
    groups = []
    for group in [both, *reversed(alone)]:
        if group:
            names = [(name, f"b{colours[name] % 7}") for name in group]
            groups.append({"names": names, "charts": _charts(group, colours)})
    return groups


def _charts(stages: Mapping[str, Stage], colours: Mapping[str, int]) -> list[tuple[str, Any]]:
    charts = []
    for key, name in (*PANELS, *HELD_OUT):
        curves = {run: points(stage.rows, key) for run, stage in stages.items()}
        curves = {run: curve for run, curve in curves.items() if len(curve[0])}
        if curves:
            raw = not key.startswith("eval_")
            charts.append((name, line_chart(curves, name, colours=colours, raw=raw)))
    return charts


def _training_table(stages: Mapping[str, Stage]) -> Table | None:
    """The end of every stage, and what it cost."""
    if not stages:
        return None
    has_mfu = any(stage.column("mfu") for stage in stages.values())
    header = ["stage", "steps", "examples", "dropped", "loss", "chosen", "rejected", "grad norm"]
    is_fast = any(stage.column("fast/active") for stage in stages.values())
    header += ["tokens/s", "peak GiB"] + ["MFU"] * has_mfu
    header += ["d(logits) computed", "left out", "error of dX"] * is_fast
    table = []
    for name, stage in stages.items():
        last, done = stage.rows[-1], stage.result
        cells = [f"{last['step']:,}" + ("" if done else " so far")]
        cells += [f"{done[key]:,}" if done else "" for key in ("num_examples", "num_dropped")]
        keys = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
        cells += [f"{last[key]:.3f}" if key in last else "" for key in keys]
        middle = {key: stage.column(key) for key in ("tokens_per_second", "memory/peak_gib", "mfu")}
        speed, memory, mfu = middle.values()
        cells += [f"{np.median(speed):,.0f}" if speed else "", f"{max(memory, default=0):.1f}"]
        cells += [f"{np.median(mfu):.0%}" if mfu else ""] * has_mfu
        fast = [stage.column(f"fast/{what}") for what in ("active", "dropped", "error")]
        cells += [f"{np.median(values):.2g}" if values else "" for values in fast] * is_fast
        table.append([name, *cells])
    note = (
        "Loss, log-probs per token and gradient norm: of the last logged step. "
        "Tokens/s: median over steps."
    )
    if is_fast:
        note += (
            " With loss_tolerance: the share of d(logits) that was computed, the probability mass "
            "outside it, and the estimated relative error of dX; medians over steps."
        )
    return Table(header, table, note)


def _times(stages: Mapping[str, Stage]) -> list[dict[str, Any]]:
    """Where each stage's time went: a row has the mean seconds a step since the row before."""
    times = []
    for name, stage in stages.items():
        seconds, before = dict.fromkeys(PARTS, 0.0), 0.0
        for row in stage.rows:
            for part in PARTS:
                seconds[part] += row.get(f"time/{part}", 0.0) * (row["step"] - before)
            before = row["step"]
        total = sum(seconds.values())
        if total:
            shares = [(p, i, 100 * s / total) for i, (p, s) in enumerate(seconds.items()) if s]
            times.append({"name": name, "total": clock(total), "shares": shares})
    return times


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def _warnings(name: str, stage: Stage) -> list[str]:
    warnings = []
    rows, done = stage.rows, stage.result
    if not done:
        warnings.append(f"{name}: not finished; step {rows[-1]['step']:,} is the last one here.")
    alarm = next((row["step"] for row in rows if row.get("alarms")), None)
    if alarm is not None:
        saved = stage.folder.glob("checkpoint-*/trainer_state.json")
        newest = max(saved, key=lambda f: int(f.parent.name.rpartition("-")[2]), default=None)
        history = read_json(newest).get("guard", {}) if newest else {}
        signs = "; ".join(sign["alarm"] for sign in history.values() if sign["alarm"])
        end = f": {signs}." if signs else "."
        warnings.append(f"{name}: the collapse guard raised its first alarm at step {alarm:,}{end}")
    if skipped := max(stage.column("skipped_steps"), default=0):
        warnings.append(f"{name}: {skipped:,} steps skipped: loss or gradient was not finite.")
    if dropped := done.get("num_dropped"):
        warnings.append(
            f"{name}: {dropped:,} of {done['num_examples'] + dropped:,} examples dropped before "
            "training: too long, empty, or not what the objective needs."
        )
    return warnings


def _best(results: Mapping[str, EvalResult], baseline: str | None) -> dict[str, str]:
    """The cells of the table's row with the highest pass@1."""
    if len(results) < 2:
        return {}
    table = model_table(results, baseline)
    best = max(results, key=lambda name: results[name].pass_at_1)
    row = next(row for row in table.rows if row[0] == best)
    cells = dict(zip(table.header, row, strict=True))
    versus = next((cell for name, cell in cells.items() if name.startswith("vs ")), "")
    return {"name": best, "score": row[1], "versus": "" if best == baseline else versus}


def samples_of(
    results: Mapping[str, EvalResult], folders: Mapping[str, Path], task_dir: Path | None = None
) -> list[dict[str, Any]]:
    """Problems with every model's first sample: those on which the models differ most, first.

    `folders` hold the evaluations; `task_dir` may hold a run's own problems, moved along with it.
    """
    if len({result.problem_ids for result in results.values()}) != 1:
        return []
    rate_MP = np.array([result.correct_PN.mean(axis=1) for result in results.values()])
    order = np.argsort(-np.ptp(rate_MP, axis=0), kind="stable")
    shown: dict[int, dict[str, Any]] = {int(p): {} for p in order[:SAMPLES]}
    for name in results:
        with (folders[name] / "generations.jsonl").open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                if row["problem"] in shown and row["sample"] == 0:
                    shown[row["problem"]][name] = row
    questions = _questions(folders[next(iter(results))], task_dir)
    ids = next(iter(results.values())).problem_ids
    rates = {p: dict(zip(results, rate_MP[:, p].tolist(), strict=True)) for p in shown}
    return [
        {"id": ids[p], "rows": rows, "rates": rates[p], "question": questions.get(ids[p])}
        for p, rows in shown.items()
    ]


def _questions(folder: Path, task_dir: Path | None) -> dict[str, Any]:
    """The problems asked, by id; none where the dataset is gone."""
    from redi.config import EvalConfig
    from redi.evaluation.evaluate import read_questions
    from redi.recipe import make_config

    settings = read_json(folder / "evaluation.json").get("config", {})
    name = Path(settings.get("dataset_name", ""))
    for file in (name, (task_dir or name.parent) / name.name):
        try:
            config = make_config(EvalConfig, settings | {"dataset_name": str(file)}, str(folder))
            return {question.id: question for question in read_questions(config)}
        except RediError:
            continue
    return {}


def _read_recipe(root: Path) -> dict[str, Any]:
    """What was run: the fields of a RunConfig, of which only some are looked at here."""
    file = root / RECIPE
    if not file.exists():
        return {}
    try:
        recipe = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RediError(f"{file}: not valid YAML: {error}") from None
    if not isinstance(recipe, dict) or not isinstance(recipe.get("arms", {}), dict):
        raise RediError(f"{file}: not a recipe that redi run has written; move it away")
    return recipe
