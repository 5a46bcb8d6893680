"""A task with long traces: repeated addition, and a teacher that rechecks some of its steps.

A problem is `57+6*4`. The teacher adds step by step, and states the answer after `####`:

    1:57+6=63;2:63+6=79?69;3:69+6=75;4:75+6=81;####81

Any step may have a slip (10 too many), and any step may be rechecked (`?`, and the right result),
slip or not. So a trace is right when every slip was caught, and a wrong one lacks a recheck where
it was needed.
"""

import random
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

ANSWER_MARK = "####"
# Two terms, their sum, and what a recheck made of it.
STEP = re.compile(r"(-?\d+)\+(\d+)=(-?\d+)(?:\?(-?\d+))?;")
SLIP = 10  # an invented carry; always the same, so that two of them never cancel

Progression = tuple[int, int, int]  # start, what is added, how often


@dataclass(frozen=True)
class Checker:
    """How often a step has a slip and how often it is rechecked, the one regardless of the other.
    Methods as those of redi/data/arithmetic.py's Solver."""

    slip: float
    recheck: float
    num_steps: tuple[int, int]
    marks: ClassVar[str] = "+*:=?;"

    def draw(self, rng: random.Random, *, easy: bool) -> Progression:
        shortest, longest = self.num_steps
        count = rng.randint(2 if easy else shortest, longest)
        return rng.randint(1, 99), rng.randint(2, 9), count

    def pose(self, problem: Progression) -> str:
        return "{}+{}*{}".format(*problem)

    def answer(self, problem: Progression) -> int:
        start, difference, count = problem
        return start + difference * count

    def clean(self, problem: Progression) -> str:
        return replace(self, slip=0.0, recheck=0.0).teach(problem, random.Random(0))

    def teach(self, problem: Progression, rng: random.Random) -> str:
        value, difference, count = problem
        text = ""
        for i in range(1, count + 1):
            right = value + difference
            value = right + SLIP * (rng.random() < self.slip)
            text += f"{i}:{right - difference}+{difference}={value}"
            if rng.random() < self.recheck:
                value = right
                text += f"?{value}"
            text += ";"
        return f"{text}{ANSWER_MARK}{value}"

    def habits(self, traces: Iterable[str]) -> dict[str, float]:
        """Shares of steps: `slips`, whose first result is not the sum of its terms, and `rechecks`;
        and of the slips, those that a recheck has `caught`."""
        steps = [step for trace in traces for step in STEP.findall(trace)]
        slips = [(sum(map(int, step[:2])), step) for step in steps]
        slips = [(right, step) for right, step in slips if right != int(step[2])]
        shares = {"slips": len(slips) / max(len(steps), 1)}
        shares["rechecks"] = sum(step[3] != "" for step in steps) / max(len(steps), 1)
        caught = sum(step[3] == str(right) for right, step in slips)
        return shares | ({"caught": caught / len(slips)} if slips else {})
