import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redi.data.files import find_files, read_rows
from redi.data.read import (
    Example,
    answer_of,
    make_prompt,
    read_examples,
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
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if file.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), file)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(text.encode()))
    else:
        file.write_text(text)
    return file


@pytest.mark.parametrize(
    ("name", "unit"), [("a.jsonl", "line"), ("a.jsonl.gz", "line"), ("a.parquet", "row")]
)
def test_every_format_gives_the_same_rows(tmp_path, name, unit):
    rows = [{"prompt": f"é {i}", "n": i, "list": ["x", None]} for i in range(600)]
    read = list(read_rows(write(tmp_path / name, rows)))
    assert [row for _, row in read] == rows
    assert (read[0][0], read[599][0]) == (f"{name} {unit} 1", f"{name} {unit} 600")


def test_folders_and_globs_are_read_in_order_and_say_where(tmp_path):
    write(tmp_path / "b.jsonl", [{"n": 2}])
    write(tmp_path / "a.parquet", [{"n": 1}])
    write(tmp_path / "deep" / "b.jsonl", [{"n": 3}])
    (tmp_path / "notes.txt").write_text("no data")
    read = list(read_rows(tmp_path))
    assert [(where, row["n"]) for where, row in read] == [
        ("a.parquet row 1", 1),
        ("b.jsonl line 1", 2),
        ("deep/b.jsonl line 1", 3),
    ]
    assert [row["n"] for _, row in read_rows(f"{tmp_path}/**/b.*")] == [2, 3]


def test_blank_lines_count_as_lines(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('\n{"n": 1}\n   \n{"n": 2}')
    assert list(read_rows(file)) == [("a.jsonl line 2", {"n": 1}), ("a.jsonl line 4", {"n": 2})]


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


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"n": 1}\n{"n": 2}\n{"n": 3\n', "a.jsonl line 3: not JSON: .* column 8"),
        ("a.jsonl", b'{"n": 1}\n[1]\n', "a.jsonl line 2: not an object .*: a list"),
        ("a.jsonl", b'{"n": 1}\n{"n": "\xff\xfe"}\n', "a.jsonl line 2: not UTF-8 text"),
        ("a.jsonl.gz", b"no archive", "a.jsonl.gz after line 0: cannot be read"),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"n": 1}\n', mtime=0)[:-6],
            "a.jsonl.gz after line 1: cannot be read",
        ),
        ("a.parquet", b"no parquet", "a.parquet after row 0: cannot be read"),
        ("a.csv", b"n\n1\n", "a.csv: not a data file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RediError, match=message):
        list(read_rows(tmp_path / name))


def test_missing_files_are_named(tmp_path):
    with pytest.raises(RediError, match=r"absent.jsonl: no such file"):
        find_files(tmp_path / "absent.jsonl")
    with pytest.raises(RediError, match=r"holds no .jsonl"):
        find_files(tmp_path)
    with pytest.raises(RediError, match=r"\*.parquet: no such file"):
        find_files(tmp_path / "*.parquet")
    write(tmp_path / "empty.jsonl", [])
    with pytest.raises(RediError, match=r"empty.jsonl: no rows"):
        read_examples(tmp_path / "empty.jsonl")


def test_a_built_folder_is_not_read_twice(tmp_path):
    for name in ("positives", "pairs"):
        write(tmp_path / f"{name}.parquet", [{"prompt": "p", "chosen": "2", "rejected": "3"}])
    with pytest.raises(RediError, match="name one of them"):
        read_examples(tmp_path)


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
