"""Reading recipes: YAML and `--field value` into a checked config, or an error that helps.

An unknown key is an error that suggests the nearest name; a value of the wrong type or an
impossible combination is an error that names the field.
"""

import difflib
import os
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo, field_validator

from redi.errors import RediError

# Names people bring from other trainers, and what to write here instead.
KNOWN_ELSEWHERE = {
    "per_device_train_batch_size": (
        "a step is counted over all GPUs: set train_batch_size to "
        "per_device_train_batch_size x gradient_accumulation_steps x GPUs"
    ),
    "gradient_accumulation_steps": (
        "a step is train_batch_size examples; max_tokens_per_batch bounds what is in memory at once"
    ),
    "torch_dtype": "use dtype",
    "packing": "traces are always packed, without padding",
    "reinforce_rejected_coef": "use alpha",
    "loss_type": "use objective: sft, redi, dpo or simpo",
    "gamma": "use simpo_gamma",
    "precompute_ref_log_probs": "objective: dpo computes them once, before the first step",
}


class _Loader(yaml.SafeLoader):
    """Refuses what a mapping holds twice, of which YAML's readers keep the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found = set()
        for key, _ in node.value:
            name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
            if name in found:
                raise yaml.MarkedYAMLError(
                    problem=f"{key.value} is set twice; keep one", problem_mark=key.start_mark
                )
            found.add(name)
        return super().construct_mapping(node, deep)


class Strict(BaseModel):
    model_config: ClassVar[ConfigDict] = ConfigDict(
        extra="forbid", validate_assignment=True, protected_namespaces=(), allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if _is_flag(value, cls.model_fields[info.field_name or ""].annotation):
            raise ValueError("true and false are no numbers")
        return value


Config = TypeVar("Config", bound=BaseModel)


def load_config(kind: type[Config], path: str | os.PathLike, overrides: dict[str, Any]) -> Config:
    """Reads a YAML recipe into `kind`; `overrides` (dotted keys allowed) win over the file.

    Raises RediError for a missing file, text that is not YAML, unknown keys, and bad values.
    """
    file = Path(path)
    if not file.is_file():
        raise RediError(f"{file}: no such recipe")
    try:
        content = yaml.load(file.read_bytes(), _Loader) or {}
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise RediError(f"{file}: not valid YAML: line {line}: {error.problem}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise RediError(f"{file}: not valid YAML: {error}") from None
    except RecursionError:
        raise RediError(f"{file}: not valid YAML: nested too deeply") from None
    if not isinstance(content, dict):
        raise RediError(f"{file}: a recipe is a mapping of fields to values")
    for key, value in overrides.items():
        set_field(content, key, value)
    return make_config(kind, content, str(file))


def make_config(kind: type[Config], content: dict[str, Any], where: str) -> Config:
    """Validates `content` as `kind`. Raises RediError that names `where` and every bad field."""
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise RediError(
            f"{where}: " + "; ".join(_explain(kind, e) for e in error.errors())
        ) from None


def set_field(content: dict[str, Any], key: str, value: Any) -> None:
    """Sets `a.b.c` in nested dictionaries, making sections as needed. A name that is there may hold
    dots itself, as an arm's `redi-0.8`."""
    parts = key.split(".")
    while parts:
        there = (n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in content)
        n = next(there, 1)
        name, parts = ".".join(parts[:n]), parts[n:]
        if not parts:
            content[name] = value
            return
        content = content.setdefault(name, {})
        if not isinstance(content, dict):
            raise RediError(f"--{key}: {name} is not a section of the recipe")


def read_value(kind: type[BaseModel], key: str, text: str) -> Any:
    """What a command line gives the field `key`: text as it stands where the field takes that, else
    YAML, which would cut a prompt at " #" and drop its last line break."""
    kinds = _members(_annotation(kind, key))
    choices = {choice for k in kinds if get_origin(k) is Literal for choice in get_args(k)}
    if text in choices or (str in kinds and kinds <= {str, NoneType} and text != "null"):
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, str) and text[:1] not in ("'", '"') else value


def _annotation(kind: type[BaseModel], key: str) -> Any:
    """Of the field `a.b.c`; None where the recipe leaves its type open."""
    name, _, rest = key.partition(".")
    annotation = kind.model_fields[name].annotation if name in kind.model_fields else None
    if not rest or annotation is None:
        return annotation
    section = _section(annotation)
    return None if section is None else _annotation(section, rest)


def _section(annotation: Any) -> type[BaseModel] | None:
    kinds = _members(annotation)
    return next((k for k in kinds if isinstance(k, type) and issubclass(k, BaseModel)), None)


def _members(annotation: Any) -> set[Any]:
    """Of a union; else the one. Without what else is asked of a value (its range)."""
    is_union = get_origin(annotation) in (Union, UnionType)
    members = get_args(annotation) if is_union else (annotation,)
    return {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in members}


def _is_flag(value: Any, annotation: Any) -> bool:
    """Whether true or false stands where only a number may: pydantic would read 1 or 0."""
    kinds = _members(annotation)
    if isinstance(value, bool):
        return bool(kinds & {int, float}) and bool not in kinds
    lists = [kind for kind in kinds if get_origin(kind) is list and isinstance(value, list)]
    return any(_is_flag(item, get_args(kind)[0]) for kind in lists for item in value)


def _explain(kind: type[BaseModel], error: Any) -> str:
    # Of a name that may not be one, pydantic says where twice; the message holds it again.
    parts = error["loc"][:-2] if error["loc"][-1:] == ("[key]",) else error["loc"]
    field = ".".join(str(part) for part in parts)
    if error["type"] != "extra_forbidden":
        message = error["msg"].removeprefix("Value error, ")
        if error["type"] == "missing":
            return f"{field} is required"
        return f"{field}: {message}" if field else message
    for part in error["loc"][:-1]:  # walk down to the section that holds the unknown key
        kind = _section(kind.model_fields[part].annotation) or kind
    leaf = str(error["loc"][-1])
    if leaf in KNOWN_ELSEWHERE:
        return f"unknown key {field}: {KNOWN_ELSEWHERE[leaf]}"
    near = difflib.get_close_matches(leaf, kind.model_fields, n=1)
    return f"unknown key {field}" + (f"; did you mean {near[0]}?" if near else "")
