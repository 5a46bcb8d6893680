"""Made-up results and metrics, for tables and pictures."""

import numpy as np

from redi.results import EvalResult, PairScores


def make_result(correct, *, unparsable=0, pairs=None, model="m") -> EvalResult:
    correct = np.array(correct, dtype=bool)
    verdict = np.where(correct, "correct", "wrong").astype(object)
    verdict[~correct] = ["unparsable"] * unparsable + ["wrong"] * ((~correct).sum() - unparsable)
    return EvalResult(
        model, tuple(map(str, range(len(correct)))), verdict, np.ones_like(correct),
        np.full(correct.shape, 12), pairs,
    )  # fmt: skip


def pair_scores(gap: float) -> PairScores:
    return PairScores(("a", "b"), np.array([-0.5, -1.0]), np.array([-0.5, -1.0]) - gap)


def metrics_rows(steps=60, *, rejected=True, collapse=False):
    rng = np.random.default_rng(0)
    rows = []
    for step in range(1, steps + 1):
        fall = 10 * step / steps if collapse else 0
        row = {"step": step, "loss": rng.normal(), "grad_norm": 1 + rng.random()}
        row["logps/chosen"] = -0.3 - 0.1 * rng.random() - fall
        if rejected:
            row["logps/rejected"] = -0.9 - 0.1 * rng.random() - fall
        rows.append(row)
    return rows
