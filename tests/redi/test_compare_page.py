"""Models side by side on a page, with what the terminal shows and where they differ."""

import pytest
from html_page import HOSTILE, Page
from made_up import write_eval

from redi.compare_page import flips_table, write_compare_page
from redi.report import Table, model_table
from redi.results import load_result


@pytest.mark.parametrize("name", ["redi", HOSTILE[0], HOSTILE[3]])
def test_compare(tmp_path, name):
    folders = {"sft": tmp_path / "a", name: tmp_path / "b"}
    write_eval(folders["sft"], [[1, 1], [0, 1], [0, 0], [0, 0]])
    write_eval(folders[name], [[1, 0], [1, 1], [0, 1], [0, 0]], text=HOSTILE[1])
    results = {model: load_result(folder) for model, folder in folders.items()}
    tables = [("measured", model_table(results, "sft")), (name, Table(["x"], [[name]]))]
    file = write_compare_page(tmp_path / "c.html", results, tables, folders, baseline="sft")
    page = Page(file)
    measured = page.table("pass@1 ± SEM")
    assert [row["pass@1 ± SEM"][:4] for row in measured] == ["37.5", "50.0"]
    assert flips_table(results, "sft").rows == [[name, "2", "1", "1"]]
    (flips,) = page.table("more often right")
    assert list(flips.values())[1:] == ["2", "1", "1"]
    assert str(folders["sft"]) in page.text and HOSTILE[1] in page.text
