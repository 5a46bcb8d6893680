import json

from builds import raw, run, texts, write

from redi.data.overlap import Overlap
from redi.data.report import BuildReport

LONG = "What is the remainder when the sum of all divisors is divided by nine"
SETS = {
    "math.json": [{"problem": LONG}, {"problem": "1+1?"}, {"problem": "Find x."}],
    "aime.jsonl": [
        {"question": "Say what is the REMAINDER when the\nsum of all cubes is 7"},
        {"problem": None},
    ],
}


def evaluation_sets(folder):
    (folder / "math.json").write_text(json.dumps(SETS["math.json"]))
    return [str(folder / "math.json"), str(write(folder, SETS["aime.jsonl"], "aime.jsonl"))]


def check(overlap, *problems):
    report = BuildReport()
    overlap.start(report)
    met = [overlap.check(p, f"line {i}", str(i), report) for i, p in enumerate(problems)]
    return met, [
        (met["problems"], met["rows exact"], met["rows shared"], met["problems shared"])
        for met in report.overlap.values()
    ]


def test_eight_words_in_a_row_or_all_of_them(tmp_path):
    overlap = Overlap().read(evaluation_sets(tmp_path))
    eight = "the remainder when the sum of all divisors"
    assert check(overlap, f"Why {eight}?", f"Why {eight} odd?") == (
        [False, True],  # "divisors?" is another word, as in the paper's script
        [(3, 0, 1, [0]), (2, 0, 0, [])],
    )
    seven = "what is the remainder when the sum is odd"  # 7 words of both
    assert check(overlap, seven, "", "1+2?", " 1+1? ", "FIND X.") == (
        [False, False, False, True, True],
        [(3, 2, 2, [1, 2]), (2, 0, 0, [])],
    )
    both = "what is the remainder when the sum of all squares"
    assert check(overlap, both, LONG, both) == (
        [True] * 3,
        [(3, 1, 3, [0]), (2, 0, 3, [0])],
    )
    chat = [{"role": "system", "content": LONG}, {"role": "user", "content": "1+1?"}]
    assert check(overlap, chat)[1][0] == (3, 1, 1, [1])


def test_overlap_is_reported_and_dropped_if_asked(tmp_path):
    paths = evaluation_sets(tmp_path)
    rows = [
        raw(["####2", "####3"], id="known"),
        raw(["####2", "####4"], id="new") | {"problem": "2+0?"},
        {"prompt": [{"role": "user", "content": LONG}], "completion": "2", "id": "ready"},
    ]
    rows[2]["completion"] = [{"role": "assistant", "content": "2"}]
    report = run(tmp_path, rows, decontaminate=paths)
    assert len(texts(tmp_path, "positives")) == 3
    entry = report.overlap[paths[0]]
    assert (entry["problems"], entry["rows exact"], entry["problems shared"]) == (3, 2, [0, 1])
    assert entry["examples"][0] == {
        "where": "raw.jsonl line 1",
        "id": "known",
        "excerpt": "1+1?",
        "evaluation": "1+1?",
    }
    assert "math.json: 2 of its 3 problems" in report.text()
    report = run(tmp_path, rows, decontaminate=paths, contaminated="drop")
    assert texts(tmp_path, "positives") == [("####2", None)]
    assert texts(tmp_path, "pairs") == [("####2", "####4")]
    assert report.dropped_rows == {
        "shares 8 words in a row with an evaluation set": {"count": 2, "first": "raw.jsonl line 1"}
    }
    assert report.overlap[paths[0]] == entry
