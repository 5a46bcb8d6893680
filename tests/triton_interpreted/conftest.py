"""These tests run the kernels in Triton's interpreter, which cannot share a process with the
compiler. An ordinary `pytest` collects them as any others; the first of a file starts a pytest of
its own for the rest of that file, and each test is reported by that process as it comes: under its
own name, with its own time and failure. Directly, for a debugger:

    TRITON_INTERPRET=1 python -m pytest tests/triton_interpreted
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
REPORTS = "REDI_INTERPRETED_REPORTS"  # where the process of their own writes, a report a line

if sys.platform != "linux":  # Triton has no builds for it: these tests have no subject there
    collect_ignore_glob = ["*"]
elif IS_INTERPRETED:
    import interpreter

    interpreter.install()


class Process:
    """A pytest that runs `items` of one file, interpreted."""

    def __init__(self, config, items):
        self.config, self.left = config, {item.nodeid for item in items}
        read, write = os.pipe()
        command = [sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider"]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
        environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", REPORTS: str(write)}
        self.process = subprocess.Popen(
            [*command, *(item.nodeid for item in items)], cwd=config.rootpath, env=environment,
            pass_fds=[write], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        os.close(write)
        self.lines = os.fdopen(read)

    def reports(self, item):
        """The test's setup, call and teardown; a failure where the process died instead."""
        self.left.discard(item.nodeid)
        for line in self.lines:
            report = self.config.hook.pytest_report_from_serializable(
                config=self.config, data=json.loads(line)
            )
            if report.nodeid == item.nodeid:
                yield report
                if report.when == "teardown":
                    return
        self.left.clear()  # the next test starts another process
        text = f"{self.process.communicate()[0][-8000:]}\nexit code {self.process.returncode}"
        yield pytest.TestReport(
            item.nodeid, item.location, dict.fromkeys(item.keywords, 1), "failed", text, "call"
        )

    def end(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()
        self.lines.close()


PROCESS = pytest.StashKey[Process]()


def pytest_runtest_protocol(item, nextitem):
    if IS_INTERPRETED or item.path.parent != Path(__file__).parent:
        return None
    stash, items = item.config.stash, item.session.items
    process = stash.get(PROCESS, None)
    if process is None or item.nodeid not in process.left:
        if process is not None:
            process.end()
        rest = items[items.index(item) :]
        process = Process(item.config, [other for other in rest if other.path == item.path])
        stash[PROCESS] = process
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    for report in process.reports(item):
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item):
    report = yield
    if IS_INTERPRETED and REPORTS in os.environ:
        data = item.config.hook.pytest_report_to_serializable(config=item.config, report=report)
        os.write(int(os.environ[REPORTS]), (json.dumps(data) + "\n").encode())
    return report


def pytest_sessionfinish(session):
    process = session.config.stash.get(PROCESS, None)
    if process is not None:
        process.end()


@pytest.fixture(autouse=True)
def fast_at_any_size(monkeypatch):
    """What is interpreted is short and narrow, and would be exact."""
    from redi_kernels import fast_plan

    monkeypatch.setattr(fast_plan, "pays", lambda num_tokens, H: True)
