"""Tables that line up and say what was measured; curves that are drawn; a report of both."""

import importlib.util
import json
import subprocess
import sys

import pytest
from made_up import make_result, metrics_rows, pair_scores

import redi.pages.plots
from redi.errors import RediError
from redi.evaluation.tables import model_table, pairs_table, print_table
from redi.pages.job_report import write_report
from redi.pages.plots import draw_curves


@pytest.fixture
def results():
    return {
        "sft": make_result([[1, 0, 0, 1], [0, 0, 0, 0]] * 50, pairs=pair_scores(0.25)),
        "a-much-longer-name": make_result([[1, 1, 1, 1], [1, 1, 0, 0]] * 50),
        "redi": make_result([[1, 1, 1, 1]] * 100, pairs=pair_scores(1.5)),
    }


def test_model_table_holds_the_figures(results):
    table = model_table(results, baseline="sft")
    cells = {row[0]: dict(zip(table.header, row, strict=True)) for row in table.rows}
    assert list(cells) == list(results)
    sft, redi_row = cells["sft"], cells["redi"]
    # 25% right; the four samplings score .5, 0, 0, .5: deviation .25, divided by sqrt(4)
    assert sft["pass@1 ± SEM"] == "25.0 ± 12.5"
    assert sft["vs sft [95% CI]"] == "baseline"
    assert redi_row["pass@1 ± SEM"] == "100.0 ± 0.0"
    assert redi_row["vs sft [95% CI]"].startswith("+75.0 [+70.")
    assert (sft["pass@4"], sft["unfinished"], sft["tokens"]) == ("50.0", "0.0", "12.0")
    assert (sft["log-prob gap"], cells["a-much-longer-name"]["log-prob gap"]) == ("+0.250", "")
    assert table.note.startswith("100 problems x 4 samples")


def test_pairs_table_compares_gaps(results):
    table = pairs_table(results, baseline="sft")
    assert [row[0] for row in table.rows] == ["sft", "redi"]
    assert table.rows[1][1:] == [
        *("-0.750", "-2.250", "+1.500"),
        *("+1.250 [+1.250, +1.250]", "100.0%"),
    ]
    assert pairs_table({"a": make_result([[1]])}) is None


def test_columns_that_say_nothing_are_left_out():
    table = model_table({"m": make_result([[1], [0]])})
    assert table.header == ["model", "pass@1", "unfinished", "tokens"]
    assert table.rows == [["m", "50.0", "0.0", "12.0"]]
    ungraded = model_table({"m": make_result([[1], [0]], unparsable=1)})
    assert dict(zip(ungraded.header, ungraded.rows[0], strict=True))["ungraded"] == "50.0"
    assert "counted as wrong" in ungraded.note


def test_an_unknown_baseline_is_refused(results):
    with pytest.raises(RediError, match="'control' is none of the models"):
        model_table(results, baseline="control")


@pytest.mark.parametrize("columns", ["40", "200"])
def test_both_forms_line_up(results, capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)  # a narrow terminal must not break rows in two
    table = model_table(results, baseline="sft")
    print_table(table)
    printed = capsys.readouterr().out.splitlines()
    header = next(line for line in printed if "pass@1" in line)
    ends = [header.index(name) + len(name) for name in table.header[1:]]
    for row in table.rows:
        (line,) = (line for line in printed if line.startswith(f" {row[0]} "))
        for end, cell in zip(ends, row[1:], strict=True):
            assert line[:end].endswith(cell)
            assert line[end : end + 1] in ("", " ")

    markdown = table.markdown().split("\n\n")[0].splitlines()
    bars = {tuple(i for i, c in enumerate(line) if c == "|") for line in markdown}
    assert len(bars) == 1
    assert len(markdown) == 2 + len(results)


def test_report_embeds_tables_and_pictures(tmp_path, results, capsys):
    for name, rows in (("sft", metrics_rows(rejected=False)), ("redi", metrics_rows())):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    file = write_report(tmp_path, results, baseline="sft", title="demo")
    text = file.read_text()
    assert text.startswith("# demo\n")
    assert model_table(results, "sft").markdown() in text
    assert pairs_table(results, "sft").markdown() in text
    for picture in ("scores.png", "curves.png", "curves-sft.png"):
        assert f"]({picture})" in text
        assert (tmp_path / picture).stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "100.0 ± 0.0" in printed and str(file) in printed


def test_without_matplotlib_there_is_a_report_and_a_hint(tmp_path, results, capsys, monkeypatch):
    find = importlib.util.find_spec
    absent = lambda name: None if name == "matplotlib" else find(name)
    monkeypatch.setattr(redi.pages.plots, "find_spec", absent)
    hint = 'pip install "reinforcement-distillation[plot]"'
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "metrics.jsonl").write_text(json.dumps(metrics_rows(1)[0]) + "\n")
    assert hint in write_report(tmp_path, results).read_text()
    assert hint in capsys.readouterr().out
    with pytest.raises(RediError, match=r"\[plot\]"):
        draw_curves({"a": metrics_rows()}, tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()


def test_import_needs_neither_matplotlib_nor_torch():
    heavy = "{'matplotlib', 'torch', 'transformers'}"
    code = f"import sys, redi.evaluation.tables; sys.exit(bool({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
