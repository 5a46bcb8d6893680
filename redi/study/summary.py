"""A study as tables and pictures, from its cells alone (sweep.py): report.md and PNGs."""

import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from redi.config import StudyConfig
from redi.evaluation.results import Interval, t_interval
from redi.evaluation.tables import Table
from redi.files import write_text
from redi.pages.plots import Panel, draw_panels

Cell = dict[str, Any]
# Columns of the table over seeds, if any cell has them; in percent, or as they are.
PERCENT = ("pass@4", "pass@2", "unfinished", "leaps", "slips", "rechecks", "caught")
PLAIN = ("tokens", "logps/chosen", "logps/rejected", "entropy")


class Report:
    """What the cells of a study say."""

    def __init__(self, config: StudyConfig, cells: Sequence[Cell]):
        self.config, self.cells = config, cells
        self.tasks = [task for task in config.tasks if self.swept(task, config.baseline)]

    def write(self, folder: Path) -> Path:
        """Writes report.md and its pictures to `folder`; returns report.md.

        Raises RediError when matplotlib is not installed.
        """
        parts = ["# Study\n\nWritten by `redi study`; docs/study.md says what it means.\n"]
        for task in self.tasks:
            parts.append(f"## {task}\n")
            tables = [
                self.over_seeds(task),
                self.between(task),
                self.by_seed(task),
                self.rates(task),
            ]
            parts += [table.markdown() for table in tables if table.rows]
        for name, title, rows in self.pictures():
            panels = [panel for row in rows for panel in row]
            if panels:
                columns = len(rows[0]) if len(rows[0]) > 1 else len(panels)
                draw_panels(panels, columns, folder / f"{name}.png", title)
                parts.append(f"![{title}]({name}.png)\n")
        file = folder / "report.md"
        write_text(file, "\n".join(parts))
        return file

    def pictures(self) -> Iterator[tuple[str, str, list[list[Panel]]]]:
        """(name, title, a row of panels for each task); arms in groups that a legend can hold."""
        base = self.config.baseline
        for name, arms in _groups("rates", [x for x in self.config.arms if x != base], 8):
            drawn = [self.rates_panel(task, [base, *arms]) for task in self.tasks]
            title = "Against learning rate (validation, one seed)"
            yield name, title, [[panel] for panel in drawn if panel.lines]
        drawn = [self.alpha_panel(task) for task in self.tasks]
        title = "Against alpha, at the learning rates of the sweep"
        yield "alpha", title, [[panel] for panel in drawn if panel.lines]
        arms = [x for x in self.config.followed or self.config.arms if x != base]
        for name, pair in _groups("steps", arms, 2):
            title = f"Against step, healthy and collapsing: {', '.join(pair)}"
            yield name, title, [self.step_panels(task, pair) for task in self.tasks]

    # --- cells

    def swept(self, task: str, arm: str) -> list[Cell]:
        """An arm's validation cells, by rate."""
        found = self._cells(task=task, arm=arm, split="validation")
        return sorted(found, key=lambda cell: cell["rate"] or 0)

    def tested(self, task: str, arm: str) -> list[Cell]:
        """An arm's test cells at the sweep's best rate, by seed."""
        found = self._cells(task=task, arm=arm, split="test", rate=self.best(task, arm)["rate"])
        return sorted(found, key=lambda cell: cell["seed"])

    def _cells(self, **key: Any) -> list[Cell]:
        return [cell for cell in self.cells if key.items() <= cell.items()]

    def best(self, task: str, arm: str) -> Cell:
        return max(self.swept(task, arm), key=lambda cell: cell["pass@1"])

    def arms(self, task: str) -> list[str]:
        return [arm for arm in ("sft", *self.config.arms) if self.swept(task, arm)]

    def differences(self, task: str, arm: str, other: str) -> list[float]:
        """In percent, to the other arm of the same seed, hence of the same SFT model."""
        base = {cell["seed"]: cell["pass@1"] for cell in self.tested(task, other)}
        own = self.tested(task, arm)
        return [100 * (c["pass@1"] - base[c["seed"]]) for c in own if c["seed"] in base]

    # --- tables

    def over_seeds(self, task: str) -> Table:
        arms = [arm for arm in self.arms(task) if self.tested(task, arm)]
        every = [cell for arm in arms for cell in self.tested(task, arm)]
        percent = [name for name in PERCENT if any(cell.get(name) for cell in every)]
        plain = [name for name in PLAIN if any(name in cell for cell in every)]
        rows = []
        for arm in arms:
            cells, differences = (
                self.tested(task, arm),
                self.differences(task, arm, self.config.baseline),
            )
            compared = differences and arm != self.config.baseline
            rows.append([
                arm,
                f"{cells[0]['rate']:g}" if cells[0]["rate"] else "",
                f"{len(cells)}",
                _plus_minus(t_interval([100 * cell["pass@1"] for cell in cells])),
                _plus_minus(t_interval(differences), "+.1f") if compared else "",
                *(_mean(cells, name, 100, ".0f") for name in percent),
                *(_mean(cells, name, 1, ".1f" if name == "tokens" else ".2f") for name in plain),
            ])  # fmt: skip
        header = ["arm", "rate", "seeds", "pass@1", f"minus {self.config.baseline}"]
        note = "Test split, best rate of the sweep; in percent, ± is a 95% t-interval over seeds."
        return Table(
            [*header, *percent, *(name.removeprefix("logps/") for name in plain)], rows, note
        )

    def between(self, task: str) -> Table:
        arms = [arm for arm in self.arms(task) if len(self.tested(task, arm)) > 1]
        named = ["sft", *self.config.followed] if self.config.followed else arms
        others = [arm for arm in arms if arm in named]
        rows = []
        for arm in arms:
            gaps = {other: t_interval(self.differences(task, arm, other)) for other in others}
            rows.append(
                [arm, *(_plus_minus(x, "+.1f") if o != arm else "" for o, x in gaps.items())]
            )
        note = "Row minus column, paired by seed; in percent, ± is a 95% t-interval over seeds."
        return Table(["arm", *(f"minus {arm}" for arm in others)], rows, note)

    def by_seed(self, task: str) -> Table:
        seeds = sorted({c["seed"] for c in self._cells(task=task, split="test")})
        rows = []
        for arm in self.arms(task):
            found = {cell["seed"]: cell for cell in self.tested(task, arm)}
            if not found:
                continue
            score = [f"{100 * found[s]['pass@1']:.1f}" if s in found else "" for s in seeds]
            rows.append([arm, *score])
        errors = [cell["error"] for cell in self._cells(task=task, split="test")]
        noise = f"{196 * max(errors, default=0):.1f}"
        note = (
            f"Test pass@1 in percent; of each, ± {noise} or less for the choice of problems (95%)."
        )
        return Table(["arm", *(f"seed {seed}" for seed in seeds)], rows if seeds else [], note)

    def rates(self, task: str) -> Table:
        rates = sorted({c["rate"] for c in self._cells(task=task, split="validation")} - {None})
        rows = []
        for arm in self.arms(task)[1:]:
            found = {cell["rate"]: cell for cell in self.swept(task, arm)}
            best = self.best(task, arm)["rate"]
            rows.append([arm, *(_score(found.get(rate), best) for rate in rates)])
        (start,) = self.swept(task, "sft")
        note = (
            "Validation pass@1 in percent, one seed, by learning rate; each arm's best in bold. "
            f"The SFT model they start from: {100 * start['pass@1']:.1f}."
        )
        return Table(["arm", *(f"{rate:g}" for rate in rates)], rows, note)

    # --- pictures

    def rates_panel(self, task: str, arms: Sequence[str]) -> Panel:
        lines = {}
        for arm in arms:
            cells = [cell for cell in self.swept(task, arm) if cell["rate"]]
            if cells:
                scores = [_normal(cell) for cell in cells]
                lines[arm] = _line([cell["rate"] for cell in cells], scores)
        return Panel(f"{task}: pass@1, percent", "learning rate", lines, log_x=True)

    def alpha_panel(self, task: str) -> Panel:
        """One line a rate, on the validation split; and the tested best rates."""
        alphas: dict[float, str] = {}
        for arm, how in self.config.arms.items():
            if not how.own and how.settings.keys() <= {"alpha"} and self.swept(task, arm):
                alphas[how.settings.get("alpha", 0.8)] = arm
        lines = {}
        for rate in sorted({c["rate"] for arm in alphas.values() for c in self.swept(task, arm)}):
            swept = {
                a: [c for c in self.swept(task, arm) if c["rate"] == rate]
                for a, arm in alphas.items()
            }
            points = {a: _normal(cells[0]) for a, cells in swept.items() if cells}
            if len(points) > 2:
                lines[f"{rate:g}"] = _line(points, list(points.values()))
        tested = {a: self.tested(task, arm) for a, arm in alphas.items()}
        scores = {
            a: t_interval([100 * c["pass@1"] for c in t]) for a, t in tested.items() if len(t) > 1
        }
        if scores:
            lines["best rates, test seeds"] = _line(scores, list(scores.values()))
        return Panel(f"{task}: pass@1, percent", "alpha", lines, ticks=sorted(alphas))

    def step_panels(self, task: str, arms: Sequence[str]) -> list[Panel]:
        """The baseline at its best rate, `arms` at theirs and at the highest tried."""
        chosen: dict[str, Cell] = {}
        for arm in (self.config.baseline, *arms):
            cells = self.swept(task, arm)
            if cells:
                chosen[f"{arm}, best rate"] = self.best(task, arm)
                if arm != self.config.baseline:
                    chosen[f"{arm}, highest rate"] = cells[-1]
        accuracy = {name: _on_the_way(cell) for name, cell in chosen.items()}
        accuracy = {name: line for name, line in accuracy.items() if line}
        curves = {name: dict(cell["curve"]) for name, cell in chosen.items()}
        for curve in curves.values():
            norms, rates = curve["grad_norm"], curve["learning_rate"]
            curve["update"] = [norm * rate for norm, rate in zip(norms, rates, strict=True)]
        titles = {
            "logps/chosen": "chosen, log-prob per token",
            "logps/rejected": "rejected, log-prob per token",
            "update": "gradient norm x learning rate",
        }
        lines = {key: {name: (c["step"], c[key]) for name, c in curves.items()} for key in titles}
        panels = [Panel(f"{task}: pass@1, percent", "step", accuracy)]
        return (panels if any("accuracy_curve" in cell for cell in self.cells) else []) + [
            Panel(f"{task}: {title}", "step", lines[key], log_y=True)
            for key, title in titles.items()
        ]


def _groups(name: str, arms: Sequence[str], size: int) -> Iterator[tuple[str, list[str]]]:
    """(name of a picture, its arms); at least one."""
    for i in range(0, max(len(arms), 1), size):
        yield f"{name}-{i // size + 1}" if i else name, list(arms[i : i + size])


def _normal(cell: Cell) -> Interval:
    """In percent: one model's score, with the 95% interval that the choice of problems leaves."""
    score, half = 100 * cell["pass@1"], 196 * cell["error"]
    return Interval(score, score - half, score + half)


def _on_the_way(cell: Cell) -> tuple[list[float], ...]:
    """In percent against step; empty if it was not measured."""
    curve = cell.get("accuracy_curve")
    if curve is None:
        return ()
    scores = zip(curve["pass@1"], curve["error"], strict=True)
    return _line(curve["step"], [_normal({"pass@1": s, "error": e}) for s, e in scores])


def _line(x: Iterable[float], scores: Sequence[Interval]) -> tuple[list[float], ...]:
    return list(x), [s.mean for s in scores], [s.low for s in scores], [s.high for s in scores]


def _plus_minus(interval: Interval, form: str = ".1f") -> str:
    half = (interval.high - interval.low) / 2
    return f"{interval.mean:{form}}" + ("" if math.isnan(half) else f" ± {half:.1f}")


def _score(cell: Cell | None, best: float) -> str:
    if cell is None:
        return ""
    text = f"{100 * cell['pass@1']:.1f}"
    return f"**{text}**" if cell["rate"] == best else text


def _mean(cells: Sequence[Cell], name: str, factor: float, form: str) -> str:
    values = [factor * cell[name] for cell in cells if name in cell]
    return f"{sum(values) / len(values):{form}}" if values else ""
