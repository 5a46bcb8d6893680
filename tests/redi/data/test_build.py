import json
import random
import subprocess

import pyarrow.parquet as pq
import pytest
from builds import OUTPUTS, raw, run, texts, write
from chat_formats import OPENS_THINKING, byte_tokenizer, chatml, qwen
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redi.config import DataConfig
from redi.data import files
from redi.data.build import build
from redi.data.read import Example, read_examples
from redi.data.tokenize import ChatFormat
from redi.errors import RediError


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
    with pytest.raises(RediError, match=r"raw.jsonl line 1: the chat template opens"):
        run(tmp_path, [raw(["####2", "####3"])], tokenizer)


def test_no_pairs_left_says_why_and_leaves_a_report(tmp_path):
    with pytest.raises(
        RediError,
        match=r"no pairs left of 3 rows: 2 verdicts and generations differ in number "
        r"\(first: raw.jsonl line 2\).*; 1 correct, not the first of its problem",
    ):
        run(
            tmp_path,
            [raw(["####2"] * 2), *[raw(["####2", "####3"], verdicts=[True])] * 2],
        )
    assert "2  first: raw.jsonl line 2" in (tmp_path / "out" / "failed-report.txt").read_text()
    every = [{"problem": "1+1?"}, raw([1])]
    message = r"line 1: no column `generations`.*line 2: `generations\[0\]` is a number.*\.txt"
    with pytest.raises(RediError, match=message):
        run(tmp_path, every)
    run(tmp_path, [raw(["####2", "####3"])], anew=False)  # a later success takes the report away
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == OUTPUTS
    with pytest.raises(RediError, match=r"raw.jsonl: no rows"):
        run(tmp_path, [])
    assert not (tmp_path / "out").exists()


def test_rows_of_one_generation_each_are_told_to_be_gathered(tmp_path):
    with pytest.raises(RediError, match=r"no pairs left of 2 rows: .*put the generations of a"):
        run(tmp_path, [raw(["####3"]), raw(["####4"])])


def test_a_row_without_its_columns_is_a_counted_drop(tmp_path):
    lone = {"messages": json.dumps([ASSISTANT])}
    report = run(tmp_path, [raw(["####2", "####3"]), {"problem": "1+1?"}, lone])
    assert report.counts["pairs"] == 1
    assert report.dropped_rows["a column is missing"]["count"] == 2


def test_a_trace_that_the_template_cannot_carry_is_a_counted_drop(tmp_path):
    """The other traces of its problem stay."""
    tokenizer = byte_tokenizer(OPENS_THINKING, eos_token="</s>")
    good, other = "<think>\nso </think> ####2", "<think>\nno </think> ####3"
    rows = [raw(["<think>so </think> ####2", good, other]), raw(["<think>so </think> ####2"])]
    report = run(tmp_path, rows, tokenizer=tokenizer)
    [reason] = [r for r in report.dropped_traces if "cannot carry" in r]
    assert report.dropped_traces[reason]["count"] == 2
    assert "raw.jsonl line 1: the chat template opens" in report.dropped_traces[reason]["detail"]
    assert texts(tmp_path, "pairs") == [(good, other)]


def test_input_that_is_of_no_use_is_not_read_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 1 << 12)
    with pytest.raises(RediError, match=r"no pairs left of 1\d\d\d rows"):
        run(tmp_path, [{"probem": "1+1?", "answer": "2"}] * 5000)


def test_files_of_others_are_not_overwritten(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "pairs.parquet").write_text("mine")
    with pytest.raises(RediError, match=r"holds pairs.parquet, which this build has not written"):
        run(tmp_path, [raw(["####2", "####3"])], anew=False)
    assert [(f.name, f.read_text()) for f in out.iterdir()] == [("pairs.parquet", "mine")]


def test_a_huge_trace_is_dropped_before_it_is_tokenized(tmp_path, monkeypatch):
    tokenizer, sizes, ids = chatml(), [], ChatFormat._ids

    def counted(self, texts, **kwargs):
        sizes.extend(map(len, texts))
        return ids(self, texts, **kwargs)

    monkeypatch.setattr(ChatFormat, "_ids", counted)
    huge = "so 1 + 1 " * 20000 + "####3"
    rows = [raw(["####2", huge, "####4"])]
    report = run(tmp_path, rows, tokenizer=tokenizer, max_length=100)
    assert texts(tmp_path, "pairs") == [("####2", "####4")]
    assert report.dropped_traces["longer than max_length 100"]["count"] == 1
    assert max(sizes) <= 16 * 100


def test_duplicates_keep_the_first(tmp_path):
    rows = [
        raw(["####3"], id="nothing right"),
        raw(["####2", "####3"], id="first", source="s"),
        raw(["####2", "####4"], id="again"),
        raw(["####2", "####5"], id="spaced") | {"problem": " 1+1?\n"},
        raw(["####2", "####6"], id="other") | {"problem": "1+1"},
        {"prompt": [{"role": "user", "content": "1+1?"}], "completion": [ASSISTANT], "id": "ready"},
    ]
    report = run(tmp_path, [*rows, rows[-1]], duplicates="drop")
    examples = read_examples(tmp_path / "out" / "positives.parquet")
    assert [example.id for example in examples] == ["first", "other", "ready"]
    assert report.dropped_rows == {
        "duplicate of a row before it": {"count": 3, "first": "raw.jsonl line 3"}
    }
    assert report.dropped_traces["row dropped: duplicate of a row before it"]["count"] == 5
    kept, dropped = report.counts["traces kept"], report.dropped_traces.values()
    assert report.counts["traces read"] == kept + sum(entry["count"] for entry in dropped)


ASSISTANT = {"role": "assistant", "content": "2"}


def test_unpaired_traces_may_stay(tmp_path):
    rows = [
        raw(["####2", "####3"]),
        raw(["####2"]),
        raw(["####3", "####4"]),
        raw(["I give up"]),
    ]
    run(tmp_path, rows, unpaired="keep")
    assert texts(tmp_path, "positives") == [("####2", None)] * 2
    assert texts(tmp_path, "pairs") == [("####2", "####3"), ("####2", None), (None, "####3")]


def test_traces_that_were_cut_off_are_neither_right_nor_wrong(tmp_path):
    rows = [
        raw(["<think> so ####2", "<think>a</think>####2", "<think> ####3", "####3"]),
        {"prompt": "p", "completion": "<think> hm"},
    ]
    report = run(tmp_path, rows[:1])
    assert texts(tmp_path, "pairs") == [("<think>a</think>####2", "####3")]
    assert report.dropped_traces["unfinished: <think> without </think>"]["count"] == 2
    run(tmp_path, rows[:1], unfinished="keep")
    assert texts(tmp_path, "pairs") == [("<think> so ####2", "<think> ####3")]
    with pytest.raises(RediError, match="no pairs left of 1 rows: 1 unfinished"):
        run(tmp_path, rows[1:])


def test_sources_and_completion_length(tmp_path):
    rows = [
        raw(["####2", "####3"], source="cn_k12"),
        raw(["a ####2", "####2", "####3"], source="amc"),
        {"prompt": "1+1", "completion": "2", "source": "cn_k12"},
    ]
    limits = {"exclude_sources": ["cn_k12"], "max_completion_length": 6}
    report = run(tmp_path, rows, chatml(), **limits)
    assert texts(tmp_path, "pairs") == [("####2", "####3")]
    assert report.dropped_rows["source cn_k12 excluded"]["count"] == 2
    assert report.dropped_traces["longer than max_completion_length 6"]["count"] == 1
    assert report.sources["amc"] == {
        "rows read": 1,
        "traces read": 3,
        "traces correct": 2,
        "traces incorrect": 1,
        "positives": 1,
        "pairs": 1,
    }


def paper(rows, tokenizer, max_prompt, max_response, seed):
    """The paper's scripts in a few lines of their own: (positives, pairs) as texts, in order."""
    import datasets

    order = datasets.Dataset.from_list([{"i": i} for i in range(len(rows))]).shuffle(seed=seed)["i"]
    positives, pairs = [], []

    def count(role, text):
        message = [{"role": role, "content": text}]
        templated = tokenizer.apply_chat_template(message, tokenize=False)
        return len(tokenizer(templated, add_special_tokens=False)["input_ids"]) + 1

    for row in (rows[i] for i in order):
        if (row["problem_is_valid"] or "").strip().lower() != "yes" or row["source"] == "cn_k12":
            continue
        texts, judges = row["generations"], row["correctness"] or {}
        llama, maths = judges.get("llama_verification"), judges.get("math_verify_reparsed_answer")
        if not row["problem"] or not texts or llama is None or maths is None:
            continue
        if len(llama) != len(texts) or len(maths) != len(texts):
            continue
        right = [bool(a) and bool(b) for a, b in zip(llama, maths, strict=True)]
        if True not in right:
            continue
        chosen = texts[right.index(True)]
        positives.append((row["id"], chosen))
        if False in right:
            rejected = texts[right.index(False)]
            lengths = [count("assistant", chosen), count("assistant", rejected)]
            if count("user", row["problem"]) <= max_prompt and max(lengths) <= max_response:
                pairs.append((row["id"], chosen, rejected))
    return positives, pairs


def test_preset_paper_is_the_papers_scripts(tmp_path, monkeypatch):
    """On 800 random rows, with a template that has a default system turn, as Qwen's."""
    monkeypatch.setattr(files, "BLOCK_BYTES", 9000)
    tokenizer = qwen()
    draw = random.Random(1)
    rows = []
    for i in range(800):
        num = draw.randint(0, 4)
        votes = [
            [draw.choice([True, True, False, None]) for _ in range(num + (draw.random() < 0.05))]
            for _ in range(2)
        ]
        names = ("llama_verification", "math_verify_reparsed_answer")
        judges = dict(zip(names, votes, strict=True))
        if draw.random() < 0.1:
            judges[draw.choice(names)] = None
        rows.append(
            {
                "id": str(i),
                "problem": draw.choice([None, "", *["1+1? " * draw.randint(1, 12)] * 8]),
                "answer": None,  # or math-verify could settle what the rules must
                "generations": draw.choice(
                    [None, *[[f"{i}.{j}" + " a" * draw.randint(0, 30) for j in range(num)]] * 9]
                ),
                "correctness": draw.choice([None, *[judges] * 9]),
                "problem_is_valid": draw.choice(
                    ["Yes", " yes", "YES ", "Yes", "yes", "Yes", "No", None]
                ),
                "source": draw.choice(["cn_k12", *["amc", "aops", None] * 3]),
            }
        )
    positives, pairs = paper(rows, tokenizer, 95, 75, seed=42)
    config = {"preset": "paper", "max_prompt_length": 95, "max_completion_length": 75}
    run(tmp_path, rows, tokenizer, **config)
    built = read_examples(tmp_path / "out" / "positives.parquet")
    assert [(e.id, e.chosen) for e in built] == positives and len(positives) > 80
    built = read_examples(tmp_path / "out" / "pairs.parquet")
    assert [(e.id, e.chosen, e.rejected) for e in built] == pairs
    assert 20 < len(pairs) < 0.8 * len(paper(rows, tokenizer, 9**9, 9**9, seed=42)[1])


def test_preset_paper_sets_what_is_not_given():
    config = DataConfig(path="x", preset="paper", max_prompt_length=900)
    assert (config.shuffle_seed, config.max_prompt_length) == (42, 900)
    assert (config.max_completion_length, config.missing_verdict) == (19000, "wrong")
    assert config.exclude_sources == ["cn_k12"]
    assert DataConfig(path="x").shuffle_seed is None


def test_rows_that_cannot_be_read_are_dropped(tmp_path):
    file = write(tmp_path, [raw(["####2", "####3"])])
    good = file.read_bytes()
    file.write_bytes(b'{"problem": "\xff"}\n{"problem\n' + good + json.dumps(raw([1])).encode())
    report = build(DataConfig(path=str(file)), tmp_path / "out")
    assert report.counts["rows read"] == 4 and report.counts["pairs"] == 1
    dropped = {reason: (e["count"], e["first"]) for reason, e in report.dropped_rows.items()}
    assert dropped == {
        "not UTF-8 text": (1, "raw.jsonl line 1"),
        "not JSON": (1, "raw.jsonl line 2"),
        "a field of the wrong kind": (1, "raw.jsonl line 4"),
    }
    detail = report.dropped_rows["not UTF-8 text"]["detail"]
    assert detail == "raw.jsonl line 1: not UTF-8 text: invalid start byte at byte 13"
    [example] = report.examples["rows"]["a field of the wrong kind"]
    assert "`generations[0]` is a number ('1'); expected text" in example["excerpt"]
