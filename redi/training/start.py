"""The files that a run starts from: read whole or refused, and never written over.

transformers reads a folder whose weights do not fit its config, with a warning: what is missing is
drawn at random, what is too much is left out. No run, no evaluation here means that.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from redi.config import TrainConfig
from redi.errors import RediError
from redi.files import read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
GENERATION = "generation_config.json"
SOURCES = ("model_name_or_path", "tokenizer_name_or_path", "dataset_name", "eval_dataset_name",
           "chat_template")  # fmt: skip
OWN = ("train_result.json", "latest", "metrics.jsonl")  # what every run of redi leaves
# Of what an export writes, what its model folder surely has; and what others have there too.
EXPORTED = ("config.json", WEIGHTS, INDEX, GENERATION, "tokenizer.json", "tokenizer_config.json",
            "README.md")  # fmt: skip
ADAPTER = "adapter_config.json"
SHOWN = 4  # names in a message
# safetensors' names of the dtypes that weights are computed in; fp8 and packed ones are not.
PLAIN = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_causal_lm(name: str, **options: Any) -> Any:
    """`AutoModelForCausalLM.from_pretrained(name, **options)`, every weight of it from the files.

    Raises RediError when there is no model, when only pickles hold its weights (they are never
    opened), when a file is damaged, when weights are missing, left over or of another shape, and
    when an adapter lies beside them, which transformers would load along without a word.
    """
    from transformers import AutoModelForCausalLM

    check_folder(Path(name))
    try:
        with quietly():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                name,
                use_safetensors=True,  # never unpickle a stranger's file
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # they are refused below, by name
                **options,
            )
    except Exception as error:  # of many kinds, and all of them about the files
        why = broken_json(Path(name)) or first_line(error)
        raise RediError(f"{name}: no model could be loaded ({why})") from None
    lm, info = loaded
    if getattr(lm, "_hf_peft_config_loaded", False):  # of a Hub name, whose files come one by one
        raise RediError(_adapter_words(name))
    problems = _misfits(info)
    if problems:
        raise RediError(
            f"{name}: its weights are not those of the model that its config.json describes "
            f"({'; '.join(problems)}); get the whole model again, or correct config.json"
        )
    return lm


def check_folder(folder: Path) -> None:
    """Raises RediError for a folder (no Hub name) that lacks what is needed, or has too much."""
    if (folder / ADAPTER).exists():
        raise RediError(_adapter_words(str(folder)))
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt") for file in folder.glob(pattern))
    if pickles and not any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        raise RediError(
            f"{folder}: holds no {WEIGHTS}, and {pickles[0]} is a pickle, which can run code and "
            "is never opened here; where you trust it, load it with transformers once and save it "
            "with save_pretrained, which writes safetensors"
        )
    for file in weight_files(folder):
        if not file.exists():
            raise RediError(
                f"{folder}: no model could be loaded ({INDEX} names {file.name}, which is missing)"
            )
        try:
            with safe_open(file, "pt"):
                pass
        except (OSError, SafetensorError) as error:
            raise RediError(
                f"{folder}: no model could be loaded ({file.name}: {error}); get that file again"
            ) from None
    generation_settings(folder)


def generation_settings(folder: Path) -> dict[str, Any]:
    """What generation_config.json in `folder` says; {} without one. transformers drops a broken one
    without a word. Raises RediError for that, and for stop ids that are no token ids."""
    file = folder / GENERATION
    try:
        settings = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    except (ValueError, OSError) as error:
        raise RediError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise RediError(f"{file}: holds no JSON object; correct it, or remove it")
    stops = settings.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [] if stops is None else [stops]
    if any(type(stop) is not int for stop in stops):
        raise RediError(f"{file}: eos_token_id is no token id or list of them; correct it")
    return settings


def check_output_dir(config: TrainConfig) -> None:
    """Raises RediError where the export would be written over, into or around what the run reads,
    links followed, or over files that no run of redi left there."""
    out = Path(os.path.realpath(config.output_dir))  # Path.resolve raises for links in a circle
    for field in SOURCES:
        value = getattr(config, field)
        there = Path(os.path.realpath(value or ""))
        if value is None or not (there.exists() or set("*?[") & set(value)):  # as a Hub name
            continue
        inside = there.is_dir() and there in out.parents
        if out == there or out in there.parents or inside:
            raise RediError(
                f"output_dir: {config.output_dir} is, holds or lies in {value} ({field}), which a "
                "run must leave as it is; choose another output_dir"
            )
    foreign = [name for name in EXPORTED if (out / name).exists()]
    if foreign and not any((out / name).exists() for name in OWN):
        raise RediError(
            f"output_dir: {config.output_dir} holds {foreign[0]} already, which no run of redi "
            "left there and this one would write over; choose another output_dir"
        )


def local_folder(name: str | None, revision: str | None = None) -> Path | None:
    """Where the files lie: a folder itself, or of a Hub name what the cache holds, if anything."""
    if name is None or Path(name).is_dir():
        return None if name is None else Path(name)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, revision=revision, local_files_only=True))
    except (OSError, ValueError):  # not in the cache; not a name
        return None


def stored_dtypes(folder: Path | None) -> dict[str, torch.dtype]:
    """Of each tensor in a model folder's safetensors files that has an ordinary floating dtype."""
    dtypes = {}
    for file in weight_files(folder) if folder else []:
        with safe_open(file, "pt") as content:
            for name in content.keys():  # noqa: SIM118 (it is no dictionary)
                dtype = content.get_slice(name).get_dtype()
                if dtype in PLAIN:
                    dtypes[name] = PLAIN[dtype]
    return dtypes


def weight_files(folder: Path) -> list[Path]:
    """Those that transformers reads."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if (folder / INDEX).exists():
        weight_map = read_json(folder / INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise RediError(f"{folder / INDEX}: names no files of weights; get the model again")
        names = weight_map.values()
        return [folder / name for name in sorted(set(names))]
    return []


def broken_json(folder: Path) -> str | None:
    """Which .json file of a folder cannot be read, and why: transformers does not say which."""
    for file in sorted(folder.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            return f"{error}: {file.name}"
        if "config" in file.name and not isinstance(content, dict):
            return f"{file.name} holds no JSON object"
    return None


def first_line(error: Exception) -> str:
    """And the next one, where the first but announces it: a field and what is wrong with it."""
    if isinstance(error, KeyError):
        return f"{error} is missing"
    lines = [line.strip() for line in str(error).strip().splitlines()] or [type(error).__name__]
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def _misfits(info: dict[str, Any]) -> list[str]:
    """What does not fit, by name. Tied weights and those that the model's class itself says may be
    there or not are no part of `info`."""
    shapes = [f"{key} {list(a)} for {list(b)}" for key, a, b in info["mismatched_keys"]]
    found = {
        "missing": sorted(info["missing_keys"]),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(shapes),
    }
    texts = []
    for what, keys in found.items():
        more = f" and {len(keys) - SHOWN} more" if len(keys) > SHOWN else ""
        if keys:
            texts.append(f"{what}: {', '.join(keys[:SHOWN])}{more}")
    return texts


def _adapter_words(name: str) -> str:
    return (
        f"{name}: {ADAPTER} says that an adapter lies there, which transformers would load too; "
        "merge it into the model first (peft's merge_and_unload, then save_pretrained into a new "
        "folder), or move its files away"
    )


@contextlib.contextmanager
def quietly() -> Iterator[None]:
    """transformers' bars for reading and writing shards would tear our own lines; what its report
    of misfits says, our errors say."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
