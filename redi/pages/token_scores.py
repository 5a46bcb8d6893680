"""The same right and wrong traces under two models: the log-prob of every trained token, twice."""

import gc
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from redi.data.detokenize import token_texts
from redi.data.read import Example
from redi.data.tokenize import Trace, tokenize_examples
from redi.errors import RediError


@dataclass(frozen=True)
class ScoredTrace:
    """The T trained tokens of a trace: its completion and the stop token."""

    is_chosen: bool
    prompt: str  # as the model sees it
    texts: tuple[str, ...]
    kinds: tuple[str, ...]  # of KINDS
    before_T: np.ndarray  # log-probs, float32
    after_T: np.ndarray
    parting: int  # tokens that it begins with as its partner does; T if it has none

    @property
    def change_T(self) -> np.ndarray:
        return self.after_T - self.before_T


@dataclass(frozen=True)
class ScoredExample:
    id: str
    traces: list[ScoredTrace]  # chosen, rejected; one may be missing

    @property
    def size(self) -> float:
        """How far it has moved: the larger mean change per token."""
        return max(abs(float(trace.change_T.mean())) for trace in self.traces)


KINDS = ("numbers", "symbols", "words", "white space", "special")


def score(
    before: str, after: str, examples: Sequence[Example], max_tokens_per_batch: int = 16384
) -> tuple[list[ScoredExample], int]:
    """(every example under both models, how many examples are too long or empty).

    Computes in float32, with the first model's chat template. One model is in memory at a time.
    Raises RediError for models that do not load, and for two tokenizers that differ.
    """
    from redi.config import TrainConfig
    from redi.training.model import load_model_config, load_tokenizer

    common = {"dataset_name": "none", "output_dir": "none", "use_liger_kernel": False}
    first, second = (TrainConfig(model_name_or_path=name, **common) for name in (before, after))
    tokenizer = load_tokenizer(first)
    if tokenizer.get_vocab() != load_tokenizer(second).get_vocab():
        raise RediError(f"{before} and {after}: their tokenizers differ, so no token compares")
    contexts = [
        getattr(load_model_config(config).get_text_config(), "max_position_embeddings", None)
        for config in (first, second)
    ]
    max_length = min((context for context in contexts if context), default=None)
    data = tokenize_examples(examples, tokenizer, max_length=max_length)
    traces = [trace for both in data.traces for trace in both]
    scores = zip(
        *(_log_probs(config, traces, max_tokens_per_batch) for config in (first, second)),
        strict=True,
    )
    scored = [
        ScoredExample(
            name,
            [_scored(tokenizer, trace, *next(scores), parting=_parting(both)) for trace in both],
        )
        for name, both in zip(data.example_ids, data.traces, strict=True)
    ]
    return scored, len(data.dropped)


def _log_probs(config: Any, traces: list[Trace], max_tokens: int) -> list[np.ndarray]:
    """Of every trace's trained tokens, under one model."""
    import torch

    from redi.data.pack import IGNORE_INDEX, pack_traces
    from redi.training.model import load_model, token_logps
    from redi.training.selfcheck import keep_apart

    device = "cuda" if torch.cuda.is_available() else "cpu"
    longest = max((len(trace.input_ids) for trace in traces), default=2)
    config = config.model_copy(update={"max_length": longest})
    model = load_model(config, device=device).to(device).eval()
    keep_apart(model, max_tokens)
    numbered = [replace(trace, example=i) for i, trace in enumerate(traces)]
    found: dict[int, np.ndarray] = {}
    for pack, logp_T in token_logps(model, pack_traces(numbered, max_tokens)):
        trained_T = (pack.targets_T != IGNORE_INDEX).cpu().numpy()
        values_T, ends = logp_T.float().cpu().numpy(), pack.cu_seqlens.tolist()
        for number, start, end in zip(pack.examples, ends, ends[1:], strict=False):
            found[number] = values_T[start:end][trained_T[start:end]]
    del model
    gc.collect()
    return [found[i] for i in range(len(traces))]


def _parting(both: Sequence[Trace]) -> int | None:
    """Tokens that the two completions begin with together."""
    if len(both) < 2:
        return None
    a, b = (trace.input_ids[trace.num_prompt_tokens :] for trace in both)
    size = min(len(a), len(b))
    differ = np.flatnonzero(a[:size] != b[:size])
    return int(differ[0]) if len(differ) else size


def _scored(
    tokenizer: Any, trace: Trace, before_T: np.ndarray, after_T: np.ndarray, *, parting: int | None
) -> ScoredTrace:
    ids = trace.input_ids.tolist()
    start = trace.num_prompt_tokens
    texts = tuple(token_texts(tokenizer, ids[start:]))
    special = set(tokenizer.all_special_ids) | {ids[-1]}
    kinds = tuple(
        "special" if token in special else kind_of(text)
        for token, text in zip(ids[start:], texts, strict=True)
    )
    prompt = tokenizer.decode(ids[:start], clean_up_tokenization_spaces=False)
    if parting is None:
        parting = len(texts)
    return ScoredTrace(trace.is_chosen, prompt, texts, kinds, before_T, after_T, parting)


def kind_of(text: str) -> str:
    """Which of KINDS an ordinary token is; part of a character counts as a word's."""
    if any(c.isalpha() for c in text) or not text:
        return "words"
    if any(c.isdigit() for c in text):
        return "numbers"
    return "symbols" if text.strip() else "white space"
