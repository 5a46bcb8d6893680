"""Made-up results and metrics, for tables, pictures and pages."""

import json

import numpy as np

from redi.evaluation.results import EvalResult, PairScores, load_result


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


def write_eval(folder, correct, *, text="so ####1", dataset=None):
    """A finished evaluation: `correct` has a row a problem, a column a sample."""
    folder.mkdir(parents=True)
    with (folder / "generations.jsonl").open("w") as file:
        for problem, samples in enumerate(correct):
            for sample, right in enumerate(samples):
                row = {"problem": problem, "id": f"id-{problem}", "sample": sample, "text": text}
                row |= {"verdict": "correct" if right else "wrong", "finished": True}
                file.write(json.dumps(row | {"num_tokens": 7}) + "\n")
    config = {"config": {"dataset_name": str(dataset)}} if dataset else {}
    (folder / "evaluation.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps({"model": folder.name}))
    metrics = load_result(folder).metrics()
    (folder / "metrics.json").write_text(json.dumps(metrics))


def write_stage(folder, rows, *, done=True, dropped=0):
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if done:
        result = {"steps": len(rows), "num_examples": 90, "num_dropped": dropped}
        (folder / "train_result.json").write_text(json.dumps(result))
