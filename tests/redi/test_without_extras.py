"""What works where only setup.py's own requirements are installed, and what the rest says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import yaml
from bad_inputs import RUN, STUDY, TRAIN
from made_up import write_eval

ROOT = Path(__file__).parents[2]
EXTRAS = ["triton", "matplotlib", "math_verify", "liger_kernel", "peft", "trl", "datasets",
          "tensorboard", "trackio", "wandb", "hypothesis", "pytest_benchmark"]  # fmt: skip
# Runs each command line of argument 1 where nobody finds the modules of argument 2.
PROGRAM = """
import contextlib, io, json, sys

commands, hidden = map(json.loads, sys.argv[1:])

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        is_hidden = name.partition(".")[0] in hidden
        return None if is_hidden else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
from redi import cli

results = []
for words in commands:
    sys.argv = ["redi", *words]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""
INSTALL = 'needs math-verify; run pip install "reinforcement-distillation[data]"'


@pytest.fixture
def bare(tmp_path):
    """Runs commands in a folder with recipes, data and two evaluations."""
    tiny.save_tokenizer(tmp_path / "tokenizer")
    tiny.write_jsonl(tmp_path / "pairs.jsonl", tiny.pair_rows())
    problems = [{"problem": "1+1=?", "answer": "2"}, {"problem": "1+2=?", "answer": "3"}]
    tiny.write_jsonl(tmp_path / "test.jsonl", problems)
    for name, recipe in (("recipe", TRAIN), ("run", RUN), ("study", STUDY)):
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    for name in ("one", "two"):
        write_eval(tmp_path / name, [[1, 0], [0, 1]])

    def run(*commands):
        paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
        words = json.dumps([command.split() for command in commands])
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, words, json.dumps(EXTRAS)],
            cwd=tmp_path, env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def test_without_extras_commands_work_or_say_what_to_install(bare, tmp_path):
    evaluation = "eval --model out --dataset_name test.jsonl --output_dir answers --num_samples 1"
    plan, dry, train, tracked, build, eval_, job, study, report, compare = bare(
        "plan recipe.yaml --gpus 0",
        "train --config recipe.yaml --dry-run",
        "train --config recipe.yaml --max_steps 2",
        "train --config recipe.yaml --report_to trackio --output_dir tracked",
        "data build --path owner/rows --output_dir built",
        evaluation,
        "run run.yaml",
        "study study.yaml",
        "report out",
        "compare one two --output c.html",
    )
    for code, _, err in (plan, dry, train, report, compare):
        assert code == 0, err
    assert "out (2 steps)" in train[1] and "page: c.html" in compare[1]
    for (code, _, err), words in (
        (tracked, "report_to: trackio is not installed: pip install trackio"),
        (build, "owner/rows: no such file or folder; to read it from the Hugging Face Hub: pip"),
        (eval_, INSTALL),
        (job, INSTALL),
        (study, INSTALL),
    ):
        assert code == 2 and words in err.splitlines()[-1]
    # Said before any work.
    assert not any((tmp_path / name).exists() for name in ("answers", "run", "study", "built"))


@pytest.mark.slow
def test_without_extras_a_run_whose_grader_needs_none(bare, tmp_path):
    changed = RUN | {"eval": RUN["eval"] | {"grader": "rllm"}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(changed))
    [[code, out, err], [again, _, _]] = bare("run run.yaml", "report run")
    assert code == again == 0, err
    assert (out + err).count("pip install") == 1 and "pictures need matplotlib" in out
    assert (tmp_path / "run" / "results.md").exists()
