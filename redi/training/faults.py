"""What ends a run early or makes it skip a step: signals, and numbers that are not finite."""

import contextlib
import json
import signal
import time
from collections.abc import Sequence
from typing import Any

from redi.data.tokenize import Tokenized
from redi.errors import RediError
from redi.files import write_text
from redi.training.logging import TrainState, say

AGAIN = 1.0  # seconds: an earlier Ctrl-C is the same one, passed on by a launcher
MAX_SKIPPED = 10  # steps in a row; then it is not a batch that is bad


class StopRequest:
    """Notes SIGINT and SIGTERM, for the loop to end between two steps; a second Ctrl-C ends it at
    once. (A second SIGTERM does not: a scheduler tells every process, then the launcher tells its
    ranks again.)"""

    def __init__(self) -> None:
        self.asked_at: float | None = None
        self.exit_code = 0  # of a process that the signal ends
        self.previous: dict[int, Any] = {}

    @property
    def asked(self) -> bool:
        return self.asked_at is not None

    def __enter__(self) -> "StopRequest":
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # not the main thread: the caller's business
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.asked_at is None:
            self.asked_at = now
            self.exit_code = 130 if number == signal.SIGINT else 0
            say("stopping after this step (Ctrl-C again to stop at once, without saving)")
        elif number == signal.SIGINT and now - self.asked_at >= AGAIN:
            raise KeyboardInterrupt


def nonfinite_step(
    state: TrainState,
    data: Tokenized,
    indices: Sequence[int],
    numbers: dict[str, float],
    *,
    skip: bool,
    is_main: bool,
) -> None:
    """Names and saves the batch whose loss or gradient is not finite; the weights are untouched.

    Writes output_dir/nonfinite/step-N.json: `numbers`, and each example's id and token ids. Then
    notes the step as skipped, or raises RediError: when not told to `skip`, or when the
    MAX_SKIPPED - 1 steps before were skipped too.
    """
    step = state.step + 1
    ids = [data.example_ids[i] for i in indices]
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    file = state.output_dir / "nonfinite" / f"step-{step}.json"
    what = f"step {step}: " + ", ".join(f"{name} {value}" for name, value in numbers.items())
    what += f"; examples: {', '.join(ids[:8])}{more}"
    if is_main:
        content = {
            "step": step,
            **{name: str(value) for name, value in numbers.items()},  # JSON has no NaN
            "examples": [
                {
                    "id": data.example_ids[i],
                    "traces": [
                        {
                            "is_chosen": trace.is_chosen,
                            "num_prompt_tokens": trace.num_prompt_tokens,
                            "input_ids": trace.input_ids.tolist(),
                        }
                        for trace in data.traces[i]
                    ],
                }
                for i in indices
            ],
        }
        try:
            file.parent.mkdir(exist_ok=True)
            write_text(file, json.dumps(content) + "\n")
            what += f", saved in {file}"
        except OSError as error:
            what += f", NOT saved: {error}"
    state.skipped.append(step)
    in_a_row = state.skipped[-MAX_SKIPPED:] == list(range(step - MAX_SKIPPED + 1, step + 1))
    if not skip or in_a_row:
        raise RediError(
            f"{what}. Training stopped before the weights changed; what is saved in "
            f"{state.output_dir} is good. Lower learning_rate, look at these examples, or set "
            "nonfinite: skip" + (f" (it is: {MAX_SKIPPED} steps in a row)" if skip else "")
        )
    if is_main:
        say(f"WARNING: skipped {what}")
