"""`make chaos`, in short: six kills, three of them inside a save."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_killed_runs_lose_nothing_and_end_in_the_same_bits():
    command = [sys.executable, "bench/chaos.py", "--one", "4", "--two", "2"]
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert "| kills | 4 | 2 |" in done.stdout
