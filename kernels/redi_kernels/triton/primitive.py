"""Log-probs whose coefficients arrive in the backward: 1 U forward, 3 U backward (U = 2 T V H).

Forward: the logits matmul leaves statistics per tile; a reduce makes log-probs of them.
Backward: for each slice of the vocabulary, recompute the logits into a slab of d(logits) (1 U),
then dW of the slice = slab^T X (1 U, each row of dW finished at once) and dX += slab W (1 U).

Why a slab, and why slices of the vocabulary. A tile of d(logits) feeds one tile of dX and one of
dW, but a program can own only one of them. Without atomics or locks that leaves two kernels that
each recompute (5 U, no slab) or a slab in memory (4 U). In bf16 the slab is written once and read
twice, 6 T V bytes: 30 GB or 10 ms of HBM time at T = 32k, V = 152k, H = 1536 (H100, modelled),
in the shadow of 57 ms of matmuls. The fifth U would cost 19 ms in no shadow.
A slab of S elements makes T V / S rounds. Slices of tokens would read and write an fp32 dW each
round (8 V H bytes), slices of the vocabulary an fp32 dX (8 T H): cheaper while T < V.
"""

import torch
import triton
from torch import Tensor

from redi_kernels.triton import launch
from redi_kernels.triton.launch import Problem, Slab, Statistics

FORWARD_TOKENS = 16384  # bounds the table of statistics: 12 V / BLOCK_V bytes per token


def forward(problem: Problem) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp_T, lse_T, entropy_T, correct_T): fp32 and bool."""
    T = problem.sizes[0]
    logp_T, lse_T, entropy_T = problem.new(T), problem.new(T), problem.new(T)
    correct_T = problem.new(T, dtype=torch.bool)
    for first in range(0, T, FORWARD_TOKENS):
        chunk = problem.chunk(first, first + FORWARD_TOKENS)
        rows = slice(first, first + chunk.sizes[0])
        stats = Statistics.empty(chunk, entropy=True)
        launch.logits(chunk, stats)
        launch.finish(chunk, stats, logp_T[rows], lse_T[rows], entropy_T[rows], correct_T[rows])
    return logp_T, lse_T, entropy_T, correct_T


def backward(
    problem: Problem, logp_T: Tensor, lse_T: Tensor, dlogp_T: Tensor, dlse_T: Tensor,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(dx_TH, dw_VH, db_V) of sum(dlogp * logp + dlse * lse); None where not needed."""
    p, config = problem, problem.config
    T, V, H = p.sizes
    if T == 0:
        return zero_gradients(p, needs)
    needs_x, needs_w, needs_bias = needs
    # d logp / dz = onehot - p and d lse / dz = p. The target's 1 - p comes from logp, where it does
    # not cancel as p -> 1.
    a_T = dlse_T - dlogp_T
    target_T = dlse_T * logp_T.exp() - dlogp_T * logp_T.expm1()
    if p.softcap is not None:
        target_T = target_T * (1 - ((logp_T + lse_T) / p.softcap) ** 2)
    per_slice = slice_columns(p)
    dx_TH = p.new(T, H, dtype=p.x_TH.dtype) if needs_x else None
    acc_TH = running_sum(dx_TH, num_pieces=triton.cdiv(V, per_slice))
    dw_VH = p.new(V, H, dtype=p.w_VH.dtype) if needs_w else None
    db_V = torch.zeros_like(p.bias_V, dtype=torch.float32) if needs_bias else None
    slab_TV = p.slab(per_slice)
    for first_v in range(0, V, per_slice):
        num_v = min(per_slice, V - first_v)
        is_first, is_last = first_v == 0, first_v + num_v == V
        launch.logits(p, slab=Slab(slab_TV, lse_T, a_T), first_v=first_v, num_v=num_v)
        launch.patch(p, slab_TV, target_T, first_v, num_v)
        if dw_VH is not None:
            launch.matmul(
                config, config.dw, slab_TV, p.x_TH, dw_VH[first_v : first_v + num_v],
                transposed=True, num_k=T, alpha=p.logit_scale,
            )  # fmt: skip
        if dx_TH is not None:
            launch.matmul(
                config, config.dx, slab_TV, p.w_VH, dx_TH if is_last else acc_TH,
                transposed=False, first_k=first_v, num_k=num_v, alpha=p.logit_scale,
                acc_MN=None if is_first else acc_TH,
            )  # fmt: skip
        if db_V is not None:
            launch.column_sum(slab_TV, None, db_V[first_v : first_v + num_v], T)
    return dx_TH, dw_VH, db_V.to(p.bias_V.dtype) if db_V is not None else None


def zero_gradients(problem: Problem, needs: tuple[bool, bool, bool]) -> tuple[Tensor | None, ...]:
    """What no tokens give."""
    wanted = zip(needs, (problem.x_TH, problem.w_VH, problem.bias_V), strict=True)
    return tuple(torch.zeros_like(m) if need else None for need, m in wanted)


def slice_columns(problem: Problem) -> int:
    """Columns of a slab within `slab_bytes`, in whole tiles of both kernels that cut it up."""
    T, V, _ = problem.sizes
    tiles = problem.config
    unit = problem.slab_unit
    fitting = tiles.slab_bytes // (T * problem.x_TH.element_size()) // unit * unit
    return min(max(fitting, tiles.min_slice), launch.padded(V, unit))


def running_sum(out: Tensor | None, num_pieces: int) -> Tensor | None:
    """Where a sum in pieces lives between them: the output itself if it is fp32, else a buffer."""
    if out is None or num_pieces == 1:
        return None
    return out if out.dtype == torch.float32 else torch.empty_like(out, dtype=torch.float32)
