"""transformers.Trainer: whole runs, with uneven accumulation, against dense SGD by hand."""

from itertools import chain

import dense
import pytest
import tiny
import torch
from docs_code import run_section
from redi_kernels.hf import patch
from transformers import Trainer, TrainingArguments

PAGE = "integrations.md"
LR = 0.05


def arguments(tmp_path, **changes):
    settings = {
        "output_dir": str(tmp_path),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 4,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 1,
        "max_grad_norm": 0.0,
        "optim": "sgd",
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "remove_unused_columns": False,
    }
    return TrainingArguments(**{**settings, **changes})


class Recorder:
    """A collator that remembers, batch by batch, what it was given."""

    def __init__(self, collate):
        self.collate, self.batches = collate, []

    def __call__(self, rows):
        self.batches.append(rows)
        return self.collate(rows)

    def steps(self, size):
        return [self.batches[i : i + size] for i in range(0, len(self.batches), size)]


def assert_same_weights(ours, theirs):
    for (name, a), b in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=2e-4, msg=name)


def test_sft_through_the_patch(tmp_path):
    rows = [torch.tensor(s["input_ids"]) for s in dense.made_up_sequences(11)]

    def pad(batch):
        full = {"batch_first": True, "padding_value": -100}
        labels = torch.nn.utils.rnn.pad_sequence(batch, **full)
        return {"input_ids": labels.clamp(min=0), "attention_mask": labels.ge(0).long(),
                "labels": labels}  # fmt: skip

    lm, reference, collator = tiny.make_lm(), tiny.make_lm(), Recorder(pad)
    trainer = Trainer(patch(lm), arguments(tmp_path), data_collator=collator, train_dataset=rows)
    with dense.no_logits(lm):
        trainer.train()
    steps = [[*chain(*step)] for step in collator.steps(3)]
    assert [len(step) for step in steps] == [6, 5]

    def loss(step):  # the mean over all tokens of the step
        logp = torch.cat([dense.logps(reference, ids.tolist(), 1) for ids in step])
        return -logp.mean()

    before = [loss(steps[0]).item()]
    dense.sgd(reference, [lambda s=s: loss(s) for s in steps], LR)
    assert_same_weights(lm, reference)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(before[0], rel=1e-3)


def test_redi_trainer_of_the_page(tmp_path):
    pack = run_section(PAGE, "A plain PyTorch loop")["pack"]
    sequences = dense.made_up_sequences(11)
    lm, reference, collator = tiny.make_lm(), tiny.make_lm(), Recorder(pack)
    args = arguments(tmp_path, label_names=["targets"])
    with dense.no_logits(lm):
        names = {"model": lm, "args": args, "pack": collator, "sequences": sequences}
        trainer = run_section(PAGE, "`transformers.Trainer`", **names)["trainer"]
    steps = [[*chain(*step)] for step in collator.steps(3)]
    assert [len(step) for step in steps] == [6, 5]
    first = dense.redi(reference, steps[0]).item()
    dense.sgd(reference, [lambda s=s: dense.redi(reference, s) for s in steps], LR)
    assert_same_weights(lm, reference)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(first, rel=1e-3, abs=1e-4)
    with torch.no_grad():
        expected = dense.redi(lm, sequences[:4]).item()
    loss = trainer.evaluate(sequences[:4])["eval_loss"]
    assert loss == pytest.approx(expected, rel=1e-4)
