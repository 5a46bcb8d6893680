"""Two ranks of a RediTrainer: `torchrun --nproc_per_node 2 trl_ranks.py weights.pt`."""

import sys
from pathlib import Path

import tiny
import torch
from datasets import Dataset
from redi_kernels.trl import RediTrainer
from trl import DPOConfig

SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "num_train_epochs": 1,
    "max_grad_norm": 0.0,
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "bf16": False,
    "disable_tqdm": True,
    "max_length": None,
}


def pairs(count: int) -> Dataset:
    rows = tiny.pair_rows(count)
    return Dataset.from_list([{k: v for k, v in row.items() if k != "id"} for row in rows])


def train(folder: Path, **changes) -> RediTrainer:
    """Ten pairs, four to an optimizer step: the last step has two."""
    trainer = RediTrainer(
        model=tiny.make_lm(), args=DPOConfig(output_dir=str(folder), **{**SETTINGS, **changes}),
        train_dataset=pairs(10), processing_class=tiny.make_tokenizer(),
    )  # fmt: skip
    trainer.train()
    return trainer


if __name__ == "__main__":
    file = Path(sys.argv[1])
    trainer = train(file.parent, per_device_train_batch_size=1)
    if trainer.accelerator.is_main_process:
        losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
        torch.save((trainer.model.state_dict(), losses), file)
