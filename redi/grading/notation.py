r"""One way to write an answer, for what math-verify reads otherwise than a mathematician does.

`rewrite` concerns one side: `10\,000`, `3 5/8`, `4.4e7`, `0.1\overline{6}`, `90°`, `½`.
`align` concerns both: degrees against radians, units, bases, a choice's letter, column and tuple.
tests/redi/grading/answers.tsv has a row or more for every rule.
"""

import re
import unicodedata
from fractions import Fraction
from typing import Any

_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻", "0123456789-")
_SUBSCRIPTS = str.maketrans("₀₁₂₃₄₅₆₇₈₉", "0123456789")
_SYMBOLS = {
    **{"π": r"\pi ", "∞": r"\infty ", "°": r"^\circ ", "·": r"\cdot ", "∪": r"\cup "},
    **{"≤": r"\le ", "≥": r"\ge ", "≠": r"\ne ", "∅": r"\emptyset ", "ℝ": r"\mathbb{R}"},
    **{"±": r"\pm ", "∓": r"\mp ", "∈": r"\in ", "≈": r"\approx ", "…": r"\ldots ", "–": "-"},
    **{chr(0xFEE0 + code): chr(code) for code in range(ord("!"), ord("~") + 1)},  # full width
    **dict.fromkeys("\u00ad\u200b\u200c\u200d\u2060\ufeff€£¥₹", ""),  # invisible, and currencies
    **dict.fromkeys("\u00a0\u2009\u202f", " "),
}
_TRANSLATION = str.maketrans(_SYMBOLS)
_REPEATING = re.compile(r"(?<!\d)(\d+)\.(\d*)\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))")
_GOES_ON = re.compile(  # 0.1666...
    r"(?<![\d.])(\d{1,20})\.(\d{0,20}?)(\d{1,8}?)\3{2,20}\d{0,8}\s*(?:\.{3}|\\l?dots(?![a-z]))"
)
_DEGREES = re.compile(
    r"(?<!\d)(\d+(?:\.\d+)?)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})(?!\s*\\(?:mathrm|text)\s*\{?\s*[CF])"
)
_CALL = re.compile(
    r"(?:\\sqrt(?:\[\d\])?|\\frac(?:\{[^{}]*\})?|\^|(?<![a-zA-Z\\])(?P<name>abs|floor|ceil))\s*\("
)
_ENCLOSED = {
    "abs": ("|", "|"),
    "floor": (r"\lfloor ", r"\rfloor "),
    "ceil": (r"\lceil ", r"\rceil "),
    None: ("{", "}"),
}
_TRIGONOMETRIC = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)\b")
_FUNCTIONS = (
    "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|ln|log|exp|sqrt|cbrt|min|max"
    "|gcd|lcm"
)
_LETTERS = (
    "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|pi|infinity|infty|inf"
)
_NUMERALS = {
    name: 2 + k
    for k, name in enumerate(
        ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_FONTS = (
    "bf|it|rm|sf|tt|bfseries|itshape|tiny|scriptsize|footnotesize|small|normalsize|large|Large|LARGE"
    "|huge|Huge|displaystyle|textstyle|limits|nolimits|left\\.|right\\.|[bB]igg?[lrm]?"
)
_RULES: list[tuple[re.Pattern, Any]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in [
        (r"[⁰¹²³⁴⁵⁶⁷⁸⁹⁻]+", lambda m: f"^{{{m[0].translate(_SUPERSCRIPTS)}}}"),
        (r"[₀₁₂₃₄₅₆₇₈₉]+", lambda m: f"_{{{m[0].translate(_SUBSCRIPTS)}}}"),
        (r"√\s*(\d+|[a-zA-Z])", r"\\sqrt{\1}"),
        (r"√", r"\\sqrt "),
        (r"(?<=\d),\\!\s*(?=\d{3})|(?<=\d)\{,\}(?=\d{3})", ","),
        (r"\{([,:;])\}", r"\1"),
        (r"^\s*\$?([^$]+)(?<!\\)\$(?=\s+[a-zA-Z])", r"\1"),  # $12$ apples
        (r"\\checkmark(?![a-z])", ""),
        (r"\\(?:vec|overrightarrow)\s*\{\s*0\s*\}", "0"),
        (r"(?<=\d)(?:\\[,;:! ]|~| )(?=\d{3}(?!\d))", ""),  # 10\,000
        (r"(?<![\d.^_{/])(\d+) +(\d+)/(\d+)(?!\d)", r"\1\\frac{\2}{\3}"),  # 3 5/8
        (r"(?<![\w.\\}])(\d+(?:\.\d*)?|\.\d+)[eE]([-+]?\d+)(?![\w.])", r"\1 \\times 10^{\2}"),
        (r"\\[dtc]frac(?![a-z])", r"\\frac"),
        (r"\\(?:left|right)(?=[\\()\[\]|])", ""),
        (rf"\\(?:{_FONTS})(?![a-zA-Z])", ""),
        (r"\\(?:boldsymbol|bm|pmb|mathsf|mathtt|textsf|texttt|textsc|emph)(?![a-zA-Z])", ""),
        (r"\\(?:bbox\s*(?:\[[^\[\]]*\])?|f?colorbox(?:\{\w*\})+|fbox|boxed)(?=\s*\{)", ""),
        (r"\\text\s*\{\s*(-?\d[\d.,/]*)\s+([a-zA-Z][^{}]*)\}", r"\1 \\text{ \2}"),
        (r"\\text\s*\{([^{}]*[^{}\s])\s+(and|or)\s*\}", r"\\text{\1}\\text{ \2 }"),
        (r"\\(?:text|math)bf\s*\{\s*(-? ?\d(?: \d)+)\s*\}", lambda m: m[1].replace(" ", "")),
        (r"\\(?:text|math|mbox)(?:bf|it|rm|normal)?\s*\{\s*([-+\d.,/()\s]+)\}", r"\1"),
        (r"\\(?:text|math)(?:bf|it|rm)\s+(?=\d)", ""),
        (rf"\\(?:operatorname|mathrm|text)\s*\{{({_FUNCTIONS})\}}", r"\\\1 "),
        (r"\\(?:mathrm|text|rm)(?:\s*\{\s*([ie])\s*\}|\s+([ie])(?![a-zA-Z]))(?!_)", r" \1\2 "),
        (rf"(?<![\\a-zA-Z{{])({_FUNCTIONS})(?=[\s(_^\d{{\\])(?!\s*[a-zA-Z]{{2,}})", r"\\\1"),
        (rf"(?<![\\a-zA-Z])({_LETTERS})(?![a-zA-Z])", r"\\\1 "),
        (r"\\inf(?:inity)?(?![a-z])", r"\\infty "),
        (r"\\cbrt(?![a-z])", r"\\sqrt[3]"),
        (r"\*\*", "^"),
        (r"\^(\d{2,})", r"^{\1}"),
        (r"\\(?:le|leq|leqslant|lte)(?![a-z])|<=|=<", r"\\le "),
        (r"\\(?:ge|geq|geqslant|gte)(?![a-z])|>=", r"\\ge "),
        (r"\\lt(?![a-z])", "<"),
        (r"\\gt(?![a-z])", ">"),
        (r"\\(?:neq|not\s*=)(?![a-z])|(?<![\d)!])!=|\s!=", r"\\ne "),
        (r"\\(?:log_\s*(?:e|\{e\}))(?![a-z])", r"\\ln "),
        (r"\\lg(?![a-z])", r"\\log_{10}"),
        (r"\\varnothing", r"\\emptyset"),
        (r"\\langle", "("),
        (r"\\rangle", ")"),
        (r"(?<=\d)\s*(?:\\text\{\s*)?per ?cent\s*\}?|(?<=\d)\s*pct\b", r"\\%"),
        (r"\\(?:text)?color\s*\{\w+\}|\\underline(?=\{)|\\(?:blacksquare|square)(?![a-zA-Z])", ""),
        (
            rf"_\{{\\text\s*\{{\s*({'|'.join(_NUMERALS)})\s*\}}\}}",
            lambda m: f"_{{{_NUMERALS[m[1]]}}}",
        ),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r" \\times "),
        (  # \frac{\mathrm{m}}{\mathrm{s}}, \mathrm{m s^{-1}}
            r"\\frac\s*\{\s*\\(?:mathrm|text)\{([^{}]*)\}\s*\}\s*\{\s*\\(?:mathrm|text)\{([^{}]*)\}\s*\}",
            r"\\text{\1/\2}",
        ),
        (r"(?<=[a-zA-Z])\^\{(-?\d)\}(?=[^{}$]*\}(?:\^-?\d)?\s*$)", r"^\1"),
        (r"(?<=\d)(?:\\[ ,;:!]|~|\s)+([kM]?)\\Omega\s*$", r" \\text{ \1ohm}"),
        (r"(?<=\d)(?:\s+[Rr]\s+|\s*\\text\{\s*[Rr]\.?\s*\}\s*)(?=\d)", r" \\text{ remainder } "),
        (r"^\s*[nN]/[aA]\s*$", r"\\text{none}"),
        (r"(?<=\d)\s*(?:\\text\{\s*)?(?<![a-z])to(?:\s*\})?\s*(?=\d)", ":"),
        (r"(?<=\d)\s*(?:\\text\{\s*)?(?<![a-z])out of(?:\s*\})?\s*(?=\d)", "/"),
        (r"(?<![a-z])([apAP])\.\s?([mM])\.", r"\1\2"),
        (
            r"\\(?:text|mathrm)\s*\{\s*(?:the set of )?all real(?:s| numbers)\s*\}"
            r"|(?<![a-z])all real(?:s| numbers)(?![a-z])",
            r"\\mathbb{R}",
        ),
        (  # {}_5C_2
            r"(?:\{\}|(?<![\w})]))[_^]\{?(\d+)\}?\s*(?:\\(?:mathrm|text)\{([CP])\}|([CP]))_\{?(\d+)\}?",
            lambda m: _count(m[2] or m[3], int(m[1]), int(m[4])) or m[0],
        ),
        (  # C_5^2 and A_5^2: combinations and arrangements
            r"(?:\\(?:mathrm|text)\{([CAP])\}|\b([CAP]))_\{?(\d+)\}?\^\{?(\d+)\}?",
            lambda m: _count(m[1] or m[2], int(m[3]), int(m[4])) or m[0],
        ),
    ]
]
_FALLS = re.compile(r"(>|\\geq?(?:slant)?(?![a-z]))")
_BASE = re.compile(r"(\d[0-9A-Z]*|[0-9A-F]+(?=_\{?16\b))_\{?(\d{1,2})\}?")
_LETTER = re.compile(r"\(?([A-Z])\)?")
_CHOICE = re.compile(r"\(([A-Z])\)|([A-Z])[.:)]")
_NEXT_CHOICE = re.compile(rf"(?:[,;&/)]|\b(?:and|or)\b|\\quad)[\s\\~]*(?:{_CHOICE.pattern})")
_COLUMN = re.compile(r"\\begin\{([pb]?)matrix\}([^&]+)\\end\{\1matrix\}")
_TURNED = re.compile(r"([\[\]])([^\[\]]*,[^\[\]]*)([\[\]])")  # ]0, 1[
_ANGLED = re.compile(r"<([^<>]*,[^<>]*)>")
_CALLED = re.compile(r"([CP])\s*\(\s*(\d{1,3})\s*,\s*(\d{1,3})\s*\)")
_WRAPPED = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{")


def rewrite(text: str) -> str:
    """`text` in notation that math-verify reads as meant."""
    text = "".join(map(_spell_fraction, text)).translate(_TRANSLATION)
    for pattern, replacement in _RULES:
        text = pattern.sub(replacement, text)
    text = _brace(text)
    text = _GOES_ON.sub(r"\1.\2\\overline{\3}", text)
    text = _REPEATING.sub(_close_repeating, text)
    if _TRIGONOMETRIC.search(text):
        text = _DEGREES.sub(r"\\frac{\1\\pi}{180}", text)
    return text


def align(given: str, expected: str) -> tuple[str, str] | None:
    """Both answers, rewritten already, in forms that compare; None: they cannot be equal."""
    given, expected = (_standard(text.strip().rstrip("\\ ")) for text in (given, expected))
    letters = [_LETTER.fullmatch(unwrap(text)) for text in (expected, given)]
    if letters[0]:
        named = _choices(unwrap(given))
        if len(named) > 1:
            return None
        lower = re.fullmatch(r"\(?([a-e])\)?", unwrap(given))  # of a choice, b is B
        given = lower[1].upper() if lower else given
        return min(named, default=given), letters[0][1]
    if letters[1] and len(named := _choices(unwrap(expected))) == 1:
        return letters[1][1], min(named)
    if bool(_content(given)) != bool(_content(expected)):  # (C) 18, and 18
        given, expected = (_content(text) or text for text in (given, expected))
    if bool(_CALLED.search(given)) != bool(_CALLED.search(expected)) and not all(
        re.search(r"\(.*,", text) for text in (given, expected)
    ):
        given, expected = (
            _CALLED.sub(lambda m: _count(m[1], int(m[2]), int(m[3])) or m[0], text)
            for text in (given, expected)
        )
    if (r"\pi" in given) != (r"\pi" in expected):
        given, expected = (_DEGREES.sub(r"\\frac{\1\\pi}{180}", x) for x in (given, expected))
    if (r"\ln" in given) != (r"\ln" in expected):
        given, expected = (re.sub(r"\\log(?![_a-z])", r"\\ln", x) for x in (given, expected))
    bases = [_BASE.fullmatch(text) for text in (given, expected)]
    if all(bases):
        values = [_in_base(*match.groups()) for match in bases if match]
        return None if None in values or values[0] != values[1] else ("1", "1")
    if any(bases):  # one side leaves the base out: the same digits, or else the same number
        digits = {m[1] if m else text for m, text in zip(bases, (given, expected), strict=True)}
        values = [m and _in_base(*m.groups()) for m in bases]
        given, expected = (
            text if value is None or len(digits) == 1 else str(value)
            for text, value in zip((given, expected), values, strict=True)
        )
        if len(digits) == 1:
            return "1", "1"
    if ("matrix" in given) != ("matrix" in expected):
        given, expected = (_COLUMN.sub(_as_tuple, text) for text in (given, expected))
    return given, expected


def unwrap(text: str) -> str:
    r"""`text` without \text{}, \textbf{} and their like; what they hold stays."""
    return _WRAPPED.sub("", text).replace("}", "") if _WRAPPED.search(text) else text


def _content(text: str) -> str:
    """What stands behind the letter of a choice: 18 of `\\textbf{(C)}\\ 18`."""
    text = unwrap(text)
    choice = re.match(r"\([A-Z]\)(?:[\s~:]|\\[ ,;:!]|\\q?quad)+", text)
    return text[choice.end() :].strip() if choice and len(_choices(text)) == 1 else ""


def _choices(text: str) -> set[str]:
    """The letters named by an answer that begins with a choice, all in the manner of the first."""
    first = _CHOICE.match(text)
    if not first:
        return set()
    manner = 1 if first[1] else 2
    return {first[manner], *(m[manner] for m in _NEXT_CHOICE.finditer(text) if m[manner])}


def _standard(text: str) -> str:
    """A falling chain as a rising one, ]0, 1[ as (0, 1), <1, 2> as (1, 2)."""
    chain = [part.strip() for part in _FALLS.split(text)]
    if len(chain) == 5 and all(chain) and not re.search("[<=]", text):
        a, first, b, second, c = chain
        first, second = ("<" if sign == ">" else r"\le" for sign in (first, second))
        return f"{c} {second} {b} {first} {a}"
    turned = _TURNED.fullmatch(text)
    if turned and (turned[1] == "]" or turned[3] == "["):
        text = f"{'[' if turned[1] == '[' else '('}{turned[2]}{']' if turned[3] == ']' else ')'}"
    return _ANGLED.sub(r"(\1)", text)


def _brace(text: str) -> str:
    r"""`\sqrt(x)`, `\frac(1)(2)` and `x^(n)` with braces, `abs(x)` with bars."""
    for _ in range(20):
        opening = _CALL.search(text)
        if not opening:
            break
        start, depth = opening.end() - 1, 0
        for end in range(start, len(text)):
            depth += (text[end] == "(") - (text[end] == ")")
            if depth == 0:
                break
        else:
            break
        left, right = _ENCLOSED[opening["name"]]
        before = text[: opening.start() if opening["name"] else start]
        text = f"{before}{left}{text[start + 1 : end]}{right}{text[end + 1 :]}"
    return text


def _count(letter: str, n: int, k: int) -> str:
    if not 0 < k <= n:
        return ""
    return rf"\binom{{{n}}}{{{k}}}" + ("" if letter == "C" else rf" \cdot {k}!")


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
