"""What all pages have in common: they need nothing, and show strangers' text as text."""

import numpy as np
import pytest
from html_page import HOSTILE, Page

from redi.errors import RediError
from redi.evaluation.tables import Table
from redi.pages.charts import POINTS, axis_for, histogram, line_chart, short, thin
from redi.pages.html import clip, prompt_text, token_spans, visible, write_page


def show(folder, **changes):
    content = {"title": "t", "dataset": "d", "answer": None, "traces": []}
    return Page(write_page(folder / "page.html", "show.html", **content | changes))


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_is_shown_as_it_is(tmp_path, text):
    trace = {"side": text, "counts": {"masked": 1, "trained": 1, "stop": 1}, "left_out": 0}
    trace["tokens"] = token_spans([(text, "t", text), (text, "m", "")])
    page = show(tmp_path, title=text, dataset=text, answer=text, traces=[trace])
    for shown in (page.tokens[0][1], page.tokens[0][2], page.tokens[1][1]):
        assert shown == visible(text)
    assert page.text.count(visible(text)) >= 5  # title twice, dataset, answer, tokens


def test_unseen_characters_are_named_and_others_left_alone():
    assert visible("a\u202eb\x00\ud800") == "a⟨U+202E⟩b⟨U+0000⟩⟨U+D800⟩"
    usual = "\tdéjà vu\n数学 עברית العربية 👩‍🔬 � ∑"
    assert visible(usual) == usual


def test_clip_says_how_much_is_left_out():
    assert clip("short", 10) == "short"
    text = "a" * 700_000 + "b" * 300_000
    clipped = clip(text, 4000)
    assert len(clipped) < 4100 and clipped.startswith("aaa") and clipped.endswith("bbb")
    assert "996,000 characters left out" in clipped


def test_line_breaks_of_tokens_are_seen():
    assert token_spans([("a\n\nb", "t", "")]) == "<i class=t>a↵\n↵\nb</i>"


def test_prompts_as_text():
    assert prompt_text("p") == "p"
    user = {"role": "user", "content": "q"}
    assert prompt_text([user]) == "q"
    assert prompt_text([{"role": "system", "content": "s"}, user]) == "system: s\nuser: q"


def test_a_page_that_cannot_be_written_is_the_users_to_put_right(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RediError, match="cannot be written"):
        write_page(
            tmp_path / "file" / "x.html", "show.html", title="", dataset="", answer=None, traces=[]
        )


def coordinates(chart, kind):
    """x and y of every path of that class in an SVG."""
    paths = [part.split('"')[0] for part in chart.split(f'<path class="{kind}" d="')[1:]]
    return [
        np.array([p.split(" ") for p in path.replace("M", "L").split("L")[1:]], dtype=float)
        for path in paths
    ]


def test_a_curve_is_where_its_values_are():
    x, y = np.arange(1.0, 11.0), np.array([0.0, 1, 2, 3, 4, 5, 4, 3, 2, 1]) - 2
    ((points),) = coordinates(line_chart({"run": (x, y)}, "loss", raw=False), "l0")
    assert (np.diff(points[:, 0]) > 0).all()
    assert np.allclose(np.diff(points[:, 1]) / np.diff(y), np.diff(points[:, 1])[0], atol=0.2)
    assert points[0, 1] > points[5, 1]  # up is more


def test_collapsing_and_healthy_runs_share_a_logarithmic_axis():
    values = np.array([-0.1, -0.2, -8.0, -10.0])
    axis = axis_for(values, 100, 0)
    assert axis.sign == -1
    assert axis.at(-0.1) < axis.at(-1) < axis.at(-10)
    assert np.isclose(axis.at(-1) - axis.at(-0.1), axis.at(-10) - axis.at(-1), atol=0.2)
    assert axis_for(np.array([-1.0, 2.0]), 100, 0).sign == 0
    assert {-0.1, -1.0, -10.0} <= set(np.round(axis.ticks(), 6))


def test_values_that_are_not_finite_leave_a_gap():
    x, y = np.arange(5.0), np.array([1.0, 2.0, np.nan, 1.0, np.inf])
    chart = line_chart({"run": (x, y)}, "loss", raw=False)
    assert chart.count("M") == 2 and "nan" not in chart.split("aria-label")[1].split(">", 1)[1]


def test_a_long_curve_is_thinned_and_keeps_its_peaks():
    x = np.arange(100_000.0)
    y = np.sin(x / 5000)
    y[54_321] = 9.0
    thin_x, thin_y = thin(x, y)
    assert len(thin_x) <= POINTS and thin_y.max() == 9.0 and (np.diff(thin_x) > 0).all()
    assert len(line_chart({"run": (x, y)}, "loss")) < 20_000


def test_histogram_shows_shares():
    chart = histogram({"right": [1, 3], "wrong": [0, 8]}, [0, 10, 100], "length")
    right, wrong = (p.split('"')[0] for p in chart.split(' d="')[1:])
    heights = lambda path: [float(p.split("H")[0]) for p in path.split("V")[1:3]]
    low = 192.0
    (r0, r1), (w0, w1) = heights(right), heights(wrong)
    assert w0 == low and np.isclose((low - r1) / (low - w1), 0.75, atol=0.01)
    assert np.isclose((low - r0) / (low - w1), 0.25, atol=0.01)


def test_short_numbers():
    assert [short(x) for x in (0, -0.5, 2000, 12345, 2e6)] == ["0", "−0.5", "2,000", "12.3k", "2M"]


def test_tables_keep_their_cells(tmp_path):
    table = Table(["model", "x"], [["<b>", "1"], ["y", "&amp;"]], note="<note>")
    scores = {"models": table, "scores": [], "baseline": None, "best": {}, "pairs": None}
    empty = {"groups": [], "warnings": [], "data": {}, "samples": [], "recipe": ""}
    extra = {"training": None, "thinned": False, "points": 1, "times": [], "legend_of_parts": []}
    content = scores | empty | extra | {"title": "t", "root": "r"}
    page = Page(write_page(tmp_path / "p.html", "run.html", **content))
    assert page.tables == [[["model", "x"], ["<b>", "1"], ["y", "&amp;"]]]
    assert "<note>" in page.text
