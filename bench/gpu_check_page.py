"""gpu.md from gpu.jsonl: of each row the last result, whichever call it is from."""

from collections.abc import Sequence
from typing import Any

from gpu_check_rows import ERROR, NOT_RUN, Results, finished, shown, unfinished

NOTES = {
    "correct": "RMS error against fp64 over that of a dense implementation in the same dtype (plus "
    "1e-3, in fp32 1e-6, of the value's RMS); at most 1.5. Same bits twice, no log-prob above 0.",
    "speed": "bf16, forward and backward, median (20th to 80th percentile) in ms. GB: peak beyond "
    "inputs and gradients. U: the method's matmuls in units of the logits matmul, 2 T V H FLOP. "
    "Share: their time at cuBLAS's rate for it, over the method's time.",
    "kernels": "Events around each launch, summed over one forward and backward. Share: the time "
    "of cuBLAS for the same matmul, over the kernel's.",
    "fast": "f: share of d(logits) computed; dX's error as stated, and dX and dW against exact "
    "mode's, relative RMS.",
    "trainer": "Differences are relative, the largest over steps.",
}


def draw(results: Results, parts: Sequence[Any]) -> str:
    """Markdown; empty where nothing was kept."""
    records = results.read()
    if not records:
        return ""
    lines = ["<!-- made by bench/gpu_check.py from gpu.jsonl -->", "# On a GPU", ""]
    for part in parts:
        found = finished(records, part.name)
        if found:
            lines += section(part, found)
        begun = unfinished(records, part.name)
        if begun:
            lines += [f"{begun['row']}: began, and did not end.", ""]
    return "\n".join(lines)


def section(part: Any, found: dict[str, dict]) -> list[str]:
    """A table, and below it what has no values to put into one."""
    tables: dict[tuple[str, ...], list[str]] = {}
    told = []
    for name, record in found.items():
        values = record["values"] if isinstance(record["values"], list) else [record["values"]]
        if record["status"] in (ERROR, NOT_RUN):
            told.append(f"- {name}: {record['status']}, {told_of(values)}")
            continue
        for line in values:
            cells = " | ".join(shown(v).replace("|", "\\|") for v in line.values())
            tables.setdefault(tuple(line), []).append(f"| {name} | {cells} | {record['status']} |")
    lines = [f"## {part.name.capitalize()}: {part.about}", ""]
    if part.name in NOTES:
        lines += [NOTES[part.name], ""]
    for columns, rows in tables.items():  # rows with the same columns make one table
        lines += [f"| | {' | '.join(columns)} | |", "|---" * (len(columns) + 2) + "|", *rows, ""]
    return lines + told + ([""] if told else [])


def told_of(values: list[dict[str, Any]]) -> str:
    return "; ".join(f"{key}: {shown(v)}" for line in values for key, v in line.items())
