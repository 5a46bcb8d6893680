"""The generated tasks: chains of one-digit sums, and teachers whose mistakes can be learned from.

A problem is `3+4-2+9`. The teacher works it out left to right and states the answer after `####`:

    step by step    3+4=7;7-2=5;5+9=14;####14
    by leaps        3+4-2=5;5+9=14;####14            two terms in one step

Two teachers of it differ in what separates their wrong traces from their right ones:

    habit   leaps four times out of five and errs far more often then, so that nearly all wrong
            traces show the habit, and most right ones too: a student of the right ones copies it
    slip    always goes step by step; a wrong trace is right but for one slip, carried on correctly

A third teacher, `check`, has problems of its own (redi/data/recheck.py).

`write_task` writes what a real job would read: raw generations without verdicts, held-out problems
with answers, and a tokenizer folder. The bytes depend on nothing but the TaskConfig.
"""

import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from redi.config import TaskConfig
from redi.data.recheck import ANSWER_MARK, Checker
from redi.errors import RediError

TASK_FILES = ("pretrain.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl", "tokenizer")
Term = tuple[str, int]  # ("+" or "-", digit); a chain's first term is a "+"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<q>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}<a>{{ message['content'] }}<e>"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<a>{% endif %}"
)


@dataclass(frozen=True)
class Solver:
    """How often a trace leaps, how often each way of working goes wrong, and on what problems."""

    leap_probability: float
    leap_error: float
    step_error: float
    num_terms: tuple[int, int]
    marks: ClassVar[str] = "+-=;"  # what its traces are written with, besides digits

    def draw(self, rng: random.Random, *, easy: bool) -> list[Term] | None:
        """A chain whose running total never falls below zero; None for one that does. Easy ones,
        which the student starts from, are also shorter than any problem."""
        chain = [("+", rng.randint(1, 9))]
        for _ in range(rng.randint(*((2, 7) if easy else self.num_terms)) - 1):
            chain.append((rng.choice("+-"), rng.randint(1, 9)))
        negative = min(total(chain[:i]) for i in range(1, len(chain) + 1)) < 0
        return None if negative else chain

    def pose(self, chain: list[Term]) -> str:
        return render(chain)

    def answer(self, chain: list[Term]) -> int:
        return total(chain)

    def clean(self, chain: list[Term]) -> str:
        """Step by step and without mistakes."""
        return work(chain, 1)

    def teach(self, chain: list[Term], rng: random.Random) -> str:
        """One trace of the teacher, right or wrong."""
        leaps = rng.random() < self.leap_probability
        errs = rng.random() < (self.leap_error if leaps else self.step_error)
        return work(chain, 2 if leaps else 1, rng if errs else None)

    def habits(self, traces: Iterable[str]) -> dict[str, float]:
        """`leaps`: share of traces with a step of more than one term; `slips`: of steps whose
        result is not that of their terms."""
        traces = list(traces)
        steps = [step for trace in traces for step in STEP.findall(trace)]
        slips = sum(sum(map(int, TERM.findall(left))) != int(result) for left, result in steps)
        return {
            "leaps": sum(map(is_leap, traces)) / max(len(traces), 1),
            "slips": slips / max(len(steps), 1),
        }


TEACHERS: dict[str, Any] = {
    "habit": Solver(leap_probability=0.80, leap_error=0.40, step_error=0.05, num_terms=(4, 7)),
    "slip": Solver(leap_probability=0.0, leap_error=0.0, step_error=0.40, num_terms=(3, 7)),
    "check": Checker(slip=0.20, recheck=0.60, num_steps=(9, 14)),
}
STEP = re.compile(r"([-+\d]+)=(-?\d+);")  # terms, result
TERM = re.compile(r"[-+]?\d+")


def write_task(config: TaskConfig, output_dir: str | os.PathLike) -> None:
    """Writes the task to `output_dir`, which appears complete or not at all.

    pretrain.jsonl     prompt, completion (one-message lists): clean sums, step by step
    train.jsonl        prompt, answer, generations (config.num_generations teacher traces)
    validation.jsonl   prompt, answer
    test.jsonl         prompt, answer
    tokenizer/         for AutoTokenizer: one token per character, chat template included
    task.json          the config

    No problem of the validation and test files occurs in any other file. The same config gives the
    same bytes. Nothing happens if the folder holds this task already.
    Raises RediError if the folder holds something else.
    """
    target = Path(output_dir)
    described = config.model_dump_json(indent=2) + "\n"
    if target.exists():
        if _read(target / "task.json") == described:
            return
        raise RediError(
            f"{target}: exists, but does not hold this task; remove it or choose another output_dir"
        )
    aside = target.with_name(f"{target.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)  # what an interrupted run left
    aside.mkdir(parents=True)
    for name, rows in _files(config).items():
        with open(aside / name, "w", encoding="utf-8", newline="\n") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    write_tokenizer(aside / "tokenizer", TEACHERS[config.teacher].marks)
    (aside / "task.json").write_text(described, encoding="utf-8")
    os.replace(aside, target)


def _read(file: Path) -> str | None:
    return file.read_text(encoding="utf-8") if file.is_file() else None


def _files(config: TaskConfig) -> dict[str, Iterable[dict]]:
    teacher = TEACHERS[config.teacher]
    held_out: set[str] = set()
    seed = config.seed
    test = list(_problems(f"{seed}/test", config.num_test, teacher, held_out))
    held_out |= {teacher.pose(problem) for problem in test}
    validation = list(_problems(f"{seed}/validation", config.num_validation, teacher, held_out))
    held_out |= {teacher.pose(problem) for problem in validation}
    train = _problems(f"{seed}/train", config.num_problems, teacher, held_out)
    pretrain = _problems(f"{seed}/pretrain", config.num_pretrain, teacher, held_out, easy=True)
    rng = random.Random(f"{seed}/teacher")

    def posed(problem: Any) -> dict[str, str]:
        return {"prompt": teacher.pose(problem), "answer": str(teacher.answer(problem))}

    return {
        "pretrain.jsonl": (
            {
                "prompt": [{"role": "user", "content": teacher.pose(problem)}],
                "completion": [{"role": "assistant", "content": teacher.clean(problem)}],
            }
            for problem in pretrain
        ),
        "train.jsonl": (
            {
                **posed(problem),
                "generations": [teacher.teach(problem, rng) for _ in range(config.num_generations)],
            }
            for problem in train
        ),
        "validation.jsonl": map(posed, validation),
        "test.jsonl": map(posed, test),
    }


def _problems(
    seed: str, count: int, teacher: Any, held_out: set[str], *, easy: bool = False
) -> Iterator[Any]:
    """`count` different problems outside `held_out`."""
    rng = random.Random(seed)
    seen = set(held_out)
    refused = 0
    while count:
        problem = teacher.draw(rng, easy=easy)
        text = "" if problem is None else teacher.pose(problem)
        if problem is None or text in seen:
            refused += 1
            if refused > 10_000_000:
                raise RediError("task: there are not that many different problems; ask for fewer")
            continue
        seen.add(text)
        count -= 1
        yield problem


def render(chain: Iterable[Term]) -> str:
    """`[("+", 3), ("-", 2)]` -> `3-2`."""
    return "".join(f"{sign}{digit}" for sign, digit in chain).removeprefix("+")


def total(chain: Iterable[Term]) -> int:
    return sum(digit if sign == "+" else -digit for sign, digit in chain)


def work(chain: list[Term], terms_per_step: int, slip: random.Random | None = None) -> str:
    """The chain worked out, `terms_per_step` at a time; with `slip`, one step's result is wrong.

    A wrong result is carried on correctly, so the answer is wrong too.
    """
    groups = [chain[i : i + terms_per_step] for i in range(1, len(chain), terms_per_step)]
    wrong = slip.randrange(len(groups)) if slip else None
    value = total(chain[:1])
    text = ""
    for i, group in enumerate(groups):
        result = value + total(group)
        if slip and i == wrong:
            result += _mistake(group, slip)
        text += f"{value}{''.join(f'{sign}{digit}' for sign, digit in group)}={result};"
        value = result
    return f"{text}{ANSWER_MARK}{value}"


def _mistake(group: list[Term], rng: random.Random) -> int:
    """What a realistic mistake adds to the result of `group`: never 0."""
    sign, digit = rng.choice(group)
    signed = digit if sign == "+" else -digit
    kind = rng.random()
    if kind < 0.3:  # added for subtracted, or the other way round
        return -2 * signed
    if kind < 0.6:  # a number fact
        return rng.choice((-2, -1, 1, 2))
    if kind < 0.8:  # a lost or invented carry
        return rng.choice((-10, 10))
    misread = rng.choice([other for other in range(1, 10) if other != digit])
    return misread - digit if sign == "+" else digit - misread


def is_leap(trace: str) -> bool:
    """Whether some step of `trace` takes more than one term."""
    steps = trace.split(ANSWER_MARK)[0].split(";")
    lefts = (step.split("=")[0].lstrip("-") for step in steps)
    return any(left.count("+") + left.count("-") > 1 for left in lefts)


def write_tokenizer(folder: str | os.PathLike, marks: str = Solver.marks) -> None:
    """A tokenizer folder with one token per digit and mark, `####` being one too.

    Chat template: a user's turn is `<q>problem`, an assistant's `<a>trace<e>`; `<e>` ends a turn.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<unk>", "<q>", "<a>", "<e>"]
    vocabulary = {token: i for i, token in enumerate([*specials, *"0123456789", *marks])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    # Not special: a decoded answer has to keep it.
    tokenizer.add_tokens([AddedToken(ANSWER_MARK, special=False, normalized=False)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<e>",
        additional_special_tokens=["<q>", "<a>"],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(str(folder))
