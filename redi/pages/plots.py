"""A run as pictures: PNGs drawn with matplotlib, which is optional."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from redi.errors import RediError
from redi.evaluation.results import EvalResult, bootstrap
from redi.files import publish

# Okabe and Ito's palette without its yellow: told apart by colour-blind readers and on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES: Sequence[Any] = ("-", "--", ":", "-.")  # once the colours are used up
PANELS = (
    ("loss", "loss"),
    ("grad_norm", "gradient norm"),
    ("logps/chosen", "chosen: log-prob per token"),
    ("logps/rejected", "rejected: log-prob per token"),
)
MATPLOTLIB_HINT = 'pictures need matplotlib: pip install "reinforcement-distillation[plot]"'


def can_draw() -> bool:
    return find_spec("matplotlib") is not None


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]], file: Path, title: str = ""
) -> None:
    """Draws metrics.jsonl rows of several runs against the step, as a PNG.

    Raw values are faint, a light smoothing is on top. An axis whose values span more than a factor
    of five on one side of zero is logarithmic, so that a run that collapses does not flatten the
    others. Raises RediError when matplotlib is not installed.
    """
    panels = [
        (k, name) for k, name in PANELS if any(k in row for run in runs.values() for row in run)
    ]
    columns = 3 if len(panels) == 3 else 2
    rows = -(-len(panels) // columns)
    figure = _figure(figsize=(5 * columns if columns == 2 else 12, 0.9 + 2.9 * rows))
    for ax, (key, name) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False
    ):
        curves = [points(run, key) for run in runs.values()]
        sign = _scale(ax, np.concatenate([values for _, values in curves]))
        for i, (steps, values) in enumerate(curves):
            style = {"color": COLOURS[i % 7], "linestyle": LINES[i // 7 % 4]}
            ax.plot(steps, sign * values, linewidth=0.8, alpha=0.25, **style)
            ax.plot(steps, sign * smooth(values), linewidth=1.8, **style)
        _dress(ax, name)
    if len(runs) > 1:
        _legend(figure, list(runs))
    _save(figure, file, title)


def smooth(values: np.ndarray) -> np.ndarray:
    """A line fitted around each point with Gaussian weights, 1/40 of the points wide. (A plain
    average would bend the steep ends of a curve inwards.) Values that are not finite weigh nothing;
    short curves are left as they are."""
    if len(values) < 20:
        return values
    sigma = max(2.0, len(values) / 40)
    reach = int(3 * sigma)
    away = np.arange(-reach, reach + 1)
    weight = np.exp(-0.5 * (away / sigma) ** 2)
    finite = np.isfinite(values)
    around = lambda z, w: np.convolve(z, w)[reach : reach + len(values)]
    w0, w1, w2 = (around(finite.astype(float), weight * away**i) for i in range(3))
    y0, y1 = (around(np.where(finite, values, 0.0), weight * away**i) for i in range(2))
    with np.errstate(invalid="ignore", divide="ignore"):
        return (w2 * y0 - w1 * y1) / (w0 * w2 - w1**2)


def draw_scores(results: Mapping[str, EvalResult], file: Path, title: str = "") -> None:
    """Draws each model's pass@1 with its 95% interval over problems, as a PNG.

    Raises RediError when matplotlib is not installed.
    """
    figure = _figure(figsize=(10, 0.9 + 0.42 * len(results)))
    ax = figure.subplots()
    for row, (name, result) in enumerate(results.items()):
        score = bootstrap(100 * result.correct_PN.mean(axis=1))
        colour = "#555555" if name == "sft" else COLOURS[(row - ("sft" in results)) % 7]
        ax.barh(row, score.mean, height=0.62, color=colour, alpha=0.85)
        ax.plot([score.low, score.high], [row, row], color="black", linewidth=1.6)
        text = f"{score.mean:.1f}  [{score.low:.1f}, {score.high:.1f}]"
        ax.annotate(text, (score.high, row), (8, 0), textcoords="offset points", va="center",
                    fontsize=9)  # fmt: skip
    ax.set_yticks(range(len(results)), list(results), fontsize=10)
    ax.invert_yaxis()
    _dress(ax, "pass@1, percent, with its 95% interval over problems")
    ax.set_xlim(0, 116)  # room for the label of a perfect score
    ax.set_xticks(range(0, 101, 20))
    ax.grid(visible=False, axis="y")
    ax.set_xlabel("")
    _save(figure, file, title)


@dataclass(frozen=True)
class Panel:
    """Lines by name: x, y and, unless they are empty, the lower and upper ends of y's intervals."""

    title: str
    x_name: str
    lines: Mapping[str, tuple[Sequence[float], ...]]  # (x, y) or (x, y, low, high)
    log_x: bool = False
    log_y: bool = False
    ticks: Sequence[float] = ()  # of x, instead of automatic ones


def draw_panels(panels: Sequence[Panel], columns: int, file: Path, title: str = "") -> None:
    """Draws panels side by side as a PNG; a name has the same colour in all of them.

    Raises RediError when matplotlib is not installed.
    """
    names = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    rows = -(-len(panels) // columns)
    width = max(9.0, 4.4 * columns)
    figure = _figure(figsize=(width, 1.4 + 3.0 * rows))
    axes = figure.subplots(rows, columns, squeeze=False).flat
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, panel in zip(axes, panels, strict=False):
        signs = {1}
        if panel.log_y:
            signs = {_scale(ax, np.concatenate([line[1] for line in panel.lines.values()]))}
        for name, (x, y, *ends) in panel.lines.items():
            i, sign = names.index(name), min(signs)
            style = {"color": COLOURS[i % 7], "linestyle": LINES[i // 7 % 4]}
            marker = "o" if ends else ""
            ax.plot(x, sign * np.asarray(y), linewidth=1.8, marker=marker, ms=4, **style)
            if ends:
                ax.vlines(x, *ends, linewidth=1.2, color=style["color"], alpha=0.6)
        _dress(ax, panel.title)
        ax.set_xlabel(panel.x_name, fontsize=9)
        if panel.log_x:
            ax.set_xscale("log")
        elif panel.ticks:
            ax.set_xticks(panel.ticks, [f"{x:g}" for x in panel.ticks])
    _legend(figure, names)
    _save(figure, file, title)


def _figure(figsize: tuple[float, float]) -> Any:
    if not can_draw():
        raise RediError(MATPLOTLIB_HINT)
    from matplotlib.figure import Figure

    figure = Figure(figsize=figsize, dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    return figure


def _save(figure: Any, file: Path, title: str) -> None:
    if title:
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    aside = file.with_name(f"{file.name}.tmp")
    figure.savefig(aside, format="png")
    publish(aside.parent, {aside.name: file})


def points(run: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have `key`."""
    found = [(row["step"], row[key]) for row in run if row.get(key) is not None]
    steps, values = np.array(found, dtype=float).reshape(-1, 2).T
    return steps, values


def _scale(ax: Any, values: np.ndarray) -> int:
    """Chooses the axis; returns the sign to plot values with (a log axis shows no negatives)."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    values = values[np.isfinite(values) & (values != 0)]
    signs, sizes = set(np.sign(values).tolist()), np.abs(values)
    if len(signs) != 1 or np.quantile(sizes, 0.99) < 5 * np.quantile(sizes, 0.01):
        return 1
    (sign,) = signs
    decades = np.log10(sizes.max() / sizes.min())
    ax.set_yscale("log")
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if decades < 3 else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{sign * y:g}".replace("-", "\u2212")))
    ax.yaxis.set_minor_formatter(NullFormatter())
    if sign < 0:
        ax.invert_yaxis()
    return int(sign)


def _dress(ax: Any, name: str) -> None:
    ax.set_title(name, loc="left", fontsize=11)
    ax.set_xlabel("step", fontsize=9)
    ax.locator_params(axis="x", nbins=6, integer=True)
    ax.tick_params(labelsize=9, length=3, color="#888888")
    ax.tick_params(which="minor", length=0)
    ax.grid(color="#e4e4e4", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.margins(x=0.01)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        ax.spines[side].set_color("#888888")


def _legend(figure: Any, names: list[str]) -> None:
    """Below the panels, outside the data."""
    from matplotlib.lines import Line2D

    handles = [
        Line2D([], [], color=COLOURS[i % 7], linestyle=LINES[i // 7 % 4], linewidth=2.5, label=name)
        for i, name in enumerate(names)
    ]
    figure.legend(
        handles=handles, loc="outside lower center", ncols=min(len(names), 5), frameon=False
    )
