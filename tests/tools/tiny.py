"""Tiny models and tokenizers that tests build in a moment; no network, no files."""

import json
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from tokenizers.decoders import Fuse
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHARACTERS = "0123456789+-=;#*(),. \nabcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ?!'"
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<a>{{ m['content'] }}<e>"
    "{% else %}<q>{{ m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)

BASE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 96,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# One entry for each family that the packed attention is tested on; windows short enough to matter.
FAMILIES = {
    "qwen2": {},
    "qwen3": {},
    "llama": {"tie_word_embeddings": True},  # SmolLM's architecture
    "mistral": {"sliding_window": 6},
    "gemma2": {"sliding_window": 6, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0,
               "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": 6, "query_pre_attn_scalar": 8},
}  # fmt: skip


def architecture(family: str = "qwen2", **changes) -> dict:
    return {"model_type": family, **BASE, **FAMILIES.get(family, {}), **changes}


def make_lm(family: str = "qwen2", *, seed: int = 0, scale: float = 6.0, **changes):
    """A random causal LM whose attention is far from uniform (weights scaled up), in float32."""
    settings = architecture(family, **changes)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(seed)
    lm = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if parameter.ndim >= 2 and "embed" not in name:
                parameter.mul_(scale)
    return lm.eval()


def make_tokenizer(characters: str = CHARACTERS, template: str | None = TEMPLATE):
    """One token a character, `<q>`, `<a>` and `<e>` around turns, `<e>` as eos, `<pad>`."""
    tokens = ["<pad>", "<q>", "<a>", "<e>", "<unk>", *characters]
    core = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<e>", unk_token="<unk>",
        additional_special_tokens=["<q>", "<a>"],
    )  # fmt: skip
    tokenizer.chat_template = template
    return tokenizer


def save_tokenizer(folder: Path) -> Path:
    make_tokenizer().save_pretrained(folder)
    return folder


def write_jsonl(file: Path, rows: list[dict]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def pair_rows(count: int = 12) -> list[dict]:
    """Chat pairs of uneven length: sums, told right and wrong."""
    rows = []
    for i in range(count):
        a, b = 3 * i + 1, 7 * i % 11
        detour = "so " * (i % 4)
        rows.append(
            {
                "id": f"sum-{i}",
                "prompt": [{"role": "user", "content": f"{a}+{b}=?"}],
                "chosen": [{"role": "assistant", "content": f"{detour}{a}+{b}={a + b}"}],
                "rejected": [
                    {"role": "assistant", "content": f"{a}+{b}={a + b + 1 + i % 3}" + detour}
                ],
            }
        )
    return rows


def train_settings(folder: Path, **changes) -> dict:
    """A recipe that trains a tiny model from scratch on `pair_rows`, in `folder`."""
    data, tokenizer = folder / "pairs.jsonl", folder / "tokenizer"
    if not data.exists():
        write_jsonl(data, pair_rows())
    if not tokenizer.exists():
        save_tokenizer(tokenizer)
    settings = {
        "architecture": architecture(tie_word_embeddings=True),
        "tokenizer_name_or_path": str(tokenizer),
        "dataset_name": str(data),
        "output_dir": str(folder / "out"),
        "objective": "redi",
        "train_batch_size": 5,
        "max_tokens_per_batch": 96,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "seed": 1,
    }
    return settings | changes
