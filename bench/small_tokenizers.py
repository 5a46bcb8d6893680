"""Tokenizers of the kinds that published models have, made small: the same rules on a small
vocabulary, and a tokenizer_config.json as transformers 4 wrote it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "12 + 34 = 46, and 100 - 7 = 93; so the answer is 46.", "user assistant system think stop at",
    "Don't stop before two spaces, a tab and lines", "Größe und Länge, 北京 and 東京",
]  # fmt: skip
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TURNS = (
    "{{% for m in messages %}}{{{{ '{start}' + m['role'] + '\n' + m['content'] + '{stop}\n' }}}}"
    "{{% endfor %}}{{% if add_generation_prompt %}}{{{{ '{start}assistant\n' }}}}{{% endif %}}"
)


def write_tokenizer(folder: Path, kind: str) -> int:
    """Writes the files of a tokenizer of `kind`; returns how many ids it has."""
    folder.mkdir(parents=True, exist_ok=True)
    core, config, special = {"qwen": _qwen, "llama3": _llama3, "llama2": _llama2,
                             "gemma": _gemma}[kind]()  # fmt: skip
    core.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False}
    added = {
        str(core.token_to_id(token)): {"content": token, "special": True, **flags}
        for token in special
    }
    config |= {"added_tokens_decoder": added, "model_max_length": 512}
    config["clean_up_tokenization_spaces"] = False
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    named = {name: value for name, value in config.items() if name.endswith("_token") and value}
    (folder / "special_tokens_map.json").write_text(json.dumps(named))
    if kind == "qwen":
        model = json.loads(core.to_str())["model"]
        (folder / "vocab.json").write_text(json.dumps(model["vocab"]))
        merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
        (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    return core.get_vocab_size()


def _trained(core: Tokenizer, size: int, first: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=first, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(CORPUS, trainer)
    return core


def _byte_level(special: list[str], normalizer: Any = None, *, split: str = SPLIT) -> Tokenizer:
    core = Tokenizer(models.BPE())
    if normalizer is not None:
        core.normalizer = normalizer
    core.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(split), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    core.decoder = decoders.ByteLevel()
    _trained(core, 320, [], pre_tokenizers.ByteLevel.alphabet())
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    return core


def _qwen() -> tuple[Tokenizer, dict[str, Any], list[str]]:
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = _byte_level(special, normalizers.NFC(), split=SPLIT.replace("{1,3}", ""))
    core.post_processor = processors.ByteLevel(trim_offsets=False)
    config = {
        "tokenizer_class": "Qwen2Tokenizer", "add_prefix_space": False, "add_bos_token": False,
        "additional_special_tokens": special[1:], "bos_token": None, "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": None, "errors": "replace",
        "split_special_tokens": False,
        "chat_template": TURNS.format(start="<|im_start|>", stop="<|im_end|>"),
    }  # fmt: skip
    return core, config, special


def _llama3() -> tuple[Tokenizer, dict[str, Any], list[str]]:
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|eot_id|>"]
    core = _byte_level(special)
    core.model.ignore_merges = True
    core.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False), _begin(core, "<|begin_of_text|>"),
    ])  # fmt: skip
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": special[0],
        "eos_token": "<|eot_id|>", "model_input_names": ["input_ids", "attention_mask"],
        "chat_template": TURNS.format(start="<|start_header_id|>", stop="<|eot_id|>"),
    }  # fmt: skip
    return core, config, special


def _bytes() -> list[str]:
    return [f"<0x{i:02X}>" for i in range(256)]


def _llama2() -> tuple[Tokenizer, dict[str, Any], list[str]]:
    special = ["<unk>", "<s>", "</s>"]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Sequence([
        normalizers.Prepend("▁"), normalizers.Replace(" ", "▁"),
    ])  # fmt: skip
    _trained(core, 420, special + _bytes(), ["▁"])
    _forget_bytes_are_special(core, special)
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    core.post_processor = _begin(core, "<s>")
    config = {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None,
        "additional_special_tokens": [], "legacy": True, "sp_model_kwargs": {},
        "spaces_between_special_tokens": False, "use_default_system_prompt": False,
        "chat_template": "{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] }}"
        "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}",
    }  # fmt: skip
    return core, config, special


def _gemma() -> tuple[Tokenizer, dict[str, Any], list[str]]:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
    core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    core.normalizer = normalizers.Replace(" ", "▁")
    core.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    _trained(core, 420, special + _bytes(), ["▁"])
    _forget_bytes_are_special(core, special)
    core.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
    ])  # fmt: skip
    core.post_processor = _begin(core, "<bos>")
    config = {
        "tokenizer_class": "GemmaTokenizer", "add_bos_token": True, "add_eos_token": False,
        "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>",
        "additional_special_tokens": special[4:], "sp_model_kwargs": {},
        "spaces_between_special_tokens": False, "use_default_system_prompt": False,
        "chat_template": "{{ bos_token }}" + TURNS.format(start="<start_of_turn>",
                                                          stop="<end_of_turn>"),
    }  # fmt: skip
    return core, config, special


def _begin(core: Tokenizer, token: str) -> Any:
    return processors.TemplateProcessing(
        single=f"{token} $A", pair=f"{token} $A {token}:1 $B:1",
        special_tokens=[(token, core.token_to_id(token))],
    )  # fmt: skip


def _forget_bytes_are_special(core: Tokenizer, special: list[str]) -> None:
    """The trainer knows no other way to give bytes their ids; in published files they are plain."""
    content = json.loads(core.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] in special]
    fresh = Tokenizer.from_str(json.dumps(content))
    core.__setstate__(fresh.__getstate__())
