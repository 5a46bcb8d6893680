"""Seeing a run: metrics.jsonl, and the callbacks that it and the screen are made of.

A callback is any object with some of the methods of `Callback` (Hugging Face's names). `redi.train`
calls them on the main rank only.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from redi.errors import RediError
from redi.files import write_text

# What a step's time goes to (throughput.py measures it), in the order in which pages show it.
PARTS = ("data", "forward", "loss", "backward", "optimizer", "eval", "save")


@dataclass
class TrainState:
    """Where a run stands; what callbacks are given."""

    step: int = 0  # optimizer steps done
    total_steps: int = 0
    epoch: float = 0.0
    output_dir: Path = field(default_factory=Path)
    name: str = "train"
    skipped: list[int] = field(default_factory=list)  # steps whose loss or gradient was not finite
    model: Any = None  # the transformers model as it trains; sharded on CUDA and over ranks


class Callback:
    """Base with empty methods; subclassing is optional."""

    def on_train_begin(self, state: TrainState) -> None: ...
    def on_log(self, state: TrainState, logs: dict[str, float]) -> None: ...
    def on_step_end(self, state: TrainState) -> None: ...
    def on_evaluate(self, state: TrainState, metrics: dict[str, float]) -> None: ...
    def on_save(self, state: TrainState) -> None: ...
    def on_train_end(self, state: TrainState) -> None: ...


def notify(callbacks: list[Any], event: str, state: TrainState, *args: Any) -> None:
    for callback in callbacks:
        method = getattr(callback, event, None)
        if method is not None:
            method(state, *args)


class MetricsFile(Callback):
    """One JSON object a logged step. On resume, lines past the saved step are cut off first, so
    that a killed run leaves neither gaps nor double lines. On a full disk lines wait in memory."""

    def __init__(self, path: Path):
        self.path = path
        self.size = 0  # bytes of whole lines in the file
        self.waiting: list[str] = []

    def on_train_begin(self, state: TrainState) -> None:
        kept = [row for row in read_metrics(self.path) if row["step"] <= state.step]
        write_text(self.path, "".join(map(_line, kept)))
        self.size = self.path.stat().st_size

    def on_log(self, state: TrainState, logs: dict[str, float]) -> None:
        self.waiting.append(_line(logs))
        try:
            with self.path.open("r+") as file:
                file.truncate(self.size)  # of a line cut short by a full disk
                file.seek(self.size)
                file.writelines(self.waiting)
        except OSError as error:
            say(f"WARNING: {self.path}: {len(self.waiting)} lines not written yet: {error}")
        else:
            self.size, self.waiting = self.path.stat().st_size, []


def _line(row: dict[str, float]) -> str:
    """A skipped step says that its loss was no number."""
    missing = {"loss": None} if "skipped" in row else {}
    return json.dumps(missing | row) + "\n"


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole lines of a metrics.jsonl, without what is null (a skipped step's loss); a last line
    torn by a kill is ignored. Raises RediError for any other line that no run has written."""
    rows = []
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines) > 1:
                break
            row = None
        if not (isinstance(row, dict) and isinstance(row.get("step"), int | float)) or not all(
            value is None or isinstance(value, int | float) for value in row.values()
        ):
            raise RediError(f"{path} line {number}: not a row of redi's log; move the file away")
        rows.append({key: value for key, value in row.items() if value is not None})
    return rows


def timeless(row: dict[str, float]) -> dict[str, float]:
    """What two runs of the same recipe have in common: a row without clocks and memory."""
    clocks = ("time", "tokens_per_second", "mfu", "memory/")
    return {key: value for key, value in row.items() if not key.startswith(clocks)}


def ticker(label: str, every: float = 10.0) -> Callable[..., None]:
    """Prints "{label}  {count}" at most every so many seconds; given the share of the work that is
    done as well, also that and the time left, at the pace since the first call."""
    start = printed = time.monotonic()
    first: float | None = None

    def tick(count: int, share: float | None = None) -> None:
        nonlocal start, printed, first
        now = time.monotonic()
        if first is None and share is not None:
            start, first = now, share
        if now - printed < every:
            return
        printed = now
        text = f"{label}  {count:,}"
        if share is not None and first is not None:
            text += f"  {share:.0%}"
            if share > first:
                left = round((now - start) * (1 - share) / (share - first))
                text += f"  {left // 3600}:{left // 60 % 60:02}:{left % 60:02} left"
        say(text)

    return tick


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
