"""Raw generations to training data: judge every trace, keep the first right and first wrong one.

Writes `positives.parquet` (the paper's D_SFT: the first correct trace of each problem),
`pairs.parquet` (D_Pref: the first correct with the first incorrect one) and a report that accounts
for every trace. Reads row by row; the same input gives the same bytes.
"""

import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from redi.config import DataConfig
from redi.data.read import Example, Problem, Prompt, make_prompt, read_rows, to_item
from redi.data.table import Table
from redi.data.tokenize import ChatFormat, over_limit
from redi.data.verify import Verifier
from redi.errors import RediError
from redi.files import publish

_CHUNK = 2000  # generations judged at once: enough to keep the verifier's workers busy
_UNKNOWN = {
    "timeout": "judging took too long",
    "unparsable": "no answer that can be read",
    None: "no verdict, and no answer to judge by",
}


@dataclass
class BuildReport:
    """What became of every row and every trace.

    traces read = traces kept + traces dropped (a trace that is in both files is kept once).
    `dropped_rows` and `dropped_traces` map a reason to how often it struck and where first; the
    traces of a dropped row are among the traces dropped.
    """

    counts: dict[str, int] = field(default_factory=dict)
    dropped_rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    dropped_traces: dict[str, dict[str, Any]] = field(default_factory=dict)
    lengths: dict[str, dict[str, float]] = field(default_factory=dict)
    length_unit: str = "characters"
    config: dict[str, Any] = field(default_factory=dict)

    def text(self) -> str:
        """The report as lines that line up."""
        width = 4 + max(map(len, (*self.counts, *self.dropped_rows, *self.dropped_traces)))
        lines = [f"{name:<{width}}{count:>12,}" for name, count in self.counts.items()]
        for title, dropped in (("rows", self.dropped_rows), ("traces", self.dropped_traces)):
            lines += ["", f"{title} dropped" if dropped else f"no {title} dropped"]
            for reason, entry in dropped.items():
                name = f"  {reason}"
                lines.append(f"{name:<{width}}{entry['count']:>12,}  first: {entry['first']}")
        columns = ("mean", "median", "p95", "max")
        title = f"length in {self.length_unit}"
        lines += ["", f"{title:<{width}}" + "".join(f"{column:>12}" for column in columns)]
        for name, stats in self.lengths.items():
            figures = "".join(f"{stats[column]:>12,.0f}" for column in columns)
            lines.append(f"{'  ' + name:<{width}}{figures}")
        return "\n".join(lines)


def build(
    config: DataConfig,
    output_dir: str | os.PathLike,
    *,
    tokenizer: Any = None,
    progress: Callable[[int], None] | None = None,
) -> BuildReport:
    """Builds positives.parquet, pairs.parquet, report.txt and report.json in `output_dir`.

    A trace is correct iff `config.judges` say so: "both" (every recorded judge), "any" of them, or
    "math_verify" alone. Where a verdict is missing, math-verify judges the trace against `answer`.
    A trace without a definite verdict is dropped: it never becomes a negative.

    Ready rows pass through unchanged; `system_prompt` and `prompt_template` are for raw problems.
    With a tokenizer, lengths are in tokens, and a trace over config.max_length or max_prompt_length
    is dropped before the first correct and the first incorrect one are chosen.

    The files appear complete or not at all, report.json last. `progress` is told the number of rows
    read. Raises RediError for bad input, a full disk, and if no pairs are left (if the input has
    nothing but positives: no positives), with the reasons.
    """
    if tokenizer is None and (config.max_length or config.max_prompt_length):
        raise RediError("max_length and max_prompt_length count tokens: give a tokenizer")
    builder = _Builder(config, tokenizer)
    folder = Path(output_dir)
    aside = folder / ".building"
    try:
        shutil.rmtree(aside, ignore_errors=True)  # of a run that was killed
        aside.mkdir(parents=True)
        with (
            Table(aside / "positives.parquet", ("completion",)) as positives,
            Table(aside / "pairs.parquet", ("chosen", "rejected")) as pairs,
            Verifier(num_workers=config.num_workers, timeout=config.verify_timeout) as verifier,
        ):
            tables = {"positives": positives, "pairs": pairs}
            for where, name, example in builder.run(verifier, progress):
                tables[name].write(example, where)
            report = builder.finish()
            for table in tables.values():
                table.finish()
        (aside / "report.txt").write_text(report.text() + "\n", encoding="utf-8")
        (aside / "report.json").write_text(json.dumps(asdict(report), indent=1) + "\n")
        names = ["positives.parquet", "pairs.parquet", "report.txt", "report.json"]
        publish(aside, {name: folder / name for name in names})
    except OSError as error:
        raise RediError(
            f"{folder}: cannot be written: {error}; put it right and run again"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return report


class _Builder:
    """Judges and selects; leaves files to others."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self.config = config
        self.chat = None if tokenizer is None else ChatFormat(tokenizer)
        self.report = BuildReport(config=config.model_dump(exclude={"num_workers"}))
        if self.chat:
            self.report.length_unit = "tokens"
        names = ("rows read", "traces read", "traces correct", "traces incorrect", "traces kept")
        self.counts = self.report.counts
        self.counts.update(dict.fromkeys((*names, "positives", "pairs"), 0))
        self.lengths: dict[str, array] = {}
        self.wants_pairs = False

    def run(
        self, verifier: Verifier, progress: Callable[[int], None] | None
    ) -> Iterator[tuple[str, str, Example]]:
        """Yields (where, "positives" or "pairs", example) in the order of the rows."""
        for stretch in self._stretches():
            problems = [item for _, item, _ in stretch if isinstance(item, Problem)]
            problems = [problem for problem in problems if self._accept(problem)]
            outcomes = {
                problem.where: outcome
                for problem, outcome in zip(problems, self._judge(problems, verifier), strict=True)
            }
            for where, item, is_labelled in stretch:
                self.counts["rows read"] += 1
                if isinstance(item, Example):
                    examples = self._pass_through(item, where, is_labelled)
                elif where in outcomes:
                    examples = self._select(item, outcomes[where])
                else:
                    continue
                for name, example in examples:
                    self.counts[name] += 1
                    yield where, name, example
            if progress:
                progress(self.counts["rows read"])

    def finish(self) -> BuildReport:
        counts, report = self.counts, self.report
        if not counts["rows read"]:
            raise RediError(f"{self.config.path}: no rows")
        if not counts["pairs"] and (self.wants_pairs or not counts["positives"]):
            dropped = [*report.dropped_rows.items(), *report.dropped_traces.items()]
            raise RediError(
                f"{self.config.path}: no pairs left of {counts['rows read']} rows: "
                + "; ".join(f"{d['count']} {reason} (first: {d['first']})" for reason, d in dropped)
            )
        for name, values in self.lengths.items():
            lengths = np.frombuffer(values, dtype=np.int64)
            report.lengths[name] = {
                "mean": float(lengths.mean()),
                "median": float(np.median(lengths)),
                "p95": float(np.percentile(lengths, 95)),
                "max": float(lengths.max()),
            }
        return report

    def _stretches(self) -> Iterator[list[tuple[str, Problem | Example, bool]]]:
        """Rows in stretches of about _CHUNK traces: (where, row, does it carry a label?)."""
        stretch: list[tuple[str, Problem | Example, bool]] = []
        size = 0
        for where, row in read_rows(self.config.path):
            item = to_item(row, where)
            stretch.append((where, item, "label" in row))
            size += len(item.generations) if isinstance(item, Problem) else 1
            if size >= _CHUNK:
                yield stretch
                stretch, size = [], 0
        yield stretch

    def _accept(self, problem: Problem) -> bool:
        """Whether the row can be used at all; counts it as dropped if not."""
        self.wants_pairs = True
        num = len(problem.generations)
        self.counts["traces read"] += num
        if not problem.is_valid:
            reason = "problem_is_valid is not yes"
        elif not str(problem.prompt).strip():
            reason = "empty problem"
        elif num == 0:
            reason = "no generations"
        elif any(len(verdicts) != num for verdicts in problem.judgments.values()):
            reason = "verdicts and generations differ in number"
        else:
            return True
        self._drop(self.report.dropped_rows, reason, problem.where)
        self._drop(self.report.dropped_traces, f"row dropped: {reason}", problem.where, num)
        return False

    def _judge(self, problems: list[Problem], verifier: Verifier) -> list[list[str]]:
        """For each generation "correct", "incorrect", or why it is neither."""
        judges = self.config.judges
        votes = [_votes(problem, judges) for problem in problems]
        asked = [
            (p, g)
            for p, problem in enumerate(problems)
            for g, text in enumerate(problem.generations)
            if text and problem.answer and _decide(votes[p][g], judges) is None
        ]
        verdicts = verifier.verify(
            [problems[p].generations[g] or "" for p, g in asked],
            [problems[p].answer or "" for p, _ in asked],
        )
        judged = dict(zip(asked, verdicts, strict=True))
        return [
            [
                _outcome(text, votes[p][g], judged.get((p, g)), judges)
                for g, text in enumerate(problem.generations)
            ]
            for p, problem in enumerate(problems)
        ]

    def _select(self, problem: Problem, outcomes: list[str]) -> Iterator[tuple[str, Example]]:
        """The first correct and the first incorrect generation that fit; counts the others."""
        prompt = make_prompt(problem.prompt, self.config.system_prompt, self.config.prompt_template)
        texts: dict[str, list[str]] = {"correct": [], "incorrect": []}
        for text, outcome in zip(problem.generations, outcomes, strict=True):
            if outcome in texts:
                texts[outcome].append(text or "")
                self.counts[f"traces {outcome}"] += 1
            else:
                self._drop(self.report.dropped_traces, outcome, problem.where)
        chosen = self._first(prompt, texts["correct"], "correct", problem.where)
        rejected = None
        if chosen is not None:
            rejected = self._first(prompt, texts["incorrect"], "incorrect", problem.where)
            example = Example(
                problem.id, prompt, chosen, rejected, answer=problem.answer, source=problem.source
            )
            yield "positives", example
            if rejected is not None:
                yield "pairs", example
        elif texts["incorrect"]:
            reason = "incorrect, no correct one to pair with"
            self._drop(self.report.dropped_traces, reason, problem.where, len(texts["incorrect"]))

    def _first(self, prompt: Prompt, texts: list[str], outcome: str, where: str) -> str | None:
        first = None
        for text in texts:
            reason: str | None = f"{outcome}, not the first of its problem"
            if first is None:
                length, reason = self._measure(prompt, text, where)
                if reason is None:
                    first = text
                    self._record(outcome, length)
            if reason is not None:
                self._drop(self.report.dropped_traces, reason, where)
        return first

    def _pass_through(
        self, example: Example, where: str, is_labelled: bool
    ) -> Iterator[tuple[str, Example]]:
        """A ready row. A lone trace is for pairs.parquet if it is rejected or carries a label."""
        is_pair = is_labelled or example.rejected is not None
        self.wants_pairs |= is_pair
        sides = example.sides
        self.counts["traces read"] += len(sides)
        measured = [self._measure(example.prompt, text, where) for _, text in sides]
        reason = next((reason for _, reason in measured if reason), None)
        if reason:
            self._drop(self.report.dropped_rows, reason, where)
            self._drop(self.report.dropped_traces, f"row dropped: {reason}", where, len(sides))
            return
        for (is_chosen, _), (length, _) in zip(sides, measured, strict=True):
            outcome = "correct" if is_chosen else "incorrect"
            self.counts[f"traces {outcome}"] += 1
            self._record(outcome, length)
        if example.chosen is not None:
            yield "positives", example
        if is_pair:
            yield "pairs", example

    def _record(self, outcome: str, length: int) -> None:
        self.counts["traces kept"] += 1
        self.lengths.setdefault(f"{outcome} traces kept", array("q")).append(length)

    def _measure(self, prompt: Prompt, text: str, where: str) -> tuple[int, str | None]:
        """(length, why the trace is too long). Raises RediError if the template cannot carry it."""
        if not text.strip():
            return 0, "empty generation"
        if self.chat is None:
            return len(text), None
        try:
            ids, num_prompt_tokens = self.chat.encode(prompt, text)
        except RediError as error:
            raise RediError(f"{where}: {error}") from None
        limits = self.config.max_length, self.config.max_prompt_length
        return len(ids), over_limit(len(ids), num_prompt_tokens, *limits)

    @staticmethod
    def _drop(dropped: dict[str, dict[str, Any]], reason: str, where: str, count: int = 1) -> None:
        if count:
            entry = dropped.setdefault(reason, {"count": 0, "first": where})
            entry["count"] += count


def _votes(problem: Problem, judges: str) -> list[list[bool | None]]:
    """For each generation what each judge recorded; None is for math-verify to fill in."""
    judgments = problem.judgments
    if judges == "math_verify":
        judgments = {k: v for k, v in judgments.items() if k == "math_verify"}
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
