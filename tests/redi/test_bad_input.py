"""What bad input gets: one line that names the culprit, exit code 2, and nothing lost.

`make test-slow` prints kind, exit code and message of each.
"""

import hashlib
import logging
import os
import shlex
import shutil
import signal
import threading
import warnings
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from bad_inputs import KINDS, Kind, make_world, put

from redi import cli

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
        if file.is_symlink():
            found[str(file.relative_to(folder))] = os.readlink(file)
        elif file.is_file():
            found[str(file.relative_to(folder))] = hashlib.sha256(file.read_bytes()).hexdigest()
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
    if len(errors) != 1 or lines[-1:] != errors:
        found.append(f"{len(errors)} errors in {len(lines)} lines")
    message = errors[-1] if errors else said
    found += [f"no {word!r}" for word in kind.words if word not in message]
    found += [f"changed {name}" for name in lost]
    return found


@pytest.mark.slow
def test_every_kind_gets_one_line_and_nothing_is_lost(world, tmp_path, server, monkeypatch, capfd):
    monkeypatch.setattr(logging, "raiseExceptions", False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    previous = signal.signal(signal.SIGALRM, too_long)
    wrong = []
    only = os.environ.get("KINDS", "")
    try:
        for number, kind in enumerate(k for k in KINDS if only in k.name):
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
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert not wrong, f"{len(wrong)} of {len(KINDS)}\n" + "\n".join(wrong)
