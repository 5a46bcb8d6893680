"""Reading recipes and the fields given on a command line."""

import pytest

from redi.config import DataConfig, EvalConfig, RunConfig, TrainConfig
from redi.recipe import load_config, make_config, read_value, set_field

PROMPTS = [
    "End with #### and the answer",
    "Question: {problem}",
    "{problem}",
    "Q. {problem}\n\nThink.\n",
    "  [{problem}]",
    "'{problem}' is the question",
    "2026-11-27",
    "1",
    "off",
]


@pytest.mark.parametrize("text", PROMPTS)
def test_text_on_a_command_line_arrives_as_it_stands(text):
    for kind, key in [
        (EvalConfig, "system_prompt"),
        (EvalConfig, "prompt_template"),
        (EvalConfig, "answer_prefix"),
        (DataConfig, "prompt_template"),
        (RunConfig, "name"),
        (RunConfig, "eval.system_prompt"),
        (RunConfig, "data.prompt_template"),
    ]:
        assert read_value(kind, key, text) == text


@pytest.mark.parametrize(
    ("kind", "key", "text", "value"),
    [
        (TrainConfig, "learning_rate", "2e-6", "2e-6"),  # pydantic reads what YAML leaves as text
        (TrainConfig, "train_batch_size", "-3", -3),
        (TrainConfig, "bf16", "false", False),
        (TrainConfig, "bf16", "null", None),
        (TrainConfig, "chat_template", "null", None),
        (TrainConfig, "collapse_guard", "off", "off"),
        (TrainConfig, "gradient_checkpointing", "true", True),
        (TrainConfig, "resume_from_checkpoint", "false", False),
        (TrainConfig, "resume_from_checkpoint", "runs/a #1", "runs/a #1"),
        (EvalConfig, "benchmarks", "math500,aime24", "math500,aime24"),
        (DataConfig, "exclude_sources", "[cn_k12, a]", ["cn_k12", "a"]),
        (RunConfig, "arms.redi-0.8.alpha", "0.7", 0.7),
        (RunConfig, "arms.redi-0.8", "{alpha: 1}", {"alpha": 1}),
        (RunConfig, "eval.num_samples", "8", 8),
        (RunConfig, "nonsense", "'8'", "8"),
    ],
)
def test_other_values_are_yaml(kind, key, text, value):
    assert read_value(kind, key, text) == value


def test_names_with_dots_are_found():
    content = {"arms": {"redi-0.8": {"alpha": 0.8}, "redi-0": {}}}
    set_field(content, "arms.redi-0.8.learning_rate", 1e-5)
    set_field(content, "arms.redi-0.alpha", 0)
    set_field(content, "arms.new.alpha", 1)
    set_field(content, "a.b", 2)
    assert content == {
        "arms": {
            "redi-0.8": {"alpha": 0.8, "learning_rate": 1e-5},
            "redi-0": {"alpha": 0},
            "new": {"alpha": 1},
        },
        "a": {"b": 2},
    }


def test_the_guard_can_be_off_in_a_recipe(tmp_path):
    """YAML reads a bare `off` as false."""
    file = tmp_path / "recipe.yaml"
    file.write_text("collapse_guard: off\n")
    rest = {"model_name_or_path": "m", "dataset_name": "d", "output_dir": "o"}
    assert load_config(TrainConfig, file, rest).collapse_guard == "off"
    assert make_config(TrainConfig, rest, "test").collapse_guard == "warn"
