"""One answer against another: what a verdict means. Run as a script, this file is verify's worker.

Standard library only, plus math-verify inside the worker: a worker starts without torch or redi.
"""

import json
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal

Verdict = Literal["correct", "wrong", "unparsable", "timeout"]
Grader = Literal["math_verify", "rllm"]

RULES = 1  # to be raised when a verdict or a vote may change: what older rules graded is not kept
MAX_CHARS = 4000  # of an answer, or of the end of a text that marks none; longer is no answer
_MEMORY_LIMIT = 4 << 30  # bytes a worker may map: 9^9^9^9 must not take the machine down
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.S)  # \{ is no brace
_HASHES = re.compile(r".*(?<!#)####(?!#)")
_ANSWER = re.compile(r"[ *#]*(?:final )?answer[ *]*:", re.I)
_LONE_A = re.compile(r"[ *]*A[ *]*:(?![a-zA-Z]|.*:)")  # A:B=2:3 is a ratio, A: 1, B: 2 a list
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?")
_NOISE = str.maketrans("", "", " \t\n$")
_SPACE = re.compile(r"\\[ ,;:!]|\s(?!\s*\d)|(?<!\d)\s|[$~]|\.$")  # none between digits
_WORD = re.compile(r"[a-zA-Z]{2}")
_DIGITS_APART = re.compile(r"(?<=\d)\s+(?=\d)")  # 3 5/8 is not 35/8


def extract_answer(text: str) -> str | None:
    """The final answer that `text` marks: the last \\boxed{}, else, on the last line, what stands
    after #### or "Answer:" (or "A:", below other lines); None if it marks none, or if the last box
    does not close."""
    box = _last_box(text)
    if box is not None:
        return text[box[1] : box[2] - 1].strip()
    if _BOX.search(text):
        return None
    above, _, line = text.strip().rpartition("\n")
    mark = _HASHES.match(line)  # higher up it is a heading of markdown
    line = line[mark.end() :] if mark else line
    label = _ANSWER.match(line) or (_LONE_A.match(line) if above else None)
    if not (mark or label):
        return None
    line = line[label.end() :] if label else line
    return line.strip().lstrip("* ").removesuffix("**").rstrip() or None


def quick_verdict(given: str, expected: str) -> Verdict | None:
    """The verdict where no algebra is needed: the same text, or two plain numbers; else None.

    Numbers may have thousands separators, dollar signs, a final period, and a percent sign if both
    have it (whether 50% is 50 or 0.5 is left to math-verify). Two numbers that agree in six
    decimals or more, as far as the shorter one goes, are equal: 0.333333 and 0.3333333.
    """
    texts = (_DIGITS_APART.sub("~", text).replace("\\$", "") for text in (given, expected))
    a, b = (text.translate(_NOISE) for text in texts)
    if a == b and a:
        return "correct"
    if a.endswith("%") and b.endswith("%"):
        a, b = a.rstrip("\\%"), b.rstrip("\\%")
    if len(a) > 40 or len(b) > 40 or not (_NUMBER.fullmatch(a) and _NUMBER.fullmatch(b)):
        return None
    x, y = (Decimal(text.replace(",", "")) for text in (a, b))
    places = min(len(text.partition(".")[2]) for text in (a, b))
    is_near = abs(x - y) <= Decimal("5e-6") * max(abs(x), abs(y))
    is_rounded = places >= 6 and is_near and round(x, places) == round(y, places)
    return "correct" if x == y or is_rounded else "wrong"


def excerpt(text: str, answer: str | None) -> str | None:
    """What math-verify needs to see of `text`, whose `extract_answer` is `answer`; None if nothing,
    as where the last box does not close: an earlier one is not the final answer."""
    box = _last_box(text)
    if box is not None:  # with what stands before it, for answers like \boxed{2} and \boxed{3}
        return text[max(box[0] - 200, 0) : box[2]]
    if answer is not None:
        return f"\\boxed{{{answer}}}"
    return None if _BOX.search(text) or not text.strip() else text[-MAX_CHARS:]


def judge(text: str, answer: str) -> Verdict:
    """The verdict on an `excerpt`; "unparsable" if either side holds no answer."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    from redi.data.notation import align, rewrite, unwrap

    # The box wins over phrases such as "the answer is". No time limit: see verify.py.
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    box = _last_box(text)
    try:
        if box is None:
            given = text = rewrite(text)
            answer = rewrite(answer)
        else:
            given = text[box[1] : box[2] - 1]
            if unwrap(given) != given or unwrap(answer) != answer:
                a, b = (_SPACE.sub("", unwrap(side)) for side in (given, answer))
                if a and (a == b or (_WORD.search(a) and a.casefold() == b.casefold())):
                    return "correct"
            pair = align(rewrite(given), rewrite(answer))
            if pair is None:
                return "wrong"
            given, answer = pair
            quick = quick_verdict(given, answer)
            if quick:
                return quick
            text = f"{rewrite(text[: box[1]])}{given}}}"
        gold = parse(f"\\boxed{{{answer}}}", kinds, parsing_timeout=None, raise_on_error=True)
        found = parse(text, kinds, parsing_timeout=None, raise_on_error=True)
        if not gold or not found:
            return "unparsable"
        return "correct" if _is_equal(gold, found, "%" in given + answer) else "wrong"
    except Exception:  # parsers fail in many ways on text that holds no answer
        return "unparsable"


def _is_equal(gold: list, found: list, has_percent: bool) -> bool:
    """math-verify's comparison; then with i as the imaginary unit and sums worked out; never true
    of two numbers that differ in six significant digits, where it rounds to six decimals."""
    from math_verify import verify
    from sympy import Basic, I, Integral, Product, Sum, Symbol

    def compare(gold: list, found: list) -> bool:
        settings = {"timeout_seconds": None, "raise_on_error": True}
        return verify(gold, found, allow_set_relation_comp=True, **settings)

    if compare(gold, found):
        return has_percent or not _differ(gold[0], found[0])
    if not all(isinstance(side[0], Basic) for side in (gold, found)):
        return False
    sides = [side[0] for side in (gold, found)]
    if not any(x.has(Sum, Product, Integral) or "i" in map(str, x.free_symbols) for x in sides):
        return False
    for k, x in enumerate(sides):  # symbols that math-verify takes for real and for complex differ
        names = {s: I if s.name == "i" else Symbol(s.name, real=True) for s in x.free_symbols}
        sides[k] = x.subs(names).doit()
    return compare(sides[:1], sides[1:])


def _differ(a: Any, b: Any) -> bool:
    """Whether both are numbers and not the same one: to six digits where a decimal is among them,
    else to thirty."""
    from sympy import Expr, Float

    if not (isinstance(a, Expr) and isinstance(b, Expr) and a.is_number and b.is_number):
        return False
    if a.is_infinite or b.is_infinite:
        return False
    a, b = a.doit(), b.doit()
    tolerance = 5e-6 if a.has(Float) or b.has(Float) else 1e-30
    size = max(abs(a.evalf(40)), abs(b.evalf(40)))
    return bool(abs((a - b).evalf(40)) > tolerance * size)


def serve(judge: Callable[[str, str], Verdict]) -> None:
    """The worker: one JSON pair [text, answer] per line in, one verdict per line out, until EOF.

    Argument 1 is the parent's sys.path, argument 2 the seconds of computing allowed for one answer:
    the kernel ends a worker that takes more (SIGPROF), so that a verdict does not depend on what
    else the machine does. Argument 3 is the same by the clock, for a worker whose parent is gone;
    the last is the grader.
    """
    import contextlib
    import logging
    import os
    import resource
    import signal

    sys.path[:] = json.loads(sys.argv[1])
    limit, by_the_clock = float(sys.argv[2]), float(sys.argv[3])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with contextlib.suppress(OSError, ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, resource.RLIM_INFINITY))
    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what libraries print must not reach the parent
    judge("\\boxed{x}", "1")  # imports, before the first clock starts
    print("ready", file=out, flush=True)
    os.dup2(nowhere, 2)  # only a failed start is worth reading
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit)  # default action: the process ends
        signal.setitimer(signal.ITIMER_REAL, by_the_clock)
        text, answer = json.loads(line)
        print(judge(text, answer), file=out, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def _last_box(text: str) -> tuple[int, int, int] | None:
    """(start, start of its content, end) of the last \\boxed{...} if its braces close."""
    boxes = list(_BOX.finditer(text))
    if not boxes:
        return None
    start, content = boxes[-1].span()
    depth = 1
    for brace in _BRACE.finditer(text, content, content + MAX_CHARS):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return start, content, brace.end()
    return None


def _rllm(given: str, expected: str) -> Verdict:
    from redi.data.rllm import judge

    return judge(given, expected)


if __name__ == "__main__":
    serve(_rllm if sys.argv[-1] == "rllm" else judge)
