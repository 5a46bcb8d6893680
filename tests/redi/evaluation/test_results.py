"""Statistics against values worked out by hand or by enumeration."""

from itertools import combinations

import numpy as np
import pytest

from redi.errors import RediError
from redi.evaluation.results import (
    EvalResult,
    PairScores,
    bootstrap,
    load_result,
    paired_difference,
)


def make_result(correct, *, finished=None, model="m", ids=None, pairs=None) -> EvalResult:
    correct = np.array(correct, dtype=bool)
    return EvalResult(
        model=model,
        problem_ids=tuple(ids or (f"p{i}" for i in range(len(correct)))),
        verdict_PN=np.where(correct, "correct", "wrong"),
        finished_PN=np.ones_like(correct) if finished is None else np.array(finished, dtype=bool),
        num_tokens_PN=np.full(correct.shape, 10),
        pairs=pairs,
    )


def test_pass_at_1_and_the_papers_sem():
    result = make_result([[1, 0, 1, 1], [0, 0, 1, 0], [1, 1, 1, 0]])
    # accuracies of the four samplings over the benchmark: 2/3, 1/3, 1, 1/3
    accuracies = [2 / 3, 1 / 3, 1, 1 / 3]
    mean = sum(accuracies) / 4
    assert result.pass_at_1 == pytest.approx(mean) == pytest.approx(7 / 12)
    deviation = (sum((a - mean) ** 2 for a in accuracies) / 4) ** 0.5
    assert result.sem == pytest.approx(deviation / 2)
    assert make_result([[1], [0]]).sem is None


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(k):
    rows = [[1, 0, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 0]]
    subsets = [any(subset) for row in rows for subset in combinations(row, k)]
    assert make_result(rows).pass_at(k) == pytest.approx(np.mean(subsets))


def test_pass_at_more_than_the_samples_is_refused():
    with pytest.raises(ValueError, match="pass@3"):
        make_result([[1, 0]]).pass_at(3)


def test_an_unfinished_correct_answer_is_wrong():
    result = make_result([[1, 1], [1, 0]], finished=[[1, 0], [1, 1]])
    assert result.pass_at_1 == 0.5
    assert result.metrics()["unfinished"] == 0.25


def test_metrics_report_powers_of_two_and_every_verdict():
    verdicts = np.array([["correct", "timeout", "unparsable", "wrong", "wrong"]])
    result = EvalResult("m", ("a",), verdicts, np.ones((1, 5), bool), np.array([[1, 2, 3, 4, 5]]))
    metrics = result.metrics()
    assert [key for key in metrics if key.startswith("pass@")] == [
        "pass@1_sem", "pass@1", "pass@2", "pass@4",
    ]  # fmt: skip
    assert metrics["verdicts"] == {"correct": 1, "wrong": 2, "unparsable": 1, "timeout": 1}
    assert metrics["mean_tokens"] == 3


def test_paired_difference_is_exact_in_the_mean_and_seeded():
    rng = np.random.default_rng(0)
    a, b = (make_result(rng.random((50, 4)) < p) for p in (0.6, 0.4))
    difference = paired_difference(a, b)
    assert difference.mean == pytest.approx(a.pass_at_1 - b.pass_at_1)
    assert difference.low < difference.mean < difference.high
    assert paired_difference(a, b) == difference
    assert paired_difference(a, b, seed=1) != difference
    opposite = paired_difference(b, a)
    assert (opposite.low, opposite.high) == pytest.approx((-difference.high, -difference.low))


def test_pairing_removes_what_problems_share():
    """Two models that differ by a constant have no uncertainty in their difference."""
    hard = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0]] * 20)
    easier = hard.copy()
    easier[:, -1] = 1  # one more right answer for every problem
    interval = paired_difference(make_result(easier), make_result(hard))
    assert (interval.mean, interval.low, interval.high) == pytest.approx((0.25, 0.25, 0.25))


def test_intervals_cover_the_truth_about_95_times_in_100():
    """400 experiments with a known difference; binomial noise of the count is about 4.4."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        difficulty = rng.random((120, 1))
        a = rng.random((120, 4)) < 0.8 * difficulty + 0.2  # mean .6
        b = rng.random((120, 4)) < 0.8 * difficulty  # mean .4
        values = a.mean(axis=1) - b.mean(axis=1)
        interval = bootstrap(values, num_resamples=500)
        covered += interval.low <= 0.2 <= interval.high
    assert 0.92 <= covered / 400 <= 0.98


def test_bootstrap_of_many_values_in_chunks_agrees_with_the_normal_interval():
    values = np.random.default_rng(2).normal(3.0, 1.0, 5000)
    interval = bootstrap(values)
    half = 1.96 * values.std() / 5000**0.5
    assert interval.low == pytest.approx(values.mean() - half, abs=half / 10)
    assert interval.high == pytest.approx(values.mean() + half, abs=half / 10)


def test_different_problems_cannot_be_compared():
    a = make_result([[1], [0]], model="runs/a", ids=["x", "y"])
    b = make_result([[1], [0]], model="runs/b", ids=["x", "z"])
    with pytest.raises(RediError, match=r"runs/a and runs/b .*different problems.*difference: y"):
        paired_difference(a, b)


def test_difference_of_gaps_pairs_the_pairs():
    chosen, rejected = np.array([-1.0, -2.0, -3.0]), np.array([-2.0, -2.5, -2.0])
    before = make_result([[1]], pairs=PairScores(("a", "b", "c"), chosen, rejected))
    after = make_result([[1]], pairs=PairScores(("a", "b", "c"), chosen, rejected - 0.5))
    assert before.metrics()["pairs"]["gap"] == pytest.approx((1 + 0.5 - 1) / 3)
    assert before.metrics()["pairs"]["chosen_above_rejected"] == pytest.approx(2 / 3)
    difference = paired_difference(after, before, "gap")
    assert (difference.mean, difference.low, difference.high) == pytest.approx((0.5, 0.5, 0.5))
    with pytest.raises(RediError, match="pairs_name"):
        paired_difference(after, make_result([[1]]), "gap")


def test_a_folder_without_an_evaluation_is_named(tmp_path):
    with pytest.raises(RediError, match=f"{tmp_path}.*no finished evaluation"):
        load_result(tmp_path)
