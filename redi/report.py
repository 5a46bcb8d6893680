"""A run as tables and pictures: which model is better, by how much, and how training went.

Tables print on a terminal (rich) and as markdown; curves are PNGs (matplotlib, optional).
`redi run` ends with `write_report`, which puts both into `results.md`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from redi.errors import RediError
from redi.monitor import read_metrics
from redi.results import EvalResult, Interval, paired_difference

# Okabe and Ito's palette without its yellow: told apart by colour-blind readers and on white paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LINES: Sequence[Any] = ("-", "--", ":", "-.")  # once the colours are used up
PANELS = (
    ("loss", "loss"),
    ("grad_norm", "gradient norm"),
    ("logps/chosen", "chosen: log-prob per token"),
    ("logps/rejected", "rejected: log-prob per token"),
)
MATPLOTLIB_HINT = 'curves need matplotlib: pip install "reinforcement-distillation[plot]"'


@dataclass(frozen=True)
class Table:
    """Cells as text. The first column is left-aligned, the others right-aligned."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self) -> str:
        """Lines up as plain text too."""
        lines = [self.header, *self.rows]
        widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(self.header))]

        def join(cells: Sequence[str]) -> str:
            first, *others = (
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
            )
            return f"| {' | '.join([first, *others])} |"

        rule = join([":" + "-" * (widths[0] - 1), *("-" * (w - 1) + ":" for w in widths[1:])])
        body = "\n".join([join(self.header), rule, *map(join, self.rows)])
        return f"{body}\n\n{self.note}\n" if self.note else f"{body}\n"


def model_table(results: Mapping[str, EvalResult], baseline: str | None = None) -> Table:
    """One row a model; with `baseline`, each model's paired difference to it.

    Raises RediError for a baseline that is not among the results, and for models that were
    evaluated on different problems.
    """
    if baseline is not None and baseline not in results:
        raise RediError(f"baseline {baseline!r} is none of the models {sorted(results)}")
    shape = next(iter(results.values())).correct_PN.shape
    k = 2 ** (shape[1].bit_length() - 1)  # the largest power of two
    ungraded = any(_ungraded(result) for result in results.values())
    gaps = any(result.pairs is not None for result in results.values())
    header = ["model", "pass@1 ± SEM" if shape[1] > 1 else "pass@1"]
    header += [f"vs {baseline} [95% CI]"] * (baseline is not None)
    header += [f"pass@{k}"] * (k > 1) + ["unfinished"] + ["ungraded"] * ungraded + ["tokens"]
    header += ["log-prob gap"] * gaps
    rows = []
    for name, result in results.items():
        sem = "" if result.sem is None else f" ± {100 * result.sem:.1f}"
        row = [name, f"{100 * result.pass_at_1:.1f}{sem}"]
        if baseline is not None:
            difference = paired_difference(result, results[baseline])
            row.append("baseline" if name == baseline else _interval(difference, 100, "5.1f"))
        row += [f"{100 * result.pass_at(k):.1f}"] * (k > 1)
        row += [f"{100 * float(1 - result.finished_PN.mean()):.1f}"]
        row += [f"{100 * _ungraded(result):.1f}"] * ungraded
        row += [f"{float(result.num_tokens_PN.mean()):,.1f}"]
        if gaps:
            row.append("" if result.pairs is None else f"{float(result.pairs.gap_P.mean()):+.3f}")
        rows.append(row)
    note = f"{shape[0]:,} problems x {shape[1]} sample{'s' * (shape[1] > 1)}; in percent."
    note += " SEM: over the samplings, as in the paper." * (shape[1] > 1)
    if baseline is not None:
        note += (
            " CI: paired bootstrap over problems; it says nothing about training with other seeds."
        )
    if ungraded:
        note += (
            " Ungraded: no answer could be read, or the grader ran out of time; counted as wrong."
        )
    return Table(header, rows, note)


def pairs_table(results: Mapping[str, EvalResult], baseline: str | None = None) -> Table | None:
    """Held-out right and wrong traces' log-probs per token; None if no model was scored on them."""
    scored = {name: result for name, result in results.items() if result.pairs is not None}
    if not scored:
        return None
    compare = baseline in scored
    header = ["model", "chosen", "rejected", "gap"]
    header += [f"gap vs {baseline} [95% CI]"] * compare + ["chosen > rejected"]
    rows = []
    for name, result in scored.items():
        figures = result.metrics()["pairs"]
        row = [name, *(f"{figures[key]:.3f}" for key in ("logps/chosen", "logps/rejected"))]
        row.append(f"{figures['gap']:+.3f}")
        if compare:
            difference = paired_difference(result, results[str(baseline)], "gap")
            row.append("baseline" if name == baseline else _interval(difference, 1, "6.3f"))
        rows.append([*row, f"{100 * figures['chosen_above_rejected']:.1f}%"])
    count = len(next(iter(scored.values())).pairs.ids)  # type: ignore[union-attr]
    return Table(header, rows, f"Log-probs per token of {count:,} held-out pairs of traces.")


def print_table(table: Table) -> None:
    """On standard output; never wrapped, so that its columns stay columns in a log file too."""
    from rich import box
    from rich.console import Console
    from rich.measure import Measurement
    from rich.table import Table as RichTable
    from rich.text import Text

    shown = RichTable(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), header_style="bold")
    for i, name in enumerate(table.header):
        shown.add_column(Text(name), justify="right" if i else "left", no_wrap=True)
    for row in table.rows:
        shown.add_row(*map(Text, row))
    console = Console()
    width = Measurement.get(console, console.options.update(max_width=1000), shown).maximum
    console.width = max(console.width, width)
    console.print(shown)
    if table.note:
        console.print(Text(table.note, style="dim"))


def draw_curves(
    runs: Mapping[str, Sequence[Mapping[str, float]]], file: Path, title: str = ""
) -> None:
    """Draws metrics.jsonl rows of several runs against the step, as a PNG.

    Raw values are faint, a light smoothing is on top. An axis whose values span more than a factor
    of five on one side of zero is logarithmic, so that a run that collapses does not flatten the
    others. Raises RediError when matplotlib is not installed.
    """
    if find_spec("matplotlib") is None:
        raise RediError(MATPLOTLIB_HINT)
    from matplotlib.figure import Figure

    panels = [
        (k, name) for k, name in PANELS if any(k in row for run in runs.values() for row in run)
    ]
    columns = 3 if len(panels) == 3 else 2
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5 * columns if columns == 2 else 12, 0.9 + 2.9 * rows), dpi=150)
    figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.08)
    for ax, (key, name) in zip(
        figure.subplots(rows, columns, squeeze=False).flat, panels, strict=False
    ):
        curves = [_points(run, key) for run in runs.values()]
        sign = _scale(ax, np.concatenate([values for _, values in curves]))
        for i, (steps, values) in enumerate(curves):
            style = {"color": COLOURS[i % 7], "linestyle": LINES[i // 7 % 4]}
            ax.plot(steps, sign * values, linewidth=0.8, alpha=0.25, **style)
            ax.plot(steps, sign * smooth(values), linewidth=1.8, **style)
        _dress(ax, name)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    if len(runs) > 1:
        _legend(figure, list(runs))
    aside = file.with_suffix(".tmp")
    figure.savefig(aside, format="png")
    aside.replace(file)


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


def write_report(
    root: Path,
    results: Mapping[str, EvalResult],
    *,
    baseline: str | None = None,
    title: str = "results",
) -> Path:
    """Prints the table of models; writes results.md and the curves of `root/<model>/metrics.jsonl`.

    Without matplotlib the report has no curves and says how to get them. Returns results.md.
    """
    tables = [model_table(results, baseline), pairs_table(results, baseline)]
    parts = [f"# {title}\n"]
    for table in tables:
        if table is not None:
            print_table(table)
            parts.append(table.markdown())
    parts.append("Every sample with its verdict: `eval/<model>/generations.jsonl`.\n")
    stages: dict[str, dict[str, Any]] = {"curves.png": {}, "curves-sft.png": {}}
    for name in results:
        rows = read_metrics(root / name / "metrics.jsonl")
        has_rejected = any("logps/rejected" in row for row in rows)
        if rows:
            stages["curves.png" if has_rejected else "curves-sft.png"][name] = rows
    if find_spec("matplotlib") is None:
        stages = {}
        print(MATPLOTLIB_HINT)
        parts.append(f"No pictures: {MATPLOTLIB_HINT}\n")
    for picture, stage in stages.items():
        if stage:
            names = ", ".join(stage)
            heading = f"{title}: training" if len(stage) > 1 else f"{title}: {names}"
            draw_curves(stage, root / picture, heading)
            parts.append(f"![training curves of {names}]({picture})\n")
            print(f"curves: {root / picture}")
    file = root / "results.md"
    aside = file.with_suffix(".tmp")
    aside.write_text("\n".join(parts), encoding="utf-8")
    aside.replace(file)
    print(f"report: {file}", flush=True)
    return file


def _ungraded(result: EvalResult) -> float:
    return float(np.isin(result.verdict_PN, ("unparsable", "timeout")).mean())


def _interval(interval: Interval, factor: float, form: str) -> str:
    mean, low, high = (
        f"{factor * x:+{form}}" for x in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [{low}, {high}]"


def _points(run: Sequence[Mapping[str, float]], key: str) -> tuple[np.ndarray, np.ndarray]:
    points = [(row["step"], row[key]) for row in run if row.get(key) is not None]
    steps, values = np.array(points, dtype=float).reshape(-1, 2).T
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
