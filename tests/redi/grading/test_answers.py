"""The grader against answers.tsv, whose verdicts were not taken from it, and against sabotage."""

import re
import time
from pathlib import Path

import pytest

from redi.grading import rllm
from redi.grading.judge import judge
from redi.grading.notation import align, rewrite
from redi.grading.rllm import final_answer
from redi.grading.rllm import judge as rllm_judge
from redi.grading.verify import verify

TABLE = Path(__file__).with_name("answers.tsv")
_, *ROWS = [
    line.split("\t")
    for line in TABLE.read_text(encoding="utf-8").splitlines()
    if not line.startswith("#")
]


def boxed(given):
    return given if re.search(r"\\(?:boxed|fbox)", given) else rf"\boxed{{{given}}}"


def test_the_table_is_what_it_says():
    assert len(ROWS) >= 1500
    assert {len(row) for row in ROWS} == {5}
    assert {row[3] for row in ROWS} == {"correct", "wrong", "unparsable"}
    assert len({(expected, given) for _, expected, given, *_ in ROWS}) == len(ROWS)
    assert sum(row[4] == "unread" for row in ROWS) <= 50


# Every second row at once, the others with the slow tests: a minute of algebra each.
PARTS = [pytest.param(k, marks=[pytest.mark.slow] * (k % 2)) for k in range(12)]


@pytest.mark.parametrize("part", PARTS)
def test_every_verdict_of_the_table(part):
    """What is marked `unread` is called unparsable, whatever it is; all else gets its verdict."""
    rows = ROWS[part::12]
    texts, answers = [boxed(row[2]) for row in rows], [row[1] for row in rows]
    verdicts = verify(texts, answers, num_workers=1, timeout=30)
    right = ["unparsable" if row[4] == "unread" else row[3] for row in rows]
    differing = [(row, v) for row, v, r in zip(rows, verdicts, right, strict=True) if v != r]
    assert differing == []


WHOLE = [  # expected, the text, the verdict
    ("4", "<think>\\boxed{4}</think> The answer is \\boxed{5}.", "wrong"),
    ("4", "<think>#### 5</think>\n#### 4", "correct"),
    ("4", "<think>x</think>\n<answer>\\boxed{4}</answer>", "correct"),
    ("4", "Okay \\boxed{5}</think>\\boxed{4}", "correct"),
    ("-4", "Hence the answer is -4.", "correct"),
    ("7", "Therefore the answer is +7", "correct"),
    ("7", "\u7b54\u6848\u662f7\u3002", "correct"),  # Chinese: the answer is 7
    ("12", "Final Answer: $12$ apples", "correct"),
    ("1200", "The total is $1,200.", "correct"),
    ("18", "The answer is 81 eggs.", "wrong"),
    ("18", "I do not know.", "unparsable"),
    ("70", "so the sum is <boxed{70}\\).</answer>", "unparsable"),
    ("5", "I first thought \\boxed{2}, but it is \\boxed{5}.", "correct"),
    ("5", "\\boxed{5}\n\nActually \\boxed{6}", "wrong"),
    ("5", "The answer is \\boxed{5}. \\boxed{}", "correct"),
    ("50", "10+John's age\nA: 10+John's age", "wrong"),
    ("10", "So\nA: 10+years", "unparsable"),
    ("7", r"<think>so \boxed{7}</think> Answer: 8", "wrong"),
    ("7", "<think>so \\boxed{8}? no</think>\nAnswer: 7", "correct"),
    ("7", "<think>so \\boxed{8}? no</think>\nThe answer is $7$.", "correct"),
    ("7", "<think>answer in \\boxed{}</think>\nThe answer is 7.", "correct"),
    ("7", r"[THINK]so \boxed{7}[/THINK]It is \boxed{8}", "wrong"),
    ("7", r"<seed:think>so \boxed{7}</seed:think>It is \boxed{8}", "wrong"),
    ("7", r"<think>so \boxed{7}", "unparsable"),  # the answer never came
    ("7", "The answer is $7$. $\\boxed{\\text{answer}}$", "correct"),
    (r"\boxed{4} and \boxed{9}", r"\boxed{9}", "wrong"),
    (r"\boxed{4} and \boxed{9}", r"\boxed{9} and \boxed{4}", "correct"),
    (r"\boxed{1}\boxed{4}", r"\boxed{1, 4}", "correct"),
    (r"x=\boxed{1} or x=\boxed{4}", r"\boxed{4, 1}", "correct"),
    ("9", r"So \boxed{4} and \boxed{9}.", "wrong"),
    ("9", r"First \boxed{4}. Then \boxed{9}.", "correct"),
    ("9", r"\boxed{4} is wrong, it is \boxed{9}", "correct"),
    ("9", "\\boxed{9}\n\nFinal answer: \\boxed{9}", "correct"),
    ("4, 9", r"(a) \boxed{4} (b) \boxed{9}", "correct"),
    ("9", "<answer> 9 </answer>", "correct"),
    ("9", "<answer> 8 </answer>", "wrong"),
    ("9", "The total is 9 apples", "correct"),
    ("9", "So we get $x = 9$.", "correct"),
    ("9", "So we get $x = 8$.", "wrong"),
    (r"n \equiv 1 \pmod 3", r"So $n \equiv 1 \pmod 4$.", "wrong"),
    ("9", "She still has 9 to pay in 12 months.", "unparsable"),  # 12 was no answer
    (r"\frac{3}{4}", r"The final answer is $\frac{3}{4}$. I hope it is correct.", "correct"),
    (r"\frac{3}{4}", r"Therefore, the probability is $\frac{1}{4}$.", "wrong"),
]


def test_what_a_whole_text_answers():
    verdicts = verify([t for _, t, _ in WHOLE], [e for e, *_ in WHOLE], num_workers=1, timeout=30)
    assert [(*row, v) for row, v in zip(WHOLE, verdicts, strict=True) if row[2] != v] == []


@pytest.mark.parametrize("kind", ["expression", "equation", "inequality"])
def test_what_cannot_be_read_whole_tells_nothing(kind):
    """An unread formula is compared as text, whatever numbers stand in it."""
    form = {
        "expression": r"\sum_{d \mid n} {n}^d",
        "equation": r"\oiint_S {n} = \Phi",
        "inequality": r"\sum_{d \mid n} {n}^d < 5",
    }[kind]
    a, b = (form.replace("{n}", str(number)) for number in (2, 3))
    assert judge(boxed(a), a) == "correct"
    assert judge(boxed(a), b) == judge(boxed(b), a) == "unparsable"


def test_an_unread_letter_case_or_unit_is_never_passed_over():
    """Every pair of answers that differ in a letter's case, or a unit's power, is told apart."""
    for form in (r"\frac{@}{m}", "@+1", r"\sqrt{@}", "@ v^2", "3 @_1"):
        assert judge(boxed(form.replace("@", "M")), form.replace("@", "m")) == "wrong"
    for unit in ("m", "yd", "acre", "furlong", "unit"):
        squares, cubes = (rf"5 \text{{ {unit}}}^{power}" for power in (2, 3))
        assert judge(boxed(squares), squares) == "correct"
        assert judge(boxed(squares), cubes) == "wrong"


def test_another_grammar_is_found_out_when_a_worker_starts(monkeypatch):
    """A math-verify that fails on everything would call every right answer unparsable."""
    from latex2sympy2_extended import latex2sympy2

    from redi.grading import formula
    from redi.grading.judge import check

    assert check() == ""
    formula.read.cache_clear()

    def broken(*_, **__):
        raise TypeError("latex2sympy() got an unexpected keyword argument")

    monkeypatch.setattr(latex2sympy2, "latex2sympy", broken)
    fault = check()
    formula.read.cache_clear()
    assert (
        "math-verify" in fault and "unparsable" in fault and "reinforcement-distillation" in fault
    )


@pytest.mark.parametrize(
    "text",
    [
        r"a\ge " * 700 + "<",
        "1a" + " " * 3900 + "!",
        "1" * 3900 + "x",
        "a" + " " * 3900 + "b",
        "(A)" + "," * 3900 + "(B",
        "(A) and" + " " * 3900,
        r"(A)\quad" * 500,
    ],
)
@pytest.mark.parametrize("expected", ["A", "5 m", "a > b > c"])
def test_notation_takes_no_long(text, expected):
    start = time.process_time()
    align(rewrite(text), rewrite(expected))
    assert time.process_time() - start < 0.2


@pytest.mark.parametrize("shown", ["The value is ${}$.", "First $x=3$, then\n\n$${}$$", "{}"])
def test_what_stands_before_the_box_does_not_matter(shown):
    for given, verdict in ((r"\frac{14}{3}", "correct"), (r"4\frac{1}{3}", "wrong")):
        assert judge(shown.format(boxed(given)), r"4\frac{2}{3}") == verdict


def test_a_percent_sign_before_the_box_makes_nothing_lenient():
    text = r"So 50% of them: \boxed{6.626 \times 10^{-33}}"
    assert judge(text, r"6.626 \times 10^{-34}") == "wrong"


HOSTILE = {
    "tower": r"\boxed{9^{9^{9^9}}}",
    "factorials": r"\boxed{((10!)!)!}",
    "huge power": r"\boxed{7^{123456789012}}",
    "huge exponent": r"\boxed{1e999999999}",
    "long sum": r"\boxed{\sum_{k=1}^{10^{10}} \frac{1}{k^k}}",
    "integral": r"\boxed{\int_0^1 e^{\sin(x^x)} \log(1+\tan x^{x})\,dx}",
    "open braces": r"\boxed{" + "{" * 3000 + "5" + "}" * 3000 + "}",
    "parentheses": r"\boxed{" + "(" * 1500 + "5" + ")" * 1500 + "}",
    "nested fractions": r"\boxed{" + r"\frac{1}{1+" * 200 + "1" + "}" * 200 + "}",
    "unclosed boxes": r"\boxed{" * 5000,
    "many boxes": r"\boxed{6} and " * 3000,
    "long number": r"\boxed{" + "9" * 100_000 + "}",
    "digits": r"\boxed{0.\overline{" + "9" * 3900 + "8}}",
    "dollars": "$" * 8000 + "4",
    "answers": "the answer is " * 2000 + "6",
    "commas": r"\boxed{" + "1," * 1900 + "1}",
    "spaces": r"\boxed{1" + " " * 3900 + "2}",
    "falling": r"\boxed{" + "a > " * 900 + "b}",
    "units": r"\boxed{" + "1 m " * 900 + "}",
    "surrogate": "\\boxed{\ud800}",
    "nul": "\\boxed{\x00\x01}",
    "right to left": "\\boxed{\u202e5\u202c6}",
    "code": r"\boxed{__import__('os').system('touch /tmp/owned')}",
    "matrix": r"\boxed{" + r"\begin{pmatrix}" * 200 + "}",
    "relations": r"\boxed{x^9+x^7y^5+z^{11}=\sin x^y, x^8-y^9=z^7, x+y+z=xyz}",
}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(list(HOSTILE), marks=pytest.mark.slow),
        ["tower", "open braces", "many boxes", "digits", "answers", "surrogate", "code"],
    ],
)
def test_hostile_texts_end_and_are_not_correct(names):
    start = time.monotonic()
    texts = [HOSTILE[name] for name in names]
    verdicts = verify(texts, ["5"] * len(names), timeout=1.0, num_workers=2)
    assert {k: v for k, v in zip(names, verdicts, strict=True) if v == "correct"} == {}
    assert time.monotonic() - start < 90
    assert not Path("/tmp/owned").exists()


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"a</think>so \boxed{4}", "4"),
        (r"\boxed{3}</think>so \boxed{4}", "4"),
        (r"</think>\boxed{4}</think>\boxed{5}", "4"),
        (r"\boxed{4}", None),
        (r"\boxed{4}</think>It is 4.", None),
        ("</think>#### 4", None),
        (r"</think>\boxed{4} or \boxed{5", None),
        ("</think>\\boxed 5\n#### 4", None),
    ],
)
def test_rllm_reads_a_box_after_the_thinking(text, answer):
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("expected", "given", "verdict"),
    [
        (r"\frac{1}{2}", r"\dfrac12", "correct"),
        ("045", "033", "wrong"),
        ("045", "45.0", "correct"),
        (r"\frac{1}{2}", "1/2", "correct"),
        (r"\frac{1}{2}", "0.5", "correct"),
        (r"\frac{1}{2}", "2/4", "wrong"),  # not reduced
        ("5", "2+3", "wrong"),  # not worked out
        ("5", "x=5", "correct"),
        ("5", r"5\text{ cm}", "correct"),
        ("50", r"50\%", "correct"),
        ("1000", "1,000", "correct"),
        (r"2\sqrt{3}", r"\sqrt{12}", "correct"),
        (r"\sqrt{2}", "1.414", "wrong"),
        ("(1,2)", "(1, 2)", "correct"),
        ("(1,2)", "(2,1)", "wrong"),
        ("[1,2)", "(1,2)", "wrong"),
        ("(x+1)^2", "x^2+2x+1", "correct"),
        ("x^{10}", "x^5x^5", "wrong"),  # powers of two digits are not worked out
        (r"\text{Monday}", "Monday", "correct"),
    ],
)
def test_rllms_rule(expected, given, verdict):
    assert rllm_judge(given, expected) == verdict


def test_rllm_through_the_workers():
    texts = [r"</think>\boxed{\sqrt{12}}", r"\boxed{\sqrt{12}}", r"</think>\boxed{\sqrt{3}}"]
    verdicts = verify(texts, [r"2\sqrt{3}"] * 3, num_workers=1, timeout=30, grader="rllm")
    assert verdicts == ["correct", "unparsable", "wrong"]


def test_an_answer_runs_no_code():
    """sympy's parse_expr evaluates what it is given, and Python reads full-width letters as plain
    ones, so that counting letters is no guard."""
    reached = []

    class Probe:
        def __init__(self):
            reached.append(self)

    def wide(name):
        return "".join(chr(0xFEE0 + ord(letter)) for letter in name)

    classes = f"().__{wide('class')}__.__{wide('base')}__.__{wide('subclasses')}__()"
    attack = f"[*{classes}][{object.__subclasses__().index(Probe)}]()"
    assert isinstance(eval(attack), Probe) and reached
    reached.clear()
    assert rllm_judge(attack, "1/2") == "wrong" and not reached
    for part in (f"(2).__{wide('class')}__", "(2).real", "2..real", "[2]", "'a'", "a:b", "@", "é"):
        assert not rllm._ALGEBRA.fullmatch(part), part
    assert rllm_judge("x_1^2+.5", "0.5+x_1^2") == "correct"
