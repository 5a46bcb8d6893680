"""docs/models.md from the rows of bench/families.py."""

import re
from collections import defaultdict
from typing import Any

Row = dict[str, Any]
KINDS = {
    "dense": "dense", "MoE": "mixture of experts", "hybrid": "hybrid or recurrent",
    "multimodal": "multimodal, trained on text", "other": "decoder of an encoder family",
}  # fmt: skip
MODES = ("none", "selective", "full", "offload")
HEAD = """# Models

Which families of `transformers` the trainer and `patch` are right for, tried one by one: **written
by `make families`**, not by hand, with torch {torch} and transformers {transformers} on a CPU.

A tiny random model of every family that `AutoModelForCausalLM` knows, each of its mechanisms in
use (windows shorter than the traces, several experts, caps, scales, one layer of each kind, every
weight and saved buffer moved off its initial value), is trained by `redi train` for two REDI steps
and by transformers alone: eager attention, one trace at a time, the model's own logits, the same
AdamW. **Right** means that loss, gradient norm and every weight agree to float32 rounding, and
that the exported folder gives the reference's logits when transformers reads it again. A refusal
is one sentence before the first step; nothing trains wrong in silence.

{counts}

Columns: *in a pack* is how traces run (`one by one`: its traces would change each other in a pack,
so each runs by itself, which is right and slower); *patch* is `redi_kernels.hf.patch`; the
checkpointing modes are those of `gradient_checkpointing` (all agree with the reference's gradient,
or are refused); *export* is the folder read again. This machine has neither mamba's nor
flash-linear-attention's kernels, which let some hybrids run in packs.
"""


def table(rows: list[Row], versions: dict[str, str]) -> str:
    right = [row for row in rows if row["outcome"] == "right"]
    refused = [row for row in rows if row["outcome"] == "refused"]
    unbuilt = [row for row in rows if row["outcome"] == "not buildable"]
    counts = (
        f"{len(rows)} families: **{len(right)} right**, {len(refused)} refused, "
        f"{len(unbuilt)} not buildable."
    )
    parts = [HEAD.format(**versions, counts=counts), _right(right)]
    parts += ["## Refused\n", _grouped(refused), "## Not buildable\n"]
    parts += ["transformers' own code fails on these, before anything of ours runs.\n"]
    parts += [_grouped(unbuilt)]
    return "\n".join(parts)


def _right(rows: list[Row]) -> str:
    lines = ["## Right\n"]
    notes: dict[str, int] = {}
    for kind, title in KINDS.items():
        some = [row for row in rows if row["kind"] == kind]
        if not some:
            continue
        lines += [f"### {title.capitalize()}\n"]
        lines += ["| family | in a pack | patch | none | selective | full | offload | export |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for row in some:
            packed = "one by one" if row.get("alone") else "right"
            cells = [packed + _note(notes, row.get("within", "")),
                     row["patch"] + _note(notes, row["patch_why"])]  # fmt: skip
            cells += ["right"] + [row[m] + _note(notes, row[f"{m}_why"]) for m in MODES[1:]]
            lines += [f"| `{row['family']}` | {' | '.join([*cells, 'right'])} |"]
        lines += [""]
    if notes:
        lines += [f"{number}. {_plain(text)}" for text, number in notes.items()] + [""]
    return "\n".join(lines)


def _note(notes: dict[str, int], why: str) -> str:
    """The number of a footnote, the same for the same reason."""
    if not why:
        return ""
    return f" ({notes.setdefault(_reason(why), len(notes) + 1)})"


def _grouped(rows: list[Row]) -> str:
    groups: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        groups[_reason(row["why"])].append(f"`{row['family']}`")
    biggest = sorted(groups.items(), key=lambda item: (-len(item[1]), item[1]))
    return "\n".join(f"- {', '.join(names)}: {_plain(why)}" for why, names in biggest) + "\n"


def _reason(why: str) -> str:
    """Without the family's own name and numbers, so that alike ones stand together."""
    why = re.sub(r" \[\w+\.py:\d+\]$", "", why)
    why = re.sub(r"\b[A-Z]\w*(?:For\w+|LMHeadModel|WithLMHead|GenerationDecoder)\b", "it", why)
    why = re.sub(r"^\w+: ", "", re.sub(r"^it: ", "", why))
    return re.sub(r"\d+\.\d+(e-?\d+)?|\b\d+e-?\d+", "...", why)


def _plain(why: str) -> str:
    return why.replace("|", "\\|").replace("<", "\\<").replace("*", "\\*").strip()
