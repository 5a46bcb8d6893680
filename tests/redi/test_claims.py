"""What redi did not write stays; two at once in one folder: one goes on, one says so; what a broken
copy left is said in a line."""

import json
import multiprocessing
from pathlib import Path

import pytest

from redi.config import EvalConfig, RunConfig, StudyConfig
from redi.errors import RediError
from redi.evaluation.compare import load_models
from redi.evaluation.evaluate import evaluate
from redi.evaluation.results import load_result
from redi.files import claim, write_text
from redi.pages.data import write_data_page
from redi.pages.run import write_run_page
from redi.recipe import make_config
from redi.run import Job, _make_task, run


def recipe(folder, **changes):
    settings = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "task": {"num_problems": 4, "num_pretrain": 0, "num_validation": 1, "num_test": 2},
        "sft": {"model_name_or_path": "owner/model"},
        "arms": {"redi": {}},
        "eval": {"dataset_name": "{task}/test.jsonl"},
    }
    return settings | changes


def test_a_users_folder_is_never_removed(tmp_path):
    config = make_config(RunConfig, recipe(tmp_path), "recipe")
    mine = Path(config.output_dir) / "task" / "thesis.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("three years")
    with pytest.raises(RediError, match="task"):
        _make_task(Job(config))
    assert mine.read_text() == "three years"


def test_a_file_beside_is_never_overwritten(tmp_path):
    (tmp_path / "a.json.tmp").write_text("mine")
    write_text(tmp_path / "a.json", "{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.json.tmp"]
    assert (tmp_path / "a.json.tmp").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["eval", "task", "", "../../outside", "a/b", ".hidden", "a\nb", "."]
)
def test_names_cannot_leave_the_run(tmp_path, name):
    settings = recipe(tmp_path, arms={name: {}}, baseline=None)
    with pytest.raises(RediError, match=r"recipe: arms|cannot be called"):
        make_config(RunConfig, settings, "recipe")
    study = {"output_dir": "o", "results": "r", "seeds": [1], "baseline": name}
    rates = {"learning_rates": [1, 3]}
    for change in (
        {"arms": {name: rates}, "tasks": {}},
        {"arms": {"control": rates}, "tasks": {name: "x"}},
    ):
        if name not in ("eval", "task"):
            with pytest.raises(RediError):
                make_config(StudyConfig, study | change, "study")


def hold(folder, ready, done):
    with claim(Path(folder), "test"):
        ready.set()
        done.wait(60)


@pytest.fixture
def held(tmp_path):
    """A folder in which another process is at work."""
    spawn = multiprocessing.get_context("spawn")
    ready, done = spawn.Event(), spawn.Event()
    folder = tmp_path / "held"
    process = spawn.Process(target=hold, args=(str(folder), ready, done))
    process.start()
    assert ready.wait(60)
    yield folder
    done.set()
    process.join()


def test_one_of_two_says_so(tmp_path, held):
    data = tmp_path / "test.jsonl"
    data.write_text('{"problem": "1+1", "answer": "2"}\n')
    with pytest.raises(RediError, match="another evaluation is at work in it"):
        evaluate("model", EvalConfig(dataset_name=str(data)), held)
    settings = recipe(tmp_path) | {"output_dir": str(held)}
    with pytest.raises(RediError, match="another redi run is at work in it"):
        run(make_config(RunConfig, settings, "recipe"))


def evaluation(folder, samples=((0, 0), (0, 1), (1, 0), (1, 1))):
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {"problem": p, "id": f"p{p}", "sample": n, "text": "", "finished": True, "num_tokens": 1,
         "verdict": "correct"}
        for p, n in samples
    ]  # fmt: skip
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text('{"model": "m"}')
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: evaluation(folder, [(0, 0), (1, 0), (1, 1)]),
        lambda folder: evaluation(folder, [(0, 0), (0, 1), (0, 1), (1, 0), (1, 1)]),
        lambda folder: (folder / "generations.jsonl").write_text('{"problem": 0, "sam'),
        lambda folder: (folder / "generations.jsonl").write_text(""),
        lambda folder: (folder / "generations.jsonl").write_text("[]\n"),
        lambda folder: (folder / "generations.jsonl").unlink(),
        lambda folder: (folder / "metrics.json").write_text("{"),
        lambda folder: (folder / "metrics.json").write_text("[1]"),
        lambda folder: (folder / "metrics.json").write_bytes(b"\xff\xfe"),
    ],
)
def test_a_broken_evaluation_is_said(tmp_path, damage):
    damage(evaluation(tmp_path / "sft"))
    with pytest.raises(RediError, match=str(tmp_path)):
        load_result(tmp_path / "sft")


def test_an_evaluation_given_twice_is_said(tmp_path):
    folder = evaluation(tmp_path / "sft")
    with pytest.raises(RediError, match="given twice"):
        load_models([folder, folder])


@pytest.mark.parametrize("text", ["- a\n- b\n", "arms: [1]\n", "a: [", "\x00"])
def test_a_foreign_recipe_is_said(tmp_path, text):
    (tmp_path / "recipe.yaml").write_text(text)
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    with pytest.raises(RediError, match=r"recipe.yaml: not"):
        write_run_page(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"a": 1}', "nothing"])
def test_a_foreign_report_is_said(tmp_path, text):
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(RediError, match=r"report.json: not a report"):
        write_data_page(tmp_path)
