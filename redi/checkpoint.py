"""Checkpoints that are whole or not there: written aside, fsynced, marked complete, renamed, then
older ones removed. Only safetensors and JSON, so that reading one never runs code.

    output_dir/checkpoint-200/  model.safetensors      float32 master weights
                                optimizer.safetensors  AdamW moments, by parameter name
                                trainer_state.json     step, what the run trains on, optimizer steps
                                COMPLETE.json          every file's size; written last
"""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from redi.distributed import Ranks, full_tensors, load_full_tensors
from redi.errors import RediError
from redi.files import fsync

MARKER = "COMPLETE.json"


def save(
    output_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks,
    *,
    keep: int,
) -> Path:
    """Writes checkpoint-{state["step"]}. A collective. Raises OSError (disk full) on the main rank,
    having removed what it wrote and nothing else."""
    parameters = dict(model.named_parameters())
    weights = full_tensors(parameters, keep=ranks.is_main)
    moments, steps = _optimizer_tensors(parameters, optimizer)
    moments = full_tensors(moments, keep=ranks.is_main)
    final = output_dir / f"checkpoint-{state['step']}"
    if ranks.is_main:
        aside = output_dir / f"{final.name}.tmp"
        try:
            shutil.rmtree(aside, ignore_errors=True)
            aside.mkdir(parents=True)
            save_file(weights, aside / "model.safetensors")
            save_file(moments, aside / "optimizer.safetensors")
            (aside / "trainer_state.json").write_text(
                json.dumps({**state, "optimizer_steps": steps}, indent=2)
            )
            sizes = {f.name: f.stat().st_size for f in sorted(aside.iterdir())}
            (aside / MARKER).write_text(json.dumps(sizes, indent=2))
            for file in aside.iterdir():
                fsync(file)
            fsync(aside)
            shutil.rmtree(final, ignore_errors=True)  # an incomplete one of an earlier run
            aside.rename(final)
            fsync(output_dir)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(aside, ignore_errors=True)
            raise OSError(f"{final}: {error}") from error
        for old in complete_checkpoints(output_dir)[:-keep]:
            shutil.rmtree(old)
    return final


def complete_checkpoints(output_dir: Path) -> list[Path]:
    """Checkpoints whose every file has the size its marker states, oldest first."""
    found = []
    for folder in output_dir.glob("checkpoint-*"):
        match = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        if match and _is_complete(folder):
            found.append((int(match[1]), folder))
    return [folder for _, folder in sorted(found)]


def find(output_dir: Path, resume: bool | str) -> Path | None:
    """The checkpoint to continue from, as `resume_from_checkpoint` asks: "auto" or true, false, a
    path."""
    if resume is False:
        return None
    if resume in (True, "auto"):
        complete = complete_checkpoints(output_dir)
        return complete[-1] if complete else None
    folder = Path(str(resume))
    if not _is_complete(folder):
        raise RediError(f"resume_from_checkpoint: {folder} is not a complete checkpoint")
    return folder


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "trainer_state.json").read_text())


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights and optimizer bit for bit. Raises RediError when they are another
    model's."""
    parameters = dict(model.named_parameters())
    steps = read_state(folder)["optimizer_steps"]
    with safe_open(folder / "model.safetensors", "pt") as weights:
        if set(weights.keys()) != set(parameters):
            raise RediError(f"{folder}: holds another model's weights")
        load_full_tensors(parameters, weights.get_tensor)
    for name, parameter in parameters.items():
        if name in steps:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps[name])),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    with safe_open(folder / "optimizer.safetensors", "pt") as moments:
        load_full_tensors(_optimizer_tensors(parameters, optimizer)[0], moments.get_tensor)


def _optimizer_tensors(parameters: dict, optimizer: torch.optim.Optimizer) -> tuple[dict, dict]:
    """AdamW's moments as "{parameter}/exp_avg" tensors, and its step counters as plain numbers."""
    moments, steps = {}, {}
    for name, parameter in parameters.items():
        entry = optimizer.state.get(parameter)
        if entry:
            steps[name] = int(entry["step"])
            for moment in ("exp_avg", "exp_avg_sq"):
                moments[f"{name}/{moment}"] = entry[moment]
    return moments, steps


def _is_complete(folder: Path) -> bool:
    try:
        sizes = json.loads((folder / MARKER).read_text())
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False
