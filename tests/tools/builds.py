"""Raw rows, and what `redi data build` makes of them."""

import json
import shutil

from redi.config import DataConfig
from redi.data.build import build
from redi.data.read import read_examples

OUTPUTS = ["pairs.parquet", "positives.parquet", "report.json", "report.txt"]


def raw(generations, answer="2", **columns):
    return {"problem": "1+1?", "answer": answer, "generations": generations, **columns}


def write(folder, rows, name="raw.jsonl"):
    file = folder / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(folder, rows, tokenizer=None, duplicates="keep", anew=True, **config):
    """The problems are all the same one; a build that is there goes first."""
    if anew:
        shutil.rmtree(folder / "out", ignore_errors=True)
    config = {"num_workers": 1, "duplicates": duplicates} | config
    config = DataConfig(path=str(write(folder, rows)), **config)
    return build(config, folder / "out", tokenizer=tokenizer)


def texts(folder, name):
    examples = read_examples(folder / "out" / f"{name}.parquet")
    return [(example.chosen, example.rejected) for example in examples]


def outputs(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
