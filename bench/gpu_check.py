"""Everything to do on the day there is a GPU, in one command: correctness, memory, speed, trainer.

    python3 bench/gpu_check.py                      all that fits into --budget seconds (540)
    python3 bench/gpu_check.py --parts speed fast   some of it; --missing: what has not passed yet
    python3 bench/gpu_check.py --page               draws gpu.md again from gpu.jsonl
    python3 bench/gpu_check.py --rehearse           tiny, in the interpreter on a CPU

From a checkout; torch and triton are enough, and no network is needed. The trainer's part, the
tests' and the peers' (CCE, Liger, TRL) say what they miss and are left out without it. Each row is
printed and on disk (gpu.jsonl, in --output) before the next begins, so a kill costs one row; each
part has a process of its own, so an illegal access costs one row too. gpu.md is drawn from that
file. Exit code 0: something ran and all of it passed; 1: something did not; 2: nothing ran.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parent)]

import gpu_check_page  # noqa: E402
from gpu_check_rows import (  # noqa: E402
    AGAIN,
    ERROR,
    FAILED,
    NOT_RUN,
    PASSED,
    ROOT,
    START,
    Results,
    Row,
    environment,
    finished,
    keep,
    run_rows,
    unfinished,
)

START_SECONDS = 10.0  # torch, triton and a GPU context
START_LIMIT, ROW_LIMIT = 120.0, 60.0  # of a process before its first row; of a row, beyond 4 x it
GRACE = 30.0  # of a row that was expected to end in time and has not


@dataclass(frozen=True)
class Part:
    name: str
    module: str  # with rows(part, rehearse)
    about: str


# In the order of their worth: where the budget ends, the last are left out.
PARTS = (
    Part("machine", "gpu_check_machine", "what this was measured on"),
    Part("compile", "gpu_check_machine", "the kernels compiled ahead, on all cores at once"),
    Part("correct", "gpu_check_correct", "log-probs and gradients of both paths against fp64"),
    Part("speed", "gpu_check_speed", "time and memory, beside the peers that are installed"),
    Part("edges", "gpu_check_edges", "NaN, strides, ignored tokens, bits, graphs, large sizes"),
    Part("kernels", "gpu_check_speed", "each kernel's time beside cuBLAS's for the same matmul"),
    Part("fast", "gpu_check_speed", "fast mode"),
    Part("trainer", "gpu_check_trainer", "six steps of a small model: memory, kill and resume"),
    Part("tests", "gpu_check_machine", "pytest -m gpu"),
    Part("slab", "gpu_check_speed", "the fused path's slab, smaller and larger"),
)  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, metavar="PART",
                        help=f"of {', '.join(names)}")  # fmt: skip
    parser.add_argument("--budget", type=float, default=540.0, metavar="SECONDS",
                        help="what would not end in it is left out, and said (540)")  # fmt: skip
    parser.add_argument("--output", type=Path, help="docs/; of a rehearsal runs/gpu-rehearsal/")
    parser.add_argument("--missing", action="store_true",
                        help="only rows that gpu.jsonl does not show as passed")  # fmt: skip
    parser.add_argument("--page", action="store_true", help="only draw gpu.md from gpu.jsonl")
    parser.add_argument("--rehearse", action="store_true")
    for name in ("--child", "--run", "--deadline"):  # how a part's process is told its work
        parser.add_argument(name, help=argparse.SUPPRESS)
    parser.add_argument("--skip", nargs="*", default=[], help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    args = arguments()
    output = args.output or (ROOT / "runs/gpu-rehearsal" if args.rehearse else ROOT / "docs")
    results = Results(output / "gpu.jsonl", args.run or f"{time.time():.0f}-{os.getpid()}")
    if args.child:
        return child(args, results)
    if not args.page:
        started = run(args, results)
    page = gpu_check_page.draw(results, PARTS)
    if page:
        (output / "gpu.md").write_text(page)
        print(f"-> {output / 'gpu.md'}, {results.file}", flush=True)
    if args.page:
        return 0 if page else 2
    if not started:
        return 2
    return exit_code(results)


def run(args: argparse.Namespace, results: Results) -> bool:
    """All parts that were asked for; whether there is a machine to run them on."""
    deadline = time.time() + args.budget
    for part in PARTS:
        if part.name not in (*args.parts, "machine"):
            continue
        passed = []
        if args.missing and part.name != "machine":
            last = finished(results.read(), part.name)
            passed = [name for name, record in last.items() if record["status"] == PASSED]
        run_part(part, results, deadline, args.rehearse, passed)
        if part.name == "machine":
            found = finished(results.of_this_run(), "machine")
            if any(record["status"] == ERROR for record in found.values()):
                return False
    return True


def run_part(
    part: Part, results: Results, deadline: float, rehearse: bool, passed: list[str]
) -> None:
    """Processes of one part until each of its rows has a result or the time is over."""
    skip = list(passed)
    while True:
        left = deadline - time.time()
        if left < START_SECONDS:
            why = f"a process needs {START_SECONDS:.0f} s to start, {max(left, 0):.0f} s left"
            keep(results, part.name, Row(START, lambda: ({}, True)), NOT_RUN, {"budget": why})
            return
        code, why = watch(part, results, deadline, rehearse, skip)
        mine = results.of_this_run()
        died = unfinished(mine, part.name)
        if died:  # its process ended, or was ended, in the middle of it
            row = Row(died["row"], lambda: ({}, True), counts=died.get("counts", True))
            keep(results, part.name, row, ERROR, {"error": why}, time.time() - died["time"])
        elif code not in (0, AGAIN):
            keep(results, part.name, Row(START, lambda: ({}, True)), ERROR, {"error": why})
            return
        before, skip = len(skip), passed + list(finished(results.of_this_run(), part.name))
        if code == 0 or len(skip) == before:
            return


def watch(
    part: Part, results: Results, deadline: float, rehearse: bool, skip: list[str]
) -> tuple[int, str]:
    """One process of a part: its exit code, and in words how it ended. Ends one that hangs."""
    command = [
        sys.executable,
        str(Path(__file__).resolve()),
        "--child",
        f"{part.module}:{part.name}",
    ]
    command += ["--output", str(results.file.parent), "--run", results.run]
    command += ["--deadline", repr(deadline), *(["--rehearse"] if rehearse else [])]
    command += ["--skip", *skip]
    own = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"} if rehearse else {}
    start = time.time()
    # a session of its own, so that what it started (a training run) can be ended with it
    process = subprocess.Popen(command, env=environment(**own), start_new_session=True)
    try:
        while process.poll() is None:
            time.sleep(0.05)
            mine = [r for r in results.of_this_run() if r["part"] == part.name]
            begun = unfinished(mine, part.name)
            since = max([start, *(r["time"] for r in mine[-1:])])
            limit = ROW_LIMIT + 4 * begun["expected"] if begun else START_LIMIT
            over = min(since + limit, max(deadline, since) + GRACE) - time.time()
            if over < 0:
                return -9, f"still running after {time.time() - since:.0f} s: ended"
    finally:  # also of Ctrl-C: no process is left behind
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    code = process.returncode
    return code, f"its process ended by signal {-code}" if code < 0 else f"exit code {code}"


def child(args: argparse.Namespace, results: Results) -> int:
    """The rows of one part, in this process."""
    name, part = args.child.split(":")
    module = importlib.import_module(name)
    rows = [row for row in module.rows(part, args.rehearse) if row.name not in args.skip]
    alive = getattr(module, "is_alive", lambda: True)
    return run_rows(part, rows, results, float(args.deadline), alive)


def exit_code(results: Results) -> int:
    last = {(r["part"], r["row"]): r for r in results.of_this_run() if r.get("status")}
    ran = [r for r in last.values() if r["status"] != NOT_RUN and r["part"] != "machine"]
    wrong = [r for r in ran if r["status"] in (FAILED, ERROR) and r["counts"]]
    left_out = [r for r in last.values() if r["status"] == NOT_RUN]
    print(f"{len(ran)} rows ran, {len(wrong)} of those that count did not pass, "
          f"{len(left_out)} left out", flush=True)  # fmt: skip
    for record in wrong:
        print(f"  {record['status']} {record['part']}: {record['row']}", flush=True)
    return 2 if not ran else int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
