"""DPO's reference: the starting model's log-prob of every trace, computed once and kept on disk.

    output_dir/reference-<fingerprint>.safetensors    logps: [traces] float32, in data order

The fingerprint covers the weights, the tokens and every setting that shapes the logits, so a file
of another model, of other data or of another rope is never taken for this run's.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from redi.config import TrainConfig
from redi.data.pack import Pack, pack_step
from redi.data.tokenize import Trace
from redi.errors import RediError
from redi.files import digest_file, publish, usual_mode
from redi.training import distributed
from redi.training.fingerprint import hash_tokens
from redi.training.logging import ticker
from redi.training.model import PackedLM, sequence_logps

CHUNK = 1024  # traces that are shared out among the ranks at a time
# Of a transformers config: what changes without the logits changing.
NAMES = {"_name_or_path", "transformers_version", "dtype", "architectures"}


def with_reference(
    examples: list[list[Trace]], model: PackedLM, config: TrainConfig, ranks: distributed.Ranks
) -> list[list[Trace]]:
    """The examples, each trace with its `ref_logp` under `model`, which holds its starting weights.

    Reads them from `config.output_dir` if an earlier start of this run left them there. A
    collective. Raises RediError if the file cannot be written.
    """
    traces = [trace for example in examples for trace in example]
    fingerprint = _fingerprint(config, model, hash_tokens(examples)) if ranks.is_main else ""
    file = Path(config.output_dir) / f"reference-{fingerprint[:16]}.safetensors"
    known = _read(file, fingerprint, len(traces)) if ranks.is_main else None
    if distributed.any_rank(known is not None, ranks):
        logps = torch.zeros(len(traces)) if known is None else known
        logps = distributed.all_sum(logps.to(ranks.device))
    else:
        logps = _compute(traces, model, config, ranks)
        try:
            ranks.together(lambda: _write(file, fingerprint, logps), main=True)
        except OSError as error:
            raise RediError(f"{file}: could not be written ({error}); free space there") from None
    of_trace = iter(logps.tolist())
    return [[replace(t, ref_logp=next(of_trace)) for t in example] for example in examples]


def _compute(
    traces: list[Trace], model: PackedLM, config: TrainConfig, ranks: distributed.Ranks
) -> Tensor:
    """[traces] float32, the same on every rank."""

    def packs() -> Iterator[Pack]:
        squares = model.cost_of_squares()
        for start in range(0, len(traces), CHUNK):
            yield from pack_step(
                traces[start : start + CHUNK],
                model.pack_size(config.max_tokens_per_batch),
                rank=ranks.rank,
                world_size=ranks.world_size,
                squares=squares,
            )

    place = {(trace.example, trace.is_chosen): i for i, trace in enumerate(traces)}
    logps = torch.zeros(len(traces), device=ranks.device)
    done, tick = 0, ticker("reference log-probs, traces of this rank")
    for pack, sum_S, _ in sequence_logps(model, packs()):
        sides = zip(pack.examples, pack.is_chosen_S.tolist(), strict=True)
        logps[[place[side] for side in sides]] += sum_S  # 0 for a pack without targets
        done += len(pack.examples)
        if ranks.is_main:
            tick(done)
    distributed.reshard(model)
    return distributed.all_sum(logps)


def _fingerprint(config: TrainConfig, model: PackedLM, tokens: str) -> str:
    lm_config = model.lm.config
    folder = Path(config.model_name_or_path or "")
    weights: Any  # what they come from
    if config.model_name_or_path is None:
        weights = config.seed
    elif folder.is_dir():
        weights = [digest_file(file) for file in sorted(folder.glob("*.safetensors"))]
    else:  # a hub name; transformers notes the commit it found there
        weights = [config.model_name_or_path, getattr(lm_config, "_commit_hash", None)]
    settings = {
        "config": {k: v for k, v in lm_config.to_dict().items() if k not in NAMES},
        "bf16": config.bf16,
        "device": next(model.parameters()).device.type,
        "tokens": tokens,
        "weights": weights,
    }
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()


def _read(file: Path, fingerprint: str, num_traces: int) -> Tensor | None:
    """None when there is no whole file of this fingerprint: it is then made anew."""
    try:
        with safe_open(file, "pt") as content:
            logps = content.get_tensor("logps")
            same = (content.metadata() or {}).get("fingerprint") == fingerprint
    except (OSError, SafetensorError):
        return None
    return logps if same and len(logps) == num_traces and logps.isfinite().all() else None


def _write(file: Path, fingerprint: str, logps: Tensor) -> None:
    aside = file.with_name(f"{file.name}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"logps": logps.cpu()}, aside, {"fingerprint": fingerprint})
        usual_mode(aside)
        publish(aside.parent, {aside.name: file})
    except (OSError, SafetensorError) as error:
        aside.unlink(missing_ok=True)
        raise OSError(error) from error
