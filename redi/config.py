"""What a recipe may say, checked before any work starts (redi/recipe.py reads the file).

A recipe for `redi run` is a `RunConfig`; a recipe for `redi train` is a `TrainConfig`. Field names
are Hugging Face's where it has one.
"""

import re
import warnings
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, field_validator, model_validator

from redi.recipe import Strict

DEFAULT_BETA, DEFAULT_GAMMA = {"dpo": 0.1, "simpo": 2.0}, 1.0


def _has_slot(template: str) -> str:
    if "{problem}" not in template:
        raise ValueError("must contain {problem}")
    return template


def _some_steps(max_steps: int) -> int:
    if max_steps == 0:
        raise ValueError("0 steps train nothing; -1 stands for what num_train_epochs says")
    return max_steps


def _is_a_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9](?:[\w.+ -]*[\w+-])?", name):
        raise ValueError(
            f"{name!r} cannot name a folder of the run: use letters, digits, space or one of -_+."
        )
    return name


def _is_a_url(text: str) -> str:
    parts = urlsplit(text)  # raises ValueError by itself for [ without ]
    if parts.scheme not in ("http", "https") or not parts.hostname or re.search(r"\s", text):
        raise ValueError(f"{text!r} is no address of a server, as http://localhost:8000/v1")
    return text


# Folders and files are called so.
FolderName = Annotated[str, AfterValidator(_is_a_name)]
# What a run's folder holds besides its arms.
RESERVED = {"pretrain", "sft", "data", "task", "eval", "plots", "recipe.yaml", "results.md",
            "results.html", "curves.png"}  # fmt: skip
PromptTemplate = Annotated[str, AfterValidator(_has_slot)]  # the user's turn
Seed = Annotated[int, Field(ge=0, lt=2**32)]  # what every generator takes
Name = Annotated[str, Field(min_length=1)]  # of a path or a model: "" would be the current folder


# The paper's rules (arXiv 2505.24850, its data scripts); docs/data.md says what each one does.
PAPER_DATA: dict[str, Any] = {
    "judges": "both",
    "missing_verdict": "wrong",
    "exclude_sources": ["cn_k12"],
    "duplicates": "keep",
    "unfinished": "keep",
    "length_rule": "paper",
    "max_prompt_length": 800,
    "max_completion_length": 19000,
    "shuffle_seed": 42,
}


class DataConfig(Strict):
    """`redi data build`: raw generations (or ready rows) to positives.parquet and pairs.parquet."""

    path: Name = Field(
        description="file, folder or glob of .jsonl (.gz, .zst), .parquet or .arrow; or a dataset "
        "on the Hub: owner/name[:config][@split]"
    )
    preset: Literal["paper"] | None = Field(
        None, description="the paper's rules; fields given beside it win"
    )
    judges: Literal["both", "any", "math_verify"] = Field(
        "both",
        description="a trace is correct iff both / any of its judges, or math-verify, say so",
    )
    missing_verdict: Literal["judge", "wrong"] = Field(
        "judge",
        description="where a judge gave none: math-verify decides / the trace counts as wrong",
    )
    exclude_sources: list[str] = Field([], description="drop rows whose `source` is one of these")
    duplicates: Literal["drop", "keep"] = Field(
        "drop",
        description="of a problem that is there already / every row by itself; with drop, rows of "
        "the same problem and answer are joined: one trace each is enough for a pair",
    )
    unfinished: Literal["drop", "keep"] = Field(
        "drop", description="traces with <think> and no </think>: they were cut off"
    )
    unpaired: Literal["drop", "keep"] = Field(
        "drop",
        description="keep: a problem with right or wrong traces only gives pairs.parquet a row "
        "with one side, which REDI trains on too",
    )
    decontaminate: list[str] = Field(
        [], description="evaluation sets that problems are compared with (paths as `path`)"
    )
    contaminated: Literal["report", "drop"] = Field(
        "report", description="problems that share 8 words in a row with an evaluation set"
    )
    max_length: int | None = Field(
        None, gt=1, description="drop longer traces (tokens, prompt included)"
    )
    max_prompt_length: int | None = Field(None, gt=0, description="drop longer prompts (tokens)")
    max_completion_length: int | None = Field(
        None, gt=0, description="drop longer completions (tokens, stop token included)"
    )
    length_rule: Literal["next", "paper"] = Field(
        "next",
        description="next: the next trace that fits takes a too long one's place; paper: lengths "
        "drop pairs only, after the first traces were chosen, and are counted as its scripts do",
    )
    shuffle_seed: Seed | None = Field(
        None, description="order the rows as datasets.Dataset.shuffle(seed) would"
    )
    system_prompt: str | None = Field(None, description="system message put before every problem")
    prompt_template: PromptTemplate = Field(
        "{problem}", description="the user's turn; {problem} is replaced"
    )
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="values for the template's switches, as enable_thinking: true",
    )
    num_workers: int | None = Field(None, ge=1, description="processes; default: CPU cores")
    verify_timeout: float = Field(5.0, gt=0, description="seconds allowed to judge one answer")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, content: Any) -> Any:
        is_paper = isinstance(content, dict) and content.get("preset") == "paper"
        return PAPER_DATA | content if is_paper else content

    @property
    def counts_tokens(self) -> bool:
        return bool(self.max_length or self.max_prompt_length or self.max_completion_length)

    @property
    def joins_rows(self) -> bool:
        """Whether a right and a wrong trace of one problem may come from two rows. The paper's rule
        of lengths is about the pair of one row."""
        return self.duplicates == "drop" and self.length_rule == "next"


# The paper's final numbers (arXiv 2505.24850, section 3.3, C.5; its evaluation script). Its chat
# template for evaluation leaves out the line break before <think>, which training has; ours not.
PAPER_EVAL: dict[str, Any] = {
    "num_samples": 16,
    "temperature": 0.6,
    "top_p": 0.95,
    "max_new_tokens": 30720,
    "grader": "rllm",
    "system_prompt": r"Please reason step by step, and put your final answer within \boxed{}.",
    "answer_prefix": "<think>\n",
    "prompt_template": (
        "Solve the following math problem efficiently and clearly.  The last line of your response "
        "should be of the following format: 'Therefore, the final answer is: $\\boxed{ANSWER}$. I "
        "hope it is correct' (without quotes) where ANSWER is just the final number or expression "
        "that solves the problem. Think step by step before answering.\n\n{problem}"
    ),
}


class EvalConfig(Strict):
    """`redi eval`: sample answers and grade them."""

    preset: Literal["paper"] | None = Field(
        None, description="the paper's settings, prompts and grader; fields given beside it win"
    )
    dataset_name: Name | None = Field(
        None, description="rows with a problem (or prompt, question) and its answer"
    )
    benchmarks: list[str] | None = Field(
        None, description="instead of dataset_name: names of benchmarks, as math500,aime24"
    )
    data_dir: Name | None = Field(
        None, description="folder with the benchmarks' files; default: from the Hub"
    )
    pairs_name: Name | None = Field(
        None, description="held-out pairs whose log-probs per token are compared"
    )
    num_samples: int = Field(4, ge=1, description="samples per problem")
    temperature: float = Field(0.6, ge=0, description="0 is greedy")
    top_p: float = Field(0.95, gt=0, le=1)
    max_new_tokens: int = Field(4096, ge=1)
    max_problems: int | None = Field(None, ge=1, description="only the first so many problems")
    batch_size: int = Field(64, ge=1, description="samples generated at once")
    max_tokens_per_batch: int = Field(16384, ge=1, description="tokens scored at once (pairs_name)")
    seed: Seed = 0
    grader: Literal["math_verify", "rllm"] = Field(
        "math_verify", description="rllm: the stricter rule of the paper's final numbers"
    )
    verify_timeout: float = Field(5.0, gt=0)
    num_workers: int | None = Field(None, ge=1)
    system_prompt: str | None = None
    prompt_template: PromptTemplate = "{problem}"
    answer_prefix: str = Field("", description="how every answer begins, as <think>")
    chat_template_kwargs: dict[str, Any] = Field(
        default_factory=dict,
        description="values for the template's switches, as enable_thinking: true",
    )
    # engine
    engine: Literal["transformers", "openai"] = Field(
        "transformers", description="openai: a server that speaks its protocol, as vLLM's"
    )
    base_url: Annotated[str, AfterValidator(_is_a_url)] | None = Field(
        None, description="openai: as http://localhost:8000/v1"
    )
    api: Literal["chat", "completions"] = Field(
        "chat", description="openai: /chat/completions, or /completions for a base model"
    )
    api_key_env: str = Field(
        "OPENAI_API_KEY", description="openai: environment variable that holds the key, if any"
    )
    concurrency: int = Field(64, ge=1, description="openai: requests in flight")
    request_timeout: float = Field(
        1800.0, gt=0, description="openai: seconds to wait for one answer"
    )
    max_retries: int = Field(8, ge=0, description="openai: of one request, with growing pauses")

    @model_validator(mode="before")
    @classmethod
    def _preset(cls, content: Any) -> Any:
        is_paper = isinstance(content, dict) and content.get("preset") == "paper"
        return PAPER_EVAL | content if is_paper else content

    @field_validator("benchmarks", mode="before")
    @classmethod
    def _names(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",")] if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_source(self) -> "EvalConfig":
        if (self.dataset_name is None) == (self.benchmarks is None):
            raise ValueError("give exactly one of dataset_name and benchmarks")
        if self.benchmarks is None and self.data_dir is not None:
            raise ValueError("data_dir: only with benchmarks")
        return self

    @model_validator(mode="after")
    def _greedy_is_one_sample(self) -> "EvalConfig":
        if self.temperature == 0 and self.num_samples > 1:
            raise ValueError("temperature 0 gives the same answer each time; set num_samples to 1")
        return self

    @model_validator(mode="after")
    def _server_is_named(self) -> "EvalConfig":
        if (self.engine == "openai") != (self.base_url is not None):
            raise ValueError("engine: openai and base_url go together")
        if self.engine == "openai" and self.pairs_name is not None:
            raise ValueError("pairs_name: needs the model's log-probs; use engine: transformers")
        return self


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
