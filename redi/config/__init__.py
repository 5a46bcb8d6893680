"""What a recipe may say, checked before any work starts (redi/recipe.py reads the file).

A recipe for `redi run` is a `RunConfig`; a recipe for `redi train` is a `TrainConfig`. Field names
are Hugging Face's where it has one. One file a section.
"""

from redi.config.data import DataConfig
from redi.config.evaluation import EvalConfig
from redi.config.run import RunConfig, TaskConfig
from redi.config.study import StudyArm, StudyConfig
from redi.config.train import TrainConfig

__all__ = [
    "DataConfig",
    "EvalConfig",
    "RunConfig",
    "StudyArm",
    "StudyConfig",
    "TaskConfig",
    "TrainConfig",
]
