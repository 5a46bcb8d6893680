"""Models side by side on a page: the terminal's tables, and where the models differ."""

import pytest
from html_page import HOSTILE, Page
from made_up import write_eval

from redi.evaluation.compare import load_models, paired_table, score_table
from redi.pages.compare import write_compare_page
from redi.pages.html import visible

A = [[1, 1], [0, 1], [0, 0], [0, 0]]
B = [[1, 0], [1, 1], [1, 1], [0, 0]]


def page_of(folder, names, **options):
    folders = [folder / name for name in names]
    models = load_models(folders)
    file = write_compare_page(folder / "c.html", folders, models, baseline=names[0], **options)
    return models, Page(file)


@pytest.mark.parametrize("name", ["redi", HOSTILE[2], HOSTILE[3]])
def test_the_tables_are_the_terminals(tmp_path, name):
    write_eval(tmp_path / "sft", A)
    write_eval(tmp_path / name, B, text=HOSTILE[1])
    models, page = page_of(tmp_path, ["sft", name])
    for table in (score_table(models), paired_table(models, "sft")):
        cells = [list(table.header), *table.rows]
        assert [[visible(cell) for cell in row] for row in cells] in page.tables
    assert str(tmp_path / "sft") in page.text and HOSTILE[1] in page.text
    samples = [t for t in page.tables if "first sample" in t[0]]
    assert [row[3] for row in samples[0][1:]] == ["0%", "100%"]  # the third problem, first


def test_benchmarks_and_published_rows(tmp_path):
    for model in ("sft", "redi"):
        for benchmark, correct in (("aime24", A), ("math500", B)):
            write_eval(tmp_path / model / benchmark, correct, text=f"{model} on {benchmark}")
    models, page = page_of(tmp_path, ["sft", "redi"], published=True)
    assert [list(score_table(models, True).header), *score_table(models, True).rows] in page.tables
    for model in ("sft", "redi"):
        for benchmark in ("aime24", "math500"):
            assert f"{model} on {benchmark}" in page.text
    assert page.source.count('<tr class="mark"><th scope="row">[published') == 10
    assert page.source.count('<tr class="mark">') == 10
