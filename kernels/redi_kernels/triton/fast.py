"""Fast mode on a GPU (`tolerance > 0`): 1 + 2f U for weights known beforehand, 2 + 2f U for the
primitive. What is left out and how it comes back is told in `redi_kernels/fast.py`; here is how a
GPU does it without the host ever waiting for it.

A chunk of tokens (weighted.py) is the plan's block. Its slab holds Z p when its logits are done:

    moments     M_VK = slab^T s [1+ 1- X Q], a matmul with 32 columns: reads the slab once
    plan        torch ops over [V]: which rows are active, their list, how many there are
    compact     the slab's active columns move to its left, in place
    dX, dW      the exact mode's matmuls over those columns alone, W's rows by the list

The number of active rows is data. It stays on the device: the matmuls' programs read it and those
with nothing to do end at once. To ask for it instead would cost a wait per chunk, and no graph
could be captured; room for a fixed number of rows would either be too little or be computed in
full. A chunk with too many active rows gets the list of all rows, which is exact mode: no second
path, 1 + 2 U and the moments.

No atomics on floats: a row of dW is its tile's own, one chunk after the other.
"""

import dataclasses

import torch
from torch import Tensor

from redi_kernels import fast_plan
from redi_kernels.fast_plan import MAX_ACTIVE, Report
from redi_kernels.triton import launch
from redi_kernels.triton.launch import Listed, Problem
from redi_kernels.triton.weighted import chunk_tokens, softmax

TINY = 2**-24  # weight of a token's softmax that its target's own gradient does not feel


def gradients(
    problem: Problem,
    dlogp_T: Tensor,
    dlse_T: Tensor,
    needs: tuple[bool, bool, bool],
    tolerance: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Report]:
    """(logp_T, dx_TH, dw_VH, db_V, report) of sum(dlogp * logp + dlse * lse)."""
    p = problem
    T, V, _ = p.sizes
    logp_T, per_chunk = p.new(T), max(chunk_tokens(p), 1)
    sparse = _Sparse(p, dlse_T - dlogp_T, needs, tolerance)
    slab_TV = p.chunk(0, per_chunk).slab(V)
    for first in range(0, T, per_chunk):
        chunk, rows = p.chunk(first, first + per_chunk), slice(first, min(first + per_chunk, T))
        inv_z_T, _, z_T = softmax(chunk, slab_TV, -torch.ones_like(logp_T[rows]), logp_T[rows])
        # d logp / dz = onehot - p and d lse / dz = p: a factor of p, and the target's own column
        target_T = dlse_T[rows] * logp_T[rows].exp() - dlogp_T[rows] * logp_T[rows].expm1()
        # The target's element is patched later. Until then it is 0: where the model is sure, its
        # rounding is many times what lies outside the active rows.
        used_TV = slab_TV[: len(z_T), :V]
        used_TV.scatter_(1, chunk.y_T[:, None], 0)
        total_T = -logp_T[rows].expm1() / inv_z_T
        if p.softcap is not None:
            target_T = target_T * (1 - (z_T / p.softcap) ** 2)
            total_T = used_TV.sum(dim=1, dtype=torch.float32)
        sparse.add(chunk, rows, slab_TV, inv_z_T, total_T, target_T)
    return logp_T, *sparse.result()


class _Sparse:
    """Gradients from chunks of the slab: G = slab * other / Z, but for the targets' elements."""

    def __init__(
        self,
        problem: Problem,
        other_T: Tensor,
        needs: tuple[bool, bool, bool],
        tolerance: float,
    ) -> None:
        self.problem = p = problem
        self.other_T = other_T
        self.budget = tolerance * fast_plan.BUDGET
        T, V, H = p.sizes
        self.dx_TH = torch.empty_like(p.x_TH) if needs[0] else None
        self.dw_VH = p.new(V, H).zero_() if needs[1] else None
        self.db_V = p.new(V).zero_() if needs[2] else None
        self.basis_HK = fast_plan.basis(p.x_TH, other_T)
        self.moments_VK = p.new(V, fast_plan.MOMENTS).zero_()
        self.block_VK = torch.empty_like(self.moments_VK)
        self.dropped_T = p.new(T)
        self.left = self.energy = self.computed = p.new(dtype=torch.float64).zero_()

    def add(
        self,
        chunk: Problem,
        rows: slice,
        slab_TV: Tensor,
        inv_z_T: Tensor,
        total_T: Tensor,
        target_T: Tensor,
    ) -> None:
        T = len(target_T)
        # where the softmax has no weight (dlse = dlogp), the target's element still needs a scale
        floor_T = target_T.abs() * TINY
        other_T = self.other_T[rows]
        scale_T = other_T.where(other_T.abs() >= floor_T, floor_T) * inv_z_T
        listed, place_V = self._plan(chunk, slab_TV, scale_T, target_T)
        lost_T = launch.compact(chunk, slab_TV, listed, total_T)
        self.dropped_T[rows] = lost_T * inv_z_T
        patch_T = (target_T / scale_T).where(scale_T != 0, 0)
        moved = dataclasses.replace(chunk, y_T=place_V[chunk.y_T])
        launch.patch(moved, slab_TV, patch_T, 0, slab_TV.shape[1])
        self._multiply(chunk, rows, slab_TV, scale_T, listed)
        self.computed = self.computed + listed.count * T

    def _plan(
        self, chunk: Problem, slab_TV: Tensor, scale_T: Tensor, target_T: Tensor
    ) -> tuple[Listed, Tensor]:
        """The active rows, and each row's place among them; keeps the others' moments."""
        T, V, _ = chunk.sizes
        x_TH, config = chunk.x_TH, chunk.config
        signs_T2 = torch.stack([scale_T > 0, scale_T < 0], dim=1)
        f_TK = torch.cat([signs_T2.float(), (x_TH @ self.basis_HK).float()], dim=1)
        f_TK = (f_TK * scale_T[:, None]).to(x_TH.dtype)
        launch.matmul(
            config, config.dw, slab_TV, f_TK, self.block_VK, transposed=True, num_k=T
        )  # fmt: skip
        energy = target_T.double().square().sum()
        active_V, left = fast_plan.active_rows(
            self.block_VK[:, 0] - self.block_VK[:, 1], chunk.y_T, self.budget * energy.sqrt()
        )
        too_many = active_V.sum() > MAX_ACTIVE * V
        active_V |= too_many
        self.left, self.energy = self.left + left.where(~too_many, 0), self.energy + energy
        self.moments_VK.addcmul_(self.block_VK, (~active_V).float()[:, None])
        index_V = torch.nonzero_static(active_V, size=V)[:, 0]
        return Listed(index_V, active_V.sum().int()), active_V.cumsum(0) - 1

    def _multiply(
        self, chunk: Problem, rows: slice, slab_TV: Tensor, scale_T: Tensor, listed: Listed
    ) -> None:
        """Active rows, as exact mode does all rows."""
        (T, V, _), config, alpha = chunk.sizes, chunk.config, chunk.logit_scale
        if self.dx_TH is not None:
            launch.matmul(
                config, config.dx, slab_TV, chunk.w_VH, self.dx_TH[rows], transposed=False,
                num_k=V, scale_M=scale_T, alpha=alpha, listed=listed,
            )  # fmt: skip
        if self.dw_VH is not None:
            xs_TH = (chunk.x_TH * scale_T[:, None]).to(chunk.x_TH.dtype)
            launch.matmul(
                config, config.dw, slab_TV, xs_TH, self.dw_VH, transposed=True, num_k=T,
                alpha=alpha, acc_MN=self.dw_VH, listed=listed,
            )  # fmt: skip
        if self.db_V is not None:
            launch.column_sum(slab_TV, scale_T, self.db_V, T, listed)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Report]:
        """Puts the tail back, rounds once."""
        p = self.problem
        lost_T = self.dropped_T * self.other_T
        fast_plan.put_back(
            self.moments_VK, self.basis_HK, lost_T, p.w_VH, p.logit_scale,
            self.dx_TH, self.dw_VH, self.db_V,
        )  # fmt: skip
        dw_VH = None if self.dw_VH is None else self.dw_VH.to(p.w_VH.dtype)
        report = fast_plan.report(
            self.dropped_T, self.computed, len(p.w_VH), self.left, self.energy
        )
        return self.dx_TH, dw_VH, self.db_V, report
