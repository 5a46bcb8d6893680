"""`redi eval`: problems, sampling, grading, servers."""

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from redi.config.kinds import Name, PromptTemplate, Seed, Url
from redi.recipe import Strict

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
    base_url: Url | None = Field(None, description="openai: as http://localhost:8000/v1")
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
