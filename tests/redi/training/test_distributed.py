"""Several CPU processes sharding with FSDP2 over gloo: the same model as one, and the same faults.

Most runs here are forked from a warm process (bench/warm.py); one test each starts them as users
do, with torchrun and accelerate.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file
from starts import make_start, settings_for
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint import load as dcp_load

from redi.training import checkpoint
from redi.training.logging import read_metrics
from redi.training.loop import train

ROOT = Path(__file__).parents[3]
PATHS = [ROOT, ROOT / "kernels", ROOT / "tests" / "tools"]
ENVIRONMENT = {
    **os.environ,
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
}
AT_STEP = """
import os, signal
from redi.training import checkpoint
from redi.training.loop import Loop
step = Loop.step
def faulty(loop, state):
    if state.step == {step} and rank == {rank}:
        {fault}
    return step(loop, state)
Loop.step = faulty
"""


@pytest.fixture(scope="module")
def fork():
    """fork(folder, settings, processes, prepare="") -> (exit codes, stderr of all ranks)."""
    command = [sys.executable, str(ROOT / "bench" / "warm.py")]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=ENVIRONMENT, **pipes) as server:

        def job(folder, settings, processes=2, prepare=""):
            wanted = {"settings": settings, "processes": processes, "folder": str(folder)}
            server.stdin.write(json.dumps({**wanted, "prepare": prepare}) + "\n")
            server.stdin.flush()
            outcome = json.loads(server.stdout.readline())
            assert not outcome["hung"]
            return outcome["codes"], (folder / "log").read_text()

        yield job


def launch(launcher, folder, settings):
    recipe = folder / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(settings))
    command = [sys.executable, "-m", *launcher, "-m", "redi", "train", "--config", str(recipe)]
    return subprocess.run(
        command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, cwd=ROOT
    )


def trajectory(folder):
    keys = ("loss", "grad_norm", "logps/chosen", "logps/rejected", "logps/stop", "eval_loss")
    rows = read_metrics(folder / "out" / "metrics.jsonl")
    return [[row[key] for key in keys if key in row] for row in rows]


def assert_close(got, want):
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        assert a == pytest.approx(b, rel=2e-4)


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Held-out forwards stand between its steps: they must leave shards as they were."""
    folder = tmp_path_factory.mktemp("one")
    train(held_out(folder))
    return folder


def held_out(folder):
    settings = tiny.train_settings(folder, eval_steps=2)
    return settings | {"eval_dataset_name": settings["dataset_name"]}


def test_torchrun(one, tmp_path):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = launch(torchrun, tmp_path, held_out(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 steps on 2 ranks" in done.stderr
    assert_close(trajectory(tmp_path), trajectory(one))


@pytest.mark.slow
def test_accelerate(one, tmp_path):
    # With --cpu, accelerate starts one process, however many are asked for.
    accelerate = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    done = launch(accelerate, tmp_path, held_out(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "6 steps on 2 ranks" in done.stderr
    assert_close(trajectory(tmp_path), trajectory(one))


def test_two_ranks_continue_as_one_then_as_four(fork, one, tmp_path):
    """97 rows of embeddings and three norms of 32 split unevenly, or not at all, on four ranks."""
    changes = {"architecture": tiny.architecture(tie_word_embeddings=True, vocab_size=97)}
    straight = tmp_path / "straight"
    train(tiny.train_settings(straight, **changes))
    settings = tiny.train_settings(tmp_path, **changes)
    for processes, stop in ((2, 2), (1, 4), (4, None)):
        fault = AT_STEP.format(step=stop, rank=0, fault="raise SystemExit(7)")
        codes, err = fork(tmp_path, settings, processes, fault)
        assert (codes[0] == 7) if stop else (codes == [0] * 4), err
        files = sorted(f.name for f in (tmp_path / "out").glob(f"checkpoint-{stop or 6}/model*"))
        assert files == [f"model-0000{r + 1}-of-0000{processes}.safetensors"
                         for r in range(processes)]  # fmt: skip
    assert "continuing after step 4" in err
    assert_close(trajectory(tmp_path), trajectory(straight))

    # The shards are what was exported, and torch.distributed.checkpoint reads them as they lie.
    exported = load_file(tmp_path / "out" / "model.safetensors")
    read = {f"lm.{name}": torch.zeros_like(tensor) for name, tensor in exported.items()}
    folder = str(tmp_path / "out" / "checkpoint-6")
    dcp_load(read, storage_reader=HuggingFaceStorageReader(folder), no_dist=True)
    assert all(torch.equal(read[f"lm.{name}"], exported[name]) for name in exported)


@pytest.mark.parametrize("objective", ["redi", "simpo"])
def test_traces_that_mix_run_one_at_a_time_on_ranks_that_shard(fork, tmp_path, objective):
    """The check runs on sharded weights, and its failed forward leaves them as they were; then all
    ranks run equally many forwards (a pair's two in one)."""
    layers = ["conv", "full_attention", "conv"]  # a pack of theirs is refused by transformers
    changes = {"architecture": tiny.architecture("lfm2", layer_types=layers), "max_steps": 3}
    changes["objective"] = objective
    settings = tiny.train_settings(tmp_path, **changes)
    codes, err = fork(tmp_path, settings)
    assert codes == [0, 0], err
    assert err.count("in one pack its traces would change each other") == 1
    train(tiny.train_settings(tmp_path / "alone", **changes))
    assert_close(trajectory(tmp_path), trajectory(tmp_path / "alone"))


def test_shards_export_what_came_in(fork, tmp_path):
    """Buffers, which no rank holds in part, and experts, whose names in files are others."""
    start = make_start(tmp_path / "start", "deepseek_v3")
    codes, err = fork(tmp_path, settings_for(start))
    assert codes == [0, 0], err
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "out"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    held = torch.cat([b[name] for name in b if "correction_bias" in name])
    assert held.abs().min() > 0
    parts = sorted((tmp_path / "out" / "checkpoint-1").glob("model-*.safetensors"))
    assert [any("correction_bias" in name for name in load_file(p)) for p in parts] == [True, False]


def test_an_error_on_one_rank_ends_all(fork, tmp_path):
    fault = AT_STEP.format(step=3, rank=1, fault="raise ValueError('the cable is loose')")
    codes, err = fork(tmp_path, tiny.train_settings(tmp_path), 2, fault)
    assert 0 not in codes
    assert "ValueError: the cable is loose" in err
    codes, err = fork(tmp_path, tiny.train_settings(tmp_path, alpha=0.3))
    assert codes == [2, 2]
    assert "differs in alpha" in err


def test_a_signal_to_one_rank_saves_on_all(fork, tmp_path):
    settings = tiny.train_settings(tmp_path, save_steps=100)
    fault = AT_STEP.format(step=2, rank=1, fault="os.kill(os.getpid(), signal.SIGTERM)")
    codes, err = fork(tmp_path, settings, 2, fault)
    assert codes == [0, 0]
    assert err.count("stopped after step 3 of 6, checkpoint saved") == 1
    codes, err = fork(tmp_path, settings)
    assert codes == [0, 0]
    assert "continuing after step 3" in err
    straight = tmp_path / "straight"
    straight.mkdir()
    assert fork(straight, tiny.train_settings(straight))[0] == [0, 0]
    assert trajectory(tmp_path) == trajectory(straight)


def test_a_full_disk_on_one_rank_is_said_once_and_all_go_on(fork, one, tmp_path):
    full = "checkpoint.save_file = lambda *_: (_ for _ in ()).throw(OSError('disk full'))"
    fault = AT_STEP.format(step=3, rank=1, fault=full)
    codes, err = fork(tmp_path, held_out(tmp_path), 2, fault)
    assert codes == [0, 0]
    assert err.count("checkpoint-4 NOT saved: rank 1: disk full") == 1
    assert list(checkpoint.checkpoints(tmp_path / "out")) == [2]
    assert_close(trajectory(tmp_path), trajectory(one))


def test_a_nan_on_one_rank_is_skipped_on_all(fork, tmp_path):
    """Example 7's packs are NaN; only the rank that holds one sees it in its own sums."""
    source = (
        "import poison; from redi.training import loop; loop.make_objective = poison.poisoned(7)"
    )
    settings = tiny.train_settings(tmp_path, nonfinite="skip")
    codes, err = fork(tmp_path, settings, 2, source)
    assert codes == [0, 0], err
    rows = read_metrics(tmp_path / "out" / "metrics.jsonl")
    skipped = [row["step"] for row in rows if "loss" not in row]
    assert len(skipped) == 2
    assert rows[-1]["skipped_steps"] == 2
    assert sorted(os.listdir(tmp_path / "out" / "nonfinite")) == [f"step-{s}.json" for s in skipped]
    assert err.count("WARNING: skipped step") == 2
    final = load_file(tmp_path / "out" / "model.safetensors")
    assert all(tensor.isfinite().all() for tensor in final.values())


AS_ON_CUDA = """
from dataclasses import replace
import torch
from redi.training import distributed
shard = distributed.shard
distributed.shard = lambda model, blocks, ranks, **kwargs: shard(
    model, blocks, replace(ranks, device=torch.device("cuda")), **kwargs
)
"""


def test_dpos_reference_is_not_rounded_by_the_policy_of_bf16(fork, tmp_path):
    """FSDP2 casts what goes into a forward, dataclasses' fields too: in bf16 a sum of log-probs
    near -100 is off by up to 0.25. Before the first step the model is its own reference."""
    settings = tiny.train_settings(tmp_path, objective="dpo", max_steps=1)
    start = train(tiny.train_settings(tmp_path / "start", objective="sft", max_steps=1)).output_dir
    del settings["architecture"], settings["tokenizer_name_or_path"]
    codes, err = fork(tmp_path, settings | {"model_name_or_path": str(start)}, 2, AS_ON_CUDA)
    assert codes == [0, 0], err
    (row,) = read_metrics(tmp_path / "out" / "metrics.jsonl")
    assert abs(row["rewards/chosen"]) < 1e-4 and abs(row["rewards/rejected"]) < 1e-4


def test_ranks_that_read_other_data_are_stopped(fork, tmp_path):
    """Each packs for itself: they would wait for each other for ever."""
    other = """
import redi.training.loop as room
load = room.load_data
def other(config, tokenizer):
    data = load(config, tokenizer)
    return room.replace(data, traces=data.traces[1:]) if rank == 1 else data
room.load_data = other
"""
    codes, err = fork(tmp_path, tiny.train_settings(tmp_path), 2, other)
    assert codes == [2, 2]
    assert "ranks read different data or models" in err


def test_the_first_rank_says_what_is_done(fork, tmp_path):
    """A result on rank 0's disk alone: the others must not go on without it."""
    settings = tiny.train_settings(tmp_path, max_steps=1)
    assert fork(tmp_path, settings)[0] == [0, 0]
    blind = "import redi.training.loop as room\nif rank == 1: room.read_result = lambda *_: None"
    codes, _ = fork(tmp_path, settings, 2, blind)
    assert codes == [0, 0]
