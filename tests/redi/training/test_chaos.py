"""`make chaos`, in short: half of the kills are inside a save."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(("one", "two"), [(2, 0), pytest.param(4, 2, marks=pytest.mark.slow)])
def test_killed_runs_lose_nothing_and_end_in_the_same_bits(one, two):
    command = [sys.executable, "bench/chaos.py", "--one", str(one), "--two", str(two)]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert f"| kills | {one} | {two} |" in done.stdout
