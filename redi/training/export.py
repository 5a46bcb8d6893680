"""The trained model as an ordinary Hugging Face folder: what it came with, and its new weights.

What training changes in memory only (dtype, dropout) goes out as it came; older readers than this
transformers, which servers are built on, find what they look for too (older_readers.py).
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from redi.config import TrainConfig
from redi.files import publish, usual_mode
from redi.training.distributed import full_tensors
from redi.training.model import is_dropout
from redi.training.older_readers import tell_names, tell_rope, tell_tokenizer, write_json
from redi.training.start import (
    GENERATION,
    INDEX,
    generation_settings,
    local_folder,
    quietly,
    stored_dtypes,
    weight_files,
)

# Beside the weights, and not written by transformers' save_pretrained of a causal LM.
COMPANIONS = ("*.py", "*processor_config.json")


def whole_weights(lm: Any, config: TrainConfig, *, keep: bool) -> dict[str, Tensor]:
    """Parameters and persistent buffers under transformers' names, for ranks that `keep` them; tied
    ones are one tensor. A collective.

    In the dtype of the export, but for what came in several: that stays float32 until `export`
    knows the names it has in files, which are not always those of the model.
    """
    dtypes = _dtypes_to_keep(config)
    several = len(set(dtypes.values())) > 1
    dtype = None if several else next(iter(dtypes.values()), stored_dtype(lm, config.dtype))
    state = lm.state_dict(keep_vars=True)
    parameters = {name for name, _ in lm.named_parameters(remove_duplicate=False)}
    # A buffer is nothing that trains: `dtype: bfloat16` does not round a router's float32 bias.
    buffer_dtype = dtype if dtypes else None
    return full_tensors(
        {name: state[name] for name in state if name in parameters}, dtype=dtype, keep=keep
    ) | full_tensors(
        {name: state[name] for name in state if name not in parameters},
        dtype=buffer_dtype,
        keep=keep,
    )


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

    `weights` are of `whole_weights`. Everything is written aside first; `config.json`, which makes
    the folder a model, moves in last. Raises OSError (full disk) and then leaves nothing behind.
    """
    output_dir = Path(config.output_dir)
    aside = output_dir / "export.tmp"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)
    source = local_folder(config.model_name_or_path, config.model_revision)
    tokenizer_source = local_folder(
        config.tokenizer_name_or_path or config.model_name_or_path, config.model_revision
    )
    try:
        generation = _generation_config(lm, source, tokenizer, eos_token_ids)
        with quietly():
            _save_model(lm, weights, aside)
            tokenizer.save_pretrained(aside)
        _keep_dtypes(aside, _dtypes_to_keep(config), stored_dtype(lm, config.dtype))
        write_json(aside / GENERATION, generation)
        _finish_config(aside / "config.json", lm, config)
        with quietly():
            tell_rope(aside, type(lm.config))
            # An old word for the rate that a recipe changes would say the old rate.
            tell_names(aside, type(lm.config), source if config.rope_theta is None else None)
        tell_tokenizer(aside, tokenizer_source, tokenizer)
        _copy_companions(aside, source, tokenizer_source)
        (aside / "README.md").write_text(card)
        for file in weight_files(aside):
            usual_mode(file)
        files = [str(f.relative_to(aside)) for f in aside.rglob("*") if f.is_file()]
        for name in files:  # further templates have a folder
            (output_dir / name).parent.mkdir(exist_ok=True)
        names = sorted(files, key=lambda name: name == "config.json")
        publish(aside, {name: output_dir / name for name in names})
    except SafetensorError as error:  # what a full disk is to safetensors
        raise OSError(str(error)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def stored_dtype(lm: Any, wanted: str) -> torch.dtype:
    """Of the exported weights: `wanted`, or for "auto" what the model's config says."""
    dtype = lm.config_as_it_came.dtype if wanted == "auto" else wanted
    if isinstance(dtype, str):
        dtype = getattr(torch, dtype)
    return dtype or torch.float32


def _dtypes_to_keep(config: TrainConfig) -> dict[str, torch.dtype]:
    """By the tensors' names in the start's files."""
    if config.dtype != "auto":
        return {}
    return stored_dtypes(local_folder(config.model_name_or_path, config.model_revision))


def _save_model(lm: Any, weights: dict[str, Tensor], folder: Path) -> None:
    """transformers writes config and weights, under the names and in the shapes they have in files.
    The generation config, which it may find contradictory and refuse, is written by `export`."""
    from transformers import GenerationConfig

    generation, lm.generation_config = lm.generation_config, GenerationConfig()
    try:
        lm.save_pretrained(folder, state_dict=weights)
    finally:
        lm.generation_config = generation


def _keep_dtypes(folder: Path, dtypes: dict[str, torch.dtype], other: torch.dtype) -> None:
    """Gives each tensor in `folder` the dtype it came in, where they came in several; `other` to
    those that the start's files do not name."""
    if len(set(dtypes.values())) < 2:
        return
    num_bytes = 0
    for file in weight_files(folder):
        with safe_open(file, "pt") as content:
            metadata = content.metadata()
            tensors = {name: content.get_tensor(name) for name in content.keys()}  # noqa: SIM118
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor.to(dtypes.get(name, other))
            num_bytes += tensors[name].nbytes
        narrow = file.with_name(f"{file.name}.narrow")  # the tensors still are views of `file`
        save_file(tensors, narrow, metadata)
        os.replace(narrow, file)
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text())
        index["metadata"]["total_size"] = num_bytes
        write_json(folder / INDEX, index)


def _generation_config(
    lm: Any, source: Path | None, tokenizer: Any, eos_token_ids: list[int]
) -> dict[str, Any]:
    """The start's, which also stops where the template ends a turn."""
    from transformers import GenerationConfig

    with quietly():
        settings = GenerationConfig.from_model_config(lm.config_as_it_came).to_diff_dict()
    if source is None:  # from scratch: a config class's own ids are nobody's choice
        settings.pop("eos_token_id", None)
    else:
        settings |= generation_settings(source)
    settings.pop("_from_model_config", None)
    stops = settings.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    settings["eos_token_id"] = list(dict.fromkeys([*stops, *eos_token_ids]))
    if settings.get("pad_token_id") is None:
        pad = tokenizer.pad_token_id
        settings["pad_token_id"] = eos_token_ids[0] if pad is None else pad
    return settings


def _finish_config(file: Path, lm: Any, config: TrainConfig) -> None:
    settings = json.loads(file.read_text())
    came = lm.config_as_it_came
    if came.model_type != settings["model_type"]:  # the text model of a larger one was trained
        came = came.get_text_config()
    _put_back_dropout(settings, came.to_dict())
    settings["dtype"] = str(stored_dtype(lm, config.dtype)).removeprefix("torch.")
    write_json(file, settings)


def _put_back_dropout(settings: dict[str, Any], came: dict[str, Any]) -> None:
    for key, value in came.items():
        if isinstance(value, dict) and isinstance(settings.get(key), dict):
            _put_back_dropout(settings[key], value)
        elif is_dropout(key, value):
            settings[key] = value


def _copy_companions(folder: Path, *sources: Path | None) -> None:
    """Code that a config names (`trust_remote_code`), and what an image's or a sound's way into the
    model needs: a folder that lacks them would not load as its start did."""
    for source in sources:
        found = [f for pattern in COMPANIONS for f in source.glob(pattern)] if source else []
        for file in found:
            if not (folder / file.name).exists():
                shutil.copyfile(file, folder / file.name)


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
