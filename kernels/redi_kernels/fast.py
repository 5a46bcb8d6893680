"""Fast mode on a CPU (`tolerance > 0`): the loss and its gradients for about one logits matmul.

Nearly all of softmax - onehot is tiny. Per block of B tokens (cpu.py) a vocabulary row is *active*
if it matters to some token of the block; G's active rows are gathered and multiplied as always, the
rest of G, the tail, is put back by two cheap stand-ins. Instead of 3 U it costs

    1 U    a look at all logits (scan.py): in int8, where the CPU has it, in 1/4 (fp32) to 1/2
           (bf16) of U's time; the active rows' logits, f U, are then made in fp32
    2 f U  active rows        f: their share, 0.03 to 0.1 on text a model knows
    K/H U  the tail's moments M_VK = G_tail [1+ 1- X Q]     K = 32, Q [H, K - 2]

* dW's tail is G_tail X. X Q Q^T stands in for X, where Q spans the directions that hold most of X:
  30 of SmolLM2's 576 hold 87% of its energy. Rows that are active in no block get dW within about
  11% of the truth under SFT's weights, 26% under signed ones.
* dX's tail is G_tail W. A token keeps the mass it lost, D_t = sum_v of its tail, and spends it on
  the mean row of W under the whole call's tail: sum_t dX_t, what a step sees, stays exact, or as
  exact as the look was. Tokens pushed up and pushed down (1+ and 1-: signed weights) have a mean
  each.
* db's tail is M's first two columns: as exact as the look.

The plan. s_v = sum_t |g_tv| over the block comes with M. Rows are dropped from the smallest s_v up,
until sum s_v^2 has reached (budget |g_target|)^2: a bound on the energy that leaves G, in terms of
the energy that is surely there. Measured on texts of 0.2 to 3.8 nats a token the error of dX is
then 1.2 to 2.3 budgets; 2^-10.5 keeps it within what rounding G to bf16 costs.
Targets are always active. A block with too many active rows is done exactly, and so are the next
REST blocks, without asking: on flat text the look would be paid for nothing. Nothing outlives the
call, so it does the same each time.

dW's active rows have sums of their own, so that the tail is written into a fresh dW, once, and no
[V, H] accumulator exists unless some block is done exactly.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from redi_kernels import fast_plan, scan
from redi_kernels.cpu import Blocks, Gradients, Statistics, target_gradient
from redi_kernels.fast_plan import MAX_ACTIVE, ROWS, Report
from redi_kernels.head import Head
from redi_kernels.scan import Scan

Needs = tuple[bool, bool, bool]
REST = 3  # blocks
PROBE, EVERY = 16, 4  # tokens of a call, and rows: every 4th
FLAT = 0.15  # of the rows, for half of those tokens: real texts need 0.09, random states 0.2
BF16_LOGIT = 8.0  # from this size on, logits rounded to bf16 cost at least twice what G's does


def gradients(
    x_NH: Tensor,
    w_VH: Tensor,
    y_N: Tensor,
    dlogp_N: Tensor,
    dlse_N: Tensor,
    head: Head,
    needs: Needs,
    tolerance: float,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Report]:
    """(logp_N, dx_NH, dw_VH, db_V, report): gradients of sum(dlogp * logp + dlse * lse).

    The fused path gives its weights as `dlogp_N`; the primitive's backward makes the logits again.
    """
    N = len(x_NH)
    blocks = Blocks(x_NH, w_VH, head)
    dlogp_P, dlse_P = (blocks.pad(d_N.to(blocks.acc)) for d_N in (dlogp_N, dlse_N))
    sparse = _Sparse(x_NH, blocks, blocks.pad(y_N), dlogp_P, dlse_P, needs, tolerance)
    logp_P = torch.empty_like(dlogp_P)
    for t, x_nH, x_BH in blocks:
        logp_P[t] = sparse.add(t, x_nH, x_BH)
    return logp_P[:N], *sparse.result()


class _Sparse:
    """Adds up the gradients, block by block. G = e * scale of its group of rows * other, but for
    the targets' elements."""

    def __init__(
        self,
        x_NH: Tensor,
        blocks: Blocks,
        y_P: Tensor,
        dlogp_P: Tensor,
        dlse_P: Tensor,
        needs: Needs,
        tolerance: float,
    ) -> None:
        self.blocks, self.y_P, self.budget = blocks, y_P, tolerance * fast_plan.BUDGET
        self.dlogp_P, self.dlse_P, self.other_P = dlogp_P, dlse_P, dlse_P - dlogp_P
        self.grads = Gradients(x_NH, blocks, needs, lazy=True)  # dW's sum: if some block asks
        self.rows = _Rows(blocks.w_VH, blocks.acc) if needs[1] else None
        self.source: scan.Int8 | scan.Full | None = None  # until some block is not exact
        self.z_VB: Tensor | None = None  # exact blocks' logits
        self.dropped_P = torch.zeros_like(self.other_P)
        self.left = self.energy = torch.zeros((), dtype=torch.float64)
        is_exact = not fast_plan.pays(*x_NH.shape) or self._is_flat()
        self.computed, self.resting = 0, len(x_NH) if is_exact else 0

    def _begin(self) -> scan.Int8 | scan.Full:
        blocks, x_NH = self.blocks, self.blocks.x_NH
        V, K = len(blocks.w_VH), fast_plan.MOMENTS
        self.source = scan.make(blocks, self.grads.rounded_VH)
        self.basis_HK = fast_plan.basis(x_NH, self.other_P[: len(x_NH)])
        self.moments_VK = x_NH.new_zeros(V, K, dtype=blocks.acc)
        self.block_VK = self.source.e_VB.new_empty(V, K)
        return self.source

    def add(self, t: slice, x_nH: Tensor, x_BH: Tensor) -> Tensor:
        """A block; returns its logp_B."""
        blocks, y_B, other_B = self.blocks, self.y_P[t], self.other_P[t]
        if self.resting:
            self.resting -= 1
            return self._exact(t, x_nH, x_BH)
        source = self.source or self._begin()
        seen = source.scan(x_BH, y_B)
        target_B = blocks.sloped(self._target(t, seen.logp_B), seen.target_B)
        energy = target_B.double().square().sum()
        s_V = self._moments(seen, x_nH, other_B)
        limit = source.share * self.budget * self._unit(seen.target_B[: len(x_nH)]) * energy.sqrt()
        active_V, left = fast_plan.active_rows(s_V, y_B[: len(x_nH)], limit)
        active_A = active_V.nonzero()[:, 0]
        found = None
        if len(active_A) <= MAX_ACTIVE * len(active_V):
            w_AH = blocks.w_VH[active_A]
            found = source.find(active_A, w_AH, x_BH, y_B, other_B, len(x_nH))
        if found is None:
            self.resting = REST
            return self._exact(t, x_nH, x_BH, source.stats)
        self.computed += len(active_A) * len(x_nH)
        self.block_VK.index_fill_(0, active_A, 0)
        self.moments_VK += self.block_VK
        self.dropped_P[t] = found.dropped_B
        target_B = blocks.sloped(self._target(t, found.logp_B), found.target_B)
        self.energy, self.left = self.energy + target_B.double().square().sum(), self.left + left
        self._active(t.start, x_nH, y_B, active_A, w_AH, found.g_AB, target_B)
        return found.logp_B

    def _is_flat(self) -> bool:
        """Whether the surer half of a few tokens needs too many of some rows, were all targets as
        unlikely as can be: then more tokens would need more."""
        blocks, N = self.blocks, len(self.blocks.x_NH)
        if N < 4 * PROBE:
            return False
        some, rows = slice(0, N // PROBE * PROBE, N // PROBE), slice(None, None, EVERY)
        z_Rn = (blocks.w_VH[rows] @ blocks.x_NH[some].T).to(blocks.acc)
        p_Rn = blocks.shaped(z_Rn, rows).softmax(dim=0) / EVERY
        sure = p_Rn.square().sum(dim=0).argsort(descending=True)[: PROBE // 2]
        energy = self.other_P[:N].double().square().mean() * len(sure) / EVERY
        limit = self.budget * self._unit(z_Rn.amax(dim=0)) * energy.sqrt()
        s_R = p_Rn[:, sure] @ self.other_P[some][sure].abs()
        active_R, _ = fast_plan.active_rows(s_R, self.y_P[:0], limit)
        return bool(active_R.sum() > FLAT * len(s_R))

    def _unit(self, z_n: Tensor) -> Tensor | float:
        """A dense implementation's error, in terms of what rounding G to bf16 costs: in bf16 it has
        rounded its logits too. 10 times as much was measured at logits of 31; this says 4."""
        if self.blocks.x_NH.dtype != torch.bfloat16:
            return 1.0
        return (z_n.square().mean().sqrt() / BF16_LOGIT).clamp(min=1)

    def _target(self, t: slice, logp_B: Tensor) -> Tensor:
        """The gradient at the targets' logits."""
        return target_gradient(logp_B, self.dlogp_P[t], self.dlse_P[t])

    def _exact(
        self, t: slice, x_nH: Tensor, x_BH: Tensor, stats: Statistics | None = None
    ) -> Tensor:
        """As cpu.py; from `stats` where the source has computed what exact mode would."""
        blocks, grads, y_B = self.blocks, self.grads, self.y_P[t]
        if self.rows is not None and grads.dw_VH is None:
            grads.dw_VH = torch.empty_like(blocks.w_VH, dtype=blocks.acc)
        if self.z_VB is None:
            e_VB = None if self.source is None else self.source.e_VB
            if e_VB is None or e_VB.dtype != x_nH.dtype:
                e_VB = blocks.logits_buffer(grads.rounded_VH)
            self.z_VB = e_VB
        if stats is None:
            keep = x_nH.dtype == blocks.acc  # else exp would be rounded twice
            stats = blocks.statistics(blocks.logits(x_BH, self.z_VB), y_B, keep=keep)
        each = self.dlogp_P[t], self.dlse_P[t]
        target_B = grads.add_block(t.start, x_nH, self.z_VB, y_B, stats, *each)
        self.energy = self.energy + target_B.double().square().sum()
        self.computed += len(self.z_VB) * len(x_nH)
        return stats.logp_B

    def _moments(self, seen: Scan, x_nH: Tensor, other_B: Tensor) -> Tensor:
        """Fills the block's moments; returns s_V."""
        n, acc = len(x_nH), self.blocks.acc
        signs_n2 = torch.stack([other_B[:n] > 0, other_B[:n] < 0], dim=1)
        f_nK = torch.cat([signs_n2.to(acc), (x_nH @ self.basis_HK).to(acc)], dim=1)
        for rows, scale_B in seen.scales:
            scaled_nK = ((scale_B * other_B)[:n, None] * f_nK).to(seen.e_VB.dtype)
            torch.mm(seen.e_VB[rows, :n], scaled_nK, out=self.block_VK[rows])
        return (self.block_VK[:, 0] - self.block_VK[:, 1]).to(acc)

    def _active(
        self,
        start: int,
        x_nH: Tensor,
        y_B: Tensor,
        active_A: Tensor,
        w_AH: Tensor,
        g_AB: Tensor,
        target_B: Tensor,
    ) -> None:
        """Active rows, as cpu.Gradients does all rows."""
        grads, w_VH, n = self.grads, self.blocks.w_VH, len(x_nH)
        g_An = g_AB[:, :n]
        g_An.scatter_(0, torch.searchsorted(active_A, y_B[None, :n]), target_B[None, :n])
        if grads.db_V is not None:
            grads.db_V[active_A] += g_An.sum(dim=1)
        g_An = g_An.mul_(self.blocks.head.logit_scale).to(w_VH.dtype)
        if grads.dx_NH is not None:
            torch.mm(g_An.T, w_AH, out=grads.dx_NH[start : start + n])
        if self.rows is not None:
            for rows_A, g in zip(active_A.split(ROWS), g_An.split(ROWS), strict=True):
                self.rows.add(rows_A, g @ x_nH)

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None, Report]:
        """Puts the tail back, rounds once."""
        grads, blocks = self.grads, self.blocks
        N, V, scale = len(blocks.x_NH), len(blocks.w_VH), blocks.head.logit_scale
        if self.source is not None:
            lost_N = (self.dropped_P * self.other_P)[:N]
            args = self.moments_VK, self.basis_HK, lost_N, blocks.w_VH, scale
            fast_plan.put_back(*args, grads.dx_NH, None, grads.db_V)
            if self.rows is not None:
                # the signs are no part of X
                q_HK = F.pad(self.basis_HK.to(blocks.acc) * scale, (2, 0))
                grads.dw_VH = self._dw(q_HK.T)
        elif self.rows is not None and grads.dw_VH is None:  # no token at all
            grads.dw_VH = torch.zeros_like(blocks.w_VH)
        report = fast_plan.report(self.dropped_P[:N], self.computed, V, self.left, self.energy)
        return *grads.result(), report

    def _dw(self, q_KH: Tensor) -> Tensor:
        """The tail of all rows, and what was computed of some or of whole blocks."""
        assert self.rows is not None
        dw_VH, moments_VK, dtype = self.grads.dw_VH, self.moments_VK, self.blocks.w_VH.dtype
        self.source = self.z_VB = None  # freed before dW is made, or of its memory
        if dw_VH is not None:
            dw_VH.addmm_(moments_VK, q_KH)
            return dw_VH.index_add_(0, self.rows.index, self.rows.sums)
        lent_VH = self.grads.rounded_VH
        dw_VH = torch.empty_like(self.blocks.w_VH) if lent_VH is None else lent_VH
        torch.mm(moments_VK.to(dtype), q_KH.to(dtype), out=dw_VH)
        for index, sum_AH in zip(
            self.rows.index.split(ROWS), self.rows.sums.split(ROWS), strict=True
        ):
            sum_AH.addmm_(moments_VK[index], q_KH)
            dw_VH.index_copy_(0, index, sum_AH.to(dw_VH.dtype))
        return dw_VH


class _Rows:
    """Sums of dW's rows, of those only that were ever active."""

    def __init__(self, w_VH: Tensor, acc: torch.dtype) -> None:
        self.place_V = w_VH.new_full((len(w_VH),), -1, dtype=torch.long)
        self.index = w_VH.new_empty(0, dtype=torch.long)
        self.room = w_VH.new_zeros(0, w_VH.shape[1], dtype=acc)

    @property
    def sums(self) -> Tensor:
        """Of the rows of `index`."""
        return self.room[: len(self.index)]

    def add(self, rows_A: Tensor, part_AH: Tensor) -> None:
        new = rows_A[self.place_V[rows_A] < 0]
        if len(new):
            had = len(self.index)
            self.place_V[new] = torch.arange(had, had + len(new), device=new.device)
            self.index = torch.cat([self.index, new])
            if len(self.index) > len(self.room):
                size = min(max(2 * had, len(self.index)), len(self.place_V))
                self.room = F.pad(self.room, (0, 0, 0, size - len(self.room)))
        self.room.index_add_(0, self.place_V[rows_A], part_AH.to(self.room.dtype))
