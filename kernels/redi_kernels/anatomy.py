"""Where a transformers causal LM keeps its parts: found by structure, as families name them apart.

What is found is taken on trust here; `modelcheck` compares what the parts compute with the model's
own loss and logits.
"""

from typing import Any

from torch import nn


def body_of(lm: Any) -> Any:
    """The module whose last hidden states the head reads: `.model`, or what transformers calls the
    base model (`.transformer`, `.gpt_neox`, `.backbone`, ...). Raises TypeError where there is
    none."""
    body = getattr(lm, "model", None)
    if body is None and getattr(lm, "base_model", lm) is not lm:
        body = lm.base_model
    if not isinstance(body, nn.Module):
        raise TypeError(f"{type(lm).__name__}: no causal LM with a base model and a head on it")
    return body


def output_layer(lm: Any) -> Any:
    """The module that turns hidden states into logits: `.lm_head`, or what transformers calls the
    output embeddings. Raises TypeError where there is none."""
    head = getattr(lm, "lm_head", None)
    if head is None and hasattr(lm, "get_output_embeddings"):
        head = lm.get_output_embeddings()
    if not isinstance(head, nn.Module):
        raise TypeError(f"{type(lm).__name__}: no causal LM with a base model and a head on it")
    return head


def blocks_of(lm: Any) -> nn.ModuleList:
    """The blocks of the language model (not of an image or sound encoder beside it): the largest
    list of modules in its decoder. Raises TypeError where there is none."""
    body = body_of(lm)
    decoder = lm.get_decoder() if hasattr(lm, "get_decoder") else body
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise TypeError(f"{type(lm).__name__}: its decoder has no list of blocks")
    return max(lists, key=lambda blocks: sum(p.numel() for p in blocks.parameters()))
