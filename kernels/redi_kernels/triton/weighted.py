"""Gradient of sum_t weight_t logp_t, made in the forward: 3 U (logits, dX, dW), no recomputation.

Per chunk of tokens all of d(logits) = weight (onehot - softmax) is needed before any of it can be
used, and softmax needs lse, known only at the end of the logits matmul. Keeping the logits in bf16
until then would cost 2^-9 |z| in every exponent; a second pass over the slab would cost 4 bytes per
element. Neither is needed. Let c_t be any number near lse_t, and store

    g_tv = exp(z_tv - c_t)                      bf16 keeps 2^-9 *relative* precision at any size
    Z_t  = sum_v g_tv = exp(lse_t - c_t)        in fp32, from the statistics of the same matmul
    s_t  = -weight_t / Z_t

Then softmax = g / Z, and with one element per row patched in fp32, g_ty = Z_t (p_y - 1),
d(logits)_tv = s_t g_tv: a row scale, which commutes with both matmuls.

    dX_t = s_t sum_v g_tv W_v                   scaled in the epilogue
    dW_v = sum_t g_tv (s_t x_t)                 x scaled beforehand, T H elements

c_t is the target's own logit, one dot product, below lse by exactly the token's negative log
likelihood: exp(z - c) stays in range for any token likelier than exp(-LIMIT). Row blocks with an
unlikelier one are done again with c = lse, which the device decides by itself, without a sync.

Traffic per chunk of C tokens: slab 6 C V bytes, and dW's fp32 accumulator 8 V H bytes: the chunk
should be long. At C = 1152 (slab 350 MB, V = 152k, H = 1536) the accumulator moves 1.9 GB beside
1.6 TFLOP, on an H100 0.6 ms beside 2.0 ms (modelled). It moves in epilogues, which only the next
tile's loads overlap, so part of it shows: where memory allows, a slab of 1.2 GB (C = 4096) makes it
a quarter. bench/gpu_check.py times both; the default keeps to 0.4 GB.
"""

import torch
import triton
from torch import Tensor

from redi_kernels.triton import launch, reduce
from redi_kernels.triton.config import fitting
from redi_kernels.triton.launch import Fused, Problem, Slab, Statistics
from redi_kernels.triton.primitive import Pieces, zero_gradients

LIMIT = 40.0  # exp(40) = 2e17: far inside the range of fp32 and bf16, scaled by any sane weight


def weighted(
    problem: Problem, weight_T: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(logp_T, dx_TH, dw_VH, db_V); None where not needed."""
    p, config = problem, problem.config
    T, V, _ = p.sizes
    if T == 0:
        return p.new(0), *zero_gradients(p, needs)
    per_chunk = chunk_tokens(p)
    logp_T = p.new(T)
    dx_TH = torch.empty_like(p.x_TH) if needs[0] else None
    dw = Pieces(torch.empty_like(p.w_VH), triton.cdiv(T, per_chunk)) if needs[1] else None
    db_V = p.new(V).zero_() if needs[2] else None
    slab_TV = p.chunk(0, per_chunk).slab(V)
    for first in range(0, T, per_chunk):
        chunk = p.chunk(first, first + per_chunk)
        num_t = chunk.sizes[0]
        rows = slice(first, first + num_t)
        scale_T, patch_T, _ = softmax(chunk, slab_TV, weight_T[rows], logp_T[rows])
        launch.patch(chunk, slab_TV, patch_T, 0, V)
        if dx_TH is not None:
            launch.matmul(
                config, config.dx, slab_TV, p.w_VH, dx_TH[rows], transposed=False, num_k=V,
                scale_M=scale_T, alpha=p.logit_scale,
            )  # fmt: skip
        if dw is not None:
            xs_TH = (chunk.x_TH * scale_T[:, None]).to(chunk.x_TH.dtype)
            so_far, out = dw.next()
            launch.matmul(
                config, config.dw, slab_TV, xs_TH, out, transposed=True, num_k=num_t,
                alpha=p.logit_scale, acc_MN=so_far,
            )  # fmt: skip
        if db_V is not None:
            launch.column_sum(slab_TV, scale_T, db_V, num_t)
    return logp_T, dx_TH, dw.out if dw else None, db_V


def softmax(
    chunk: Problem, slab_TV: Tensor, weight_T: Tensor, logp_T: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Row scales s, targets' elements Z (p_y - 1) and targets' logits of one chunk; fills slab_TV
    with Z p and logp_T."""
    (T, V, H), x = chunk.sizes, chunk.x_TH
    c_T, scale_T, patch_T = chunk.new(T), chunk.new(T), chunk.new(T)
    reduce.anchor_kernel[(triton.cdiv(T, 16),)](
        x, chunk.w_VH, chunk.y_T, chunk.bias_V, c_T, T, V, H, x.stride(0), chunk.w_VH.stride(0),
        chunk.logit_scale, chunk.softcap or 0.0, BLOCK_T=16, BLOCK_H=128,
        HAS_BIAS=chunk.bias_V is not None, HAS_SOFTCAP=chunk.softcap is not None,
    )  # fmt: skip
    stats = Statistics.empty(chunk, entropy=False)
    launch.logits(chunk, stats, Slab(slab_TV, c_T))
    active = chunk.new(triton.cdiv(T, chunk.config.logits.m), dtype=torch.int32)
    rows = Fused(weight_T, c_T, active, scale_T, patch_T, LIMIT)
    launch.finish(chunk, stats, logp_T, fused=rows)
    launch.logits(chunk, slab=Slab(slab_TV, c_T, active=active))
    return scale_T, patch_T, stats.target_T


def chunk_tokens(problem: Problem) -> int:
    """Tokens per chunk: a slab over the whole vocabulary within `slab_bytes`, in whole tiles of the
    matmuls that have tokens as rows."""
    T, V, H = problem.sizes
    config = problem.config
    unit = max(config.logits.m, fitting(config.dx, H).m)
    room = config.slab_bytes // (V * problem.x_TH.element_size()) // unit * unit
    return min(max(room, unit), launch.padded(T, unit))
