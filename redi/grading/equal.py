r"""Are two answers the same? True, False, or None where that cannot be told.

An answer is taken apart here: lists, tuples, relations, quantities, words. What is left are
formulas, which math-verify's grammar reads whole or not at all (formula.py). Where it does not,
texts are compared, and texts that differ tell nothing. (math-verify itself searches an unread
formula for something that it can read, and then compares two numbers out of two formulas.)
"""

import re
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any, Literal

from redi.grading.formula import may_be_interval, same_equation, same_formula, same_inequality
from redi.grading.pieces import SIGN, SPACE, cut, elements, is_name, plain, split, trim
from redi.grading.units import ONE, scaled, take_unit
from redi.grading.words import is_wordy, same_words

Verdict = bool | None

_TIMES = re.compile(r"\\times(?![a-zA-Z])")
MAX_ITEMS = 60  # of a list: each is compared with each
_FLIPPED = {"<": ">", ">": "<", r"\le": r"\ge", r"\ge": r"\le", "=": "=", r"\ne": r"\ne"}
_THOUSANDS = re.compile(r"(?<![\d,.])(\d{1,3})((?:,\d{3})+)(?!,?\d)")
_MODULUS = re.compile(
    r"(.*?)\s*\\?[\s,(]*(?:\\[pb]?mod|\\text\s*\{\s*\(?mod\s*\}|\(mod)\s*\{?\s*(\w+)\s*[})\s]*",
    re.S,
)
_BUILDER = re.compile(r"\\\{(.*?)(?:\\mid|:|\|)(.*)\\\}", re.S)
# A figure and its name: the letters are no factors, and have an order.
_FIGURE = re.compile(
    r"(\\(?:angle|triangle|overline|widehat|overarc|odot|bigtriangleup|square|parallelogram)|(?=[A-Z]{3}))"
    r"\s*\{?\s*([A-Z]+)\s*\}?"
)
_COLON = re.compile(":")
_CLOCK = re.compile(r"\d{1,2}:[0-5]\d")
_FUNCTION = re.compile(r"\s*([a-zA-Z])\s*\(\s*([a-zA-Z])\s*\)\s*")


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
        [split(text) for text in dict.fromkeys((side, _without_commas(side)))] for side in (a, b)
    ]
    return _any(_same_lists(x, y) for x in readings[0] for y in readings[1])


def _total(items: list[str]) -> str | None:
    """2 h and 30 min as so many minutes."""
    parts = [part for part in map(take_unit, items) if part and part[1].is_known]
    if len(parts) < 2 or len(parts) < len(items):
        return None
    sizes = [unit.size for _, unit in parts]
    if len({unit.powers for _, unit in parts}) > 1 or sizes != sorted(set(sizes), reverse=True):
        return None
    values = (scaled(value, unit, parts[-1][1]) for value, unit in parts)
    last = parts[-1]
    return f"({' + '.join(values)}){items[-1].strip()[len(last[0]) :]}"


def _is_inequality(text: str) -> bool:
    signs = cut(text, SIGN)[1]
    return bool(signs) and "=" not in signs


def _without_commas(text: str) -> str:
    """1,000 as 1000; (100,200) is a pair."""
    bracket = r"[(\[][^()\[\]]*[)\]]"
    return re.sub(
        f"{bracket}|{_THOUSANDS.pattern}",
        lambda m: m[1] + m[2].replace(",", "") if m[1] else m[0],
        text,
    )


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
        groups_a, groups_b = _groups(names_a), _groups(names_b)
        if groups_a and groups_b and max(len(groups_a), len(groups_b)) > 1:
            return _match(groups_a, groups_b, _same_groups)
        if len(groups_a) == len(groups_b) == 1 and groups_a[0].keys() == groups_b[0].keys():
            return _same_groups(groups_a[0], groups_b[0])
    elif all(names_a) != all(names_b) and len({n[0] for n in (*names_a, *names_b) if n}) > 1:
        in_order = _all(map(_same_item, a, b)) if len(a) == len(b) else False
        return True if in_order else (None if _match(a, b, _same_item) else in_order)
    return _match(a, b, _same_item)


def _same_one_and_list(one: str, items: list[str]) -> Verdict:
    """A tuple may be written without its parentheses; else one thing is not several."""
    sides, signs = cut(one, SIGN)
    if signs in (["="], [r"\in"]) and is_name(sides[0]):
        inside = split(trim(sides[1]))  # (m, n) \in \{(1, 1), (3, 2)\}
        if len(inside) > 1:
            return _same_lists(inside, items)
    if all(_same_item(one, item) for item in items):  # 60^\circ or \frac{\pi}{3}
        return True if len(set(map(plain, items))) > 1 else None
    if re.fullmatch("[A-Z]+", one) and all(re.fullmatch("[A-Z]", item) for item in items):
        return sorted(one) == sorted(items)  # several choices, ABD
    inner = elements(_value_of(one))
    if inner is not None and len(inner[1]) > 1:
        if len(inner[1]) != len(items):
            return False
        return _all(map(_same_item, items, inner[1])) if inner[0] in ("()", "[]") else False
    if signs == ["="] and not is_name(sides[0]):
        return None  # an equation, whose solutions the items may be
    if all(map(is_wordy, items)) and plain(one) in map(plain, items):
        return False  # one of several names
    if any((is_wordy(x) and not take_unit(x)) or "dots" in x for x in (one, *items)) or re.search(
        r"\\mid|\\cup|\\in\b", one
    ):
        return None
    if any(sign != "=" for x in (one, *items) for sign in cut(x, SIGN)[1]):
        return None
    return False


def _value_of(text: str) -> str:
    sides, signs = cut(text, SIGN)
    return sides[-1].strip() if signs == ["="] else text


def _named(item: str) -> tuple[str, str] | None:
    """The name and the value of `x = 5`; of `5 \\text{ apples}`, the unit is the name."""
    sides, signs = cut(item, SIGN)
    if signs == ["="] and is_name(sides[0]):
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


def _match(a: list, b: list, compare: Callable[[Any, Any], Verdict]) -> Verdict:
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
        return True if all(isinstance(x, str) and elements(x) for x in (*a, *b)) else None
    alone = [all(v is False for v in table[i]) for i in rest_a]
    alone += [all(row[j] is False for row in table) for j in rest_b]
    if any(alone):
        return False
    certain = [table[i][j] is False for i in rest_a for j in rest_b]
    return False if certain and all(certain) else None


def _same_item(a: str, b: str) -> Verdict:
    a, b = trim(a), trim(b)
    if plain(a) == plain(b):
        return True
    figures = [_FIGURE.fullmatch(text) for text in (a, b)]
    if figures[0] and figures[1] and figures[0][1] == figures[1][1]:
        return None if sorted(figures[0][2]) == sorted(figures[1][2]) else False
    in_words = same_words(a, b, same)
    if in_words != "no words":
        return in_words
    set_a, set_b = _BUILDER.fullmatch(a), _BUILDER.fullmatch(b)
    if set_a and set_b:
        return same(set_a[2], set_b[2]) if same(set_a[1], set_b[1]) else None
    builder = set_a or set_b
    if builder:  # x > 2 beside {x | x > 2}
        sides = (set_a[2] if set_a else a, set_b[2] if set_b else b)
        return same(*sides) or None if re.fullmatch(r"\s*[a-zA-Z]\s*", builder[1]) else None
    modulo_a, modulo_b = _MODULUS.fullmatch(a), _MODULUS.fullmatch(b)
    if modulo_a and modulo_b:
        return _same_congruence(modulo_a, modulo_b)
    if modulo_a or modulo_b:  # one side leaves the modulus out
        bare = (modulo_a[1] if modulo_a else a, modulo_b[1] if modulo_b else b)
        return True if plain(bare[0]) == plain(bare[1]) else None
    signs = [cut(text, SIGN) for text in (a, b)]
    if signs[0][1] or signs[1][1]:
        return _same_relation(a, b, *signs)
    factors, others = (cut(text, _TIMES)[0] for text in (a, b))
    if len(factors) == len(others) > 1 and any(map(take_unit, factors + others)):
        return _match(factors, others, _same_item)  # 20 ft x 35 ft
    ratios = [cut(text, _COLON)[0] for text in (a, b)]
    if max(map(len, ratios)) > 2 and min(map(len, ratios)) > 1:
        return _same_ratio(*ratios)
    if _CLOCK.fullmatch(a) and _CLOCK.fullmatch(b):  # 7:20 and 14:40: as ratios only
        return None if same_formula(a, b) else False
    if len(ratios[0]) != len(ratios[1]):  # 8:00 beside 8
        a, b = (text.removesuffix(":00") if _CLOCK.fullmatch(text) else text for text in (a, b))
    in_a, in_b = elements(_without_name(a, b)), elements(_without_name(b, a))
    if in_a and in_b:
        return _same_brackets(a, b, in_a, in_b)
    quantity = _same_quantity(a, b)
    return same_formula(a, b) if quantity == "no unit" else quantity


def _same_ratio(a: list[str], b: list[str]) -> Verdict:
    """Of three terms or more: a multiple of each other."""
    if len(a) != len(b):
        return False
    pairs = combinations(zip(a, b, strict=True), 2)  # each pair of terms: the first may be 0
    return _all(
        same_formula(rf"({x}) \cdot ({v})", rf"({u}) \cdot ({y})") for (x, y), (u, v) in pairs
    )


def _without_name(text: str, other: str) -> str:
    """P(3, -4) as (3, -4), where the other side has no name."""
    return text[1:].strip() if re.match(r"[A-Z]\s*\(", text) and elements(other) else text


def _same_brackets(a: str, b: str, in_a: tuple, in_b: tuple) -> Verdict:
    (kind_a, items_a), (kind_b, items_b) = in_a, in_b
    if len(items_a) == len(items_b) == 1:
        return same_formula(a, b)
    if len(items_a) != len(items_b):
        return False
    verdict = _all(map(same, items_a, items_b))
    if kind_a == kind_b or len(items_a) > 2 or not (may_be_interval(a) or may_be_interval(b)):
        return verdict
    return False


def _same_congruence(a: re.Match, b: re.Match) -> Verdict:
    """Residues of the same modulus."""
    sides = [re.split(r"\\equiv|=", m[1]) for m in (a, b)]
    residues = [SPACE.sub("", side[-1]).strip("(") for side in sides]
    names = {plain(side[0]) for side in sides if len(side) > 1}
    if a[2] != b[2]:
        return False if a[2].isdigit() and b[2].isdigit() else None
    if residues[0] == residues[1]:
        return True if len(names) <= 1 else None
    if not all(re.fullmatch(r"-?\d{1,30}", r) for r in (*residues, a[2])) or int(a[2]) == 0:
        return None
    is_same = (int(residues[0]) - int(residues[1])) % int(a[2]) == 0
    return is_same if len(names) <= 1 else None


def _same_relation(a: str, b: str, in_a: tuple, in_b: tuple) -> Verdict:
    (sides_a, signs_a), (sides_b, signs_b) = map(_settle, (in_a, in_b))
    if not signs_a and not signs_b:
        return _same_item(sides_a[0], sides_b[0])
    if not (signs_a and signs_b):
        if signs_a:
            return _same_value(sides_a, signs_a, b, a, is_expected=False)
        return _same_value(sides_b, signs_b, a, b, is_expected=True)
    f, g = _FUNCTION.fullmatch(sides_a[0]), _FUNCTION.fullmatch(sides_b[0])
    if f and g and f[1] == g[1]:  # f(t) = 2t is f(x) = 2x
        name = re.compile(rf"(?<![\\a-zA-Z]){f[2]}(?![a-zA-Z])")
        sides_a = [name.sub(g[2], side) for side in sides_a]
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
            if len(signs) == 2 and sorted(map(plain, sides)) == sorted(map(plain, sides_b)):
                return False  # the same things in another order
            is_other_side = signs == ["="] and each[1] and not each[0]
            if each.count(False) == 1 and None not in each and not is_other_side:
                return False  # the same thing is not below 3 and below 4, nor is it 5 and 6
            if is_other_side and is_name(sides[0]) and is_name(sides_b[0]):
                names = sorted((plain(sides[0]), plain(sides_b[0])), key=len)
                return True if names[0] == "y" and names[1].endswith("(x)") else None
    elif len(signs_a) == len(signs_b) and _all(map(same, sides_a, sides_b)):
        return False  # the same sides, and another sign
    if signs_a == signs_b == ["="]:
        return same_equation(tuple(sides_a), tuple(sides_b))
    return same_inequality([a], [b])


def _settle(cut: tuple[list[str], list[str]]) -> tuple[list[str], list[str]]:
    """Without roundings (x = 1/3 \\approx 0.33), and without steps (x = 5 + 2 = 7)."""
    sides, signs = [side.strip() for side in cut[0]], list(cut[1])
    if signs == [r"\approx"] and is_name(sides[0]):
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
        if is_name(result) and not re.search("[a-zA-Z]", name):
            name, result = result, name
        verdict = same(result, value) if not is_expected else same(value, result)
        if not verdict or is_name(name):
            return verdict
        if is_expected:  # 7 = 11a + c and a + 3z = 0 are equations, not values
            return None if re.search("[a-zA-Z]", name) and plain(result) != "0" else False
        return None if plain(result) == "0" and re.search("[a-zA-Z]", name) else True
    if signs == [r"\in"] and is_name(sides[0]):
        return same(sides[1], value) if not is_expected else same(value, sides[1])
    if is_expected:
        return same_inequality([value], [relation])
    return same_inequality([relation], [value])


def _same_quantity(a: str, b: str) -> Verdict | Literal["no unit"]:
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
    in_a, in_b = take_unit(a), take_unit(b)
    if not (in_a or in_b):
        return "no unit"
    if not (in_a and in_b):  # 2s is two seconds beside a unit of time, and else twice s
        loose_a, loose_b = (take_unit(text, may_be_letter=True) for text in (a, b))
        if loose_a and loose_b and loose_a[1].powers == loose_b[1].powers:
            in_a, in_b = loose_a, loose_b
    value_a, unit_a = in_a or (a, None)
    value_b, unit_b = in_b or (b, None)
    if not (unit_a and unit_b):
        verdict = same(value_a, value_b)
        unit = unit_a or unit_b
        if not (unit and unit.is_number):
            return verdict
        full = same(
            *(scaled(value, u or ONE, ONE) for value, u in ((value_a, unit_a), (value_b, unit_b)))
        )
        # 75 cents are 75 or 0.75; 3.5 beside 3.5 million may count millions, or be wrong
        return _any([full, verdict if unit.bases else verdict and None])
    if unit_a.powers == unit_b.powers:
        return same(scaled(value_a, unit_a, unit_b), value_b)
    verdict = same(value_a, value_b)
    if unit_a.is_vague != unit_b.is_vague:
        return verdict
    if (unit_a.is_known and unit_b.is_known) or unit_a.bases == unit_b.bases:
        return False
    return False if verdict is False and not (unit_a.is_known or unit_b.is_known) else None
