"""What a row trains, by colour, and what became of the data."""

import json

import pytest
import tiny
from chat_formats import chatml, llama3
from html_page import HOSTILE, Page

from redi.config import DataConfig
from redi.data.build import build
from redi.data.tokenize import tokenize_examples
from redi.errors import RediError
from redi.pages.data import (
    MAX_SOURCES,
    find_example,
    print_traces,
    shown_traces,
    write_data_page,
    write_show_page,
)
from redi.pages.html import visible

KIND_OF = {"m": "masked", "t": "trained", "o": "trained", "s": "stop"}


def row(prompt="1+1?", chosen="2", rejected="3", **columns):
    messages = [{"role": "user", "content": prompt}]
    return {"prompt": messages, **{k: [{"role": "assistant", "content": v}] for k, v in
            (("chosen", chosen), ("rejected", rejected))}, **columns}  # fmt: skip


def shown(folder, tokenizer, data):
    file = tiny.write_jsonl(folder / "rows.jsonl", [data])
    example = find_example(str(file))
    traces = shown_traces(example, tokenizer)
    page = Page(write_show_page(example, traces, str(file), folder / "page.html"))
    (expected,) = tokenize_examples([example], tokenizer, max_length=None).traces
    return page, traces, expected


@pytest.mark.parametrize("make", [tiny.make_tokenizer, chatml, llama3])
def test_colours_are_the_tokenizers_mask(tmp_path, make):
    text = "two ab12\n<|im_end|><|eot_id|><e> 2"  # control tokens written out stay trained text
    page, _, expected = shown(tmp_path, make(), row(chosen=text, prompt="<|im_end|> 1+1?"))
    kinds = []
    for trace in expected:
        size, prompt = len(trace.input_ids), trace.num_prompt_tokens
        kinds += ["masked"] * prompt + ["trained"] * (size - prompt - 1) + ["stop"]
    assert [KIND_OF[kind] for kind, _, _ in page.tokens] == kinds
    ids = [i for trace in expected for i in trace.input_ids.tolist()]
    assert [int(title.split("id ")[1]) for _, _, title in page.tokens] == ids
    assert "NO STOP TOKEN" not in page.text
    # neighbours in the completion differ in shade
    trained = [kind for kind, _, _ in page.tokens if kind in "to"]
    assert {"t", "o"} == set(trained)


def test_a_plain_text_row_and_one_side(tmp_path):
    data = {"prompt": "1+1=", "completion": "2", "label": False}
    page, traces, expected = shown(tmp_path, tiny.make_tokenizer(template=None), data)
    assert [trace.side for trace in traces] == ["rejected"]
    assert "".join(text for _, text, _ in page.tokens) == "1+1=2<e>"
    assert len(page.tokens) == len(expected[0].input_ids)


@pytest.mark.parametrize("text", [t for t in HOSTILE if "\ud800" not in t])
def test_hostile_rows(tmp_path, text, capsys):
    page, traces, _ = shown(tmp_path, chatml(), row(text, text, text, id=text, answer=text))
    both = "".join(shown for _, shown, _ in page.tokens)
    assert both.count(visible(text)) == 4
    print_traces(find_example(str(tmp_path / "rows.jsonl")), traces)
    printed = capsys.readouterr().out
    assert visible(text) in printed and "\x1b[31m" not in printed and "\u202e" not in printed


def test_a_trace_of_very_many_tokens(tmp_path):
    page, _, expected = shown(tmp_path, chatml(), row(chosen="<" * 100_000, rejected="3"))
    assert len(page.tokens) < 45_000
    left_out = len(expected[0].input_ids) - 20_000
    assert f"{left_out:,} tokens left out" in page.text


def test_the_terminal_says_it_without_colours(tmp_path, capsys):
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [row(), row("5+5?", "10", "11", id="x")])
    example = find_example(str(file), id="x")
    print_traces(example, shown_traces(example, tiny.make_tokenizer()))
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert lines == [
        "x",
        *("── chosen, masked: 6 tokens ──", "<q>5+5?<a>"),
        *("── chosen, trained: 2 tokens ──", "10", "── chosen, stop: the stop token ──", "<e>"),
        *("── rejected, masked: 6 tokens ──", "<q>5+5?<a>"),
        *("── rejected, trained: 2 tokens ──", "11", "── rejected, stop: the stop token ──", "<e>"),
    ]


def test_rows_by_number_and_id(tmp_path):
    file = str(
        tiny.write_jsonl(tmp_path / "rows.jsonl", [row(f"{i}?", id=f"n{i}") for i in range(5)])
    )
    assert find_example(file).id == "n0"
    assert find_example(file, row=3).id == find_example(file, id="n2").id == "n2"
    with pytest.raises(RediError, match="no row 6 among its 5 rows"):
        find_example(file, row=6)
    with pytest.raises(RediError, match="no id 'x' among its 5 rows"):
        find_example(file, id="x")


def test_bytes_that_are_not_utf8_are_named(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_bytes(json.dumps(row()).encode() + b'\n{"prompt": "\xff\xfe"}\n')
    assert find_example(str(file)).chosen == "2"
    with pytest.raises(RediError, match=r"line 2"):
        find_example(str(file), row=2)


def test_the_report_of_a_build(tmp_path):
    rows = [
        {"problem": f"{i}?", "answer": str(i), "source": f"s{i % 2}",
         "generations": [f"####{i}", "####-1", "no idea", f"so ####{i}"]}
        for i in range(1, 5)
    ]  # fmt: skip
    rows.append({"problem": "", "answer": "1", "generations": ["####1"]})
    raw = tiny.write_jsonl(tmp_path / "raw.jsonl", rows)
    build(DataConfig(path=str(raw), num_workers=1), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    page = Page(write_data_page(tmp_path / "out"))
    text = " ".join(page.text.split())
    for name, count in report["counts"].items():
        assert f"{name} {count:,}".replace(" ", "") in text.replace(" ", "")
    for what in ("rows", "traces"):
        found = {r["reason"]: r for t in page.tables if t[0][:2] == ["reason", "count"]
                 for r in (dict(zip(t[0], line, strict=True)) for line in t[1:])}  # fmt: skip
        for reason, entry in report[f"dropped_{what}"].items():
            assert found[reason]["count"] == f"{entry['count']:,}"
            assert found[reason]["first"] == entry["first"]
    with pytest.raises(RediError, match=r"no report\.json"):
        write_data_page(tmp_path)


def full_report(text="x"):
    """All that report.json may hold, with `text` wherever a user's file has a say."""
    example = {"where": text, "id": text, "source": text, "excerpt": text}
    met = {"problems": 500, "problems shared": [3, 4], "rows shared": 7, "rows exact": 2}
    met["examples"] = [example | {"evaluation": text}]
    edges = [0, 1, 2, 4, 8, 16]
    histogram = lambda *counts: {"unit": "tokens", "edges": edges, "counts": list(counts)}
    names = ("rows read", "traces read", "traces correct", "traces incorrect", "traces kept")
    return {
        "counts": dict.fromkeys((*names, "positives", "pairs"), 10),
        "dropped_rows": {text: {"count": 3, "first": text}},
        "dropped_traces": {text: {"count": 5, "first": text}},
        "examples": {"rows": {text: [example]}, "traces": {text: [example]}},
        "lengths": {"correct traces kept": {"mean": 3, "median": 3, "p95": 5, "max": 7}},
        "length_unit": "tokens",
        "histograms": {
            "correct traces": histogram(0, 0, 3, 1),
            "incorrect traces": histogram(0, 0, 0, 0, 8),
        },
        "sources": {text + str(i): {"rows read": 100 - i} for i in range(MAX_SOURCES + 5)},
        "overlap": {text: met},
        "files": [{"name": text, "bytes": 12, "sha256": "00"}],
        "fingerprint": "ab12",
        "config": {"path": text},
    }


def data_page(folder, report):
    (folder / "report.json").write_text(json.dumps(report))
    return Page(write_data_page(folder))


@pytest.mark.parametrize("text", HOSTILE)
def test_a_hostile_report(tmp_path, text):
    page = data_page(tmp_path, full_report(text))
    assert page.text.count(visible(text)) >= MAX_SOURCES + 15


def test_sources_histograms_and_overlap(tmp_path):
    page = data_page(tmp_path, full_report())
    sources = page.table("source", "rows read")
    assert [r["rows read"] for r in sources[:2]] == ["100", "99"]
    rest = sum(100 - i for i in range(MAX_SOURCES, MAX_SOURCES + 5))
    assert sources[-1] == {"source": "5 more sources", "rows read": f"{rest}"}
    (overlap,) = page.table("evaluation set")
    assert list(overlap.values()) == ["x", "500", "2", "7", "2"]
    assert [kind for kind, _ in page.paths] == ["area l0", "area l1"]
    # three bins hold anything: [2, 4), [4, 8), [8, 16); 75, 25 and 0 percent of the right ones
    right, wrong = (path.count("H") for _, path in page.paths)
    assert right == wrong == 3
    assert "correct: most in 2 to 4, incorrect: most in 8 to 16" in page.source
