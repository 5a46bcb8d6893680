"""`report_to`: the rows of metrics.jsonl sent to a tracker as well. All are optional packages."""

import hashlib
import importlib
from typing import Any

from redi.config import TrainConfig
from redi.errors import RediError
from redi.training.logging import Callback, TrainState

PROJECT = "redi"


def trackers(config: TrainConfig, name: str) -> list[Callback]:
    """The callback that `report_to` asks for, if any. Raises RediError when it is not installed."""
    if config.report_to == "none":
        return []
    kind = TensorBoard if config.report_to == "tensorboard" else Hosted
    try:
        return [kind(config, name)]
    except ImportError:
        package = config.report_to
        raise RediError(f"report_to: {package} is not installed: pip install {package}") from None


class TensorBoard(Callback):
    """Event files in `output_dir/tensorboard`."""

    def __init__(self, config: TrainConfig, name: str):
        self.make = importlib.import_module("torch.utils.tensorboard").SummaryWriter

    def on_train_begin(self, state: TrainState) -> None:
        # purge: what a killed run logged after the saved step is hidden, as in metrics.jsonl
        folder = state.output_dir / "tensorboard"
        self.writer = self.make(str(folder), purge_step=state.step + 1)

    def on_log(self, state: TrainState, logs: dict[str, float]) -> None:
        for key, value in logs.items():
            if key != "step":
                self.writer.add_scalar(key, value, state.step)

    def on_train_end(self, state: TrainState) -> None:
        self.writer.close()


class Hosted(Callback):
    """trackio and wandb, which share init, log and finish. One run an output_dir: it is continued
    when training is."""

    def __init__(self, config: TrainConfig, name: str):
        self.module = importlib.import_module(config.report_to)
        self.config, self.name = config, name

    def on_train_begin(self, state: TrainState) -> None:
        place = hashlib.sha256(str(state.output_dir.resolve()).encode()).hexdigest()[:8]
        options: dict[str, Any] = {"name": f"{self.name}-{place}", "resume": "allow"}
        if self.config.report_to == "wandb":
            options |= {"id": options["name"], "dir": str(state.output_dir)}
        self.module.init(project=PROJECT, config=self.config.model_dump(), **options)

    def on_log(self, state: TrainState, logs: dict[str, float]) -> None:
        self.module.log({k: v for k, v in logs.items() if k != "step"}, step=state.step)

    def on_train_end(self, state: TrainState) -> None:
        self.module.finish()
