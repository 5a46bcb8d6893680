"""Benchmarks by name: their files, the paper's preset, several in one evaluation, votes."""

import json

import pytest
from chat_formats import chatml, r1
from tiny import make_lm, make_tokenizer, write_jsonl

import redi.evaluation.generate
from redi.config import EvalConfig
from redi.errors import RediError
from redi.evaluation.benchmarks import BENCHMARKS, find_benchmark
from redi.evaluation.evaluate import evaluate, evaluate_benchmarks
from redi.evaluation.published import PUBLISHED, SETS
from redi.evaluation.verdicts import Question, grade, make_verifier, read_questions, vote


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_lm("qwen2").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def say(monkeypatch, text_of):
    """The model says `text_of(prompt, sample)`, and stops."""
    tokenizer = make_tokenizer()
    seen = {}

    def fake(lm, prompts, uniform_NT, *, stop_ids, **_):
        texts = []
        for prompt in map(tokenizer.decode, prompts):
            seen[prompt] = seen.get(prompt, -1) + 1
            texts.append(text_of(prompt, seen[prompt]))
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
        return [[*i, stop_ids[0]] for i in ids]

    monkeypatch.setattr(redi.evaluation.generate, "generate", fake)


@pytest.fixture
def data_dir(tmp_path):
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "aime.json").write_text(
        json.dumps([{"problem": "1+1", "answer": "002"}, {"problem": "2+2", "answer": 4}])
    )
    (folder / "minerva.json").write_text(
        json.dumps([{"problem": "half of 1", "answer": ["0.49\n", "\\frac{1}{2}"]}])
    )
    write_jsonl(folder / "gsm8k.jsonl", [{"question": "3+3", "answer": "3+3=<<3+3=6>>6\n#### 6"}])
    return folder


def test_files_are_found_by_either_name(data_dir):
    assert find_benchmark("aime24", str(data_dir)) == str(data_dir / "aime.json")
    (data_dir / "aime24.jsonl").write_text("")
    assert find_benchmark("aime24", str(data_dir)) == str(data_dir / "aime24.jsonl")
    assert find_benchmark("aime24", None) == BENCHMARKS["aime24"].hub
    with pytest.raises(RediError, match=r"'aime42' is none of math500"):
        find_benchmark("aime42", None)
    with pytest.raises(RediError, match=r"no math500.json or math.json"):
        find_benchmark("math500", str(data_dir))


def test_names_as_the_command_line_gives_them():
    config = EvalConfig(benchmarks="math500, aime24")
    assert config.benchmarks == ["math500", "aime24"]
    for settings in ({}, {"benchmarks": "gsm8k", "dataset_name": "x"}):
        with pytest.raises(ValueError, match="exactly one of dataset_name and benchmarks"):
            EvalConfig(**settings)
    with pytest.raises(ValueError, match="only with benchmarks"):
        EvalConfig(dataset_name="x", data_dir="y")


def test_the_papers_preset_and_fields_beside_it():
    config = EvalConfig(preset="paper", benchmarks="math500")
    assert (config.num_samples, config.temperature, config.top_p) == (16, 0.6, 0.95)
    assert (config.max_new_tokens, config.grader) == (30720, "rllm")
    assert r"'Therefore, the final answer is: $\boxed{ANSWER}$. I hope" in config.prompt_template
    assert config.prompt_template.endswith("before answering.\n\n{problem}")
    assert config.answer_prefix == "<think>\n"
    assert EvalConfig(preset="paper", benchmarks="math500", num_samples=4).num_samples == 4


def test_several_benchmarks_in_one_evaluation(model, data_dir, tmp_path, monkeypatch, capsys):
    say(monkeypatch, lambda prompt, sample: {"1+1": "#### 2", "half of 1": "#### 0.5"}.get(
        prompt[3:-3], "#### 6"))  # fmt: skip
    config = EvalConfig(
        benchmarks=["aime24", "minerva", "gsm8k"], data_dir=str(data_dir), num_samples=2,
        max_new_tokens=20, num_workers=1,
    )  # fmt: skip
    results = evaluate_benchmarks(model, config, tmp_path / "out")
    assert {name: r.pass_at_1 for name, r in results.items()} == {
        "aime24": 0.5, "minerva": 1.0, "gsm8k": 1.0,
    }  # fmt: skip
    assert (tmp_path / "out" / "aime24" / "generations.jsonl").exists()
    assert "aime24: 2 problems, not the usual 30" in capsys.readouterr().err


def test_a_benchmark_that_is_missing_stops_before_any_work(data_dir, tmp_path):
    config = EvalConfig(benchmarks=["aime24", "math500"], data_dir=str(data_dir))
    with pytest.raises(RediError, match="math500"):
        evaluate_benchmarks(tmp_path / "no-model", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_each_of_several_answers_is_right(data_dir):
    (question,) = read_questions(EvalConfig(dataset_name=str(data_dir / "minerva.json")))
    assert (question.answer.strip(), question.others) == ("0.49", (r"\frac{1}{2}",))


@pytest.mark.parametrize(("said", "score"), [("#### 0.25", 1), ("#### 7", 1), ("#### 9", 0)])
def test_grading_against_several_answers(model, tmp_path, monkeypatch, said, score):
    data = write_jsonl(tmp_path / "t.jsonl", [{"problem": "1", "answer": ["7", "8", "1/4"]}])
    say(monkeypatch, lambda prompt, sample: said)
    config = EvalConfig(dataset_name=str(data), num_samples=1, max_new_tokens=20, num_workers=1)
    assert evaluate(model, config, tmp_path / "out").pass_at_1 == score


def test_votes_are_by_the_graders_equality(model, tmp_path, monkeypatch):
    said = {
        "1": ["#### 2", "#### 6", "#### 2*3", "#### 4", "#### 6.0"],  # a wrong 6 has 3 of 5
        "2": ["#### 3", "#### 3.0", "#### 4", "#### 4", "?"],  # a tie of right and wrong
        "3": ["?", "?", "?", "#### 5", "?"],  # one vote decides
        "4": ["?", "?", "?", "?", "?"],
    }
    data = write_jsonl(
        tmp_path / "t.jsonl",
        [{"problem": p, "answer": a} for p, a in (("1", "2"), ("2", "3"), ("3", "5"), ("4", "1"))],
    )
    say(monkeypatch, lambda prompt, sample: said[prompt[3:-3]][sample])
    config = EvalConfig(dataset_name=str(data), num_samples=5, max_new_tokens=20, num_workers=1)
    result = evaluate(model, config, tmp_path / "out")
    votes = [json.loads(line)["groups"] for line in (tmp_path / "out" / "votes.jsonl").open()]
    assert votes == [[0, 1, 1, 2, 1], [0, 0, 1, 1, -1], [-1, -1, -1, 0, -1], [-1] * 5]
    assert result.majority_at(5) == pytest.approx((0 + 0.5 + 1 + 0) / 4)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text())["majority@4"] is not None


def test_answers_that_nothing_marks_vote_too(tmp_path):
    said = [
        "The answer is 4.",  # right
        "So we conclude that the answer is 5.",
        "That is $5.0$.",
        r"\boxed{5}",
        "The answer is 1/2 of it.",
        "The answer is 5, or 10/2, which is all that can be said about it 7 times.",
        "It is 4, cut off",
        "The answer is {5, 6}.",  # not read as the grader reads it
    ]
    rows = [
        {"problem": 0, "sample": i, "text": text, "finished": i != 6, "verdict": "wrong"}
        for i, text in enumerate(said)
    ]
    config = EvalConfig(dataset_name="t.jsonl", num_workers=1)
    with make_verifier(config) as verifier:
        grade(rows, [Question("q", "2+2", "4")], verifier)
    assert [row["verdict"] for row in rows] == ["correct", *["wrong"] * 7]
    vote(config, write_jsonl(tmp_path / "generations.jsonl", rows), tmp_path / "votes.jsonl")
    [row] = map(json.loads, (tmp_path / "votes.jsonl").open())
    assert row["groups"] == [0, 2, 2, 2, 3, 2, -1, 1]


def test_the_prefix_reaches_the_model_and_the_grader(model, tmp_path, monkeypatch):
    data = write_jsonl(tmp_path / "t.jsonl", [{"problem": "1", "answer": "7"}])
    seen = []
    say(monkeypatch, lambda prompt, sample: seen.append(prompt) or "#### 7")
    config = EvalConfig(
        dataset_name=str(data), num_samples=1, max_new_tokens=20, answer_prefix="so ", num_workers=1
    )
    evaluate(model, config, tmp_path / "out")
    assert seen == ["<q>1<a>so "]
    row = json.loads((tmp_path / "out" / "generations.jsonl").read_text())
    assert (row["text"], row["num_tokens"]) == ("so #### 7", 7)


@pytest.mark.parametrize(
    ("tokenizer", "prefix", "end"),
    [
        (r1(), "<think>\n", "<｜Assistant｜><think>\n"),
        (r1(), "<think>So", "<｜Assistant｜><think>\nSo"),
        (r1(), "So", "<｜Assistant｜><think>\nSo"),
        (chatml(), "<think>\n", "<|im_start|>assistant\n<think>\n"),
    ],
)
def test_a_think_block_that_the_prompt_opens_is_not_opened_again(
    tmp_path, monkeypatch, tokenizer, prefix, end
):
    make_lm("qwen2", vocab_size=300, max_position_embeddings=40_000).save_pretrained(tmp_path / "m")
    tokenizer.save_pretrained(tmp_path / "m")
    seen = []

    def fake(lm, prompts, uniform_NT, *, stop_ids, **_):
        seen.extend(map(tokenizer.decode, prompts))
        said = tokenizer("</think>7", add_special_tokens=False)["input_ids"]
        return [[*said, stop_ids[0]] for _ in prompts]

    monkeypatch.setattr(redi.evaluation.generate, "generate", fake)
    data = write_jsonl(tmp_path / "t.jsonl", [{"problem": "1", "answer": "7"}])
    config = EvalConfig(
        preset="paper", dataset_name=str(data), num_samples=1, num_workers=1, answer_prefix=prefix
    )
    evaluate(tmp_path / "m", config, tmp_path / "out")
    (prompt,) = seen
    assert prompt.endswith(end) and prompt.count("<think>") == 1
    row = json.loads((tmp_path / "out" / "generations.jsonl").read_text())
    assert row["text"] == prefix + "</think>7"  # what is graded begins as it is told to


def test_the_papers_rows_average_as_the_paper_says():
    assert len(PUBLISHED) == 10
    for row in PUBLISHED:
        assert len(row.pass_at_1) == len(SETS)
        assert sum(row.pass_at_1) / len(SETS) == pytest.approx(
            row.average[0], abs=0.1
        )  # of rounded figures
        for pass_16, pass_1 in zip(row.pass_at_16 or (), row.pass_at_1, strict=False):
            assert pass_16 > pass_1
