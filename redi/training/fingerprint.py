"""Which run an output folder belongs to, so that work is neither repeated nor mixed up.

A run's identity is what decides its result: the settings that matter, the tokens it trains on, the
model it starts from. Checkpoints and results carry it.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import TrainConfig
from redi.data.tokenize import Tokenized, Trace
from redi.errors import RediError
from redi.files import digest_file, read_json, write_text
from redi.training.distributed import Ranks

RESULT = "train_result.json"
# Free to differ before and after an interruption: what changes at most rounding, and paths, since
# what is read from them is part of the identity itself (and folders may be moved).
FREE = {
    "model_name_or_path", "tokenizer_name_or_path", "dataset_name", "chat_template",
    "output_dir", "logging_steps", "save_steps", "save_total_limit", "resume_from_checkpoint",
    "max_tokens_per_batch", "gradient_checkpointing", "kept_blocks", "use_liger_kernel",
    "torch_compile", "expected_examples", "nonfinite",
    "report_to", "eval_dataset_name", "eval_steps", "collapse_guard", "model_check",
}  # fmt: skip


LENGTH = {"max_steps", "num_train_epochs"}


@dataclass(frozen=True)
class TrainResult:
    output_dir: Path
    steps: int
    metrics: dict[str, float]  # the last logged step's
    num_examples: int
    num_dropped: int


def identify(config: TrainConfig, data: Tokenized) -> dict[str, Any]:
    """The run's identity as JSON."""
    settings = {k: v for k, v in config.model_dump().items() if k not in FREE}
    return {**settings, "tokens": hash_tokens(data.traces), "start": _starting_model(config)}


def hash_tokens(examples: list[list[Trace]]) -> str:
    """Of everything the model is trained on, in order."""
    tokens = hashlib.sha256()
    for example in examples:
        for trace in example:
            tokens.update(trace.input_ids.tobytes())
            tokens.update(b"%d,%d;" % (trace.num_prompt_tokens, trace.is_chosen))
    return tokens.hexdigest()


def check_same(
    where: Path, saved: dict[str, Any], wanted: dict[str, Any], *, any_length: bool = False
) -> None:
    """Raises RediError that names what differs between the run found at `where` and this one, but
    for how long they are if that may be `any_length`."""
    # A field that a newer version added had its default's effect when `saved` was written.
    saved = {k: f.default for k, f in TrainConfig.model_fields.items() if k in wanted} | saved
    differ = [key for key, value in wanted.items() if saved.get(key) != value]
    if any_length or set(differ) - LENGTH:  # that something else differs is the news
        differ = [key for key in differ if key not in LENGTH]
    if not differ:
        return
    key = differ[0]
    there, now = saved.get(key), wanted[key]
    if key == "tokens":
        what = "the data or its tokenization"
    elif key == "start":
        what = f"the starting model{_differing_files(there, now)}"
    else:
        what = f"{key} ({there} there, {now} now)"
    raise RediError(
        f"{where}: belongs to a run that differs in {what}; "
        "choose another output_dir, or remove that folder to start anew"
        + ("; to train it on for longer: another output_dir, and resume_from_checkpoint with the "
           "path of its last checkpoint" if key in LENGTH else "")
    )  # fmt: skip


def write_result(result: TrainResult, identity: dict[str, Any]) -> None:
    """Marks the folder as holding this run's result; the last thing a run writes."""
    content = {
        "identity": identity,
        "steps": result.steps,
        "metrics": result.metrics,
        "num_examples": result.num_examples,
        "num_dropped": result.num_dropped,
    }
    write_text(result.output_dir / RESULT, json.dumps(content, indent=2) + "\n")


def agreed(identity: dict[str, Any], ranks: Ranks) -> dict[str, Any]:
    """The run's identity. Raises RediError on all ranks where one reads other data or another
    model: each packs for itself, and they would wait for each other for ever."""
    if any(other != identity for other in ranks.gather(identity)):
        raise RediError("ranks read different data or models: give all nodes the same files")
    return identity


def read_result(output_dir: Path, identity: dict[str, Any]) -> TrainResult | None:
    """This run's result if `output_dir` holds it. Raises RediError if it holds another run's."""
    file = output_dir / RESULT
    if not file.exists():
        return None
    content = read_json(file)
    try:
        there = content.pop("identity")
        result = TrainResult(output_dir, **content)
    except (KeyError, TypeError):
        raise RediError(f"{file}: not the result of redi train; move it away") from None
    check_same(file, there, identity)
    return result


def _starting_model(config: TrainConfig) -> str | dict[str, str]:
    """Of a local folder: the sha256 of each file that decides what the model computes."""
    folder = Path(config.model_name_or_path or "")
    if config.model_name_or_path is None or not folder.is_dir():
        return str(config.model_name_or_path)
    files = [folder / "config.json", *folder.glob("*.safetensors")]
    # DPO keeps its reference beside the model (redi/training/dpo_reference.py); no part of it.
    files = [f for f in files if f.is_file() and not f.name.startswith("reference-")]
    return {file.name: digest_file(file) for file in sorted(files)}


def _differing_files(there: Any, now: Any) -> str:
    if not isinstance(now, dict):
        return ""
    if not isinstance(there, dict):
        return ", or is of an older version of redi, which did not compare what its files hold"
    return f" ({', '.join(n for n in sorted(there | now) if there.get(n) != now.get(n))})"
