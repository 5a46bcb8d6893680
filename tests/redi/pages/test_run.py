"""The page of a run: its figures are those of the files, whatever these hold."""

import json

import pytest
import yaml
from html_page import HOSTILE, Page
from made_up import metrics_rows, write_eval, write_stage

from redi.errors import RediError
from redi.evaluation.results import bootstrap, load_result
from redi.pages.charts import POINTS
from redi.pages.run import clock, colours_of, write_run_page
from redi.training.logging import PARTS


@pytest.fixture
def root(tmp_path):
    """Two arms and SFT, evaluated, with all that a page may have to warn of."""
    root = tmp_path / "run"
    tests = tmp_path / "test.jsonl"
    rows = [{"id": f"id-{i}", "problem": f"{HOSTILE[0]} {i}?", "answer": "1"} for i in range(20)]
    tests.write_text("".join(json.dumps(row) + "\n" for row in rows))
    timed = [
        row | {f"time/{part}": 0.5 for part in PARTS} | {"tokens_per_second": 10.0, "step": 2 * i}
        for i, row in enumerate(metrics_rows(30), 1)
    ]
    timed[11]["alarms"], timed[-1]["skipped_steps"] = 1, 3
    write_stage(root / "sft", metrics_rows(30, rejected=False))
    write_stage(root / "control", timed, dropped=10)
    write_stage(root / "redi", metrics_rows(40, collapse=True), done=False)
    write_eval(root / "eval" / "sft", [[1, 0], [0, 0]] * 10, dataset=tests)
    write_eval(root / "eval" / "control", [[1, 0], [0, 1]] * 10, dataset=tests)
    write_eval(root / "eval" / "redi", [[1, 1], [1, 1]] * 10, text=HOSTILE[1], dataset=tests)
    recipe = {"name": "tiny", "baseline": "control", "arms": {"redi": {}, "control": {}}}
    (root / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    return root


def test_figures_are_those_of_metrics_json(root):
    page = Page(write_run_page(root))
    rows = page.table("model", "pass@1 ± SEM")
    assert [row["model"] for row in rows] == ["sft", "redi", "control"]  # the recipe's order
    for row in rows:
        metrics = json.loads((root / "eval" / row["model"] / "metrics.json").read_text())
        score, sem = 100 * metrics["pass@1"], 100 * metrics["pass@1_sem"]
        assert row["pass@1 ± SEM"] == f"{score:.1f} ± {sem:.1f}"
        assert row["pass@2"] == f"{100 * metrics['pass@2']:.1f}"
        interval = bootstrap(
            100 * load_result(root / "eval" / row["model"]).correct_PN.mean(axis=1)
        )
        assert f"--x:{score:.2f}%" in page.source  # its bar
        assert f"{score:.1f} [{interval.low:.1f}, {interval.high:.1f}]" in page.text
    assert rows[2]["vs control [95% CI]"] == "baseline"
    lede = " ".join(page.text.split())
    assert "Highest pass@1: redi, 100.0 ± 0.0 percent; against control +50.0 [" in lede


def test_training_table_and_curves(root):
    page = Page(write_run_page(root))
    table = {row["stage"]: row for row in page.table("stage", "steps")}
    for name, row in table.items():
        last = json.loads((root / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert row["loss"] == f"{last['loss']:.3f}"
        assert row["chosen"] == f"{last['logps/chosen']:.3f}"
    assert table["redi"]["steps"] == "40 so far" and table["control"]["steps"] == "60"
    # raw and smoothed: two arms on four panels, SFT on three
    assert len(page.paths) == 2 * (2 * 4 + 3)


def test_what_fast_mode_left_out_is_shown(root):
    fast = {"fast/active": 0.05, "fast/dropped": 0.002, "fast/error": 0.004}
    assert "d(logits) computed" not in Page(write_run_page(root)).text
    write_stage(root / "quick", [row | fast for row in metrics_rows(30)])
    rows = Page(write_run_page(root)).table("stage", "d(logits) computed")
    shown = {row["stage"]: [row[k] for k in ("d(logits) computed", "left out", "error of dX")]
             for row in rows}  # fmt: skip
    assert shown["quick"] == ["0.05", "0.002", "0.004"] and shown["sft"] == ["", "", ""]


def test_warnings_name_stage_and_step(root):
    page = Page(write_run_page(root))
    assert "control: the collapse guard raised its first alarm at step 24." in page.text
    assert "control: 3 steps skipped" in page.text
    assert "control: 10 of 100 examples dropped" in page.text
    assert "redi: not finished; step 40 is the last one here" in page.text
    assert "sft:" not in page.text.split("Models")[0]


def test_the_guards_words_are_those_of_the_last_checkpoint(root):
    for step, words in ((6, "old"), (20, "chosen was 1 and is 9")):
        folder = root / "control" / f"checkpoint-{step}"
        folder.mkdir()
        guard = {"logps/chosen": {"alarm": words}, "entropy": {"alarm": ""}}
        (folder / "trainer_state.json").write_text(json.dumps({"guard": guard}))
    assert "at step 24: chosen was 1 and is 9." in Page(write_run_page(root)).text


def test_time_is_counted_over_all_steps(root):
    """A row has the mean seconds of a step since the row before, here every second step."""
    page = Page(write_run_page(root))
    seconds = 0.5 * len(PARTS) * 60
    assert clock(seconds) in page.text
    assert page.source.count(f"--x:{100 / len(PARTS):.2f}%") == len(PARTS)
    assert clock(3725) == "1 h 02 min" and clock(59.6) == "1 min 00 s"


def test_samples_are_where_models_differ_and_escaped(root):
    page = Page(write_run_page(root))
    samples = [t for t in page.tables if t[0] == ["model", "first sample", "verdict", "right"]]
    assert len(samples) == 6
    # even problems: 50 (sft), 100, 50; odd ones: 0, 100, 50, and these differ more
    assert [row[3] for row in samples[0][1:]] == ["0%", "100%", "50%"]
    assert [row[3] for row in samples[5][1:]] == ["0%", "100%", "50%"]
    assert samples[0][2][1] == HOSTILE[1]
    assert f"{HOSTILE[0]} 1?" in page.text  # the question


def test_without_the_dataset_problems_are_named_by_id(root):
    (root.parent / "test.jsonl").unlink()
    assert "id-1" in Page(write_run_page(root)).text
    moved = root / "task"
    moved.mkdir()
    rows = [{"id": f"id-{i}", "problem": f"moved {i}", "answer": "1"} for i in range(20)]
    (moved / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "moved 1" in Page(write_run_page(root)).text


@pytest.mark.parametrize("name", [HOSTILE[2], HOSTILE[3], HOSTILE[6]])
def test_hostile_names(tmp_path, name):
    root = tmp_path / name.replace("/", "_")
    write_stage(root / name.replace("/", "_"), metrics_rows(3))
    (root / "recipe.yaml").write_text(yaml.safe_dump({"name": name, "arms": {}}))
    report = {"counts": {name: 3}, "dropped_rows": {}, "dropped_traces": {}}
    report["dropped_traces"][name] = {"count": 1, "first": name}
    (root / "data").mkdir()
    (root / "data" / "report.json").write_text(json.dumps(report))
    Page(write_run_page(root))


def test_megabytes_stay_a_small_page(tmp_path):
    root = tmp_path / "run"
    write_stage(root / "sft", metrics_rows(20_000))
    write_eval(root / "eval" / "sft", [[1], [0]] * 5, text="<" * 1_000_000)
    write_eval(root / "eval" / "redi", [[0], [0]] * 5, text="\ud800" * 1_000_000)
    page = Page(write_run_page(root))
    assert len(page.source) < 1_000_000
    assert "characters left out" in page.text
    assert f"at most {POINTS} points" in page.text
    assert all(path.count("L") < POINTS for _, path in page.paths)


def test_one_stage_alone_and_none(tmp_path):
    write_stage(tmp_path / "stage", metrics_rows(3))
    page = Page(write_run_page(tmp_path / "stage", tmp_path / "out" / "page.html"))
    assert "No model has been evaluated yet" in page.text
    assert [row["stage"] for row in page.table("stage", "steps")] == ["stage"]
    with pytest.raises(RediError, match="no run"):
        write_run_page(tmp_path / "nothing")


def test_a_model_keeps_its_colour():
    colours = colours_of(["sft", *"abcdefgh"])
    assert colours["sft"] == 6
    arms = [colours[name] for name in "abcdefgh"]
    assert len(set(arms)) == 8 and 6 not in arms
