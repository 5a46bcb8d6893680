"""One run of a trainer: redi's own, and TRL's for the same objective.

Each takes (job, on_step_end), trains `job.steps` steps of `job.batch` pairs from the model in
job.folder and calls on_step_end() after each. Both get float32, AdamW, no saving, no logging
elsewhere; TRL any micro-batch size, and packing where it has it.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")


@dataclass(frozen=True)
class Job:
    folder: Path  # holds model/, with its tokenizer, and pairs.jsonl
    objective: str  # sft, redi, dpo, simpo
    trainer: str  # redi, or what TRL is to do: trl, trl packed
    micro_batch: int  # TRL: pairs (or traces) a forward; redi: tokens a forward
    checkpointing: str  # none, full; redi has selective too, and with how many blocks kept
    batch: int  # pairs a step
    steps: int


def redi(job: Job, watch: Callable[[Any], Callable[[], None]]) -> None:
    from redi import Callback
    from redi.training import loop
    from redi.training.model import PackedLM

    class Steps(Callback):
        def on_step_end(self, state: Any) -> None:
            on_step_end()

    how, _, kept = job.checkpointing.partition(", ")
    settings = {
        "model_name_or_path": str(job.folder / "model"),
        "dataset_name": str(job.folder / "pairs.jsonl"),
        "output_dir": str(job.folder / f"out-{os.getpid()}"),
        "objective": job.objective,
        "train_batch_size": job.batch,
        "max_tokens_per_batch": job.micro_batch,
        "gradient_checkpointing": how,
        "max_steps": job.steps,
        "save_steps": 10**9,
    }
    if kept:
        settings["kept_blocks"] = int(kept.split()[0])
    load: Callable[..., PackedLM] = loop.load_model
    on_step_end: Callable[[], None]

    def watched(*args: Any, **kwargs: Any) -> PackedLM:
        nonlocal on_step_end
        model = load(*args, **kwargs)
        on_step_end = watch(model.lm)
        return model

    loop.load_model = watched
    loop.train(settings, callbacks=[Steps()])


def trl(job: Job, watch: Callable[[Any], Callable[[], None]]) -> None:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

    class Steps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            on_step_end()

    model = AutoModelForCausalLM.from_pretrained(job.folder / "model", dtype=torch.float32)
    common = {
        "output_dir": str(job.folder / f"out-{os.getpid()}"),
        "per_device_train_batch_size": job.micro_batch,
        "gradient_accumulation_steps": job.batch // job.micro_batch,
        "max_steps": job.steps,
        "learning_rate": 1e-6,
        "weight_decay": 1e-4,
        "gradient_checkpointing": job.checkpointing == "full",
        "train_sampling_strategy": "sequential",
        "bf16": False,
        "use_cpu": True,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    data = Dataset.from_json(str(job.folder / "pairs.jsonl"), cache_dir=str(job.folder / "cache"))
    build = {"sft": _trl_sft, "redi": _trl_redi, "dpo": _trl_dpo, "simpo": _trl_simpo}
    trainer = build[job.objective](job, model, data, common)(
        processing_class=AutoTokenizer.from_pretrained(job.folder / "model"), callbacks=[Steps()]
    )
    on_step_end = watch(trainer.model)
    trainer.train()


def _trl_sft(job: Job, model: Any, data: Any, common: dict) -> Callable:
    from trl import SFTConfig, SFTTrainer

    data = data.remove_columns("rejected").rename_column("chosen", "completion")
    if job.trainer == "trl packed":  # rows as long as the longest trace, best-fit, no padding
        text = lambda row: row["prompt"][0]["content"] + row["completion"][0]["content"]
        longest = max(len(text(row)) for row in data)
        common |= {"packing": True, "max_length": longest + 8}
    else:
        common |= {"max_length": None}
    args = SFTConfig(**common)
    return lambda **options: SFTTrainer(model, args, train_dataset=data, **options)


def _trl_redi(job: Job, model: Any, data: Any, common: dict) -> Callable:
    from redi_kernels.trl import RediTrainer
    from trl import DPOConfig

    args = DPOConfig(**common, max_length=None)
    return lambda **options: RediTrainer(model, args, train_dataset=data, **options)


def _trl_dpo(job: Job, model: Any, data: Any, common: dict) -> Callable:
    from trl import DPOConfig, DPOTrainer

    args = DPOConfig(**common, max_length=None, precompute_ref_log_probs=True)
    return lambda **options: DPOTrainer(model, args=args, train_dataset=data, **options)


def _trl_simpo(job: Job, model: Any, data: Any, common: dict) -> Callable:
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    args = CPOConfig(
        **common, max_length=10**6, loss_type="simpo", cpo_alpha=0.0, beta=2.0, simpo_gamma=1.0
    )
    return lambda **options: CPOTrainer(model, args=args, train_dataset=data, **options)
