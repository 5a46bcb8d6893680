r"""Are two answers the same? True, False, or None where that cannot be told.

An answer is taken apart here: lists, tuples, relations, quantities, words. What is left are formulas,
which math-verify's grammar reads whole or not at all (formula.py). Where it does not, texts are
compared, and texts that differ tell nothing. (math-verify itself searches an unread formula for
something that it can read, and then compares two numbers out of two formulas.)
"""

import re
from collections.abc import Iterable, Iterator

from redi.data.formula import same_equation, same_formula, same_inequality
from redi.data.units import ONE, scaled, take_unit

Verdict = bool | None

MAX_ITEMS = 60  # of a list: each is compared with each
_OPEN, _CLOSE = "([{", ")]}"
_TOKEN = re.compile(r"\\(?:[a-zA-Z]+|.)|.", re.S)
_SEPARATOR = re.compile(
    r"[,;\s]*(?:\\(?:text|mathrm|mbox)\s*\{\s*,?\s*(?:and|or|for|where|with|when)\s*\}|\\qq?uad(?![a-zA-Z])"
    r"|(?<![a-zA-Z\\])(?:and|or)(?![a-zA-Z])|\\(?:lor|land|vee|wedge)(?![a-zA-Z]))[,;\s]*|[,;]"
)
_SIGN = re.compile(
    r"\\(?:le|ge|ne|approx|equiv|in|notin|n?mid|parallel|perp|subseteq|subset|cong|to)(?![a-zA-Z])"
    r"|[=<>]"
)
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
_THOUSANDS = re.compile(r"(?<![\d,.])(\d{1,3})((?:,\d{3})+)(?!,?\d)")
_MODULUS = re.compile(
    r"(.*?)\s*\\?[\s,(]*(?:\\[pb]?mod|\\text\s*\{\s*\(?mod\s*\}|\(mod)\s*\{?\s*(\w+)\s*[})\s]*",
    re.S,
)
_BUILDER = re.compile(r"\\\{(.*?)(?:\\mid|:|\|)(.*)\\\}", re.S)
_PHRASE = re.compile(r"^(?:\\text\s*\{)?\s*(?:the )?(?:final )?answer is:?\s*\}?", re.I)
_TEXT = re.compile(
    r"\\(?:text|textrm|mathrm|mbox|operatorname|textnormal|textbf|textit)\s*\{([^{}]*)\}"
)
_WORD = re.compile(
    r"(?<![\\a-zA-Z])[^\W\d_]{3,}(?![a-zA-Z(])|(?<![\\a-zA-Z])(?:no|No|NO|[ap]m|[AP]M)(?![a-zA-Z(])"
)
_NUMERALS = set(
    "none nothing zero one two three four five six seven eight nine ten eleven twelve half third"
    " quarter dozen hundred thousand million infinite infinity undefined".split()
)
_FUNCTION = re.compile(r"\s*([a-zA-Z])\s*\(\s*([a-zA-Z])\s*\)\s*")
_PLUS_MINUS = re.compile(r"\\(pm|mp)(?![a-zA-Z])")
_SPACE = re.compile(r"\\[ ,;:!]|[\s$~]")


def same(given: str, expected: str) -> Verdict:
    """Both in the notation that `notation.align` leaves."""
    a, b = trim(given), trim(expected)
    if plain(a) == plain(b):
        return True if plain(a) else None
    lists = [split(side) for side in (a, b)]
    if [len(items) > 1 for items in lists] != [True, True] and any(
        len(items) > 1 and all(_is_inequality(item) for item in items) for items in lists
    ):  # x < -1 or x > 1, and x > 1 and x < 4
        is_or = re.search(r"(?<![a-z])or(?![a-z])|\\lor|\\vee", a + b)
        return same_inequality(*lists, joined_by="or" if is_or else "and")
    readings = [
        [split(text) for text in dict.fromkeys((side, _THOUSANDS.sub(_joined, side)))]
        for side in (a, b)
    ]
    return _any(_same_lists(x, y) for x in readings[0] for y in readings[1])


def trim(text: str) -> str:
    """Without what stands around an answer and says nothing."""
    before = None
    while text != before:
        before, text = text, text.strip().rstrip(',;:`*"✓✔').lstrip(':`*"')
        text = _PHRASE.sub("", text)
        text = re.sub(
            r"^(?:\\[ ,;:!]|\\displaystyle(?![a-zA-Z])|['=]|\\approx(?![a-zA-Z]))+", "", text
        )
        text = re.sub(r"(?:\\[ ,;:!]|\\q?quad|~|\\)+$", "", text.strip())
        text = re.sub(r"(?<!\.)\.$", "", text).strip().strip("$").strip()
        if text.startswith("{") and _end(text) == len(text):
            text = text[1:-1]
    return text


def plain(text: str) -> str:
    """`text` without white space. Words have no case (Yes is yes); letters have, for M is not m."""
    text = _TEXT.sub(lambda m: f" {m[1]} ", text)
    text = _WORD.sub(lambda m: m[0].lower(), text)
    text = re.sub(r"(?<=\d),?\s+(?=\d)", "\0", text)  # 3 5/8 is not 35/8
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", text)
    return _SPACE.sub("", text).rstrip(".")


def split(text: str) -> list[str]:
    """The items of a list, or of a set in braces; `\\pm` makes two items."""
    wrapped = _TEXT.fullmatch(text)
    if wrapped and not re.search(r"\d", wrapped[1]):  # \text{Alice and Bob}
        names = [name for name in re.split(r"\s*(?:,|&|\band\b|\bor\b)\s*", wrapped[1]) if name]
        names = [re.sub(r"^\(([A-Z])\)$", r"\1", name) for name in names]
        return [rf"\text{{{name}}}" for name in names] if len(names) > 1 else [text]
    inner = text
    if re.match(r"\\\{|\\lbrace", text) and _end(text) == len(text):
        if re.search(r"\\n?mid|:|\|", text):
            return [text]
        inner = re.sub(r"^\\(?:\{|lbrace)|\\(?:\}|rbrace)$", "", text)
    items = [piece for piece in map(trim, _cut(inner, _SEPARATOR)[0]) if piece]
    if len(items) == 1:
        items = _parts_of_one(items[0])
    items = [*_signed(items)] or [text]
    return [*{plain(item): item for item in items}.values()] if inner != text else items


def _parts_of_one(item: str) -> list[str]:
    """(a, b) = (1, 2) as a = 1 and b = 2; 2 h 30 min as 2 h and 30 min."""
    sides, signs = _cut(item, _SIGN)
    if signs == ["="]:
        names, values = map(_elements, sides)
        if (
            names
            and values
            and len(names[1]) == len(values[1]) > 1
            and all(map(_is_name, names[1]))
        ):
            return [f"{name}={value}" for name, value in zip(names[1], values[1], strict=True)]
    pieces = [piece.strip() for piece in re.split(r"(?<=\})\s*(?=\d)", item)]
    return pieces if len(pieces) > 1 and all(map(take_unit, pieces)) else [item]


def _total(items: list[str]) -> str | None:
    """2 h and 30 min as so many minutes."""
    parts = [take_unit(item) for item in items]
    if len(parts) < 2 or not all(part and part[1].is_known for part in parts):
        return None
    sizes = [unit.size for _, unit in parts]
    if len({unit.powers for _, unit in parts}) > 1 or sizes != sorted(set(sizes), reverse=True):
        return None
    values = (scaled(value, unit, parts[-1][1]) for value, unit in parts)
    last = parts[-1]
    return f"({' + '.join(values)}){items[-1].strip()[len(last[0]) :]}"


def _cut(text: str, mark: re.Pattern) -> tuple[list[str], list[str]]:
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


def _is_inequality(text: str) -> bool:
    signs = _cut(text, _SIGN)[1]
    return bool(signs) and "=" not in signs


def _joined(match: re.Match) -> str:
    return match[1] + match[2].replace(",", "")


def _signed(items: Iterable[str]) -> Iterator[str]:
    for item in items:
        if not _PLUS_MINUS.search(item):
            yield item
            continue
        for first, second in ("+-", "-+"):
            signed = _PLUS_MINUS.sub(lambda m, s=first, t=second: s if m[1] == "pm" else t, item)
            yield re.sub(r"(^|=)\s*\+", r"\1", signed)


def _any(verdicts: Iterable[Verdict]) -> Verdict:
    result: Verdict = False
    for verdict in verdicts:
        if verdict:
            return True
        result = None if verdict is None else result
    return result


def _all(verdicts: Iterable[Verdict]) -> Verdict:
    result: Verdict = True
    for verdict in verdicts:
        if verdict is False:
            return False
        result = None if verdict is None else result
    return result


def _same_lists(a: list[str], b: list[str]) -> Verdict:
    if len(a) == len(b) == 1:
        return _same_item(a[0], b[0])
    if max(len(a), len(b)) > MAX_ITEMS:
        return None
    for one, other in ((a, b), (b, a)):
        total = _total(other) if len(one) == 1 else None
        if total:
            return _same_item(one[0], total)
        if len(one) == 1:
            return _same_one_and_list(one[0], other)
    names_a, names_b = ([_named(item) for item in side] for side in (a, b))
    if all(names_a) and all(names_b):
        groups = [_groups(side) for side in (names_a, names_b)]
        if all(groups) and max(map(len, groups)) > 1:
            return _match(*groups, _same_groups)
        if all(len(side) == 1 for side in groups) and groups[0][0].keys() == groups[1][0].keys():
            return _same_groups(groups[0][0], groups[1][0])
    elif all(names_a) != all(names_b) and len({n[0] for n in (*names_a, *names_b) if n}) > 1:
        in_order = _all(map(_same_item, a, b)) if len(a) == len(b) else False
        return True if in_order else (None if _match(a, b, _same_item) else in_order)
    return _match(a, b, _same_item)


def _same_one_and_list(one: str, items: list[str]) -> Verdict:
    """A tuple may be written without its parentheses; else one thing is not several."""
    sides, signs = _cut(one, _SIGN)
    if signs in (["="], [r"\in"]) and _is_name(sides[0]):
        inside = split(trim(sides[1]))  # (m, n) \in \{(1, 1), (3, 2)\}
        if len(inside) > 1:
            return _same_lists(inside, items)
    inner = _elements(_value_of(one))
    if inner is not None and len(inner[1]) > 1:
        if len(inner[1]) != len(items):
            return False
        return _all(map(_same_item, items, inner[1])) if inner[0] in ("()", "[]") else False
    if signs == ["="] and not _is_name(sides[0]):
        return None  # an equation, whose solutions the items may be
    if all(map(_is_wordy, items)) and plain(one) in map(plain, items):
        return False  # one of several names
    if any(_is_wordy(x) or "dots" in x for x in (one, *items)) or re.search(
        r"\\mid|\\cup|\\in\b", one
    ):
        return None
    if any(sign != "=" for x in (one, *items) for sign in _cut(x, _SIGN)[1]):
        return None
    return False


def _value_of(text: str) -> str:
    sides, signs = _cut(text, _SIGN)
    return sides[-1].strip() if signs == ["="] else text


def _named(item: str) -> tuple[str, str] | None:
    """The name and the value of `x = 5`; of `5 \\text{ apples}`, the unit is the name."""
    sides, signs = _cut(item, _SIGN)
    if signs == ["="] and _is_name(sides[0]):
        return plain(sides[0]), sides[1]
    unit = None if signs else take_unit(item)
    if unit and not unit[1].is_known:
        return str(sorted(unit[1].powers)), unit[0]
    return None


def _groups(named: list) -> list[dict[str, str]]:
    """p = 5, q = 2, p = 7, q = 2 as two groups."""
    groups: list[dict[str, str]] = [{}]
    for name, value in named:
        if name in groups[-1]:
            groups.append({})
        groups[-1][name] = value
    return groups if all(g.keys() == groups[0].keys() and len(g) > 1 for g in groups) else []


def _same_groups(a: dict[str, str], b: dict[str, str]) -> Verdict:
    return _all(same(a[name], b[name]) for name in b) if a.keys() == b.keys() else False


def _match(a: list, b: list, compare) -> Verdict:
    """Each of `a` with one of `b`; in sets, and only there, the same thing may stand twice."""
    table = [[compare(x, y) for y in b] for x in a]
    rest_a, rest_b = set(range(len(a))), set(range(len(b)))
    for i in range(len(a)):
        j = next((j for j in sorted(rest_b) if table[i][j]), None)
        if j is not None:
            rest_a.discard(i)
            rest_b.discard(j)
    if not rest_a and not rest_b:
        return True
    if all(any(table[i]) for i in rest_a) and all(any(r[j] for r in table) for j in rest_b):
        # The same solutions, if tuples; but 1, 2, 2 is another list than 1, 2.
        return True if all(isinstance(x, str) and _elements(x) for x in (*a, *b)) else None
    alone = [all(v is False for v in table[i]) for i in rest_a]
    alone += [all(row[j] is False for row in table) for j in rest_b]
    if any(alone):
        return False
    certain = [table[i][j] is False for i in rest_a for j in rest_b]
    return False if certain and all(certain) else None


def _elements(text: str) -> tuple[str, list[str]] | None:
    """The brackets and the elements of a tuple or an interval."""
    text = text.strip()
    if len(text) > 2 and text[0] in "([" and text[-1] in ")]" and _end(text) == len(text):
        return text[0] + text[-1], [p.strip() for p in _cut(text[1:-1], re.compile("[,;]"))[0]]
    return None


def _same_item(a: str, b: str) -> Verdict:
    a, b = trim(a), trim(b)
    if plain(a) == plain(b):
        return True
    in_words = _same_words(a, b)
    if in_words != "no words":
        return in_words
    builders = [_BUILDER.fullmatch(text) for text in (a, b)]
    if all(builders):
        return (
            same(builders[0][2], builders[1][2]) if same(builders[0][1], builders[1][1]) else None
        )
    moduli = [_MODULUS.fullmatch(text) for text in (a, b)]
    if any(moduli):
        if not all(moduli):  # one side leaves the modulus out
            bare = [m[1] if m else text for m, text in zip(moduli, (a, b), strict=True)]
            return True if plain(bare[0]) == plain(bare[1]) else None
        return _same_congruence(*moduli)
    signs = [_cut(text, _SIGN) for text in (a, b)]
    if signs[0][1] or signs[1][1]:
        return _same_relation(a, b, *signs)
    factors = [_cut(text, re.compile(r"\\times(?![a-zA-Z])"))[0] for text in (a, b)]
    if len(factors[0]) == len(factors[1]) > 1 and any(map(take_unit, factors[0] + factors[1])):
        return _match(*factors, _same_item)  # 20 ft x 35 ft
    brackets = [_elements(text) for text in (a, b)]
    if all(brackets):
        return _same_brackets(a, b, *brackets)
    quantity = _same_quantity(a, b)
    return same_formula(a, b) if quantity == "no unit" else quantity


def _same_brackets(a: str, b: str, in_a: tuple, in_b: tuple) -> Verdict:
    (kind_a, items_a), (kind_b, items_b) = in_a, in_b
    if len(items_a) == len(items_b) == 1:
        return same_formula(a, b)
    if len(items_a) != len(items_b):
        return False
    verdict = _all(map(same, items_a, items_b))
    return verdict if kind_a == kind_b or len(items_a) > 2 else False


def _is_wordy(text: str) -> bool:
    return bool(_words(text))


def _words(text: str) -> list[str]:
    """Words, which are not the names of functions; inside \\text{} a letter is a word too."""
    found = [w for m in _TEXT.finditer(text) for w in re.findall(r"[^\W\d_]+", m[1])]
    bare = re.sub(r"\\(?:begin|end)\{\w+\*?\}", " ", _TEXT.sub(" ", text))
    found += [
        m[0] for m in _WORD.finditer(bare) if re.search("[aeiouy]|[^\x00-\x7f]", m[0].lower())
    ]
    return found


def _same_words(a: str, b: str) -> Verdict | str:
    """Two texts of words alone, or words and formulas in the same order."""
    for text in (a, b):
        if take_unit(text) or not _is_wordy(text):
            continue
        break
    else:
        return "no words"
    if all(len(_words(x)) == 1 == len(_TEXT.sub(r"\1", x).strip()) for x in (a, b)):
        return "no words"
    if "\\begin" in a + b:
        return None
    parts = [_parts(text) for text in (a, b)]
    if [p for p, is_word in parts[0] if is_word] == [p for p, is_word in parts[1] if is_word]:
        shape = [[is_word for _, is_word in side] for side in parts]
        if shape[0] != shape[1]:
            return None
        return _all(same(x, y) for (x, is_word), (y, _) in zip(*parts, strict=True) if not is_word)
    only_words = [all(is_word for _, is_word in side) for side in parts]
    if all(only_words) and all(len(side) <= 2 for side in parts):
        letters = [sorted("".join(p for p, _ in side)) for side in parts]
        return None if letters[0] == letters[1] else False
    if only_words[0] and len(parts[0]) == 1 and re.fullmatch(r"-?[\d.,]+", plain(b)):
        return None if parts[0][0][0] in _NUMERALS else False
    if _is_wordy(a) and _is_wordy(b) or any(only_words):
        return None
    return "no words" if all(len(w) == 1 for x in (a, b) for w in _words(x)) else None


def _parts(text: str) -> list[tuple[str, bool]]:
    """Words and formulas in turn."""
    marked = _TEXT.sub(lambda m: re.sub(r"[^\W\d_]+", lambda w: f"\x01{w[0]}\x02", m[1]), text)
    marked = re.sub(rf"(?<!\x01)(?:{_WORD.pattern})", lambda w: f"\x01{w[0]}\x02", marked)
    parts = []
    for piece in re.split("(\x01[^\x02]*\x02)", marked):
        if piece.startswith("\x01"):
            parts.append((piece[1:-1].lower(), True))
        elif trim(piece).strip(" -.,:;()"):
            parts.append((piece, False))
    return parts


def _same_congruence(a: re.Match, b: re.Match) -> Verdict:
    """Residues of the same modulus."""
    sides = [re.split(r"\\equiv|=", m[1]) for m in (a, b)]
    residues = [_SPACE.sub("", side[-1]).strip("(") for side in sides]
    names = {plain(side[0]) for side in sides if len(side) > 1}
    if a[2] != b[2]:
        return False if a[2].isdigit() and b[2].isdigit() else None
    if residues[0] == residues[1]:
        return True if len(names) <= 1 else None
    if not all(re.fullmatch(r"-?\d{1,30}", r) for r in (*residues, a[2])) or int(a[2]) == 0:
        return None
    is_same = (int(residues[0]) - int(residues[1])) % int(a[2]) == 0
    return is_same if len(names) <= 1 else None


def _is_name(text: str) -> bool:
    """Whether `text = 5` says what `text` is: x, f(2), \\angle ABC, (a, b), V_1 : V_2."""
    bare = re.sub(r"_\{[^{}]*\}|\^\{-1\}|\([^()]*\)|_\w", "", text.strip())
    if text.strip().startswith("("):
        return bool(re.search("[a-zA-Z]", text)) and not re.search(r"[+*/^]", text)
    return bool(re.match(r"[a-zA-Z\\|]", bare)) and not re.search(r"[+*/^\d]|-", bare)


def _same_relation(a: str, b: str, in_a: tuple, in_b: tuple) -> Verdict:
    (sides_a, signs_a), (sides_b, signs_b) = map(_settle, (in_a, in_b))
    if not signs_a and not signs_b:
        return _same_item(sides_a[0], sides_b[0])
    if not (signs_a and signs_b):
        if signs_a:
            return _same_value(sides_a, signs_a, b, a, is_expected=False)
        return _same_value(sides_b, signs_b, a, b, is_expected=True)
    functions = [_FUNCTION.fullmatch(sides[0]) for sides in (sides_a, sides_b)]
    if all(functions) and functions[0][1] == functions[1][1]:  # f(t) = 2t is f(x) = 2x
        old, new = (f[2] for f in functions)
        sides_a = [re.sub(rf"(?<![\\a-zA-Z]){old}(?![a-zA-Z])", new, side) for side in sides_a]
    if signs_a == signs_b or [_FLIPPED.get(s) for s in signs_a[::-1]] == signs_b:
        turns = [(sides_a, signs_a), (sides_a[::-1], [_FLIPPED.get(s) for s in signs_a[::-1]])]
        for sides, signs in turns:
            if signs != signs_b:
                continue
            each = [same(x, y) for x, y in zip(sides, sides_b, strict=True)]
            if all(each):
                return True
            if len(each) == 3 and each[1] and None not in each:
                return False
            is_other_side = signs == ["="] and each[1] and not each[0]
            if each.count(False) == 1 and None not in each and not is_other_side:
                return False  # the same thing is not below 3 and below 4, nor is it 5 and 6
            if is_other_side and _is_name(sides[0]) and _is_name(sides_b[0]):
                return None  # f(x) = 2x, y = 2x
    elif len(signs_a) == len(signs_b):
        if _all(map(same, sides_a, sides_b)):
            return False  # the same sides, and another sign
    if signs_a == signs_b == ["="]:
        return same_equation(tuple(sides_a), tuple(sides_b))
    return same_inequality([a], [b])


def _settle(cut: tuple[list[str], list[str]]) -> tuple[list[str], list[str]]:
    """Without roundings (x = 1/3 \\approx 0.33), and without steps (x = 5 + 2 = 7)."""
    sides, signs = [side.strip() for side in cut[0]], list(cut[1])
    if signs == [r"\approx"] and _is_name(sides[0]):
        signs = ["="]
    if r"\approx" in signs:
        at = signs.index(r"\approx")
        sides, signs = sides[: at + 1], signs[:at]
    if len(signs) > 1 and set(signs) == {"="}:
        sides, signs = [sides[0], sides[-1]], ["="]
    return sides, signs


def _same_value(
    sides: list[str], signs: list[str], value: str, relation: str, *, is_expected: bool
) -> Verdict:
    """A relation on one side, a `value` on the other."""
    if signs == ["="]:
        name, result = sides
        if _is_name(result) and not re.search("[a-zA-Z]", name):
            name, result = result, name
        verdict = same(result, value) if not is_expected else same(value, result)
        if not verdict or _is_name(name):
            return verdict
        if is_expected:  # 7 = 11a + c and a + 3z = 0 are equations, not values
            return None if re.search("[a-zA-Z]", name) and plain(result) != "0" else False
        return None if plain(result) == "0" and re.search("[a-zA-Z]", name) else True
    if signs == [r"\in"] and _is_name(sides[0]):
        return same(sides[1], value) if not is_expected else same(value, sides[1])
    if is_expected:
        return same_inequality([value], [relation])
    return same_inequality([relation], [value])


def _same_quantity(a: str, b: str) -> Verdict | str:
    """Values with units or percent signs; one side alone may leave its unit out."""
    percent = [bool(re.search(r"\\?%$", text)) for text in (a, b)]
    if any(percent):
        bare = [re.sub(r"\s*\\?%$", "", text) for text in (a, b)]
        verdict = same(*bare)
        if all(percent) or verdict:
            return verdict
        k = percent.index(True)
        bare[k] = rf"({bare[k]})/100"
        return _any([verdict, same(*bare)])
    units = [take_unit(text) for text in (a, b)]
    if not any(units):
        return "no unit"
    if not all(units):  # 2s is two seconds beside a unit of time, and else twice s
        loose = [take_unit(text, may_be_letter=True) for text in (a, b)]
        if all(loose) and loose[0][1].powers == loose[1][1].powers:
            units = loose
    if not all(units):
        values = [unit[0] if unit else text for unit, text in zip(units, (a, b), strict=True)]
        unit = next(unit[1] for unit in units if unit)
        if unit.is_number:  # 3.5 million, 75 cents
            k = 0 if units[0] else 1
            whole = [*values]
            whole[k] = scaled(values[k], unit, ONE)
            return _any([same(*values), same(*whole)])
        return same(*values)
    (value_a, unit_a), (value_b, unit_b) = units  # type: ignore[misc]
    if unit_a.powers == unit_b.powers:
        return same(scaled(value_a, unit_a, unit_b), value_b)
    verdict = same(value_a, value_b)
    if unit_a.is_vague != unit_b.is_vague:
        return verdict
    if (unit_a.is_known and unit_b.is_known) or unit_a.bases == unit_b.bases:
        return False
    return False if verdict is False and not (unit_a.is_known or unit_b.is_known) else None
