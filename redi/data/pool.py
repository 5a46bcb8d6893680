"""Worker processes that may die: each does one task at a time, and a task whose worker is gone is
done again by a new one.

Workers are programs of their own, not forked and not `multiprocessing`'s, so that a script which
calls redi.build needs no `if __name__ == "__main__"`. They end when their parent does.
"""

import contextlib
import json
import os
import pickle
import subprocess
import sys
import traceback
from collections.abc import Iterator
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from typing import Any

from redi.errors import RediError

_ATTEMPTS = 3
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from redi.data.pool import serve; serve(int(sys.argv[2]))"
)
# One core each; what libraries start by themselves would only fight over it.
_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


class WorkerDied(RediError):
    """More than once, of the same task."""


def run_all(work: Any, tasks: Iterator[Any], num_workers: int) -> Iterator[tuple[Any, Any]]:
    """Yields (task, work(task)) as they get done. `work` and tasks can be pickled, tasks have a
    `name`.

    Tasks are taken as workers come free. If one raises an error, those under way are finished and
    the error of the earliest task is raised: RediError and OSError as they are, others as
    RuntimeError. Raises WorkerDied for a task that killed _ATTEMPTS workers.
    """
    setup = pickle.dumps(work)
    workers: dict[Connection, _Worker] = {}
    errors: list[tuple[int, Exception]] = []
    order = enumerate(tasks)
    try:
        # All are started before any is spoken to: what is sent waits until a worker has imported
        # what it needs, which takes seconds, and they can do so at the same time.
        for task in islice(order, num_workers):
            worker = _Worker(task)
            workers[worker.pipe] = worker
        for worker in workers.values():
            worker.begin(setup)
        while workers:
            for pipe in wait(list(workers)):
                worker = workers.pop(pipe)  # type: ignore[call-overload]
                index, task = worker.task
                outcome = worker.take()
                if outcome is None:  # it died
                    worker.close()
                    if worker.attempt >= _ATTEMPTS:
                        raise WorkerDied(_killer(task, worker))
                    again = _Worker((index, task), worker.attempt + 1)
                    workers[again.pipe] = again
                    again.begin(setup)
                    continue
                result, error = outcome
                if error is None:
                    yield task, result
                else:
                    errors.append((index, error))
                following = None if errors else next(order, None)
                if following is None:
                    worker.close()
                else:
                    worker.attempt = 1
                    worker.give(following)
                    workers[worker.pipe] = worker
        if errors:
            raise min(errors, key=lambda pair: pair[0])[1]
    finally:
        for worker in workers.values():
            worker.close()


class _Worker:
    def __init__(self, task: tuple[int, Any], attempt: int = 1) -> None:
        self.task, self.attempt = task, attempt
        self.pipe, theirs = Pipe()
        self._process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, json.dumps(sys.path), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.PIPE,  # nothing is written; its end is the end of the parent
            env=os.environ | _ENVIRONMENT,
        )
        theirs.close()

    def begin(self, setup: bytes) -> None:
        """Sends what every task needs, and the first one; waits for the process to take it."""
        self._send(setup)
        self.give(self.task)

    def give(self, task: tuple[int, Any]) -> None:
        self.task = task
        self._send(pickle.dumps(task[1]))

    def take(self) -> tuple[Any, Exception | None] | None:
        """(result, error); None if the worker died."""
        try:
            return pickle.loads(self.pipe.recv_bytes())
        except (EOFError, OSError):
            return None

    def close(self) -> int:
        """Ends the process; returns its exit status."""
        self.pipe.close()
        assert self._process.stdin
        self._process.stdin.close()
        if self._process.poll() is None:
            self._process.kill()
        return self._process.wait()

    def _send(self, content: bytes) -> None:
        with contextlib.suppress(OSError):  # it died, which `take` will tell
            self.pipe.send_bytes(content)


def _killer(task: Any, worker: _Worker) -> str:
    return (
        f"{task.name}: the process that read it died {_ATTEMPTS} times (exit status "
        f"{worker.close()}; -9 is what a machine out of memory does); run again with a smaller "
        "num_workers: what is done is kept"
    )


def serve(handle: int) -> None:
    """The worker: `work` first, then one task after the other, until the parent is gone."""
    import signal
    import threading

    def end_with_parent() -> None:
        os.read(0, 1)
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's business
    threading.Thread(target=end_with_parent, daemon=True).start()  # in the middle of a task, too
    pipe = Connection(handle)
    try:
        work = pickle.loads(pipe.recv_bytes())
        while True:
            task = pickle.loads(pipe.recv_bytes())
            outcome: tuple[Any, Exception | None]
            try:
                outcome = (work(task), None)
            except RediError as error:
                outcome = (None, error)
            except OSError as error:
                outcome = (None, OSError(*error.args))
            except Exception:
                outcome = (None, RuntimeError(traceback.format_exc()))
            pipe.send_bytes(pickle.dumps(outcome))
    except (EOFError, ConnectionError):  # the parent is gone
        os._exit(1)
