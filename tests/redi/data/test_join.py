"""Rows that pose the same problem: their traces make pairs together, wherever the rows stand."""

import random
import shutil

import pytest
from builds import outputs, raw, run, texts, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from redi.config import DataConfig
from redi.data import files
from redi.data.build import build
from redi.data.read import read_examples
from redi.errors import RediError

OTHER = "the problem of another row, with another answer or other messages around it"


def one(text, problem="1+1?", answer="2", **columns):
    """A row of one generation, under the name that has no list."""
    return {"problem": problem, "answer": answer, "generation": text, **columns}


def accounted(report):
    dropped = sum(entry["count"] for entry in report.dropped_traces.values())
    return report.counts["traces read"] == report.counts["traces kept"] + dropped


def test_rows_of_one_generation_each_are_joined_by_problem(tmp_path):
    rows = [
        one("####3", id="a"),
        one("####2", id="b", source="s"),
        one("1+2 ####3", problem="1+2?", answer="3", id="c"),
        one("####4", id="d"),
        one("again ####2", id="e"),
        one("####9", problem="2+2?", answer="4", id="alone"),
        one(None, id="empty"),
    ]
    report = run(tmp_path, rows, duplicates="drop")
    pairs = read_examples(tmp_path / "out" / "pairs.parquet")
    assert [(e.id, e.chosen, e.rejected, e.source) for e in pairs] == [("b", "####2", "####3", "s")]
    assert texts(tmp_path, "positives") == [("####2", None), ("1+2 ####3", None)]
    assert report.counts["pairs of two rows"] == report.counts["pairs"] == 1
    assert report.sources["s"]["pairs"] == 1
    assert report.dropped_rows == {}
    assert {reason: entry["count"] for reason, entry in report.dropped_traces.items()} == {
        "empty generation": 1,
        "correct, not the first of its problem": 1,
        "incorrect, not the first of its problem": 1,
        "incorrect, no correct one to pair with": 1,
    }
    assert report.dropped_traces["correct, not the first of its problem"]["first"].endswith("5")
    assert accounted(report)


def test_only_rows_with_the_same_answer_and_messages_are_joined(tmp_path):
    user = {"role": "user", "content": "1+1?"}
    system = {"role": "system", "content": "Be brief."}
    rows = [
        one("####2"),
        one("####2", answer="3"),  # wrong there, right here
        one("####5", problem=[system, user]),
        one("####4", problem=" 1+1?\n", answer=" $2$ "),
        one("####9", problem="1+1"),
    ]
    report = run(tmp_path, rows, duplicates="drop")
    assert texts(tmp_path, "pairs") == [("####2", "####4")]
    assert report.dropped_rows == {}  # neither has a right trace
    report = run(tmp_path, [*rows, one("####3", answer="3")], duplicates="drop")
    assert texts(tmp_path, "pairs") == [("####2", "####4")]
    assert report.dropped_rows[OTHER]["count"] == 2 and accounted(report)


def test_lone_wrong_traces_may_stay(tmp_path):
    rows = [one("####3"), one("####4"), one("####2", problem="p"), one("####7", problem="p")]
    report = run(tmp_path, rows, duplicates="drop", unpaired="keep")
    assert texts(tmp_path, "pairs") == [(None, "####3"), ("####2", "####7")]
    assert accounted(report)


def test_rows_by_themselves_are_not_joined(tmp_path):
    rows = [one("####2"), one("####3")]
    with pytest.raises(RediError, match="put the generations of a problem into one row's list"):
        run(tmp_path, rows)
    paper = {"length_rule": "paper", "max_completion_length": 99}
    assert not DataConfig(path="x", **paper).joins_rows
    with pytest.raises(RediError, match="a problem needs several rows, with the same answer"):
        run(tmp_path, [one("####2"), one("####3", problem="p")], duplicates="drop")


RULE = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
ROWS = st.lists(
    st.tuples(st.integers(0, 3), st.lists(st.sampled_from("239"), min_size=1, max_size=3)),
    min_size=1,
    max_size=12,
)


@RULE
@given(ROWS)
def test_joined_is_what_one_row_a_problem_would_give(tmp_path, drawn):
    """Each row's generations in one list with those of the other rows of its problem."""
    drawn = [*drawn, (9, ["2", "3"])]
    rows = [
        raw([f"{i}{j} ####{g}" for j, g in enumerate(given)]) | {"problem": f"p{problem}"}
        for i, (problem, given) in enumerate(drawn)
    ]
    report = run(tmp_path, rows, duplicates="drop")
    assert accounted(report)
    joined = {name: texts(tmp_path, name) for name in ("pairs", "positives")}
    together: dict = {}
    for row in rows:
        together.setdefault(row["problem"], []).extend(row["generations"])
    together = [raw(given) | {"problem": problem} for problem, given in together.items()]
    run(tmp_path, together, duplicates="drop")
    for name, found in joined.items():
        assert sorted(found, key=str) == sorted(texts(tmp_path, name), key=str)


@pytest.mark.parametrize("shuffle_seed", [None, 42])
def test_same_bytes_whatever_the_workers_and_the_cuts(tmp_path, monkeypatch, shuffle_seed):
    """A problem's rows are in different blocks and files here."""
    rng, rows = random.Random(0), []
    for i in range(120):
        rows += [one(f"{i} ####{i % 2 + 2}", problem=f"p{i // 3}", id=str(i))] * (i % 4 == 0) or [
            one(f"{i} ####3", problem=f"p{i // 3}", id=str(i))
        ]
    rng.shuffle(rows)
    folder = tmp_path / "in"
    folder.mkdir()
    for k in range(3):
        write(folder, rows[k::3], f"{k}.jsonl")
    built = []
    for workers, block_bytes in ((1, 4 << 20), (1, 900), (2, 900)):
        monkeypatch.setattr(files, "BLOCK_BYTES", block_bytes)
        config = DataConfig(path=str(folder), num_workers=workers, shuffle_seed=shuffle_seed)
        report = build(config, tmp_path / "out")
        assert report.counts["pairs of two rows"] > 10 and accounted(report)
        built.append(outputs(tmp_path / "out"))
        shutil.rmtree(tmp_path / "out")
    assert all(other == built[0] for other in built[1:])


def s1k(**columns):
    return {
        "question": "1+1?",
        "solution": "2",
        "gemini_thinking_trajectory": "one and one",
        "gemini_attempt": r"\boxed{3}",
        "deepseek_thinking_trajectory": ["1, 2"],
        "deepseek_attempt": [r"\boxed{2}"],
    } | columns


def test_s1k_is_read(tmp_path):
    right, wrong = ("<think>\n1, 2\n</think>\n\n\\boxed{2}", "<think>\none and one\n</think>\n\n")
    run(tmp_path, [s1k()])
    assert texts(tmp_path, "pairs") == [(right, wrong + r"\boxed{3}")]
    run(tmp_path, [s1k(gemini_grade="Yes", deepseek_grade="No", solution="no number")])
    assert texts(tmp_path, "pairs") == [(wrong + r"\boxed{3}", right)]
    old = {"question": "1+1?", "solution": "2", "thinking_trajectories": ["hm"]}
    rows = [old | {"attempt": r"\boxed{2}"}, old | {"attempt": r"\boxed{4}"}]
    run(tmp_path, rows, duplicates="drop")
    assert texts(tmp_path, "pairs") == [
        (r"<think>" "\nhm\n</think>\n\n" r"\boxed{2}", "<think>\nhm\n</think>\n\n" r"\boxed{4}")
    ]
    report = run(tmp_path, [s1k(), s1k(gemini_attempt=7), s1k(gemini_attempt=None)])
    dropped = report.dropped_rows["a field of the wrong kind"]
    assert dropped["detail"].startswith("raw.jsonl line 2: `gemini_attempt` is a number ('7')")
    assert report.dropped_traces["empty generation"]["count"] == 1


def test_the_hint_about_other_names_works(tmp_path):
    rows = [
        {"question": "1+1?", "answer": "2", "response": "####2"},
        {"question": "1+1?", "answer": "2", "response": "####3"},
    ]
    with pytest.raises(RediError, match=r"`response` hold the traces, .* column `generation`"):
        run(tmp_path, rows, duplicates="drop")
    renamed = [row | {"generation": row.pop("response")} for row in rows]
    run(tmp_path, renamed, duplicates="drop")
    assert texts(tmp_path, "pairs") == [("####2", "####3")]
