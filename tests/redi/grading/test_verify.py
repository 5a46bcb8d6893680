import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from redi.errors import RediError
from redi.grading import verify as verify_module
from redi.grading.judge import judge, quick_verdict
from redi.grading.verify import Verifier, extract_answer, verify


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"So \boxed{5}.", "5"),
        (r"\boxed{4}, no: \boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\fbox{7}", "7"),
        (r"\boxed{\left\{1, 2\right.}", r"\left\{1, 2\right."),  # \{ is no brace
        (r"\boxed{a\\}b}", r"a\\"),
        ("3+4=7;####14", "14"),
        ("#### 1\nthen\n#### 14 \n", "14"),
        ("4 eggs\nA: 18", "18"),
        ("4 eggs\n**Final answer:** $18", "$18"),
        (r"#### 3 and \boxed{4}", "4"),
        ("A: 18\nAnd so on", None),
        (r"cut off \boxed{12", None),
        ("####", None),
        ("####72", "72"),
        ("#### **72**", "72"),
        ("#### 72\nDone.", None),
        ("#### Step 1: Add\n2+2=4.", None),
        ("##### 72", None),  # a heading
        ("#### Final Answer: 4", "4"),
        ("**Final answer: 18**", "18"),
        ("a:b=2:3", None),  # a ratio
        ("So the ratio is\nA:B=2", None),
        ("So\nA: 1, B: 2", None),
        ("So\nA:18", "18"),
        ("A: 18", None),  # the whole text: a choice with its content?
        ("A: 1, B: 2", None),
        (r"maybe \boxed{4}, no: \boxed{5", None),
        (r"\boxed{4} #### \boxed{5", None),
        (r"\boxed{4} and \boxed{5}", "4, 5"),
        (r"\boxed{4}</think>So \boxed{5}", "5"),
        (r"\boxed{4}</think>It is 5.", None),
        ("<answer>5</answer>", "5"),
        ("It is 5.", None),
        ("", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize("text", ["Answer:" + " " * 3900 + "\nx", "A:" + " *" * 30_000 + ":"])
def test_no_text_takes_long_to_extract_from(text):
    start = time.process_time()
    extract_answer(text)
    assert time.process_time() - start < 0.1  # here no process is there to be killed


@pytest.mark.parametrize("answer", ["a:b=2:3", "a: b: c=3: 4: 5", "A: 1, B: 2", "A: 5"])
def test_an_expected_answer_keeps_its_letters(monkeypatch, answer):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert verify([rf"\boxed{{{answer}}}"], [answer]) == ["correct"]


@pytest.mark.parametrize("answer", [r"so \boxed{5}", "so\n#### 5", "Answer: 5", "so\nA: 5"])
def test_an_expected_answer_may_be_a_whole_solution(monkeypatch, answer):
    monkeypatch.setattr(subprocess, "Popen", None)
    assert verify([r"\boxed{5}", r"\boxed{6}"], [answer] * 2) == ["correct", "wrong"]


@pytest.mark.parametrize(
    ("given", "expected", "verdict"),
    [
        ("5", "5", "correct"),
        (r"\frac{1}{2}", r"\frac{1} {2}", "correct"),
        ("1,234.50", "1234.5", "correct"),
        ("$1,000.", "1000", "correct"),
        (r"\$5", "5", "correct"),
        ("+5", "5.000", "correct"),
        (".5", "0.5", "correct"),
        ("-5", "5", "wrong"),
        ("50%", r"50\%", "correct"),
        ("50%", "40%", "wrong"),
        ("50%", "50", None),
        ("50%", "0.5", None),
        ("1,23", "123", None),
        ("12,34", "1234", None),
        ("12, 345", "12345", None),
        ("1/2", "0.5", None),
        ("0.333333", "0.3333333", "correct"),
        ("0.3333334", "0.3333333", "wrong"),
        ("0.0000003", "0.00000031", "wrong"),
        ("3 5/8", "35/8", None),
        ("1e3", "1000", None),
        ("٣", "3", None),
        ("", "", None),
        (".", "0", None),
        ("9" * 41, "9", None),
    ],
)
def test_quick_verdict(given, expected, verdict):
    assert quick_verdict(given, expected) == verdict


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(["{}", "${}", "{}$", " {} "]))
def test_numbers_are_equal_however_they_are_written(number, form):
    written = f"{number:,}"
    assert quick_verdict(form.format(written), str(number)) == "correct"
    assert quick_verdict(written, str(number + Decimal("0.01"))) == "wrong"


@pytest.mark.parametrize("given", ["12", "-7", "1,234", "0.5", "3.25", "$15", "1000000", "007"])
@pytest.mark.parametrize("expected", ["12", "7", "1234", "0.50", "15.0", "1,000,000", "3"])
def test_quick_verdicts_are_math_verifys(given, expected):
    assert quick_verdict(given, expected) == judge(f"\\boxed{{{given}}}", expected)


def test_verify_with_math_verify():
    cases = [
        (r"\boxed{\frac12}", "0.5", "correct"),
        (r"\boxed{50\%}", "0.5", "correct"),
        (r"first \boxed{2} and \boxed{3}", "2,3", "correct"),
        (r"\boxed{x^2+2x+1}", "(x+1)^2", "correct"),
        (r"\boxed{\text{Monday}}", "Monday", "correct"),
        (r"\boxed{Tuesday}", "Monday", "wrong"),
        (r"\boxed{\frac13}", "$0.5$", "wrong"),
        ("It is 5", "5", "correct"),
        ("#### Step 1: Add\n2+2=4.\n\nThe answer is $4$.", "4", "correct"),
        ("#### Step 1: Add\n2+2=5.\n\nThe answer is $5$.", "4", "wrong"),
        ("#### Final Answer\n\n**4**", "4", "correct"),
        (r"<think>maybe \boxed{4}</think> The answer is \boxed{5", "4", "unparsable"),
        (r"<think>maybe \boxed{4}</think> The answer is \boxed{4", "4", "unparsable"),
        ("I give up.", "5", "unparsable"),
        ("", "5", "unparsable"),
        (r"\boxed{5}", "", "unparsable"),
        ("#### " + "5x" * 5000, "5", "unparsable"),
        ("x" * 100_000 + r"so \boxed{5}", "#### 5", "correct"),
    ]
    calls = []
    verdicts = verify(
        [text for text, _, _ in cases],
        [answer for _, answer, _ in cases],
        num_workers=2,
        progress=lambda done, total: calls.append((done, total)),
    )
    assert verdicts == [verdict for _, _, verdict in cases]
    assert calls[-1] == (len(cases), len(cases)) and calls == sorted(calls)


def test_no_process_when_no_algebra_is_needed(monkeypatch):
    monkeypatch.setattr(subprocess, "Popen", None)
    texts = [f"3+4=7;####{i % 30}" for i in range(20_000)]
    start = time.process_time()
    verdicts = verify(texts, ["14"] * len(texts))
    assert verdicts.count("correct") == sum(i % 30 == 14 for i in range(20_000))
    assert set(verdicts) == {"correct", "wrong"}
    assert time.process_time() - start < 2  # 0.1 s on a quiet machine


def test_expression_that_hangs_sympy_times_out():
    texts = [r"\boxed{9^{9^{9^9}}}", r"\boxed{\frac12}", r"\boxed{\frac13}"]
    start = time.monotonic()
    assert verify(texts, ["0.5"] * 3, timeout=1.0, num_workers=1) == ["timeout", "correct", "wrong"]
    assert time.monotonic() - start < 30


HOSTILE = """
import os, pathlib, runpy, sys
here = pathlib.Path(__file__).parent
serve = runpy.run_path({judge!r})["serve"]

def judge(text, answer):
    with open(here / "calls", "a") as calls:
        calls.write(answer + "\\n")
    if "hang" in answer:
        (here / "pid").write_text(str(os.getpid()))
        (here / "hanging").touch()
        pow(3, 10**10)  # inside C: no Python signal handler would run
    before = (here / "calls").read_text().splitlines().count(answer)
    if answer == "die twice" or (answer == "die once" and before == 1):
        os._exit(7)
    if "noise" in answer:
        print("correct")
        os.write(1, b"correct\\n" * 9)
    return "wrong"

serve(judge)
"""


@pytest.fixture
def hostile(tmp_path, monkeypatch):
    script = tmp_path / "hostile.py"
    script.write_text(HOSTILE.format(judge=str(verify_module.WORKER)))
    monkeypatch.setattr(verify_module, "WORKER", script)
    return tmp_path


@pytest.mark.parametrize("num_workers", [1, 3])
def test_bad_workers_lose_only_their_own_item(hostile, num_workers, monkeypatch):
    answers = ["a", "die once", "b", "hang", "die twice", "c", "noise", "d"]
    processes, start = [], verify_module._Worker.__init__

    def noted(worker, *args, **kwargs):
        start(worker, *args, **kwargs)
        processes.append(worker._process)

    monkeypatch.setattr(verify_module._Worker, "__init__", noted)
    with Verifier(num_workers=num_workers, timeout=1.0) as verifier:
        verdicts = verifier.verify(["x"] * len(answers), answers)
    assert dict(zip(answers, verdicts, strict=True)) == {
        "a": "wrong",
        "die once": "wrong",
        "b": "wrong",
        "hang": "timeout",
        "die twice": "unparsable",
        "c": "wrong",
        "noise": "wrong",
        "d": "wrong",
    }
    calls = (hostile / "calls").read_text().splitlines()
    assert [calls.count(a) for a in answers] == [2 if "die" in a else 1 for a in answers]
    assert all(process.returncode is not None for process in processes)
    # The hanging one was ended for its computing time, not by a clock that runs faster on a busy
    # machine.
    assert -signal.SIGPROF in {process.returncode for process in processes}


def test_the_same_question_is_asked_once(hostile):
    assert verify(["x", "x", "y", "x"], ["a", "a", "a", "b"], num_workers=1) == ["wrong"] * 4
    assert sorted((hostile / "calls").read_text().split()) == ["1", "a", "a", "b"]  # "1": the start


def test_workers_live_from_call_to_call(hostile):
    with Verifier(num_workers=1) as verifier:
        for answer in "abc":
            assert verifier.verify(["x"], [answer]) == ["wrong"]
        assert len(verifier._started) == 1


def test_a_worker_that_is_there_is_asked_before_another_is_started(hostile):
    with Verifier(num_workers=4) as verifier:
        for answer in "abc":
            assert verifier.verify(["x"], [answer]) == ["wrong"]
        assert len(verifier._started) == 1


def test_workers_start_together(hostile, monkeypatch):
    """All of them before the first is waited for, and no more than there are questions."""
    events, kind = [], verify_module._Worker

    def noted(name):
        method = getattr(kind, name)
        monkeypatch.setattr(
            kind, name, lambda *args, **how: events.append(name) or method(*args, **how)
        )

    noted("__init__")
    noted("wait_until_ready")
    with Verifier(num_workers=5) as verifier:
        assert verifier.verify(["x"] * 4, list("abcd")) == ["wrong"] * 4
        assert events[:4] == ["__init__"] * 4
        verifier.verify(["x"] * 8, list("efghijkl"))
    assert events.count("__init__") == 5


def test_dead_workers_leave_no_descriptors_open(hostile):
    counts = []
    with Verifier(num_workers=1) as verifier:
        for i in range(20):
            assert verifier.verify(["x"], [f"answer {i}"]) == ["wrong"]
            counts.append(sum(map(is_open, range(512))))
            verifier._started[-1].kill()
    assert set(counts) == {counts[0]}


def is_open(descriptor):
    try:
        return bool(os.fstat(descriptor))
    except OSError:
        return False


def test_worker_of_a_killed_parent_ends_by_itself(hostile):
    program = (
        "import sys; from pathlib import Path; from redi.grading import verify as v; "
        "v.WORKER = Path(sys.argv[1]); v.verify(['x'], ['hang'], timeout=1.0, num_workers=1)"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(hostile / "hostile.py")])
    until((hostile / "hanging").exists)
    worker = int((hostile / "pid").read_text())
    parent.kill()
    parent.wait()
    assert is_running(worker)
    until(lambda: not is_running(worker))


def is_running(pid):
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return False
    except FileNotFoundError:  # gone since, or no Linux
        return not Path("/proc").exists()
    return state != "Z"


def until(condition, seconds=30.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_worker_that_does_not_start_is_reported(hostile):
    (hostile / "hostile.py").write_text("raise ImportError('no sympy here')")
    with pytest.raises(RediError, match=r"(?s)did not start: .*no sympy here"):
        verify(["x"], ["a"])


def test_worker_that_cannot_be_trusted_does_not_start(hostile):
    script = hostile / "hostile.py"
    script.write_text(script.read_text().replace("serve(judge)", "serve(judge, lambda: 'no good')"))
    with pytest.raises(RediError, match="no good"):
        verify(["x"], ["a"])


def test_known_pairs_are_judged_when_a_worker_starts(tmp_path, monkeypatch):
    """A grader that gives another verdict on one of them does not start."""
    script = tmp_path / "judge.py"
    known = '("M/m", "m/M", "wrong")'
    rules = verify_module.WORKER.read_text()
    assert known in rules
    script.write_text(rules.replace(known, known.replace("wrong", "correct")))
    monkeypatch.setattr(verify_module, "WORKER", script)
    with pytest.raises(RediError, match="cannot be trusted with math-verify"):
        verify([r"\boxed{x}"], ["y"], num_workers=1)


def test_missing_math_verify_says_what_to_install(monkeypatch):
    monkeypatch.setattr(verify_module, "find_spec", lambda name: None)
    assert verify(["####5"], ["5"]) == ["correct"]
    with pytest.raises(RediError, match=r'pip install "reinforcement-distillation\[data\]"'):
        verify([r"\boxed{x}"], ["y"])
