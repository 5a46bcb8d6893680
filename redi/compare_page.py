"""`redi compare` as a page: the tables of the terminal, and where two models differ."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from redi.pages import write_page
from redi.report import Table
from redi.results import EvalResult
from redi.run_page import samples_of, score_bars


def write_compare_page(
    file: Path,
    results: Mapping[str, EvalResult],
    tables: Sequence[tuple[str, Table]],
    folders: Mapping[str, Path],
    *,
    baseline: str | None = None,
) -> Path:
    """Writes the page of evaluations that stand in `folders`, by model.

    `tables` are those of the terminal, with their captions. Raises RediError if it cannot be
    written.
    """
    return write_page(
        file,
        "compare.html",
        title=" · ".join(results),
        baseline=baseline,
        scores=score_bars(results),
        tables=tables,
        flips=flips_table(results, baseline) if baseline is not None else None,
        folders={name: str(folder) for name, folder in folders.items()},
        samples=samples_of(results, folders),
    )


def flips_table(results: Mapping[str, EvalResult], baseline: str) -> Table:
    """On how many problems each model is right more often, less often, as often as the baseline."""
    base_P = results[baseline].correct_PN.mean(axis=1)
    rows = []
    for name, result in results.items():
        if name != baseline:
            sign_P = np.sign(result.correct_PN.mean(axis=1) - base_P)
            rows.append([name, *(f"{int((sign_P == sign).sum()):,}" for sign in (1, -1, 0))])
    header = ["model", "more often right", "less often", "as often"]
    return Table(header, rows, f"Problems, by the share of samples that are right; vs {baseline}.")
