"""What a user types, and what bad input gets: one line that names the culprit, exit code 2."""

import json

import pytest
import tiny
import yaml
from made_up import write_eval

from redi import cli


@pytest.fixture
def redi(monkeypatch, capsys):
    """Runs the command line in this process; returns (exit code, stdout, stderr)."""

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["redi", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run


def recipe(folder, **changes):
    file = folder / "recipe.yaml"
    settings = {k: v for k, v in tiny.train_settings(folder, **changes).items() if v is not None}
    file.write_text(yaml.safe_dump(settings))
    return file


def refused(result, *words):
    code, _, err = result
    assert code == 2, err
    assert err.startswith("error: ")
    assert "Traceback" not in err
    for word in words:
        assert word in err


def test_train_with_overrides(redi, tmp_path):
    code, out, _ = redi(
        "train", "--config", recipe(tmp_path), "--max_steps", 2, "--learning-rate=1e-4",
        "--alpha", "0.5", "--architecture.num_hidden_layers", 1,
    )  # fmt: skip
    assert code == 0
    assert "(2 steps)" in out
    card = (tmp_path / "out" / "README.md").read_text()
    assert "alpha: 0.5" in card
    assert "learning_rate: 0.0001" in card
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1


def test_dry_run_trains_nothing(redi, tmp_path):
    code, out, _ = redi("train", "--config", recipe(tmp_path), "--dry-run")
    assert code == 0
    assert "6 of 5 pairs (3 an epoch)" in out
    assert not (tmp_path / "out").exists()


QWEN = ["1,543,714,304 parameters", "rope theta 300,000", "32,768 positions"]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("sft", ["77,629 traces", "3,035 of 128", "304 warm-up", "5.00e-05 at 304"]),
        ("redi", ["53,175 pairs", "1,662 of 32", "167 warm-up", "REDI, alpha = 0.8"]),
    ],
)
def test_the_papers_recipes_offline(redi, name, words, pytestconfig):
    file = pytestconfig.rootpath / "recipes" / f"qwen-redi-1.5b-{name}.yaml"
    code, out, err = redi("train", "--config", file, "--dry-run")
    assert code == 0, err
    for word in [*QWEN, *words]:
        assert word in out


def test_recipe_missing(redi, tmp_path):
    refused(redi("train", "--config", tmp_path / "no.yaml"), "no.yaml", "no such recipe")


def test_recipe_is_not_yaml(redi, tmp_path):
    file = tmp_path / "bad.yaml"
    file.write_text("a: [1,")
    refused(redi("train", "--config", file), "bad.yaml", "not valid YAML")


def test_unknown_key_suggests_the_nearest(redi, tmp_path):
    file = recipe(tmp_path, learning_rat=1e-4)
    refused(redi("train", "--config", file), "learning_rat", "did you mean learning_rate?")


def test_names_from_other_trainers_are_explained(redi, tmp_path):
    file = recipe(tmp_path, gradient_accumulation_steps=4)
    refused(redi("train", "--config", file), "train_batch_size examples")


def test_wrong_type_names_the_field(redi, tmp_path):
    refused(redi("train", "--config", recipe(tmp_path, max_steps="many")), "max_steps")


def test_no_model_at_all(redi, tmp_path):
    refused(redi("train", "--config", recipe(tmp_path, architecture=None)), "model_name_or_path")


def test_negative_alpha(redi, tmp_path):
    refused(redi("train", "--config", recipe(tmp_path), "--alpha", "-0.1"), "alpha")


def test_alpha_above_one_warns(redi, tmp_path):
    with pytest.warns(UserWarning, match="collapse at alpha = 1"):
        code, *_ = redi("train", "--config", recipe(tmp_path), "--alpha", "1.5", "--dry-run")
    assert code == 0


def test_dataset_missing(redi, tmp_path):
    file = recipe(tmp_path, dataset_name=str(tmp_path / "none.jsonl"))
    refused(redi("train", "--config", file), "none.jsonl", "no such file")


def test_not_json_on_line_n(redi, tmp_path):
    file = recipe(tmp_path)
    with (tmp_path / "pairs.jsonl").open("a") as rows:
        rows.write("{oops\n")
    refused(redi("train", "--config", file), "pairs.jsonl line 13", "not JSON")


def test_column_missing(redi, tmp_path):
    file = recipe(tmp_path)
    tiny.write_jsonl(
        tmp_path / "pairs.jsonl", [{"prompt": "1+1=", "choosen": "2", "rejekted": "3"}]
    )
    refused(redi("train", "--config", file), "pairs.jsonl line 1", "chosen", "choosen")


def test_redi_without_rejected_traces(redi, tmp_path):
    file = recipe(tmp_path)
    tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"prompt": "1+1=", "completion": "2"}])
    refused(redi("train", "--config", file), "no rejected traces", "objective: redi")


def test_everything_too_long(redi, tmp_path):
    refused(
        redi("train", "--config", recipe(tmp_path, max_length=4)), "12 longer than max_length 4"
    )
    assert not (tmp_path / "out").exists()


def test_prompt_that_is_no_prefix_after_templating(redi, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{{ m['content'] }}<e>{% endfor %}"
        "{% if add_generation_prompt %}<a>{% endif %}"
    )
    file = recipe(tmp_path, chat_template=str(template))
    refused(redi("train", "--config", file), "sum-0", "not a prefix", "templating")


def test_model_folder_without_tokenizer(redi, tmp_path):
    folder = tmp_path / "model"
    tiny.make_lm().config.save_pretrained(folder)
    file = recipe(tmp_path, model_name_or_path=str(folder), tokenizer_name_or_path=str(folder))
    refused(redi("train", "--config", file), str(folder), "no tokenizer")


def test_model_missing(redi, tmp_path):
    file = recipe(tmp_path, architecture=None, model_name_or_path=str(tmp_path / "nothing"))
    refused(redi("train", "--config", file), "nothing", "no model could be loaded")


RAW = [
    {"problem": "1+1=?", "answer": "2", "generations": ["1+1 #### 2", "1+1 #### 3"]},
    {"problem": "2+2=?", "answer": "4", "generations": ["2+2 #### 5", "2+2 #### 4"]},
]


def test_data_build_then_train_on_it(redi, tmp_path):
    raw = tiny.write_jsonl(tmp_path / "raw.jsonl", RAW)
    code, out, err = redi("data", "build", "--path", raw, "--output_dir", tmp_path / "data")
    assert code == 0, err
    assert out.splitlines()[0].split() == ["rows", "read", "2"]
    file = recipe(tmp_path, dataset_name=str(tmp_path / "data" / "pairs.parquet"), max_steps=1)
    assert redi("train", "--config", file)[0] == 0


def test_data_build_with_verdicts_of_another_length(redi, tmp_path):
    rows = [row | {"verdicts": [True]} for row in RAW]
    raw = tiny.write_jsonl(tmp_path / "raw.jsonl", rows)
    result = redi("data", "build", "--path", raw, "--output_dir", tmp_path / "data")
    refused(result, "raw.jsonl", "no pairs left", "2")
    assert [file.name for file in tmp_path.glob("data/*")] == ["failed-report.txt"]


def test_data_build_without_a_wrong_trace(redi, tmp_path):
    rows = [row | {"verdicts": [True, True]} for row in RAW]
    raw = tiny.write_jsonl(tmp_path / "raw.jsonl", rows)
    result = redi("data", "build", "--path", raw, "--output_dir", tmp_path / "data")
    refused(result, "no pairs left")


def test_eval_prints_a_table(redi, tmp_path):
    assert redi("train", "--config", recipe(tmp_path, max_steps=1))[0] == 0
    problems = tiny.write_jsonl(tmp_path / "test.jsonl", RAW)
    code, out, err = redi(
        "eval", "--model", tmp_path / "out", "--dataset_name", problems,
        "--output_dir", tmp_path / "eval", "--max_new_tokens", 4, "--num_samples", 2,
    )  # fmt: skip
    assert code == 0, err
    assert "pass@1" in out
    assert len((tmp_path / "eval" / "generations.jsonl").read_text().splitlines()) == 4


def test_benchmarks_by_name_then_compared(redi, tmp_path):
    assert redi("train", "--config", recipe(tmp_path, max_steps=1))[0] == 0
    for name in ("aime", "amc"):
        (tmp_path / f"{name}.json").write_text(json.dumps(RAW))
    for name in ("a", "b"):
        code, out, err = redi(
            "eval", "--model", tmp_path / "out", "--benchmarks", "aime24,amc23", "--data_dir",
            tmp_path, "--output_dir", tmp_path / name, "--max_new_tokens", 4, "--num_samples", 2,
        )  # fmt: skip
        assert code == 0, err
        assert [line.split()[0] for line in out.splitlines() if " 0.0" in line] == [
            "AIME24", "AMC23",
        ]  # fmt: skip
    code, out, err = redi("compare", tmp_path / "a", tmp_path / "b", "--published")
    assert code == 0, err
    assert "[published, Table 1] Qwen-REDI-1.5B" in out
    assert "AIME24: b" in out
    refused(redi("compare", tmp_path / "none"), "none", "no finished evaluation")


def test_eval_without_answers(redi, tmp_path):
    assert redi("train", "--config", recipe(tmp_path, max_steps=1))[0] == 0
    problems = tiny.write_jsonl(tmp_path / "test.jsonl", [{"problem": "1+1=?"}])
    result = redi(
        "eval", "--model", tmp_path / "out", "--dataset_name", problems,
        "--output_dir", tmp_path / "eval", "--max_new_tokens", 4,
    )  # fmt: skip
    code, _, err = result
    assert code == 2
    assert "error: test.jsonl line 1: `answer` is missing" in err


def test_fields_without_values_and_stray_words(redi, tmp_path):
    refused(
        redi("train", "--config", recipe(tmp_path), "--max_steps"), "--max_steps: needs a value"
    )
    refused(redi("train", "--config", recipe(tmp_path), "stray"), "stray", "--field value")


def test_pages(redi, tmp_path):
    assert redi("train", "--config", recipe(tmp_path), "--max_steps", 2)[0] == 0
    out, pairs = tmp_path / "out", tmp_path / "pairs.jsonl"
    assert f"page: {out / 'results.html'}" in redi("report", out)[1]
    page = tmp_path / "traces.html"
    args = ("--dataset_name", pairs, "--output", page, "--num_problems", 3, "--sort", "id")
    assert redi("traces", out, out, *args)[0] == 0
    assert page.read_text().count("<article>") == 3
    _, shown, _ = redi(
        "data", "show", pairs, "--tokenizer", tmp_path / "tokenizer", "--id", "sum-2"
    )
    assert "chosen, trained" in shown and "7+3=10" in shown
    args = ("data", "show", pairs, "--tokenizer", tmp_path / "tokenizer")
    assert redi(*args, "--row", 2, "--output", tmp_path / "show.html")[0] == 0
    assert "sum-1" in (tmp_path / "show.html").read_text()
    refused(redi(*args, "--row", 2, "--id", "x"), "--row and --id")
    refused(redi("report", tmp_path / "tokenizer"), "no run")
    refused(redi("data", "report", tmp_path), "report.json")


def test_compare_writes_a_page(redi, tmp_path):
    for name in "ab":
        write_eval(tmp_path / name, [[1, 0], [0, 0]])
    code, out, _ = redi("compare", tmp_path / "a", tmp_path / "b", "--output", tmp_path / "c.html")
    assert code == 0 and f"page: {tmp_path / 'c.html'}" in out
    assert "25.0" in (tmp_path / "c.html").read_text()
