"""What is wrong with a recipe or a path is said at once: before torch, transformers and the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml

import redi.grading.verify
from redi import preflight
from redi.config import EvalConfig
from redi.errors import RediError

ROOT = Path(__file__).parents[2]
# Runs each command line of argument 1; prints what it said, then the heavy modules that are loaded.
PROGRAM = """
import contextlib, io, json, socket, sys

def blocked(*args, **kwargs):
    raise AssertionError("a network was asked")

socket.socket.connect = socket.create_connection = socket.getaddrinfo = blocked
from redi import cli

results = []
for words in json.loads(sys.argv[1]):
    sys.argv = ["redi", *words]
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
    results.append([code, said.getvalue()])
heavy = [name for name in ("torch", "transformers", "pandas", "datasets") if name in sys.modules]
print(json.dumps([results, heavy]))
"""


def run(folder: Path, commands: list[str]) -> tuple[list, list[str]]:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, json.dumps([line.split() for line in commands])],
        cwd=folder, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    results, heavy = json.loads(done.stdout)
    return results, heavy


def test_a_bad_recipe_or_path_is_said_before_anything_heavy_is_loaded(tmp_path):
    settings = tiny.train_settings(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(settings))
    (tmp_path / "bad.yaml").write_text("a: [1,")
    (tmp_path / "list.yaml").write_text("- 1")
    tiny.write_jsonl(tmp_path / "raw.jsonl", [])
    job = {"name": "x", "output_dir": "run", "sft": {"alfa": 1}, "arms": {}, "eval": {}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(job))
    cases = {
        "train --config none.yaml": "none.yaml: no such recipe",
        "train --config bad.yaml": "bad.yaml: not valid YAML",
        "run list.yaml": "list.yaml: a recipe is a mapping",
        "train --config recipe.yaml --learning_rat 1": "did you mean learning_rate?",
        "train --config recipe.yaml --alpha -1": "alpha",
        "train --config recipe.yaml --dataset_name none.jsonl": "dataset_name: none.jsonl",
        "train --config recipe.yaml --model_name_or_path ./none": "model_name_or_path: ./none",
        "train --config recipe.yaml --chat_template none.jinja": "chat_template: none.jinja",
        "train --config recipe.yaml --dry-run --dataset_name none.jsonl": "none.jsonl",
        "plan recipe.yaml --dataset_name none.jsonl": "none.jsonl",
        "run run.yaml": "eval",
        "data build --path none.jsonl --output_dir out": "path: none.jsonl",
        "data build --path raw.jsonl --output_dir out --judges me": "judges",
        "data build --path raw.jsonl --output_dir out --tokenizer ./none": "--tokenizer: ./none",
        "data show none.jsonl --tokenizer tokenizer": "none.jsonl",
        "eval --model ./none --dataset_name raw.jsonl --output_dir out": "--model: ./none",
        "eval --model gpt2 --dataset_name none.jsonl --output_dir out": "none.jsonl",
        "traces ./none tokenizer --dataset_name pairs.jsonl": "./none",
        "nonsense": "nonsense",
    }
    results, heavy = run(tmp_path, list(cases))
    for (command, words), (code, said) in zip(cases.items(), results, strict=True):
        assert code == 2, (command, said)
        assert said.startswith("error: ") and said.count("\n") == 1 and words in said, command
    assert heavy == []


def test_a_name_whose_owner_is_a_folder_here_is_a_path_unless_it_was_fetched(tmp_path, monkeypatch):
    """runs/date is mistyped; Qwen/two is the Hub's, though Qwen/one lies here, once it is in its
    cache: asked for by name, and not by a slip."""
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(preflight, "find_spec", lambda name: name)  # as if `datasets` were there
    tiny.make_lm().config.save_pretrained("Qwen/one")
    for folder in ("runs/date-1", "raw", "cache/models--Qwen--two", "cache/datasets--raw--b"):
        Path(folder).mkdir(parents=True)
    for name in ("Qwen/two", "Qwen/one", "gpt2", "other/two"):
        preflight.check_model("model", name)
        preflight.check_folder("tokenizer", name, "tokenizer")
    for name in ("raw/b:main@train", "other/rows"):
        preflight.check_data("path", name)
    for name in ("Qwen/three", "runs/date", "runs/date-1/sft", "./two", "a/b/c", "/two"):
        with pytest.raises(RediError, match=f"model: {name}: no model could be loaded"):
            preflight.check_model("model", name)
    with pytest.raises(RediError, match="first run hf download Qwen/four"):
        preflight.check_model("model", "Qwen/four")
    for name in ("raw/c", "raw/c@train", "runs/b"):
        with pytest.raises(RediError, match=f"path: {name}: no such file or folder.*dataset"):
            preflight.check_data("path", name)


def test_math_verify_is_asked_for_before_a_model_is_trained(tmp_path, monkeypatch):
    problems = tiny.write_jsonl(tmp_path / "test.jsonl", [{"problem": "1+1?", "answer": "2"}])
    monkeypatch.setattr(redi.grading.verify, "find_spec", lambda name: None)
    with pytest.raises(RediError, match="needs math-verify; run pip install"):
        preflight.check_questions(EvalConfig(dataset_name=str(problems)))
    preflight.check_questions(EvalConfig(dataset_name=str(problems), grader="rllm"))
