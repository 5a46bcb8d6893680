"""What transformers 4.57, on which servers are built, looks for in a model folder.

transformers 5 writes the same facts elsewhere: rotary positions in `rope_parameters`, special
tokens and the tokenizer's class under names that 4.57 does not know. Here both get theirs.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TOKENIZER_CONFIG = "tokenizer_config.json"
# Classes of transformers 5 that take tokenizer.json for all they do, as this one of 4.57 does.
GENERIC = "PreTrainedTokenizerFast"
NEW_NAMES_OF_GENERIC = {"TokenizersBackend", "TokenizersBackendFast"}
# Files that transformers 5 reads and does not write again.
TOKENIZER_FILES = (
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "vocab.txt",
    "tokenizer.model", "spiece.model", "sentencepiece.bpe.model",
)  # fmt: skip


def tell_rope(folder: Path, config_class: Any) -> None:
    """Adds `rope_theta`, `rope_scaling` and kin to the config.json in `folder`, wherever it holds
    `rope_parameters`; but for what would change how transformers 5 reads it."""
    file = folder / "config.json"

    def read_after_writing() -> list[dict[str, Any]]:
        write_json(file, settings)
        read = config_class.from_pretrained(folder).to_dict()
        return [part["rope_parameters"] for part in _parts(read)]

    settings = json.loads(file.read_text(encoding="utf-8"))
    before = read_after_writing()
    for part in _parts(settings):
        kept = dict(part)
        part.update(_old_names(part["rope_parameters"]))
        try:
            is_unchanged = read_after_writing() == before
        except Exception:  # some families (Gemma 4) refuse what the old names say
            is_unchanged = False
        if not is_unchanged:
            part.clear()
            part.update(kept)
    write_json(file, settings)


def tell_names(folder: Path, config_class: Any, source: Path | None) -> None:
    """Adds to the config.json in `folder` what 4.57 calls otherwise: the names that transformers 5
    takes for its own (`num_experts` of Qwen 3), and what the start's in `source` said and it read
    and dropped (`rotary_pct` of GPT-NeoX); but for what would change how transformers 5 reads
    it."""
    file = folder / "config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    came: dict[str, Any] = {}
    if source is not None and (source / "config.json").exists():
        came = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if came.get("model_type") != settings["model_type"]:  # the text model of a larger one
        came = came.get("text_config") or {}
    config = config_class.from_pretrained(folder)
    before = config.to_dict()
    for part, names, there in _with_names(settings, config, came):
        more = {old: part[new] for old, new in names.items() if new in part}
        more |= {key: value for key, value in there.items() if key != "torch_dtype"}
        for key, value in more.items():
            if key in part:
                continue
            part[key] = value
            write_json(file, settings)
            try:
                is_unchanged = config_class.from_pretrained(folder).to_dict() == before
            except Exception:  # as in `tell_rope`
                is_unchanged = False
            if not is_unchanged:
                del part[key]
    write_json(file, settings)


def _with_names(
    settings: Any, config: Any, came: Any
) -> Iterator[tuple[dict[str, Any], dict[str, str], dict[str, Any]]]:
    """Of a config and those inside it: what is written, other names for it, what was there."""
    yield settings, config.attribute_map, came
    for key, value in vars(config).items():
        if hasattr(value, "attribute_map") and isinstance(settings.get(key), dict):
            inner = came.get(key)
            yield from _with_names(settings[key], value, inner if isinstance(inner, dict) else {})


def _parts(settings: Any) -> list[dict[str, Any]]:
    """A config and those inside it that have rotary positions."""
    if not isinstance(settings, dict):
        return []
    inner = [part for key, value in settings.items() if key != "rope_parameters"
             for part in _parts(value)]  # fmt: skip
    return [settings, *inner] if isinstance(settings.get("rope_parameters"), dict) else inner


def _old_names(rope: dict[str, Any]) -> dict[str, Any]:
    """As 4.57's configs have it. A dictionary for each kind of layer (Gemma 3) has the global one's
    under the usual names, and the window's base as `rope_local_base_freq`."""
    per_layer = {kind: part for kind, part in rope.items() if isinstance(part, dict)}
    if per_layer:
        if set(per_layer) != {"full_attention", "sliding_attention"}:
            return {}
        old = _old_names(per_layer["full_attention"])
        return old | {"rope_local_base_freq": per_layer["sliding_attention"].get("rope_theta")}
    rope = dict(rope)
    names = ("rope_theta", "partial_rotary_factor")
    old = {name: rope.pop(name) for name in names if name in rope}
    has_more = bool(set(rope) - {"rope_type", "type"})
    is_plain = rope.get("rope_type", "default") == "default" and not has_more
    return old | {"rope_scaling": None if is_plain else rope}


def tell_tokenizer(folder: Path, source: Path | None, tokenizer: Any) -> None:
    """Gives the tokenizer just saved in `folder` the config that it had in `source`, its template
    being the present one, and makes both readable for 4.57."""
    file = folder / TOKENIZER_CONFIG
    settings = json.loads(file.read_text(encoding="utf-8"))
    if source is not None and (source / TOKENIZER_CONFIG).exists():
        settings = json.loads((source / TOKENIZER_CONFIG).read_text(encoding="utf-8"))
        if "chat_template" in settings:
            settings["chat_template"] = tokenizer.chat_template
        for name in TOKENIZER_FILES:
            if (source / name).exists() and not (folder / name).exists():
                shutil.copyfile(source / name, folder / name)
    if settings.get("tokenizer_class") in NEW_NAMES_OF_GENERIC:
        settings["tokenizer_class"] = GENERIC
    if isinstance(settings.get("extra_special_tokens"), list):  # a dictionary of names in 4.57
        more = settings.pop("extra_special_tokens")
        known = settings.get("additional_special_tokens") or []
        settings["additional_special_tokens"] = known + [t for t in more if t not in known]
    write_json(file, settings)


def write_json(file: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
