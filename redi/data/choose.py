"""Rows to training rows: judge every trace, keep the first right and the first wrong one.

Looks at one block of rows at a time and knows nothing of files out or of other blocks, so that it
can run in any number of processes.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from redi.config import DataConfig
from redi.data.files import Block, Unreadable, read_block
from redi.data.overlap import Overlap, text_of
from redi.data.read import (
    SAME,
    Example,
    MissingColumn,
    Problem,
    Prompt,
    make_prompt,
    to_item,
)
from redi.data.report import BuildReport, bin_of
from redi.data.tokenize import ChatFormat, over_limit
from redi.errors import RediError
from redi.grading.judge import without_opening
from redi.grading.verify import Verifier, extract_answer

_CHUNK = 2000  # generations judged at once: enough to keep the verifier's workers busy
_CHUNK_CHARS = 8 << 20
_UNKNOWN = {
    "timeout": "judging took too long",
    "unparsable": "no answer that can be read",
    None: "no verdict, and no answer to judge by",
}
_NOT_CARRIED = "the chat template cannot carry it"
_OPENR1_JUDGES = {"llama", "math_verify"}
UNFINISHED = "unfinished: <think> without </think>"
UNPAIRED = "incorrect, no correct one to pair with"


@dataclass(frozen=True)
class Chosen:
    """A row to write, with the lengths of its traces."""

    example: Example
    where: str
    row: int  # index among the rows of the block
    key: bytes  # the same for duplicates
    join: bytes  # the same for rows whose traces may make a pair; of a ready row the key
    is_pair: bool  # belongs into pairs.parquet too
    chosen_length: int | None
    rejected_length: int | None


class Chooser:
    """`run` over the blocks of the input, in any order. Picklable as long as it has not run."""

    def __init__(self, config: DataConfig, tokenizer: Any, overlap: Overlap) -> None:
        self.config = config
        self.chat = None if tokenizer is None else ChatFormat(tokenizer)
        self.overlap = overlap
        self.report = BuildReport()
        self.wants_pairs = False

    def run(self, block: Block, verifier: Verifier) -> Iterator[list[Chosen]]:
        """Yields the rows chosen, in the order of the block, a stretch at a time.

        `report` and `wants_pairs` are this block's when the last stretch is out. Raises RediError
        for rows that the columns or the chat template do not fit.
        """
        self.report, self.wants_pairs = BuildReport(), False
        self.overlap.start(self.report)
        for stretch in self._stretches(block):
            problems = [item for _, _, item, _ in stretch if isinstance(item, Problem)]
            problems = [problem for problem in problems if self._accept(problem)]
            outcomes = {
                problem.where: outcome
                for problem, outcome in zip(problems, self._judge(problems, verifier), strict=True)
            }
            chosen: list[Chosen | None] = []
            for row, where, item, is_labelled in stretch:
                if isinstance(item, Example):
                    chosen.append(self._pass_through(item, where, row, is_labelled))
                elif where in outcomes:
                    chosen.append(self._select(item, row, outcomes[where]))
            yield [row for row in chosen if row is not None]

    def _stretches(self, block: Block) -> Iterator[list[tuple[int, str, Problem | Example, bool]]]:
        """Rows in stretches of about _CHUNK traces: (row, where, item, does it carry a label?)."""
        stretch: list[tuple[int, str, Problem | Example, bool]] = []
        size = chars = 0
        for number, (where, row) in enumerate(read_block(block)):
            item = self._read(row, where)
            if item is None:
                continue
            is_labelled = isinstance(row, dict) and "label" in row
            stretch.append((number, where, item, is_labelled))
            texts = item.generations if isinstance(item, Problem) else [t for _, t in item.sides]
            size, chars = size + len(texts), chars + sum(len(text or "") for text in texts)
            if size >= _CHUNK or chars >= _CHUNK_CHARS:
                yield stretch
                stretch, size, chars = [], 0, 0
        yield stretch

    def _read(self, row: dict[str, Any] | Unreadable, where: str) -> Problem | Example | None:
        """The row, or None if it is none."""
        try:
            if isinstance(row, Unreadable):
                detail = f": {row.detail}" if row.detail else ""
                raise RediError(f"{where}: {row.reason}{detail}")
            item = to_item(row, where)
        except RediError as error:
            is_missing = isinstance(error, MissingColumn)
            reason = "a column is missing" if is_missing else "a field of the wrong kind"
            reason = row.reason if isinstance(row, Unreadable) else reason
            self.report.count("rows read", "")
            self.report.drop("rows", reason, where, text=str(error), detail=str(error))
            return None
        self.report.count("rows read", item.source or "")
        num = len(item.generations) if isinstance(item, Problem) else len(item.sides)
        self.report.count("traces read", item.source or "", num)
        return item

    def _accept(self, problem: Problem) -> bool:
        """Whether the row can be used at all; counts it as dropped if not."""
        self.wants_pairs = True
        reason = self._why_not(problem)
        if reason is None:
            return True
        self._drop_row(reason, problem, problem.where, len(problem.generations))
        return False

    def _why_not(self, problem: Problem) -> str | None:
        config, judgments = self.config, problem.judgments
        num = len(problem.generations)
        if not problem.is_valid:
            return "problem_is_valid is not yes"
        if problem.source in config.exclude_sources:
            return f"source {problem.source} excluded"
        if not str(problem.prompt).strip():
            return "empty problem"
        if num == 0:
            return "no generations"
        if config.missing_verdict == "wrong":
            needed = {"math_verify"} if config.judges == "math_verify" else _OPENR1_JUDGES
            if not judgments.keys() >= (judgments.keys() & {"verdicts"} or needed):
                return "a judge gave no verdicts"
        if any(len(verdicts) != num for verdicts in judgments.values()):
            return "verdicts and generations differ in number"
        is_known = self.overlap.check(problem.prompt, problem.where, problem.id, self.report)
        return _contaminated(config, is_known)

    def _judge(self, problems: list[Problem], verifier: Verifier) -> list[list[str]]:
        """For each generation "correct", "incorrect", or why it is neither."""
        judges = self.config.judges
        votes = [_votes(problem, self.config) for problem in problems]
        asked = [
            (p, g)
            for p, problem in enumerate(problems)
            for g, text in enumerate(problem.generations)
            if text and problem.answer and _decide(votes[p][g], judges) is None
            if not self._is_cut_off(text)
        ]
        verdicts = verifier.verify(
            [self._to_judge(problems[p].generations[g] or "") for p, g in asked],
            [problems[p].answer or "" for p, _ in asked],
        )
        judged = dict(zip(asked, verdicts, strict=True))
        return [
            [
                UNFINISHED
                if text and self._is_cut_off(text)
                else _outcome(text, votes[p][g], judged.get((p, g)), judges)
                for g, text in enumerate(problem.generations)
            ]
            for p, problem in enumerate(problems)
        ]

    def _is_cut_off(self, text: str) -> bool:
        is_open = "<think>" in text and "</think>" not in text
        return is_open and self.config.unfinished == "drop"

    def _to_judge(self, text: str) -> str:
        """Thoughts that do not end hold no answer, unless the user keeps what was cut off."""
        return without_opening(text) if self.config.unfinished == "keep" else text

    def _select(self, problem: Problem, row: int, outcomes: list[str]) -> Chosen | None:
        """The first correct and the first incorrect generation that fit; counts the others."""
        config = self.config
        prompt = make_prompt(problem.prompt, config.system_prompt, config.prompt_template)
        texts: dict[str, list[str]] = {"correct": [], "incorrect": []}
        for text, outcome in zip(problem.generations, outcomes, strict=True):
            if outcome in texts:
                texts[outcome].append(text or "")
                self._judged(outcome, problem.source, text or "")
            else:
                self._drop_trace(outcome, problem, text)
        chosen, chosen_length = self._first(prompt, texts["correct"], "correct", problem)
        # A lone wrong trace may find its right one in another row.
        wants_rejected = chosen is not None or config.unpaired == "keep" or config.joins_rows
        rejected, rejected_length = None, None
        if wants_rejected:
            incorrect = texts["incorrect"]
            rejected, rejected_length = self._first(prompt, incorrect, "incorrect", problem)
        else:
            for text in texts["incorrect"]:
                self._drop_trace(UNPAIRED, problem, text)
        if config.length_rule == "paper" and chosen is not None and rejected is not None:
            reason = self._too_long_for_paper(prompt, chosen, rejected)
            if reason is not None:
                self._drop_trace(reason, problem, rejected)
                rejected, rejected_length = None, None
        if chosen is None and rejected is None:
            return None
        is_pair = None not in (chosen, rejected) or config.unpaired == "keep"
        example = Example(problem.id, prompt, chosen, rejected, problem.answer, problem.source)
        key = _key("problem", _one_line(text_of(problem.prompt)))
        join = _join_key(problem) if config.joins_rows else _key("row", problem.where)
        lengths = (chosen_length, rejected_length)
        return Chosen(example, problem.where, row, key, join, is_pair, *lengths)

    def _first(
        self, prompt: Prompt, texts: list[str], outcome: str, problem: Problem
    ) -> tuple[str | None, int | None]:
        """(the first of `texts` that fits, its length)."""
        first, first_length = None, None
        for text in texts:
            reason: str | None = not_first(outcome)
            detail = ""
            if first is None:
                length, reason, detail = self._measure(prompt, text, problem.where)
                if reason is None:
                    first, first_length = text, length
            if reason is not None:
                self._drop_trace(reason, problem, text, detail)
        return first, first_length

    def _pass_through(
        self, example: Example, where: str, row: int, is_labelled: bool
    ) -> Chosen | None:
        """A ready row. A lone trace is for pairs.parquet if it is rejected or carries a label."""
        is_pair = is_labelled or example.rejected is not None
        self.wants_pairs |= is_pair
        sides = example.sides
        reason, detail, lengths = None, "", {}
        if example.chosen == example.rejected:
            reason = SAME
        if reason is None and example.source in self.config.exclude_sources:
            reason = f"source {example.source} excluded"
        is_known = self.overlap.check(example.prompt, where, example.id, self.report)
        reason = reason or _contaminated(self.config, is_known)
        for is_chosen, text in sides:
            if self._is_cut_off(text):
                reason = reason or UNFINISHED
            lengths[is_chosen], unfit, why = self._measure(example.prompt, text, where)
            if reason is None:
                reason, detail = unfit, why
        if reason:
            self._drop_row(reason, example, where, len(sides), detail)
            return None
        for is_chosen, text in sides:
            self._judged("correct" if is_chosen else "incorrect", example.source, text)
        key = _key("ready", json.dumps([example.prompt, example.chosen, example.rejected]))
        return Chosen(example, where, row, key, key, is_pair, lengths.get(True), lengths.get(False))

    def _judged(self, outcome: str, source: str | None, text: str) -> None:
        self.report.count(f"traces {outcome}", source or "")
        self.report.spread(f"{outcome} traces", "characters", {bin_of(len(text)): 1})

    def _measure(self, prompt: Prompt, text: str, where: str) -> tuple[int, str | None, str]:
        """(length, why the trace cannot be used if it cannot, what is wrong with it if something
        is)."""
        config = self.config
        if not text.strip():
            return 0, "empty generation", ""
        if self.chat is None:
            return len(text), None, ""
        if config.max_length and self.chat.is_far_longer(prompt, text, config.max_length):
            return 0, f"longer than max_length {config.max_length}", ""
        try:
            ids, num_prompt_tokens = self.chat.encode(prompt, text)
        except RediError as error:
            return 0, _NOT_CARRIED, f"{where}: {error}"
        return len(ids), self._too_long(len(ids), num_prompt_tokens), ""

    def _too_long(self, num_tokens: int, num_prompt_tokens: int) -> str | None:
        config = self.config
        if config.length_rule == "paper":
            return over_limit(num_tokens, 0, config.max_length, None)
        limits = (config.max_length, config.max_prompt_length)
        reason = over_limit(num_tokens, num_prompt_tokens, *limits)
        limit = config.max_completion_length
        if reason is None and limit and num_tokens - num_prompt_tokens > limit:
            reason = f"longer than max_completion_length {limit}"
        return reason

    def _too_long_for_paper(self, prompt: Prompt, chosen: str, rejected: str) -> str | None:
        if self.chat is None:
            return None
        config = self.config
        if config.max_prompt_length and self.chat.count_apart(prompt) > config.max_prompt_length:
            return f"pair dropped: prompt longer than max_prompt_length {config.max_prompt_length}"
        limit = config.max_completion_length
        for name, text in (("chosen", chosen), ("rejected", rejected)):
            turn: Prompt = [{"role": "assistant", "content": text}]
            if limit and self.chat.count_apart(turn) > limit:
                return f"pair dropped: {name} longer than max_completion_length {limit}"
        return None

    def _drop_row(
        self, reason: str, item: Problem | Example, where: str, num_traces: int, detail: str = ""
    ) -> None:
        about: dict[str, Any] = {"id": item.id, "source": item.source}
        self.report.drop("rows", reason, where, text=text_of(item.prompt), detail=detail, **about)
        if num_traces:
            self.report.drop("traces", f"row dropped: {reason}", where, number=num_traces, **about)

    def _drop_trace(
        self, reason: str, problem: Problem, text: str | None, detail: str = ""
    ) -> None:
        about: dict[str, Any] = {"id": problem.id, "source": problem.source, "detail": detail}
        self.report.drop("traces", reason, problem.where, text=text, **about)


def _contaminated(config: DataConfig, is_known: bool) -> str | None:
    is_dropped = is_known and config.contaminated == "drop"
    return "shares 8 words in a row with an evaluation set" if is_dropped else None


def not_first(outcome: str) -> str:
    """Why one of several "correct" (or "incorrect") traces is left."""
    return f"{outcome}, not the first of its problem"


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _join_key(problem: Problem) -> bytes:
    """The same for rows that pose the same problem, all its messages, and expect the same answer:
    what one of them calls wrong is wrong for the others too."""
    prompt, answer = problem.prompt, problem.answer
    if not isinstance(prompt, str):
        prompt = json.dumps([[m["role"], _one_line(m["content"])] for m in prompt])
    if answer is not None:
        answer = _one_line((extract_answer(answer) or answer).replace("$", ""))
    return _key("join", json.dumps([_one_line(prompt), answer]))


def _key(kind: str, text: str) -> bytes:
    return hashlib.blake2b(f"{kind} {text}".encode(), digest_size=8).digest()


def _votes(problem: Problem, config: DataConfig) -> list[list[bool | None]]:
    """For each generation what each judge recorded; None is for math-verify to fill in."""
    judgments = problem.judgments
    if config.judges == "math_verify":
        judgments = {k: v for k, v in judgments.items() if k == "math_verify"}
    if config.missing_verdict == "wrong":
        judgments = {k: [bool(vote) for vote in votes] for k, votes in judgments.items()}
    missing: list[bool | None] = [None] * len(problem.generations)
    return [list(votes) for votes in zip(*(judgments.values() or [missing]), strict=True)]


def _decide(votes: list[bool | None], judges: str) -> bool | None:
    """Correct, incorrect, or None as long as a missing vote could still tip it."""
    decisive = judges == "any"  # one such vote settles it
    if decisive in votes:
        return decisive
    return None if None in votes else not decisive


def _outcome(text: str | None, votes: list[bool | None], verdict: str | None, judges: str) -> str:
    if text is None or not text.strip():
        return "empty generation"
    filled = {"correct": True, "wrong": False}.get(verdict or "")
    decision = _decide([filled if vote is None else vote for vote in votes], judges)
    if decision is None:
        return _UNKNOWN[verdict]
    return "correct" if decision else "incorrect"
