"""Exports read by an older transformers: are tokens, templates and logits the same there?

    pip install --target FOLDER --no-deps transformers==4.57.6 'huggingface_hub<1' \\
        'tokenizers>=0.22,<=0.23.0' requests urllib3 charset_normalizer idna certifi
    python bench/export_check.py --transformers FOLDER

Tiny random models of the text families that people serve most, each with a small tokenizer of the
kind that family has. One stage starts from files as transformers 4 wrote them, a second one from
the first one's export, a third from the start as transformers 5 saves it; each trains for a step,
and the exports are read by both versions.
Servers (vLLM, SGLang) are not run here: they read the same files through their own code.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
TEXTS = [
    "", "12 + 34 = 46", "  two spaces, a\ttab\n\nand lines",
    "Größe 北京 🙂", "<think>so 1+1=2</think>", "Don't  stop at 1234567 or 3.14",
    "<|im_end|><eos></s><|eot_id|>", " a b  c   d",
]  # fmt: skip
PIECES = [
    "12",
    " ",
    "  ",
    "\n",
    "+",
    "=",
    "a",
    "The",
    " the",
    "stop",
    "é",
    "北",
    "<",
    "|",
    ">",
    "'s",
]
TEXTS += ["".join(random.Random(i).choices(PIECES, k=12)) for i in range(100)]
NAMED = ("bos_token", "eos_token", "pad_token", "unk_token")  # Gemma's has a mask in 5, none in 4
CHAT = [{"role": "user", "content": "12+34=?"}, {"role": "assistant", "content": "46"}]
COMMON = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512,
}  # fmt: skip
LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
GEMMA = {"sliding_window": 6, "query_pre_attn_scalar": 8, "tie_word_embeddings": True}
# model_type, what its config.json says besides, its tokenizer
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "Qwen2": ("qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}, "qwen"),
    "Qwen3": ("qwen3", {"rope_theta": 1e6}, "qwen"),
    "Llama 3": ("llama", {"rope_theta": 5e5, "rope_scaling": LLAMA3_ROPE}, "llama3"),
    "Llama 2": ("llama", {"rope_theta": 1e4}, "llama2"),
    "Mistral": ("mistral", {"rope_theta": 1e6, "sliding_window": 6}, "llama2"),
    "Gemma 2": ("gemma2", {**GEMMA, "rope_theta": 2e4}, "gemma"),
    "Gemma 3": ("gemma3_text", {**GEMMA, "rope_theta": 1e6, "rope_local_base_freq": 2e4,
                                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                                "layer_types": ["sliding_attention", "full_attention"]},
                "gemma"),
}  # fmt: skip


def read(folder: Path) -> dict[str, Any]:
    """What the transformers at hand makes of a model folder."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    lm, info = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    ids = torch.arange(40)[None] * 7 % lm.config.vocab_size
    with torch.no_grad():
        logits = lm.eval()(ids, use_cache=False).logits[0]
    return {
        "version": transformers.__version__,
        "class": type(tokenizer).__name__,
        "ids": [tokenizer(text)["input_ids"] for text in TEXTS],
        "bare ids": [tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS],
        "chat": [tokenizer.apply_chat_template(CHAT, tokenize=False),
                 tokenizer.apply_chat_template(CHAT[:1], tokenize=False,
                                               add_generation_prompt=True)],
        "decoded": [tokenizer.decode(tokenizer(text)["input_ids"], skip_special_tokens=True)
                    for text in TEXTS],
        "special": [getattr(tokenizer, f"{name}_id") for name in NAMED],
        "stops": lm.generation_config.eos_token_id,
        "misfits": sorted(str(key) for keys in info.values() for key in keys),
        "logits": logits.tolist(),
    }  # fmt: skip


def compare(here: dict[str, Any], there: dict[str, Any]) -> tuple[list[str], float]:
    """(what differs, the largest difference of a logit by the largest logit)."""
    import torch

    same = ("ids", "bare ids", "chat", "decoded", "special", "stops", "misfits")
    differing = [name for name in same if here[name] != there[name]]
    a, b = (torch.tensor(x["logits"], dtype=torch.float64) for x in (here, there))
    off = ((a - b).abs().max() / a.abs().max()).item() if a.shape == b.shape else float("inf")
    return differing + (["logits"] if not off < 1e-5 else []), off


def make_start(folder: Path, family: str) -> None:
    """A random model with config.json and tokenizer as transformers 4 wrote them."""
    import torch
    from small_tokenizers import write_tokenizer
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, settings, kind = FAMILIES[family]
    size = write_tokenizer(folder, kind)
    content = {"model_type": model_type, **COMMON, **settings, "vocab_size": size,
               "torch_dtype": "float32", "attention_dropout": 0.1}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.mul_(6 if parameter.ndim > 1 else 1).add_(0.1 * torch.randn(parameter.shape))
    lm.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(content))  # not as transformers 5 writes it


def make_exports(root: Path, family: str) -> list[Path]:
    """Of three stages."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from redi.training.loop import train

    make_start(root / "start", family)
    for kind in (AutoModelForCausalLM, AutoTokenizer):
        kind.from_pretrained(root / "start").save_pretrained(root / "saved by 5")
    rows = [{"id": str(i), "prompt": [{"role": "user", "content": f"{i}+{i}=?"}],
             "chosen": [{"role": "assistant", "content": str(2 * i)}]}
            for i in range(4)]  # fmt: skip
    data = root / "data" / "rows.jsonl"
    data.parent.mkdir()
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    exports = []
    for stage, start in {"first": "start", "second": "first", "third": "saved by 5"}.items():
        out = root / stage
        train({
            "model_name_or_path": str(root / start), "dataset_name": str(data),
            "output_dir": str(out), "objective": "sft", "max_steps": 1, "learning_rate": 1e-3,
        })  # fmt: skip
        exports.append(out)
    return exports


def read_elsewhere(folders: list[Path], packages: Path, output: Path) -> dict[str, Any]:
    """`read` of each folder in a process that finds `packages` first."""
    command = [sys.executable, __file__, "--read", str(output), *map(str, folders)]
    environment = {**os.environ, "PYTHONPATH": str(packages), "TRANSFORMERS_VERBOSITY": "error"}
    subprocess.run(command, env=environment, check=True)
    return json.loads(output.read_text())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--transformers", type=Path, help="folder that holds the older one")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("folders", nargs="*", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.read:
        found = {str(folder): read(folder) for folder in arguments.folders}
        arguments.read.write_text(json.dumps(found))
        return 0
    if arguments.transformers is None or not (arguments.transformers / "transformers").is_dir():
        parser.error("--transformers: a folder that pip --target has put transformers into")
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        exports = {name: make_exports(Path(folder, name), name) for name in FAMILIES}
        folders = [export for stages in exports.values() for export in stages]
        there = read_elsewhere(folders, arguments.transformers.absolute(), Path(folder, "there"))
        print("| family | stage | class here | class there | logits off by | differing |")
        print("|---|---|---|---|---|---|")
        for name, stages in exports.items():
            for export in stages:
                a, b = read(export), there[str(export)]
                differing, off = compare(a, b)
                bad += bool(differing)
                print(f"| {name} | {export.name} | {a['class']} | {b['class']} | {off:.1e} "
                      f"| {', '.join(differing) or 'nothing'} |")  # fmt: skip
        print(f"\nread by transformers {a['version']} and {b['version']}")
    return int(bad > 0)


if __name__ == "__main__":
    for path in (ROOT, ROOT / "kernels"):
        if "--read" not in sys.argv:
            sys.path.insert(0, str(path))
    sys.exit(main())
