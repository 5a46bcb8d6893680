"""Checkpoints that are whole or not there, and are read only when every byte is as it was written.

    output_dir/latest                       names the checkpoint to continue from
    output_dir/checkpoint-200/
        model-00001-of-00002.safetensors      float32 master weights and buffers, one file a rank
        optimizer-00001-of-00002.safetensors  AdamW moments as "{parameter}/exp_avg"
        trainer_state.json                    step, what the run trains on, optimizer steps
        COMPLETE.json                         every file's size and sha256; written last

Each rank writes the parts it holds; no rank ever holds the whole model for a save. The format is
the safetensors one of torch.distributed.checkpoint (its HuggingFaceStorageReader reads it), but
written and read here: torch's own writer changes its arguments from release to release, copies a
rank's part once more in memory and names neither sizes nor hashes; its default format pickles.
Only safetensors and JSON are ever opened: reading a stranger's checkpoint never runs code.
"""

import contextlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from redi.errors import RediError
from redi.files import digest_file, fsync, usual_mode, write_text
from redi.training.distributed import Ranks, local_part

MARKER = "COMPLETE.json"
STATE = "trainer_state.json"
LATEST = "latest"
ASIDE = ".tmp"
Piece = tuple[list[int], list[int], Any]  # where in the whole tensor it starts, its shape, its data
OFFSETS, START = "DCP_SHARDING_INFO", "saved_offsets"  # torch.distributed.checkpoint's names


def save(
    output_dir: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    ranks: Ranks,
    *,
    keep: int,
) -> None:
    """Writes checkpoint-{state["step"]}, points `latest` at it, then removes all but `keep`.

    A collective. Raises OSError (disk full) on all ranks when one could not write, having removed
    what was written and nothing else.
    """
    final = output_dir / f"checkpoint-{state['step']}"
    aside = output_dir / f"{final.name}{ASIDE}"
    parameters = dict(model.named_parameters())
    # Each rank has all of a buffer: one of them writes it.
    weights = parameters | _buffers(model) if ranks.is_main else parameters
    moments, steps = _optimizer_tensors(parameters, optimizer)

    def begin() -> None:
        for left in output_dir.glob(f"checkpoint-*{ASIDE}"):  # by a kill
            shutil.rmtree(left)
        aside.mkdir(parents=True)
        for log in output_dir.glob("*.jsonl"):  # a power cut must not spare this and cut those
            fsync(log)

    def write() -> dict[str, Any]:
        suffix = f"{ranks.rank + 1:05d}-of-{ranks.world_size:05d}.safetensors"
        files = {f"model-{suffix}": weights, f"optimizer-{suffix}": moments}
        return {name: _write(aside / name, tensors) for name, tensors in files.items()}

    def publish() -> None:
        (aside / STATE).write_text(json.dumps({**state, "optimizer_steps": steps}, indent=2))
        written = {STATE: _record(aside / STATE)} | {k: v for d in shards for k, v in d.items()}
        (aside / MARKER).write_text(json.dumps(written, indent=2))
        fsync(aside / STATE)
        fsync(aside / MARKER)
        fsync(aside)
        _remove(final)  # a damaged one, or of a run that was started anew
        aside.rename(final)
        fsync(output_dir)
        write_text(output_dir / LATEST, f"{final.name}\n")

    try:
        ranks.together(begin, main=True)
        shards = ranks.together(write)
        ranks.together(publish, main=True)
    except OSError as error:
        if ranks.is_main:
            shutil.rmtree(aside, ignore_errors=True)
        raise OSError(f"{final} NOT saved: {error}") from error
    try:
        ranks.together(lambda: _prune(output_dir, state["step"], keep), main=True)
    except OSError as error:
        raise OSError(
            f"{final} is saved, but an older one could not be removed: {error}"
        ) from error


def find(output_dir: Path, resume: bool | str, ranks: Ranks) -> tuple[Path | None, list[str]]:
    """The checkpoint to continue from, as `resume_from_checkpoint` asks ("auto" or true, false, a
    path), and what is wrong with those that were passed over.

    "auto" tries the one that `latest` names, then the others, newest first. A collective. Raises
    RediError when there are checkpoints but none is intact.
    """
    if resume is False:
        return None, []
    auto = resume in (True, "auto")
    # Rank 0's view, so that all ranks try the same ones.
    candidates = ranks.gather(_candidates(output_dir))[0] if auto else [Path(str(resume))]
    damaged: list[str] = []
    for folder in candidates:
        problem = damage(folder, ranks)
        if problem is None:
            return folder, damaged
        damaged.append(f"{folder}: {problem}")
    if not damaged:
        return None, []
    more = "; remove them, or set resume_from_checkpoint: false, to start anew" if auto else ""
    raise RediError(f"resume_from_checkpoint: no intact checkpoint: {'; '.join(damaged)}{more}")


def damage(folder: Path, ranks: Ranks) -> str | None:
    """What is wrong with a checkpoint, or None. Reads all of it, the ranks sharing the work; a
    collective. Raises RediError on all ranks where a disk fails on one."""

    def check() -> str | None:
        if not folder.is_dir():
            return "no such folder"
        try:
            marker = json.loads((folder / MARKER).read_text())
            files = [(name, marker[name]["bytes"], marker[name]["sha256"]) for name in marker]
        except FileNotFoundError:
            return f"no {MARKER}, so its save did not end"
        except (OSError, ValueError, TypeError, KeyError) as error:
            return f"{MARKER} is unreadable ({error})"
        for name, size, sha256 in files[ranks.rank :: ranks.world_size]:
            file = folder / name
            if not file.is_file():
                return f"{name} is missing"
            if file.stat().st_size != size:
                return f"{name} has {file.stat().st_size} bytes instead of {size}"
            if _record(file)["sha256"] != sha256:
                return f"{name} is not what was written (its sha256 differs)"
        return None

    try:
        return next((problem for problem in ranks.together(check) if problem), None)
    except OSError as error:  # not the checkpoint's fault, and perhaps over in a minute
        raise RediError(f"{folder}: cannot be read: {error}") from None


def checkpoints(output_dir: Path) -> dict[int, Path]:
    """The folders that saves have made, by step, oldest first."""
    matches = [re.fullmatch(r"checkpoint-(\d+)", f.name) for f in output_dir.glob("checkpoint-*")]
    return dict(sorted((int(m[1]), output_dir / m[0]) for m in matches if m))


def read_state(folder: Path) -> dict[str, Any]:
    return json.loads((folder / STATE).read_text())


def load(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Restores weights and optimizer bit for bit, written on however many ranks. Raises RediError
    when they are another model's, or no safetensors."""
    parameters = dict(model.named_parameters())
    steps = read_state(folder)["optimizer_steps"]
    _read(folder, "model", parameters, _buffers(model))
    for name, parameter in parameters.items():
        if name in steps:
            optimizer.state[parameter] = {
                "step": torch.tensor(float(steps[name]), device=parameter.device),
                "exp_avg": torch.zeros_like(parameter),
                "exp_avg_sq": torch.zeros_like(parameter),
            }
    _read(folder, "optimizer", _optimizer_tensors(parameters, optimizer)[0])


def _write(file: Path, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes this rank's parts; returns the file's size and hash."""
    parts, starts = {}, {}
    for name, tensor in named.items():
        part, start = local_part(tensor.detach())
        if part.numel():
            parts[name], starts[name] = part.cpu().contiguous(), {START: start}
    try:
        save_file(parts, file, {"format": "pt", OFFSETS: json.dumps(starts)})
    except SafetensorError as error:
        raise OSError(str(error)) from error
    usual_mode(file)
    fsync(file)
    return _record(file)


@torch.no_grad()
def _read(
    folder: Path,
    kind: str,
    named: Mapping[str, Tensor],
    optional: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Fills this rank's parts from whichever files hold them; what is `optional` may be in none."""
    pieces: dict[str, list[Piece]] = defaultdict(list)
    with contextlib.ExitStack() as stack:
        for file in sorted(folder.glob(f"{kind}-*-of-*.safetensors")):
            try:
                handle = stack.enter_context(safe_open(file, "pt"))
                starts = json.loads(handle.metadata()[OFFSETS])
                for name in handle.keys():  # noqa: SIM118 (it is no dictionary)
                    piece = handle.get_slice(name)
                    pieces[name].append((starts[name][START], piece.get_shape(), piece))
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                raise RediError(f"{file}: not a checkpoint file of redi ({error})") from None
        named = {**named, **{name: t for name, t in optional.items() if name in pieces}}
        if set(pieces) != set(named):
            odd = min(set(pieces) ^ set(named))
            raise RediError(f"{folder}: is of another model (see {odd})")
        for name, tensor in named.items():
            if not _fill(tensor, pieces[name]):
                raise RediError(f"{folder}: is of another model ({name} does not fit)")


def _fill(tensor: Tensor, pieces: list[Piece]) -> bool:
    """Copies what `pieces` hold of this rank's part; whether they make up the tensor."""
    part, at = local_part(tensor)
    ends = [[s + n for s, n in zip(start, shape, strict=True)] for start, shape, _ in pieces]
    if [max(end) for end in zip(*ends, strict=True)] != list(tensor.shape):
        return False
    filled = 0
    for (start, _, data), end in zip(pieces, ends, strict=True):
        box = zip(at, part.shape, start, end, strict=True)
        common = [(max(a, s), min(a + n, e)) for a, n, s, e in box]
        if all(low < high for low, high in common):
            there = [slice(l - s, h - s) for (l, h), s in zip(common, start, strict=True)]
            here = [slice(l - a, h - a) for (l, h), a in zip(common, at, strict=True)]
            part[tuple(here)] = data[tuple(there)].to(part.device)
            filled += part[tuple(here)].numel()
    return filled == part.numel()


def _buffers(model: nn.Module) -> dict[str, Tensor]:
    """Those that are part of the model (a router's bias). Checkpoints of an older redi lack them;
    there they stay what the start had."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


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


def _record(file: Path) -> dict[str, Any]:
    return {"bytes": file.stat().st_size, "sha256": digest_file(file)}


def _candidates(output_dir: Path) -> list[Path]:
    pointer = output_dir / LATEST
    latest = pointer.read_text().strip() if pointer.exists() else None
    newest_first = list(checkpoints(output_dir).values())[::-1]
    return sorted(newest_first, key=lambda folder: folder.name != latest)  # a stable sort


def _prune(output_dir: Path, step: int, keep: int) -> None:
    """Keeps the `keep` newest up to `step`; any beyond it are of a run that was started anew."""
    found = checkpoints(output_dir)
    kept = [s for s in found if s <= step][-keep:]
    for s, folder in found.items():
        if s not in kept:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Under another name first: one that is half removed must not pass for a damaged one."""
    if folder.exists():
        gone = folder.with_name(f"{folder.name}-removed{ASIDE}")
        folder.rename(gone)
        shutil.rmtree(gone)
