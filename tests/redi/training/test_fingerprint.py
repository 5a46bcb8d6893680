"""Which run a folder belongs to: the starting model counts by what its files hold."""

import json
import shutil

import pytest
import tiny

from redi.errors import RediError
from redi.training.loop import train


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sft")
    return train(tiny.train_settings(folder, objective="sft", max_steps=1)).output_dir


@pytest.fixture(params=["of a run", "of any source"])
def start(sft, tmp_path, request):
    """A model to start from, with and without the mark of the run that made it."""
    shutil.copytree(sft, tmp_path / "start")
    if request.param == "of any source":
        (tmp_path / "start" / "train_result.json").unlink()
    return tmp_path / "start"


class Crash:
    def on_save(self, state):
        raise ZeroDivisionError


def stage_2(start, **changes):
    settings = tiny.train_settings(start.parent, model_name_or_path=str(start))
    del settings["architecture"], settings["tokenizer_name_or_path"]
    return settings | {"max_steps": 2, "save_steps": 1} | changes


def flip(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def begin(start):
    with pytest.raises(ZeroDivisionError):
        train(stage_2(start), [Crash()])


@pytest.mark.parametrize("done", [True, False])
def test_another_starting_model_of_the_same_size_is_refused(start, done):
    if done:
        train(stage_2(start))
    else:
        begin(start)
    flip(start / "model.safetensors")
    with pytest.raises(RediError, match=r"differs in the starting model \(model.safetensors\)"):
        train(stage_2(start))


@pytest.mark.parametrize("done", [True, False])
def test_what_is_not_the_model_may_change(start, done):
    result = train(stage_2(start)) if done else begin(start)  # None: only a checkpoint
    (start / "README.md").write_text("an edited card")
    (start / "reference-0.safetensors").write_text("of DPO, which keeps it there")
    start.rename(start.parent / "moved")
    again = train(stage_2(start.parent / "moved"))
    assert again.steps == 2
    assert result is None or again == result


def test_a_folder_of_an_older_version_is_refused_with_the_reason(start):
    train(stage_2(start))
    file = start.parent / "out" / "train_result.json"
    content = json.loads(file.read_text())
    content["identity"]["start"] = "0" * 64
    file.write_text(json.dumps(content))
    with pytest.raises(RediError, match=r"the starting model, or is of an older version"):
        train(stage_2(start))
