r"""Quantities: a value and a unit: `5 \text{ km/h}`, `12 cm^2`, `\$3`, `9 \text{ apples}`."""

import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction

MAX_LENGTH = 100  # of a unit
_WRAP = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*"
_GAP = r"(?:\\?[ ,;:!~]|\\q?quad(?![a-z]))*"
_POWER = r"(?:\s*\^\s*(?:-?\d|\{\s*-?\d\s*\}))?"
_BARE = rf"[a-zA-Z]+(?![a-zA-Z])\.?{_POWER}"  # a whole word: else a long one has too many splits
_PART = rf"(?:{_WRAP}\{{[^{{}}]*\}}{_POWER}|(?:\\cdot|/|\\times)(?!\s*\d)|{_BARE})"
_TAIL = re.compile(rf"(?:{_GAP}{_PART})+{_GAP}")
_WORDS = re.compile(r"[a-zA-Zμ]+|/|\^-?\d|-?\d")
# A line: names, what one is in the units before it.
_TABLE = """
m meter metre
cm: 1/100 m
mm: 1/1000 m
km: 1000 m
in inch inche: 127/5000 m
ft foot feet: 381/1250 m
yd yard: 1143/1250 m
mi mile: 201168/125 m
s sec second
ms millisecond: 1/1000 s
min minute: 60 s
h hr hour: 3600 s
day: 86400 s
week: 604800 s
year yr
month
kg kilogram
g gram: 1/1000 kg
mg milligram: 1/1000000 kg
lb pound: 45359237/100000000 kg
dollar USD
cent: 1/100 dollar
L l liter litre: 1/1000 m ^3
mL ml: 1/1000000 m ^3
N newton: kg m / s ^2
J joule: N m
kJ: 1000 J
eV
W watt: J / s
Pa pascal: N / m ^2
K kelvin
A ampere amp
V volt: W / A
ohm: V / A
C coulomb: A s
Hz hertz: / s
mol mole
rad radian
degree deg
mph: mi / h
kmph kph: km / h
hundred: 100 #
thousand: 1000 #
million: 1000000 #
billion: 1000000000 #
trillion: 1000000000000 #
dozen: 12 #
"""
# In text, before one of these symbols or names; "2kA" elsewhere is a product.
_PREFIXES = {
    **{"G": "giga 9", "M": "mega 6", "k": "kilo 3", "c": "centi -2", "m": "milli -3"},
    **{"μ": "micro -6", "n": "nano -9", "p": "pico -12", "d": "deci -1"},
}
_PREFIXED = re.compile(
    "m|g|s|N|J|W|V|A|C|L|l|Hz|Pa|eV|mol|K|ohm|meter|metre|gram|second|newton|joule|watt|volt|ampere"
    "|amp|liter|litre|hertz|pascal|mole"
)
# 5 or more, 5 more than x, 5 if n is odd: these say something about a number.
_NO_UNIT = re.compile(r"\b(?:or|than|if|not|plus|minus|unless|except)\b", re.I)
_FILLERS = {"a", "an", "the", "of", "total"}
_SQUARE = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}


@dataclass(frozen=True)
class Unit:
    powers: frozenset  # (base, power)
    size: Fraction
    is_known: bool

    @property
    def bases(self) -> set[str]:
        return {base for base, _ in self.powers}

    @property
    def is_number(self) -> bool:
        """A number by another name, or money, whose unit often stays away."""
        return self.is_known and self.bases <= {"dollar"} and self.size != 1

    @property
    def is_vague(self) -> bool:
        """Units of no kind: "square units"."""
        return self.bases == {"unit"}


ONE = Unit(frozenset(), Fraction(1), True)
_KNOWN: dict[str, Unit] = {}


def _parse(text: str) -> Unit:
    powers: Counter[str] = Counter()
    size, is_known, sign, pending, last = Fraction(1), True, 1, 1, None
    for word in _WORDS.findall(text):
        if word in ("/", "per"):
            sign, last = -1, None
        elif word[0] in "^-" or word.isdigit():
            extra = int(word.lstrip("^")) - 1
            if last is not None:
                _add(powers, last, sign * extra)
                size *= last.size ** (sign * extra)
        elif word.lower() in _SQUARE:
            if last is not None and word.endswith("ed"):
                _add(powers, last, sign * (_SQUARE[word] - 1))
                size *= last.size ** (sign * (_SQUARE[word] - 1))
            else:
                pending = _SQUARE[word.lower()]
        elif word.lower() not in _FILLERS:
            last = _look_up(word)
            is_known &= last.is_known
            _add(powers, last, sign * pending)
            size *= last.size ** (sign * pending)
            pending = 1
    return Unit(frozenset((b, p) for b, p in powers.items() if p), size, is_known)


def _add(powers: Counter, unit: Unit, times: int) -> None:
    for base, power in unit.powers:
        powers[base] += power * times


def _known(word: str) -> Unit | None:
    names = (word, word.lower(), word.lower().removesuffix("s"))
    return next((_KNOWN[name] for name in names if name in _KNOWN), None)


def _look_up(word: str) -> Unit:
    unit = _known(word)
    if unit:
        return unit
    for symbol, meaning in _PREFIXES.items():
        name, exponent = meaning.split()
        for prefix in (symbol, name):
            rest = word.removeprefix(prefix).removesuffix("s")
            if rest != word and _PREFIXED.fullmatch(rest) and (len(rest) > 3) == (prefix == name):
                unit = _KNOWN[rest]
                return Unit(unit.powers, unit.size * Fraction(10) ** int(exponent), True)
    base = word.lower()
    base = base.removesuffix("s") if len(base) > 2 else base
    return Unit(frozenset({(base, 1)}), Fraction(1), False)


def _learn() -> None:
    for line in filter(None, _TABLE.splitlines()):
        names, _, meaning = line.partition(":")
        first, *others = names.split()
        number = re.match(r" (\d+(?:/\d+)?) ", meaning)
        if meaning:
            unit = _parse(meaning[number.end() :] if number else meaning)
            size = unit.size * (Fraction(number[1]) if number else 1)
            unit = Unit(unit.powers, size, True)
        else:
            unit = Unit(frozenset({(first, 1)}), Fraction(1), True)
        _KNOWN.update(dict.fromkeys((first, *others), unit))


_learn()


def take_unit(text: str, *, may_be_letter: bool = False) -> tuple[str, Unit] | None:
    """The value and the unit of `text`, or None if it has no unit (or only a unit)."""
    dollars = re.match(
        r"\\\$|(?:\\(?:text|mathrm)\s*\{\s*)?(?:US\\?\$|USD)\s*\}?\s*(?=[\d.])", text
    )
    if dollars:
        return text[dollars.end() :].strip(), _KNOWN["dollar"]
    degrees = re.fullmatch(
        r"(?s)(.*\S)\s*\^\s*(?:\\circ|\{\s*\\circ\s*\})\s*(?:\\(?:text|mathrm)\s*\{)?\s*([CF]?)\}?",
        text,
    )
    if degrees:
        return degrees[1], _parse("degree" + degrees[2])
    for start in re.finditer(r"(?<=[\d}).π])\s*|(?<=[a-z%|])(?=\\)|(?<=[a-z%])\s+", text):
        tail = text[start.end() :]
        if not 0 < len(tail) <= MAX_LENGTH or tail[0] in "/^.*" or not _TAIL.fullmatch(tail):
            continue
        words = re.sub(rf"{_WRAP}\{{|[{{}}~]|\\(?:cdot|times|q?quad|[ ,;:!])", " ", tail)
        value = text[: start.start()].strip()
        gap = text[start.start() : start.end()]
        if value and _is_unit(words, tail, gap, value, may_be_letter):
            return value, _parse(words)
    return None


def _is_unit(words: str, tail: str, gap: str, value: str, may_be_letter: bool) -> bool:
    """Bare letters are a unit if they are a known one of two letters or more, or words."""
    names = re.findall(r"[a-zA-Z]+", words)
    if not names or (len(names) == 1 and names[0] in ("i", "e", "j", "pi")):
        return False
    if _NO_UNIT.search(words):
        return False
    if re.match(rf"{_GAP}{_WRAP}", tail):
        return not re.fullmatch(r"(?s).*[+\-*=<>/(]\s*", value)
    if re.search(r"[a-zA-Z]\s*$", value) or not re.search(r"\d\}*\s*$|\)\s*$|%\s*$", value):
        return False
    if all(
        _known(n) and (may_be_letter or (len(n) > 1 and (gap or n not in ("mg", "ms"))))
        for n in names
        if n not in ("per", *_SQUARE)
    ):
        return True
    return bool(gap) and any(len(n) > 3 and re.search("[aeiouy]", n) for n in names)


def scaled(value: str, unit: Unit, other: Unit) -> str:
    """`value` of `unit` as a number of `other`, which measures the same."""
    ratio = unit.size / other.size
    return (
        value
        if ratio == 1
        else rf"({value}) \cdot \frac{{{ratio.numerator}}}{{{ratio.denominator}}}"
    )
