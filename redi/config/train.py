"""`redi train`: one stage of training."""

import warnings
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from redi.config.kinds import Name, Seed
from redi.recipe import Strict

DEFAULT_BETA, DEFAULT_GAMMA = {"dpo": 0.1, "simpo": 2.0}, 1.0


def _some_steps(max_steps: int) -> int:
    if max_steps == 0:
        raise ValueError("0 steps train nothing; -1 stands for what num_train_epochs says")
    return max_steps


class TrainConfig(Strict):
    """`redi train`: one stage; SFT, REDI, or one of REDI's comparators, DPO and SimPO."""

    # model
    model_name_or_path: Name | None = Field(
        None, description="folder or hub name; None: from scratch"
    )
    model_revision: Name | None = None
    architecture: dict[str, Any] | None = Field(
        None,
        description="a config.json's content: trains from scratch if model_name_or_path is not "
        "set, and lets --dry-run work without the model's files",
    )
    tokenizer_name_or_path: Name | None = Field(None, description="default: model_name_or_path")
    chat_template: Name | None = Field(
        None, description="file with a Jinja chat template to use instead"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="values for the template's switches, as enable_thinking; exported",
    )
    rope_theta: float | None = Field(
        None, gt=0, description="overrides the model's, and is exported"
    )
    max_position_embeddings: int | None = Field(None, gt=0, description="as rope_theta")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the exported weights; training weights are always float32"
    )
    bf16: bool | None = Field(
        None,
        description="compute in bfloat16 over float32 master weights; default: on CUDA, not on CPU",
    )
    trust_remote_code: bool = False
    model_check: bool = Field(
        True,
        description="compare the model with its own forward when it is loaded, and its traces in a "
        "pack with each other; what differs is refused",
    )
    gradient_checkpointing: Literal["none", "selective", "full", "offload"] = Field(
        "none",
        description="full (or true): keep each block's input only and compute the block again; "
        "selective: keep attention's output too; offload: keep the input in host memory",
    )
    kept_blocks: int = Field(
        1, ge=0, description="selective: so many of the last blocks keep everything"
    )
    use_liger_kernel: bool | None = Field(
        None,
        description="Liger's RMSNorm, RoPE and SwiGLU; default: on CUDA if liger-kernel is there",
    )
    torch_compile: bool = Field(False, description="compile the norms and the MLP of each block")
    # data
    dataset_name: Name = Field(description="positives.parquet, pairs.parquet, or ready rows")
    max_length: int = Field(
        32768, gt=1, description="longer traces are dropped and counted, never cut"
    )
    max_prompt_length: int | None = Field(None, gt=0)
    expected_examples: int | None = Field(
        None, gt=0, description="rows the dataset should hold; used by --dry-run when it is absent"
    )
    # objective
    objective: Literal["sft", "redi", "dpo", "simpo"] = "redi"
    alpha: float = Field(0.8, ge=0, description="redi: weight of the rejected traces (paper Eq. 5)")
    beta: float | None = Field(
        None,
        gt=0,
        description="dpo, simpo: scale of the rewards; default: 0.1 for dpo, 2 for simpo",
    )
    simpo_gamma: float = Field(DEFAULT_GAMMA, ge=0, description="simpo: a pair's target margin")
    rejected_loss: Literal["logp", "unlikelihood"] = Field(
        "logp",
        description="redi: of a rejected token log p is pushed down, or -log(1 - p), which lets go "
        "of what is unlikely already",
    )
    rejected_floor: float | None = Field(
        None, lt=0, description="redi: rejected tokens whose log p is below are left alone"
    )
    rejected_tokens: Literal["all", "diverging"] = Field(
        "all",
        description="redi: diverging pushes down only from the first token that differs from the "
        "pair's chosen trace",
    )
    rejected_window: int | None = Field(
        None, ge=1, description="diverging: only so many tokens from there on"
    )
    loss_tolerance: float = Field(
        0.0, ge=0, description="fast mode of the loss; 0: exact gradients"
    )
    # optimisation
    output_dir: Name
    num_train_epochs: float = Field(1.0, gt=0)
    max_steps: Annotated[int, AfterValidator(_some_steps)] = Field(
        -1, ge=-1, description="-1: as num_train_epochs says"
    )
    train_batch_size: int = Field(32, ge=1, description="pairs (or traces) per step, over all GPUs")
    max_tokens_per_batch: int = Field(16384, ge=1, description="tokens per GPU in memory at once")
    learning_rate: float = Field(1e-6, gt=0)
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "linear"
    warmup_ratio: float = Field(0.1, ge=0, lt=1)
    weight_decay: float = Field(1e-4, ge=0)
    adam_beta1: float = Field(0.9, ge=0, lt=1)
    adam_beta2: float = Field(0.999, ge=0, lt=1)
    adam_epsilon: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0, allow_inf_nan=True, description=".inf: no clipping")
    nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="a step whose loss or gradient is NaN or inf: stop, or go on without it; "
        "its examples are named and saved either way",
    )
    seed: Seed = 42
    # watching
    logging_steps: int = Field(1, ge=1)
    report_to: Literal["none", "tensorboard", "trackio", "wandb"] = Field(
        "none", description="besides metrics.jsonl"
    )
    eval_dataset_name: Name | None = Field(None, description="held-out rows, as dataset_name's")
    eval_steps: int = Field(200, ge=1, description="and at the end")
    collapse_guard: Literal["off", "warn", "stop"] = Field(
        "warn", description="when the model loses what it knew: say so / save and stop"
    )
    # saving
    save_steps: int = Field(200, ge=1)
    save_total_limit: int = Field(2, ge=1)
    resume_from_checkpoint: bool | str = Field(
        "auto",
        description="auto: newest complete checkpoint in output_dir; false: start anew; a path",
    )

    @field_validator("gradient_checkpointing", mode="before")
    @classmethod
    def _checkpointing_as_in_transformers(cls, value: Any) -> Any:
        return ("full" if value else "none") if isinstance(value, bool) else value

    @field_validator("collapse_guard", mode="before")
    @classmethod
    def _yaml_reads_off_as_false(cls, value: Any) -> Any:
        return "off" if value is False else value

    @field_validator("alpha")
    @classmethod
    def _alpha_above_one(cls, value: float) -> float:
        if value > 1:
            warnings.warn(
                f"alpha = {value} pushes rejected traces harder than it pulls chosen ones; "
                "the paper's runs collapse at alpha = 1 already",
                stacklevel=2,
            )
        return value

    @model_validator(mode="after")
    def _model_is_given(self) -> "TrainConfig":
        if self.model_name_or_path is None and self.architecture is None:
            raise ValueError("set model_name_or_path, or architecture to train from scratch")
        if self.model_name_or_path is None and self.tokenizer_name_or_path is None:
            raise ValueError("training from scratch needs tokenizer_name_or_path")
        return self

    @model_validator(mode="after")
    def _kept_blocks_have_effect(self) -> "TrainConfig":
        if self.kept_blocks != 1 and self.gradient_checkpointing != "selective":
            raise ValueError("kept_blocks: only with gradient_checkpointing: selective")
        return self

    @model_validator(mode="after")
    def _beta_has_effect(self) -> "TrainConfig":
        if self.beta is not None and self.objective not in DEFAULT_BETA:
            raise ValueError(f"objective: {self.objective} has no beta; redi is weighed by alpha")
        if self.objective != "simpo" and self.simpo_gamma != DEFAULT_GAMMA:
            raise ValueError(f"objective: {self.objective} has no simpo_gamma")
        return self

    @model_validator(mode="after")
    def _rejected_fields_have_effect(self) -> "TrainConfig":
        for name in self._rejected_options():
            if self.objective != "redi" or self.alpha == 0:
                raise ValueError(f"{name}: only objective: redi, with alpha above 0, pushes down")
        if self.rejected_loss == "unlikelihood" and self.rejected_floor is not None:
            raise ValueError("rejected_floor: unlikelihood has no use for one; choose one of them")
        if self.rejected_window is not None and self.rejected_tokens != "diverging":
            raise ValueError("rejected_window: only with rejected_tokens: diverging")
        return self

    @property
    def beta_or_default(self) -> float:
        return DEFAULT_BETA[self.objective] if self.beta is None else self.beta

    @property
    def stage(self) -> str:
        """The objective in words."""
        if self.objective == "sft":
            return "SFT on right traces"
        if self.objective == "redi":
            options = {"alpha": self.alpha} | self._rejected_options()
            return ", ".join(["REDI", *(f"{name} = {value}" for name, value in options.items())])
        if self.objective == "dpo":
            return f"DPO, beta = {self.beta_or_default}"
        return f"SimPO, beta = {self.beta_or_default}, gamma = {self.simpo_gamma}"

    def _rejected_options(self) -> dict[str, Any]:
        """Those that are not at their default."""
        names = ("rejected_loss", "rejected_floor", "rejected_tokens", "rejected_window")
        defaults = {name: TrainConfig.model_fields[name].default for name in names}
        return {k: getattr(self, k) for k, v in defaults.items() if getattr(self, k) != v}
