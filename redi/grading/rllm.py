r"""The grading rule of the paper's final numbers (rllm's), written anew from its description.

An answer counts only after `</think>` and in a \boxed{}. It is right if it equals the expected one
after string normalisation (MATH's), or element by element by sympy (PRM800K's), which refuses an
unreduced fraction, a number that is not written out, and powers. Stricter than math-verify in most
cases; of use where figures must compare with the paper's. Unlike there, an answer that cannot be
read is "unparsable"; neither counts as correct.
"""

import re
from fractions import Fraction

from redi.grading.judge import Verdict, last_boxes

_UNITS = (
    *("degree", "cm", "centimeter", "meter", "mile", "second", "minute", "hour", "day", "week"),
    *("month", "year", "foot", "feet", "inch", "yard"),
)
_UNIT = re.compile(
    rf"(?<![a-zA-Z\\])(?:{'|'.join(_UNITS)})(?:e?s)?(?![a-z]) *(?:\^\{{?[0-9]+\}}?)?"
)
_LARGE = {"million": "10^6", "billion": "10^9", "trillion": "10^12"}
_ARGUMENT = r"(?:\{([^{}]*)\}|([0-9a-zA-Z]))"
_FRAC = re.compile(rf"\\frac\s*{_ARGUMENT}\s*{_ARGUMENT}")
_SQRT = re.compile(rf"\\sqrt\s*{_ARGUMENT}")
_GREEK = {"\\pi": "pi", "\\infty": "oo", "\\cdot": "*", "\\times": "*", "\\cup": "u", "\\div": "/"}
_INTEGER = re.compile(r"-?[0-9]+")
_PLAIN_FRACTION = re.compile(r"-?[0-9]+/[0-9]+")
# parse_expr evaluates Python: a point belongs to a number, so that no attribute is ever reached
_ALGEBRA = re.compile(r"(?:[0-9a-z_+\-*/^(),!\s]|\.(?=[0-9])|(?<=[0-9])\.(?![a-z_.]))*")
_COMPUTED_POWER = re.compile(r"\^\{|\^\(|\^[0-9]+\^|\^[0-9][0-9]+")


def final_answer(text: str) -> str | None:
    r"""The last \boxed{} between the first `</think>` and the next one, if any."""
    _, mark, after = text.partition("</think>")
    answer = after.partition("</think>")[0]
    boxes = last_boxes(answer) if mark else []
    return boxes[-1] if boxes else None


def judge(given: str, expected: str) -> Verdict:
    """The verdict on two answers as `final_answer` reads them."""
    if normalise(given) == normalise(expected) or _equal(given, expected):
        return "correct"
    return "wrong"


def normalise(text: str) -> str:
    """MATH's string form: two answers that are written alike are the same text."""
    text = re.sub(r"\\\\|\\!|\\left(?![a-z])|\\right(?![a-z])|\\?\$|\\?%|\n", "", text.strip())
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"\^\s*(?:\\circ|\{\s*\\circ\s*\})", "", text)
    text = re.sub(r"\\text\s*\{ [^{}]*\}\s*$", "", text)  # a unit: its text begins with a space
    text = re.sub(r"(?<![0-9])\.(?=[0-9])", "0.", text)
    text = re.sub(r"^\s*[a-zA-Z]{1,2}\s*=", "", text)
    text = re.sub(r"\\sqrt\s*([0-9a-zA-Z])", r"\\sqrt{\1}", text)
    text = text.replace(" ", "")
    text = re.sub(r"\\frac(?:\{(.)\}|([^{]))(?:\{(.)\}|([^{]))", _braced_fraction, text)
    text = r"\frac{1}{2}" if text == "0.5" else text
    return re.sub(r"^(-?[0-9]+)/([0-9]+)$", r"\\frac{\1}{\2}", text)


def _braced_fraction(match: re.Match) -> str:
    top, bottom = match[1] or match[2], match[3] or match[4]
    return rf"\frac{{{top}}}{{{bottom}}}"


def _equal(given: str, expected: str) -> bool:
    a, b = _plain(given), _plain(expected)
    if not a:
        return False
    if a == b:
        return True
    parts_a, parts_b = _split(a), _split(b)
    is_tuple = len(parts_b) > 1
    if len(parts_a) != len(parts_b) or (is_tuple and (a[0], a[-1]) != (b[0], b[-1])):
        return False
    return all(_same(x, y) for x, y in zip(parts_a, parts_b, strict=True))


def _same(a: str, b: str) -> bool:
    if _PLAIN_FRACTION.fullmatch(a) and _PLAIN_FRACTION.fullmatch(b):
        return a == b  # an unreduced fraction is not accepted
    if bool(_INTEGER.fullmatch(a)) != bool(_INTEGER.fullmatch(b)):
        return False  # nor an integer that is not worked out
    return _by_algebra(a, b)


def _by_algebra(a: str, b: str) -> bool:
    from sympy import simplify
    from sympy.parsing import sympy_parser as parser

    difference = f"({b})-({a})"
    if not _ALGEBRA.fullmatch(difference):
        return False
    letters = set(re.findall(r"[a-z]", difference.replace("sqrt", "").replace("frac", "")))
    if len(letters) > 2 or _COMPUTED_POWER.search(difference):
        return False
    rules = (*parser.standard_transformations, parser.implicit_multiplication_application)
    try:
        expression = parser.parse_expr(difference.replace("^", "**"), transformations=rules)
        return simplify(expression) == 0
    except Exception:  # parse_expr fails in many ways on text that is no expression
        return False


def _plain(text: str) -> str:
    """PRM800K's form: LaTeX as plain text, without units, spaces, separators and case."""
    wrapped = re.fullmatch(r"\\text\{(.+?)\}", text)
    text = wrapped[1] if wrapped else text
    text = re.sub(r"\\?%|\\?\$", "", text)
    text = re.sub(r" (?:or|and) ", " , ", text)
    for name, factor in _LARGE.items():
        text = text.replace(name, f"*{factor}")
    text = _UNIT.sub("", text)
    text = re.sub(r"\^\s*\{?\s*\\circ\s*\}?|,\\!|\\(?:left|right)(?![a-z])", "", text)
    text = re.sub(r"\\[dt]frac", r"\\frac", text)
    text = re.sub(r"(?<=[0-9])\s*(?=\\frac)", "+", text)  # a mixed number
    for pattern, form in ((_FRAC, "({})/({})"), (_SQRT, "sqrt({})")):
        while pattern.search(text):
            fill = lambda m, form=form: form.format(*(g for g in m.groups() if g is not None))
            text = pattern.sub(fill, text)
    for command, name in _GREEK.items():
        text = text.replace(command, name)
    text = re.sub(r"([0-9]) +(?=[0-9]+/)", r"\1+", text.strip())
    text = re.sub(r"\\text|[\s{}\\]", "", text).lower()
    text = re.sub(r"(?<=[0-9]),(?=[0-9]{3}(?![0-9]))", "", text)
    text = re.sub(r"\((-?[0-9]+)\)/\(([0-9]+)\)", r"\1/\2", text)
    is_whole = re.fullmatch(r"-?[0-9]*\.?[0-9]+", text) and Fraction(text).denominator == 1
    return str(int(Fraction(text))) if is_whole else text


def _split(text: str) -> list[str]:
    """The elements of a tuple or interval; anything else is one element."""
    if (
        len(text) > 2
        and text[0] in "(["
        and text[-1] in ")]"
        and not re.search("[()[\\]]", text[1:-1])
    ):
        return [part.strip() for part in text[1:-1].split(",")]
    return [text]
