"""Evaluation end to end on tiny models: what is written, resumed, skipped, graded and refused."""

import contextlib
import json
import shutil

import numpy as np
import pytest
import torch
from tiny import make_lm, make_tokenizer, pair_rows, write_jsonl

import redi.evaluation.evaluate
import redi.evaluation.generate
import redi.grading.verify
from redi.config import EvalConfig
from redi.data.tokenize import ChatFormat
from redi.errors import RediError
from redi.evaluation.evaluate import evaluate
from redi.evaluation.results import load_result
from redi.training.model import load_tokenizer_from

QUESTIONS = [
    {"id": f"q{i}", "problem": f"{i}+{i}" + "+0" * (i % 4), "answer": str(2 * i)} for i in range(7)
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_lm("qwen2", scale=2.0).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def config(tmp_path):
    data = write_jsonl(tmp_path / "test.jsonl", QUESTIONS)
    return EvalConfig(
        dataset_name=str(data), num_samples=3, max_new_tokens=16, batch_size=6, temperature=1.0
    )


@pytest.fixture
def no_algebra(monkeypatch):
    """Grades by a rule that needs no verifier process, for tests that are not about grading."""

    class Rule(redi.grading.verify.Verifier):
        def verify(self, texts, answers, progress=None):
            return ["correct" if len(text) % 3 else "wrong" for text in texts]

    monkeypatch.setattr(redi.grading.verify, "Verifier", Rule)


def changed(config: EvalConfig, **fields) -> EvalConfig:
    return config.model_copy(update=fields)


def read(folder, name="generations.jsonl"):
    return [json.loads(line) for line in (folder / name).open()]


def script(monkeypatch, texts, *, stop=True):
    """Makes the model answer `texts`, a list or a function of the prompt's text, then stop."""
    tokenizer = make_tokenizer()

    def fake(lm, prompts, uniform_NT, *, stop_ids, **_):
        said = [texts(tokenizer.decode(p)) for p in prompts] if callable(texts) else texts
        ids = tokenizer(said, add_special_tokens=False)["input_ids"]
        return [[*i, stop_ids[0]] if stop else i for i in ids]

    monkeypatch.setattr(redi.evaluation.generate, "generate", fake)


def test_every_sample_is_kept_and_the_metrics_follow_from_them(model, config, tmp_path):
    result = evaluate(model, config, tmp_path / "out")
    rows = read(tmp_path / "out")
    assert {(row["id"], row["sample"]) for row in rows} == {
        (question["id"], sample) for question in QUESTIONS for sample in range(3)
    }
    for row in rows:
        assert row["num_tokens"] <= 16
        assert row["finished"] or (row["num_tokens"] == 16 and row["verdict"] == "wrong")
        assert len(row["text"]) > 0 or row["num_tokens"] == 1
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert metrics["unfinished"] == pytest.approx(1 - np.mean([row["finished"] for row in rows]))
    assert metrics["mean_tokens"] == pytest.approx(np.mean([row["num_tokens"] for row in rows]))
    assert 0 < metrics["unfinished"] < 1  # or this test shows nothing
    assert result.problem_ids == tuple(question["id"] for question in QUESTIONS)
    assert load_result(tmp_path / "out").metrics() == result.metrics()


def test_grading(model, config, tmp_path, monkeypatch):
    said = {"0+0": "####0", "1+1+0": "1+1=2;####2", "2+2+0+0": "####5"}
    script(monkeypatch, lambda prompt: said.get(prompt[3:-3], "...?"))
    result = evaluate(model, config, tmp_path / "out")
    assert result.pass_at_1 == pytest.approx(2 / 7)
    assert result.metrics()["verdicts"] == {
        "correct": 6, "wrong": 3, "unparsable": 12, "timeout": 0,
    }  # fmt: skip
    texts = {row["id"]: row["text"] for row in read(tmp_path / "out")}
    assert texts["q1"] == "1+1=2;####2"  # as the model wrote it, without its stop token


def test_a_right_answer_that_was_not_ended_is_wrong(model, config, tmp_path, monkeypatch):
    config = changed(config, max_problems=1)
    script(monkeypatch, lambda prompt: "####0", stop=False)
    result = evaluate(model, config, tmp_path / "unfinished")
    assert (result.pass_at_1, result.metrics()["unfinished"]) == (0, 1)
    script(monkeypatch, lambda prompt: "####0")
    assert evaluate(model, config, tmp_path / "finished").pass_at_1 == 1


@pytest.fixture
def calls(monkeypatch):
    """Counts the batches generated; `calls.limit` kills the evaluation at the one after."""
    real = redi.evaluation.generate.generate

    class Calls:
        count, limit = 0, 1000

        def __call__(self, *args, **kwargs):
            self.count += 1
            if self.count > self.limit:
                raise KeyboardInterrupt
            return real(*args, **kwargs)

    monkeypatch.setattr(redi.evaluation.generate, "generate", Calls())
    return redi.evaluation.generate.generate


def test_killed_and_resumed_equals_uninterrupted(model, config, tmp_path, no_algebra, calls):
    evaluate(model, config, tmp_path / "whole")
    assert calls.count == 4  # 7 problems x 3 samples in batches of 6
    calls.count, calls.limit = 0, 2
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, config, tmp_path / "killed")
    assert len(read(tmp_path / "killed")) == 12
    calls.count, calls.limit = 0, 1000
    evaluate(model, config, tmp_path / "killed")
    assert calls.count == 2
    assert_same_files(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize(
    ("rows", "more_bytes", "batches_left"),
    [(0, 0, 4), (0, 7, 4), (12, 0, 2), (12, 7, 2), (15, 0, 2), (20, 0, 1), (20, 7, 1), (21, 0, 0)],
)
def test_a_write_cut_at_any_byte_is_made_up_for(
    model, config, tmp_path, no_algebra, calls, rows, more_bytes, batches_left
):
    """Half a batch is made again whole: the same batches, and so the same rounding."""
    evaluate(model, config, tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    (tmp_path / "cut" / "metrics.json").unlink()
    file = tmp_path / "cut" / "generations.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:rows]) + b"".join(lines[rows:])[:more_bytes])
    calls.count = 0
    evaluate(model, config, tmp_path / "cut")
    assert calls.count == batches_left
    assert_same_files(tmp_path / "whole", tmp_path / "cut")


def assert_same_files(a, b):
    for name in ("generations.jsonl", "metrics.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()


def test_batch_size_changes_no_sample(model, config, tmp_path, no_algebra):
    evaluate(model, config, tmp_path / "six")
    evaluate(model, changed(config, batch_size=100), tmp_path / "all")
    assert read(tmp_path / "six") == read(tmp_path / "all")


def test_seed_and_sample_index_change_samples(model, config, tmp_path, no_algebra):
    evaluate(model, config, tmp_path / "a")
    evaluate(model, changed(config, seed=1), tmp_path / "b")
    a, b = ([row["text"] for row in read(tmp_path / run)] for run in "ab")
    assert sum(x != y for x, y in zip(a, b, strict=True)) > len(a) / 2
    assert len(set(a[:3])) > 1  # three samples of one problem


def test_finished_is_only_read(model, config, tmp_path, monkeypatch, no_algebra):
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    first = evaluate(copy, config, tmp_path / "out")
    monkeypatch.setattr(redi.evaluation.evaluate, "_load", None)
    (copy / "README.md").write_text("a card")
    again = evaluate(copy, changed(config, batch_size=2, num_workers=1), tmp_path / "out")
    assert again.metrics() == first.metrics()


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"temperature": 0.5, "max_problems": 5, "batch_size": 2},
            r"temperature \(1.0 there, 0.5 now\), max_problems \(None there, 5 now\); choose",
        ),
        ("model", "the model's files or the problems; choose another output_d"),
        ("problems", "the model's files or the problems; choose another outp"),
    ],
)
def test_samples_of_another_evaluation_are_never_removed(
    model, config, tmp_path, no_algebra, calls, finished, change, message
):
    copy, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(model, copy)
    calls.limit = 1000 if finished else 2
    with contextlib.suppress(KeyboardInterrupt):
        evaluate(copy, config, out)
    calls.limit = 1000
    kept = {file.name: file.read_bytes() for file in out.iterdir()}
    assert ("metrics.json" in kept, len(read(out))) == ((True, 21) if finished else (False, 12))

    wanted = config if isinstance(change, str) else changed(config, **change)
    if change == "model":
        make_lm("qwen2", seed=9, scale=2.0).save_pretrained(copy)
    elif change == "problems":
        write_jsonl(tmp_path / "test.jsonl", QUESTIONS[:5])
    with pytest.raises(RediError, match=f"{out}: .* {message}"):
        evaluate(copy, wanted, out)
    assert {file.name: file.read_bytes() for file in out.iterdir()} == kept

    evaluate(copy, wanted, out, replace=True)  # as `redi run` does in folders of its own
    evaluate(copy, wanted, tmp_path / "anew")
    assert_same_files(out, tmp_path / "anew")


def test_a_folder_without_samples_is_free(model, config, tmp_path, no_algebra, calls):
    calls.limit = 0
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, config, tmp_path / "out")
    calls.limit = 1000
    assert len(evaluate(model, changed(config, seed=1), tmp_path / "out").problem_ids) == 7


@pytest.mark.parametrize("batches_done", [2, 4])
def test_samples_graded_by_older_rules_are_graded_again_not_made_again(
    model, config, tmp_path, no_algebra, calls, monkeypatch, capsys, batches_done
):
    evaluate(model, config, tmp_path / "whole")
    with monkeypatch.context() as older:
        older.setattr(redi.evaluation.evaluate, "grading_rules", lambda: "older")
        older.setattr(redi.grading.verify.Verifier, "verify", lambda self, t, a: ["wrong"] * len(t))
        calls.count, calls.limit = 0, batches_done
        if batches_done < 4:
            with pytest.raises(KeyboardInterrupt):
                evaluate(model, config, tmp_path / "old")
        else:
            assert evaluate(model, config, tmp_path / "old").pass_at_1 == 0
        assert {row["verdict"] for row in read(tmp_path / "old")} == {"wrong"}
        with (tmp_path / "old" / "generations.jsonl").open("a") as file:
            file.write('{"torn')
    calls.count, calls.limit = 0, 1000
    if batches_done == 4:
        monkeypatch.setattr(redi.evaluation.evaluate, "_load", None)  # no need of the model
    result = evaluate(model, config, tmp_path / "old")
    assert calls.count == 4 - batches_done
    assert result.pass_at_1 > 0
    assert_same_files(tmp_path / "whole", tmp_path / "old")
    assert read(tmp_path / "whole", "votes.jsonl") == read(tmp_path / "old", "votes.jsonl")
    assert "graded again" in capsys.readouterr().err
    evaluate(model, config, tmp_path / "old")
    assert "graded again" not in capsys.readouterr().err


def test_held_out_pairs_are_scored_as_the_models_own_logits_say(
    model, config, tmp_path, no_algebra
):
    rows = pair_rows(5)
    rows[3].pop("rejected")  # no pair: left out
    config = changed(
        config, pairs_name=str(write_jsonl(tmp_path / "pairs.jsonl", rows)), max_tokens_per_batch=50
    )
    result = evaluate(model, config, tmp_path / "out")
    assert result.pairs.ids == ("sum-0", "sum-1", "sum-2", "sum-4")

    lm, chat = make_lm("qwen2", scale=2.0), ChatFormat(make_tokenizer())
    for i, row in enumerate(row for row in rows if "rejected" in row):
        for side, got in (("chosen", result.pairs.chosen_P), ("rejected", result.pairs.rejected_P)):
            ids, start = chat.encode(row["prompt"], row[side][0]["content"])
            with torch.no_grad():
                logp = lm(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
            targets = torch.tensor(ids[1:])[:, None]
            expected = logp.gather(1, targets)[start - 1 :].mean().item()
            assert got[i] == pytest.approx(expected, abs=1e-5)

    figures = json.loads((tmp_path / "out" / "metrics.json").read_text())["pairs"]
    assert figures["num_pairs"] == 4
    assert figures["gap"] == pytest.approx(figures["logps/chosen"] - figures["logps/rejected"])


def test_a_model_that_gives_no_numbers_is_refused(config, tmp_path, no_algebra):
    """By the problem, and nothing is graded."""
    lm = make_lm("qwen2")
    lm.model.layers[1].mlp.up_proj.weight.data[3] = torch.nan
    lm.save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(RediError, match=r"NaN or infinite \(problem q\d, after 0 new tokens\)"):
        evaluate(tmp_path / "model", config, tmp_path / "out")
    assert not (tmp_path / "out" / "metrics.json").exists()


def test_a_base_models_prompt_is_plain_text(config, tmp_path, monkeypatch):
    base = tmp_path / "base"
    make_lm("qwen2").save_pretrained(base)
    make_tokenizer(template=None).save_pretrained(base)
    seen = []
    script(monkeypatch, lambda prompt: seen.append(prompt) or "####0")
    config = changed(config, prompt_template="Q {problem} A", max_problems=1, num_samples=1)
    evaluate(base, config, tmp_path / "out")
    assert seen == ["Q 0+0 A"]
    with pytest.raises(RediError, match="no chat template"):
        evaluate(base, changed(config, system_prompt="be brief"), tmp_path / "brief")


def test_system_prompt_and_template_reach_the_model(model, config, tmp_path, monkeypatch):
    seen = []
    script(monkeypatch, lambda prompt: seen.append(prompt) or "####0")
    config = changed(config, prompt_template="add {problem}", system_prompt="hi", max_problems=1)
    evaluate(model, config, tmp_path / "out")
    assert set(seen) == {"<q>hi<q>add 0+0<a>"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"problem": "1+1"}], r"line 1.*`answer` is missing"),
        ([QUESTIONS[0], {"problem": "", "answer": "2"}], r"line 2.*the problem is missing"),
        ([{"problme": "1+1", "answer": "2"}], r"line 1.*problme"),
        ([QUESTIONS[0], QUESTIONS[0]], r"line 2.*'q0' occurs twice"),
        ([], "no rows"),
    ],
)
def test_bad_datasets_are_refused_before_the_model_is_loaded(config, tmp_path, rows, message):
    write_jsonl(tmp_path / "test.jsonl", rows)
    with pytest.raises(RediError, match=message):
        evaluate(tmp_path / "no-model", config, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_model_folder_without_tokenizer_is_named(model, config, tmp_path):
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(model / name, bare)
    with pytest.raises(RediError, match=f"{bare}: no tokenizer"):
        evaluate(bare, config, tmp_path / "out")


def test_a_tokenizer_of_ones_own_is_not_taken_for_qwens(model):
    """AutoTokenizer's rules for Qwen2 lose the spaces of a tokenizer that has tokens for them."""
    tokenizer = load_tokenizer_from(str(model))
    ids = tokenizer("so 1 b", add_special_tokens=False)["input_ids"]
    assert ids == make_tokenizer()("so 1 b", add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == "so 1 b"


def test_a_folder_without_weights_is_named(model, config, tmp_path):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "model.safetensors").unlink()
    with pytest.raises(RediError, match=f"{bare}: no model could be loaded"):
        evaluate(bare, config, tmp_path / "out")


def test_answers_longer_than_the_context_are_refused(model, config, tmp_path):
    with pytest.raises(RediError, match=r"512 positions; set max_new_tokens to at most 501"):
        evaluate(model, changed(config, max_new_tokens=510), tmp_path / "out")


def test_a_full_disk_is_named_and_loses_no_batch(
    model, config, tmp_path, no_algebra, calls, monkeypatch
):
    evaluate(model, config, tmp_path / "whole")
    syncs = iter([None, None, OSError(28, "No space left on device")])

    def fsync(descriptor):
        if error := next(syncs, None):
            raise error

    with monkeypatch.context() as full:
        full.setattr(redi.evaluation.evaluate.os, "fsync", fsync)
        with pytest.raises(RediError, match=r"full: cannot be written: .*No space left"):
            evaluate(model, config, tmp_path / "full")
    evaluate(model, config, tmp_path / "full")
    assert_same_files(tmp_path / "whole", tmp_path / "full")


def test_out_of_memory_names_the_batch_size(model, config, tmp_path, no_algebra, monkeypatch):
    def exhausted(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(redi.evaluation.generate, "generate", exhausted)
    with pytest.raises(RediError, match="batch_size 6: run again with a smaller"):
        evaluate(model, config, tmp_path / "out")
