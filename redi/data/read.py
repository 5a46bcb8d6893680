"""Rows to `Problem`s (raw generations) or `Example`s (ready to train on).

Every error names file, row and field, and what to do.
"""

import difflib
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from redi.data.files import kind_of, read_rows
from redi.errors import RediError

Message: TypeAlias = dict[str, str]  # {"role": ..., "content": ...}
Prompt: TypeAlias = str | list[Message]  # plain text, or chat messages for the tokenizer's template

PROBLEM_COLUMNS = ("problem", "prompt", "question")
READY_COLUMNS = ("chosen", "rejected", "completion", "messages", "conversations")
# ShareGPT's words, which many reasoning sets use, and those of chat templates.
SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
# Columns that hold traces under names that say nothing of right and wrong (s1K's and others).
TRACE_COLUMNS = ("generation", "response", "output", "solution", "trajectory", "trajectories",
                 "thinking", "reasoning", "attempt")  # fmt: skip
# A teacher's thoughts in one column and its answer in another, as s1K has them: `attempt` beside
# `thinking_trajectories`, or for each teacher one of both, and perhaps a `grade`, under its name.
_THOUGHTS = re.compile(r"(\w+_)?thinking_trajector(y|ies)")
# Where each judge's verdicts stand: inside `correctness` (OpenR1-Math-Raw) or flat (-220k, plain).
JUDGE_COLUMNS = {
    "llama": ("llama_verification", "correctness_llama"),
    "math_verify": ("math_verify_reparsed_answer", "correctness_math_verify"),
    "verdicts": (None, "verdicts"),
}


SAME = "chosen and rejected are the same text"  # of a row that can teach nothing


class MissingColumn(RediError):
    """What ails all rows of a file, not this one."""


@dataclass(frozen=True)
class Example:
    """A row ready to train on. One of `chosen` and `rejected` may be missing, not both."""

    id: str
    prompt: Prompt
    chosen: str | None
    rejected: str | None
    answer: str | None = None
    source: str | None = None

    @property
    def sides(self) -> list[tuple[bool, str]]:
        """(is it the chosen one?, text) of the completions there are, chosen first."""
        sides = ((True, self.chosen), (False, self.rejected))
        return [(is_chosen, text) for is_chosen, text in sides if text is not None]


@dataclass(frozen=True)
class Problem:
    """A problem with a teacher's raw generations.

    `judgments` holds, for each judge, one verdict per generation, None where the judge gave none. A
    list whose length differs from that of `generations` is kept as it is, for the caller to drop.
    """

    id: str
    prompt: Prompt
    answer: str | None
    generations: list[str | None]
    where: str  # "train.jsonl line 12"
    judgments: dict[str, list[bool | None]] = field(default_factory=dict)
    is_valid: bool = True
    source: str | None = None


def read_examples(path: str | Path) -> list[Example]:
    """Ready rows: prompt/chosen/rejected, prompt/completion[/label], or messages.

    Prompts and completions are text or TRL's lists of messages. Raises RediError for a row of
    another shape and for a file without rows.
    """
    examples = [to_example(row, where) for where, row in read_rows(path)]
    if not examples:
        raise RediError(f"{path}: no rows")
    return examples


def to_item(row: dict[str, Any], where: str) -> Problem | Example:
    """A row of either kind. Raises RediError for a row of neither."""
    row = _gathered(row, where)
    is_raw = _column(row, where, "generations", *READY_COLUMNS) == "generations"
    return to_problem(row, where) if is_raw else to_example(row, where)


def to_problem(row: dict[str, Any], where: str) -> Problem:
    """One row of raw generations: OpenR1-Math-Raw's or -220k's, or problem, answer, generations and
    perhaps verdicts. Raises RediError for a missing column or a wrong type."""
    generations = row[_column(row, where, "generations")] or []
    _check_list(generations, str, where, "generations")
    nested = row.get("correctness") or {}
    if not isinstance(nested, dict):
        raise RediError(f"{where}: `correctness` is {kind_of(nested)}; expected one list per judge")
    judgments = {}
    for judge, (inside, flat) in JUDGE_COLUMNS.items():
        name, verdicts = (inside, nested.get(inside)) if inside in nested else (flat, row.get(flat))
        if verdicts is not None:
            _check_list(verdicts, bool, where, str(name))
            judgments[judge] = verdicts
    if "answer" not in row and not judgments:
        raise MissingColumn(
            f"{where}: neither `answer` nor verdicts, so nothing says which generation is correct; "
            f"columns found: {', '.join(row)}"
        )
    valid = row.get("problem_is_valid", "yes")
    return Problem(
        id=_id(row, where),
        prompt=problem_of(row, where),
        answer=answer_of(row, where),
        generations=generations,
        where=where,
        judgments=judgments,
        is_valid=valid is True or str(valid).strip().lower() == "yes",
        source=_source(row),
    )


def to_example(row: dict[str, Any], where: str) -> Example:
    """One ready row. Raises RediError for a missing column or a wrong type."""
    if "generations" in _gathered(row, where):
        raise RediError(
            f"{where}: raw generations; run `redi data build` and use its positives.parquet or "
            "pairs.parquet"
        )
    column = _column(row, where, *READY_COLUMNS)
    if column in ("chosen", "rejected"):
        sides = {key: _conversation(row.get(key), where, key) for key in ("chosen", "rejected")}
    else:
        label = row.get("label", True)
        if label not in (True, False):  # also 1 and 0
            raise RediError(f"{where}: `label` is {label!r}; expected true or false")
        messages = _conversation(row[column], where, column)
        system = row.get("system") if column == "conversations" else None  # as OpenThoughts has it
        if messages and isinstance(system, str) and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": system}, *messages]
        sides = {"chosen" if label else "rejected": messages}
    given = {key: messages for key, messages in sides.items() if messages is not None}
    if not given:
        raise RediError(f"{where}: `{column}` is null; a row needs at least one completion")
    return Example(
        id=_id(row, where),
        prompt=_shared_prompt(row, where, given),
        chosen=given["chosen"][-1]["content"] if "chosen" in given else None,
        rejected=given["rejected"][-1]["content"] if "rejected" in given else None,
        answer=answer_of(row, where),
        source=_source(row),
    )


def _gathered(row: dict[str, Any], where: str) -> dict[str, Any]:
    """The row, with `generations` if it holds traces in one of the other shapes that say what is
    one: a text `generation`, or thoughts and answers in columns of their own (`_THOUGHTS`)."""
    if any(name in row for name in ("generations", *READY_COLUMNS)):
        return row
    if isinstance(row.get("generation", 0), str | None):
        return row | {"generations": [row["generation"]]}
    thoughts = {m[1] or "": name for name in row if (m := _THOUGHTS.fullmatch(name))}
    teachers = {t: name for t, name in thoughts.items() if f"{t}attempt" in row}
    if not teachers:
        return row
    traces = [_trace(row, where, name, f"{t}attempt") for t, name in teachers.items()]
    more: dict[str, Any] = {"generations": traces}
    grades = [row.get(f"{t}grade") for t in teachers]
    if any(grade is not None for grade in grades) and "verdicts" not in row:
        words = {"yes": True, "no": False}
        more["verdicts"] = [words.get(str(grade).strip().lower()) for grade in grades]
    return {"answer": row.get("solution")} | row | more


def _trace(row: dict[str, Any], where: str, *names: str) -> str | None:
    """Thoughts and answer, of the columns `names`, as R1 writes them; null without an answer."""
    texts = []
    for name in names:
        value = row[name]
        value = value[0] if isinstance(value, list) and len(value) == 1 else value
        if not isinstance(value, str | None):
            raise RediError(f"{where}: `{name}` is {kind_of(value)}; expected text")
        texts.append((value or "").strip())
    thoughts, attempt = texts
    if not attempt:
        return None
    return f"<think>\n{thoughts}\n</think>\n\n{attempt}" if thoughts else attempt


def problem_of(row: dict[str, Any], where: str) -> Prompt:
    """The row's `problem`, `prompt` or `question`: text ("" if null) or messages."""
    name = _column(row, where, *PROBLEM_COLUMNS)
    value = row[name]
    if value is None or isinstance(value, str):
        return value or ""
    return _messages(value, where, name)


def answer_of(row: dict[str, Any], where: str) -> str | None:
    """The row's `answer` as text: a number is written out, a list of one is opened."""
    value = row.get("answer")
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if value is None or value != value:  # NaN: pandas' null
        return None
    if isinstance(value, float):
        value = int(value) if value.is_integer() else value
    if isinstance(value, (str, int, float)) and not isinstance(value, bool):
        return str(value)
    raise RediError(f"{where}: `answer` is {kind_of(value)}; expected one text or number")


def make_prompt(
    problem: Prompt, system_prompt: str | None = None, prompt_template: str = "{problem}"
) -> list[Message]:
    """Chat messages that pose `problem`: the system turn if any, then the user's turn.

    A problem that is messages already gets only the system turn, unless it has one.
    """
    if isinstance(problem, str):
        problem = [{"role": "user", "content": prompt_template.replace("{problem}", problem)}]
    if system_prompt is not None and problem[0]["role"] != "system":
        return [{"role": "system", "content": system_prompt}, *problem]
    return problem


def _shared_prompt(row: dict[str, Any], where: str, sides: dict[str, list[Message]]) -> Prompt:
    """What comes before the last assistant message; else the `prompt` column."""
    before, *others = [messages[:-1] for messages in sides.values()]
    if any(other != before for other in others):
        raise RediError(f"{where}: `chosen` and `rejected` begin with different prompts")
    if not before:
        prompt = problem_of(row, where)
        if row[_column(row, where, *PROBLEM_COLUMNS)] is None:
            raise RediError(f"{where}: the prompt is null, and nothing stands before the answer")
        is_chat = any(isinstance(row.get(key), list) for key in (*sides, "completion"))
        return make_prompt(prompt) if is_chat else prompt
    if isinstance(row.get("prompt"), list) and _messages(row["prompt"], where, "prompt") != before:
        raise RediError(
            f"{where}: `{next(iter(sides))}` must be one assistant message after `prompt`, or "
            "repeat `prompt` and end with one"
        )
    return before


def _conversation(value: Any, where: str, name: str) -> list[Message] | None:
    """A completion as messages that end with the assistant's; None for null."""
    if value is None:
        return None
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    messages = _messages(value, where, name)
    if messages[-1]["role"] != "assistant":
        raise RediError(f"{where}: the last message of `{name}` must be the assistant's")
    return messages


def _messages(value: Any, where: str, name: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise RediError(
            f"{where}: `{name}` is {kind_of(value)}; expected text or a list of messages"
        )
    value = [_from_sharegpt(message) for message in value]
    for i, message in enumerate(value):
        if not isinstance(message, dict) or not all(
            isinstance(message.get(key), str) for key in ("role", "content")
        ):
            raise RediError(f"{where}: `{name}[{i}]` must have a `role` and a text `content`")
        extra = [k for k, v in message.items() if k not in ("role", "content") and v]
        if extra:  # dropping reasoning_content or tool_calls in silence would train on other text
            raise RediError(
                f"{where}: `{name}[{i}].{extra[0]}` is not supported; write it into `content`"
            )
    return [{"role": message["role"], "content": message["content"]} for message in value]


def _from_sharegpt(message: Any) -> Any:
    """`from` and `value` under the names that chat templates know; anything else as it is."""
    if not isinstance(message, dict) or not {"from", "value"} <= message.keys():
        return message
    role = message["from"]
    more = {k: v for k, v in message.items() if k not in ("from", "value")}
    return {"role": SHAREGPT_ROLES.get(role, role), "content": message["value"]} | more


def _column(row: dict[str, Any], where: str, *names: str) -> str:
    """The first of `names` that is a column of the row. Raises RediError with the nearest name."""
    for name in names:
        if name in row:
            return name
    close = (n for name in names for n in difflib.get_close_matches(name, row, 1, cutoff=0.8))
    near = next(close, None)
    hint = f" (is `{near}` meant?)" if near else ""
    traces = [n for n in row if any(part in TRACE_COLUMNS for part in n.lower().split("_"))]
    if "generations" in names and traces and not near:
        hint = (
            f"; if `{'`, `'.join(traces)}` hold the traces, put each problem's into one list "
            "`generations`, or one a row into the column `generation`, <think>...</think> before "
            "the answer (docs/data.md)"
        )
    raise MissingColumn(
        f"{where}: no column {' or '.join(f'`{name}`' for name in names)}; columns found: "
        f"{', '.join(row) or 'none'}{hint}"
    )


def _check_list(value: Any, kind: type, where: str, name: str) -> None:
    if not isinstance(value, list):
        raise RediError(f"{where}: `{name}` is {kind_of(value)}; expected a list")
    for i, item in enumerate(value):
        if item is not None and not isinstance(item, kind):
            expected = "text" if kind is str else "true, false or null"
            raise RediError(f"{where}: `{name}[{i}]` is {kind_of(item)}; expected {expected}")


def _id(row: dict[str, Any], where: str) -> str:
    return next((str(row[key]) for key in ("id", "uuid") if row.get(key) is not None), where)


def _source(row: dict[str, Any]) -> str | None:
    return None if row.get("source") is None else str(row["source"])
