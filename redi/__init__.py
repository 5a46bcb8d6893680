"""REDI: reinforcement distillation of a strong reasoning model into a small one (arXiv 2505.24850).

    import redi
    redi.train({"model_name_or_path": ..., "dataset_name": ..., "output_dir": ...})

Names are loaded when first used, so that importing redi costs nothing and needs no extra.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

from redi.errors import RediError

if TYPE_CHECKING:
    from redi.config import DataConfig, EvalConfig, RunConfig, TrainConfig
    from redi.data.build import build
    from redi.evaluation.evaluate import evaluate
    from redi.run import run
    from redi.training.logging import Callback
    from redi.training.loop import train

_HOME = {
    "DataConfig": "redi.config",
    "EvalConfig": "redi.config",
    "RunConfig": "redi.config",
    "TrainConfig": "redi.config",
    "build": "redi.data.build",
    "evaluate": "redi.evaluation.evaluate",
    "Callback": "redi.training.logging",
    "run": "redi.run",
    "train": "redi.training.loop",
}
__all__ = [
    "Callback",
    "DataConfig",
    "EvalConfig",
    "RediError",
    "RunConfig",
    "TrainConfig",
    "build",
    "evaluate",
    "run",
    "train",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version("reinforcement-distillation")
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    raise AttributeError(f"module 'redi' has no attribute {name!r}")
