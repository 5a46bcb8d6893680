"""What people get wrong: a row for each kind, and the small folder that all of them start from.

tests/redi/test_bad_input.py runs them. Every command runs in a fresh copy of the folder that
`make_world` builds, with relative paths.
"""

import gzip
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


COMMAND_LINE = [
    kind("no such command", "trian", "trian"),
    kind("an option before the command", "--verbose train", "--verbose"),
    kind("run without its recipe", "run", "recipe"),
    kind("eval without a model", "eval --dataset_name test.jsonl --output_dir answers", "--model"),
    kind("train without anything", "train", "dataset_name is required", "output_dir is required"),
    kind("a stray word", f"{TRAINS} stray", "stray", "--field value"),
    kind("a field without a value", f"{TRAINS} --max_steps", "--max_steps: needs a value"),
    kind("a field with a dash", f"{TRAINS} -alpha 1", "-alpha"),
    kind("a field without a name", f"{TRAINS} --=3", "unknown key"),
    kind("a mistyped field", f"{TRAINS} --learning_rat 1", "learning_rat", "learning_rate?"),
    kind("a field of another trainer", f"{TRAINS} --packing true", "packing", "always packed"),
    kind("a section where there is none", f"{TRAINS} --alpha.x 1", "alpha"),
    kind("a field inside a mistyped section", f"{TRAINS} --architectur.x 1", "architecture?"),
    kind("a value that is half YAML", f"{TRAINS} --seed [1", "seed"),
    kind("negative GPUs", "plan recipe.yaml --gpus -1", "--gpus"),
    kind("GPUs in words", "plan recipe.yaml --gpus many", "--gpus", "integer"),
    kind("no memory", "plan recipe.yaml --gpu-memory -5", "--gpu-memory"),
    kind("memory that is no number", "plan recipe.yaml --gpu-memory nan", "--gpu-memory"),
    kind("infinite memory", "plan recipe.yaml --gpu-memory inf", "--gpu-memory"),
    kind("an unknown GPU", "plan recipe.yaml --gpu Z9", "Z9", "H100"),
    kind("a mean trace of no tokens", "plan recipe.yaml --mean-length 0", "--mean-length"),
    kind("no problems to draw", f"{TRACES} --num_problems 0", "--num_problems"),
    kind("an unknown order", f"{TRACES} --sort size", "--sort", "size"),
    kind("row 0", f"{SHOW} --row 0", "--row"),
    kind("a row beyond the last", f"{SHOW} --row 999", "pairs.jsonl", "12"),
    kind("an id that is not there", f"{SHOW} --id nobody", "pairs.jsonl", "nobody"),
    kind("row and id", f"{SHOW} --row 1 --id sum-1", "--row and --id"),
    kind("an empty output_dir", "data build --path raw.jsonl --output_dir=", "--output_dir"),
    kind("an empty output_dir in a recipe", TRAINS, "output_dir",
         files={"recipe.yaml": TRAIN | {"output_dir": ""}}),
    kind("compare with an unknown baseline", "compare evals/one evals/two --baseline x", "x", "one"),
]  # fmt: skip

RECIPES = [
    kind("a missing recipe", "train --config none.yaml", "none.yaml", "no such recipe"),
    kind("a folder for a recipe", "plan tokenizer", "tokenizer", "no such recipe"),
    kind("a recipe that leads to itself", "run circle.yaml", "circle.yaml", change=loop("circle.yaml")),
    kind("a recipe that is cut off", TRAINS, "recipe.yaml", "line 1", files={"recipe.yaml": "a: [1,"}),
    kind("tabs in a recipe", TRAINS, "recipe.yaml", files={"recipe.yaml": "a:\n\t- 1"}),
    kind("bytes for a recipe", TRAINS, "recipe.yaml", files={"recipe.yaml": b"\x00\xff\x89PNG"}),
    kind("a recipe in Latin-1", TRAINS, "recipe.yaml", files={"recipe.yaml": b"name: \xe9\n"}),
    kind("a recipe that is a list", "run run.yaml", "run.yaml", "mapping", files={"run.yaml": [1]}),
    kind("a recipe that is a word", TRAINS, "recipe.yaml", "mapping", files={"recipe.yaml": "hello"}),
    kind("an empty recipe", TRAINS, "recipe.yaml", "is required", files={"recipe.yaml": ""}),
    kind("numbers for field names", TRAINS, "recipe.yaml", "1", files={"recipe.yaml": TRAIN | {1: 2}}),
    kind("a field twice", TRAINS, "recipe.yaml", "alpha",
         files={"recipe.yaml": "alpha: 0.1\nalpha: 0.9\n" + yaml.safe_dump(TRAIN)}),
    kind("an arm twice", "run run.yaml", "run.yaml", "redi",
         files={"run.yaml": yaml.safe_dump(changed(RUN, arms=None))
                + "arms: {redi: {alpha: 0.1}, redi: {alpha: 0.9}}\n"}),
    kind("a recipe nested without end", TRAINS, "recipe.yaml", files={"recipe.yaml": "[" * 5000}),
    kind("a Python object in a recipe", TRAINS, "recipe.yaml",
         files={"recipe.yaml": "alpha: !!python/object/apply:os.getcwd []"}),
    kind("a run's recipe for train", "train --config run.yaml", "run.yaml", "unknown key arms"),
    kind("a stage's recipe for run", "run recipe.yaml", "recipe.yaml", "unknown key"),
    kind("a zero byte in a path", TRAINS, "dataset_name",
         files={"recipe.yaml": TRAIN | {"dataset_name": "a\0b"}}),
    kind("a negative weight", f"{TRAINS} --alpha -0.1", "alpha"),
    kind("a weight that is no number", TRAINS, "alpha", files={"recipe.yaml": TRAIN | {"alpha": float("nan")}}),
    kind("an infinite rate", f"{TRAINS} --learning_rate .inf", "learning_rate"),
    kind("a rate of 0", f"{TRAINS} --learning_rate 0", "learning_rate"),
    kind("a seed too large", f"{TRAINS} --seed 99999999999999999999", "seed"),
    kind("half a step", f"{TRAINS} --max_steps 1.5", "max_steps"),
    kind("no steps", f"{TRAINS} --max_steps 0", "max_steps"),
    kind("a list for a text", TRAINS, "dataset_name", files={"recipe.yaml": TRAIN | {"dataset_name": ["a"]}}),
    kind("true for a number", TRAINS, "train_batch_size",
         files={"recipe.yaml": TRAIN | {"train_batch_size": True}}),
    kind("true for a rate", TRAINS, "learning_rate", files={"recipe.yaml": TRAIN | {"learning_rate": True}}),
    kind("a number for a switch", TRAINS, "bf16", files={"recipe.yaml": TRAIN | {"bf16": 7}}),
    kind("a date for a name", "run run.yaml", "name", files={"run.yaml": RUN | {"name": [2024]}}),
    kind("an unknown objective", f"{TRAINS} --objective ppo", "objective", "simpo"),
    kind("fields that exclude each other", f"{TRAINS} --objective sft --beta 1", "sft has no beta"),
    kind("no model at all", TRAINS, "model_name_or_path",
         files={"recipe.yaml": changed(TRAIN, architecture=None)}),
    kind("a learning rate's list", TRAINS, "learning_rate",
         files={"recipe.yaml": TRAIN | {"learning_rate": [1e-3]}}),
]  # fmt: skip


def architecture(**changes: Any) -> dict[str, Content]:
    return {"recipe.yaml": TRAIN | {"architecture": TRAIN["architecture"] | changes}}


ARCHITECTURES = [
    kind("an architecture without a type", TRAINS, "architecture", "model_type",
         files={"recipe.yaml": TRAIN | {"architecture": {"hidden_size": 8}}}),
    kind("an unknown model type", TRAINS, "qwen99", files=architecture(model_type="qwen99")),
    kind("a model that is no language model", TRAINS, "vit", files=architecture(model_type="vit")),
    kind("heads that do not divide", TRAINS, "heads",
         files=architecture(hidden_size=30, num_attention_heads=7, num_key_value_heads=2)),
    kind("a size in words", TRAINS, "hidden_size", files=architecture(hidden_size="large")),
    kind("a negative size", TRAINS, "architecture", files=architecture(hidden_size=-8)),
    kind("no blocks", "plan recipe.yaml", "no list of blocks", files=architecture(num_hidden_layers=0)),
    kind("a size that does not exist", TRAINS, "hidden_act?", files=architecture(hiden_act="gelu")),
    kind("an unknown activation", TRAINS, "sillu", files=architecture(hidden_act="sillu")),
    kind("a vocabulary below the tokenizer's", TRAINS, "embeddings for 16", files=architecture(vocab_size=16)),
]  # fmt: skip

MODEL = {"recipe.yaml": changed(TRAIN, architecture=None, tokenizer_name_or_path=None,
                                model_name_or_path="model")}  # fmt: skip
MODELS = [
    kind("a model that is not there", f"{TRAINS} --model_name_or_path ./none", "./none", files=MODEL),
    kind("a mistyped folder as a Hub name", f"{TRAINS} --model_name_or_path evals/none", "evals/none",
         files=MODEL),
    kind("a file for a model", f"{TRAINS} --model_name_or_path notes.txt", "notes.txt", files=MODEL),
    kind("a folder without a config", f"{TRAINS} --model_name_or_path bench", "bench", "config.json",
         files=MODEL),
    kind("a config that is cut off", TRAINS, "model", "config.json", files=MODEL,
         change=cut("model/config.json", 40)),
    kind("a config that is a list", TRAINS, "model", files=MODEL | {"model/config.json": "[1]"}),
    kind("a config without a type", TRAINS, "model", files=MODEL | {"model/config.json": "{}"}),
    kind("an empty config", TRAINS, "model", files=MODEL | {"model/config.json": ""}),
    kind("no weights", TRAINS, "model", files=MODEL | {"model/model.safetensors": None}),
    kind("weights that are cut off", TRAINS, "model", files=MODEL,
         change=cut("model/model.safetensors", -999)),
    kind("empty weights", TRAINS, "model", files=MODEL | {"model/model.safetensors": b""}),
    kind("weights that are text", TRAINS, "model",
         files=MODEL | {"model/model.safetensors": "version https://git-lfs.github.com/spec/v1\n"}),
    kind("a weight too few", TRAINS, "missing: model.norm.weight", files=MODEL,
         change=weights(lambda t: t.pop("model.norm.weight"))),
    kind("a weight too many", TRAINS, "unexpected: extra", files=MODEL,
         change=weights(lambda t: t.update(extra=torch.ones(2)))),
    kind("a weight of another shape", TRAINS, "of another shape", files=MODEL,
         change=weights(lambda t: t.update({"model.norm.weight": torch.ones(3)}))),
    kind("weights that are NaN", TRAINS, "", files=MODEL,
         change=weights(lambda t: t["model.norm.weight"].fill_(float("nan")))),
    kind("pickled weights", TRAINS, "pytorch_model.bin", "pickle", files=MODEL, change=pickled),
    kind("pickled weights to answer with", EVAL, "pytorch_model.bin", change=pickled),
    kind("an index without its shards", TRAINS, "model",
         files=MODEL | {"model/model.safetensors": None, "model/model.safetensors.index.json":
                        '{"weight_map": {"model.norm.weight": "a.safetensors"}}'}),
    kind("an index that is no JSON", TRAINS, "model",
         files=MODEL | {"model/model.safetensors": None,
                        "model/model.safetensors.index.json": "oops"}),
    kind("an adapter beside the model", TRAINS, "adapter_config.json",
         files=MODEL | {"model/adapter_config.json": "{}"}),
    kind("code that is not trusted", TRAINS, "custom code", files=MODEL,
         change=lambda folder: put(folder / "model/config.json", json.dumps(
             json.loads((folder / "model/config.json").read_text())
             | {"model_type": "mine", "auto_map": {"AutoConfig": "mine.C", "AutoModelForCausalLM": "mine.M"}}))),
    kind("no tokenizer", f"{TRAINS} --tokenizer_name_or_path bench", "bench", "no tokenizer"),
    kind("a tokenizer that is cut off", TRAINS, "tokenizer",
         change=cut("tokenizer/tokenizer.json", 200)),
    kind("an empty tokenizer", TRAINS, "tokenizer", files={"tokenizer/tokenizer.json": ""}),
    kind("a tokenizer of nonsense", TRAINS, "tokenizer", files={"tokenizer/tokenizer.json": "{}"}),
    kind("a tokenizer that is not there", f"{BUILD} --tokenizer ./none", "./none", "no tokenizer"),
    kind("a file for a tokenizer", "data show pairs.jsonl --tokenizer notes.txt", "notes.txt"),
    kind("a template that is not there", f"{TRAINS} --chat_template none.jinja", "none.jinja"),
    kind("a template that is cut off", f"{TRAINS} --chat_template t.jinja", "template",
         files={"t.jinja": "{% for m in messages %}"}),
    kind("a template that raises", f"{TRAINS} --chat_template t.jinja", "no systems",
         files={"t.jinja": "{{ raise_exception('no systems') }}"}),
    kind("a template of other fields", f"{TRAINS} --chat_template t.jinja", "template",
         files={"t.jinja": "{{ messages[0].text.upper() }}"}),
    kind("a template in UTF-16", f"{TRAINS} --chat_template t.jinja", "t.jinja",
         files={"t.jinja": "{{ messages }}".encode("utf-16")}),
    kind("a folder for a template", f"{TRAINS} --chat_template bench", "bench"),
    kind("chat without a template", TRAINS, "chat template",
         files={"tokenizer/chat_template.jinja": None}),
    kind("arguments that are no mapping", f"{TRAINS} --chat_template_kwargs 3", "chat_template_kwargs"),
]  # fmt: skip


def data(name: str, content: Content, *words: str, file: str = "bad.jsonl", **more: Any) -> Kind:
    return kind(name, f"{TRAINS} --dataset_name {file}", *(words or (file,)),
                files={file: content, **more})  # fmt: skip


def row(name: str, *words: str, command: str = TRAINS, **columns: Any) -> Kind:
    """A row between good ones; null stays, `...` takes a column away."""
    bad = {key: value for key, value in (PAIR | columns).items() if value is not ...}
    return kind(f"row: {name}", f"{command} --dataset_name bad.jsonl", "bad.jsonl line 2", *words,
                files={"bad.jsonl": [PAIR, bad, PAIR]})  # fmt: skip


def dropped(name: str, *words: str, **columns: Any) -> Kind:
    """A row that training leaves out, and says so."""
    return kind(f"row: {name}", f"{TRAINS} --dataset_name bad.jsonl", *words, code=0,
                files={"bad.jsonl": [PAIR, PAIR | columns, PAIR]})  # fmt: skip


def said(role: str, content: Any, **more: Any) -> list[dict]:
    return [{"role": role, "content": content, **more}]


GOOD = lines(tiny.pair_rows())
DATA = [
    kind("data that is not there", f"{TRAINS} --dataset_name none.jsonl", "none.jsonl", "no such file"),
    kind("a folder without data", f"{TRAINS} --dataset_name bench", "bench", "aime.json"),
    kind("a folder of two splits", f"{TRAINS} --dataset_name two", "test-1.jsonl", "train-1.jsonl",
         files={"two/train-1.jsonl": [PAIR], "two/test-1.jsonl": [PAIR]}),
    kind("data that leads to itself", f"{TRAINS} --dataset_name circle.jsonl", "circle.jsonl",
         change=loop("circle.jsonl")),
    kind("a folder of one file's name", f"{TRAINS} --dataset_name x.jsonl", "x.jsonl",
         change=lambda folder: (folder / "x.jsonl").mkdir()),
    kind("a text file", f"{TRAINS} --dataset_name notes.txt", "notes.txt", ".parquet"),
    data("empty data", b"", "bad.jsonl", "no rows"),
    data("blank lines only", "\n\n", "bad.jsonl", "no rows"),
    data("bytes for data", b"\x89PNG\r\n\x1a\n\x00\xff", "bad.jsonl line 1"),
    data("data in UTF-16", GOOD.decode().encode("utf-16"), "bad.jsonl", "UTF-16"),
    data("data in Latin-1", b'{"prompt": "\xe9", "chosen": "a", "rejected": "b"}\n', "bad.jsonl line 1"),
    data("a list in every line", "[1]\n", "bad.jsonl line 1"),
    data("a line that is cut off", GOOD[:-20], "bad.jsonl line 12"),
    data("a column twice in a row", '{"prompt": "p", "chosen": "a", "chosen": "b", "rejected": "c"}\n',
         "bad.jsonl line 1", "chosen"),
    data("no gzip", GOOD, "bad.jsonl.gz", file="bad.jsonl.gz"),
    data("gzip that is cut off", gzip.compress(GOOD)[:-30], "bad.jsonl.gz", file="bad.jsonl.gz"),
    data("no zstd", GOOD, "bad.jsonl.zst", file="bad.jsonl.zst"),
    data("no xz", GOOD, "bad.jsonl.xz", file="bad.jsonl.xz"),
    data("no parquet", GOOD, "bad.parquet", file="bad.parquet"),
    data("an empty parquet file", b"", "bad.parquet", file="bad.parquet"),
    data("parquet that is cut off", parquet([PAIR])[:-20], "bad.parquet", file="bad.parquet"),
    data("parquet of no rows", parquet(pa.table({"prompt": pa.array([], pa.string())})),
         "bad.parquet", "no rows", file="bad.parquet"),
    data("parquet with a column twice", parquet(pa.Table.from_arrays(
        [pa.array(["p"]), pa.array(["a"]), pa.array(["b"])], ["prompt", "chosen", "chosen"])),
        "bad.parquet", "chosen", file="bad.parquet"),
    data("parquet of bytes", parquet([{"prompt": b"p", "chosen": b"a", "rejected": b"b"}]),
         "bad.parquet row 1", file="bad.parquet"),
    data("arrow that is cut off", arrow([PAIR])[:-60], "bad.arrow", file="bad.arrow"),
    data("no arrow", GOOD, "bad.arrow", file="bad.arrow"),
    data("one object in a .json", "{}", "bad.json", file="bad.json"),
    data("a number in a .json", "3", "bad.json", file="bad.json"),
    data("numbers in a .json", "[1, 2]", "bad.json", file="bad.json"),
    data("a .json nested without end", "[" * 100_000, "bad.json", file="bad.json"),
    data("positives for REDI", [{"prompt": "1", "completion": "2"}], "no rejected traces"),
    data("raw rows for training", RAW, "bad.jsonl line 1", "redi data build"),
    kind("traces that are all too long", f"{TRAINS} --max_length 4", "max_length 4"),
    kind("held-out rows that are not there", f"{TRAINS} --eval_dataset_name none.jsonl",
         "eval_dataset_name", "none.jsonl"),
    row("a column is missing", "rejected", chosen=..., rejected=...),
    row("a mistyped column", "choosen", chosen=..., rejected=..., choosen="x"),
    row("nothing in either side", "chosen", chosen=None, rejected=None),
    row("a number for a trace", "chosen", chosen=5),
    row("no messages", "chosen", chosen=[]),
    row("content that is null", "chosen[0]", chosen=said("assistant", None)),
    row("content in parts", "chosen[0]", chosen=said("assistant", [{"type": "text", "text": "2"}])),
    row("content that is a number", "chosen[0]", chosen=said("assistant", 4)),
    row("a message that is text", "chosen[0]", chosen=["2"]),
    row("a message without a role", "chosen[0]", chosen=[{"content": "2"}]),
    row("the user's word last", "assistant", chosen=said("user", "2")),
    kind("a role that no template knows", f"{TRAINS} --dataset_name bad.jsonl", "sum-0", "wizard",
         files={"bad.jsonl": [PAIR | {"prompt": said("wizard", "1+1")}]}),
    row("thoughts beside the content", "reasoning_content",
        chosen=said("assistant", "2", reasoning_content="hm")),
    row("a prompt that is null", "prompt", prompt=None),
    row("a prompt that is a number", "prompt", prompt=5),
    row("an empty prompt", "prompt", prompt=[]),
    dropped("an empty trace", "1 dropped (1 empty", chosen=said("assistant", "")),
    dropped("the same text on both sides", "1 dropped (1 chosen and rejected are the same text)",
            rejected=PAIR["chosen"]),
    row("an answer that is a list", "answer", answer=[1, 2]),
    row("a label in words", "label", chosen=..., rejected=..., completion="2", label="good"),
]  # fmt: skip

OUTPUTS = [
    kind("a file for an output folder", f"{TRAINS} --output_dir notes.txt", "notes.txt"),
    kind("an output folder in a file", f"{TRAINS} --output_dir notes.txt/out", "notes.txt"),
    kind("an output folder nobody may write", f"{TRAINS} --output_dir /proc/redi", "/proc/redi"),
    kind("an output folder that leads to itself", f"{TRAINS} --output_dir circle", "circle",
         change=loop("circle")),
    kind("a name too long", f"{TRAINS} --output_dir {'x' * 300}", "too long"),
    kind("output into the data", f"{TRAINS} --output_dir tokenizer", "output_dir", "tokenizer"),
    kind("output into the model", f"{TRAINS} --output_dir model", "model", files=MODEL),
    kind("output over another's model", f"{TRAINS} --output_dir theirs", "theirs",
         files={"theirs/config.json": "{}", "theirs/model.safetensors": "x"}),
    kind("another run's folder", f"{TRAINS} --output_dir model --alpha 0.3", "alpha (0.8 there, 0.3 now)"),
    kind("a longer run of a folder", f"{TRAINS} --output_dir model --max_steps 2", "max_steps"),
    kind("a result that is cut off", f"{TRAINS} --output_dir model", "train_result.json",
         change=cut("model/train_result.json", 30)),
    kind("a result of somebody else", f"{TRAINS} --output_dir out", "train_result.json",
         files={"out/train_result.json": '{"steps": 3}'}),
    kind("a checkpoint that is not there", f"{TRAINS} --resume_from_checkpoint none", "none"),
    kind("a checkpoint that is none", f"{TRAINS} --resume_from_checkpoint bench", "bench"),
    kind("a build over a file", "data build --path raw.jsonl --output_dir notes.txt", "notes.txt"),
    kind("a build over another's files", "data build --path raw.jsonl --output_dir mine", "pairs.parquet",
         files={"mine/pairs.parquet": "mine"}),
    kind("a build of other options", "data build --path raw.jsonl --output_dir data --judges any",
         "data", "judges"),
    kind("a build nobody may write", "data build --path raw.jsonl --output_dir /proc/x", "/proc/x"),
    kind("answers over a file", EVAL.replace("answers", "notes.txt"), "notes.txt"),
    kind("answers of another evaluation", EVAL.replace("answers", "evals/one"), "evals/one"),
    kind("answers nobody may write", EVAL.replace("answers", "/proc/x"), "/proc/x"),
    kind("a page over a folder", "report model --output bench", "bench"),
    kind("a page nobody may write", "report model --output /proc/x/page.html", "/proc/x"),
    kind("a page in a file", "compare evals/one evals/two --output notes.txt/c.html", "notes.txt"),
    kind("a comparison over a folder", "compare evals/one evals/two --output bench", "bench"),
    kind("data's page over a folder", "data report data --output bench", "bench"),
    kind("traces over a folder", TRACES.replace("page.html", "bench"), "bench"),
    kind("one row over a folder", f"{SHOW} --row 1 --output bench", "bench"),
]  # fmt: skip

BUILDS = [
    kind("raw data that is not there", BUILD.replace("raw", "none"), "none.jsonl"),
    kind("raw data that is empty", BUILD, "raw.jsonl", "no rows", files={"raw.jsonl": ""}),
    kind("raw bytes", BUILD, "raw.jsonl line 1", files={"raw.jsonl": b"\xff\x00\x01\x89"}),
    kind("raw rows of other columns", BUILD, "raw.jsonl line 1", "generations",
         files={"raw.jsonl": [{"question": "1", "response": "2"}]}),
    kind("raw rows without answers", BUILD, "raw.jsonl line 1", "answer",
         files={"raw.jsonl": [{"problem": "1", "generations": ["2"]}]}),
    kind("generations in one text", BUILD, "raw.jsonl line 1", "generations",
         files={"raw.jsonl": [RAW[0] | {"generations": "2"}]}),
    kind("verdicts of another length", BUILD, "raw.jsonl", "verdicts",
         files={"raw.jsonl": [RAW[0] | {"verdicts": [True]}]}),
    kind("verdicts in words", BUILD, "raw.jsonl line 1", "verdicts[0]",
         files={"raw.jsonl": [RAW[0] | {"verdicts": ["yes", "no"]}]}),
    kind("no wrong trace", BUILD, "no pairs left",
         files={"raw.jsonl": [RAW[0] | {"generations": ["#### 2"]}]}),
    kind("text and chat together", BUILD, "raw.jsonl line 2", "chat messages",
         files={"raw.jsonl": [{"prompt": "p", "chosen": "a", "rejected": "b"}, PAIR]}),
    kind("lengths without a tokenizer", f"{BUILD} --max_length 9", "tokenizer"),
    kind("a template without {problem}", f"{BUILD} --prompt_template x", "{problem}"),
    kind("an evaluation set that is not there", f"{BUILD} --decontaminate [none.jsonl]", "none.jsonl"),
    kind("an evaluation set of other columns", f"{BUILD} --decontaminate [bad.jsonl]",
         "bad.jsonl line 1", files={"bad.jsonl": [{"text": 1}]}),
    kind("an unknown judge", f"{BUILD} --judges me", "judges", "any"),
    kind("no workers", f"{BUILD} --num_workers 0", "num_workers"),
    kind("no time to judge", f"{BUILD} --verify_timeout 0", "verify_timeout"),
]  # fmt: skip

SERVER = EVAL + " --engine openai --base_url {server} --max_retries 0"
EVALUATIONS = [
    kind("problems that are not there", EVAL.replace("test.", "none."), "none.jsonl"),
    kind("problems without answers", EVAL, "test.jsonl line 1", "answer",
         files={"test.jsonl": [{"problem": "1"}]}),
    kind("answers that are null", EVAL, "test.jsonl line 1", "answer",
         files={"test.jsonl": [{"problem": "1", "answer": None}]}),
    kind("problems that are numbers", EVAL, "test.jsonl line 1", "problem",
         files={"test.jsonl": [{"problem": 1, "answer": "2"}]}),
    kind("no problems", EVAL, "test.jsonl", "no rows", files={"test.jsonl": ""}),
    kind("problems beyond the context", f"{EVAL} --max_new_tokens 9999", "9999"),
    kind("greedy and four samples", f"{EVAL} --temperature 0", "num_samples"),
    kind("a negative temperature", f"{EVAL} --temperature -1", "temperature"),
    kind("problems and benchmarks", f"{EVAL} --benchmarks aime24", "dataset_name and benchmarks"),
    kind("neither problems nor benchmarks", "eval --model model --output_dir answers", "benchmarks"),
    kind("an unknown benchmark", "eval --model model --output_dir answers --benchmarks aime --data_dir bench",
         "aime", "aime24"),
    kind("a benchmark without its file",
         "eval --model model --output_dir answers --benchmarks math500 --data_dir bench", "bench", "math500.json"),
    kind("a benchmark that is cut off",
         "eval --model model --output_dir answers --benchmarks aime24 --data_dir bench", "aime.json",
         change=cut("bench/aime.json", 30)),
    kind("benchmarks' folder that is not there",
         "eval --model model --output_dir answers --benchmarks aime24 --data_dir none", "none"),
    kind("pairs that are not there", f"{EVAL} --pairs_name none.jsonl", "none.jsonl"),
    kind("pairs of raw rows", f"{EVAL} --pairs_name raw.jsonl", "raw.jsonl line 1"),
    kind("samples that are cut off", "compare evals/one evals/two", "evals/one",
         change=cut("evals/one/generations.jsonl", 90)),
    kind("samples that are nobody's", "compare evals/one evals/two", "evals/one",
         files={"evals/one/generations.jsonl": [{"a": 1}]}),
    kind("figures that are cut off", "compare evals/one evals/two", "metrics.json",
         change=cut("evals/one/metrics.json", 9)),
    kind("figures that are a list", "compare evals/one evals/two", "metrics.json",
         files={"evals/one/metrics.json": "[1]"}),
    kind("an evaluation that is not there", "compare evals/none", "evals/none"),
    kind("an evaluation twice", "compare evals/one evals/one", "evals/one", "twice"),
    kind("a file for an evaluation", "compare notes.txt", "notes.txt"),
    kind("a server without an engine", f"{EVAL} --base_url http://x/v1", "base_url"),
    kind("an engine without a server", f"{EVAL} --engine openai", "base_url"),
    kind("a server that is not there", SERVER.format(server="http://127.0.0.1:9/v1"), "127.0.0.1:9"),
    kind("a server without http", SERVER.format(server="localhost:9/v1"), "localhost:9"),
    kind("a server by ftp", SERVER.format(server="ftp://localhost/v1"), "ftp"),
    kind("a server without a name", SERVER.format(server="http:///v1"), "http:///v1"),
    kind("a server with a space", EVAL + " --engine openai --max_retries 0 --base_url 'http://a b/v1'", "a b"),
    kind("a server that wants a key", SERVER.format(server="{server}/401"), "401", "OPENAI_API_KEY"),
    kind("a server without the model", SERVER.format(server="{server}/404"), "404", "base_url"),
    kind("a server that speaks HTML", SERVER.format(server="{server}/html"), "/html"),
    kind("a server that answers a list", SERVER.format(server="{server}/list"), "/list"),
    kind("a server in trouble", SERVER.format(server="{server}/500"), "500"),
    kind("a key that is no header", SERVER.format(server="{server}/401"), "OPENAI_API_KEY",
         environment={"OPENAI_API_KEY": "ke\ny"}),
]  # fmt: skip

RUNS = [
    *(kind(f"an arm called {arm!r}", "run run.yaml", "arms", files={"run.yaml": RUN | {"arms": {arm: {}}}})
      for arm in ("..", "../out", "a/b", "", "eval", "task", ".hidden", "a\nb")),
    kind("a list of arms", "run run.yaml", "arms", files={"run.yaml": RUN | {"arms": ["redi"]}}),
    kind("a mistyped field of a stage", "run run.yaml", "sft", "learning_rate?",
         files={"run.yaml": RUN | {"sft": RUN["sft"] | {"learning_rat": 1}}}),
    kind("a mistyped field of an arm", "run run.yaml", "redi", "alpha?",
         files={"run.yaml": RUN | {"arms": {"redi": {"alfa": 1}}}}),
    kind("a mistyped field of the evaluation", "run run.yaml", "eval", "num_samples?",
         files={"run.yaml": RUN | {"eval": RUN["eval"] | {"num_sample": 1}}}),
    kind("neither a task nor data", "run run.yaml", "task", files={"run.yaml": changed(RUN, task=None)}),
    kind("a task and data", "run run.yaml", "task", files={"run.yaml": RUN | {"data": {"path": "raw.jsonl"}}}),
    kind("a baseline that is no arm", "run run.yaml", "baseline", files={"run.yaml": RUN | {"baseline": "x"}}),
    kind("raw data of a run that is not there", "run run.yaml", "data", "none.jsonl",
         files={"run.yaml": changed(RUN, task=None, data={"path": "none.jsonl"})}),
    kind("a model of a run that is not there", "run run.yaml", "sft", "./none",
         files={"run.yaml": RUN | {"sft": {"model_name_or_path": "./none"}}}),
    kind("questions of a run that are not there", "run run.yaml", "eval", "none.jsonl",
         files={"run.yaml": RUN | {"eval": {"dataset_name": "none.jsonl"}}}),
    kind("a run in a file", "run run.yaml --output_dir notes.txt", "notes.txt"),
    kind("a run over a folder of mine", "run run.yaml", "run/task", files={"run/task/mine.txt": "mine"}),
    kind("a run over data of mine", "run run.yaml", "run/data", files={"run/data/pairs.parquet": "mine"}),
    kind("a run over a model of mine", "run run.yaml", "run/sft", files={"run/sft/model.safetensors": "mine"}),
    kind("a run over answers of mine", "run run.yaml", "run/eval",
         files={"run/eval/sft/generations.jsonl": "mine"}),
    kind("a run under torchrun", "run run.yaml", "torchrun", environment={"WORLD_SIZE": "2"}),
    kind("a rank in words", TRAINS, "RANK", environment={"RANK": "first", "WORLD_SIZE": "2"}),
    kind("a world in words", TRAINS, "WORLD_SIZE", environment={"WORLD_SIZE": "all"}),
    kind("a rank beyond the world", TRAINS, "RANK", environment={
        "RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}),
    kind("a world without a master", TRAINS, "MASTER_ADDR", environment={"RANK": "0", "WORLD_SIZE": "2"}),
    kind("a report of no run", "report tokenizer", "tokenizer", "no run"),
    kind("a report of a file", "report notes.txt", "notes.txt"),
    kind("a report of nothing", "report none", "none"),
    kind("a run's recipe that is a list", "report model", "recipe.yaml", files={"model/recipe.yaml": [1]}),
    kind("a log that is nobody's", "report model", "metrics.jsonl", files={"model/metrics.jsonl": "oops\n"}),
    kind("a log of lists", "report model", "metrics.jsonl", files={"model/metrics.jsonl": "[1]\n"}),
    kind("a log of words", "report model", "metrics.jsonl",
         files={"model/metrics.jsonl": [{"step": "one", "loss": "low"}]}),
    kind("a build's report that is cut off", "data report data", "report.json",
         change=cut("data/report.json", 99)),
    kind("a build's report of somebody else", "data report data", "report.json",
         files={"data/report.json": '{"counts": 3}'}),
    kind("a report of no build", "data report bench", "bench", "report.json"),
    kind("traces of a model that is not there", TRACES.replace("model model", "model ./none"), "./none"),
    kind("traces of raw rows", TRACES.replace("pairs", "raw"), "raw.jsonl line 1"),
    kind("traces of data that is not there", TRACES.replace("pairs", "none"), "none.jsonl"),
]  # fmt: skip


def study(name: str, *words: str, command: str = "study study.yaml", files: dict | None = None,
          **changes: Any) -> Kind:  # fmt: skip
    return kind(name, command, *words, files={"study.yaml": STUDY | changes} | (files or {}))


STUDIES = [
    study("a study of a recipe that is not there", "none.yaml", tasks={"tiny": "none.yaml"}),
    study("a study of a stage's recipe", "recipe.yaml", tasks={"tiny": "recipe.yaml"}),
    study("a task that leaves the folder", "tasks", tasks={"../x": "run.yaml"}),
    study("one rate", "learning_rates", arms={"control": {"learning_rates": [1e-4]}}),
    study("a negative rate", "learning_rate", arms={"control": {"learning_rates": [-1.0, 1e-4]}}),
    study("a rate in words", "learning_rates.0", arms={"control": {"learning_rates": ["low", 1]}}),
    study("a mistyped field of a study's arm", "control", "alpha?",
          arms={"control": {"settings": {"alfa": 1}, "learning_rates": [1e-4, 1e-3]}}),
    study("a seed that chose", "seed 0", seeds=[0]),
    study("a negative seed", "seeds", seeds=[-1]),
    study("a baseline that is no arm of the study", "baseline", baseline="x"),
    study("results that are cut off", "results.json", files={"results.json": "[{"}),
    study("results of somebody else", "results.json", files={"results.json": '{"a": 1}'}),
    study("a folder for results", "bench", results="bench"),
    study("no results to report", "results.json", command="study study.yaml --report"),
    study("a study in a file", "notes.txt", output_dir="notes.txt"),
]  # fmt: skip

KINDS = [*COMMAND_LINE, *RECIPES, *ARCHITECTURES, *MODELS, *DATA, *OUTPUTS, *BUILDS, *EVALUATIONS,
         *RUNS, *STUDIES]  # fmt: skip
