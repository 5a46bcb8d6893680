"""What bad input gets: one line that names the culprit, exit code 2, and nothing lost.

`make test-slow` prints kind, exit code and message of each.
"""

import ctypes
import hashlib
import logging
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from bad_inputs import BUILD, RAW, TRAINS, Kind, make_world, put
from bad_kinds import KINDS

from redi import cli

ROOT = Path(__file__).parents[2]
PATIENCE = 60  # seconds for one command
# What redi writes beside its messages: notes, warnings, progress.
NOISE = ("warning: ", "WARNING: ", "== ", "model: ", "page: ")


class Server(BaseHTTPRequestHandler):
    """/v1/<what goes wrong>/chat/completions"""

    def do_POST(self):
        self.rfile.read(int(self.headers["Content-Length"]))
        trouble = self.path.split("/")[1]
        body = {"html": b"<html>", "list": b"[1]"}.get(trouble, b'{"error": "no"}')
        self.send_response(int(trouble) if trouble.isdigit() else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture(scope="module", autouse=True)
def no_wait_is_endless():
    previous = signal.signal(signal.SIGALRM, too_long)
    yield
    signal.signal(signal.SIGALRM, previous)


@pytest.fixture(scope="module")
def server():
    with ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def redi(*words):
            patch.setattr("sys.argv", ["redi", *words])
            cli.main()

        make_world(folder, redi)
    return folder


class NoEnd(BaseException):
    """Not an Exception: nobody may take it for a network's time-out."""


def too_long(*_):
    raise NoEnd(f"after {PATIENCE} s")


def contents(folder: Path) -> dict[str, str]:
    """Digests of all files of the folder, links unfollowed."""
    found = {}
    for file in sorted(folder.rglob("*")):
        name = str(file.relative_to(folder))
        if file.is_symlink():
            found[name] = os.readlink(file)
        elif file.is_file():
            is_shut = not file.stat().st_mode & 0o400
            found[name] = "" if is_shut else hashlib.sha256(file.read_bytes()).hexdigest()
    return found


def run(kind: Kind, world: Path, folder: Path, server: str, monkeypatch, capfd):
    """(exit code or exception, what it said, what it took away)"""
    shutil.copytree(world, folder, symlinks=True)
    for name, content in kind.files.items():
        put(folder / name, content)
    if kind.change:
        kind.change(folder)
    before = contents(folder)
    for name, value in kind.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    words = shlex.split(kind.command.replace("{server}", server))
    monkeypatch.setattr("sys.argv", ["redi", *words])
    signal.alarm(PATIENCE)
    capfd.readouterr()
    try:
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException as error:
        code = f"{type(error).__name__}: {error}"
    finally:
        signal.alarm(0)
    said = capfd.readouterr().err
    after = contents(folder)
    lost = [name for name, digest in before.items() if after.get(name) != digest]
    return code, said, lost


def faults(kind: Kind, code, said: str, lost: list[str]) -> list[str]:
    lines = [line for line in said.splitlines() if line.strip() and not line.startswith(NOISE)]
    errors = [line for line in lines if line.startswith("error: ")]
    found = [] if code == kind.code else [f"exit {code}"]
    if kind.code and (len(errors) != 1 or lines[-1:] != errors):
        found.append(f"{len(errors)} errors in {len(lines)} lines")
    message = errors[-1] if errors else said
    found += [f"no {word!r}" for word in kind.words if word not in message]
    found += [f"changed {name}" for name in lost]
    return found


# Of what was mended when the table was made, what takes no time; names of KINDS.
QUICK = """
a stray word; a field with a dash; run without its recipe; memory that is no number; a field
twice; an arm twice; a recipe nested without end; a recipe that is cut off; a zero byte in a path;
true for a number; true for a rate; an arm called '..'; an unknown model type; a size in words; a
negative size; a size that does not exist; an unknown activation; a weight of another shape;
weights that are cut off; an index without its shards; a tokenizer that is cut off; a template in
UTF-16; a column twice in a row; parquet with a column twice; parquet of bytes; numbers in a
.json; a role that no template knows; row: a prompt that is null; row: the same text on both
sides; an output folder that leads to itself; a server without http; a server with a space; a rank
in words; a rank beyond the world; a world without a master; a log of lists; a log that is
nobody's; samples that are nobody's; a build's report of somebody else; a result that is no result
"""


@pytest.mark.parametrize("name", [" ".join(name.split()) for name in QUICK.split(";")])
def test_a_kind_gets_one_line(name, world, tmp_path, server, monkeypatch, capfd):
    [kind] = [kind for kind in KINDS if kind.name == name]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    code, said, lost = run(kind, world, tmp_path / "x", server, monkeypatch, capfd)
    assert faults(kind, code, said, lost) == [], said


@pytest.mark.slow
def test_every_kind_gets_one_line_and_nothing_is_lost(world, tmp_path, server, monkeypatch, capfd):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    wrong = []
    for number, kind in enumerate(KINDS):
        folder = tmp_path / str(number)
        with monkeypatch.context() as patch, warnings.catch_warnings():
            code, said, lost = run(kind, world, folder, server, patch, capfd)
        shutil.rmtree(folder)
        message = (said.strip().splitlines() or [""])[-1]
        found = faults(kind, code, said, lost)
        with capfd.disabled():
            print(f"{kind.name:<44} {code!s:>4}  {message}", flush=True)
        if found:
            wrong.append(f"{kind.name} [{kind.command}]: {'; '.join(found)}\n    {said[-700:]}")
    assert not wrong, f"{len(wrong)} of {len(KINDS)}\n" + "\n".join(wrong)


@dataclass(frozen=True)
class Process:
    """A command as a program of its own: what is done to it, and what becomes of it."""

    name: str
    command: str
    words: tuple[str, ...]
    code: int = 2
    files: dict = field(default_factory=dict)
    signal: int | None = None  # sent as soon as `when` is there and not empty
    when: str = ""
    inside: Callable[[], Any] | None = None  # runs in the process, before redi
    environment: dict[str, str] = field(default_factory=dict)
    stdout: str = "pipe"  # "closed", or "deaf": nobody reads
    keeps: tuple[str, ...] = ()  # must be there afterwards


def small_disk(size: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def no_superuser() -> None:
    """Root reads and writes what its mode forbids; not without these two capabilities."""
    libc = ctypes.CDLL(None)
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        libc.prctl(24, capability, 0, 0, 0)  # PR_CAPBSET_DROP: from the next exec on


ENDLESS = f"{TRAINS} --max_steps 100000 --save_steps 100000"
MANY = [RAW[0] | {"id": str(i), "problem": f"{i}+1?", "generations": [r"\boxed{\frac42}"] * 8}
        for i in range(9000)]  # fmt: skip
PROCESSES = [
    Process("Ctrl-C in a training", ENDLESS, ("stopped after step", "checkpoint saved"), 130,
            signal=signal.SIGINT, when="out/metrics.jsonl", keeps=("out/latest",)),
    Process("SIGTERM in a training", ENDLESS, ("stopped after step", "checkpoint saved"), 0,
            signal=signal.SIGTERM, when="out/metrics.jsonl", keeps=("out/latest",)),
    Process("Ctrl-C in a build", BUILD, ("interrupted; what was finished is kept",), 130,
            files={"raw.jsonl": MANY}, signal=signal.SIGINT, when="built/.building/fingerprint"),
    Process("a disk that fills up with a model", TRAINS, ("out", "free space"),
            inside=small_disk(20_000)),
    Process("a disk that fills up with data", BUILD, ("built", "cannot be written"),
            inside=small_disk(100)),
    Process("a disk that fills up with a page", "report model", ("results.html",),
            inside=small_disk(1000)),
    Process("data nobody may read", TRAINS, ("pairs.jsonl", "ermission"), inside=no_superuser),
    Process("a folder nobody may write", f"{TRAINS} --output_dir shut", ("shut", "ermission"),
            inside=no_superuser),
    Process("a recipe nobody may read", TRAINS, ("recipe.yaml", "not readable"),
            inside=no_superuser),
    Process("no standard output", "plan recipe.yaml --gpus 0", (), 0, stdout="closed"),
    Process("an output that nobody reads", "plan recipe.yaml --gpus 0", (), 1, stdout="deaf"),
    Process("a name the terminal cannot write", "train --config rezept-\u00e9.yaml",
            ("rezept-", "no such recipe"),
            environment={"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": "ascii"}),
    Process("a name that is no text", "train --config r\udcff.yaml", ("no such recipe",)),
]  # fmt: skip


def start(case: Process, folder: Path) -> subprocess.Popen:
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    streams: dict[str, Any] = {"stdout": subprocess.PIPE}
    inside = case.inside
    if case.stdout == "closed":
        streams, inside = {}, lambda: os.close(1)
    if case.stdout == "deaf":
        reading, streams["stdout"] = os.pipe()
        os.close(reading)
    program = [sys.executable, "-c", "from redi.cli import main; main()"]
    started = subprocess.Popen(
        program + shlex.split(case.command), cwd=folder, stderr=subprocess.PIPE, preexec_fn=inside,
        env=os.environ | environment | case.environment, **streams,
    )  # fmt: skip
    if case.stdout == "deaf":
        os.close(streams["stdout"])
    return started


def end(case: Process, started: subprocess.Popen, folder: Path) -> tuple[Any, str]:
    """(exit code, what it said on standard error)"""
    last = time.monotonic() + 2 * PATIENCE
    mark = folder / case.when
    while case.signal and started.poll() is None and time.monotonic() < last:
        if mark.exists() and mark.stat().st_size:
            started.send_signal(case.signal)
            break
        time.sleep(0.05)
    try:
        _, said = started.communicate(timeout=2 * PATIENCE)
    except subprocess.TimeoutExpired:
        started.kill()
        return "no end", started.communicate()[1].decode("utf-8", "replace")
    return started.returncode, said.decode("utf-8", "replace")


@pytest.mark.slow
def test_processes_are_told_in_one_line_too(world, tmp_path, capfd):
    wrong = []
    for number, case in enumerate(PROCESSES):
        folder = tmp_path / str(number)
        shutil.copytree(world, folder, symlinks=True)
        for name, content in case.files.items():
            put(folder / name, content)
        if case.inside is no_superuser:
            (folder / "shut").mkdir(mode=0o500)
            closed = "recipe.yaml" if "recipe" in case.name else "pairs.jsonl"
            if "write" not in case.name:
                (folder / closed).chmod(0)
        before = contents(folder)
        code, said = end(case, start(case, folder), folder)
        after = contents(folder)
        kind = Kind(case.name, case.command, case.words, code=case.code)
        lost = [name for name, digest in before.items() if after.get(name) != digest]
        lost += [name for name in case.keeps if name not in after]
        found = faults(kind, code, said, lost) if case.code == 2 else []
        found += [f"no {word!r}" for word in case.words if word not in said]
        found += [f"exit {code}"] * (code != case.code) + ["a traceback"] * ("Traceback" in said)
        message = (said.strip().splitlines() or [""])[-1]
        with capfd.disabled():
            print(f"{case.name:<44} {code!s:>4}  {message}", flush=True)
        if found or lost:
            wrong.append(f"{case.name}: {'; '.join(found + lost)}\n    {said[-900:]}")
    assert not wrong, "\n".join(wrong)
