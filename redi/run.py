"""`redi run`: the whole job of a recipe, from raw traces to a table of models.

    output_dir/task        generated problems and tokenizer (recipes with `task`)
    output_dir/data        positives.parquet, pairs.parquet, report
    output_dir/pretrain    stage 0 (optional)
    output_dir/sft         stage 1
    output_dir/<arm>       stage 2, one folder an arm
    output_dir/eval/<m>    samples and metrics of each model
    output_dir/results.md  the table; curves.png beside it
    output_dir/results.html  all of it on one page
    output_dir/recipe.yaml   what was run

Every step is skipped when its result is there and belongs to the same settings, so that a run can
be interrupted anywhere and continued by the same command.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from redi import preflight
from redi.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from redi.data.arithmetic import TASK_FILES
from redi.errors import RediError
from redi.files import claim, read_json, write_text
from redi.recipe import load_config, make_config
from redi.training.logging import ticker

if TYPE_CHECKING:
    from redi.evaluation.results import EvalResult

DONE = "done.json"


class Job:
    """The configurations of every step, derived and checked before any work."""

    def __init__(self, config: RunConfig):
        self.config, self.root = config, Path(config.output_dir)
        self.task_dir, self.data_dir = self.root / "task", self.root / "data"
        self.stages: dict[str, TrainConfig] = {}
        start: dict[str, Any] = {}
        if config.pretrain is not None:
            dataset = {"objective": "sft", "dataset_name": "{task}/pretrain.jsonl"}
            start = self._stage("pretrain", dataset | config.pretrain)
        dataset = {"objective": "sft", "dataset_name": "{data}/positives.parquet"}
        start = self._stage("sft", dataset | start | config.sft)
        dataset = {"objective": "redi", "dataset_name": "{data}/pairs.parquet"}
        for name, arm in config.arms.items():
            self._stage(name, dataset | start | arm)
        if config.data is None:
            self.data = DataConfig(path=str(self.task_dir / "train.jsonl"))
        else:
            self.data = config.data
        self.eval = make_config(
            EvalConfig,
            self._fill({"seed": config.seed} | config.eval.model_dump(exclude_unset=True)),
            "eval",
        )
        self._check_inputs()

    def _check_inputs(self) -> None:
        """Raises RediError unless what the recipe names is there or made by an earlier step."""
        made: set[Path] = set()
        if self.config.task is not None:
            made |= {self.task_dir / name for name in TASK_FILES}
        with _named("data"):
            preflight.check_build(self.data, made=made)
        made |= {self.data_dir / name for name in ("positives.parquet", "pairs.parquet")}
        for name, stage in self.stages.items():
            with _named(name):
                preflight.check_training(stage, made)
            made.add(Path(stage.output_dir))
        with _named("eval"):
            preflight.check_questions(self.eval, made)

    def _stage(self, name: str, settings: dict[str, Any]) -> dict[str, Any]:
        """Adds a stage; returns what a stage that starts from its model needs."""
        folder = str(self.root / name)
        settings = {"seed": self.config.seed} | self.config.defaults | settings
        settings["output_dir"] = folder
        self.stages[name] = make_config(TrainConfig, self._fill(settings), name)
        return {"model_name_or_path": folder, "tokenizer_name_or_path": folder}

    def _fill(self, settings: dict[str, Any]) -> dict[str, Any]:
        """{task} and {data} in a text stand for those folders of this run."""
        folders = {"{task}": str(self.task_dir), "{data}": str(self.data_dir)}
        filled = {}
        for key, value in settings.items():
            if isinstance(value, str):
                for slot, folder in folders.items():
                    value = value.replace(slot, folder)
            filled[key] = value
        return filled


@contextmanager
def _named(section: str) -> Iterator[None]:
    """Errors inside say which section of the recipe they are about."""
    try:
        yield
    except RediError as error:
        raise RediError(f"{section}: {error}") from None


def run(
    config: RunConfig | str | os.PathLike, callbacks: Sequence[Any] = ()
) -> "dict[str, EvalResult]":
    """Runs what is not done yet; returns each model's evaluation by name.

    Raises RediError for anything the user can put right, Interrupted after a signal.
    """
    if not isinstance(config, RunConfig):
        config = load_config(RunConfig, config, {})
    job = Job(config)  # before what takes seconds to import: a bad recipe is said at once
    if os.environ.get("WORLD_SIZE", "1") not in ("", "0", "1"):
        raise RediError(
            "redi run is one process: under torchrun run its stages one by one, with redi train"
        )
    with ExitStack() as until_done:
        try:
            until_done.enter_context(claim(job.root, "redi run"))
        except OSError as error:
            raise RediError(f"{job.root}: cannot be written: {error}") from None
        return _run(job, callbacks)


def _run(job: Job, callbacks: Sequence[Any]) -> "dict[str, EvalResult]":
    """What `run` does in a folder that it has claimed."""
    from redi.evaluation.evaluate import evaluate
    from redi.pages.job_report import write_report
    from redi.pages.run import RECIPE, write_run_page
    from redi.training.loop import train

    config = job.config
    ran = yaml.safe_dump(config.model_dump(exclude_unset=True), sort_keys=False, allow_unicode=True)
    if not (job.root / RECIPE).exists():
        write_text(job.root / RECIPE, ran)
    if config.task is not None:
        _make_task(job)
    _build_data(job)
    for name, stage in job.stages.items():
        _say(f"== {name}: {stage.stage}")
        train(stage, callbacks, name=name)
    results = {}
    for name, stage in job.stages.items():
        if name != "pretrain":
            _say(f"== evaluating {name}")
            folder = job.root / "eval" / name
            results[name] = evaluate(stage.output_dir, job.eval, folder, replace=True)
    write_text(job.root / RECIPE, ran)  # not before: the folder may belong to another recipe
    write_report(job.root, results, baseline=config.baseline, title=config.name)
    print(f"page: {write_run_page(job.root)}", flush=True)
    return results


def _make_task(job: Job) -> None:
    from redi.data.arithmetic import write_task

    assert job.config.task is not None
    task = job.config.task
    if "seed" not in task.model_fields_set:
        task = task.model_copy(update={"seed": job.config.seed})
    _once(job.task_dir, {"task": task.model_dump()}, lambda: write_task(task, job.task_dir))


def _build_data(job: Job) -> None:
    from redi.data.build import build
    from redi.training.model import load_tokenizer

    _say(f"== {job.data_dir.name}")
    tokenizer = load_tokenizer(next(iter(job.stages.values())))
    report = build(job.data, job.data_dir, tokenizer=tokenizer, progress=ticker("rows read"))
    print(report.text(), flush=True)


def _once(folder: Path, identity: dict[str, Any], work: Callable[[], Any]) -> None:
    """Does `work`, which makes `folder` whole or not at all, unless the folder's marker says that
    it is done."""
    marker = folder / DONE
    identity = json.loads(json.dumps(identity))
    if marker.exists():
        if read_json(marker) != identity:
            raise RediError(
                f"{folder} was made from other settings or input; "
                "choose another output_dir, or remove that folder and what was trained from it"
            )
        return
    _say(f"== {folder.name}")
    work()
    write_text(marker, json.dumps(identity, indent=2) + "\n")


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
