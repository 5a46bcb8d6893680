r"""Answers in words: `\text{Tuesday}`, `5 \text{ if } n \text{ is odd}`, `ten`.

Two words that differ are two answers, but for what may be another form of the same one (plurals,
articles, the many ways to say that there is nothing): of these we cannot tell.
"""

import re
from collections.abc import Callable
from typing import Literal

from redi.grading.pieces import TEXT, WORD, plain, trim
from redi.grading.units import take_unit

Verdict = bool | None

_NUMERALS = {
    name: number
    for numbers, names in (
        (range(13), "zero one two three four five six seven eight nine ten eleven twelve"),
        (range(13, 20), "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"),
        (range(20, 100, 10), "twenty thirty forty fifty sixty seventy eighty ninety"),
        ((100, 1000), "hundred thousand"),
    )
    for number, name in zip(numbers, names.split(), strict=True)
}
# These may stand for a number, though we do not know for which.
_VAGUE = re.compile(
    "half|third|quarter|dozen|million|infinite|infinity|once|twice|double|triple|none|nothing|neither"
    "|undefined"
)
_NOTHING = re.compile(
    "no|none|nothing|not|never|neither|dne|undefined|impossible|empty|cannot|zero|exist|inconsistent"
    "|nonexistent"
)
# Of each line, one excludes the others.
_APART = [
    set(line.split())
    for line in (
        "am pm",
        "january february march april may june july august september october november december",
        "monday tuesday wednesday thursday friday saturday sunday",
        "even odd",
        "positive negative zero",
        "increasing decreasing constant",
        "left right up down",
        "north south east west",
        "maximum minimum",
    )
]
_NUMBER = re.compile(r"-?[\d.,]+")
_LEFT_OPEN = re.compile(r"(-?\d[\d.]*)\s*[-+*]\s*[a-zA-Z][a-zA-Z' ]*")  # 10+John's age
_STEM = 5  # letters: what two forms of a word share


def is_wordy(text: str) -> bool:
    return bool(_words(text))


def _words(text: str) -> list[str]:
    """Words, which are not the names of functions; inside \\text{} a letter is a word too."""
    found = [w for m in TEXT.finditer(text) for w in re.findall(r"[^\W\d_]+", m[1])]
    bare = re.sub(r"\\(?:begin|end)\{\w+\*?\}", " ", TEXT.sub(" ", text))
    found += [m[0] for m in WORD.finditer(bare) if re.search("[aeiouy]|[^\x00-\x7f]", m[0].lower())]
    return found


def same_words(
    a: str, b: str, same: Callable[[str, str], Verdict]
) -> Verdict | Literal["no words"]:
    """Two texts of words alone, or words and formulas in the same order; `same` compares these."""
    wordy = [text for text in (a, b) if is_wordy(text)]
    if not wordy:
        return "no words"
    parts = [_parts(text) for text in (a, b)]
    words = [[p for p, is_word in side if is_word] for side in parts]
    if _are_apart(*words):
        return False
    if all(map(take_unit, wordy)):
        return "no words"
    if all(len(_words(x)) == 1 == len(TEXT.sub(r"\1", x).strip()) for x in (a, b)):
        return "no words"
    if "\\begin" in a + b:
        return None
    if words[0] == words[1]:
        shape = [[is_word for _, is_word in side] for side in parts]
        if shape[0] != shape[1]:
            return None
        return _all_same(same, *([p for p, is_word in side if not is_word] for side in parts))
    only_words = [len(side) == len(of) for side, of in zip(parts, words, strict=True)]
    if all(only_words):
        return _differing(*words)
    if any(only_words):
        k = only_words.index(True)
        return _word_and_number(words[k], (b, a)[k], is_given=k == 0)
    left_open = _LEFT_OPEN.fullmatch(a)
    if left_open and _NUMBER.fullmatch(plain(b)):
        is_number = any(w in _NUMERALS or _VAGUE.fullmatch(w) for w in words[0])
        return None if is_number or left_open[1] == plain(b) else False
    if is_wordy(a) and is_wordy(b):
        return None
    return "no words" if all(len(w) == 1 for x in (a, b) for w in _words(x)) else None


def _all_same(same: Callable[[str, str], Verdict], a: list[str], b: list[str]) -> Verdict:
    verdicts = [same(x, y) for x, y in zip(a, b, strict=True)]
    return False if False in verdicts else None if None in verdicts else True


def _differing(a: list[str], b: list[str]) -> Verdict:
    """Two answers in words that are not the same ones."""
    if max(len(a), len(b)) > 2 or sorted("".join(a)) == sorted("".join(b)):
        return None  # sentences; one name written otherwise
    if all(any(map(_NOTHING.fullmatch, words)) for words in (a, b)):
        return None
    more, less = (set(a), set(b)) if len(a) > len(b) else (set(b), set(a))
    if more > less and not any(map(_NOTHING.fullmatch, more)):  # isosceles, and isosceles triangle
        return None
    is_form = any(x[:_STEM] == y[:_STEM] for x in a for y in b if min(len(x), len(y)) > _STEM)
    return None if len(a) == len(b) == 1 and is_form else False


def _are_apart(a: list[str], b: list[str]) -> bool:
    """Whether the same is said, but for one word in which it cannot be the same."""
    differing = [pair for pair in zip(a, b, strict=False) if pair[0] != pair[1]]
    is_one = len(a) == len(b) and len(differing) == 1
    return is_one and any(set(differing[0]) <= group for group in _APART)


def _word_and_number(words: list[str], other: str, *, is_given: bool) -> Verdict:
    """A word, where the other side is no word. A gold in words alone may be a note ("proof")."""
    if not _NUMBER.fullmatch(plain(other)) or len(words) > 1:
        return None
    if words[0] in _NUMERALS:
        return plain(other).rstrip(".") == str(_NUMERALS[words[0]])
    return False if is_given and not _VAGUE.fullmatch(words[0]) else None


def _parts(text: str) -> list[tuple[str, bool]]:
    """Words and formulas in turn."""
    marked = TEXT.sub(lambda m: re.sub(r"[^\W\d_]+", lambda w: f"\x01{w[0]}\x02", m[1]), text)
    marked = re.sub(rf"(?<!\x01)(?:{WORD.pattern})", lambda w: f"\x01{w[0]}\x02", marked)
    parts = []
    for piece in re.split("(\x01[^\x02]*\x02)", marked):
        if piece.startswith("\x01"):
            word = piece[1:-1].lower()
            parts.append((word.removesuffix("s") if len(word) > 3 else word, True))
        elif trim(piece).strip(" -.,:;()"):
            parts.append((piece, False))
    return parts
