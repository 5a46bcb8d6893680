"""Models as tables: which is better, and by how much. Printed on a terminal (rich), or markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from redi.errors import RediError
from redi.evaluation.results import EvalResult, Interval, paired_difference


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
    votes = k > 2 and all(result.group_PN is not None for result in results.values())
    header += (
        [f"pass@{k}"] * (k > 1)
        + [f"majority@{k}"] * votes
        + ["unfinished"]
        + ["ungraded"] * ungraded
        + ["tokens"]
    )
    header += ["log-prob gap"] * gaps
    rows = []
    for name, result in results.items():
        sem = "" if result.sem is None else f" ± {100 * result.sem:.1f}"
        row = [name, f"{100 * result.pass_at_1:.1f}{sem}"]
        if baseline is not None:
            difference = paired_difference(result, results[baseline])
            row.append("baseline" if name == baseline else format_interval(difference, 100, "5.1f"))
        row += [f"{100 * result.pass_at(k):.1f}"] * (k > 1)
        row += [f"{100 * (result.majority_at(k) or 0):.1f}"] * votes
        row += [f"{100 * float(1 - result.finished_PN.mean()):.1f}"]
        row += [f"{100 * _ungraded(result):.1f}"] * ungraded
        row += ["" if result.mean_tokens is None else f"{result.mean_tokens:,.1f}"]
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
            row.append("baseline" if name == baseline else format_interval(difference, 1, "6.3f"))
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


def _ungraded(result: EvalResult) -> float:
    return float(np.isin(result.verdict_PN, ("unparsable", "timeout")).mean())


def format_interval(interval: Interval, factor: float, form: str) -> str:
    """Mean and interval with signs, times `factor`."""
    mean, low, high = (
        f"{factor * x:+{form}}" for x in (interval.mean, interval.low, interval.high)
    )
    return f"{mean} [{low}, {high}]"
