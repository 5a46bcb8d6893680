"""`redi study`: which objective is better, over tasks, arms, learning rates and seeds.

Every arm starts from the SFT model of its task and seed and takes the same number of steps of as
many rows. One seed sweeps each arm's learning rate on the validation split; each arm's best rate
then meets the other seeds on the test split.

    output_dir/<task>/seed-<n>         the start: what `redi run` makes of the task's recipe
    output_dir/<task>/seed-<n>/<cell>  one arm at one rate: its model, log and samples
    results                            a JSON of all cells; alone enough for the report

The results decide what is left to do, so a study goes on after days, without its folder too.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from redi.config import RunConfig, StudyArm, StudyConfig, TrainConfig
from redi.data.arithmetic import TEACHERS
from redi.data.read import read_rows
from redi.errors import RediError
from redi.evaluation.evaluate import evaluate
from redi.evaluation.results import EvalResult
from redi.files import claim, digest_file, write_text
from redi.recipe import load_config, make_config
from redi.run import Job, run
from redi.study.summary import Report
from redi.training.logging import read_metrics, say

Cell = dict[str, Any]
CURVES = ("logps/chosen", "logps/rejected", "grad_norm", "learning_rate")
ENDS = ("logps/chosen", "logps/rejected", "logps/stop", "grad_norm", "entropy")
CURVE_POINTS = 24
OPEN_FIELDS = {"name", "output_dir", "seed", "arms", "baseline"}  # of a task's recipe
NUM_OWN_SAMPLES = 4  # of each training problem, at temperature 1


def study(config: StudyConfig, *, report_only: bool = False) -> list[Cell]:
    """Runs the cells that the results lack, unless `report_only`; writes the report beside the
    results; returns all cells.

    Raises RediError for a bad recipe and for results that were made with other settings.
    """
    job = Study(config)
    if not report_only:
        job.check()
    if not report_only:
        with claim(Path(config.output_dir), "study"):
            while not job.one_pass():
                pass
    if not job.cells:
        raise RediError(f"{job.file}: no results yet; run `redi study` without --report first")
    say(f"report: {Report(config, job.cells).write(job.file.parent)}")
    return job.cells


class Start:
    """The SFT model of one task and seed, and the rows that the arms train on."""

    def __init__(self, recipe: RunConfig, seed: int, split: str, folder: Path):
        self.folder, self.seed, self.split = folder, seed, split
        evaluation = recipe.eval.model_copy(update={"dataset_name": f"{{task}}/{split}.jsonl"})
        changes = {"seed": seed, "output_dir": str(folder), "arms": {}, "baseline": None}
        self.recipe = recipe.model_copy(update={**changes, "eval": evaluation})

    @cached_property
    def sft(self) -> EvalResult:
        return run(self.recipe)["sft"]

    @cached_property
    def fingerprint(self) -> str:
        """Of the SFT model's weights: only cells of the same start may be compared."""
        assert self.sft
        files = sorted((self.folder / "sft").glob("*.safetensors"))  # several, if it is large
        return _digest("".join(map(digest_file, files)).encode())

    @cached_property
    def pairs(self) -> list[dict[str, Any]]:
        assert self.sft
        return [row for _, row in read_rows(self.folder / "data" / "pairs.parquet")]

    @cached_property
    def own_samples(self) -> dict[str, dict[str, Any]]:
        """The SFT model's first right and first wrong sample of each training problem, by id."""
        changes: dict[str, Any] = {"dataset_name": str(self.folder / "task" / "train.jsonl")}
        changes |= {"num_samples": NUM_OWN_SAMPLES, "temperature": 1.0, "top_p": 1.0}
        config = Job(self.recipe).eval.model_copy(update=changes)
        evaluate(self.folder / "sft", config, self.folder / "own-samples", replace=True)
        rows = [json.loads(x) for x in (self.folder / "own-samples/generations.jsonl").open()]
        first: dict[str, dict[str, Any]] = {}
        for row in sorted(rows, key=lambda row: (row["problem"], row["sample"])):
            if row["finished"] and row["verdict"] in ("correct", "wrong"):
                side = "chosen" if row["verdict"] == "correct" else "rejected"
                message = {"role": "assistant", "content": row["text"]}
                first.setdefault(row["id"], {}).setdefault(side, [message])
        return first

    def dataset(self, own: list[str]) -> Path:
        """The teacher's pairs, the sides in `own` replaced by the student's own samples.

        A side that has none is left out; a row without a right trace is dropped.
        """
        if not own:
            return self.folder / "data" / "pairs.parquet"
        file = self.folder / f"own-{'-'.join(own)}.jsonl"
        rows = []
        for pair in self.pairs:
            sides = {side: pair[side] for side in ("chosen", "rejected") if side not in own}
            samples = self.own_samples.get(pair["id"], {})
            sides |= {side: samples[side] for side in own if side in samples}
            if "chosen" in sides:
                rows.append({"id": pair["id"], "prompt": pair["prompt"]} | sides)
        write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
        return file


class Study:
    """The cells that exist, and the order in which the others are made."""

    def __init__(self, config: StudyConfig):
        self.config, self.file = config, Path(config.results)
        self.recipes = {
            task: load_config(RunConfig, recipe, {}) for task, recipe in config.tasks.items()
        }
        self.cells: list[Cell] = _read_cells(self.file)
        self.starts: dict[tuple[str, int], Start] = {}
        self.dropped = False

    def check(self) -> None:
        """Raises RediError for a recipe or an arm that could not run, before hours of others do."""
        for task, recipe in self.recipes.items():
            folder = Path(self.config.output_dir) / task
            start = Start(recipe, self.config.sweep_seed, "validation", folder)
            Job(start.recipe)
            for arm in self.config.arms:
                self._stage(start, arm, 1.0, folder / arm, dataset="pairs.parquet")

    def one_pass(self) -> bool:
        """Everything once; False if cells had to be dropped on the way, and another is needed."""
        self.dropped = False
        for task in self.config.tasks:
            for arm in self.config.arms:
                self.best_rate(task, arm)
            for arm in self.config.followed:
                self.follow(task, arm)
            for seed in self.config.seeds:
                self.cell(task, "sft", None, seed)
                for arm in self.config.arms:
                    self.cell(task, arm, self.best_rate(task, arm), seed)
        return not self.dropped

    def best_rate(self, task: str, arm: str) -> float:
        """Sweeps; a best rate at an edge of the grid extends it, `max_extensions` times."""
        seed, rates = self.config.sweep_seed, sorted(self.config.arms[arm].learning_rates)
        self.cell(task, "sft", None, seed)
        for extensions_left in range(self.config.max_extensions, -1, -1):
            scores = [self.cell(task, arm, rate, seed)["pass@1"] for rate in rates]
            best = rates[int(np.argmax(scores))]
            if best not in (rates[0], rates[-1]) or not extensions_left:
                break
            rates = sorted([*rates, half_decade(best, up=best == rates[-1])])
        return best

    def follow(self, task: str, arm: str) -> None:
        """Gives the sweep's cells at the best and at the highest rate their `accuracy_curve`; the
        stage is trained once more for it."""
        seed = self.config.sweep_seed
        found = Report(self.config, self.cells)
        for rate in {found.best(task, arm)["rate"], found.swept(task, arm)[-1]["rate"]}:
            cell = self.cell(task, arm, rate, seed)
            if "accuracy_curve" in cell:
                continue
            from redi.study.follow import Snapshots

            say(f"== study: {task}, {arm} at {rate:g}, on the way")
            start = self._start(task, seed, "validation")
            sft, folder = start.folder / "sft", start.folder / f"{arm}-{rate:g}-followed"
            snapshots = Snapshots(folder, str(sft), self.config.num_points)
            self._train(start, arm, rate, folder, [snapshots])
            results = {0: start.sft} | snapshots.evaluate(Job(start.recipe).eval)
            scores = [measure(result, []) for result in results.values()]
            curve = {name: [score[name] for score in scores] for name in ("pass@1", "error")}
            made = {**cell, "accuracy_curve": {"step": list(results), **curve}}
            if cell in self.cells:  # else its start was another one: it is made anew first
                self._put([made if x == cell else x for x in self.cells])

    def cell(self, task: str, arm: str, rate: float | None, seed: int) -> Cell:
        """One row of the results, read or made."""
        key = {"task": task, "arm": arm, "rate": rate, "seed": seed}
        split = "validation" if seed == self.config.sweep_seed else "test"
        settings = self._settings(task, arm, split)
        for cell in self.cells:
            if key.items() <= cell.items():
                if cell["settings"] != settings:
                    raise RediError(
                        f"{self.file}: {key} was made with other settings (the task's recipe or "
                        "the arm has changed); take it out of the file, or choose other `results`"
                    )
                return cell
        start = self._start(task, seed, split)
        say(f"== study: {task}, seed {seed}, {arm}" + (f" at {rate:g}" if rate else ""))
        if rate is None:
            result, log, samples = start.sft, [], start.folder / "eval" / "sft"
        else:
            folder = start.folder / f"{arm}-{rate:g}"
            self._train(start, arm, rate, folder)
            samples = folder / "eval"
            result = evaluate(folder, Job(start.recipe).eval, samples, replace=True)
            log = read_metrics(folder / "metrics.jsonl")
        cell = {**key, "split": split, "settings": settings, "start": start.fingerprint}
        cell |= measure(result, log)
        cell |= self._habits(task, samples / "generations.jsonl")
        if split == "validation" and log:
            cell["curve"] = thin(log)
        self._put([*self.cells, cell])
        say(f"== study: pass@1 {100 * cell['pass@1']:.1f}, {len(self.cells)} cells")
        return cell

    def _settings(self, task: str, arm: str, split: str) -> str:
        """Of all that decides a cell but its key and its start."""
        recipe = self.recipes[task].model_dump(exclude=OPEN_FIELDS, exclude_unset=True)
        parts: list[Any] = [recipe, split]
        if arm != "sft":
            parts.append(self.config.arms[arm].model_dump(exclude={"learning_rates"}))
        return _digest(json.dumps(parts, sort_keys=True).encode())

    def _start(self, task: str, seed: int, split: str) -> Start:
        """A start whose weights are not those of earlier cells (another machine, other rounding)
        makes them void: differences between arms are taken within one start."""
        if (task, seed) not in self.starts:
            folder = Path(self.config.output_dir) / task / f"seed-{seed}"
            start = self.starts[task, seed] = Start(self.recipes[task], seed, split, folder)
            kept = [
                cell
                for cell in self.cells
                if (cell["task"], cell["seed"]) != (task, seed)
                or cell["start"] == start.fingerprint
            ]
            if len(kept) < len(self.cells):
                count = len(self.cells) - len(kept)
                say(f"{task}, seed {seed}: {count} cells of another SFT model are made anew")
                self.dropped = True
                self._put(kept)
        return self.starts[task, seed]

    def _train(
        self, start: Start, arm: str, rate: float, folder: Path, callbacks: Sequence[Any] = ()
    ) -> None:
        from redi.training.loop import train

        dataset = str(start.dataset(list(self.config.arms[arm].own)))
        stage = self._stage(start, arm, rate, folder, dataset)
        # The same number of steps for every arm, however many of its rows were left out.
        stage.max_steps = math.ceil(len(start.pairs) / stage.train_batch_size)
        train(stage, callbacks, name=arm)

    def _stage(
        self, start: Start, arm: str, rate: float, folder: Path, dataset: str
    ) -> TrainConfig:
        how: StudyArm = self.config.arms[arm]
        settings = {
            **start.recipe.defaults,
            "objective": "redi",
            **how.settings,
            "model_name_or_path": str(start.folder / "sft"),
            "dataset_name": dataset,
            "output_dir": str(folder),
            "learning_rate": rate,
            "seed": start.seed,
            "save_total_limit": 1,
        }
        return make_config(TrainConfig, settings, arm)

    def _habits(self, task: str, samples: Path) -> Cell:
        """How the samples of a generated task were worked out, right or wrong."""
        made = self.recipes[task].task
        if made is None:
            return {}
        texts = (json.loads(line)["text"] for line in samples.open(encoding="utf-8"))
        return {name: _short(x) for name, x in TEACHERS[made.teacher].habits(texts).items()}

    def _put(self, cells: list[Cell]) -> None:
        """One cell a line, so that a version control system shows what was added."""
        self.cells = cells
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_text(self.file, "[\n" + ",\n".join(map(json.dumps, cells)) + "\n]\n")


def _read_cells(file: Path) -> list[Cell]:
    try:
        cells = json.loads(file.read_text()) if file.exists() else []
        if not all({"task", "arm", "rate", "seed"} <= cell.keys() for cell in cells):
            raise ValueError("a cell without task, arm, rate or seed")
    except (ValueError, AttributeError, TypeError) as error:
        raise RediError(f"{file}: not the results of a study ({error}); move it away") from None
    return cells


def half_decade(rate: float, *, up: bool) -> float:
    """The next rate above, or below, in 1e-5, 3e-5, 1e-4, 3e-4, ..."""
    decade = math.floor(math.log10(rate))
    grid = [float(f"{digit}e{decade + shift}") for shift in (-1, 0, 1) for digit in (1, 3)]
    beyond = [x for x in grid if (x > rate if up else x < rate)]
    return beyond[0] if up else beyond[-1]


def measure(result: EvalResult, log: list[dict[str, float]]) -> Cell:
    """What a cell came to: scores with the error that the choice of problems leaves, the samples'
    length, and the training's last values."""
    score_P = result.correct_PN.mean(axis=1)
    figures = {
        "pass@1": float(score_P.mean()),
        "error": float(score_P.std(ddof=1) / math.sqrt(len(score_P))),
        "tokens": float(result.num_tokens_PN.mean()),
        "unfinished": float(1 - result.finished_PN.mean()),
    }
    figures[f"pass@{result.correct_PN.shape[1]}"] = result.pass_at(result.correct_PN.shape[1])
    for name in ENDS:
        values = [row[name] for row in log if name in row][-5:]
        if values:
            figures[name] = float(np.mean(values))
    return {key: _short(value) for key, value in figures.items()}


def thin(log: list[dict[str, float]]) -> dict[str, list[float]]:
    """Means of CURVES over at most CURVE_POINTS stretches of the log."""
    stretches = np.array_split(np.arange(len(log)), min(CURVE_POINTS, len(log)))
    curve: dict[str, list[float]] = {"step": [log[int(part[-1])]["step"] for part in stretches]}
    for name in CURVES:
        if all(name in row for row in log):
            means = [np.mean([log[i][name] for i in part]) for part in stretches]
            curve[name] = [_short(float(value)) for value in means]
    return curve


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:12]
