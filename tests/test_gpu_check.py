"""bench/gpu_check.py where there is no GPU: what it keeps, whatever happens to it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import gpu_check_page
import gpu_check_rows
import pytest
from gpu_check import Part, Results

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "bench/gpu_check.py"
# All that setup.py asks for but torch, triton and what torch itself needs.
BLOCKED = ["accelerate", "datasets", "dill", "hypothesis", "liger_kernel", "math_verify",
           "matplotlib", "peft", "pyarrow", "pydantic", "pytest", "rich", "safetensors",
           "tokenizers", "transformers", "trl", "typer", "yaml"]  # fmt: skip
BARE = f"""
from importlib.machinery import PathFinder
find = PathFinder.find_spec
def find_spec(name, *rest):
    return None if name.split(".")[0] in {BLOCKED} else find(name, *rest)
PathFinder.find_spec = staticmethod(find_spec)
"""


def faulty(tmp_path: Path, part: str = "faulty", *, budget: float = 300.0) -> Results:
    results = Results(tmp_path / "gpu.jsonl", "a run")
    part = Part(part, "gpu_check_faulty", "of a test")
    gpu_check.run_part(part, results, time.time() + budget, True, [])
    return results


def statuses(results: Results, part: str = "faulty") -> dict[str, str]:
    return {k: r["status"] for k, r in gpu_check_rows.finished(results.read(), part).items()}


def test_a_row_that_fails_costs_that_row(tmp_path, capfd) -> None:
    """Also one that ends its process: a new one goes on behind it."""
    results = faulty(tmp_path)
    assert statuses(results) == {
        "first": "passed", "raises": "ERROR", "wrong": "FAILED", "dies": "ERROR",
        "cannot": "not run", "peer": "ERROR", "too long": "not run", "last": "passed",
    }  # fmt: skip
    found = gpu_check_rows.finished(results.read(), "faulty")
    assert found["dies"]["values"] == {"error": "its process ended by signal 9"}
    assert found["raises"]["values"] == {"error": "RuntimeError: no such kernel"}
    assert gpu_check.exit_code(results) == 1
    said = capfd.readouterr().out
    assert "faulty: first (0.0 s): found 1.5" in said
    assert "3 of those that count did not pass" in said
    page = gpu_check_page.draw(results, [Part("faulty", "", "of a test")])
    assert "| first | 1.5 | passed |" in page and "- cannot: not run, needs: a moon" in page


def test_exit_code_is_of_what_ran(tmp_path) -> None:
    results = Results(tmp_path / "gpu.jsonl", "a run")
    assert gpu_check.exit_code(results) == 2
    row = gpu_check_rows.Row("r", lambda: ({}, True), counts=False)
    gpu_check_rows.keep(results, "p", row, "not run", {"budget": "over"})
    assert gpu_check.exit_code(results) == 2
    gpu_check_rows.keep(results, "p", row, "ERROR", {"error": "of a peer"})
    assert gpu_check.exit_code(results) == 0


def test_a_row_that_hangs_is_ended(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(gpu_check, "ROW_LIMIT", 1.0)
    results = faulty(tmp_path, "slow")
    assert statuses(results, "slow") == {"one": "passed", "two": "passed", "three": "ERROR"}


def test_lines_cut_short_cost_themselves(tmp_path) -> None:
    results = Results(tmp_path / "gpu.jsonl", "a run")
    results.append(part="p", row="one", status="passed", values={})
    with results.file.open("a") as file:
        file.write('{"part": "p", "row": "tw')
    results.append(part="p", row="three", status="passed", values={})
    assert [record["row"] for record in results.read()] == ["one", "three"]


def command(tmp_path: Path, *arguments: str) -> list[str]:
    return [sys.executable, str(SCRIPT), "--rehearse", "--output", str(tmp_path), *arguments]


def bare(tmp_path: Path) -> dict[str, str]:
    """Of a machine with torch and triton alone, told by PYTHONPATH: it must reach every process."""
    (tmp_path / "sitecustomize.py").write_text(BARE)
    return os.environ | {"PYTHONPATH": str(tmp_path)}


def test_a_budget_says_what_it_leaves_out(tmp_path) -> None:
    done = subprocess.run(
        command(tmp_path, "--budget", "1"), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2, done.stdout + done.stderr
    for part in gpu_check.PARTS:
        assert f"not run {part.name}: (start): budget a process needs" in done.stdout


@pytest.mark.linux
def test_torch_and_triton_are_enough(tmp_path) -> None:
    """And what the other parts lack is said, whether as a row or as a part."""
    done = subprocess.run(
        command(tmp_path, "--parts", "trainer", "tests"),
        env=bare(tmp_path), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout + done.stderr
    assert "needs pyarrow, pydantic, rich, safetensors, tokenizers" in done.stdout
    assert "not run tests: pytest -m gpu (0.0 s): needs pytest" in done.stdout


@pytest.mark.linux
@pytest.mark.slow
def test_rehearsal_on_a_bare_machine(tmp_path) -> None:
    """All that needs the kernels alone."""
    done = subprocess.run(
        command(tmp_path, "--parts", "compile", "correct", "speed", "edges", "kernels", "fast"),
        env=bare(tmp_path), capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("correct", "speed", "edges", "kernels", "fast"):
        assert f"passed  {part}: " in done.stdout


@pytest.mark.linux
def test_a_kill_keeps_the_finished_rows(tmp_path) -> None:
    """SIGKILL in the middle, with torch and triton alone; the page is drawn from what is there."""
    process = subprocess.Popen(
        command(tmp_path, "--parts", "correct"), env=bare(tmp_path), stdout=subprocess.DEVNULL
    )
    results = Results(tmp_path / "gpu.jsonl")
    wait_for = lambda: len(gpu_check_rows.finished(results.read(), "correct")) >= 2
    while not wait_for() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = gpu_check_rows.finished(results.read(), "correct")
    assert len(kept) >= 2 and all(record["status"] == "passed" for record in kept.values())
    assert not (tmp_path / "gpu.md").exists()
    subprocess.run(command(tmp_path, "--page"), check=True, stdout=subprocess.DEVNULL)
    page = (tmp_path / "gpu.md").read_text()
    assert all(f"| {name} |" in page for name in kept)
    for line in (tmp_path / "gpu.jsonl").read_text().splitlines():
        json.loads(line)
