"""Batched sampling from a transformers causal LM: prompts in, completions out.

A loop of our own around the model's forward, because `model.generate` cannot do three things that
matter here: rows that are done leave the batch and the KV cache (one runaway answer does not cost a
whole batch), the samples of one problem share one prefill, and each sample draws from its own
stream of uniforms, so that it does not depend on its neighbours and two models meet the same draws.
Nor can a model folder's generation_config.json (top_k, repetition_penalty) leak into a measurement.
"""

import inspect
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

# Sorting a large vocabulary costs as much as a small model's forward, and the nucleus is nearly
# always among so many top tokens. When it is not, everything is sorted: exact either way.
NUCLEUS_GUESS = 256


class NotNumbers(Exception):
    """A prompt (its index) after which the model's logits are NaN or infinite."""

    def __init__(self, prompt: int, num_tokens: int) -> None:
        super().__init__(f"prompt {prompt} after {num_tokens} new tokens")
        self.prompt, self.num_tokens = prompt, num_tokens


def sample_tokens(logits_NV: Tensor, uniform_N: Tensor, temperature: float, top_p: float) -> Tensor:
    """Draws one token per row by inverting the CDF of its nucleus at `uniform_N` (in [0, 1)).

    The nucleus is transformers' (`TopPLogitsWarper`): the fewest most likely tokens whose
    probabilities reach `top_p`. Temperature 0 takes the most likely token. Returns int64 [N].
    """
    if temperature == 0:
        return logits_NV.argmax(dim=-1)
    logp_NV = (logits_NV.float() / temperature).log_softmax(dim=-1)
    num_tokens = logp_NV.shape[-1]
    num_sorted = num_tokens if top_p >= 1 else min(num_tokens, NUCLEUS_GUESS)
    while True:
        top_NK, order_NK = logp_NV.topk(num_sorted, dim=-1)  # most likely first
        prob_NK = top_NK.exp()
        cdf_NK = prob_NK.cumsum(dim=-1)
        if num_sorted == num_tokens or bool((cdf_NK[:, -1] >= top_p).all()):
            break
        num_sorted = num_tokens
    in_nucleus_NK = cdf_NK - prob_NK < top_p  # the tokens before this one do not reach top_p yet
    in_nucleus_NK[:, 0] = True
    last_N1 = in_nucleus_NK.sum(dim=-1, keepdim=True) - 1
    target_N1 = uniform_N[:, None].to(cdf_NK) * cdf_NK.gather(1, last_N1)
    choice_N1 = torch.searchsorted(cdf_NK, target_N1, right=True).minimum(last_N1)
    return order_NK.gather(1, choice_N1)[:, 0]


@torch.inference_mode()
def generate(
    model: Any,
    prompts: Sequence[Sequence[int]],
    uniform_NT: Tensor,
    *,
    stop_ids: Collection[int],
    temperature: float,
    top_p: float,
    on_finished: Callable[[int], Any] = lambda count: None,
) -> list[list[int]]:
    """Samples a completion of at most T tokens for each of N prompts.

    `uniform_NT` (float32 in [0, 1)) holds the draws. Equal prompts are prefilled once. A completion
    ends with the first token of `stop_ids`, which it includes; any other ran out of tokens.
    `on_finished` hears how many completions ended, whenever some do; N in all. Raises NotNumbers.
    """
    device = model.device
    num_rows, max_new_tokens = uniform_NT.shape
    uniform_NT = uniform_NT.to(device)
    stops = torch.tensor(sorted(stop_ids), device=device)
    ids, mask, row_of = _left_pad(prompts)
    ids, mask, row_of = ids.to(device), mask.to(device), row_of.to(device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    cache = DynamicCache(config=model.config)
    named_cache = {_name_of_cache(model): cache}

    def next_logits(ids: Tensor) -> Tensor:
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            **named_cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1]

    logits = next_logits(ids)[row_of]
    cache.batch_select_indices(row_of)
    mask, positions = mask[row_of], positions[row_of, -1:]
    sampled_NT = torch.full((num_rows, max_new_tokens), -1, device=device)
    alive = torch.arange(num_rows, device=device)  # which completion a row of the batch belongs to
    open_rows = torch.ones(num_rows, dtype=torch.bool, device=device)
    num_open = num_rows
    for step in range(max_new_tokens):
        # a logit of -inf is a token ruled out; the largest is finite, or nothing is right
        is_bad = open_rows & ~logits.amax(dim=-1).isfinite()
        if bool(is_bad.any()):
            raise NotNumbers(int(alive[is_bad][0]), step)
        tokens = sample_tokens(logits, uniform_NT[alive, step], temperature, top_p)
        sampled_NT[alive, step] = tokens
        open_rows = open_rows & ~torch.isin(tokens, stops)
        keep = open_rows.nonzero()[:, 0]
        if len(keep) < num_open:
            on_finished(num_open - len(keep))
            num_open = len(keep)
        if num_open == 0 or step + 1 == max_new_tokens:
            break
        if num_open < 0.9 * len(alive):  # not at every end: it copies the cache
            cache.batch_select_indices(keep)
            mask, positions, tokens = mask[keep], positions[keep], tokens[keep]
            alive, open_rows = alive[keep], open_rows[keep]
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        positions = positions + 1
        logits = next_logits(tokens[:, None])
    if num_open:
        on_finished(num_open)
    return [_until_stop(row, stop_ids) for row in sampled_NT.tolist()]


def _left_pad(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor, Tensor]:
    """The distinct prompts as ids and mask [D, width], and the row [N] of each prompt."""
    distinct: dict[tuple[int, ...], int] = {}
    row_of = [distinct.setdefault(tuple(prompt), len(distinct)) for prompt in prompts]
    width = max(len(prompt) for prompt in distinct)
    ids = torch.zeros(len(distinct), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(distinct):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask, torch.tensor(row_of)


def _until_stop(tokens: list[int], stop_ids: Collection[int]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in stop_ids:
            return tokens[: i + 1]
    return tokens


def _name_of_cache(model: Any) -> str:
    """What a model's forward calls its cache: transformers renamed it in 5.24 and warns of the old
    name."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"
