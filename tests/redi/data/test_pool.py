import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from redi.data import pool
from redi.data.pool import WorkerDied, run_all
from redi.errors import RediError

# Workers import what they are sent, so this file stands in their path.
sys.path.insert(0, str(Path(__file__).parent))
work = "test_pool"


@dataclass
class Task:
    name: str
    folder: Path


class Do:
    """What the name of a task says."""

    def __call__(self, task):
        calls = task.folder / "calls"
        with calls.open("a") as file:
            file.write(f"{task.name}\n")
        with (task.folder / "pids").open("a") as file:
            file.write(f"{os.getpid()}\n")
        before = calls.read_text().split("\n").count(task.name)
        if task.name == "dies" or (task.name == "dies once" and before == 1):
            os.kill(os.getpid(), signal.SIGKILL)
        if task.name.startswith("user error"):
            raise RediError(task.name)
        if task.name == "bug":
            raise ZeroDivisionError
        if task.name == "naps":
            time.sleep(60)
        return task.name.upper()


Do.__module__ = Task.__module__ = work
sys.modules.setdefault(work, sys.modules[__name__])


def tasks(folder, *names):
    return iter([Task(name, folder) for name in names])


def results(folder, *names, num_workers=2):
    done = run_all(Do(), tasks(folder, *names), num_workers)
    return sorted((task.name, result) for task, result in done)


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_worker_that_dies_loses_nothing(tmp_path, num_workers):
    names = ["a", "dies once", "b", "c", "d"]
    expected = sorted((name, name.upper()) for name in names)
    assert results(tmp_path, *names, num_workers=num_workers) == expected
    assert sorted((tmp_path / "calls").read_text().splitlines()) == sorted([*names, "dies once"])


def test_workers_start_together(tmp_path, monkeypatch):
    """All of them before anything is sent, which a worker takes only once it has started."""
    events, kind = [], pool._Worker

    def noted(name):
        method = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *args: events.append(name) or method(*args))

    noted("__init__")
    noted("_send")
    names = ["a", "b", "c", "d", "e"]
    assert results(tmp_path, *names, num_workers=3) == [(name, name.upper()) for name in names]
    assert events[:3] == ["__init__"] * 3
    assert events.count("__init__") == 3


def test_a_task_that_kills_every_worker_is_named(tmp_path):
    with pytest.raises(WorkerDied, match=r"dies: .* died 3 times \(exit status -9"):
        results(tmp_path, "a", "dies")
    assert (tmp_path / "calls").read_text().split().count("dies") == 3


def test_the_earliest_error_is_raised_whoever_is_first(tmp_path):
    for _ in range(3):
        with pytest.raises(RediError, match="user error 1"):
            results(tmp_path, "a", "user error 1", "user error 2", "b", num_workers=3)
    with pytest.raises(RuntimeError, match="ZeroDivisionError"):
        results(tmp_path, "bug", "a")


def test_workers_end_with_their_parent(tmp_path):
    """Killed, the parent can tell them nothing; and they are in the middle of a long task."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; import test_pool\n"
        "tasks = test_pool.tasks(Path(sys.argv[2]), 'a', 'naps', 'naps', 'naps')\n"
        "for _ in test_pool.run_all(test_pool.Do(), tasks, 2): print('done', flush=True)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(Path(__file__).parent), str(tmp_path)],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout.readline() == b"done\n"
    workers = [int(name) for name in (tmp_path / "pids").read_text().split()]
    parent.kill()
    parent.wait()
    end = time.monotonic() + 20
    while any(map(is_running, workers)):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid):
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False
