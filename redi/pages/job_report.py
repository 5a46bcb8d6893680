"""What `redi run` ends with: tables of its models and the pictures of plots.py, in results.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from redi.evaluation.results import EvalResult
from redi.evaluation.tables import model_table, pairs_table, print_table
from redi.files import write_text
from redi.pages.plots import MATPLOTLIB_HINT, can_draw, draw_curves, draw_scores
from redi.training.logging import read_metrics


def write_report(
    root: Path,
    results: Mapping[str, EvalResult],
    *,
    baseline: str | None = None,
    title: str = "results",
) -> Path:
    """Prints the table of models; writes results.md and pictures of scores and training.

    Without matplotlib the report has no pictures and says how to get them. Returns results.md.
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
    if can_draw():
        draw_scores(results, root / "scores.png", f"{title}: results")
        parts.append("![pass@1 of each model](scores.png)\n")
        print(f"scores: {root / 'scores.png'}")
    else:
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
    write_text(file, "\n".join(parts))
    print(f"report: {file}", flush=True)
    return file
