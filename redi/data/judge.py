"""One answer against another: what a verdict means. Run as a script, this file is verify's worker.

Standard library only, plus math-verify inside the worker: a worker starts without torch or redi.
"""

import json
import re
import sys
from collections.abc import Callable
from decimal import Decimal
from typing import Literal

Verdict = Literal["correct", "wrong", "unparsable", "timeout"]

MAX_CHARS = 4000  # of an answer, or of the end of a text that marks none; longer is no answer
_MEMORY_LIMIT = 4 << 30  # bytes a worker may map: 9^9^9^9 must not take the machine down
_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.S)  # \{ is no brace
_LAST_LINE = re.compile(r"(?:^|\n)[ *]*(?:final )?a(?:nswer)?[ *]*:[ *]*([^\n]+)\s*\Z", re.I)
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?")
_NOISE = str.maketrans("", "", " \t\n$")


def extract_answer(text: str) -> str | None:
    """The final answer that `text` marks: the last \\boxed{}, else the line after the last ####,
    else a last line "Answer: ..." (or "A: ..."); None if it marks none."""
    box = _last_box(text)
    if box is not None:
        return text[box[1] : box[2] - 1].strip()
    _, mark, after = text.rpartition("####")
    if mark:
        return after.strip().partition("\n")[0].strip() or None
    last_line = _LAST_LINE.search(text[-MAX_CHARS:])
    return last_line[1].strip() if last_line else None


def quick_verdict(given: str, expected: str) -> Verdict | None:
    """The verdict where no algebra is needed: the same text, or two plain numbers; else None.

    Numbers may have thousands separators, dollar signs, a final period, and a percent sign if both
    have it (whether 50% is 50 or 0.5 is left to math-verify).
    """
    a, b = (text.replace("\\$", "").translate(_NOISE) for text in (given, expected))
    if a == b and a:
        return "correct"
    if a.endswith("%") and b.endswith("%"):
        a, b = a.rstrip("\\%"), b.rstrip("\\%")
    if len(a) > 40 or len(b) > 40 or not (_NUMBER.fullmatch(a) and _NUMBER.fullmatch(b)):
        return None
    difference = abs(Decimal(a.replace(",", "")) - Decimal(b.replace(",", "")))
    if difference == 0:
        return "correct"
    return "wrong" if difference > Decimal("0.001") else None  # rounded decimals: math-verify's


def excerpt(text: str, answer: str | None) -> str:
    """What math-verify needs to see of `text`, whose `extract_answer` is `answer`."""
    box = _last_box(text)
    if box is not None:  # with what stands before it, for answers like \boxed{2} and \boxed{3}
        return text[max(box[0] - 200, 0) : box[2]]
    return text[-MAX_CHARS:] if answer is None else f"\\boxed{{{answer}}}"


def judge(text: str, answer: str) -> Verdict:
    """math-verify's verdict on an `excerpt`; "unparsable" if either side holds no answer."""
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    # The box wins over phrases such as "the answer is". No time limit: see verify.py.
    kinds = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
    try:
        gold = parse(f"\\boxed{{{answer}}}", kinds, parsing_timeout=None, raise_on_error=True)
        given = parse(text, kinds, parsing_timeout=None, raise_on_error=True)
        if not gold or not given:
            return "unparsable"
        is_correct = verify(gold, given, timeout_seconds=None, raise_on_error=True)
    except Exception:  # parsers fail in many ways on text that holds no answer
        return "unparsable"
    return "correct" if is_correct else "wrong"


def serve(judge: Callable[[str, str], Verdict]) -> None:
    """The worker: one JSON pair [text, answer] per line in, one verdict per line out, until EOF.

    Argument 1 is the parent's sys.path, argument 2 the seconds after which the kernel ends a worker
    that hangs and whose parent is gone.
    """
    import contextlib
    import logging
    import os
    import resource
    import signal

    sys.path[:] = json.loads(sys.argv[1])
    limit = float(sys.argv[2])
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    with contextlib.suppress(OSError, ValueError):  # macOS knows no such limit
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, resource.RLIM_INFINITY))
    logging.disable(logging.CRITICAL)
    out = os.fdopen(os.dup(1), "w")
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # what libraries print must not reach the parent
    judge("\\boxed{1}", "1")  # imports, before the first clock starts
    print("ready", file=out, flush=True)
    os.dup2(nowhere, 2)  # only a failed start is worth reading
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_REAL, limit)  # default action: the process ends
        text, answer = json.loads(line)
        print(judge(text, answer), file=out, flush=True)
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


if __name__ == "__main__":
    serve(judge)
