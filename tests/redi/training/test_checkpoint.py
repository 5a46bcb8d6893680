"""Checkpoints as files: what a save leaves, which one is taken, and what is never opened."""

import hashlib
import json
import os
import pickle
import shutil

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import load as dcp_load

from redi.errors import RediError
from redi.training import checkpoint
from redi.training.distributed import Ranks

ALONE = Ranks(0, 1, torch.device("cpu"))


def trained(seed=0, hidden=5):
    """A model and its optimizer after one step."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, hidden), nn.Linear(hidden, 2))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    model(torch.randn(4, 3)).square().sum().backward()
    optimizer.step()
    return model, optimizer


def save(folder, step, seed=0, keep=2):
    checkpoint.save(folder, *trained(seed), {"step": step}, ALONE, keep=keep)


def names(folder):
    return [path.name for path in checkpoint.checkpoints(folder).values()]


def found(folder, resume="auto"):
    return checkpoint.find(folder, resume, ALONE)[0].name


def test_restored_bit_for_bit(tmp_path):
    save(tmp_path, 2, seed=1)
    model, optimizer = trained(seed=2)
    checkpoint.load(tmp_path / "checkpoint-2", model, optimizer)
    wanted, moments = trained(seed=1)
    for a, b in zip(model.parameters(), wanted.parameters(), strict=True):
        assert torch.equal(a, b)
        for key in ("step", "exp_avg", "exp_avg_sq"):
            assert torch.equal(optimizer.state[a][key], moments.state[b][key])


def with_buffers(bias, count, scratch):
    model, optimizer = trained()
    model.register_buffer("bias", torch.tensor([bias, bias]))
    model[0].register_buffer("count", torch.tensor(count))  # of no dimension, of whole numbers
    model.register_buffer("scratch", torch.tensor(scratch), persistent=False)
    return model, optimizer


def test_buffers_that_are_part_of_the_model_are_restored(tmp_path):
    checkpoint.save(tmp_path, *with_buffers(1.5, 7, 1.0), {"step": 2}, ALONE, keep=2)
    model, optimizer = with_buffers(0.0, 0, 2.0)
    checkpoint.load(tmp_path / "checkpoint-2", model, optimizer)
    assert model.bias.tolist() == [1.5, 1.5]
    assert model[0].count.item() == 7
    assert model.scratch.item() == 2.0


def test_a_checkpoint_of_an_older_redi_has_no_buffers(tmp_path):
    save(tmp_path, 2, seed=1)
    model, optimizer = with_buffers(3.0, 4, 0.0)
    checkpoint.load(tmp_path / "checkpoint-2", model, optimizer)
    assert model.bias.tolist() == [3.0, 3.0]


def test_files_are_as_readable_as_others(tmp_path):
    """safetensors writes them for their owner alone."""
    save(tmp_path, 2)
    (tmp_path / "other").write_text("")
    modes = {file.stat().st_mode for file in (tmp_path / "checkpoint-2").iterdir()}
    assert modes == {(tmp_path / "other").stat().st_mode}


def test_torch_reads_the_files(tmp_path):
    """The format is torch.distributed.checkpoint's own."""
    from torch.distributed.checkpoint import HuggingFaceStorageReader

    save(tmp_path, 2)
    model, optimizer = trained()
    weights = {name: torch.empty_like(p) for name, p in model.named_parameters()}
    read = weights | {"0.weight/exp_avg": torch.empty(5, 3)}
    dcp_load(read, storage_reader=HuggingFaceStorageReader(str(tmp_path / "checkpoint-2")))
    for name, parameter in model.named_parameters():
        assert torch.equal(read[name], parameter)
    assert torch.equal(read["0.weight/exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def truncate(folder):
    os.truncate(folder / "model-00001-of-00001.safetensors", 40)


def flip_a_bit(folder):
    file = folder / "optimizer-00001-of-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 4
    file.write_bytes(content)


def lose_a_shard(folder):
    (folder / "model-00001-of-00001.safetensors").unlink()


def lose_the_marker(folder):
    (folder / "COMPLETE.json").unlink()


def garble_the_marker(folder):
    (folder / "COMPLETE.json").write_text('{"trainer_state.json": 12}')


DAMAGES = [
    (truncate, "model-00001-of-00001.safetensors has 40 bytes instead of"),
    (flip_a_bit, "optimizer-00001-of-00001.safetensors is not what was written"),
    (lose_a_shard, "model-00001-of-00001.safetensors is missing"),
    (lose_the_marker, "no COMPLETE.json"),
    (garble_the_marker, "COMPLETE.json is unreadable"),
]


@pytest.mark.parametrize(("harm", "words"), DAMAGES)
def test_a_damaged_one_is_named_and_the_newest_intact_one_taken(tmp_path, harm, words):
    for step in (2, 4, 6):
        save(tmp_path, step, keep=3)
    harm(tmp_path / "checkpoint-6")
    folder, damaged = checkpoint.find(tmp_path, "auto", ALONE)
    assert folder.name == "checkpoint-4"
    assert len(damaged) == 1
    assert "checkpoint-6: " + words in damaged[0]
    for step in (2, 4):
        harm(tmp_path / f"checkpoint-{step}")
    with pytest.raises(RediError, match=r"no intact checkpoint: .*6: .*4: .*2: .*start anew"):
        checkpoint.find(tmp_path, "auto", ALONE)


def test_a_path_must_be_intact(tmp_path):
    save(tmp_path, 2)
    assert found(tmp_path, str(tmp_path / "checkpoint-2")) == "checkpoint-2"
    flip_a_bit(tmp_path / "checkpoint-2")
    with pytest.raises(RediError, match="sha256 differs"):
        checkpoint.find(tmp_path, str(tmp_path / "checkpoint-2"), ALONE)
    with pytest.raises(RediError, match="checkpoint-3: no such folder"):
        checkpoint.find(tmp_path, str(tmp_path / "checkpoint-3"), ALONE)
    assert checkpoint.find(tmp_path, False, ALONE) == (None, [])


def test_latest_leads_and_the_newest_are_kept(tmp_path):
    for step in (2, 4, 6):
        save(tmp_path, step)
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-6"]
    assert (tmp_path / "latest").read_text() == "checkpoint-6\n"
    (tmp_path / "latest").write_text("checkpoint-4\n")  # somebody goes back
    assert found(tmp_path) == "checkpoint-4"
    (tmp_path / "latest").unlink()  # as after a kill before the first pointer
    assert found(tmp_path) == "checkpoint-6"


def test_a_run_started_anew_replaces_what_was_beyond_it(tmp_path):
    for step in (200, 400):
        save(tmp_path, step)
    save(tmp_path, 2)
    assert names(tmp_path) == ["checkpoint-2"]


def test_the_last_good_one_outlives_a_failed_save(tmp_path, monkeypatch):
    save(tmp_path, 2, keep=1)
    monkeypatch.setattr(checkpoint, "fsync", lambda path: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match=r"checkpoint-4 NOT saved: full"):
        save(tmp_path, 4, keep=1)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "latest"]
    assert found(tmp_path) == "checkpoint-2"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("exploded",))


def test_a_pickle_is_never_opened(tmp_path, monkeypatch):
    """A stranger's checkpoint, its hashes in order, with pickles where tensors belong."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path, 2)
    folder = tmp_path / "checkpoint-2"
    for name in (".metadata", "optimizer.pt", "model-00001-of-00001.safetensors"):
        (folder / name).write_bytes(pickle.dumps(Bomb()))
    marker = json.loads((folder / "COMPLETE.json").read_text())
    content = (folder / "model-00001-of-00001.safetensors").read_bytes()
    marker["model-00001-of-00001.safetensors"] = {
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }
    (folder / "COMPLETE.json").write_text(json.dumps(marker))
    assert found(tmp_path) == "checkpoint-2"
    with pytest.raises(RediError, match=r"model-00001-of-00001.safetensors: not a checkpoint file"):
        checkpoint.load(folder, *trained())
    assert not (tmp_path / "exploded").exists()
    pickle.loads(content)
    assert (tmp_path / "exploded").exists()  # the bomb is live


def test_another_models_weights_are_refused(tmp_path):
    save(tmp_path, 2)
    for hidden in (4, 6):
        with pytest.raises(RediError, match=r"another model \(0.weight does not fit\)"):
            checkpoint.load(tmp_path / "checkpoint-2", *trained(hidden=hidden))
    model = nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(RediError, match=r"another model \(see 1.bias\)"):
        checkpoint.load(tmp_path / "checkpoint-2", model, torch.optim.AdamW(model.parameters()))


def test_a_shard_of_another_save_does_not_fill_a_gap(tmp_path):
    """Files that do not make up the tensors are refused, whatever COMPLETE.json says."""
    save(tmp_path, 2)
    folder = tmp_path / "checkpoint-2"
    (folder / "model-00001-of-00001.safetensors").rename(folder / "weights")
    shutil.copy(folder / "optimizer-00001-of-00001.safetensors",
                folder / "model-00001-of-00001.safetensors")  # fmt: skip
    with pytest.raises(RediError, match="another model"):
        checkpoint.load(folder, *trained())
