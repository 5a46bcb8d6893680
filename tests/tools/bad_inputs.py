"""What people get wrong: what a kind of it is, and the small folder that all kinds start from.

Every command runs in a fresh copy of the folder that `make_world` builds, with relative paths.
"""

import io
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import tiny
import torch
import yaml
from made_up import write_eval
from safetensors.torch import load_file, save_file

PAIR = tiny.pair_rows(1)[0]
RAW = [
    {"problem": "1+1=?", "answer": "2", "generations": ["1+1 #### 2", "1+1 #### 3"]},
    {"problem": "2+2=?", "answer": "4", "generations": ["2+2 #### 5", "2+2 #### 4"]},
]
TRAIN = {
    "architecture": tiny.architecture(tie_word_embeddings=True),
    "tokenizer_name_or_path": "tokenizer",
    "dataset_name": "pairs.jsonl",
    "output_dir": "out",
    "max_steps": 1,
    "train_batch_size": 4,
    "learning_rate": 1e-3,
}
RUN = {
    "name": "tiny",
    "output_dir": "run",
    "task": {"num_problems": 30, "num_pretrain": 30, "num_validation": 5, "num_test": 5},
    "sft": {
        "tokenizer_name_or_path": "{task}/tokenizer",
        "architecture": tiny.architecture(vocab_size=32, num_hidden_layers=1),
        "max_steps": 1,
    },
    "arms": {"redi": {"alpha": 0.8, "max_steps": 1}},
    "eval": {"dataset_name": "{task}/test.jsonl", "num_samples": 1, "max_new_tokens": 4},
}
STUDY = {
    "output_dir": "study",
    "results": "results.json",
    "tasks": {"tiny": "run.yaml"},
    "arms": {"control": {"settings": {"alpha": 0.0}, "learning_rates": [1e-4, 1e-3]}},
    "seeds": [1],
}
EVAL = "eval --model model --dataset_name test.jsonl --output_dir answers --max_new_tokens 4"
BUILD = "data build --path raw.jsonl --output_dir built"
TRAINS = "train --config recipe.yaml"
SHOW = "data show pairs.jsonl --tokenizer tokenizer"
TRACES = "traces model model --dataset_name pairs.jsonl --output page.html"

Content = str | bytes | list | dict | None  # text, bytes, rows, YAML; None removes the file


@dataclass(frozen=True)
class Kind:
    """One kind of bad input: `files` are put into the folder, `change` may do more, then `redi
    <command>` must end with `code` and one line that holds `words`."""

    name: str
    command: str
    words: tuple[str, ...]
    files: dict[str, Content] = field(default_factory=dict)
    change: Callable[[Path], Any] | None = None
    code: int = 2
    environment: dict[str, str] = field(default_factory=dict)


def kind(name: str, command: str, *words: str, **more: Any) -> Kind:
    return Kind(name, command, words, **more)


def changed(recipe: dict, **changes: Any) -> dict:
    return {key: value for key, value in (recipe | changes).items() if value is not None}


def make_world(folder: Path, redi: Callable[..., Any]) -> None:
    """`redi(*words)` runs the command line in `folder`."""
    tiny.save_tokenizer(folder / "tokenizer")
    tiny.write_jsonl(folder / "pairs.jsonl", tiny.pair_rows())
    tiny.write_jsonl(folder / "raw.jsonl", RAW)
    tiny.write_jsonl(folder / "test.jsonl", RAW)
    for name, recipe in (("recipe", TRAIN), ("run", RUN), ("study", STUDY)):
        put(folder / f"{name}.yaml", recipe)
    for name in ("one", "two"):
        write_eval(folder / "evals" / name, [[1, 0], [0, 1]])
    (folder / "bench").mkdir()
    (folder / "bench" / "aime.json").write_text(json.dumps(RAW))
    (folder / "notes.txt").write_text("mine")
    redi("train", "--config", "recipe.yaml", "--output_dir", "model")
    redi("data", "build", "--path", "raw.jsonl", "--output_dir", "data")


def put(file: Path, content: Content) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    if content is None:
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    elif isinstance(content, bytes):
        file.write_bytes(content)
    elif isinstance(content, dict):
        file.write_text(yaml.safe_dump(content))
    elif isinstance(content, list):
        file.write_text("".join(json.dumps(row) + "\n" for row in content))
    else:
        file.write_text(content)


def parquet(rows: list[dict] | pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), sink)
    return sink.getvalue()


def arrow(rows: list[dict]) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def weights(edit: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        tensors = load_file(folder / "model" / "model.safetensors")
        edit(tensors)
        save_file(tensors, folder / "model" / "model.safetensors", {"format": "pt"})

    return change


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "model" / "model.safetensors")
    torch.save(tensors, folder / "model" / "pytorch_model.bin")
    (folder / "model" / "model.safetensors").unlink()


def loop(name: str) -> Callable[[Path], None]:
    return lambda folder: os.symlink(name, folder / name)


def cut(name: str, size: int) -> Callable[[Path], None]:
    """The first `size` bytes (below 0: all but so many)."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])
