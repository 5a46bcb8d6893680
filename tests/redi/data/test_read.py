import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redi.data.files import read_rows
from redi.data.read import (
    Example,
    answer_of,
    make_prompt,
    read_examples,
    to_example,
    to_item,
)
from redi.errors import RediError

USER = {"role": "user", "content": "1+1?"}
RIGHT = {"role": "assistant", "content": "2"}
WRONG = {"role": "assistant", "content": "3"}
RAW = {
    "problem": "1+1?",
    "answer": "2",
    "generations": ["2", "3"],
    "correctness": {
        "llama_verification": [True, None],
        "math_verify_reparsed_answer": [True, False],
        "math_verify": [False, False],  # the paper does not use it, and neither do we
    },
    "problem_is_valid": "Yes",
    "source": "olympiads",
    "uuid": "a-1",
}


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    else:
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_raw_row_of_openr1_math_raw(tmp_path):
    [(where, row)] = read_rows(write(tmp_path / "raw.parquet", [RAW]))
    problem = to_item(row, where)
    assert (problem.id, problem.prompt, problem.answer) == ("a-1", "1+1?", "2")
    assert problem.generations == ["2", "3"]
    assert problem.judgments == {"llama": [True, None], "math_verify": [True, False]}
    assert problem.is_valid and problem.source == "olympiads"
    assert problem.where == "raw.parquet row 1"


def test_flat_names_of_openr1_math_220k():
    row = {k: v for k, v in RAW.items() if k != "correctness"}
    row |= {"correctness_llama": None, "correctness_math_verify": [True, False], "uuid": None}
    problem = to_item(row, "x.jsonl line 3")
    assert problem.judgments == {"math_verify": [True, False]}
    assert problem.id == "x.jsonl line 3"


@pytest.mark.parametrize("name", ["prompt", "problem", "question"])
def test_plain_raw_row(name):
    row = {name: "1+1?", "answer": 2.0, "generations": ["2", None]}
    problem = to_item(row, "x")
    assert (problem.prompt, problem.answer, problem.judgments) == ("1+1?", "2", {})
    assert problem.is_valid
    judged = to_item({name: "1+1?", "generations": ["2", "3"], "verdicts": [True, None]}, "x")
    assert judged.judgments == {"verdicts": [True, None]} and judged.answer is None


@pytest.mark.parametrize(
    ("given", "valid"), [("Yes", True), (" yes ", True), ("No", False), (None, False), (True, True)]
)
def test_problem_is_valid(given, valid):
    assert to_item(RAW | {"problem_is_valid": given}, "x").is_valid is valid


@pytest.mark.parametrize(
    ("given", "answer"),
    [(7, "7"), (7.0, "7"), (0.5, "0.5"), (["7"], "7"), (float("nan"), None), (None, None)],
)
def test_answers_become_text(given, answer):
    assert answer_of({"answer": given}, "x") == answer


def test_null_problem_and_generations_are_left_to_build():
    problem = to_item({"problem": None, "answer": "2", "generations": None}, "x")
    assert problem.prompt == "" and problem.generations == []


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "1+1=", "chosen": "2", "rejected": "3"}, "1+1=", "2", "3"),
        ({"prompt": "1+1=", "chosen": "2", "rejected": None}, "1+1=", "2", None),
        ({"prompt": [USER], "chosen": [RIGHT], "rejected": [WRONG]}, [USER], "2", "3"),
        # TRL's implicit prompt
        ({"chosen": [USER, RIGHT], "rejected": [USER, WRONG]}, [USER], "2", "3"),
        # the paper's own files: a text prompt beside whole conversations
        (
            {"prompt": "1+1?", "chosen": [USER, RIGHT], "rejected": [USER, WRONG]},
            [USER],
            "2",
            "3",
        ),
        ({"prompt": "1+1?", "chosen": [RIGHT], "rejected": [WRONG]}, [USER], "2", "3"),
        ({"prompt": "1+1=", "completion": "2"}, "1+1=", "2", None),
        ({"prompt": "1+1=", "completion": "2", "label": True}, "1+1=", "2", None),
        ({"prompt": "1+1=", "completion": "3", "label": 0}, "1+1=", None, "3"),
        ({"prompt": [USER], "completion": [WRONG], "label": False}, [USER], None, "3"),
        ({"messages": [USER, WRONG, USER, RIGHT]}, [USER, WRONG, USER], "2", None),
        ({"question": "1+1=", "completion": "2"}, "1+1=", "2", None),
    ],
)
def test_ready_rows(row, prompt, chosen, rejected):
    assert to_item(row, "x") == Example("x", prompt, chosen, rejected)


def test_read_examples_keeps_id_answer_and_source(tmp_path):
    row = {
        "id": 7,
        "prompt": "1+1=",
        "chosen": "2",
        "rejected": "3",
        "answer": ["2"],
        "source": "s",
    }
    assert read_examples(write(tmp_path / "a.jsonl", [row])) == [
        Example("7", "1+1=", "2", "3", "2", "s")
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"problem": "p", "answer": "2", "generation": ["2"]},
            "x line 9: no column `generations` or .*; columns found: problem, answer, generation "
            r"\(is `generation` meant\?\)",
        ),
        ({"text": "p", "answer": "2", "generations": ["2"]}, "no column `problem` or `prompt`"),
        ({"problem": "p", "generations": ["2"]}, "neither `answer` nor verdicts"),
        ({"problem": "p", "answer": "2", "generations": "2"}, "`generations` is text .*a list"),
        ({"problem": "p", "answer": "2", "generations": ["2", 3]}, r"`generations\[1\]` is a num"),
        (RAW | {"correctness": [True]}, "`correctness` is a list"),
        (
            RAW | {"correctness": {"llama_verification": ["yes", "no"]}},
            r"`llama_verification\[0\]` is text \('yes'\); expected true, false or null",
        ),
        (RAW | {"answer": ["2", "3"]}, "`answer` is a list"),
        ({"prompt": "p", "chosen": None, "rejected": None}, "`chosen` is null"),
        ({"prompt": 5, "chosen": "2", "rejected": "3"}, "`prompt` is a number .*expected text"),
        ({"prompt": "p", "completion": "2", "label": "good"}, "`label` is 'good'"),
        ({"messages": [RIGHT, USER]}, "last message of `messages` must be the assistant's"),
        ({"messages": []}, "`messages` is a list"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, r"`messages\[1\]` must"),
        (
            {"messages": [USER, RIGHT | {"reasoning_content": "hm"}]},
            r"`messages\[1\].reasoning_content` is not supported",
        ),
        (
            {"chosen": [USER, RIGHT], "rejected": [USER | {"content": "1+2?"}, WRONG]},
            "begin with different prompts",
        ),
        (
            {"prompt": [USER], "chosen": [WRONG, USER, RIGHT], "rejected": [WRONG, USER, WRONG]},
            "`chosen` must be one assistant message after `prompt`",
        ),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(RediError, match=f"^x line 9: .*{message.removeprefix('x line 9: ')}"):
        to_item(row, "x line 9")


def test_raw_rows_are_no_examples(tmp_path):
    with pytest.raises(
        RediError, match=r"raw.jsonl line 1: raw generations; run `redi data build`"
    ):
        read_examples(write(tmp_path / "raw.jsonl", [RAW]))


def test_make_prompt():
    assert make_prompt("1+1?") == [USER]
    system = {"role": "system", "content": "Be brief."}
    assert make_prompt("1+1?", "Be brief.", "Q: {problem}") == [
        system,
        {"role": "user", "content": "Q: 1+1?"},
    ]
    assert make_prompt([USER], "Be brief.") == [system, USER]
    assert make_prompt([system, USER], "Be long.") == [system, USER]
    assert make_prompt("{x} {problem}", None, "{problem}{y}")[0]["content"] == "{x} {problem}{y}"


def test_sharegpt_conversations():
    turns = [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    prompt = [{"role": "user", "content": "1+1?"}]
    example = to_example({"conversations": turns, "id": "a"}, "row 1")
    assert example == Example("a", prompt, "2", None)
    example = to_example({"conversations": turns, "id": "a", "system": "Think."}, "row 1")
    assert example.prompt == [{"role": "system", "content": "Think."}, *prompt]
    with pytest.raises(RediError, match=r"row 1: the last message of `conversations`"):
        to_example({"conversations": turns[:1]}, "row 1")


def test_columns_of_traces_by_other_names_are_hinted_at():
    row = dict.fromkeys(("question", "solution", "deepseek_thinking_trajectory", "metadata"), "x")
    message = r"if `solution`, `deepseek_thinking_trajectory` hold the traces, .* `generations`"
    with pytest.raises(RediError, match=message):
        to_item(row, "row 1")
