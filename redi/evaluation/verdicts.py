"""Questions from files, and the verdicts on what models answer to them: right or wrong, and which
answers are the same one."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from redi.config import EvalConfig
from redi.data.read import Prompt, answer_of, problem_of, read_rows
from redi.errors import RediError
from redi.files import write_text

_VALUE = re.compile(r"\$([^$\n]+)\$|-?[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:/[0-9]+)?")


@dataclass(frozen=True)
class Question:
    id: str
    problem: Prompt
    answer: str
    others: tuple[str, ...] = ()  # answers that are right too


def read_questions(config: EvalConfig) -> list[Question]:
    """The problems of `config.dataset_name`. Raises RediError for a row without problem or answer,
    and for an id that occurs twice."""
    questions: dict[str, Question] = {}
    for where, row in read_rows(config.dataset_name or ""):
        if len(questions) == config.max_problems:
            break
        problem, (answer, *others) = problem_of(row, where), _answers_of(row, where)
        if not problem or not answer:
            empty = "the problem" if not problem else "`answer`"
            raise RediError(f"{where}: {empty} is missing; evaluation needs both")
        name = next((str(row[key]) for key in ("id", "uuid") if row.get(key) is not None), where)
        if name in questions:
            raise RediError(f"{where}: id {name!r} occurs twice; ids must differ")
        questions[name] = Question(name, problem, answer, tuple(filter(None, others)))
    if not questions:
        raise RediError(f"{config.dataset_name}: no rows")
    return list(questions.values())


def _answers_of(row: dict[str, Any], where: str) -> list[str | None]:
    """A list of answers means that each of them is right, as in Minerva's file."""
    answers = row.get("answer")
    several = answers if isinstance(answers, list) and len(answers) > 1 else [answers]
    return [answer_of({"answer": answer}, where) for answer in several]


def make_verifier(config: EvalConfig) -> Any:
    from redi.grading.verify import Verifier

    return Verifier(
        num_workers=config.num_workers, timeout=config.verify_timeout, grader=config.grader
    )


def grade(rows: list[dict[str, Any]], questions: list[Question], verifier: Any) -> None:
    """Sets the verdicts; a sample that is not finished stays wrong, whatever it says."""
    finished = [row for row in rows if row["finished"]]
    answers = [(q.answer, *q.others) for q in (questions[row["problem"]] for row in finished)]
    for turn in range(max(map(len, answers), default=0)):
        open_ = [
            (row, given[turn])
            for row, given in zip(finished, answers, strict=True)
            if turn < len(given) and (turn == 0 or row["verdict"] != "correct")
        ]
        verdicts = verifier.verify([row["text"] for row, _ in open_], [a for _, a in open_])
        for (row, _), verdict in zip(open_, verdicts, strict=True):
            if turn == 0 or verdict == "correct":
                row["verdict"] = verdict


def grade_again(generations: Path, questions: list[Question], config: EvalConfig) -> None:
    """Puts today's verdicts in place of those in `generations`."""
    rows = [json.loads(line) for line in generations.open(encoding="utf-8")]
    with make_verifier(config) as verifier:
        grade(rows, questions, verifier)
    write_text(generations, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))


def vote(config: EvalConfig, generations: Path, file: Path) -> None:
    """Writes, for each problem, the group of each sample: 0 for correct ones, another number for
    each wrong answer that the grader finds equal, -1 for no answer.

    Where a text marks no answer, the grader looks for one; we guess which it saw and ask it. A
    wrong sample of which we cannot tell has a group of its own."""
    from redi.grading.judge import MAX_CHARS, extract_answer
    from redi.grading.rllm import final_answer

    find, mark = (final_answer, "</think>") if config.grader == "rllm" else (extract_answer, "")
    groups: dict[int, dict[int, int]] = {}
    wrong: dict[int, dict[str, list[int]]] = {}  # of each problem, the samples of each answer
    unmarked: list[tuple[int, int, str]] = []  # problem, sample, end of the text
    for row in map(json.loads, generations.open(encoding="utf-8")):
        problem, sample = row["problem"], row["sample"]
        groups.setdefault(problem, {})[sample] = 0 if row["verdict"] == "correct" else -1
        if not (row["finished"] and row["verdict"] == "wrong"):
            continue
        answer = find(row["text"])
        if answer:
            wrong.setdefault(problem, {}).setdefault(answer, []).append(sample)
        elif answer is None:
            unmarked.append((problem, sample, row["text"][-MAX_CHARS:]))
    number = 0
    with make_verifier(config) as verifier:
        guesses = [_guess(text) for *_, text in unmarked]
        seen = verifier.verify([text for *_, text in unmarked], guesses)
        for (problem, sample, _), guess, verdict in zip(unmarked, guesses, seen, strict=True):
            if verdict == "correct":
                wrong.setdefault(problem, {}).setdefault(guess, []).append(sample)
            else:
                number += 1
                groups[problem][sample] = number
        while wrong:  # each turn closes one group of every problem that has answers left
            number += 1
            firsts = {
                problem: min(answers, key=lambda a: min(answers[a]))
                for problem, answers in wrong.items()
            }
            items = [(problem, answer) for problem in wrong for answer in wrong[problem]]
            verdicts = verifier.verify(
                [rf"{mark}\boxed{{{answer}}}" for _, answer in items],
                [firsts[problem] for problem, _ in items],
            )
            for (problem, answer), verdict in zip(items, verdicts, strict=True):
                if answer == firsts[problem] or verdict == "correct":
                    groups[problem].update(dict.fromkeys(wrong[problem].pop(answer), number))
            wrong = {problem: answers for problem, answers in wrong.items() if answers}
    rows = [
        {"problem": problem, "groups": [of for _, of in sorted(groups[problem].items())]}
        for problem in sorted(groups)
    ]
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))


def _guess(text: str) -> str:
    """The number or formula that a text seems to give as its answer: the first one after the last
    "answer is", else the last one; "" if there is none."""
    start = text.lower().rfind("answer is")
    found = [_VALUE.search(text, start)] if start >= 0 else [*_VALUE.finditer(text)]
    last = found[-1] if found else None
    return (last[1] or last[0]) if last else ""
