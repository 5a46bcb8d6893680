"""`redi data build`: what is kept, and how it is judged."""

from typing import Any, Literal

from pydantic import Field, model_validator

from redi.config.kinds import Name, PromptTemplate, Seed
from redi.recipe import Strict

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
