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

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
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
) -> Gradients:  # fmt: skip
    """(dx_TH, dw_VH, db_V) of sum(dlogp * logp + dlse * lse); None where not needed."""
    p, config = problem, problem.config
    T, V, _ = p.sizes
    if T == 0:
        return zero_gradients(p, needs)
    # d logp / dz = onehot - p and d lse / dz = p. The target's 1 - p comes from logp, where it does
    # not cancel as p -> 1.
    a_T = dlse_T - dlogp_T
    target_T = dlse_T * logp_T.exp() - dlogp_T * logp_T.expm1()
    if p.softcap is not None:
        target_T = target_T * (1 - ((logp_T + lse_T) / p.softcap) ** 2)
    per_slice = slice_columns(p)
    dx = Pieces(torch.empty_like(p.x_TH), triton.cdiv(V, per_slice)) if needs[0] else None
    dw_VH = torch.empty_like(p.w_VH) if needs[1] else None
    db_V = p.new(V).zero_() if needs[2] else None
    slab_TV = p.slab(per_slice)
    for first_v in range(0, V, per_slice):
        num_v = min(per_slice, V - first_v)
        columns = slice(first_v, first_v + num_v)
        launch.logits(p, slab=Slab(slab_TV, lse_T, a_T), first_v=first_v, num_v=num_v)
        launch.patch(p, slab_TV, target_T, first_v, num_v)
        if dw_VH is not None:
            launch.matmul(
                config, config.dw, slab_TV, p.x_TH, dw_VH[columns], transposed=True, num_k=T,
                alpha=p.logit_scale,
            )  # fmt: skip
        if dx is not None:
            so_far, out = dx.next()
            launch.matmul(
                config, config.dx, slab_TV, p.w_VH, out, transposed=False, first_k=first_v,
                num_k=num_v, alpha=p.logit_scale, acc_MN=so_far,
            )  # fmt: skip
        if db_V is not None:
            launch.column_sum(slab_TV, None, db_V[columns], T)
    return dx.out if dx else None, dw_VH, db_V


def slice_columns(problem: Problem) -> int:
    """Columns of a slab within `slab_bytes`, in whole tiles of both kernels that cut it up."""
    T, V, _ = problem.sizes
    unit = problem.slab_unit
    fitting = problem.config.slab_bytes // (T * problem.x_TH.element_size()) // unit * unit
    return min(max(fitting, problem.config.min_slice), launch.padded(V, unit))


def zero_gradients(problem: Problem, needs: tuple[bool, bool, bool]) -> Gradients:
    """What no tokens give."""
    x_TH, w_VH = problem.x_TH, problem.w_VH
    dx_TH = torch.zeros_like(x_TH) if needs[0] else None
    dw_VH = torch.zeros_like(w_VH) if needs[1] else None
    return dx_TH, dw_VH, problem.new(len(w_VH)).zero_() if needs[2] else None


class Pieces:
    """An output whose sum arrives in pieces: fp32 between them, one rounding at the last."""

    def __init__(self, out: Tensor, num_pieces: int) -> None:
        in_place = out.dtype == torch.float32 or num_pieces == 1
        self.out, self.left = out, num_pieces
        self.acc = out if in_place else torch.empty_like(out, dtype=torch.float32)
        self.so_far: Tensor | None = None

    def next(self) -> tuple[Tensor | None, Tensor]:
        """(the sum so far, if any, where the sum with the next piece goes)."""
        self.left -= 1
        so_far, self.so_far = self.so_far, self.acc
        return so_far, self.acc if self.left else self.out
