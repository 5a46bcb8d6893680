"""Models side by side: what the tables say, and that published rows cannot be taken for ours."""

import json

import numpy as np
import pytest

from redi.errors import RediError
from redi.evaluation.compare import benchmark_table, load_models, paired_table, score_table
from redi.evaluation.results import EvalResult, sign_test


def result(correct_PN, *, ids=None, groups=None):
    correct_PN = np.asarray(correct_PN, bool)
    verdicts = np.where(correct_PN, "correct", "wrong")
    ids = tuple(ids or (f"p{i}" for i in range(len(correct_PN))))
    ones = np.ones(correct_PN.shape)
    return EvalResult("m", ids, verdicts, ones.astype(bool), ones.astype(int), None, groups)


def save(folder, correct_PN):
    folder.mkdir(parents=True)
    rows = [
        {"problem": p, "id": f"p{p}", "sample": n, "text": "", "finished": True, "num_tokens": 1,
         "verdict": "correct" if right else "wrong"}
        for p, row in enumerate(correct_PN) for n, right in enumerate(row)
    ]  # fmt: skip
    (folder / "generations.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "metrics.json").write_text('{"model": "m"}')


A = [[1, 1], [1, 0], [0, 0], [1, 1]]
B = [[1, 0], [0, 0], [0, 0], [1, 1]]


def binomial_p(n, k):
    from math import factorial as f

    return min(1, sum(f(n) / f(i) / f(n - i) for i in range(k + 1)) * 2 / 2**n)


@pytest.mark.parametrize(("better", "worse"), [(0, 0), (1, 0), (9, 1), (1, 9), (5, 5), (30, 12)])
def test_the_sign_test_is_exact(better, worse):
    a = [[1]] * better + [[0]] * worse + [[1]] * 3
    b = [[0]] * better + [[1]] * worse + [[1]] * 3
    test = sign_test(result(a), result(b))
    assert (test.better, test.worse, test.equal) == (better, worse, 3)
    assert test.p == pytest.approx(binomial_p(better + worse, min(better, worse)))


def test_the_sign_test_counts_samples_and_rejects_rightly_often_enough():
    assert sign_test(result(A), result(B)).better == 2
    rng = np.random.default_rng(0)
    ps = []
    for _ in range(300):
        chance = rng.random((60, 1))
        ps.append(sign_test(*(result(rng.random((60, 4)) < chance) for _ in "ab")).p)
    assert np.mean(np.array(ps) < 0.05) < 0.05 + 2 * (0.05 * 0.95 / 300) ** 0.5
    better = [[1]] * 60 + [[0]] * 40
    assert sign_test(result(better), result([[1]] * 40 + [[0]] * 60)).p < 1e-4


def test_other_problems_cannot_be_tested():
    with pytest.raises(RediError, match="different problems"):
        sign_test(result(A), result(A, ids="abcd"))


def test_majority_votes_of_fewer_samples_use_each_sample_once():
    groups = np.array([[0, 1, 1, 0, 0], [2, 2, 0, 0, 0]])
    r = result(groups == 0, groups=groups)
    assert r.majority_at(1) == pytest.approx((3 + 3) / 10)
    assert r.majority_at(2) == pytest.approx((0.5 + 0.5 + 0 + 1) / 4)  # the fifth votes nowhere
    assert r.majority_at(5) == 1
    with pytest.raises(ValueError, match="majority@6"):
        r.majority_at(6)
    assert result(A).majority_at(2) is None


def test_one_dataset(tmp_path):
    save(tmp_path / "a", A)
    save(tmp_path / "b", B)
    models = load_models([tmp_path / "a", tmp_path / "b"])
    table = score_table(models)
    assert table.header == ["model", "dataset"]
    assert [row[:2] for row in table.rows] == [["a", "62.5 ± 8.8"], ["b", "37.5 ± 8.8"]]
    tests = paired_table(models, "b")
    assert len(tests.rows) == 1
    assert tests.rows[0][0] == "dataset: a"
    assert tests.rows[0][2].startswith("+25.0 [")
    assert tests.rows[0][3:] == ["2 / 2 / 0", "0.5"]
    assert paired_table({"a": models["a"]}, "a") is None
    with pytest.raises(RediError, match="none of the models"):
        paired_table(models, "c")


def test_several_benchmarks_their_average_and_the_papers_rows(tmp_path):
    for model, other in (("a", A), ("b", B)):
        save(tmp_path / model / "aime24", other)
        save(tmp_path / model / "math500", A)
    save(tmp_path / "a" / "gsm8k", A)  # b has not
    models = load_models([tmp_path / "a", tmp_path / "b"])
    table = score_table(models, published=True)
    assert table.header == ["model", "MATH-500", "AIME24", "average"]
    assert table.rows[1] == ["b", "62.5 ± 8.8", "37.5 ± 8.8", "50.0 ± 6.2"]
    ours, papers = table.rows[:2], table.rows[2:]
    assert not any("published" in row[0] for row in ours)
    assert len(papers) == 10 and all(row[0].startswith("[published, ") for row in papers)
    redi = next(row for row in papers if row[0].endswith("Qwen-REDI-1.5B"))
    assert redi[1:] == ["83.1 ± 0.3", "28.1 ± 1.1", "-"]  # its average is over other benchmarks
    assert "nothing here has checked them" in table.note
    table = score_table({name: {"gsm8k": models[name]["aime24"]} for name in models}, True)
    assert len(table.rows) == 2 and "published nothing on these problems" in table.note
    assert {row[0] for row in paired_table(models, "a").rows} == {"MATH-500: b", "AIME24: b"}
    rows = benchmark_table(models["a"]).rows
    assert sorted(row[0] for row in rows) == ["AIME24", "GSM8K", "MATH-500"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    save(tmp_path / "a" / "aime24", A)
    save(tmp_path / "b" / "math500", A)
    with pytest.raises(RediError, match=r"nothing in common \(a: AIME24; b: MATH-500\)"):
        load_models([tmp_path / "a", tmp_path / "b"])
    with pytest.raises(RediError, match="no finished evaluation"):
        load_models([tmp_path / "none"])


def test_folders_of_one_name_keep_their_path(tmp_path):
    save(tmp_path / "x" / "eval", A)
    save(tmp_path / "y" / "eval", B)
    folders = [tmp_path / "x" / "eval", tmp_path / "y" / "eval"]
    assert list(load_models(folders)) == list(map(str, folders))


def test_models_measured_unlike_are_named(tmp_path):
    rules = {"old": "1, math-verify 0.8.0", "new": "2, math-verify 0.8.0"}
    for name, heat in (("old", 0.0), ("new", 0.6)):
        save(tmp_path / name, A)
        content = {"rules": rules[name], "config": {"temperature": heat, "grader": "rllm"}}
        (tmp_path / name / "evaluation.json").write_text(json.dumps(content))
    save(tmp_path / "unknown", B)  # says nothing of itself
    folders = [tmp_path / name for name in ("old", "new", "unknown")]
    assert score_table(load_models(folders)).note.endswith(
        " NOT MEASURED ALIKE: rules (old: 1, math-verify 0.8.0, new: 2, math-verify 0.8.0); "
        "temperature (old: 0.0, new: 0.6)."
    )
    assert "ALIKE" not in score_table(load_models(folders[1:])).note
