"""Rows for tests of bench/gpu_check.py: some raise, hang, or end their process."""

import os
import signal
import time

from gpu_check_rows import CannotRun, Row


def rows(part, rehearse):
    def good():
        return {"found": 1.5}, True

    def raises():
        raise RuntimeError("no such kernel\nand more")

    def cannot():
        raise CannotRun("a moon")

    def dies():
        os.kill(os.getpid(), signal.SIGKILL)

    def slow():
        time.sleep(60)

    if part == "slow":
        return [Row("one", good, 0.1), Row("two", good, 0.1), Row("three", slow, 0.1)]
    return [
        Row("first", good, 0.1),
        Row("raises", raises, 0.1),
        Row("wrong", lambda: ({"found": 0}, False), 0.1),
        Row("dies", dies, 0.1),
        Row("cannot", cannot, 0.1),
        Row("peer", raises, 0.1, counts=False),
        Row("too long", good, 1e6),
        Row("last", good, 0.1),
    ]
