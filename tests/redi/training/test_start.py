"""What a run starts from is read whole or refused by name, and never written over."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from starts import make_start, settings_for

from redi.config import TrainConfig
from redi.errors import RediError
from redi.files import claim
from redi.recipe import make_config, read_value
from redi.run import run
from redi.training.loop import train
from redi.training.model import load_model
from redi.training.start import check_output_dir

HEAD, NORM = "lm_head.weight", "model.norm.weight"


@pytest.fixture
def start(tmp_path):
    return make_start(tmp_path / "start")


def load(start: Path):
    return load_model(make_config(TrainConfig, settings_for(start), "test")).lm


def change(start: Path, edit) -> None:
    """Of the weights, in one file or several."""
    for file in sorted(start.glob("*.safetensors")):
        tensors = load_file(file)
        edit(tensors)
        save_file(tensors, file, {"format": "pt"})


def split(start: Path) -> None:
    tensors = load_file(start / "model.safetensors")
    (start / "model.safetensors").unlink()
    names = {name: f"model-0000{1 + ('layers.1' in name)}-of-00002.safetensors" for name in tensors}
    for file in set(names.values()):
        part = {name: tensor for name, tensor in tensors.items() if names[name] == file}
        save_file(part, start / file, {"format": "pt"})
    index = {"metadata": {}, "weight_map": names}
    (start / "model.safetensors.index.json").write_text(json.dumps(index))


def lose(name):
    return lambda tensors: tensors.pop(name, None)


def add(tensors):
    tensors["model.layers.1.mlp.third_proj.weight"] = torch.zeros(2)


def cut(tensors):
    if NORM in tensors:
        tensors[NORM] = tensors[NORM][:-1].clone()


@pytest.mark.parametrize("files", ["one file", "two files"])
@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lose(HEAD), rf"missing: {HEAD}"),
        (lose("model.layers.1.mlp.up_proj.weight"), r"missing: model.layers.1.mlp.up_proj.weight"),
        (add, r"unexpected: model.layers.1.mlp.third_proj.weight"),
        (cut, rf"of another shape: {NORM} \[31\] for \[32\]"),
    ],
    ids=["head", "mlp", "more", "shape"],
)
def test_weights_that_do_not_fit_are_named(start, capfd, files, edit, words):
    if files == "two files":
        split(start)
    load(start)
    change(start, edit)
    capfd.readouterr()
    with pytest.raises(RediError, match=words):
        load(start)
    assert capfd.readouterr().err == ""  # ours is the only word


def test_what_the_model_itself_leaves_out_is_fine(tmp_path):
    start = make_start(tmp_path / "start", "llama", tie_word_embeddings=True)
    assert HEAD not in load_file(start / "model.safetensors")
    change(start, lambda tensors: tensors.update({"model.rotary_emb.inv_freq": torch.ones(4)}))
    load(start)


def truncate(start):
    os.truncate(start / "model.safetensors", 5000)


def garble(start):
    (start / "model.safetensors").write_bytes(b"x" * 5000)


def lose_a_file(start):
    split(start)
    (start / "model-00002-of-00002.safetensors").unlink()


def pickle_only(start):
    torch.save(load_file(start / "model.safetensors"), start / "pytorch_model.bin")
    (start / "model.safetensors").unlink()


def put_an_adapter(start):
    (start / "adapter_config.json").write_text('{"peft_type": "LORA"}')


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (truncate, "no model could be loaded"),
        (garble, "no model could be loaded"),
        (lose_a_file, "no model could be loaded"),
        (pickle_only, "pytorch_model.bin is a pickle, which can run code and is never opened"),
        (put_an_adapter, "an adapter lies there"),
    ],
)
def test_a_start_that_is_not_whole_is_one_line(start, harm, words):
    harm(start)
    with pytest.raises(RediError, match=words) as error:
        load(start)
    assert "\n" not in str(error.value)


def generation(content):
    return lambda start: (start / "generation_config.json").write_text(content)


def settings(**changes):
    def change(start):
        file = start / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return change


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (generation("{"), r"generation_config.json: cannot be read as JSON"),
        (generation("[1]"), r"generation_config.json: holds no JSON object"),
        (generation('{"eos_token_id": [[3]]}'), r"eos_token_id is no token id or list of them"),
        (generation('{"eos_token_id": "3"}'), r"eos_token_id is no token id or list of them"),
        (settings(hidden_size="a"), r"Validation error for field 'hidden_size': TypeError: Field"),
        (settings(model_type="new"), r"no model could be loaded \(.*model type `new`"),
    ],
)
def test_settings_that_cannot_be_are_said_before_training(start, harm, words):
    harm(start)
    with pytest.raises(RediError, match=words) as error:
        load(start)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("changes", [{"hidden_size": "a"}, {"model_type": "new"}])
def test_an_architecture_that_cannot_be_is_one_line(tmp_path, changes):
    architecture = tiny.architecture() | changes
    with pytest.raises(RediError, match="architecture: no model could be loaded") as error:
        load_model(
            make_config(TrainConfig, tiny.train_settings(tmp_path), "test").model_copy(
                update={"architecture": architecture}
            )
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "why"), [("[1]", "tokenizer_config.json holds no JSON object"), ("{", "Expecting")]
)
def test_a_tokenizer_that_cannot_be_read_is_one_line(start, content, why):
    (start / "tokenizer_config.json").write_text(content)
    with pytest.raises(RediError, match=rf"no tokenizer could be loaded \({why}"):
        train(settings_for(start))


def test_a_template_that_is_no_text_is_named(start, tmp_path):
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(RediError, match=r"chat_template: .*a.jinja: cannot be read as text"):
        train(settings_for(start, chat_template=str(tmp_path / "a.jinja")))


def test_no_pickle_of_a_hub_name_is_opened(start, monkeypatch):
    """Of which there is no folder to look into beforehand."""
    opened = []
    torch.save(load_file(start / "model.safetensors"), start / "pytorch_model.bin")
    (start / "model.safetensors").unlink()
    monkeypatch.setattr("redi.training.start.check_folder", lambda folder: None)
    monkeypatch.setattr(torch, "load", lambda *args, **_: opened.append(args))
    with pytest.raises(RediError, match="no model could be loaded"):
        load(start)
    assert not opened


def test_an_adapter_of_a_hub_name_is_refused(start, monkeypatch):
    from peft import LoraConfig, get_peft_model

    adapter = get_peft_model(tiny.make_lm(), LoraConfig(target_modules=["q_proj"]))
    adapter.save_pretrained(start)
    monkeypatch.setattr("redi.training.start.check_folder", lambda folder: None)
    with pytest.raises(RediError, match="an adapter lies there"):
        load(start)


def test_an_evaluation_refuses_them_too(start, tmp_path):
    from redi.evaluation.evaluate import _load

    change(start, lose(HEAD))
    with pytest.raises(RediError, match=f"missing: {HEAD}"):
        _load(str(start))


def test_a_token_that_the_model_lacks_is_named(tmp_path):
    start = make_start(tmp_path / "start", vocab_size=40)
    with pytest.raises(RediError, match=r"its tokenizer gives token \d+, .* embeddings for 40"):
        train(settings_for(start))


def test_no_source_is_written_over(start, tmp_path):
    (tmp_path / "rows").mkdir()
    tiny.write_jsonl(tmp_path / "rows" / "pairs.jsonl", tiny.pair_rows())
    tiny.save_tokenizer(tmp_path / "tokenizer")
    (tmp_path / "link").symlink_to(start)
    (tmp_path / "new.jinja").write_text(tiny.TEMPLATE)
    sources = {
        "tokenizer_name_or_path": str(tmp_path / "tokenizer"),
        "dataset_name": str(tmp_path / "rows" / "pairs.jsonl"),
        "chat_template": str(tmp_path / "new.jinja"),
    }
    refused = ("start", "start/", "start/out", "link", "link/out", ".", "rows", "tokenizer/x",
               "rows/../start")  # fmt: skip
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    for name in refused:
        settings = settings_for(start, **sources, output_dir=f"{tmp_path}/{name}")
        with pytest.raises(RediError, match=r"output_dir: .* must leave as it is"):
            train(settings)
    (tmp_path / "pairs.jsonl").unlink()  # which settings_for writes
    after = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    before.pop(tmp_path / "pairs.jsonl", None)
    assert after == before
    for name in ("out", "rows/out", "start-2"):  # beside them, or below a single file's folder
        settings = settings_for(start, **sources, output_dir=f"{tmp_path}/{name}")
        check_output_dir(make_config(TrainConfig, settings, "test"))


def test_a_model_of_others_is_not_written_over(start, tmp_path):
    other = make_start(tmp_path / "other")
    with pytest.raises(RediError, match=r"holds config.json already, which no run of redi left"):
        train(settings_for(start, output_dir=str(other)))


@pytest.mark.parametrize("name", ["README.md", "tokenizer.json", "generation_config.json"])
def test_no_file_of_others_is_written_over(start, tmp_path, name):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / name).write_text("mine")
    with pytest.raises(RediError, match=rf"holds {name} already"):
        train(settings_for(start, output_dir=str(tmp_path / "mine")))
    assert (tmp_path / "mine" / name).read_text() == "mine"


@pytest.mark.parametrize(
    "changes",
    [
        {"output_dir": ""}, {"model_name_or_path": ""}, {"dataset_name": ""}, {"seed": -1},
        {"seed": 2**32}, {"max_steps": 0}, {"learning_rate": float("inf")},
        {"alpha": float("inf")}, {"num_train_epochs": float("inf")}, {"weight_decay": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_values_without_meaning_are_refused(tmp_path, changes):
    settings = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    make_config(TrainConfig, {**settings, "max_grad_norm": float("inf")}, "test")  # no clipping
    with pytest.raises(RediError, match=next(iter(changes))):
        make_config(TrainConfig, settings | changes, "test")


def test_names_on_the_command_line_stay_text():
    assert read_value(TrainConfig, "chat_template", "1.5") == "1.5"
    assert read_value(TrainConfig, "chat_template", "null") is None


def test_an_empty_output_dir_is_not_the_current_folder(tmp_path):
    command = [sys.executable, "-m", "redi", "eval", "--model", "m", "--output_dir="]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert done.stderr.strip() == "error: --output_dir: needs a folder"


def test_two_jobs_cannot_share_a_folder(tmp_path):
    recipe = {
        "name": "x", "output_dir": str(tmp_path / "job"), "task": {}, "arms": {},
        "sft": {"architecture": tiny.architecture(), "tokenizer_name_or_path": "{task}/tokenizer"},
        "eval": {"dataset_name": "{task}/test.jsonl"},
    }  # fmt: skip
    from redi.config import RunConfig

    with (
        claim(tmp_path / "job", "redi run"),
        pytest.raises(RediError, match="another redi run is at work in it"),
    ):
        run(make_config(RunConfig, recipe, "test"))


CONSTANT = {"lr_scheduler_type": "constant", "warmup_ratio": 0.0}


def test_a_finished_run_can_be_trained_on_for_longer(tmp_path):
    """In another folder, from its last checkpoint; where the rate does not depend on the length,
    to the same bits as a run that was that long from the start."""
    short = tiny.train_settings(tmp_path, max_steps=2, **CONSTANT)
    train(short)
    longer = {**short, "max_steps": 4}
    with pytest.raises(RediError, match=r"max_steps \(2 there, 4 now\).* on for longer"):
        train(longer)
    checkpoint = str(tmp_path / "out" / "checkpoint-2")
    longer |= {"output_dir": str(tmp_path / "longer"), "resume_from_checkpoint": checkpoint}
    with pytest.raises(RediError, match=r"differs in alpha"):
        train({**longer, "alpha": 0.5})
    with pytest.raises(RediError, match=r"2 steps are done there, and this run has 1"):
        train({**longer, "max_steps": 1})
    train(longer)
    train({**short, "max_steps": 4, "output_dir": str(tmp_path / "straight")})
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("longer", "straight"))
    assert all(torch.equal(a[name], b[name]) for name in a)
