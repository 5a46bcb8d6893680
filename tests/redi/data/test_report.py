import numpy as np
import pytest

from redi.data.report import MAX_EXAMPLES, BuildReport, bin_of, shorten


def report(number):
    """Of a stretch of input that starts at `number`."""
    part = BuildReport(overlap={"e": overlap(number)})
    part.count("rows read", "s", number)
    part.count("traces read", None, 2 * number)
    for i in range(2):
        part.drop("rows", "bad", f"row {number + i}", id=str(number), text="x" * 999)
        part.drop("traces", f"worse {i}", f"row {number}", number=3)
    part.spread("correct traces", "characters", {bin_of(number): 1})
    return part


def overlap(number):
    shared = sorted({number, 7})
    return {
        "problems": 9,
        "rows exact": 1,
        "rows shared": 2,
        "problems shared": shared,
        "examples": [{"where": number}] * 2,
    }


def test_reports_of_parts_add_up():
    whole = BuildReport(overlap={"e": overlap(0) | {"examples": [], "problems shared": []}})
    for number in (1, 10, 100):
        whole.add(report(number))
    whole.measure("correct traces kept", np.array([1, 3, 8]))
    whole.finish()
    assert whole.counts == {"rows read": 111, "traces read": 222}
    assert whole.sources == {"s": {"rows read": 111}}
    assert whole.dropped_rows == {"bad": {"count": 6, "first": "row 1"}}
    assert whole.dropped_traces["worse 1"] == {"count": 9, "first": "row 1"}
    examples = whole.examples["rows"]["bad"]
    assert [example["where"] for example in examples] == ["row 1", "row 2", "row 10"]
    assert len(examples) == MAX_EXAMPLES and len(examples[0]["excerpt"]) < 300
    met = whole.overlap["e"]
    assert (met["rows exact"], met["problems shared"]) == (4, [1, 7, 10, 100])
    assert [example["where"] for example in met["examples"]] == [1, 1, 10]
    lengths = whole.lengths["correct traces kept"]
    assert lengths == {"mean": 4.0, "median": 3.0, "p95": pytest.approx(7.5), "max": 8.0}
    for name, values in (("correct traces", (1, 10, 100)), ("correct traces kept", (1, 3, 8))):
        histogram = whole.histograms[name]
        expected, _ = np.histogram(values, [*histogram["edges"][:-1], 2**30])
        assert histogram["counts"] == expected.tolist() and sum(histogram["counts"]) == 3
        assert len(histogram["edges"]) == len(histogram["counts"]) + 1


def test_bins_have_the_edges_that_the_report_names():
    whole = BuildReport()
    whole.spread("x", "tokens", {bin_of(5000): 1})
    whole.finish()
    edges = whole.histograms["x"]["edges"]
    for length in (0, 1, 2, 3, 4, 100, 1000, 4096, 4999):
        assert edges[bin_of(length)] <= length < edges[bin_of(length) + 1]


def test_a_report_comes_back_as_it_was(tmp_path):
    (tmp_path / "report.json").write_text(report(3).json())
    assert BuildReport.load(tmp_path / "report.json") == report(3)


def test_excerpts_keep_both_ends_and_what_utf8_can_carry():
    assert shorten("abc") == "abc"
    text = shorten("a" * 200 + "b" * 500 + "\ud83d" + "c" * 160)
    assert text.startswith("a" * 120 + " ... ") and text.endswith("c" * 160) and len(text) == 285
    assert shorten("\ud83d") == "?"
