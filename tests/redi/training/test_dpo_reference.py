"""DPO's reference log-probs: the starting model's, made once, never another's."""

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from redi.config import TrainConfig
from redi.errors import RediError
from redi.recipe import make_config
from redi.training import dpo_reference as reference
from redi.training.logging import read_metrics
from redi.training.loop import train


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A model folder to start from, by a step of SFT."""
    folder = tmp_path_factory.mktemp("start")
    settings = tiny.train_settings(folder, objective="sft", max_steps=1)
    return train(settings).output_dir


def dpo(folder, start, **changes):
    settings = tiny.train_settings(folder, objective="dpo", model_name_or_path=str(start))
    del settings["architecture"], settings["tokenizer_name_or_path"]
    return settings | {"max_steps": 2, "save_steps": 1} | changes


def caches(folder):
    return sorted((folder / "out").glob("reference-*.safetensors"))


def rewards(folder):
    rows = read_metrics(folder / "out" / "metrics.jsonl")
    return [[row[f"rewards/{key}"] for key in ("chosen", "rejected", "margins")] for row in rows]


def test_the_first_step_sees_no_reward(tmp_path, start):
    """Before any step the model is its own reference; after one it is not."""
    train(dpo(tmp_path, start, learning_rate=1e-2, warmup_ratio=0.0))
    first, second = rewards(tmp_path)
    assert first == pytest.approx([0, 0, 0], abs=1e-5)
    assert abs(second[2]) > 1e-3
    row = read_metrics(tmp_path / "out" / "metrics.jsonl")[0]
    assert row["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert row["rewards/accuracies"] <= 1
    (file,) = caches(tmp_path)
    logps = load_file(file)["logps"]
    assert logps.dtype == torch.float32 and logps.shape == (24,) and (logps < -1).all()


class Crash:
    def on_save(self, state):
        raise ZeroDivisionError


def test_made_once_and_read_on_resume(tmp_path, start, monkeypatch):
    """A resumed run must not take the weights of its checkpoint for the reference."""
    calls = []
    compute = reference._compute
    monkeypatch.setattr(reference, "_compute", lambda *args: calls.append(1) or compute(*args))
    straight, stopped, lost = (tmp_path / name for name in ("a", "b", "c"))
    train(dpo(straight, start, learning_rate=1e-2))
    for folder in (stopped, lost):
        with pytest.raises(ZeroDivisionError):
            train(dpo(folder, start, learning_rate=1e-2), [Crash()])
    assert len(calls) == 3
    train(dpo(stopped, start, learning_rate=1e-2))
    assert len(calls) == 3
    (file,) = caches(lost)
    file.write_bytes(file.read_bytes()[:-7])  # damaged: made anew, from the starting weights
    train(dpo(lost, start, learning_rate=1e-2))
    assert len(calls) == 4
    assert rewards(stopped) == rewards(straight) == rewards(lost)


def test_a_cache_of_another_model_is_not_used(tmp_path, start, monkeypatch):
    """Same names, same sizes, other weights; and a file put under this run's name by hand."""
    import shutil

    other = tmp_path / "other"
    shutil.copytree(start, other)
    tensors = load_file(other / "model.safetensors")
    save_file({k: v + 0.01 for k, v in tensors.items()}, other / "model.safetensors")
    for name, model in (("a", start), ("b", other)):
        train(dpo(tmp_path / name, model, max_steps=1))
    (mine,), (others,) = caches(tmp_path / "a"), caches(tmp_path / "b")
    assert mine.name != others.name
    assert not torch.equal(load_file(mine)["logps"], load_file(others)["logps"])
    right = load_file(mine)["logps"].clone()  # the file is mapped, and about to change
    mine.write_bytes(others.read_bytes())
    (mine.parent / "train_result.json").unlink()
    train(dpo(tmp_path / "a", start, max_steps=1, resume_from_checkpoint=False))
    assert torch.equal(load_file(mine)["logps"], right)


@pytest.mark.parametrize("change", [{"rope_theta": 5e5}, {"bf16": True}, {"max_length": 20}])
def test_what_shapes_the_logits_is_in_the_fingerprint(tmp_path, start, change):
    for name, changes in (("a", {}), ("b", change), ("c", {"beta": 0.5, "learning_rate": 1e-5})):
        train(dpo(tmp_path / name, start, max_steps=1, **changes))
    (plain,), (changed,), (same) = (caches(tmp_path / name) for name in "abc")
    assert plain.name != changed.name
    assert [plain.name] == [file.name for file in same]


def test_rows_that_are_not_pairs_are_dropped_and_counted(tmp_path):
    rows = tiny.pair_rows()
    del rows[3]["rejected"], rows[5]["chosen"]
    tiny.write_jsonl(tmp_path / "pairs.jsonl", rows)
    settings = tiny.train_settings(tmp_path, objective="simpo", max_steps=1)
    result = train(settings)
    assert (result.num_examples, result.num_dropped) == (10, 2)
    tiny.write_jsonl(tmp_path / "pairs.jsonl", [rows[3], rows[5]])
    with pytest.raises(RediError, match="has no pairs, which objective: simpo needs"):
        train(settings | {"output_dir": str(tmp_path / "other")})


def test_beta_belongs_to_dpo_and_simpo(tmp_path):
    def config(**changes):
        return make_config(TrainConfig, tiny.train_settings(tmp_path, **changes), "test")

    assert config(objective="dpo").stage == "DPO, beta = 0.1"
    assert config(objective="simpo").stage == "SimPO, beta = 2.0, gamma = 1.0"
    assert config(objective="simpo", beta=3).beta_or_default == 3
    with pytest.raises(RediError, match="objective: redi has no beta"):
        config(beta=0.1)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, start, monkeypatch):
    def full(tensors, file, metadata):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(reference, "save_file", full)
    with pytest.raises(RediError, match=r"reference-\w+.safetensors: could not be written .*space"):
        train(dpo(tmp_path, start))
    assert not list((tmp_path / "out").glob("reference-*"))


def test_held_out_pairs_have_a_reference_of_their_own(tmp_path, start):
    held_out = tiny.write_jsonl(tmp_path / "held_out.jsonl", tiny.pair_rows(15)[12:])
    settings = {"eval_dataset_name": str(held_out), "eval_steps": 1, "learning_rate": 1e-30}
    train(dpo(tmp_path, start, **settings))
    row = read_metrics(tmp_path / "out" / "metrics.jsonl")[-1]
    assert row["eval_loss"] == pytest.approx(np.log(2), abs=1e-5)  # the model has not moved
    assert row["eval_rewards/margins"] == pytest.approx(0, abs=1e-5)
    assert sorted(len(load_file(file)["logps"]) for file in caches(tmp_path)) == [6, 24]
