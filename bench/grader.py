"""The grader against labels that it had no part in: false accepts and false refusals, apart.

    python bench/grader.py                                              tests' table of answers
    python bench/grader.py --pairs FILE.tsv                             other pairs with verdicts
    python bench/grader.py --solutions example_model_solutions.jsonl    GSM8K's labelled solutions
    python bench/grader.py --benchmarks FOLDER                          benchmarks' own answers

Pairs: a header, then gold, text that ends in an answer, right verdict, ..., label's source, with
tabs between; U+240A is a line break; what is marked "arguable" is counted apart.
Solutions: OpenAI's `example_model_solutions.jsonl` (github.com/openai/grade-school-math): four
models' solutions to 1,319 problems, each with `is_correct`.
Benchmarks: every answer is graded against itself, written otherwise where that is possible (\\dfrac
for \\frac, a space around signs), against the next problem's answer, and against its own solution
where the file has one: many of those are proofs that mark no answer.
"""

import argparse
import json
import re
import resource
import time
from collections import Counter
from pathlib import Path

from redi.grading.verify import Verifier

TABLE = Path(__file__).parents[1] / "tests" / "redi" / "grading" / "answers.tsv"

Item = tuple[str, str, str]  # text, expected answer, the right verdict


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--solutions", type=Path)
    parser.add_argument("--benchmarks", type=Path)
    parser.add_argument("--grader", choices=["math_verify", "rllm"], default="math_verify")
    parser.add_argument("--timeout", type=float, default=60.0)
    parser.add_argument("--show", type=int, default=20, help="how many disagreements to print")
    args = parser.parse_args()
    sets: dict[str, list[Item]] = {}
    if args.pairs:
        sets |= pairs(args.pairs)
    if args.solutions:
        sets[args.solutions.name] = solutions(args.solutions)
    if args.benchmarks:
        sets |= benchmarks(args.benchmarks)
    sets = sets or {TABLE.name: table()}
    for name, items in sets.items():
        before = cpu_seconds()
        with Verifier(timeout=args.timeout, grader=args.grader) as verifier:
            prefix = "</think>" if args.grader == "rllm" else ""
            verdicts = verifier.verify([prefix + item[0] for item in items], [i[1] for i in items])
        report(name, items, verdicts, cpu_seconds() - before, args.show)


def report(name: str, items: list[Item], verdicts: list, seconds: float, show: int) -> None:
    counts = Counter((item[2], verdict) for item, verdict in zip(items, verdicts, strict=True))
    right = sum(n for (label, _), n in counts.items() if label == "correct")
    wrong = sum(n for (label, _), n in counts.items() if label == "wrong")
    agree = sum(n for (label, verdict), n in counts.items() if label == verdict)
    unread = sum(n for (_, verdict), n in counts.items() if verdict not in ("correct", "wrong"))
    accepted, refused = counts["wrong", "correct"], counts["correct", "wrong"]
    print(f"{name}: {agree} of {len(items)} verdicts are right ({agree / len(items):.1%})")
    missed = right - refused - counts["correct", "correct"]
    print(f"  wrong ones accepted: {accepted} of {wrong}")
    print(f"  right ones called wrong: {refused} of {right}")
    print(f"  unparsable or timeout: {unread} ({unread / len(items):.1%}); {missed} of them right")
    print(f"  {seconds / len(items) * 1e3:.2f} ms of CPU each, with the starts of workers")
    differing = [
        (item, v)
        for item, v in zip(items, verdicts, strict=True)
        if v != item[2] and (v == "correct" or item[2] == "correct")
    ]
    for (text, expected, label), verdict in differing[:show]:
        print(f"    {label}, called {verdict}: expected {expected!r}, given ...{text[-70:]!r}")


def cpu_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def table() -> list[Item]:
    lines = TABLE.read_text(encoding="utf-8").split("\n")
    _, *rows = [line.split("\t") for line in lines if line and not line.startswith("#")]
    return [
        (given if re.search(r"\\(?:boxed|fbox)", given) else rf"\boxed{{{given}}}", expected, right)
        for _, expected, given, right, _ in rows
    ]


def pairs(file: Path) -> dict[str, list[Item]]:
    """Those of `file`, the arguable ones apart."""
    found: dict[str, list[Item]] = {file.name: [], f"{file.name}, arguable": []}
    for line in file.read_text(encoding="utf-8").split("\n")[1:]:
        if not line:
            continue
        gold, text, right, *more = [part.replace("\u240a", "\n") for part in line.split("\t")]
        is_arguable = bool(more) and "arguable" in more[-1]
        found[f"{file.name}, arguable" if is_arguable else file.name].append((text, gold, right))
    return {name: items for name, items in found.items() if items}


def solutions(file: Path) -> list[Item]:
    return [
        (said["solution"], row["ground_truth"], "correct" if said["is_correct"] else "wrong")
        for row in map(json.loads, file.open(encoding="utf-8"))
        for said in row.values()
        if isinstance(said, dict)
    ]


def benchmarks(folder: Path) -> dict[str, list[Item]]:
    sets: dict[str, list[Item]] = {}
    for file in sorted(folder.glob("*.json")):
        rows = json.loads(file.read_text(encoding="utf-8"))
        answers = [str(first(row["answer"])).strip() for row in rows]
        for what, given in (("itself", answers), ("the next one", [*answers[1:], answers[0]])):
            sets[f"{file.name} against {what}"] = [
                (boxed(text), answer, "correct" if what == "itself" or text == answer else "wrong")
                for text, answer in zip(given, answers, strict=True)
            ]
        solved = [(first(row.get("solution")), a) for row, a in zip(rows, answers, strict=True)]
        items = [(text, answer, "correct") for text, answer in solved if text]
        if items:
            sets[f"{file.name} against its solutions"] = items
    return sets


def boxed(answer: str) -> str:
    answer = answer.replace("\\frac", "\\dfrac").replace("+", " + ").replace("=", " = ")
    return rf"\boxed{{{answer}}}"


def first(value: object) -> object:
    return value[0] if isinstance(value, list) and value else value


if __name__ == "__main__":
    main()
