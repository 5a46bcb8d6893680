import json
import os
import subprocess
import sys

import pyarrow.parquet as pq
import pytest
from chat_formats import OPENS_THINKING, byte_tokenizer, chatml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redi.config import DataConfig
from redi.data.build import build
from redi.data.read import Example, read_examples
from redi.data.tokenize import ChatFormat
from redi.errors import RediError

OUTPUTS = ["pairs.parquet", "positives.parquet", "report.json", "report.txt"]


def raw(generations, answer="2", **columns):
    return {"problem": "1+1?", "answer": answer, "generations": generations, **columns}


def write(folder, rows, name="raw.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(folder, rows, tokenizer=None, duplicates="keep", anew=True, **config):
    """The problems are all the same one; a build that is there goes first."""
    if anew:
        (folder / "out" / "report.json").unlink(missing_ok=True)
    config |= {"duplicates": duplicates}
    config = DataConfig(path=str(write(folder, rows)), num_workers=1, **config)
    return build(config, folder / "out", tokenizer=tokenizer)


def texts(folder, name):
    examples = read_examples(folder / "out" / f"{name}.parquet")
    return [(example.chosen, example.rejected) for example in examples]


def test_first_correct_and_first_incorrect_of_each_problem(tmp_path):
    report = run(
        tmp_path,
        [
            raw(["no idea", "####3", "so ####2", "####4", "####2"], id="a", source="s"),
            raw(["####2", None, " "], id="b"),
            raw(["####4", "####5"], id="c"),
        ],
    )
    prompt = [{"role": "user", "content": "1+1?"}]
    assert read_examples(tmp_path / "out" / "pairs.parquet") == [
        Example("a", prompt, "so ####2", "####3", "2", "s")
    ]
    assert read_examples(tmp_path / "out" / "positives.parquet") == [
        Example("a", prompt, "so ####2", None, "2", "s"),
        Example("b", prompt, "####2", None, "2"),
    ]
    assert report.counts == {
        "rows read": 3,
        "traces read": 10,
        "traces correct": 3,
        "traces incorrect": 4,
        "traces kept": 3,
        "positives": 2,
        "pairs": 1,
    }
    first = {"a": "raw.jsonl line 1", "b": "raw.jsonl line 2", "c": "raw.jsonl line 3"}
    assert report.dropped_traces == {
        "no answer that can be read": {"count": 1, "first": first["a"]},
        "correct, not the first of its problem": {"count": 1, "first": first["a"]},
        "incorrect, not the first of its problem": {"count": 1, "first": first["a"]},
        "empty generation": {"count": 2, "first": first["b"]},
        "incorrect, no correct one to pair with": {"count": 2, "first": first["c"]},
    }
    assert report.lengths["correct traces kept"] == {
        "mean": 6.5,
        "median": 6.5,
        "p95": 7.85,
        "max": 8,
    }
    assert json.loads((tmp_path / "out" / "report.json").read_text())["counts"] == report.counts
    lines = report.text().splitlines()
    assert (tmp_path / "out" / "report.txt").read_text() == report.text() + "\n"
    assert len({line.index("first:") for line in lines if "first:" in line}) == 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OUTPUTS


def test_files_are_trls(tmp_path):
    run(
        tmp_path, [raw(["####2", "####3"])], system_prompt="Be brief.", prompt_template="Q{problem}"
    )
    [pair] = pq.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert pair["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Q1+1?"},
    ]
    assert pair["chosen"] == [{"role": "assistant", "content": "####2"}]
    assert pair["rejected"] == [{"role": "assistant", "content": "####3"}]
    [positive] = pq.read_table(tmp_path / "out" / "positives.parquet").to_pylist()
    assert positive["prompt"] == pair["prompt"] and positive["completion"] == pair["chosen"]


# Three traces that end in 2, then three that end in 3; the answer is 2.
LLAMA = [True, False, None, True, False, None]
TRACES = ["a####2", "b####2", "c####2", "d####3", "e####3", "f####3"]


@pytest.mark.parametrize(
    ("judges", "columns", "correct"),
    [
        ("both", {}, "abc"),
        ("both", {"correctness_llama": LLAMA}, "acd"),
        ("any", {"correctness_llama": LLAMA}, "acd"),
        ("math_verify", {"correctness_llama": LLAMA}, "abc"),
        ("math_verify", {"correctness_math_verify": LLAMA}, "acd"),
        ("both", {"correctness_llama": LLAMA, "correctness_math_verify": [True] * 6}, "acd"),
        ("any", {"correctness_llama": LLAMA, "correctness_math_verify": [True] * 6}, "abcdef"),
        ("both", {"correctness_llama": LLAMA, "correctness_math_verify": [False] * 6}, ""),
        ("any", {"correctness_llama": LLAMA, "correctness_math_verify": [False] * 6}, "acd"),
        ("both", {"correctness_llama": LLAMA, "correctness_math_verify": [None] * 6}, "ac"),
        ("any", {"correctness_llama": LLAMA, "correctness_math_verify": [None] * 6}, "abcd"),
        ("both", {"verdicts": LLAMA}, "acd"),
    ],
)
def test_judges(tmp_path, judges, columns, correct):
    """Each trace stands in a problem of its own, beside one that is right and one that is wrong."""
    rows = [
        raw(
            [trace, "good####2", "bad####3"],
            **{name: [votes[i], True, False] for name, votes in columns.items()},
        )
        for i, trace in enumerate(TRACES)
    ]
    run(tmp_path, rows, judges=judges)
    expected = [
        (
            trace if trace[0] in correct else "good####2",
            "bad####3" if trace[0] in correct else trace,
        )
        for trace in TRACES
    ]
    assert texts(tmp_path, "pairs") == expected


def test_recorded_verdicts_are_not_judged_again(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)  # judging these would start a process
    run(tmp_path, [raw([r"\boxed{x}", r"\boxed{y}"], verdicts=[False, True])])
    assert texts(tmp_path, "pairs") == [(r"\boxed{y}", r"\boxed{x}")]


def test_timeouts_and_missing_verdicts_are_never_negatives(tmp_path):
    hangs = r"\boxed{9^{9^{9^9}}}"
    report = run(
        tmp_path,
        [
            raw([hangs, "####2", "I give up", "####3"]),
            raw([hangs, "x", "y"], answer=None, verdicts=[None, True, False]),
        ],
        verify_timeout=1.0,
    )
    assert texts(tmp_path, "pairs") == [("####2", "####3"), ("x", "y")]
    assert report.dropped_traces == {
        "judging took too long": {"count": 1, "first": "raw.jsonl line 1"},
        "no answer that can be read": {"count": 1, "first": "raw.jsonl line 1"},
        "no verdict, and no answer to judge by": {"count": 1, "first": "raw.jsonl line 2"},
    }


def test_unusable_rows_are_dropped_with_a_reason(tmp_path):
    good = raw(["####2", "####3"])
    report = run(
        tmp_path,
        [
            good | {"verdicts": [True]},
            good | {"problem_is_valid": "Incomplete"},
            good | {"problem": None},
            good | {"generations": []},
            good,
        ],
    )
    assert report.dropped_rows == {
        "verdicts and generations differ in number": {"count": 1, "first": "raw.jsonl line 1"},
        "problem_is_valid is not yes": {"count": 1, "first": "raw.jsonl line 2"},
        "empty problem": {"count": 1, "first": "raw.jsonl line 3"},
        "no generations": {"count": 1, "first": "raw.jsonl line 4"},
    }
    assert sum(entry["count"] for entry in report.dropped_traces.values()) == 6
    assert len(texts(tmp_path, "pairs")) == 1


votes = st.sampled_from([True, False, None])
traces = st.sampled_from(["####2", "####3", "a ####2", "b ####3", "no answer", "", None])


@st.composite
def raw_rows(draw):
    generations = draw(st.lists(traces, max_size=6))
    columns = {}
    for name in draw(st.sets(st.sampled_from(["correctness_llama", "correctness_math_verify"]))):
        size = len(generations) + draw(st.sampled_from([0, 0, 0, 1]))
        columns[name] = draw(st.lists(votes, min_size=size, max_size=size))
    valid = draw(st.sampled_from(["Yes", "Yes", "No"]))
    return raw(generations, **columns, problem_is_valid=valid)


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(raw_rows(), max_size=8), st.sampled_from(["both", "any", "math_verify"]))
def test_every_trace_is_kept_or_dropped_with_a_reason(tmp_path, rows, judges):
    # "no answer" without a number would go to math-verify; a stub would hide the accounting.
    for row in rows:
        row["generations"] = [g and g.replace("no answer", "####7") for g in row["generations"]]
    rows.append(raw(["####2", "####3"]))
    report = run(tmp_path, rows, judges=judges)
    num_traces = sum(len(row["generations"]) for row in rows)
    dropped = sum(entry["count"] for entry in report.dropped_traces.values())
    assert report.counts["rows read"] == len(rows)
    assert report.counts["traces read"] == num_traces == report.counts["traces kept"] + dropped
    pairs, positives = texts(tmp_path, "pairs"), texts(tmp_path, "positives")
    assert report.counts["traces kept"] == len(positives) + len(pairs)
    assert [chosen for chosen, _ in pairs if chosen is None] == []
    assert report.counts["pairs"] == len(pairs) and report.counts["positives"] == len(positives)


def test_same_input_same_bytes_whatever_the_workers(tmp_path):
    rows = [
        raw([f"####{j % 3}" for j in range(i % 5 + 1)] + [r"\boxed{\frac42}"]) for i in range(40)
    ]
    write(tmp_path, rows)
    outputs = []
    for workers in (1, 3):
        config = DataConfig(path=str(tmp_path / "raw.jsonl"), num_workers=workers)
        build(config, tmp_path / "out")
        outputs.append([(tmp_path / "out" / name).read_bytes() for name in OUTPUTS])
    assert outputs[0] == outputs[1]


def test_more_rows_than_one_stretch_keep_their_order(tmp_path):
    rows = [raw(["####2", "####3"], id=str(i)) for i in range(2500)]
    seen = []
    config = DataConfig(path=str(write(tmp_path, rows)), duplicates="keep")
    build(config, tmp_path / "out", progress=lambda *at: seen.append(at))
    ids = [example.id for example in read_examples(tmp_path / "out" / "pairs.parquet")]
    assert ids == [str(i) for i in range(2500)]
    assert seen == [(2500, 1.0)]


def test_ready_rows_pass_through(tmp_path):
    user, right, wrong = (
        {"role": role, "content": text}
        for role, text in (("user", "1+1?"), ("assistant", "2"), ("assistant", "3"))
    )
    report = run(
        tmp_path,
        [
            {"prompt": [user], "chosen": [right], "rejected": [wrong]},
            {"messages": [user, right]},
            {"prompt": [user], "completion": [right], "label": True},
            {"prompt": [user], "completion": [wrong], "label": False},
            {"prompt": [user], "chosen": [right], "rejected": [wrong | {"content": "\n"}]},
            raw(["####2", "####3"]),
        ],
    )
    assert texts(tmp_path, "positives") == [("2", None)] * 3 + [("####2", None)]
    assert texts(tmp_path, "pairs") == [("2", "3"), ("2", None), (None, "3"), ("####2", "####3")]
    assert report.counts["traces read"] == 9 and report.counts["traces kept"] == 7
    assert report.dropped_rows == {"empty generation": {"count": 1, "first": "raw.jsonl line 5"}}


def test_plain_text_stays_plain_text(tmp_path):
    rows = [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}]
    run(tmp_path, rows)
    assert read_examples(tmp_path / "out" / "pairs.parquet") == [
        Example("raw.jsonl line 1", "1+1=", "2", "3")
    ]
    with pytest.raises(RediError, match=r"raw.jsonl line 2: `prompt` is chat messages, but plain"):
        run(tmp_path, [*rows, raw(["####2", "####3"])])


def test_positives_alone_need_no_pairs(tmp_path):
    run(tmp_path, [{"prompt": "1+1=", "completion": "2"}])
    assert texts(tmp_path, "positives") == [("2", None)]
    assert pq.read_table(tmp_path / "out" / "pairs.parquet").num_rows == 0


def test_too_long_traces_give_way_to_the_next_that_fits(tmp_path):
    tokenizer = chatml()
    prompt = [{"role": "user", "content": "1+1?"}]
    _, num_prompt_tokens = ChatFormat(tokenizer).encode(prompt, "")
    report = run(
        tmp_path,
        [
            raw(["so ####2", "so ####3", "####2", "####3"]),
            raw(["so ####2", "####3"]),
        ],
        tokenizer,
        max_length=num_prompt_tokens + 6,
    )
    assert texts(tmp_path, "pairs") == [("####2", "####3")]
    assert report.length_unit == "tokens"
    assert report.lengths["correct traces kept"]["max"] == num_prompt_tokens + 6
    assert report.dropped_traces == {
        f"longer than max_length {num_prompt_tokens + 6}": {
            "count": 3,
            "first": "raw.jsonl line 1",
        },
        "incorrect, no correct one to pair with": {"count": 1, "first": "raw.jsonl line 2"},
    }
    with pytest.raises(RediError, match=f"2 prompt longer than max_prompt_length {3}"):
        run(tmp_path, [raw(["####2", "####2", "####3"])], tokenizer, max_prompt_length=3)
    with pytest.raises(RediError, match="count tokens: give a tokenizer"):
        run(tmp_path, [raw(["####2", "####3"])], max_length=100)


def test_template_that_cannot_carry_a_row_is_an_error_that_names_it(tmp_path):
    tokenizer = byte_tokenizer(OPENS_THINKING, eos_token="</s>")
    with pytest.raises(RediError, match=r"raw.jsonl line 1: the prompt is not a prefix"):
        run(tmp_path, [raw(["####2", "####3"])], tokenizer)


def test_no_pairs_left_says_why_and_leaves_nothing(tmp_path):
    with pytest.raises(
        RediError,
        match=r"no pairs left of 3 rows: 2 verdicts and generations differ in number "
        r"\(first: raw.jsonl line 2\).*; 1 correct, not the first of its problem",
    ):
        run(
            tmp_path,
            [raw(["####2"] * 2), *[raw(["####2", "####3"], verdicts=[True])] * 2],
        )
    with pytest.raises(RediError, match=r"raw.jsonl line 2: no column"):
        run(tmp_path, [raw(["####2", "####3"]), {"problem": "1+1?"}])
    with pytest.raises(RediError, match=r"raw.jsonl: no rows"):
        run(tmp_path, [])
    assert list((tmp_path / "out").iterdir()) == []


def test_full_disk_leaves_what_is_done(tmp_path):
    """A process that may write no file beyond 20 KB, as if the disk were full."""
    noise = [f"{hash((i, 'x'))} {hash((i, 'y'))} " * 40 for i in range(100)]
    write(tmp_path, [raw([text + "####2", text + "####3"]) for text in noise], "big.jsonl")
    program = (
        "import resource, sys\n"
        "from redi.config import DataConfig\n"
        "from redi.data.build import build\n"
        "from redi.errors import RediError\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        "try:\n"
        "    build(DataConfig(path=sys.argv[1], duplicates='keep'), sys.argv[2])\n"
        "except RediError as error:\n"
        "    sys.exit(f'user error: {error}')\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "big.jsonl"), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert result.stderr.startswith(f"user error: {tmp_path / 'out'}: cannot be written")
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".building"]
    config = DataConfig(path=str(tmp_path / "big.jsonl"), duplicates="keep")
    assert build(config, tmp_path / "out").counts["pairs"] == 100


def test_files_of_two_builds_are_never_taken_for_one(tmp_path, monkeypatch):
    """Interrupted between two renames, the folder has no report.json."""
    run(tmp_path, [raw(["####2", "####3"])])
    replace = os.replace

    def replace_once(source, target):
        if target.name == "pairs.parquet":
            raise OSError(28, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", replace_once)
    with pytest.raises(RediError, match="No space left on device"):
        run(tmp_path, [raw(["####2", "####3"])] * 2)
    assert not (tmp_path / "out" / "report.json").exists()
    monkeypatch.undo()
    (tmp_path / "out" / ".building" / "pairs.parquet").write_text("half")
    run(tmp_path, [raw(["####2", "####3"])] * 2)
    assert len(texts(tmp_path, "pairs")) == 2
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OUTPUTS
