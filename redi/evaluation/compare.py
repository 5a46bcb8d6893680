"""`redi compare`: evaluated models side by side, with tests between them and the paper's figures.

Measured and published figures never mix: a published row says so, carries no test, and the note
names what differs.
"""

import os
from collections.abc import Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

import numpy as np

from redi.errors import RediError
from redi.evaluation.benchmarks import BENCHMARKS
from redi.evaluation.published import PUBLISHED, SETS
from redi.evaluation.results import (
    SETTINGS,
    EvalResult,
    bootstrap,
    load_results,
    paired_difference,
    sign_test,
)
from redi.evaluation.tables import Table, format_interval, model_table

Results = Mapping[str, Mapping[str, EvalResult]]  # of each model, by benchmark


def load_models(folders: Sequence[str | os.PathLike]) -> dict[str, dict[str, EvalResult]]:
    """Evaluations by the name of their folder, or by more of the path where names repeat.

    Raises RediError for a folder without a finished evaluation, and when the models do not share
    a benchmark.
    """
    paths = [Path(folder) for folder in folders]
    names = [path.resolve().name for path in paths]
    if len(set(names)) < len(names):
        names = [str(path) for path in paths]
    twice = next((p for p in paths if [q.resolve() for q in paths].count(p.resolve()) > 1), None)
    if twice is not None:
        raise RediError(f"{twice}: given twice; name the folders of different evaluations")
    models = {name: load_results(path) for name, path in zip(names, paths, strict=True)}
    if not shared(models):
        have = "; ".join(f"{name}: {', '.join(map(title, sets))}" for name, sets in models.items())
        raise RediError(f"the models were evaluated on nothing in common ({have})")
    return models


def shared(models: Results) -> list[str]:
    """The benchmarks that every model was evaluated on, in the paper's order."""
    first, *others = models.values()
    common = [name for name in first if all(name in other for other in others)]
    order = list(BENCHMARKS)
    return sorted(common, key=lambda name: order.index(name) if name in order else len(order))


def title(benchmark: str) -> str:
    return BENCHMARKS[benchmark].title if benchmark in BENCHMARKS else benchmark or "dataset"


def score_table(models: Results, published: bool = False) -> Table:
    """pass@1 with its SEM, one row a model and one column a benchmark, and their plain average."""
    sets = shared(models)
    several = len(sets) > 1
    rows = []
    for name, results in models.items():
        scores = [100 * results[key].pass_at_1 for key in sets]
        sems = [None if (sem := results[key].sem) is None else 100 * sem for key in sets]
        row = [name, *map(_score, scores, sems)]
        if several:
            known = None if None in sems else sqrt(sum(sem**2 for sem in sems if sem)) / len(sems)
            row.append(_score(float(np.mean(scores)), known))
        rows.append(row)
    header = ["model", *map(title, sets), *["average"] * several]
    shapes = {results[key].correct_PN.shape for results in models.values() for key in sets}
    samples = " or ".join(str(n) for n in sorted({shape[1] for shape in shapes}))
    spread = "" if samples == "1" else " ± SEM over the samplings"
    note = f"pass@1 in percent{spread}, of {samples} sample{'s' * (samples != '1')} a problem."
    note += _measured_unlike(models, sets)
    if published and not set(sets) & set(SETS):
        note += " The paper's rows are left out: it published nothing on these problems."
    elif published:
        places = [SETS.index(key) if key in SETS else None for key in sets]
        full = set(sets) == set(SETS)
        for paper in PUBLISHED:
            errors = paper.sem or (None,) * len(SETS)
            cells = ["-" if i is None else _score(paper.pass_at_1[i], errors[i]) for i in places]
            cells += [_score(*paper.average) if full else "-"] * several
            rows.append([f"[published, {paper.source}] {paper.model}", *cells])
        note += (
            " Published rows are the paper's own figures (arXiv 2505.24850v1: 16 samples, rllm's "
            "grader, rows of Table 2 at their best checkpoint); nothing here has checked them."
        )
    return Table(header, rows, note)


def paired_table(models: Results, baseline: str) -> Table | None:
    """Each model against `baseline`, benchmark by benchmark; None if it is the only model.

    Raises RediError for a baseline that is not among the models, or other problems.
    """
    if baseline not in models:
        raise RediError(f"baseline {baseline!r} is none of the models {', '.join(models)}")
    rows = []
    for key in shared(models):
        for name, results in models.items():
            if name == baseline:
                continue
            a, b = results[key], models[baseline][key]
            own = bootstrap(a.correct_PN.mean(axis=1))
            test = sign_test(a, b)
            rows.append(
                [
                    f"{title(key)}: {name}",
                    f"{100 * a.pass_at_1:.1f} [{100 * own.low:.1f}, {100 * own.high:.1f}]",
                    format_interval(paired_difference(a, b), 100, "5.1f"),
                    f"{test.better} / {test.equal} / {test.worse}",
                    f"{test.p:.2g}",
                ]
            )
    header = ["model", "pass@1 [95% CI]", f"vs {baseline} [95% CI]", "better / equal / worse", "p"]
    note = (
        "CI: bootstrap over problems, paired for the difference. Better, worse: problems on which "
        "more or fewer samples are right; p: exact sign test on them, two-sided, not corrected "
        "for the number of rows. None of it says anything about training with other seeds."
    )
    return Table(header, rows, note) if rows else None


def benchmark_table(results: Mapping[str, EvalResult]) -> Table:
    """One model: a row for each benchmark."""
    by_shape: dict[int, dict[str, EvalResult]] = {}
    for key, result in results.items():
        by_shape.setdefault(result.correct_PN.shape[1], {})[title(key)] = result
    (num_samples, same), *others = by_shape.items()
    assert not others, "benchmarks of one evaluation have equally many samples"
    table = model_table(same)
    counts = ", ".join(f"{name} {len(result.problem_ids):,}" for name, result in same.items())
    note = (
        f"Problems: {counts}; {num_samples} samples each; in percent."
        + table.note.partition("in percent.")[2]
    )
    return Table(["benchmark", *table.header[1:]], table.rows, note)


def _measured_unlike(models: Results, sets: Sequence[str]) -> str:
    """A warning that names each setting by which models of a benchmark were measured unlike."""
    unlike: dict[str, dict[str, Any]] = {}
    for key in sets:
        known = {name: results[key].settings for name, results in models.items()}
        known = {name: settings for name, settings in known.items() if settings}
        for setting in SETTINGS:
            values = {name: settings[setting] for name, settings in known.items()}
            if len(set(values.values())) > 1:
                unlike[setting] = values
    said = [
        f"{setting} ({', '.join(f'{name}: {str(value)[:40]}' for name, value in values.items())})"
        for setting, values in unlike.items()
    ]
    return f" NOT MEASURED ALIKE: {'; '.join(said)}." if said else ""


def _score(percent: float, sem: float | None) -> str:
    return f"{percent:.1f}" + ("" if sem is None else f" ± {sem:.1f}")
