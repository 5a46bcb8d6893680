"""The grader against labels that it had no part in.

    python bench/grader.py                                              tests' table of answers
    python bench/grader.py --solutions example_model_solutions.jsonl    GSM8K's labelled solutions
    python bench/grader.py --benchmarks FOLDER                          benchmarks' own answers

Solutions: OpenAI's `example_model_solutions.jsonl` (github.com/openai/grade-school-math): four
models' solutions to 1,319 problems, each with `is_correct`. Every disagreement is printed.
Benchmarks: every answer is graded against itself, written otherwise where that is possible
(\\dfrac for \\frac, a space around signs), and against the next problem's answer.
"""

import argparse
import json
import re
import time
from collections import Counter
from pathlib import Path

from redi.data.verify import Verifier, extract_answer

TABLE = Path(__file__).parents[1] / "tests" / "redi" / "data" / "answers.tsv"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--solutions", type=Path)
    parser.add_argument("--benchmarks", type=Path)
    parser.add_argument("--timeout", type=float, default=60.0)
    args = parser.parse_args()
    for grader in ("math_verify", "rllm"):
        with Verifier(timeout=args.timeout, grader=grader) as verifier:
            if not (args.solutions or args.benchmarks):
                table(verifier)
            if args.solutions and grader == "math_verify":
                solutions(args.solutions, verifier)
            if args.benchmarks:
                benchmarks(args.benchmarks, verifier)


def table(verifier: Verifier) -> None:
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    _, *rows = [line.split("\t") for line in lines if not line.startswith("#")]
    texts = [
        given if re.search(r"\\(?:boxed|fbox)", given) else rf"\boxed{{{given}}}"
        for _, _, given, *_ in rows
    ]
    start = time.perf_counter()
    verdicts = verifier.verify(["</think>" + text for text in texts], [row[1] for row in rows])
    seconds = time.perf_counter() - start
    wrong = [(row, v) for row, v in zip(rows, verdicts, strict=True) if v != row[3]]
    accepted = sum(verdict == "correct" for _, verdict in wrong)
    print(f"{verifier.grader}: {len(rows) - len(wrong)} of {len(rows)} verdicts are right")
    refused = len(wrong) - accepted
    print(f"  wrong accepted: {accepted}, right refused: {refused}; {seconds:.0f} s")
    for (kind, expected, given, truth, _), verdict in wrong[:20]:
        print(f"    {kind}: expected {expected}  given {given}  is {truth}, called {verdict}")
    if len(wrong) > 20:
        print(f"    and {len(wrong) - 20} more")


def solutions(file: Path, verifier: Verifier) -> None:
    items = []
    for line in file.open(encoding="utf-8"):
        row = json.loads(line)
        for model, said in row.items():
            if isinstance(said, dict):
                items.append((model, said["solution"], row["ground_truth"], said["is_correct"]))
    start = time.perf_counter()
    verdicts = verifier.verify([i[1] for i in items], [i[2] for i in items])
    seconds = time.perf_counter() - start
    counts = Counter((item[3], verdict) for item, verdict in zip(items, verdicts, strict=True))
    agree = counts[True, "correct"] + sum(
        n for (label, v), n in counts.items() if not label and v != "correct"
    )
    print(f"{file.name}: {agree} of {len(items)} agree with is_correct ({seconds:.1f} s)")
    for (label, verdict), n in sorted(counts.items()):
        print(f"    labelled {'right' if label else 'wrong'}, graded {verdict}: {n}")
    for (model, text, truth, label), verdict in zip(items, verdicts, strict=True):
        if label != (verdict == "correct"):
            answers = f"expected {extract_answer(truth)!r}, given {extract_answer(text)!r}"
            print(f"  {model}: labelled {label}, graded {verdict}; {answers}, ends {text[-60:]!r}")


def benchmarks(folder: Path, verifier: Verifier) -> None:
    for file in sorted(folder.glob("*.json")):
        answers = []
        for row in json.loads(file.read_text(encoding="utf-8")):
            answer = row["answer"]
            answers.append(str(answer[0] if isinstance(answer, list) else answer).strip())
        variants = [
            a.replace("\\frac", "\\dfrac").replace("+", " + ").replace("=", " = ") for a in answers
        ]
        others = [*answers[1:], answers[0]]
        for what, given in (("itself", variants), ("the next one", others)):
            verdicts = verifier.verify([rf"</think>\boxed{{{a}}}" for a in given], answers)
            counts = dict(Counter(verdicts))
            print(f"{verifier.grader}: {file.name}: {len(answers)} against {what}: {counts}")
            expected = "correct" if what == "itself" else "wrong"
            for a, b, verdict in zip(given, answers, verdicts, strict=True):
                if verdict != expected and not (what != "itself" and a == b):
                    print(f"    {verdict}: {a!r} for {b!r}"[:200])


if __name__ == "__main__":
    main()
