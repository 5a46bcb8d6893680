"""TRL's trainers on the CPU: whole runs against TRL's own loss and against dense SGD by hand."""

import os
import subprocess
import sys

import dense
import pytest
import tiny
import torch
import trl.trainer.utils as trl_utils
import trl_ranks
from datasets import Dataset
from docs_code import run_section
from peft import LoraConfig
from redi_kernels.trl import RediTrainer
from trl import DPOConfig, SFTConfig, SFTTrainer
from trl_ranks import SETTINGS, pairs, train

PAGE = "integrations.md"
LR = SETTINGS["learning_rate"]


@pytest.fixture
def no_trl_head(monkeypatch):
    """TRL's own head fails, so whatever trains does so through ours."""

    def stop(*args):
        raise AssertionError("TRL's fused head was called")

    monkeypatch.setattr(trl_utils._ChunkedLogProbFunction, "apply", stop)


def make_redi(tmp_path, lm, *, config=None, **kwargs):
    dataset = pairs(7)
    args = DPOConfig(output_dir=str(tmp_path), **{**SETTINGS, **(config or {})})
    names = {"model": lm, "args": args, "dataset": dataset, "tokenizer": tiny.make_tokenizer()}
    if not kwargs:
        return run_section(PAGE, "TRL", block=1, **names)["trainer"]
    names["train_dataset"], names["processing_class"] = names.pop("dataset"), names.pop("tokenizer")
    return RediTrainer(**names, **kwargs)


def record(trainer):
    """The rows of each batch, as sequences for `dense.redi`."""
    batches, collate = [], trainer.data_collator

    def recording(rows):
        batches.append(
            [
                {
                    "input_ids": [*row["prompt_ids"], *row[f"{kind}_ids"]],
                    "num_prompt_tokens": len(row["prompt_ids"]),
                    "is_chosen": kind == "chosen",
                }
                for row in rows
                for kind in ("chosen", "rejected")
            ]
        )
        return collate(rows)

    trainer.data_collator = recording
    return batches


def assert_same_weights(ours, theirs):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4, msg=name)


def test_sft_equals_trls_own(tmp_path, request):
    rows = [{"prompt": r["prompt"], "completion": r["chosen"]} for r in tiny.pair_rows(7)]
    dataset, tokenizer = Dataset.from_list(rows), tiny.make_tokenizer()
    args = SFTConfig(output_dir=str(tmp_path), **SETTINGS)
    theirs = tiny.make_lm()
    plain = SFTTrainer(theirs, args, train_dataset=dataset, processing_class=tokenizer)
    plain.train()
    request.getfixturevalue("no_trl_head")
    ours = tiny.make_lm()
    with dense.no_logits(ours):
        names = {"model": ours, "args": args, "dataset": dataset, "tokenizer": tokenizer}
        trainer = run_section(PAGE, "TRL", **names)["trainer"]
    assert_same_weights(ours, theirs)
    losses = [[row["loss"] for row in t.state.log_history[:-1]] for t in (trainer, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and len(losses[0]) == 2


def test_redi_trains_inside_trl(tmp_path, no_trl_head):
    """Seven pairs in twos, two batches a step: the last step has three pairs, in 2 + 1."""
    lm, reference = tiny.make_lm(), tiny.make_lm()
    batches = []
    original = RediTrainer.__init__

    def spied(self, *args, **kwargs):
        original(self, *args, **kwargs)
        batches.append(record(self))

    with pytest.MonkeyPatch.context() as patched, dense.no_logits(lm):
        patched.setattr(RediTrainer, "__init__", spied)
        trainer = make_redi(tmp_path, lm)
    (batches,) = batches
    steps = [batches[0] + batches[1], batches[2] + batches[3]]
    assert [len(step) for step in steps] == [8, 6]
    first = dense.redi(reference, steps[0]).item()
    dense.sgd(reference, [lambda s=s: dense.redi(reference, s) for s in steps], LR)
    assert_same_weights(lm, reference)
    logs = trainer.state.log_history[0]
    assert logs["loss"] == pytest.approx(first, rel=1e-3, abs=1e-4)
    fresh = tiny.make_lm()
    sums = [dense.logps(fresh, s["input_ids"], s["num_prompt_tokens"]) for s in steps[0]]
    chosen, rejected = sums[::2], sums[1::2]
    mean = lambda values: sum(v.item() for v in values) / 4
    assert logs["rewards/chosen"] == pytest.approx(mean([v.mean() for v in chosen]), rel=1e-4)
    assert logs["rewards/rejected"] == pytest.approx(mean([v.mean() for v in rejected]), rel=1e-4)
    assert logs["logps/rejected"] == pytest.approx(mean([v.sum() for v in rejected]), rel=1e-4)
    wins = mean([(a.mean() > b.mean()) for a, b in zip(chosen, rejected, strict=True)])
    assert logs["rewards/accuracies"] == wins
    assert logs["num_tokens"] == sum(len(s["input_ids"]) for s in steps[0])
    del batches[:]
    loss = trainer.evaluate(pairs(3))["eval_loss"]  # new rows, after training
    with torch.no_grad():
        assert loss == pytest.approx(dense.redi(lm, batches[0]).item(), rel=1e-4)


def test_redi_with_lora_and_evaluation(tmp_path, no_trl_head):
    lm = tiny.make_lm()
    before = {name: p.clone() for name, p in lm.named_parameters()}
    lora = LoraConfig(target_modules=["q_proj", "down_proj"], r=2)
    trainer = make_redi(tmp_path, lm, peft_config=lora, alpha=0.5)
    held_out = pairs(3)
    sequences = record(trainer)
    loss = trainer.evaluate(held_out)["eval_loss"]
    with torch.no_grad():
        expected = dense.redi(tiny.make_lm(), sequences[0], alpha=0.5).item()
    assert loss == pytest.approx(expected, rel=1e-4)
    trainer.train()
    base = {n.replace(".base_layer", ""): p for n, p in lm.named_parameters() if "lora" not in n}
    assert all(torch.equal(base[name], p) for name, p in before.items())
    assert all(p.any() for n, p in lm.named_parameters() if "lora_B" in n)
    assert trainer.evaluate(held_out)["eval_loss"] != loss


@pytest.mark.parametrize("setting", [{"loss_type": "ipo"}, {"beta": 0.5}, {"use_weighting": True}])
def test_settings_that_would_do_nothing_are_refused(tmp_path, setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        make_redi(tmp_path, tiny.make_lm(), config=setting)
    with pytest.raises(ValueError, match="ref_model"):
        make_redi(tmp_path, tiny.make_lm(), ref_model=tiny.make_lm())


def test_lora_on_the_head_is_refused(tmp_path):
    lora = LoraConfig(target_modules=["q_proj", "lm_head"], r=2)
    with pytest.raises(ValueError, match="lm_head"):
        make_redi(tmp_path, tiny.make_lm(), peft_config=lora)


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one(tmp_path):
    file = tmp_path / "ranks.pt"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, "--nproc_per_node", "2", trl_ranks.__file__, str(file)],
        capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    weights, losses = torch.load(file)
    alone = train(tmp_path)
    for name, weight in alone.model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-5, msg=name)
    expected = [row["loss"] for row in alone.state.log_history if "loss" in row]
    assert losses == pytest.approx(expected, rel=1e-4) and len(losses) == 3
