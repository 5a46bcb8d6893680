"""Varlen attention for packs, registered with transformers as `redi_varlen`.

A pack holds traces end to end in one row, so attention must stop at their boundaries. No mask is
ever built: stock SDPA or eager attention with a mask either needs T*T numbers or mixes neighbouring
traces silently (transformers#46634). CUDA uses FlashAttention's varlen kernel; elsewhere SDPA runs
per trace, or on short traces of similar length side by side.
"""

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from redi.errors import RediError

NAME = "redi_varlen"
# Softcapped or windowed traces are attended to in blocks of this many queries: a block's scores
# (block x keys) bound the memory, as the backward computes them again, and a window the keys.
QUERY_BLOCK = 512
# What some families give their attention besides q, k and v, nothing here computes, and short
# traces do not show: which keys are seen, where there are more than so many. (What they do show,
# as attention sinks, redi/training/selfcheck.py finds by the numbers.)
FOREIGN = ("indices", "block_indices")
FLASH_HEAD = 256  # the widest head that FlashAttention takes
SHORT = 64  # tokens; up to here a call of SDPA costs more than the padding that saves it


def register() -> None:
    """Makes `attn_implementation="redi_varlen"` known to transformers. Idempotent.

    No mask function is registered beside it: then transformers makes no mask. With one, even one
    that returns None, it would first search `position_ids` for packs, and so wait for the device.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, varlen_attention)


def varlen_attention(
    module: torch.nn.Module,
    q_1ATD: Tensor,
    k_1KTD: Tensor,
    v_1KTD: Tensor,
    attention_mask: None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    ends_S: Tensor | None = None,
    seqlens: tuple[int, ...] | None = None,
    **more: Any,
) -> tuple[Tensor, None]:
    """Causal attention inside each trace of a pack; transformers' attention-function protocol.

    Args:
        q_1ATD, k_1KTD, v_1KTD: one packed row; A query heads, K key/value heads (A % K == 0).
        sliding_window: a token sees itself and the `sliding_window - 1` before it.
        ends_S: `Pack.cu_seqlens`, int32 [S + 1], on the device of q. Not by that name, which
            kernels of recurrent families read too: see `PackedLM`.
        seqlens: the traces' lengths on the host, so that nothing here waits for the device.
            Without these two, which some families' blocks do not hand on, the row is one trace.

    Returns: [1, T, A, D] and None (no attention weights).
    """
    if attention_mask is not None:
        raise ValueError("redi_varlen takes no attention mask: boundaries come from ends_S")
    foreign = [name for name in FOREIGN if more.get(name) is not None]
    if foreign:
        raise RediError(
            f"{type(module).__name__} gives its attention {', '.join(foreign)}, which redi does not"
            " compute: this family cannot be trained here"
        )
    q_TAD, k_TKD, v_TKD = (z[0].transpose(0, 1) for z in (q_1ATD, k_1KTD, v_1KTD))
    if seqlens is None or ends_S is None:  # redi/training/selfcheck.py finds that packs would mix
        seqlens = (q_TAD.shape[0],)
        ends_S = torch.tensor((0, *seqlens), dtype=torch.int32, device=q_TAD.device)
    longest = max(seqlens)
    flash = _flash_varlen() if q_TAD.is_cuda and _fits_flash(q_TAD, v_TKD) else None
    if flash is not None:
        out_TAD = flash(
            q_TAD, k_TKD, v_TKD, ends_S, ends_S, longest, longest,
            softmax_scale=scaling, causal=True, softcap=softcap or 0.0,
            window_size=(sliding_window - 1, 0) if sliding_window else (-1, -1),
        )  # fmt: skip
    else:
        attend = functools.partial(_attend, scaling=scaling, window=sliding_window, softcap=softcap)
        if longest <= SHORT and len(seqlens) * longest <= 2 * q_TAD.shape[0]:
            out_TAD = _side_by_side(attend, q_TAD, k_TKD, v_TKD, seqlens)
        else:
            traces = zip(*(z.split(seqlens) for z in (q_TAD, k_TKD, v_TKD)), strict=True)
            out_TAD = torch.cat([attend(*(z[None] for z in trace))[0] for trace in traces])
    return out_TAD[None], None


def _fits_flash(q_TAD: Tensor, v_TKD: Tensor) -> bool:
    """FlashAttention takes half precision and heads of one size: not DeepSeek's values."""
    narrow = q_TAD.dtype in (torch.float16, torch.bfloat16)
    return narrow and q_TAD.shape[-1] == v_TKD.shape[-1] <= FLASH_HEAD


@functools.cache
def _flash_varlen() -> Callable | None:
    if importlib.util.find_spec("flash_attn") is None:
        return None
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func


def _side_by_side(attend: Callable, q_TAD, k_TKD, v_TKD, seqlens: tuple[int, ...]) -> Tensor:
    """All traces as one right-padded batch. Causality alone keeps real tokens from seeing the
    padding behind them, so no mask is needed; the padding at most doubles the tokens."""
    row_T = _rows_in_padded_batch(seqlens, q_TAD.device)
    shape = (len(seqlens), max(seqlens))
    padded = (
        _Pad.apply(z, row_T, shape[0] * shape[1]).unflatten(0, shape) for z in (q_TAD, k_TKD, v_TKD)
    )
    return _Unpad.apply(attend(*padded).flatten(0, 1), row_T)


@functools.lru_cache(maxsize=64)
def _rows_in_padded_batch(seqlens: tuple[int, ...], device: torch.device) -> Tensor:
    longest = max(seqlens)
    rows = [torch.arange(n) + i * longest for i, n in enumerate(seqlens)]
    return torch.cat(rows).to(device, non_blocking=True)


class _Pad(torch.autograd.Function):
    """z[T, ...] -> [rows, ...] with zeros between; its gradient is a plain gather (index_copy's own
    would be as good, but _Unpad's would be a slow index_add, so the two are written as a pair)."""

    @staticmethod
    def forward(ctx, z_T, row_T, rows):
        ctx.row_T = row_T
        return z_T.new_zeros(rows, *z_T.shape[1:]).index_copy_(0, row_T, z_T)

    @staticmethod
    def backward(ctx, grad):
        return grad.index_select(0, ctx.row_T), None, None


class _Unpad(torch.autograd.Function):
    @staticmethod
    def forward(ctx, z, row_T):
        ctx.row_T, ctx.rows = row_T, z.shape[0]
        return z.index_select(0, row_T)

    @staticmethod
    def backward(ctx, grad_T):
        return grad_T.new_zeros(ctx.rows, *grad_T.shape[1:]).index_copy_(0, ctx.row_T, grad_T), None


def _attend(q_BLAD, k_BLKD, v_BLKD, *, scaling, window, softcap) -> Tensor:
    """Causal attention of B equally long rows: [B, L, A, D] -> [B, L, A, D]."""
    q, k, v = (z.transpose(1, 2) for z in (q_BLAD, k_BLKD, v_BLKD))
    length = q.shape[2]
    if softcap is None and (window is None or window >= length):
        groups = q.shape[1] // k.shape[1]
        if groups > 1 and q.is_cuda and q.dtype == torch.float32:
            # with enable_gqa only the kernel with T*T scores would take these
            k, v, groups = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1), 1
        gqa = groups > 1
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=gqa)
        return out.transpose(1, 2)
    scaling = scaling if scaling is not None else q.shape[-1] ** -0.5
    attend = functools.partial(_attend_block, scaling=scaling, window=window, softcap=softcap)
    if torch.is_grad_enabled() and length > QUERY_BLOCK:
        attend = functools.partial(
            checkpoint, attend, use_reentrant=False, preserve_rng_state=False
        )
    blocks = [attend(q, k, v, start) for start in range(0, length, QUERY_BLOCK)]
    return torch.cat(blocks, 2).transpose(1, 2)


def _attend_block(
    q: Tensor, k: Tensor, v: Tensor, start: int, *, scaling: float, window, softcap
) -> Tensor:
    """Of the queries from `start` on: [B, A, block, D]."""
    stop = min(start + QUERY_BLOCK, q.shape[2])
    first = 0 if window is None else max(0, start - window + 1)
    groups = q.shape[1] // k.shape[1]
    k, v = (z[:, :, first:stop].repeat_interleave(groups, 1) for z in (k, v))
    scores = (q[:, :, start:stop] @ k.transpose(2, 3)).float() * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    query, key = (torch.arange(n, stop, device=q.device) for n in (start, first))
    distance = query[:, None] - key
    hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1).to(q.dtype) @ v
