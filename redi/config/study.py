"""`redi study`: what is compared with what."""

from typing import Any, Literal

from pydantic import Field, model_validator

from redi.config.kinds import FolderName, Name, Seed
from redi.recipe import Strict


class StudyArm(Strict):
    """What a study compares: one objective on one kind of rows, at each of some learning rates."""

    settings: dict[str, Any] = Field(
        default_factory=dict, description="TrainConfig fields besides the learning rate"
    )
    own: list[Literal["chosen", "rejected"]] = Field(
        default_factory=list,
        description="sides of the pairs to replace by the SFT model's own right, wrong samples",
    )
    learning_rates: list[float] = Field(
        min_length=2, description="to sweep; best 1 and 3 times powers of ten, as extensions are"
    )


class StudyConfig(Strict):
    """`redi study`: tasks x arms x learning rates x seeds, to one JSON."""

    output_dir: Name = Field(description="models and logs; may be lost, the results are enough")
    results: Name = Field(description="JSON of all cells; what is in it is not done again")
    tasks: dict[FolderName, str] = Field(
        description="recipes of `redi run` by name; their arms are not used"
    )
    arms: dict[FolderName, StudyArm]
    baseline: str = "control"
    sweep_seed: Seed = Field(0, description="chooses the rates, on the validation split")
    seeds: list[Seed] = Field(description="meet the test split")
    max_extensions: int = Field(2, ge=0, description="of a grid whose best rate is at its edge")
    followed: list[str] = Field(
        default_factory=list,
        description="arms whose accuracy is measured on the way too, on the sweep's seed: at their "
        "best rate and at the highest one",
    )
    num_points: int = Field(6, ge=1, description="of such a curve, besides the start")

    @model_validator(mode="after")
    def _consistent(self) -> "StudyConfig":
        if self.baseline not in self.arms:
            raise ValueError(f"baseline {self.baseline!r} is none of the arms {sorted(self.arms)}")
        if self.sweep_seed in self.seeds:
            raise ValueError(f"seed {self.sweep_seed} chooses the rates: it cannot test them too")
        if "sft" in self.arms:
            raise ValueError("an arm cannot be called sft")
        unknown = sorted(set(self.followed) - set(self.arms))
        if unknown:
            raise ValueError(f"followed: {unknown[0]!r} is none of the arms {sorted(self.arms)}")
        return self
