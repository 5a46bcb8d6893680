"""Accuracy on the way: a stage's model at some of its steps, each evaluated as its end is."""

from pathlib import Path
from typing import Any

import numpy as np

from redi.config import EvalConfig
from redi.evaluation.evaluate import evaluate
from redi.evaluation.results import EvalResult
from redi.training.distributed import full_tensors
from redi.training.logging import Callback, TrainState
from redi.training.model import load_tokenizer_from
from redi.training.start import quietly


class Snapshots(Callback):
    """Keeps the model as it was at `num_points` even steps, the last one among them, each as a
    folder that `evaluate` takes. For runs of one process: it saves what this one holds."""

    def __init__(self, folder: Path, tokenizer: str, num_points: int):
        self.folder, self.num_points = folder, num_points
        self.tokenizer: Any = load_tokenizer_from(tokenizer)

    def on_step_end(self, state: TrainState) -> None:
        if state.step in np.linspace(0, state.total_steps, self.num_points + 1).round()[1:]:
            folder = self.folder / f"step-{state.step}"
            with quietly():
                weights = full_tensors(state.model.state_dict(keep_vars=True))
                state.model.save_pretrained(folder, state_dict=weights)
            self.tokenizer.save_pretrained(folder)

    def evaluate(self, config: EvalConfig) -> dict[int, EvalResult]:
        """By step; also of snapshots that an earlier start of the run left."""
        folders = {int(f.name.split("-")[1]): f for f in self.folder.glob("step-*")}
        return {
            step: evaluate(f, config, f / "eval", replace=True)
            for step, f in sorted(folders.items())
        }
