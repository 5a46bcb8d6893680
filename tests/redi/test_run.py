"""`redi run` end to end on a tiny task, and killed at every step of it."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from redi import run as run_module
from redi.config import RunConfig
from redi.errors import RediError
from redi.recipe import load_config, make_config
from redi.run import Job, run

ARMS = ("control", "redi")


def recipe(folder: Path, **changes) -> dict:
    settings = {
        "name": "tiny",
        "output_dir": str(folder / "run"),
        "task": {"num_problems": 60, "num_pretrain": 120, "num_validation": 10, "num_test": 12},
        "defaults": {"train_batch_size": 16, "max_length": 256, "save_steps": 3},
        "pretrain": {
            "tokenizer_name_or_path": "{task}/tokenizer",
            "architecture": tiny.architecture(vocab_size=32, num_hidden_layers=1),
            "learning_rate": 3e-3,
        },
        "sft": {"learning_rate": 1e-3},
        "arms": {
            "control": {"alpha": 0.0, "learning_rate": 1e-4},
            "redi": {"alpha": 0.8, "learning_rate": 1e-4},
        },
        "baseline": "control",
        "eval": {
            "dataset_name": "{task}/test.jsonl",
            "num_samples": 2,
            "max_new_tokens": 24,
            "batch_size": 16,
        },
    }
    return settings | changes


def write(folder: Path, settings: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def outcome(root: Path) -> dict:
    """All that a run is for: every model's bits, and what each of them answered."""
    stages = ("pretrain", "sft", *ARMS)
    tensors = {s: load_file(root / s / "model.safetensors") for s in stages}
    weights = {s: {k: v.numpy().tobytes() for k, v in t.items()} for s, t in tensors.items()}
    samples = {s: (root / "eval" / s / "generations.jsonl").read_text() for s in stages[1:]}
    data = {f: (root / "data" / f).read_bytes() for f in ("positives.parquet", "pairs.parquet")}
    return {"weights": weights, "samples": samples, "data": data}


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    folder = tmp_path_factory.mktemp("straight")
    results = run(write(folder, recipe(folder)))
    return folder / "run", results


def test_table_and_curves(straight):
    root, results = straight
    assert list(results) == ["sft", *ARMS]
    table = (root / "results.md").read_text()
    for name in results:
        assert name in table
    assert all(png.stat().st_size > 10_000 for png in root.glob("*.png"))
    assert list(root.glob("*.png"))


def test_models_load_with_plain_transformers(straight):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = straight[0] / "redi"
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder),
        AutoTokenizer.from_pretrained(folder),
    )
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1+2="}], add_generation_prompt=True, return_tensors="pt",
        return_dict=True,
    )  # fmt: skip
    assert model.generate(**prompt, max_new_tokens=4).shape[1] > prompt["input_ids"].shape[1]


def test_a_second_run_does_nothing_again(straight, monkeypatch):
    root, results = straight
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*.safetensors")}
    again = run(load_config(RunConfig, root.parent / "recipe.yaml", {}))
    assert {f: f.stat().st_mtime_ns for f in root.rglob("*.safetensors")} == before
    assert [r.pass_at_1 for r in again.values()] == [r.pass_at_1 for r in results.values()]


def test_a_new_arm_is_added_to_a_finished_run(straight, tmp_path):
    """Also after the folder was moved: nothing is trained again but the arm."""
    root = tmp_path / "run"
    shutil.copytree(straight[0], root)
    before = {f: f.stat().st_mtime_ns for f in root.rglob("*.safetensors")}
    settings = recipe(tmp_path)
    settings["arms"]["more"] = {"alpha": 0.5, "learning_rate": 1e-4}
    results = run(make_config(RunConfig, settings, "test"))
    assert list(results) == ["sft", *ARMS, "more"]
    assert {f: f.stat().st_mtime_ns for f in before} == before


def test_a_changed_evaluation_is_made_again(straight, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(straight[0], root)
    settings = recipe(tmp_path)
    settings["eval"]["max_problems"] = 2
    results = run(make_config(RunConfig, settings, "test"))
    assert {len(result.problem_ids) for result in results.values()} == {2}


def test_a_changed_arm_is_refused(straight, tmp_path):
    root = tmp_path / "run"
    shutil.copytree(straight[0], root)
    settings = recipe(tmp_path)
    settings["arms"]["redi"]["alpha"] = 0.5
    with pytest.raises(RediError, match=r"redi.*differs in alpha \(0.8 there, 0.5 now\)"):
        run(make_config(RunConfig, settings, "test"))


MOMENTS = ["sft", *(pytest.param(m, marks=pytest.mark.slow) for m in ("task", "data", "eval"))]


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_run_again_is_bit_for_bit(straight, tmp_path, moment):
    """SIGKILL as soon as `moment` has begun; then the same command to the end."""
    file = write(tmp_path, recipe(tmp_path))
    root = tmp_path / "run"
    command = [sys.executable, "-m", "redi", "run", str(file)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    signs = {
        "task": lambda: root.exists(),
        "data": lambda: (root / "task" / "done.json").exists(),
        "sft": lambda: list((root / "sft").glob("checkpoint-*")),
        "eval": lambda: list((root / "eval").glob("*/generations.jsonl")),
    }
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not signs[moment]() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "finished before it could be killed"
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert outcome(root) == outcome(straight[0])


def test_ctrl_c_says_how_to_continue(tmp_path):
    file = write(tmp_path, recipe(tmp_path))
    command = [sys.executable, "-m", "redi", "run", str(file)]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True
    )
    while not list((tmp_path / "run" / "pretrain").glob("checkpoint-*")) and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "run the same command to continue" in err
    assert "Traceback" not in err


def test_everything_is_checked_before_any_work(tmp_path):
    cases = [
        ({"arms": {"control": {"alpha": -1.0, "learning_rate": 1e-4}}}, "control: alpha"),
        (
            {"arms": {"control": {"learning_rte": 1e-4}}},
            "control: unknown key learning_rte; did you mean",
        ),
        ({"task": None}, "exactly one of task .* and data"),
        (
            {"task": None, "data": {"path": str(tmp_path / "none.jsonl")}},
            "none.jsonl: no such file",
        ),
        ({"baseline": "contrl"}, "contrl"),
        ({"eval": {"benchmarks": "math500"}}, "redi run takes eval.dataset_name"),
        ({"evall": {}}, "unknown key evall; did you mean eval?"),
        ({"eval": {"dataset_name": "x", "temprature": 1}}, "did you mean temperature?"),
        ({"arms": {"control": {}, "data": {}}}, "cannot be called"),
    ]
    for changes, message in cases:
        with pytest.raises(RediError, match=message):
            Job(make_config(RunConfig, recipe(tmp_path, **changes), "recipe.yaml"))
    assert not (tmp_path / "run").exists()


def test_torchrun_is_for_single_stages(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(RediError, match="redi train"):
        run(make_config(RunConfig, recipe(tmp_path), "recipe.yaml"))
    assert not (tmp_path / "run").exists()


def test_seed_reaches_every_stage(tmp_path):
    job = Job(make_config(RunConfig, recipe(tmp_path, seed=7), "recipe.yaml"))
    assert {stage.seed for stage in job.stages.values()} == {7}
    assert job.eval.seed == 7


def test_a_step_is_done_once(tmp_path):
    calls = []

    def work():
        folder.mkdir(exist_ok=True)
        calls.append(1)

    folder = tmp_path / "step"
    folder.mkdir()
    (folder / "mine").write_text("x")  # not the step's to remove
    for _ in range(2):
        run_module._once(folder, {"a": 1}, work)
    assert calls == [1]
    assert json.loads((folder / "done.json").read_text()) == {"a": 1}
    with pytest.raises(RediError, match="other settings"):
        run_module._once(folder, {"a": 2}, work)
    assert (folder / "mine").exists()


def test_the_page_and_the_recipe_are_left_behind(straight):
    root, results = straight
    page = (root / "results.html").read_text()
    for name, result in results.items():
        assert name in page and f"{100 * result.pass_at_1:.1f}" in page
    again = load_config(RunConfig, root / "recipe.yaml", {})
    assert again == load_config(RunConfig, root.parent / "recipe.yaml", {})
