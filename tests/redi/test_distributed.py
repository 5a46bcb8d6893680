"""Two CPU processes sharding with FSDP2 over gloo train the same model as one, to rounding."""

import os
import subprocess
import sys

import pytest
import tiny
import yaml

from redi.monitor import read_metrics
from redi.train import train


def launch(folder, settings, processes=2):
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc_per_node", str(processes), "-m", "redi", "train", "--config", str(recipe),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)


def trajectory(folder):
    keys = ("loss", "grad_norm", "logps/chosen", "logps/rejected")
    rows = read_metrics(folder / "out" / "metrics.jsonl")
    return [[row[key] for key in keys] for row in rows]


def test_two_ranks_equal_one(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    train(tiny.train_settings(one))
    done = launch(two, tiny.train_settings(two))
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(trajectory(two)) == 6
    for got, want in zip(trajectory(two), trajectory(one), strict=True):
        assert got == pytest.approx(want, rel=2e-4)


def test_two_ranks_resume_and_errors_end_all_ranks(tmp_path):
    settings = tiny.train_settings(tmp_path, max_steps=4)
    assert launch(tmp_path, settings).returncode == 0
    first = trajectory(tmp_path)
    (tmp_path / "out" / "train_result.json").unlink()
    (tmp_path / "out" / "checkpoint-4" / "COMPLETE.json").unlink()  # as after a kill in the save
    assert launch(tmp_path, settings).returncode == 0
    assert trajectory(tmp_path) == first
    bad = launch(tmp_path, settings | {"alpha": 0.3})
    assert bad.returncode != 0
    assert "differs in alpha" in bad.stderr
