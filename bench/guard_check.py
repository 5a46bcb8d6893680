"""The collapse guard on finished demo runs: when it speaks, and how close the others came.

    make demo && python bench/guard_check.py runs/demo
    python bench/guard_check.py runs/demo --write docs/training.md

Shows the guard every stage's metrics.jsonl, as the loop did. `--write` puts the table between the
page's markers and the picture beside it. Exit 1 if it speaks on a stage other than redi-1, or not
there.
"""

import argparse
import statistics
import sys
from pathlib import Path

from pages import replace_between

from redi.guard import SIGNS, CollapseGuard
from redi.monitor import read_metrics
from redi.plots import COLOURS, _dress, _figure, _save

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
                closest[sign.key] = max(closest.get(sign.key, 0.0), fall / sign.limit)
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
    parser.add_argument("run", type=Path)
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    stages = ["pretrain", "sft", "control", "redi-0.5", "redi-0.8", "redi-1"]
    runs = {name: read_metrics(args.run / name / "metrics.jsonl") for name in stages}
    heads = ["chosen", "stop", "p < 1e-4", "entropy"]
    lines = [f"| stage | steps | first alarm | {' | '.join(heads)} |", "|---|---|---|" + "---|" * 4]
    alarms: dict[str, int | None] = {}
    for name, rows in runs.items():
        alarms[name], closest = replay(rows)
        cells = [f"{closest[s.key]:.2f}" if s.key in closest else "" for s in SIGNS]
        alarm = "none" if alarms[name] is None else f"step {alarms[name]}"
        lines.append(f"| {name} | {len(rows):,} | {alarm} | {' | '.join(cells)} |")
    text = "\n".join(lines)
    print(text)
    if args.write:
        replace_between(args.write, "guard_check", text)
        shown = {name: runs[name] for name in ("redi-0.8", "redi-1")}
        draw(shown, alarms, args.write.parent / "collapse.png")
    return [name for name in stages if alarms[name] is not None] != ["redi-1"]


if __name__ == "__main__":
    sys.exit(main())
