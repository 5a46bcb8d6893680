"""The collapse guard on finished demo runs: when it speaks, and how close the others came.

    make demo && python bench/guard_check.py runs/demo
    python bench/guard_check.py runs/demo runs/slip --write docs/training.md

Shows the guard every stage's metrics.jsonl, as the loop did. `--write` puts the table between the
page's markers and, of the first run, the picture beside it. Exit 1 if it speaks on other stages
than `--speaks` says.
"""

import argparse
import statistics
import sys
from pathlib import Path

from pages import replace_between

from redi.pages.plots import COLOURS, _dress, _figure, _save
from redi.training.guard import SIGNS, CollapseGuard, limit
from redi.training.logging import read_metrics

PANELS = (
    ("logps/chosen", "chosen: log-prob per token"),
    ("logps/rejected", "rejected: log-prob per token"),
    ("logps/stop", "chosen: log-prob of the stop token"),
    ("rejected_below_1e-4", "rejected: share of tokens with p < 1e-4"),
    ("entropy", "chosen: entropy, nats (every 10th step)"),
    ("grad_norm", "gradient norm"),
)


def replay(rows: list[dict]) -> tuple[int | None, dict[str, float]]:
    """(the step of the first alarm, how much each sign got worse at most, over its limit)."""
    guard, first, closest = CollapseGuard(), None, {}
    for row in rows:
        if guard.watch(row) and first is None:
            first = row["step"]
        for sign in SIGNS:
            history = guard.history.get(sign.key)
            if history and history["best"] is not None:
                fall = sign.worse * (statistics.median(history["recent"]) - history["best"])
                closest[sign.key] = max(
                    closest.get(sign.key, 0.0), fall / limit(sign, history["early"])
                )
    return first, closest


def draw(runs: dict[str, list[dict]], alarms: dict[str, int | None], file: Path) -> None:
    figure = _figure(figsize=(12, 6.2))
    for ax, (key, title) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        for (name, rows), colour in zip(runs.items(), COLOURS, strict=False):
            points = [(row["step"], row[key]) for row in rows if key in row]
            ax.plot(*zip(*points, strict=True), color=colour, linewidth=1.3, label=name)
            if alarms[name] is not None:
                ax.axvline(alarms[name], color=colour, linestyle=":", linewidth=1.3)
        _dress(ax, title)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=3,
                  frameon=False)  # fmt: skip
    _save(figure, file, "A healthy run and a collapsing one (dotted: the guard speaks)")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of `redi run`")
    parser.add_argument("--speaks", nargs="*", default=["redi-1"], help="stages that collapse")
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    heads = ["chosen", "stop", "p < 1e-4", "entropy"]
    lines = [f"| run | stage | steps | first alarm | {' | '.join(heads)} |", "|---" * 8 + "|"]
    wrong, alarms, stages = False, {}, {}
    for run in args.runs:
        found = [read_metrics(file) for file in run.glob("*/metrics.jsonl")]
        names = [file.parent.name for file in run.glob("*/metrics.jsonl")]
        for rows, name in sorted(zip(found, names, strict=True), key=lambda x: x[0][0]["time"]):
            first, closest = replay(rows)
            wrong |= (first is not None) != (name in args.speaks)
            cells = [f"{closest[s.key]:.2f}" if s.key in closest else "" for s in SIGNS]
            alarm = "none" if first is None else f"step {first}"
            lines.append(f"| {run.name} | {name} | {len(rows):,} | {alarm} | {' | '.join(cells)} |")
            if run == args.runs[0]:
                stages[name], alarms[name] = rows, first
    print("\n".join(lines))
    if args.write:
        replace_between(args.write, "guard_check", "\n".join(lines))
        shown = {name: stages[name] for name in ("redi-0.8", "redi-1")}
        draw(shown, alarms, args.write.parent / "collapse.png")
    return wrong


if __name__ == "__main__":
    sys.exit(main())
