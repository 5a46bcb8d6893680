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
Grader = Literal["math_verify", "rllm"]

RULES = 2  # to be raised when a verdict or a vote may change: what older rules graded is not kept
MAX_BOXES = 20  # of one answer
MAX_CHARS = 4000  # of an answer, or of the end of a text that marks none; longer is no answer
_MEMORY_LIMIT = 4 << 30  # bytes a worker may map: 9^9^9^9 must not take the machine down
_BOX = re.compile(r"\\(?:boxed|fbox|framebox)\s*\{")
_BRACE = re.compile(r"\\.|[{}]", re.S)  # \{ is no brace
_HASHES = re.compile(r".*(?<!#)####(?!#)")
_ANSWER = re.compile(r"[\W_]*(?:final )?answer[ *]*:", re.I)
_LONE_A = re.compile(r"[ *]*A[ *]*:(?![a-zA-Z]|.*:)")  # A:B=2:3 is a ratio, A: 1, B: 2 a list
_THOUGHTS = re.compile(
    r"\s*(?:<(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[THINK\]|\u25c1think\u25b7)"
)
_THOUGHTS_END = re.compile(
    r"</(?:\w+:)?(?:think|thinking|thought|reasoning)>|\[/THINK\]|\u25c1/think\u25b7"
)
_EMPTY_BOX = re.compile(
    r"\\(?:boxed|fbox)\s*\{\s*(?:\\text\s*\{)?\s*(?:(?:your|the|final)\s+)*(?:answer|\.\.\.|\\l?dots)?"
    r"\s*\}(?:\s*\})?",
    re.I,
)
_FORMULA = re.compile(r"(?s)\s*(?:\$\$?([^$]+)\$\$?|\\\(((?:(?!\\\)).)+)\\\))\s*\.?\s*")
_BREAK = re.compile(r"[.!?:](?:\s|$|\\|\$)|\n\s*\n|\*\*")  # between two boxes: a new sentence
_TAKES_BACK = {
    "no",
    "not",
    "wait",
    "rather",
    "wrong",
    "incorrect",
    "answer",
    "actually",
    "oops",
    "instead",
    "but",
    "so",
    "then",
    "thus",
}
_NUMBER = re.compile(r"[-+]?(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+|(?=\.[0-9]))(?:\.[0-9]*)?")
_ANY_NUMBER = re.compile(r"(?<![a-zA-Z\d.{])[-+]?\d+(?:[.,]\d+)*(?![a-zA-Z\d])")
_BOLD_NUMBER = re.compile(r"\*\*\W*([-+]?\d+(?:[.,]\d+)*)(?![\da-zA-Z])[^*]*\*\*")
_NOISE = str.maketrans("", "", " \t\n$")
KNOWN: list[tuple[str, str, Verdict]] = [  # a pair for each thing that we ask of math-verify
    (r"So it is $\frac{1}{2}$.", "0.5", "correct"),
    (r"\frac{1}{2}", "0.5", "correct"),
    (r"\frac{1}{2}", "0.25", "wrong"),
    (r"2\sqrt{3}", r"\sqrt{12}", "correct"),
    ("x^2+2x+1", "(x+1)^2", "correct"),
    ("x^2+2x+1", "(x-1)^2", "wrong"),
    ("M/m", "m/M", "wrong"),
    ("2, 3", r"\{3, 2\}", "correct"),
    ("(1, 2)", "(2, 1)", "wrong"),
    ("2x+4y=6", "x+2y=3", "correct"),
    ("x=2i", "x=5i", "wrong"),
    (
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 5 \end{pmatrix}",
        "wrong",
    ),
    (r"\sum_{d \mid n} 2^d", r"\sum_{d \mid n} 3^d", "unparsable"),
]
_VERDICTS: dict[bool | None, Verdict] = {True: "correct", False: "wrong", None: "unparsable"}
_DIGITS_APART = re.compile(r"(?<=\d),?\s+(?=\d)")  # 3 5/8 is not 35/8, nor 1, 100 1100


def extract_answer(text: str) -> str | None:
    """The final answer that `text` marks, after its thoughts: the last \\boxed{}, or several that
    are one answer ("\\boxed{2} and \\boxed{3}"), joined by commas; else what <answer> holds; else,
    on the last line, what stands after #### or "Answer:" (or "A:", below other lines); None if it
    marks none, or if the last box does not close."""
    text = _spoken(text)
    boxes = last_boxes(text)
    if boxes:
        return ", ".join(dict.fromkeys(boxes))
    if _BOX.search(text):
        return None
    _, tag, rest = text.rpartition("<answer>")
    if tag:
        return rest.partition("</answer>")[0].strip() or None
    above, _, line = text.strip().rpartition("\n")
    mark = _HASHES.match(line)  # higher up it is a heading of markdown
    line = line[mark.end() :] if mark else line
    label = _ANSWER.match(line) or (_LONE_A.match(line) if above else None)
    if not (mark or label):
        return None
    line = line[label.end() :] if label else line
    return line.strip().lstrip("* ").removesuffix("**").rstrip() or None


def _spoken(text: str) -> str:
    """What follows the thoughts; "" if they do not end. A box without an answer is no box."""
    if "<" in text or "[" in text or "\u25c1" in text:
        ends = [match.end() for match in _THOUGHTS_END.finditer(text)]
        if ends:
            text = text[ends[-1] :]
        elif _THOUGHTS.match(text):
            return ""
    return _EMPTY_BOX.sub("", text) if "\\" in text else text


def without_opening(text: str) -> str:
    """`text` without the mark that opens its thoughts: if they do not end, all of it is judged."""
    opening = _THOUGHTS.match(text)
    return text[opening.end() :] if opening else text


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
    """What a worker needs to see of `text`, whose `extract_answer` is `answer`; None if nothing, as
    where the last box does not close: an earlier one is not the final answer."""
    if answer is not None:
        return f"\\boxed{{{answer}}}"
    text = _spoken(text)
    return None if _BOX.search(text) or not text.strip() else text[-MAX_CHARS:]


def judge(text: str, answer: str) -> Verdict:
    """The verdict on an `excerpt`; "unparsable" if either side cannot be read."""
    given = extract_answer(text)
    if given is None:
        alone = _FORMULA.fullmatch(text)
        given = alone[1] if alone else None
    if given is not None:
        return _VERDICTS[_same(given, answer)]
    return _judge_unmarked(text, answer)


def _same(given: str, expected: str) -> bool | None:
    from redi.grading.equal import plain, same, trim
    from redi.grading.notation import align, rewrite

    if plain(given) == plain(expected):
        return True if plain(given) else None
    pair = align(*(rewrite(trim(side)) for side in (given, expected)))
    if pair is None:
        return False
    quick = quick_verdict(*pair)
    return quick == "correct" if quick else same(*pair)


def _judge_unmarked(text: str, answer: str) -> Verdict:
    """The verdict on what math-verify takes for the answer of a text that marks none."""
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse

    from redi.grading.formula import same_read
    from redi.grading.notation import rewrite

    rules = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    # No time limit: see verify.py.
    kinds = [LatexExtractionConfig(normalization_config=rules), ExprExtractionConfig()]
    last_line = text.strip().rpartition("\n")[2]
    try:
        text = re.sub(r"(?<=\bis )\+(?=\d)", "", text)  # it does not look for +7
        found = parse(rewrite(text), kinds, parsing_timeout=None, raise_on_error=True)
    except Exception:  # it fails in many ways on text that holds no answer
        found = []
    numbers = _ANY_NUMBER.findall(last_line)
    given = (
        [x for x in found if isinstance(x, str)]
        or _BOLD_NUMBER.findall(last_line)[-1:]
        or (numbers if len(numbers) == 1 and not found else [])
    )
    is_same = _same(given[0], answer) if given else None
    if is_same is None and found and not isinstance(found[0], str):
        is_same = same_read(found[0], rewrite(answer.strip("$")))
    if is_same is False and re.search(
        rf"(?<![\w.]){re.escape(answer.strip('$ '))}(?!\w)", last_line
    ):
        return "unparsable"  # we took another number of the last line for the answer
    return _VERDICTS[is_same]


def check(judge: Callable[[str, str], Verdict] = judge) -> str:
    """What is wrong with the grader, in a sentence; "" if known pairs get their verdicts. Another
    version of math-verify or sympy may read answers otherwise, or fail where errors are expected:
    then right answers would be called unparsable and nothing would be said."""
    for given, expected, right in KNOWN:
        text = given if "$" in given else f"\\boxed{{{given}}}"
        verdict = judge(text, expected)
        if verdict != right:
            from importlib.metadata import version

            names = ("math-verify", "latex2sympy2-extended", "sympy")
            versions = ", ".join(f"{name} {version(name)}" for name in names)
            return (
                f"the grader cannot be trusted with {versions}: it calls {given} {verdict} where "
                f"{expected} is expected, and it is {right}; install the versions that "
                'pip install "reinforcement-distillation[data]" names'
            )
    return ""


def serve(judge: Callable[[str, str], Verdict], check: Callable[[], str] = str) -> None:
    """The worker: one JSON pair [text, answer] per line in, one verdict per line out, until EOF.

    Argument 1 is the parent's sys.path, argument 2 the seconds of computing allowed for one answer:
    the kernel ends a worker that takes more (SIGPROF), so that a verdict does not depend on what
    else the machine does. Argument 3 is the same by the clock, for a worker whose parent is gone;
    the last is the grader. `check` says what is wrong with it, and then no worker starts.
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
    fault = check()
    if fault:
        sys.exit(fault)
    print("ready", file=out, flush=True)
    os.dup2(nowhere, 2)  # only a failed start is worth reading
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, limit)  # default action: the process ends
        signal.setitimer(signal.ITIMER_REAL, by_the_clock)
        text, answer = json.loads(line)
        print(judge(text, answer), file=out, flush=True)
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.setitimer(signal.ITIMER_REAL, 0)


def last_boxes(text: str) -> list[str]:
    """What the last \\boxed{...} holds, and those before it that belong to it; [] if it does not
    close."""
    boxes = list(_BOX.finditer(text))
    found: list[str] = []
    after = len(text)  # where the box begins that was found before
    for box in reversed(boxes[-MAX_BOXES:]):
        end = _closing(text, box.end())
        if end is None or end > after:  # a box around the one that was found
            if not found:
                return []
            continue
        if found and not _is_joined(text[end:after]):
            break
        found.append(re.sub(r"(?<!\\)\\\s*$", "", text[box.end() : end - 1]).strip())
        after = box.start()
    return found[::-1]


def _closing(text: str, content: int) -> int | None:
    depth = 1
    for brace in _BRACE.finditer(text, content, content + MAX_CHARS):
        depth += {"{": 1, "}": -1}.get(brace[0], 0)
        if depth == 0:
            return brace.end()
    return None


def _is_joined(between: str) -> bool:
    """Whether the boxes on both sides are one answer: nothing stands between them, or a few words
    of the same sentence which take nothing back."""
    words = re.findall(r"[a-zA-Z]+", re.sub(r"\\[a-zA-Z]+", " ", between))
    if _BREAK.search(between) or len(words) > 6 or len(between) > 100:
        return False
    return not words or (len(words) <= 6 and not _TAKES_BACK.intersection(map(str.lower, words)))


def _rllm(given: str, expected: str) -> Verdict:
    from redi.grading.rllm import judge

    return judge(given, expected)


if __name__ == "__main__":
    if sys.argv[-1] == "rllm":
        serve(_rllm)
    elif sys.argv[-2] == "check":
        serve(judge, check)
    else:
        serve(judge)
