"""What goes out is what came in, but for what was trained."""

import functools
import json
import os
import stat
from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from starts import FAMILIES, make_start, settings_for
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from redi.config import TrainConfig
from redi.recipe import make_config
from redi.training.export import export, whole_weights
from redi.training.loop import train
from redi.training.model import load_model, load_tokenizer

TRAINED = ("deepseek_v3", "apertus", "gemma2")


def exported(start: Path, **changes) -> Path:
    """Without a step: some families cannot train on this machine."""
    config = make_config(TrainConfig, settings_for(start, **changes), "test")
    lm = load_model(config).lm
    weights = whole_weights(lm, config, keep=True)
    export(lm, weights, load_tokenizer(config), config, eos_token_ids=[3], card="")
    return Path(config.output_dir)


def assert_same(a: Path, b: Path) -> None:
    """The same tensors by name, shape, dtype, value."""
    left, right = (load_file(folder / "model.safetensors") for folder in (a, b))
    assert left.keys() == right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype, name
        assert torch.equal(left[name], right[name]), name


def read_json(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_goes_out_as_it_came(tmp_path, family, dtype):
    start = make_start(tmp_path / "start", family, dtype)
    # gpt_oss is refused for its attention sinks; what it would be exported as is right all the same
    out = exported(start, model_check=family != "gpt_oss")
    assert_same(start, out)
    came, went = read_json(start), read_json(out)
    assert came["architectures"] == went["architectures"]
    kinds = {"model_type", "dtype", "vocab_size", "tie_word_embeddings"}
    assert {k: came[k] for k in kinds & came.keys()} == {k: went[k] for k in kinds & came.keys()}


@pytest.mark.parametrize("family", TRAINED)
def test_a_step_at_no_rate_exports_the_start(tmp_path, family):
    start = make_start(tmp_path / "start", family)
    out = train(settings_for(start)).output_dir
    assert_same(start, out)
    ids = torch.arange(30)[None]
    kind = AutoModelForCausalLM
    a, b = (kind.from_pretrained(folder).eval()(ids).logits for folder in (start, out))
    assert torch.equal(a, b)


def test_tensors_keep_the_dtypes_they_came_in(tmp_path):
    """Some publish bfloat16 weights with a float32 router: not rounded, and nothing widened."""
    start = make_start(tmp_path / "start", dtype=torch.bfloat16)
    tensors = load_file(start / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name] = tensors[name].float() + 1e-5
    save_file(tensors, start / "model.safetensors", {"format": "pt"})
    assert_same(start, exported(start))


def test_an_asked_for_dtype_is_of_what_trains_not_of_buffers(tmp_path):
    start = make_start(tmp_path / "start", "deepseek_v3")
    tensors = load_file(exported(start, dtype="bfloat16") / "model.safetensors")
    kinds = {name.split(".")[-1]: tensor.dtype for name, tensor in tensors.items()}
    assert kinds == {"weight": torch.bfloat16, "e_score_correction_bias": torch.float32}


def test_dropout_goes_out_as_it_came(tmp_path):
    start = make_start(tmp_path / "start", attention_dropout=0.25)
    assert read_json(exported(start))["attention_dropout"] == 0.25
    vlm = make_start(tmp_path / "vlm" / "start", "gemma3")
    settings = read_json(vlm)
    settings["text_config"]["attention_dropout"] = 0.5
    (vlm / "config.json").write_text(json.dumps(settings))
    assert read_json(exported(vlm))["text_config"]["attention_dropout"] == 0.5
    config = make_config(TrainConfig, settings_for(vlm), "test")
    assert load_model(config).lm.config.text_config.attention_dropout == 0.0


def test_the_generation_config_is_the_starts_and_the_templates_stop(tmp_path):
    """Even one that contradicts itself: a temperature without sampling."""
    start = make_start(tmp_path / "start")
    came = {"eos_token_id": [5, 7], "temperature": 0.6, "top_p": 0.9, "do_sample": False,
            "bos_token_id": 1, "pad_token_id": 11}  # fmt: skip
    (start / "generation_config.json").write_text(json.dumps(came))
    out = exported(start)
    went = read_json(out, "generation_config.json")
    assert {k: went[k] for k in came} == came | {"eos_token_id": [5, 7, 3]}
    (start / "generation_config.json").unlink()
    went = read_json(exported(start, output_dir=str(tmp_path / "b")), "generation_config.json")
    assert went["eos_token_id"] == [3]
    assert went["pad_token_id"] == 0


def test_a_model_from_scratch_stops_where_the_template_does(tmp_path):
    """Not at the token that its class's config happens to name."""
    architecture = tiny.architecture("llama")
    del architecture["eos_token_id"]
    assert AutoConfig.for_model("llama").eos_token_id == 2
    out = train(tiny.train_settings(tmp_path, architecture=architecture, max_steps=1)).output_dir
    assert read_json(out, "generation_config.json")["eos_token_id"] == [3]


def test_tensors_keep_their_dtypes_in_several_files(tmp_path, monkeypatch):
    start = make_start(tmp_path / "start", dtype=torch.bfloat16)
    came = load_file(start / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    came[name] = came[name].float() + 1e-5
    save_file(came, start / "model.safetensors", {"format": "pt"})
    own = PreTrainedModel.save_pretrained
    in_parts = functools.partialmethod(own, max_shard_size="30KB")
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", in_parts)
    out = exported(start)
    index = read_json(out, "model.safetensors.index.json")
    files = set(index["weight_map"].values())
    went = {k: v for file in files for k, v in load_file(out / file).items()}
    assert len(files) > 2 and went.keys() == came.keys() == index["weight_map"].keys()
    assert all(went[k].dtype == v.dtype and torch.equal(went[k], v) for k, v in came.items())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in came.values())
    assert {stat.S_IMODE((out / file).stat().st_mode) & 0o77 for file in files} != {0}


def test_templates_by_name_go_along_twice(tmp_path):
    """They have a folder, which is there already where an export was killed."""
    start = make_start(tmp_path / "start")
    by_name = {"default": tiny.TEMPLATE, "tool_use": tiny.TEMPLATE + "{# tools #}"}
    tokenizer = tiny.make_tokenizer(template=by_name)
    tokenizer.save_pretrained(start)
    for _ in range(2):
        out = exported(start)
        assert AutoTokenizer.from_pretrained(out).chat_template == by_name
        assert not (out / "export.tmp").exists()


def test_files_are_as_readable_as_others(tmp_path):
    old = os.umask(0o022)
    try:
        out = exported(make_start(tmp_path / "start"))
    finally:
        os.umask(old)
    assert {stat.S_IMODE(file.stat().st_mode) for file in out.iterdir()} == {0o644}


def test_code_and_processors_that_a_config_names_come_along(tmp_path):
    start = make_start(tmp_path / "start")
    names = ("modeling_mine.py", "preprocessor_config.json")
    for name in names:
        (start / name).write_text(f"# {name}")
    out = exported(start)
    assert all((out / name).read_text() == f"# {name}" for name in names)


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "factor": 8.0}


@pytest.mark.parametrize(
    ("family", "came"),
    [
        ("qwen2", {"rope_theta": 3e4, "rope_scaling": None}),
        ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        ("glm4_moe", {"rope_theta": 2e4, "rope_scaling": None, "partial_rotary_factor": 0.5}),
        ("gemma3_text", {"rope_theta": 1e6, "rope_scaling": LINEAR, "rope_local_base_freq": 2e4}),
    ],
)
def test_positions_are_said_in_the_old_words_too(tmp_path, family, came):
    """transformers 4.57 looks for `rope_theta` and takes 10,000 where it is not."""
    start = make_start(tmp_path / "start", family, **came)
    out = exported(start)
    went = read_json(out)
    assert {k: went[k] for k in came} == came
    both = [AutoConfig.from_pretrained(folder).rope_parameters for folder in (start, out)]
    assert both[0] == both[1]


@pytest.mark.parametrize(
    ("family", "old", "new"),
    [
        ("qwen3_moe", {"num_experts": 4}, {}),
        ("gpt_neox", {"rotary_pct": 0.5, "rotary_emb_base": 20000},
         {"partial_rotary_factor": 0.5, "rope_theta": 20000}),
    ],
)  # fmt: skip
def test_what_has_another_name_now_is_said_in_the_old_one_too(tmp_path, family, old, new):
    """4.57 does not look for the new one, and takes its own default."""
    start = make_start(tmp_path / "start", family, **old)
    written = read_json(start)
    for name in ("rope_parameters", "num_local_experts"):
        written.pop(name, None)
    (start / "config.json").write_text(json.dumps(written | old | {"torch_dtype": "float16"}))
    read = lambda folder: AutoConfig.from_pretrained(folder).to_dict()
    came, out = read(start), exported(start, dtype="bfloat16")
    went = read_json(out)
    assert {k: went[k] for k in old} == old and "torch_dtype" not in went
    assert {k: read(out)["rope_parameters"][k] for k in new} == new
    differing = {key for key, value in read(out).items() if came.get(key) != value}
    also = {"rope_theta", "rope_scaling", "partial_rotary_factor"}  # said beside, and not read
    assert differing <= {"dtype", "_name_or_path", "transformers_version"} | also


def test_an_old_name_is_said_though_the_start_has_the_new_one_alone(tmp_path):
    start = make_start(tmp_path / "start", "qwen3_moe")
    written = read_json(start)
    written["num_local_experts"] = written.pop("num_experts", 4)
    (start / "config.json").write_text(json.dumps(written))
    assert read_json(exported(start))["num_experts"] == 4


def test_an_old_word_for_what_a_recipe_changes_is_not_kept(tmp_path):
    start = make_start(tmp_path / "start", "gpt_neox")
    written = read_json(start)
    del written["rope_parameters"]
    (start / "config.json").write_text(json.dumps(written | {"rotary_emb_base": 20000}))
    went = read_json(exported(start, rope_theta=3e5))
    assert went["rope_theta"] == went["rope_parameters"]["rope_theta"] == 3e5
    assert went.get("rotary_emb_base", 3e5) == 3e5


def test_the_tokenizer_keeps_its_class_and_special_tokens(tmp_path):
    """A class of transformers 5 and its list of extra tokens are nothing to 4.57."""
    start = make_start(tmp_path / "start")
    assert read_json(start, "tokenizer_config.json")["tokenizer_class"] == "TokenizersBackend"
    out = exported(start)
    went = read_json(out, "tokenizer_config.json")
    assert went["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert went["additional_special_tokens"] == ["<q>", "<a>"]
    assert "extra_special_tokens" not in went

    came = {"tokenizer_class": "Qwen2Tokenizer", "eos_token": "<e>", "pad_token": "<pad>",
            "add_bos_token": False, "additional_special_tokens": ["<q>"],
            "chat_template": tiny.TEMPLATE, "added_tokens_decoder": {}}  # fmt: skip
    (start / "tokenizer_config.json").write_text(json.dumps(came))
    (start / "merges.txt").write_text("#version: 0.2\n")
    out = exported(start, output_dir=str(tmp_path / "b"))
    assert read_json(out, "tokenizer_config.json") == came
    assert (out / "merges.txt").read_text() == "#version: 0.2\n"


def test_a_recipes_template_is_the_exports(tmp_path):
    start = make_start(tmp_path / "start")
    settings = read_json(start, "tokenizer_config.json") | {"chat_template": "old"}
    (start / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "new.jinja").write_text(tiny.TEMPLATE + "{# new #}")
    out = exported(start, chat_template=str(tmp_path / "new.jinja"))
    assert "old" not in read_json(out, "tokenizer_config.json")["chat_template"]
    assert AutoTokenizer.from_pretrained(out).chat_template.endswith("{# new #}")
