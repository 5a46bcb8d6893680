"""A run on the terminal: a live panel where there is one, elsewhere a plain line now and then."""

import sys
import time
from typing import Any, TextIO

from redi.training.logging import PARTS, Callback, TrainState

LINE = (
    ("loss", "loss", "{:.4f}"),
    ("logps/chosen", "chosen", "{:.3f}"),
    ("logps/rejected", "rejected", "{:.3f}"),
    ("grad_norm", "grad", "{:.2f}"),
    ("tokens_per_second", "tok/s", "{:,.0f}"),
    ("skipped_steps", "skipped", "{:.0f}"),
)
PANEL = (
    (
        *LINE[:4],
        ("learning_rate", "rate", "{:.2e}"),
    ),
    (
        ("logps/stop", "stop", "{:.3f}"),
        ("entropy", "entropy", "{:.3f}"),
        ("rejected_below_1e-4", "rejected < 1e-4", "{:.1%}"),
        ("alarms", "ALARMS", "{}"),
    ),
    (
        ("eval_loss", "held-out loss", "{:.4f}"),
        ("eval_logps/chosen", "chosen", "{:.3f}"),
        ("eval_logps/rejected", "rejected", "{:.3f}"),
    ),
    (
        *LINE[4:],
        ("mfu", "MFU", "{:.0%}"),
        ("memory/peak_gib", "peak GiB", "{:.1f}"),
    ),
)


class Screen(Callback):
    """`every`: seconds between two plain lines."""

    def __init__(self, stream: TextIO | None = None, every: float = 10.0):
        self.stream, self.every = stream or sys.stderr, every
        self.live: Any = None
        self.printed = self.started = 0.0
        self.first_step = 0
        self.latest: dict[str, float] = {}  # held-out figures and alarms stay until the next ones

    def on_train_begin(self, state: TrainState) -> None:
        self.started, self.first_step = time.monotonic(), state.step
        self.printed = self.started - self.every  # the first step is always worth a line
        if self.stream.isatty():
            from rich.console import Console
            from rich.live import Live

            self.live = Live(console=Console(file=self.stream), refresh_per_second=4)
            self.live.start()

    def on_log(self, state: TrainState, logs: dict[str, float]) -> None:
        if self.live is not None:
            kept = {k: v for k, v in self.latest.items() if not k.startswith("time/")}
            self.latest = kept | logs
            self.live.update(self.panel(state))
            return
        now = time.monotonic()
        if now - self.printed >= self.every or state.step == state.total_steps:
            self.printed = now
            head = f"{state.name}  step {state.step}/{state.total_steps}  "
            tail = f"{_cells(LINE, logs)}  ETA {self._eta(state)}"
            print(head + tail, file=self.stream, flush=True)

    def on_train_end(self, state: TrainState) -> None:
        if self.live is not None:
            self.live.stop()

    def panel(self, state: TrainState) -> Any:
        """What the terminal shows: progress, log-probs, health, held-out figures, speed, time."""
        from rich.panel import Panel
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        lines = [_cells(cells, self.latest) for cells in PANEL]
        seconds = {part: self.latest.get(f"time/{part}", 0.0) for part in PARTS}
        total = sum(seconds.values()) or 1.0
        shares = [f"{part} {s / total:.0%}" for part, s in seconds.items() if s >= 0.005 * total]
        body = "\n".join(line for line in [*lines, "  ".join(shares)] if line)
        grid = Table.grid(expand=True)
        grid.add_row(ProgressBar(total=state.total_steps, completed=state.step))
        grid.add_row(body)
        title = f"{state.name}  {state.step}/{state.total_steps}  ETA {self._eta(state)}"
        return Panel(grid, title=title, title_align="left")

    def _eta(self, state: TrainState) -> str:
        each = (time.monotonic() - self.started) / max(state.step - self.first_step, 1)
        minutes, seconds = divmod(round(each * (state.total_steps - state.step)), 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _cells(cells: tuple[tuple[str, str, str], ...], logs: dict[str, float]) -> str:
    return "  ".join(f"{name} {form.format(logs[key])}" for key, name, form in cells if key in logs)
