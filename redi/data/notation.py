r"""One way to write an answer, for what math-verify reads otherwise than a mathematician does.

`rewrite` concerns one side: `10\,000`, `3 5/8`, `4.4e7`, `0.1\overline{6}`, `90°`, `½`.
`align` concerns both: degrees against radians, units, bases, a choice's letter, column and tuple.
tests/redi/data/answers.tsv has a row or more for every rule.
"""

import re
import unicodedata
from fractions import Fraction
from math import gcd
from typing import Any

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SYMBOLS = {
    **{"π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "·": r"\cdot ", "∪": r"\cup "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}"},
    **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff€£¥₹", ""),  # invisible, and currencies
    **dict.fromkeys("\u00a0\u2009\u202f", " "),
}
_TRANSLATION = str.maketrans(_SYMBOLS)
_REPEATING = re.compile(r"(?<!\d)(\d+)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
_DEGREES = re.compile(
    r"(?<!\d)(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})(?!\s*\\(?:mathrm|text))"
)
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
_RULES: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}"),
        (r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"(?<=\d)(?:\\[,;:! ]|~| )(?=\d{3}(?!\d))", ""),  # 10\,000
        (r"(?<![\d.^_{/])(\d+) +(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),  # 3 5/8
        (r"(?<![\w.\\}])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\(?:left|right)(?=[\\()\[\]|])", ""),
        (r"\\log_\s*(?:e|\{e\})(?![a-z])", r"\\ln "),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        (r"(?<=\d)\s*(?:\\text\{\s*)?per ?cent\s*\}?", r"\\%"),
        (r"\\(?:text)?color\s*\{\w+\}|\\underline(?=\{)|\\(?:blacksquare|square)(?![a-zA-Z])", ""),
    ]
]
_FALLS = re.compile(r"(>|\\geq?(?:slant)?(?![a-z]))")
_RATIO = re.compile(r"\d+(?:\s*:\s*\d+){2,}")
_BASE = re.compile(r"(\d[0-9A-Z]*)_\{?(\d{1,2})\}?")
_LETTER = re.compile(r"\(?([A-Z])\)?")
_CHOICE = re.compile(r"\(([A-Z])\)|([A-Z])[.:)]")
_NEXT_CHOICE = re.compile(rf"(?:[,;&/)]|\b(?:and|or)\b|\\quad)[\s\\~]*(?:{_CHOICE.pattern})")
_COLUMN = re.compile(r"\\begin\{([pb]?)matrix\}([^&]+)\\end\{\1matrix\}")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{")
_UNIT = re.compile(
    r"(?P<number>.*[\d}])(?:\\?[ ,~]|\\quad)*(?:\\(?:text|mathrm|mbox)\s*\{\s*)?(?P<name>[a-z]+)\.?"
    r"\s*(?:\^\{?(?P<inner>[23])\}?\s*)?(?:\}\s*)?(?:\^\{?(?P<outer>[23])\}?)?",
    re.S,
)
# Name to (dimension, size). Ounces, degrees of temperature and the like are not converted.
_UNITS = {
    name: (dimension, Fraction(size))
    for dimension, units in {
        "length": "mm 1/1000, cm 1/100, m meter 1, km kilometer 1000",
        "time": "s sec second 1, min minute 60, h hr hour 3600, day 86400",
        "mass": "mg 1/1000, g gram 1, kg kilogram 1000",
        "money": "cent 1/100, dollar 1",
    }.items()
    for *names, size in (unit.split() for unit in units.split(", "))
    for name in names
}


def rewrite(text: str) -> str:
    """`text` in notation that math-verify reads as meant."""
    text = "".join(map(_spell_fraction, text)).translate(_TRANSLATION)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _REPEATING.sub(_close_repeating, text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    return text


def align(given: str, expected: str) -> tuple[str, str] | None:
    """Both answers, rewritten already, in forms that compare; None: they cannot be equal."""
    given, expected = (_standard(text.strip().rstrip("\\ ")) for text in (given, expected))
    letter = _LETTER.fullmatch(unwrap(expected))
    if letter:
        named = _choices(unwrap(given))
        return None if len(named) > 1 else (min(named, default=given), letter[1])
    if (r"\pi" in given) != (r"\pi" in expected):
        given, expected = (_DEGREES.sub(r"\\frac{\1\\pi}{180}", x) for x in (given, expected))
    bases = [_BASE.fullmatch(text) for text in (given, expected)]
    if all(bases):
        values = [_in_base(*match.groups()) for match in bases if match]
        return None if None in values or values[0] != values[1] else ("1", "1")
    if ("matrix" in given) != ("matrix" in expected):
        given, expected = (_COLUMN.sub(_as_tuple, text) for text in (given, expected))
    return _same_unit(given, expected)


def unwrap(text: str) -> str:
    r"""`text` without \text{}, \textbf{} and their like; what they hold stays."""
    return _WRAPPED.sub("", text).replace("}", "") if _WRAPPED.search(text) else text


def _choices(text: str) -> set[str]:
    """The letters named by an answer that begins with a choice, all in the manner of the first."""
    first = _CHOICE.match(text)
    if not first:
        return set()
    manner = 1 if first[1] else 2
    return {first[manner], *(m[manner] for m in _NEXT_CHOICE.finditer(text) if m[manner])}


def _standard(text: str) -> str:
    """A falling chain as a rising one, a ratio of three or more in lowest terms as a tuple."""
    chain = [part.strip() for part in _FALLS.split(text)]
    if len(chain) == 5 and all(chain) and not re.search("[<=]", text):
        a, first, b, second, c = chain
        first, second = ("<" if sign == ">" else r"\le" for sign in (first, second))
        return f"{c} {second} {b} {first} {a}"
    if _RATIO.fullmatch(text):
        terms = [int(term) for term in text.split(":")]
        return f"({', '.join(str(term // (gcd(*terms) or 1)) for term in terms)})"
    return text


def _same_unit(given: str, expected: str) -> tuple[str, str] | None:
    """Both in the same unit, where both have one that we know and the units differ."""
    units = [_UNIT.fullmatch(text) for text in (given, expected)]
    if not (units[0] and units[1]):
        return given, expected
    known = [
        _UNITS.get(unit["name"]) or _UNITS.get(unit["name"].removesuffix("s"))
        for unit in units
        if unit
    ]
    if not (known[0] and known[1]):
        return given, expected
    powers = [int(unit["inner"] or unit["outer"] or 1) for unit in units if unit]
    if known[0][0] != known[1][0] or powers[0] != powers[1]:
        return None
    ratio = (known[0][1] / known[1][1]) ** powers[0]
    if ratio == 1:
        return given, expected
    factor = rf"\frac{{{ratio.numerator}}}{{{ratio.denominator}}}"
    return rf"({units[0]['number']}) \cdot {factor}", units[1]["number"]


def _spell_fraction(character: str) -> str:
    top, slash, bottom = unicodedata.normalize("NFKC", character).partition("\u2044")
    return rf"\frac{{{top}}}{{{bottom}}}" if slash and top and bottom else character


def _close_repeating(match: re.Match) -> str:
    r"""0.1\overline{6} as \frac{1}{6}."""
    whole, fixed, period = match[1], match[2], match[3] or match[4]
    value = Fraction(
        int(whole + fixed + period) - int(whole + fixed), 10 ** len(fixed) * (10 ** len(period) - 1)
    )
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _as_tuple(match: re.Match) -> str:
    return "(" + match[2].replace(r"\\", ",") + ")"


def _in_base(digits: str, base: str) -> int | None:
    try:
        return int(digits, int(base))
    except ValueError:  # no digit of this base
        return None
