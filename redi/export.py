"""The trained model as an ordinary Hugging Face folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from redi.config import TrainConfig
from redi.files import publish
from redi.model import no_progress_bars


def export(
    lm: Any,
    weights: dict[str, Tensor],
    tokenizer: Any,
    config: TrainConfig,
    *,
    eos_token_ids: list[int],
    card: str,
) -> None:
    """Writes weights, tokenizer, template, generation config and card to `config.output_dir`.

    `weights` are whole tensors of `stored_dtype` under transformers' names, tied ones once.
    Everything is written aside first; `config.json`, which makes the folder a model, moves in last.
    Raises OSError (full disk) and then leaves nothing behind.
    """
    from transformers import GenerationConfig

    output_dir = Path(config.output_dir)
    dtype = stored_dtype(lm, config.dtype)  # save_pretrained writes training's into lm.config
    aside = output_dir / "export.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    try:
        with no_progress_bars():
            lm.save_pretrained(aside, state_dict=weights)
        tokenizer.save_pretrained(aside)
        generation = GenerationConfig.from_model_config(lm.config)
        generation.eos_token_id = eos_token_ids
        pad = tokenizer.pad_token_id
        generation.pad_token_id = eos_token_ids[0] if pad is None else pad
        generation.save_pretrained(aside)
        settings = json.loads((aside / "config.json").read_text())
        settings["dtype"] = str(dtype).removeprefix("torch.")  # of the file, not of the training
        (aside / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
        (aside / "README.md").write_text(card)
        names = sorted((f.name for f in aside.iterdir()), key=lambda name: name == "config.json")
        publish(aside, {name: output_dir / name for name in names})
    except SafetensorError as error:  # what a full disk is to safetensors
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def model_card(config: TrainConfig, steps: int, metrics: dict[str, float]) -> str:
    """README.md of the folder: what was done, the last metrics, the whole recipe."""
    import yaml

    shown = ("loss", "logps/chosen", "logps/rejected", "grad_norm")
    last = ", ".join(f"{key} {metrics[key]:.4g}" for key in shown if key in metrics)
    recipe = yaml.safe_dump(config.model_dump(exclude_none=True), sort_keys=False)
    return (
        f"---\nlibrary_name: transformers\ntags: [redi, {config.objective}]\n---\n\n"
        f"# {Path(config.output_dir).name}\n\n"
        "Trained with Reinforcement Distillation (arXiv 2505.24850).\n\n"
        f"- stage: {config.stage}\n- steps: {steps}\n- at the last step: {last}\n\n"
        f"## Recipe\n\n```yaml\n{recipe}```\n"
    )


def stored_dtype(lm: Any, wanted: str) -> torch.dtype:
    """Of the exported weights: `wanted`, or for "auto" what the model came in."""
    dtype = lm.config.dtype if wanted == "auto" else wanted
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype or torch.float32
