"""Grading texts against their answers, with math-verify in worker processes that can be killed.

sympy can hang inside C code or eat memory, where no signal handler and no thread helps; a process
that computes for too long is killed and replaced, and its item becomes "timeout". A worker that
dies loses only its own item, which is tried once more. Items that need no algebra are decided here,
at once; if all are, no process starts.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from queue import Empty, LifoQueue
from typing import get_args

from redi.errors import RediError, VerifierFailed
from redi.grading.judge import (
    MAX_CHARS,
    RULES,
    Grader,
    Verdict,
    excerpt,
    extract_answer,
    quick_verdict,
)
from redi.grading.rllm import final_answer

__all__ = ["Verdict", "Verifier", "extract_answer", "grading_rules", "verify"]

WORKER = Path(__file__).with_name("judge.py")
_PATIENCE = 10  # a worker may wait this many times its computing time for a core
_START_TIMEOUT = 120.0  # seconds for a worker to import sympy on a busy machine

Progress = Callable[[int, int], None]  # (items done, items in all)


def verify(
    texts: Sequence[str],
    answers: Sequence[str],
    *,
    num_workers: int | None = None,
    timeout: float = 5.0,
    grader: Grader = "math_verify",
    progress: Progress | None = None,
) -> list[Verdict]:
    """The verdict on each text: does the answer it ends with equal `answers[i]`?

    "unparsable" (one side holds no answer that can be read) and "timeout" (more than `timeout`
    seconds of computing) are neither right nor wrong. `num_workers` defaults to the number of CPU
    cores. Raises RediError if algebra is needed and math-verify is not installed.
    """
    with Verifier(num_workers=num_workers, timeout=timeout, grader=grader) as verifier:
        return verifier.verify(texts, answers, progress)


class Verifier:
    """`verify` with workers that live from call to call; use it as a context manager."""

    def __init__(
        self,
        *,
        num_workers: int | None = None,
        timeout: float = 5.0,
        grader: Grader = "math_verify",
    ) -> None:
        self.num_workers = num_workers or num_cores()
        self.timeout = timeout
        self.grader = grader
        # Last in, first out: a worker that is there is asked before another one is started (None).
        self._slots: LifoQueue[_Worker | None] = LifoQueue()
        for _ in range(self.num_workers):
            self._slots.put(None)
        self._started: list[_Worker] = []
        self._pool = ThreadPoolExecutor(self.num_workers)  # a thread per worker waits for it
        self._is_closed = False

    def __enter__(self) -> "Verifier":
        return self

    def __exit__(self, *_: object) -> None:
        self._is_closed = True
        for wait in (False, True):  # a thread may start one more worker while it is told to end
            for worker in [*self._started]:
                worker.kill()
            self._pool.shutdown(wait, cancel_futures=True)
        for worker in self._started:
            worker.close()

    def verify(
        self, texts: Sequence[str], answers: Sequence[str], progress: Progress | None = None
    ) -> list[Verdict]:
        verdicts: list[Verdict] = ["unparsable"] * len(texts)
        hard: dict[tuple[str, str], list[int]] = {}  # the same question is asked once
        for i, (text, answer) in enumerate(zip(texts, answers, strict=True)):
            question = self._question(text, answer)
            if isinstance(question, str):
                verdicts[i] = question
            else:
                hard.setdefault(question, []).append(i)
        done = len(texts) - sum(map(len, hard.values()))
        if hard:
            check_installed(self.grader)
        self._start_missing(len(hard))
        for items, verdict in zip(hard.values(), self._pool.map(self._ask, hard), strict=True):
            for i in items:
                verdicts[i] = verdict
            done += len(items)
            if progress:
                progress(done, len(texts))
        return verdicts

    def _question(self, text: str, answer: str) -> Verdict | tuple[str, str]:
        """The verdict where no algebra is needed, else what to ask a worker."""
        expected = extract_answer(answer) or answer.strip()
        if self.grader == "rllm":
            given = part = final_answer(text)
        else:
            given = extract_answer(text)
            quick = None if given is None else quick_verdict(given, expected)
            if quick:
                return quick
            part = excerpt(text, given)
        if part is None or not expected or max(len(given or ""), len(expected)) > MAX_CHARS:
            return "unparsable"
        return part, expected

    def _start_missing(self, num_questions: int) -> None:
        """Starts the workers that so many questions need, before any of them is waited for."""
        idle: list[_Worker | None] = []
        with contextlib.suppress(Empty):
            while len(idle) < num_questions:
                idle.append(self._slots.get_nowait())
        for worker in reversed(idle):
            self._slots.put(worker or self._start())

    def _start(self) -> "_Worker":
        # All workers are of one installation: the first one judges the known pairs.
        worker = _Worker(self.timeout, self.grader, is_first=not self._started)
        self._started.append(worker)
        return worker

    def _ask(self, question: tuple[str, str]) -> Verdict:
        worker = self._slots.get()
        try:
            for _ in range(2):
                if self._is_closed:
                    break
                if worker is not None and worker.is_gone():
                    self._started.remove(worker)
                    worker.close()
                    worker = None
                worker = worker or self._start()
                worker.wait_until_ready()
                verdict = worker.ask(question)
                if verdict:
                    return verdict
            return "unparsable"
        finally:
            self._slots.put(worker)


class _Worker:
    """One process running judge.py, spoken to in lines. Made, it has only begun to start."""

    def __init__(self, timeout: float, grader: Grader, *, is_first: bool = False) -> None:
        self.patience = _PATIENCE * timeout
        # -I: nothing of the environment or the current folder gets in front of the standard library
        arguments = [json.dumps(sys.path), str(timeout), str(self.patience + 1)]
        arguments += ["check" if is_first else "", grader]
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(WORKER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            encoding="utf-8",
        )
        self._is_starting = True

    def wait_until_ready(self) -> None:
        """Raises VerifierFailed, with what the process said, if it does not get ready."""
        if not self._is_starting:
            return
        self._is_starting = False
        if self._read_line(_START_TIMEOUT) != "ready":
            self.kill()
            assert self._process.stderr
            raise VerifierFailed(
                f"a verifier process did not start: {self._process.stderr.read()[-500:]}"
            )

    def ask(self, question: tuple[str, str]) -> Verdict | None:
        """The verdict; None if the worker died of the question."""
        assert self._process.stdin
        start = time.monotonic()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except OSError:
            self.kill()
            return None
        line = self._read_line(self.patience)
        if line in get_args(Verdict):
            return line  # type: ignore[return-value]
        self.kill()
        is_late = time.monotonic() - start >= self.patience
        return "timeout" if is_late or self._process.returncode == -signal.SIGPROF else None

    def is_gone(self) -> bool:
        """Whether it was there and is no more; of one that never was, `wait_until_ready` tells."""
        return not self._is_starting and self._process.poll() is not None

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def close(self) -> None:
        with contextlib.suppress(OSError), self._process:  # OSError: text a dead worker never read
            self._process.kill()

    def _read_line(self, timeout: float) -> str:
        """The next line; "" if none came in time, and then the process is dead."""
        assert self._process.stdout
        timer = threading.Timer(timeout, self._process.kill)
        timer.start()
        try:
            return self._process.stdout.readline().rstrip("\n")
        finally:
            timer.cancel()


def check_installed(grader: Grader) -> None:
    """Raises RediError where answers that need algebra could not be judged."""
    if grader == "math_verify" and find_spec("math_verify") is None:
        raise RediError(
            "judging these answers needs math-verify; run "
            'pip install "reinforcement-distillation[data]"'
        )


def grading_rules() -> str:
    """Which rules verdicts are by now: ours and math-verify's, for fingerprints."""
    try:
        return f"{RULES}, math-verify {metadata.version('math-verify')}"
    except metadata.PackageNotFoundError:
        return f"{RULES}, no math-verify"


def num_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
