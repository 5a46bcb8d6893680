"""Rows of bench/gpu_check.py: how one is run, kept and read again. Needs the standard library only.

A row is one check or measurement. What it found is one line of JSON in gpu.jsonl, on disk before
the next row begins; so is a line that it began, by which a row that ended its process is known.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PASSED, FAILED, ERROR, NOT_RUN = "passed", "FAILED", "ERROR", "not run"
START = "(start)"  # in place of a row's name: the part's process itself
AGAIN = 3  # exit code of a part whose GPU context is lost: the rows left need a new process
Values = dict[str, Any] | list[dict[str, Any]]  # a line of the page's table, or several


class CannotRun(Exception):
    """What this row needs is not here; the message names it."""


@dataclass(frozen=True)
class Row:
    name: str
    run: Callable[[], tuple[Values, bool]]  # what was found, and whether that is right
    seconds: float = 2.0  # on an H200
    counts: bool = True  # False: of a peer, or for information; it does not decide the exit code


def environment(**more: str) -> dict[str, str]:
    """For a child: this checkout, then what PYTHONPATH held, which may be all there is."""
    own = [str(ROOT / name) for name in ("bench", "tests/tools", "kernels")] + [str(ROOT)]
    before = os.environ.get("PYTHONPATH")
    return (
        os.environ | {"PYTHONPATH": os.pathsep.join([*own, *([before] if before else [])])} | more
    )


class Results:
    """Lines of JSON, appended."""

    def __init__(self, file: Path, run: str = "") -> None:
        self.file, self.run = file, run

    def append(self, **record: Any) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"run": self.run, "time": round(time.time(), 1)} | record, default=str)
        with self.file.open("a+b") as out:
            if out.tell() and not self._ends_in_newline(out):
                line = "\n" + line  # a line that a kill cut short spoils no other
            out.write(line.encode() + b"\n")
            out.flush()
            os.fsync(out.fileno())

    @staticmethod
    def _ends_in_newline(file) -> bool:
        file.seek(-1, os.SEEK_END)
        return file.read(1) == b"\n"

    def read(self) -> list[dict[str, Any]]:
        if not self.file.exists():
            return []
        found = []
        for line in self.file.read_bytes().splitlines():
            try:
                found.append(json.loads(line))
            except ValueError:
                continue  # cut short
        return [record for record in found if isinstance(record, dict) and "part" in record]

    def of_this_run(self) -> list[dict[str, Any]]:
        return [record for record in self.read() if record["run"] == self.run]


def finished(records: Iterable[dict], part: str) -> dict[str, dict]:
    """Row -> its last result."""
    return {r["row"]: r for r in records if r["part"] == part and r.get("status")}


def unfinished(records: Iterable[dict], part: str) -> dict | None:
    """The row that began last, if nothing came of it."""
    last = [r for r in records if r["part"] == part][-1:]
    return last[0] if last and "status" not in last[0] else None


def say(record: dict[str, Any]) -> None:
    """One printed line of a result."""
    values = record["values"] if isinstance(record["values"], list) else [record["values"]]
    text = "; ".join(", ".join(f"{k} {shown(v)}" for k, v in line.items()) for line in values)
    seconds = f" ({record['seconds']:.1f} s)" if record.get("seconds") is not None else ""
    print(f"{record['status']:8}{record['part']}: {record['row']}{seconds}: {text}", flush=True)


def shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def run_rows(
    part: str, rows: list[Row], results: Results, deadline: float, is_alive: Callable[[], bool]
) -> int:
    """Runs what fits before `deadline` (of time.time()); returns the process's exit code."""
    parent = os.getppid()
    for row in rows:
        if os.getppid() != parent:
            return 1  # the command was killed: nobody is waiting for this
        if time.time() + row.seconds > deadline:
            why = f"takes about {row.seconds:.0f} s, {max(deadline - time.time(), 0):.0f} s left"
            keep(results, part, row, NOT_RUN, {"budget": why})
            continue
        results.append(part=part, row=row.name, expected=row.seconds, counts=row.counts)
        start = time.perf_counter()
        try:
            values, passed = row.run()
            status = PASSED if passed else FAILED
        except CannotRun as error:
            values, status = {"needs": str(error)}, NOT_RUN
        except Exception as error:  # one row's failure is that row's
            traceback.print_exc()
            first = (str(error).strip() or "no message").splitlines()[0]
            values, status = {"error": f"{type(error).__name__}: {first[:300]}"}, ERROR
        keep(results, part, row, status, values, time.perf_counter() - start)
        if not is_alive():
            print(f"{part}: the GPU context is lost; a new process goes on", file=sys.stderr)
            return AGAIN
    return 0


def keep(
    results: Results, part: str, row: Row, status: str, values: Values, seconds: float | None = None
) -> None:
    record = {"part": part, "row": row.name, "counts": row.counts, "status": status}
    record |= {"values": values, "seconds": seconds}
    results.append(**record)
    say(record)
