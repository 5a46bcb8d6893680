r"""Formulas, read whole by math-verify's grammar (latex2sympy2_extended), compared by value.

Two expressions are equal if they have the same value at a dozen points wherever both are real:
\ln x^2 is 2 \ln x, \sqrt{x^2} is not x. Two equations are equal if one is a multiple of the other,
or if they have the same solutions, and have some.
"""

import re
from collections.abc import Callable, Iterator
from functools import lru_cache, wraps
from itertools import islice
from typing import Any

Verdict = bool | None  # None: that cannot be told

# What the grammar passes over or multiplies letter by letter, so that it would be read in part.
_UNREADABLE = re.compile(
    r"'|\\prime|dots|\\(?:text|mathrm|mbox|operatorname)\s*\{[^{}]*[a-zA-Z]\s+[a-zA-Z]"
    r"|\\(?:text|mathrm|mbox)\s*\{\s*[a-zA-Z]{2,}|\d_|\\not|\\pm|\\mp|\\dot(?![a-z])|\^\s*\{?\s*\\?[T*]"
    r"|(?<![\\a-zA-Z{])[a-z]{2,}\s+[a-z]{2,}"
)
_MIN_POINTS = 3  # at which both sides must have a value before they are called equal


@lru_cache(maxsize=64)
def read(text: str) -> Any:
    """`text` as a sympy object with real symbols; None if the grammar does not read all of it."""
    from latex2sympy2_extended.latex2sympy2 import (
        ConversionConfig,
        NormalizationConfig,
        latex2sympy,
        normalize_latex,
    )
    from sympy import E, I, Symbol
    from sympy.core.function import AppliedUndef

    if not text or _UNREADABLE.search(text):
        return None
    rules = NormalizationConfig(malformed_operators=True, nits=True, boxed="none")
    # The grammar takes a capital I for the imaginary unit, and a gamma, small or capital, for
    # Euler's constant: here they are names, as in I = 5.
    text = re.sub(r"(?<![\\a-zA-Z{])I(?![a-zA-Z])", r"\\text{I}", normalize_latex(text, rules))
    text = re.sub(r"\\(?:var)?([gG]amma)(?![a-zA-Z(]|\s*\()", r"\\text{name\1}", text)
    case = ConversionConfig(lowercase_symbols=False)
    try:
        found = latex2sympy(
            text,
            is_real=True,
            convert_degrees=False,
            normalization_config=None,
            conversion_config=case,
        )
        units = {Symbol("i", real=True): I, Symbol("e", real=True): E}
        constants = {s: units[s] for s in found.free_symbols & units.keys()}  # not a bound one
        constants |= {call: Symbol(str(call), real=True) for call in found.atoms(AppliedUndef)}
        return found.xreplace(constants)
    except Exception:  # it fails in many ways on what it does not read
        return None


def may_be_interval(text: str) -> bool:
    """(1, -2) is none, nor [1, -2]."""
    from sympy import Tuple

    return not isinstance(read(text), Tuple)


def _none_if_it_fails(compare: Callable) -> Callable:
    """sympy raises errors of many kinds where it cannot compare. (Whether that is the rule and not
    the exception, the known pairs of judge.py tell.)"""

    @wraps(compare)
    def compared(*sides: Any, **how: str) -> Verdict:
        try:
            return compare(*sides, **how)
        except Exception:
            return None

    return compared


def same_formula(given: str, expected: str) -> Verdict:
    a, b = read(given), read(expected)
    return None if a is None or b is None else _same_object(a, b)


@_none_if_it_fails
def same_read(given: Any, expected: str) -> Verdict:
    """`given` as math-verify read it in a text."""
    from sympy import Symbol

    expression = read(expected)
    if expression is None or not hasattr(given, "free_symbols"):
        return None
    names = {s: Symbol(s.name, real=True) for s in given.free_symbols}
    return _same_object(given.xreplace(names), expression)


@_none_if_it_fails
def _same_object(a: Any, b: Any) -> Verdict:
    from sympy import Expr, FiniteSet, MatrixBase, MatrixExpr, Set, Tuple

    kinds = [
        next(
            (
                k
                for k, kind in enumerate([(MatrixBase, MatrixExpr), Expr, (Set, Tuple)])
                if isinstance(x, kind)
            ),
            None,
        )
        for x in (a, b)
    ]
    if kinds == [1, 1]:
        return _same_expression(a, b)
    if kinds == [0, 0]:
        return _same_matrix(a, b)
    if None in kinds:
        return True if _by_math_verify(a, b) else None
    if kinds == [2, 2]:
        return _by_math_verify(a.doit(), b.doit())
    if 2 in kinds:
        a, b = (x.doit() for x in (a, b))
        a, b = (x.args[0] if isinstance(x, FiniteSet) and len(x) == 1 else x for x in (a, b))
        return _same_expression(a, b) if isinstance(a, Expr) and isinstance(b, Expr) else False
    return False


@_none_if_it_fails
def same_equation(given: tuple[str, str], expected: tuple[str, str]) -> Verdict:
    """Each as its two sides."""
    from sympy import Expr, fraction, together

    sides = [read(side) for side in (*given, *expected)]
    if not all(isinstance(side, Expr) for side in sides):
        return None
    a, b = (fraction(together(x - y))[0] for x, y in (sides[:2], sides[2:]))
    if not (a.free_symbols and b.free_symbols):
        return None
    is_multiple = _ratio(a, b, lambda value: True)
    return True if is_multiple else _same_solutions(a, b)


@_none_if_it_fails
def same_inequality(given: list[str], expected: list[str], joined_by: str = "or") -> Verdict:
    """Of relations other than equations and of sets. Those of a list are joined by "or" or "and",
    which may mean "or" where nothing is both."""
    from sympy import Expr, Intersection, Tuple, Union
    from sympy.core.relational import Relational

    sides = [[read(text) for text in side] for side in (given, expected)]
    if any(x is None for side in sides for x in side):
        return None
    a, b = sides[0][0], sides[1][0]
    are_relations = all(
        len(side) == 1
        and isinstance(side[0], Relational)
        and side[0].free_symbols
        and all(isinstance(part, Expr) for part in side[0].args)
        for side in sides
    )
    if are_relations:
        (low_a, high_a, strict_a), (low_b, high_b, strict_b) = map(_rising, (a, b))
        if _ratio(high_a - low_a, high_b - low_b, lambda value: value > 0):
            return strict_a == strict_b
    names = {s for side in sides for x in side if hasattr(x, "rel_op") for s in x.free_symbols}
    if len(names) > 1:
        return False if are_relations else None
    sets = [[_solutions(x) for x in side] for side in sides]
    if any(x is None for side in sets for x in side):
        return None
    if any(isinstance(x, Tuple) for side in sets for x in side):
        return None
    one, other = (
        Intersection(*side)
        if joined_by == "and" and Intersection(*side).is_empty is not True
        else Union(*side)
        for side in sets
    )
    if one.is_empty or other.is_empty:
        return None
    return _by_math_verify(one, other)


def _rising(relation: Any) -> tuple[Any, Any, bool | None]:
    """(low, high, whether it is strict)."""
    low, high = relation.args
    if relation.rel_op in (">", ">="):
        low, high = high, low
    return low, high, {"<": True, ">": True, "<=": False, ">=": False}.get(relation.rel_op)


def _solutions(x: Any) -> Any:
    """The set of a relation's solutions, or the set itself; None if it cannot be found."""
    from sympy import Intersection, Interval, S, Set, Tuple, oo

    if isinstance(x, (Set, Tuple)):
        return x
    if len(x.args) == 2 and isinstance(x.args[1], Set):  # x in [0, 1]
        return x.args[1]
    try:
        parts = [x] if hasattr(x, "rel_op") else x.args
        found = Intersection(*(part.doit().as_set() for part in parts))
        return Interval(-oo, oo) if found in (S.Reals, S.UniversalSet) else found
    except Exception:  # more than one unknown, or sympy cannot solve it
        return None


def _by_math_verify(a: Any, b: Any) -> bool:
    from math_verify import verify

    return verify(b, a, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True)


def _same_matrix(a: Any, b: Any) -> Verdict:
    a, b = a.doit(), b.doit()
    if not (hasattr(a, "flat") and hasattr(b, "flat")):
        return None
    if a.shape != b.shape:
        return False
    verdicts = [_same_expression(x, y) for x, y in zip(a.flat(), b.flat(), strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _same_expression(a: Any, b: Any) -> Verdict:
    from sympy import Derivative, Expr, Float, I, Symbol

    calls = {d: Symbol(str(d), real=True) for x in (a, b) for d in x.atoms(Derivative)}
    a, b = (x.xreplace(calls).doit() for x in (a, b))
    if not (isinstance(a, Expr) and isinstance(b, Expr)):
        return None
    tolerance = 5e-6 if a.has(Float) or b.has(Float) else None
    if not (a.free_symbols or b.free_symbols):
        return _same_number(a, b, tolerance)
    differ = None if _may_be_renamed(a, b) else False
    is_complex = a.has(I) or b.has(I)
    compared = 0
    for point in _points(a.free_symbols | b.free_symbols):
        x, y = _value(a, point), _value(b, point)
        if x is None or y is None or not (is_complex or (x.is_real and y.is_real)):
            continue
        size = max(abs(x), abs(y))
        if abs(x - y) > (tolerance * size if tolerance else max(1e-18 * size, 1e-27)):
            return differ
        compared += 1
    return True if compared >= _MIN_POINTS else None


def _may_be_renamed(a: Any, b: Any) -> bool:
    """Whether a letter of only one side leaves it open if they differ: f(2), of which the other
    does not speak; the k of 2k\\pi, which may be an n there."""
    alone_a, alone_b = (
        {s.name for s in x.free_symbols - y.free_symbols} for x, y in ((a, b), (b, a))
    )
    calls = [
        any(re.search(r"^Derivative|\([\d., ]+\)", s.name) for s in x.free_symbols) for x in (a, b)
    ]
    if calls[0] != calls[1]:
        return True
    if not (len(alone_a) == len(alone_b) == 1 and alone_a | alone_b <= set("klmn")):
        return False
    renamed = {
        s: t for s in a.free_symbols - b.free_symbols for t in b.free_symbols - a.free_symbols
    }
    return _same_expression(a.xreplace(renamed), b) is True


def _same_number(a: Any, b: Any, tolerance: float | None) -> Verdict:
    """To six significant digits and six places where a decimal is among them, else to thirty."""
    if a.is_Rational and b.is_Rational:
        return a == b
    if a.is_infinite or b.is_infinite:
        return a == b
    x, y = a.evalf(50), b.evalf(50)
    if not (x.is_number and y.is_number) or x.has("nan") or y.has("nan"):
        return None
    size = max(abs(x), abs(y))
    difference = abs(x - y)
    if difference <= 1e-12 * size and tolerance:
        return True
    if tolerance:
        return bool(difference <= tolerance * size and abs(x.round(6) - y.round(6)) < 1e-9)
    return bool(difference <= 1e-30 * size)


def _points(symbols: set) -> Iterator[dict]:
    """Where to compare: among positive numbers, all numbers and whole numbers, always the same."""
    from sympy import Integer, Rational

    names = sorted(symbols, key=str)
    for turn in range(12):
        point = {}
        for k, name in enumerate(names if turn % 2 else names[::-1]):  # now a < b, now a > b
            size = Rational(7 + 13 * turn + 29 * k, 11 + (17 * k + 5 * turn) % 19)
            sign = -1 if 4 <= turn < 8 and (turn + k) % 2 == 0 else 1
            point[name] = Integer(2 + (turn + 3 * k) % 7) if turn >= 8 else sign * size
        yield point


def _value(x: Any, point: dict) -> Any:
    try:
        value = x.subs(point).doit().evalf(30)
        return value if value.is_number and value.is_finite else None
    except Exception:
        return None


def _ratio(a: Any, b: Any, is_allowed: Callable[[Any], bool]) -> bool:
    """Whether a = c b for a number c that is allowed."""
    ratios = []
    for point in _points(a.free_symbols | b.free_symbols):
        x, y = _value(a, point), _value(b, point)
        if x is None or y is None or not (abs(x) > 1e-20 and abs(y) > 1e-20):
            if (x is None) == (y is None):
                continue
            return False
        ratios.append(x / y)
        if abs(ratios[-1] - ratios[0]) > 1e-15 * abs(ratios[0]):
            return False
    return len(ratios) >= _MIN_POINTS and is_allowed(ratios[0])


def _same_solutions(a: Any, b: Any) -> Verdict:
    """Of a = 0 and b = 0, real or complex; None if they have none or cannot be solved."""
    from sympy import Symbol, factor_list, solve

    if a.free_symbols != b.free_symbols:
        return False
    a, b = (x.xreplace({s: Symbol(s.name) for s in x.free_symbols}) for x in (a, b))
    names = sorted(a.free_symbols, key=str)
    try:
        if all(x.is_polynomial(*names) for x in (a, b)):
            first, second = (_product(factor_list(x, *names)[1], names) for x in (a, b))
            return _ratio(first, second, lambda value: True)
        if len(names) > 1:
            return None
        found = [[s.evalf(20) for s in islice(solve(x, names[0]), 50)] for x in (a, b)]
    except Exception:
        return None
    if not all(found):
        return None
    near = [
        [any(abs(x - y) <= 1e-12 * max(1, abs(x)) for y in other) for x in one]
        for one, other in (found, found[::-1])
    ]
    return all(map(all, near))


def _product(factors: list, names: list) -> Any:
    """Of the factors, each once: x^2 = 0 has the solutions of x = 0."""
    from sympy import Poly

    product = Poly(1, *names)
    for factor, _ in factors:
        product = product.mul(Poly(factor, *names))
    return product.as_expr()
