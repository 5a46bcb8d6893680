"""Pictures: what is drawn, checked on matplotlib's own objects."""

import numpy as np
import pytest
from made_up import make_result, metrics_rows

from redi.pages import plots
from redi.pages.plots import draw_curves, draw_scores, smooth


def test_smoothing_keeps_lines_and_survives_gaps():
    line = np.linspace(-3.0, 5.0, 200)
    assert smooth(line) == pytest.approx(line)  # the ends are not bent
    noise = np.random.default_rng(0).normal(0, 1, 2000)
    assert smooth(noise).std() < 0.2
    with_gap = line.copy()
    with_gap[50:53] = np.nan
    assert smooth(with_gap) == pytest.approx(line)
    short = np.array([1.0, 5.0, 2.0])
    assert smooth(short) is short


def axes_of(monkeypatch, runs, file):
    """Draws, and returns the figure's axes by title."""
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    draw_curves(runs, file, "title")
    return figures[0], {ax.get_title(loc="left"): ax for ax in figures[0].axes}


def test_curves_show_every_run_in_every_panel(tmp_path, monkeypatch):
    runs = {"one": metrics_rows(), "two": metrics_rows(), "sparse": metrics_rows(5)}
    figure, axes = axes_of(monkeypatch, runs, tmp_path / "curves.png")
    assert list(axes) == [
        "loss", "gradient norm", "chosen: log-prob per token", "rejected: log-prob per token",
    ]  # fmt: skip
    for ax in axes.values():
        raw, smoothed = ax.lines[::2], ax.lines[1::2]
        assert [line.get_color() for line in smoothed] == list(plots.COLOURS[:3])
        assert all(r.get_alpha() < 0.5 for r in raw)
        assert len(raw[0].get_xdata()) == 60
        assert raw[0].get_ydata() != pytest.approx(smoothed[0].get_ydata())
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == list(runs)
    bottom = min(ax.get_tightbbox().y0 for ax in figure.axes)
    assert legend.get_tightbbox().y1 < bottom  # outside the data
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_a_collapsing_run_gets_a_logarithmic_axis_with_true_labels(tmp_path, monkeypatch):
    runs = {"healthy": metrics_rows(), "collapsing": metrics_rows(collapse=True)}
    figure, axes = axes_of(monkeypatch, runs, tmp_path / "curves.png")
    ax = axes["chosen: log-prob per token"]
    assert (ax.get_yscale(), axes["loss"].get_yscale()) == ("log", "linear")
    figure.canvas.draw()
    labels = [label.get_text() for label in ax.get_yticklabels() if label.get_text()]
    assert "\u22125" in labels and not [x for x in labels if not x.startswith("\u2212")]
    low, high = ax.get_ylim()
    assert (
        low > high
    )  # drawn with the sign turned and upside down: higher is likelier, as elsewhere


def test_a_run_without_rejected_traces_has_three_panels(tmp_path, monkeypatch):
    rows = metrics_rows(rejected=False)
    rows[7]["loss"] = float("nan")
    _, axes = axes_of(monkeypatch, {"sft": rows}, tmp_path / "curves.png")
    assert list(axes) == ["loss", "gradient norm", "chosen: log-prob per token"]
    assert np.isfinite(axes["loss"].lines[1].get_ydata()).all()


def test_scores_show_every_model_with_its_interval(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    figures = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *a, **k: (figures.append(self), save(self, *a, **k))
    )
    results = {"sft": make_result([[1, 0], [0, 0]] * 50), "redi": make_result([[1, 1]] * 100)}
    draw_scores(results, tmp_path / "scores.png", "title")
    (ax,) = figures[0].axes
    assert [label.get_text() for label in ax.get_yticklabels()] == ["sft", "redi"]
    assert [bar.get_width() for bar in ax.patches] == [25.0, 100.0]
    low, high = ax.lines[0].get_xdata()
    assert 17 < low < 25 < high < 33
    assert list(ax.lines[1].get_xdata()) == [100.0, 100.0]
    assert (tmp_path / "scores.png").stat().st_size > 10_000
