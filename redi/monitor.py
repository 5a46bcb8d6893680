"""Seeing a run: metrics.jsonl, a live line of progress, and the callbacks both are made of.

A callback is any object with some of the methods of `Callback` (Hugging Face's names). `redi.train`
calls them on the main rank only.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from redi.files import write_text


@dataclass
class TrainState:
    """Where a run stands; what callbacks are given."""

    step: int = 0  # optimizer steps done
    total_steps: int = 0
    epoch: float = 0.0
    output_dir: Path = field(default_factory=Path)
    name: str = "train"
    skipped: list[int] = field(default_factory=list)  # steps whose loss or gradient was not finite


class Callback:
    """Base with empty methods; subclassing is optional."""

    def on_train_begin(self, state: TrainState) -> None: ...
    def on_log(self, state: TrainState, logs: dict[str, float]) -> None: ...
    def on_step_end(self, state: TrainState) -> None: ...
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
        write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
        self.size = self.path.stat().st_size

    def on_log(self, state: TrainState, logs: dict[str, float]) -> None:
        self.waiting.append(json.dumps(logs) + "\n")
        try:
            with self.path.open("r+") as file:
                file.truncate(self.size)  # of a line cut short by a full disk
                file.seek(self.size)
                file.writelines(self.waiting)
        except OSError as error:
            say(f"WARNING: {self.path}: {len(self.waiting)} lines not written yet: {error}")
        else:
            self.size, self.waiting = self.path.stat().st_size, []


def read_metrics(path: Path) -> list[dict[str, float]]:
    """All whole lines of a metrics.jsonl; a last line torn by a kill is ignored."""
    rows = []
    if path.exists():
        for line in path.read_text().splitlines():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError:
                break
    return rows


class Progress(Callback):
    """A live bar on a terminal; elsewhere a plain line now and then (at most one every 10 s)."""

    COLUMNS = (
        ("loss", "loss", "{:.4f}"),
        ("logps/chosen", "chosen", "{:.3f}"),
        ("logps/rejected", "rejected", "{:.3f}"),
        ("grad_norm", "grad", "{:.2f}"),
        ("tokens_per_second", "tok/s", "{:,.0f}"),
        ("skipped_steps", "skipped", "{:.0f}"),
    )

    def __init__(self, stream: TextIO | None = None, every: float = 10.0):
        self.stream, self.every = stream or sys.stderr, every
        self.bar: Any = None
        self.task: Any = None
        self.printed = self.started = 0.0
        self.first_step = 0

    def on_train_begin(self, state: TrainState) -> None:
        self.started, self.first_step = time.monotonic(), state.step
        self.printed = self.started - self.every  # the first step is always worth a line
        if self.stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
            from rich.progress import TimeRemainingColumn as Remaining

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(None),
                MofNCompleteColumn(),
                Remaining(),
                TextColumn("{task.fields[logs]}"),
                console=Console(file=self.stream),
            )
            self.bar.start()
            self.task = self.bar.add_task(
                state.name, total=state.total_steps, completed=state.step, logs=""
            )

    def on_log(self, state: TrainState, logs: dict[str, float]) -> None:
        text = "  ".join(
            f"{label} {form.format(logs[key])}" for key, label, form in self.COLUMNS if key in logs
        )
        if self.bar is not None:
            self.bar.update(self.task, completed=state.step, logs=text)
            return
        now = time.monotonic()
        if now - self.printed >= self.every or state.step == state.total_steps:
            self.printed = now
            left = (now - self.started) / (state.step - self.first_step)
            left *= state.total_steps - state.step
            head = f"{state.name}  step {state.step}/{state.total_steps}  "
            print(head + f"{text}  ETA {_clock(left)}", file=self.stream, flush=True)

    def on_train_end(self, state: TrainState) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=state.step)
            self.bar.stop()


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ticker(label: str, every: float = 10.0) -> Callable[[int], None]:
    """Prints "{label}  {count}" at most every so many seconds: for work of unknown length."""
    printed = time.monotonic()

    def tick(count: int) -> None:
        nonlocal printed
        if time.monotonic() - printed >= every:
            printed = time.monotonic()
            print(f"{label}  {count:,}", file=sys.stderr, flush=True)

    return tick


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
