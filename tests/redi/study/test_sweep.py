"""`redi study`: a tiny one end to end and taken up again, its choice of rates, its report."""

import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file

from redi.config import StudyConfig
from redi.data.read import read_rows
from redi.errors import RediError
from redi.evaluation.results import t_interval
from redi.recipe import load_config, make_config
from redi.study.summary import Report
from redi.study.sweep import Study, half_decade, study

ARMS = {
    "control": {"settings": {"alpha": 0.0}, "learning_rates": [1e-4, 1e-3]},
    "own": {"own": ["rejected"], "learning_rates": [1e-4, 1e-3]},
}


def write(folder: Path) -> None:
    recipe = {
        "name": "tiny",
        "output_dir": str(folder / "unused"),
        "task": {"num_problems": 40, "num_pretrain": 80, "num_validation": 10, "num_test": 12},
        "defaults": {"train_batch_size": 16, "max_length": 256},
        "pretrain": {
            "tokenizer_name_or_path": "{task}/tokenizer",
            "architecture": tiny.architecture(vocab_size=32, num_hidden_layers=1),
            "learning_rate": 3e-3,
        },
        "sft": {"learning_rate": 1e-3},
        "arms": {"not used": {"alpha": 0.3}},
        "eval": {
            "dataset_name": "{task}/test.jsonl",
            "num_samples": 2,
            "max_new_tokens": 24,
            "batch_size": 64,
            "num_workers": 1,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def settings(folder: Path, **changes) -> dict:
    return {
        "output_dir": str(folder / "runs"),
        "results": str(folder / "study" / "results.json"),
        "tasks": {"tiny": str(folder / "recipe.yaml")},
        "arms": ARMS,
        "seeds": [1],
        "max_extensions": 0,
        "followed": ["own"],  # at 1e-4 it scores, at 1e-3 it does not
        "num_points": 2,
    } | changes


def config(folder: Path, **changes) -> StudyConfig:
    return make_config(StudyConfig, settings(folder, **changes), "study")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    write(folder)
    study(config(folder))
    return folder


def cells(folder: Path) -> list[dict]:
    return json.loads((folder / "study" / "results.json").read_text())


def test_every_cell_once_on_its_split(done):
    keys = [(c["arm"], c["rate"], c["seed"], c["split"]) for c in cells(done)]
    assert len(set(keys)) == len(keys) == 8
    assert {k for k in keys if k[2] == 0} == {
        ("sft", None, 0, "validation"),
        *((arm, rate, 0, "validation") for arm in ARMS for rate in (1e-4, 1e-3)),
    }
    assert sorted(k[0] for k in keys if k[2:] == (1, "test")) == ["control", "own", "sft"]
    # Arms of a seed start from one model; another seed's is another.
    assert len({(c["seed"], c["start"]) for c in cells(done)}) == 2
    steps = {c["curve"]["step"][-1] for c in cells(done) if "curve" in c}
    assert len(steps) == 1  # equal compute, whatever rows an arm lacks


def test_accuracy_on_the_way(done):
    """At the best and at the highest rate of the sweep; it starts as SFT and ends as its cell."""
    (sft,) = (c for c in cells(done) if c["arm"] == "sft" and c["seed"] == 0)
    followed = [c for c in cells(done) if "accuracy_curve" in c]
    swept = [c for c in cells(done) if c["arm"] == "own" and c["seed"] == 0]
    best = max(swept, key=lambda c: c["pass@1"])["rate"]
    assert {c["rate"] for c in followed} == {best, 1e-3}
    for cell in followed:
        assert (cell["arm"], cell["split"]) == ("own", "validation")
        curve, last = cell["accuracy_curve"], cell["curve"]["step"][-1]
        assert curve["step"] == [0, round(last / 2), last]
        for name in ("pass@1", "error"):
            assert (curve[name][0], curve[name][-1]) == (sft[name], cell[name])
        snapshots = done / "runs" / "tiny" / "seed-0" / f"own-{cell['rate']:g}-followed"
        middle, end = (
            load_file(snapshots / f"step-{step}" / "model.safetensors")
            for step in curve["step"][1:]
        )
        exported = load_file(snapshots / "model.safetensors")
        assert all(torch.equal(end[name], tensor) for name, tensor in exported.items())
        assert any(not torch.equal(middle[name], tensor) for name, tensor in exported.items())


def test_own_samples_replace_the_wrong_traces_only(done):
    folder = done / "runs" / "tiny" / "seed-0"
    teacher = {row["id"]: row for _, row in read_rows(folder / "data" / "pairs.parquet")}
    rows = [json.loads(line) for line in (folder / "own-rejected.jsonl").open()]
    samples = [json.loads(x) for x in (folder / "own-samples" / "generations.jsonl").open()]
    wrong = {(s["id"], s["text"]) for s in samples if s["finished"] and s["verdict"] == "wrong"}
    assert len(rows) == len(teacher) and any("rejected" in row for row in rows)
    for row in rows:
        assert row["chosen"] == teacher[row["id"]]["chosen"]
        if "rejected" in row:
            assert (row["id"], row["rejected"][0]["content"]) in wrong


@pytest.mark.slow
def test_goes_on_from_the_results_alone(done, tmp_path, monkeypatch):
    """A later session has the JSON without the models; the start is made again, with the same bits,
    and only what is missing is trained."""
    shutil.copytree(done / "study", tmp_path / "study")
    write(tmp_path)
    file, before = tmp_path / "study" / "results.json", cells(done)
    lost = next(c for c in before if c["arm"] == "own" and c["seed"] == 1)
    file.write_text(json.dumps([c for c in before if c != lost]))
    trained = []
    train = Study._train
    monkeypatch.setattr(Study, "_train", lambda *a: trained.append(a[2:4]) or train(*a))
    study(config(tmp_path))
    assert trained == [("own", lost["rate"])]
    assert sorted(map(json.dumps, cells(tmp_path))) == sorted(map(json.dumps, before))


def test_cells_of_another_start_are_made_anew(done, tmp_path, monkeypatch):
    """Other rounding gives another SFT model: the seed's arms would no longer be paired."""
    shutil.copytree(done, tmp_path / "s")
    write(tmp_path / "s")
    before = cells(done)
    old = [{**c, "start": "old", "pass@1": 2.0} if c["seed"] == 1 else c for c in before]
    (tmp_path / "s" / "study" / "results.json").write_text(json.dumps(old[:-1]))
    study(config(tmp_path / "s"))
    assert sorted(map(json.dumps, cells(tmp_path / "s"))) == sorted(map(json.dumps, before))


def test_other_settings_are_refused_by_name(done, tmp_path):
    shutil.copytree(done / "study", tmp_path / "study")
    write(tmp_path)
    arms = ARMS | {"control": ARMS["control"] | {"settings": {"alpha": 0.1}}}
    with pytest.raises(RediError, match=r"'arm': 'control'.*made with other settings"):
        study(config(tmp_path, arms=arms))


@pytest.mark.parametrize(
    ("peak", "tried", "best"),
    [
        (1e-4, [1e-5, 3e-5, 1e-4, 3e-4], 1e-4),  # inside: the grid is enough
        (1e-3, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], 1e-3),  # one more on its far side
        (1e-6, [1e-6, 3e-6, 1e-5, 3e-5, 1e-4, 3e-4], 1e-6),  # no more than two extensions
        (1e-1, [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3], 3e-3),
    ],
)
def test_a_best_rate_at_the_edge_extends_the_grid(tmp_path, monkeypatch, peak, tried, best):
    from math import log10

    seen = set()

    def cell(self, task, arm, rate, seed):
        if rate is not None:
            seen.add(rate)
            return {"pass@1": -abs(log10(rate / peak))}
        return {}

    monkeypatch.setattr(Study, "cell", cell)
    write(tmp_path)
    arms = {"control": {"learning_rates": [1e-5, 3e-5, 1e-4, 3e-4]}}
    job = Study(config(tmp_path, arms=arms, max_extensions=2, followed=[]))
    assert job.best_rate("tiny", "control") == best
    assert sorted(seen) == tried


def test_half_decades():
    assert [half_decade(x, up=True) for x in (1e-5, 3e-5, 0.3)] == [3e-5, 1e-4, 1.0]
    assert [half_decade(x, up=False) for x in (1e-4, 3e-4, 1.0)] == [3e-5, 1e-4, 0.3]
    assert [half_decade(2e-5, up=up) for up in (False, True)] == [1e-5, 3e-5]


def test_report_from_made_up_cells(tmp_path):
    """Differences are taken within a seed, so what seeds have in common falls out."""
    made = []
    for arm, gain in (("sft", 0.0), ("control", 0.0), ("own", 0.10)):
        for seed, level in ((0, 0.4), (1, 0.3), (2, 0.5), (3, 0.7)):
            split = "test" if seed else "validation"
            for rate in [None] if arm == "sft" else [1e-4] if seed else [1e-4, 1e-3]:
                score = level + gain - 0.05 * (rate == 1e-3)
                curve = {"step": [1, 2], "grad_norm": [1.0, 2.0], "learning_rate": [1e-4, 1e-4]}
                curve |= {"logps/chosen": [-0.1, -0.2], "logps/rejected": [-1.0, -2.0]}
                way = {"step": [0, 1, 2], "pass@1": [level, 0.0, score], "error": [0.01] * 3}
                key = {"task": "tiny", "arm": arm, "rate": rate, "seed": seed, "split": split}
                made.append({**key, "pass@1": score, "error": 0.01, "tokens": 9.0, "curve": curve})
                if arm == "own":
                    made[-1]["accuracy_curve"] = way
    table = Report(config(tmp_path), made).over_seeds("tiny")
    rows = {row[0]: row for row in table.rows}
    half = t_interval([30, 50, 70]).high - 50
    assert rows["control"][:5] == ["control", "0.0001", "3", f"50.0 ± {half:.1f}", ""]
    assert rows["own"][4] == "+10.0 ± 0.0"
    report = Report(config(tmp_path, followed=["own"]), made)
    accuracy, *others = report.step_panels("tiny", ["own"])
    assert len(others) == 3 and list(others[0].lines) == [
        "control, best rate", "own, best rate", "own, highest rate"
    ]  # fmt: skip
    assert set(accuracy.lines) == {"own, best rate", "own, highest rate"}
    x, y, low, high = accuracy.lines["own, highest rate"]
    assert (x, y) == ([0, 1, 2], pytest.approx([40, 0, 45]))
    assert (low[2], high[2]) == (pytest.approx(45 - 1.96), pytest.approx(45 + 1.96))
    # A test cell at a rate that is no longer the best does not count.
    old = {**made[-1], "rate": 1e-3, "pass@1": 0.0}
    assert Report(config(tmp_path), [*made, old]).over_seeds("tiny").rows == table.rows
    text = Report(config(tmp_path), made).write(tmp_path).read_text()
    assert "| own     | **50.0** |  45.0 |" in text
    assert "minus control" in text
    for picture in ("rates.png", "alpha.png", "steps.png"):
        assert (tmp_path / picture).stat().st_size > 10_000


def test_report_without_results_says_so(tmp_path):
    write(tmp_path)
    with pytest.raises(RediError, match="no results yet"):
        study(config(tmp_path), report_only=True)


def test_the_recipe_in_the_repository_is_whole():
    loaded = load_config(StudyConfig, "recipes/study.yaml", {})
    assert len(Study(loaded).recipes) == len(loaded.tasks)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"baseline": "nobody"}, "none of the arms"),
        ({"seeds": [0, 1]}, "cannot test them too"),
        ({"followed": ["control", "nobody"]}, "'nobody' is none of the arms"),
    ],
)
def test_bad_recipes(tmp_path, changes, match):
    with pytest.raises(RediError, match=match):
        config(tmp_path, **changes)
