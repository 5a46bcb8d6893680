"""What fast mode leaves out, and how it puts it back: what its backends share (`fast.py` tells the
whole story and is the CPU's; the GPU's is `triton/fast.py`).

    active_rows   the plan: which rows of the vocabulary a block of tokens needs
    basis         Q, the directions that stand for X in dW's tail
    put_back      the tail's stand-ins, once a call
    Report        what was left out

Nothing here waits for a device, or depends on the order of a sum that an atomic makes.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

LEAST_TOKENS = 256  # a shorter call is exact: it gains little, and few rows would tell its error
BUDGET = 2**-10.5  # at tolerance 1
MOMENTS = 32  # K: columns of the tail's moments
MAX_ACTIVE = 0.5  # share of a block's rows from which on it is done exactly
ERROR_PER_BUDGET = 2.5  # measured: 1.2 to 2.3, more where blocks are short
BASIS_TOKENS, BASIS_ROUNDS = 2048, 4  # enough to find the directions
BINS, PER_OCTAVE = 512, 8  # of the search for the threshold
ONE = 1 << 40  # in the search's integers
ROWS = 4096  # of a bf16 result widened at a time


def pays(num_tokens: int, H: int) -> bool:
    """Whether a call has something to gain. Narrow states would not: the moments' own columns cost
    as much as what is left out, whose errors point in a few directions and add up."""
    return num_tokens >= LEAST_TOKENS and H >= MOMENTS


@dataclass(frozen=True)
class Report:
    dropped_N: Tensor  # probability mass in rows that were not active
    active: Tensor  # rows computed over all rows: f
    error: Tensor  # of dX, relative: from above


def report(
    dropped_N: Tensor, computed: Tensor | int, V: int, left: Tensor, energy: Tensor
) -> Report:
    """`computed` elements of d(logits); the energy `left` out and the targets' own."""
    active = torch.zeros_like(energy) + computed / max(len(dropped_N) * V, 1)
    error = ERROR_PER_BUDGET * (left / energy.where(energy != 0, 1)).sqrt()
    return Report(dropped_N, active.to(dropped_N.dtype), error.to(dropped_N.dtype))


def active_rows(s_V: Tensor, y_N: Tensor, limit: Tensor) -> tuple[Tensor, Tensor]:
    """(which rows are active [V], the energy sum s^2 of the others): targets are, and what remains
    when rows are dropped from the smallest s up, to an energy of limit^2.

    A histogram in log2 s stands for a sort, which would take as long as the block's moments. Its
    energies are integers, so that no order of adding them changes a bit.
    """
    r_V = s_V.double() / limit.clamp(min=torch.finfo(torch.float64).tiny)
    r_V = r_V.index_fill(0, y_N, torch.inf)
    bin_V = (r_V.log2() * PER_OCTAVE + BINS).nan_to_num_(torch.inf).clamp_(0, BINS).long()
    energy_V = r_V.square_().clamp_(max=1).mul_(ONE).long()  # the last bin: s >= limit, or NaN
    cum_b = energy_V.new_zeros(BINS + 1).scatter_add_(0, bin_V, energy_V).cumsum(0)
    fits_b = cum_b[:BINS] <= ONE
    left = cum_b[:BINS].where(fits_b, 0).amax().double() / ONE
    return bin_V >= fits_b.sum(), left * limit.square()


def basis(x_NH: Tensor, other_N: Tensor) -> Tensor:
    """[H, K - 2]: orthonormal, close to the main directions of sum_t |other_t| x_t x_t^T; zeros
    behind the H-th column.

    Subspace iteration from fixed directions, on at most BASIS_TOKENS of the tokens.
    """
    H = x_NH.shape[1]
    step = max(len(x_NH) // BASIS_TOKENS, 1)
    x, a = x_NH[::step].float(), other_N[::step].float().abs()
    a = a / a.amax().clamp(min=torch.finfo(torch.float32).tiny) if len(a) else a
    h_H, k_K = (torch.arange(n, device=x.device) for n in (H, min(MOMENTS - 2, H)))
    q_HK = ((2 * h_H + 1)[:, None] * k_K * (math.pi / (2 * H))).cos()
    for _ in range(BASIS_ROUNDS):
        q_HK = torch.linalg.qr(x.T @ ((x @ q_HK) * a[:, None]) + 1e-30 * q_HK)[0]
    return F.pad(q_HK, (0, MOMENTS - 2 - len(k_K))).to(x_NH.dtype)


def put_back(
    moments_VK: Tensor,
    basis_HK: Tensor,
    lost_N: Tensor,
    w_VH: Tensor,
    scale: float,
    dx_NH: Tensor | None,
    dw_VH: Tensor | None,
    db_V: Tensor | None,
) -> None:
    """Adds the tail to the gradients: `lost_N` is the mass it took from each token, times that
    token's weight; `dw_VH` and `db_V` are accumulators, `dx_NH` is in the result's dtype."""
    up_V, down_V = moments_VK[:, 0], moments_VK[:, 1]
    if db_V is not None:
        db_V += up_V + down_V
    if dx_NH is not None and len(dx_NH):
        acc = moments_VK.dtype
        share_2V = torch.stack([m_V / m_V.sum().where(m_V.any(), 1) for m_V in (up_V, down_V)])
        mean_2H = (share_2V.to(w_VH.dtype) @ w_VH).to(acc) * scale
        for mean_H, part_N in zip(mean_2H, (lost_N.clamp(min=0), lost_N.clamp(max=0)), strict=True):
            for dx_nH, part_n in zip(dx_NH.split(ROWS), part_N.split(ROWS), strict=True):
                dx_nH.copy_(torch.addr(dx_nH.to(acc), part_n, mean_H))
    if dw_VH is not None:
        dw_VH.addmm_(moments_VK[:, 2:], basis_HK.T.to(dw_VH.dtype), alpha=scale)
