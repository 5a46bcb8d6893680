import json
import random
from pathlib import Path

import pytest

from redi.config import TaskConfig
from redi.data import arithmetic
from redi.data.arithmetic import is_leap, write_task
from redi.errors import RediError

SMALL = dict(num_problems=400, num_pretrain=300, num_validation=60, num_test=80)
FILES = ["pretrain.jsonl", "train.jsonl", "validation.jsonl", "test.jsonl"]


def rows(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


def problem_of(row: dict) -> str:
    return row["prompt"] if isinstance(row["prompt"], str) else row["prompt"][0]["content"]


def answer_of(trace: str) -> str:
    return trace.split("####")[1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """All tasks, small."""
    written = {}
    for teacher in ("habit", "slip", "check"):
        written[teacher] = tmp_path_factory.mktemp("task") / teacher
        write_task(TaskConfig(teacher=teacher, **SMALL), written[teacher])
    return written


def test_same_config_same_bytes_and_another_seed_other_problems(
    folders: dict[str, Path], tmp_path: Path
) -> None:
    write_task(TaskConfig(**SMALL), tmp_path / "again")
    write_task(TaskConfig(**SMALL, seed=1), tmp_path / "seed1")
    first, again, other = map(content, (folders["habit"], tmp_path / "again", tmp_path / "seed1"))
    assert first == again
    assert (
        set(first)
        == set(other)
        == {*FILES, "task.json"}
        | {
            f"tokenizer/{name}"
            for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
        }
    )
    assert all(first[name] != other[name] for name in FILES)


@pytest.mark.parametrize("teacher", ["habit", "slip", "check"])
def test_splits_hold_the_asked_number_of_different_problems(
    folders: dict[str, Path], teacher: str
) -> None:
    problems = {name: [problem_of(r) for r in rows(folders[teacher], name)] for name in FILES}
    assert [len(problems[name]) for name in FILES] == [300, 400, 60, 80]
    assert all(len(set(texts)) == len(texts) for texts in problems.values())
    train, pretrain = set(problems["train.jsonl"]), set(problems["pretrain.jsonl"])
    validation, test = set(problems["validation.jsonl"]), set(problems["test.jsonl"])
    assert not (validation & test) and not ((validation | test) & (train | pretrain))


@pytest.mark.parametrize("teacher", ["habit", "slip", "check"])
def test_answers_are_the_value_of_the_sum(folders: dict[str, Path], teacher: str) -> None:
    for name in ("train.jsonl", "validation.jsonl", "test.jsonl"):
        for row in rows(folders[teacher], name):
            assert int(row["answer"]) == eval(row["prompt"])
    for row in rows(folders[teacher], "pretrain.jsonl"):
        trace = row["completion"][0]["content"]
        assert int(answer_of(trace)) == eval(problem_of(row)) and not is_leap(trace)


@pytest.mark.parametrize("teacher", ["habit", "slip"])
def test_a_wrong_trace_has_exactly_one_wrong_step(folders: dict[str, Path], teacher: str) -> None:
    for row in rows(folders[teacher], "train.jsonl"):
        for trace in row["generations"]:
            *steps, _ = trace.split(";")
            lefts, results = zip(*(step.split("=") for step in steps), strict=True)
            wrong = sum(
                eval(left) != int(result) for left, result in zip(lefts, results, strict=True)
            )
            assert wrong == (answer_of(trace) != row["answer"])
            assert answer_of(trace) == results[-1]
            # Each step starts from the last result, and the steps together use up the problem.
            assert all(left.startswith(r) for left, r in zip(lefts[1:], results, strict=False))
            terms = [left.removeprefix(r) for left, r in zip(lefts[1:], results, strict=False)]
            assert lefts[0] + "".join(terms) == row["prompt"]


def test_habit_shows_in_nearly_all_wrong_traces_and_in_most_right_ones(
    tmp_path: Path,
) -> None:
    write_task(TaskConfig(**{**SMALL, "num_problems": 3000}), tmp_path / "t")
    right, wrong, pairs = [], [], 0
    for row in rows(tmp_path / "t", "train.jsonl"):
        verdicts = [answer_of(trace) == row["answer"] for trace in row["generations"]]
        pairs += len(set(verdicts)) == 2
        for trace, is_right in zip(row["generations"], verdicts, strict=True):
            (right if is_right else wrong).append(is_leap(trace))
    # .8 * .6 / .67 = .716; .8 * .4 / .33 = .970; 1 - .67**8 = .959 of the problems have both
    assert sum(right) / len(right) == pytest.approx(0.716, abs=0.02)
    assert sum(wrong) / len(wrong) == pytest.approx(0.970, abs=0.01)
    assert len(wrong) / (len(right) + len(wrong)) == pytest.approx(0.330, abs=0.015)
    assert pairs / 3000 == pytest.approx(0.959, abs=0.015)


def test_slip_teacher_never_leaps(folders: dict[str, Path]) -> None:
    traces = [(r, t) for r in rows(folders["slip"], "train.jsonl") for t in r["generations"]]
    assert not any(is_leap(trace) for _, trace in traces)
    wrong = sum(answer_of(trace) != row["answer"] for row, trace in traces)
    assert wrong / len(traces) == pytest.approx(0.40, abs=0.03)


def test_check_traces_are_right_when_every_slip_was_caught(folders: dict[str, Path]) -> None:
    """Read here with plain string methods: the product's own patterns are not used."""
    slips = steps = rechecks = caught = wrong_traces = 0
    for row in rows(folders["check"], "train.jsonl"):
        start, rest = row["prompt"].split("+")
        difference, count = map(int, rest.split("*"))
        for trace in row["generations"]:
            value, missed = int(start), 0
            *body, answer = trace.split(";")
            for i, step in enumerate(body, 1):
                assert step.startswith(f"{i}:{value}+{difference}=")
                first, *again = step.split("=")[1].split("?")
                right = value + difference
                assert again in ([], [str(right)])
                slips, rechecks, steps = (
                    slips + (int(first) != right),
                    rechecks + len(again),
                    steps + 1,
                )
                caught += int(first) != right and bool(again)
                missed += int(first) != right and not again
                value = int(again[0] if again else first)
            assert len(body) == count and answer == f"####{value}"
            wrong_traces += answer_of(trace) != row["answer"]
            assert (missed == 0) == (answer_of(trace) == row["answer"])
    assert slips / steps == pytest.approx(0.20, abs=0.01)
    assert rechecks / steps == pytest.approx(0.60, abs=0.01)
    # The same share of the slips: rechecks know nothing of them.
    assert caught / slips == pytest.approx(0.60, abs=0.03)
    traces = [t for row in rows(folders["check"], "train.jsonl") for t in row["generations"]]
    measured = arithmetic.TEACHERS["check"].habits(traces)
    expected = {"slips": slips / steps, "rechecks": rechecks / steps, "caught": caught / slips}
    assert measured == pytest.approx(expected)
    assert 100 < sum(map(len, traces)) / len(traces) < 300


def test_habits_of_sums() -> None:
    traces = ["3+4=7;7-2=5;####5", "3+4-2=6;####6"]
    assert arithmetic.TEACHERS["slip"].habits(traces) == {
        "leaps": 0.5,
        "slips": pytest.approx(1 / 3),
    }
    assert arithmetic.TEACHERS["slip"].habits(["", "x"]) == {"leaps": 0.0, "slips": 0.0}


def test_is_leap() -> None:
    assert is_leap("3+4-2=5;####5") and is_leap("3+4=7;-7-2-1=4;####4")
    assert not is_leap("3-5=-2;-2+4=2;####2") and not is_leap("")


def test_tokenizer_round_trips_every_trace(folders: dict[str, Path]) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folders["habit"] / "tokenizer")
    trace = "3+4-2=5;5+9=14;####14"
    user = [{"role": "user", "content": "3+4-2+9"}]
    prompt = tokenizer.apply_chat_template(user, tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template(
        [*user, {"role": "assistant", "content": trace}], tokenize=False
    )
    assert prompt == "<q>3+4-2+9<a>" and whole == f"{prompt}{trace}<e>"
    ids = tokenizer(whole, add_special_tokens=False).input_ids
    assert len(ids) == len("q3+4-2+9a") + len(trace) - 3 + 1  # #### and <e> are one token each
    assert tokenizer.unk_token_id not in ids and ids[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(ids) == whole
    assert tokenizer.decode(ids[9:], skip_special_tokens=True) == trace
    for row in rows(folders["slip"], "train.jsonl"):
        for text in row["generations"]:
            assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_a_second_call_changes_nothing(folders: dict[str, Path], tmp_path: Path) -> None:
    write_task(TaskConfig(**SMALL), tmp_path / "t")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "t").rglob("*")}
    write_task(TaskConfig(**SMALL), tmp_path / "t")
    assert before == {f: f.stat().st_mtime_ns for f in (tmp_path / "t").rglob("*")}


def test_a_folder_with_something_else_is_refused(tmp_path: Path) -> None:
    write_task(TaskConfig(**SMALL), tmp_path / "t")
    with pytest.raises(RediError, match="remove it or choose another"):
        write_task(TaskConfig(**SMALL, seed=5), tmp_path / "t")
    assert '"seed": 0' in (tmp_path / "t" / "task.json").read_text()


def test_interrupted_writing_leaves_nothing_and_the_next_call_succeeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(folder: Path, marks: str) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(arithmetic, "write_tokenizer", fails)
        with pytest.raises(KeyboardInterrupt):
            write_task(TaskConfig(**SMALL), tmp_path / "t")
    assert not (tmp_path / "t").exists()
    write_task(TaskConfig(**SMALL), tmp_path / "t")
    assert [p.name for p in tmp_path.iterdir()] == ["t"]


def test_mistakes_are_never_harmless() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        chain = [("+", rng.randint(1, 9))] + [(rng.choice("+-"), rng.randint(1, 9))] * 3
        trace = arithmetic.work(chain, rng.choice((1, 2)), rng)
        assert int(answer_of(trace)) != arithmetic.total(chain)
