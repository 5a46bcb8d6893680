"""`redi run`: the whole job."""

from typing import Any, Literal

from pydantic import Field, model_validator

from redi.config.data import DataConfig
from redi.config.evaluation import EvalConfig
from redi.config.kinds import FolderName, Name, Seed
from redi.recipe import Strict

# What a run's folder holds besides its arms.
RESERVED = {"pretrain", "sft", "data", "task", "eval", "plots", "recipe.yaml", "results.md",
            "results.html", "curves.png"}  # fmt: skip


class TaskConfig(Strict):
    """The generated arithmetic task of the demo (redi/data/arithmetic.py)."""

    teacher: Literal["habit", "slip", "check"] = Field(
        "habit",
        description="wrong traces show a habit that errs / are correct steps but for one slip / "
        "have slips that no recheck has caught",
    )
    num_problems: int = Field(3000, ge=1, description="training problems")
    num_generations: int = Field(8, ge=1, description="teacher traces per problem")
    num_pretrain: int = Field(
        16000, ge=0, description="clean step-by-step sums the student starts from"
    )
    num_validation: int = Field(500, ge=1)
    num_test: int = Field(1000, ge=1)
    seed: Seed = 0


class RunConfig(Strict):
    """`redi run`: data -> (pretrain) -> SFT -> arms -> evaluation -> table and curves."""

    name: str
    output_dir: Name
    seed: Seed = Field(0, description="of the task, every stage and the evaluation")
    task: TaskConfig | None = Field(
        None, description="generate this task instead of reading data.path"
    )
    data: DataConfig | None = None
    defaults: dict[str, Any] = Field(
        default_factory=dict, description="TrainConfig fields that every stage shares"
    )
    pretrain: dict[str, Any] | None = Field(
        None, description="TrainConfig fields; optional stage 0"
    )
    sft: dict[str, Any] = Field(description="TrainConfig fields of stage 1")
    arms: dict[FolderName, dict[str, Any]] = Field(
        description="TrainConfig fields of each stage-2 run, by name; all start from the SFT model"
    )
    eval: EvalConfig
    baseline: str | None = Field(None, description="arm that the others are compared with")

    @model_validator(mode="after")
    def _consistent(self) -> "RunConfig":
        if (self.task is None) == (self.data is None):
            raise ValueError("give exactly one of task (generate data) and data (read it)")
        if self.eval.benchmarks is not None:
            raise ValueError("eval.benchmarks: redi run takes eval.dataset_name; use redi eval")
        if self.baseline is not None and self.baseline not in {"sft", *self.arms}:
            raise ValueError(f"baseline {self.baseline!r} is none of the arms {sorted(self.arms)}")
        reserved = RESERVED & set(self.arms)
        if reserved:
            raise ValueError(f"arms cannot be called {sorted(reserved)}")
        return self
