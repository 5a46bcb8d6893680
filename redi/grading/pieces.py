"""An answer in pieces: what stands around it, the items of a list, the sides of a relation."""

import re
from collections.abc import Iterable, Iterator

from redi.grading.units import take_unit

_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|.", re.S)
_SEPARATOR = re.compile(
    r"[,;\s]*(?:\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or|for|where|with|when)\s*\}|\\qq?uad(?![a-zA-Z])"
    r"|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\(?:lor|land|vee|wedge)(?![a-zA-Z]))[,;\s]*|[,;]"
)
SIGN = re.compile(
    r"\\(?:le|ge|ne|approx|equiv|in|notin|n?mid|parallel|perp|subseteq|subset|cong|to)(?![a-zA-Z])"
    r"|[=<>]"
)
_PHRASE = re.compile(  # what may stand before an answer and says nothing
    r"^(\\text\s*\{)?\s*(?:(?:the )?(?:final )?answer is:?|exactly|about|approximately|roughly|only"
    r"|(?:option|choice)(?=[\s({\\]*[A-Z][\s)}.]*$)|(?-i:an?|the)(?=\s(?!and\b|or\b)[a-z]{3}))(?![a-z])\s*",
    re.I,
)
TEXT = re.compile(
    r"\\(?:text|textrm|mathrm|mbox|operatorname|textnormal|textbf|textit)\s*\{([^{}]*)\}"
)
WORD = re.compile(
    r"(?<![\\a-zA-Z])[^\W\d_]{3,}(?![a-zA-Z(])|(?<![\\a-zA-Z])(?:no|No|NO|[ap]m|[AP]M)(?![a-zA-Z(])"
)
_BOLD = re.compile(r"\\(?:text|math)(?:bf|it)\s*(?=\{)")
_SIGNS = re.compile(r"[\\=+\-^_*/\d]")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
SPACE = re.compile(r"\\[ ,;:!]|[\s$~]")


def trim(text: str) -> str:
    """Without what stands around an answer and says nothing."""
    before = None
    while text != before:
        before, text = text, text.strip().rstrip(',;:`*"✓✔').lstrip(':`*"')
        text = _PHRASE.sub(lambda m: m[1] or "", text)
        text = re.sub(r"^\\text\s*\{\s*\}", "", text)
        text = re.sub(
            r"^(?:\\[ ,;:!]|\\displaystyle(?![a-zA-Z])|['=]|\\approx(?![a-zA-Z]))+", "", text
        )
        text = re.sub(r"(?:\\[ ,;:!]|\\q?quad|~|\\)+$", "", text.strip())
        text = re.sub(r"(?<!\.)(?<!right)\.$", "", text).strip().strip("$").strip()
        if text.startswith("{") and _end(text) == len(text):
            text = text[1:-1]
        framed = re.fullmatch(r"(?s)\\\[(.*)\\\]|\\\((.*)\\\)", text)
        text = framed[framed.lastindex or 0] if framed else text
        bold = _BOLD.match(text)
        if bold and _end(text[bold.end() :]) == len(text) - bold.end():
            inner = text[bold.end() + 1 : -1]
            text = inner if _SIGNS.search(inner) and not WORD.search(inner) else text
    return text


def plain(text: str) -> str:
    """`text` without white space. Words have no case (Yes is yes); letters have, for M is not m."""
    text = TEXT.sub(lambda m: f" {m[1]} ", text)
    text = WORD.sub(lambda m: m[0] if re.search("[a-z][A-Z]", m[0]) else m[0].lower(), text)
    text = re.sub(r"(?<=\d),?\s+(?=\d)", "\0", text)  # 3 5/8 is not 35/8
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return SPACE.sub("", text).rstrip(".")


def split(text: str) -> list[str]:
    """The items of a list, or of a set in braces; `\\pm` makes two items."""
    wrapped = TEXT.fullmatch(text)
    if wrapped and re.search(r"\d", wrapped[1]):  # \text{July 4, 1776}
        text = wrapped[1]
    elif wrapped:  # \text{Alice and Bob}
        names = [name for name in re.split(r"\s*(?:,|&|\band\b|\bor\b)\s*", wrapped[1]) if name]
        names = [re.sub(r"^\(([A-Z])\)$", r"\1", name) for name in names]
        return [rf"\text{{{name}}}" for name in names] if len(names) > 1 else [text]
    inner = text
    if re.match(r"\\\{|\\lbrace", text) and _end(text) == len(text):
        if re.search(r"\\n?mid|:|\|", text):
            return [text]
        inner = re.sub(r"^\\(?:\{|lbrace)|\\(?:\}|rbrace)$", "", text)
    items = [piece for piece in map(trim, cut(inner, _SEPARATOR)[0]) if piece]
    if len(items) == 1:
        items = _parts_of_one(items[0])
    items = [*_signed(items)] or [text]
    return [*{plain(item): item for item in items}.values()] if inner != text else items


def _parts_of_one(item: str) -> list[str]:
    """(a, b) = (1, 2) as a = 1 and b = 2; 2 h 30 min as 2 h and 30 min."""
    sides, signs = cut(item, SIGN)
    if signs == ["="]:
        names, values = map(elements, sides)
        if names and values and len(names[1]) == len(values[1]) > 1 and all(map(is_name, names[1])):
            return [f"{name}={value}" for name, value in zip(names[1], values[1], strict=True)]
    pieces = [piece.strip() for piece in re.split(r"(?<=\})\s*(?=\d)", item)]
    return pieces if len(pieces) > 1 and all(map(take_unit, pieces)) else [item]


def cut(text: str, mark: re.Pattern) -> tuple[list[str], list[str]]:
    """`text` cut at `mark` outside of brackets, and the marks."""
    depth, at, start, pieces, marks = 0, 0, 0, [], []
    while at < len(text):
        found = mark.match(text, at) if depth <= 0 else None
        if found:
            pieces.append(text[start : found.start()])
            marks.append(found[0])
            at = start = found.end()
            continue
        token = _TOKEN.match(text, at)
        assert token
        bare = token[0].removeprefix("\\")
        depth += (bare in ("(", "[", "{", "begin", "lbrace")) - (
            bare in (")", "]", "}", "end", "rbrace")
        )
        at = token.end()
    return [*pieces, text[start:]], marks


def _end(text: str) -> int:
    """Where the bracket that `text` begins with closes; -1 if it does not."""
    depth = 0
    for token in _TOKEN.finditer(text):
        bare = token[0].removeprefix("\\")
        depth += (bare in ("(", "[", "{", "lbrace")) - (bare in (")", "]", "}", "rbrace"))
        if depth == 0:
            return token.end()
    return -1


def _signed(items: Iterable[str]) -> Iterator[str]:
    for item in items:
        if not _PLUS_MINUS.search(item):
            yield item
            continue
        for plus_minus, minus_plus in ("+-", "-+"):
            signed = re.sub(r"\\pm(?![a-zA-Z])", plus_minus, item)
            signed = re.sub(r"\\mp(?![a-zA-Z])", minus_plus, signed)
            yield re.sub(r"(^|=)\s*\+", r"\1", signed)


def elements(text: str) -> tuple[str, list[str]] | None:
    """The brackets and the elements of a tuple or an interval."""
    text = text.strip()
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and _end(text) == len(text):
        return text[0] + text[-1], [p.strip() for p in cut(text[1:-1], re.compile("[,;]"))[0]]
    return None


def is_name(text: str) -> bool:
    """Whether `text = 5` says what `text` is: x, f(2), \\angle ABC, (a, b), V_1 : V_2."""
    bare = re.sub(r"_\{[^{}]*\}|\^\{-1\}|\([^()]*\)|_\w", "", text.strip())
    if text.strip().startswith("("):
        return bool(re.search("[a-zA-Z]", text)) and not re.search(r"[+*/^]", text)
    return bool(re.match(r"[a-zA-Z\\|]", bare)) and not re.search(r"[+*/^\d]|-", bare)
