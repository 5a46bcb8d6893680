"""Blocked torch: the path for CPUs, and the fallback on any device that has no kernel of its own.

A block of B tokens gets its logits from one matmul into a [B, V] buffer. Groups of R rows, small
enough for the cache, then go through everything that is not a matmul: max, exp, sum, gradient; the
logits become their gradient in place. Two matmuls finish the block: dX = G W and dW += G' X.

    forward  1 U (U = 2 N V H, one logits matmul)      weighted  3 U      backward  3 U

B depends on V and the dtype alone, and a short last block is padded to it, because the bits of a
matmul's row may change with the number of rows: so a token's log-prob never depends on its batch.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from redi_kernels.head import Head, accumulator

BUFFER_BYTES = 48 << 20  # of the [B, V] buffer: new memory stays within 64 MiB
BLOCK_ROWS = (16, 1024)  # fewer rows starve the matmul, more would only pad small problems
GROUP_BYTES = 1 << 20  # of a group of rows in the accumulator's dtype: about one core's L2
DW_ROWS = 2048  # vocabulary rows per matmul where its result is narrower than dW's accumulator


def forward(
    x_NH: Tensor, w_VH: Tensor, y_N: Tensor, head: Head
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(logp_N, lse_N, entropy_N, correct_N) of targets `y_N`, each in [0, V). 1 U.

    logp <= 0, always: the target's logit is read where the maximum and the sum are, and the sum
    holds exp(0) = 1. (lse - logit, the obvious way, exceeds 0 by the rounding of a large lse.)
    torch.softmax would be quicker, but on CPU its rows sum to 1 within 2e-5 only: a bias.
    """
    N = len(x_NH)
    blocks = _Blocks(x_NH, w_VH, head)
    y_P = blocks.pad(y_N)
    logp_P, lse_P, entropy_P = (torch.empty_like(y_P, dtype=blocks.acc) for _ in range(3))
    correct_P = torch.empty_like(y_P, dtype=torch.bool)
    for start, n, _, z_BV in blocks:
        for r in blocks.groups(n):
            t = slice(start + r.start, start + r.stop)
            z_RV, _ = blocks.epilogue(z_BV[r])
            target_R, max_R = _gather(z_RV, y_P[t]), z_RV.amax(dim=1)
            e_RV = z_RV.sub_(max_R[:, None]).exp()
            sum_R = e_RV.sum(dim=1)
            if head.bias_V is not None:  # -inf masks a token: 0 * -inf
                z_RV.clamp_(min=torch.finfo(blocks.acc).min)
            log_sum_R = sum_R.log()
            logp_P[t] = (target_R - max_R) - log_sum_R
            lse_P[t] = max_R + log_sum_R
            entropy_P[t] = log_sum_R - e_RV.mul_(z_RV).sum(dim=1) / sum_R
            correct_P[t] = target_R >= max_R
    return logp_P[:N], lse_P[:N], entropy_P[:N], correct_P[:N]


def weighted(
    x_NH: Tensor,
    w_VH: Tensor,
    y_N: Tensor,
    weight_N: Tensor,
    head: Head,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """logp_N and the gradients of sum(weight * logp) for what `needs` of (x, w, bias). 3 U."""
    N = len(x_NH)
    blocks = _Blocks(x_NH, w_VH, head)
    grads = _Gradients(x_NH, w_VH, blocks, needs)
    y_P, weight_P = blocks.pad(y_N), blocks.pad(weight_N.to(blocks.acc))
    logp_P = torch.empty_like(weight_P)
    for start, n, x_nH, z_BV in blocks:
        for r in blocks.groups(n):
            t = slice(start + r.start, start + r.stop)
            z_RV, chain_RV = blocks.epilogue(z_BV[r])
            target_R, max_R = _gather(z_RV, y_P[t]), z_RV.amax(dim=1)
            e_RV = z_RV.sub_(max_R[:, None]).exp_()
            sum_R = e_RV.sum(dim=1)
            logp_R = (target_R - max_R) - sum_R.log()
            logp_P[t] = logp_R
            if any(needs):
                # weight (onehot - p); the target's 1 - p from its log-prob, before any rounding
                g_RV = e_RV.mul_((-weight_P[t] / sum_R)[:, None])
                _scatter(g_RV, y_P[t], -weight_P[t] * logp_R.expm1())
                grads.add_rows(z_BV[r], g_RV, chain_RV)
        grads.add_block(start, n, x_nH, z_BV)
    return logp_P[:N], *grads.result()


def backward(
    x_NH: Tensor,
    w_VH: Tensor,
    y_N: Tensor,
    logp_N: Tensor,
    lse_N: Tensor,
    dlogp_N: Tensor,
    dlse_N: Tensor,
    head: Head,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of sum(dlogp * logp + dlse * lse), from recomputed logits. 3 U."""
    blocks = _Blocks(x_NH, w_VH, head)
    grads = _Gradients(x_NH, w_VH, blocks, needs)
    dlogp_N, dlse_N = dlogp_N.to(blocks.acc), dlse_N.to(blocks.acc)
    # d logp / dz = onehot - p and d lse / dz = p: a factor of p, and the target's own column
    other_N = dlse_N - dlogp_N
    target_N = dlse_N * logp_N.exp() - dlogp_N * logp_N.expm1()
    for start, n, x_nH, z_BV in blocks:
        for r in blocks.groups(n):
            r = slice(r.start, min(r.stop, n))
            t = slice(start + r.start, start + r.stop)
            z_RV, chain_RV = blocks.epilogue(z_BV[r])
            # a large lse is rounded coarsely, and p = exp(z - lse) with it; target - logp is not
            lse_R = lse_N[t]
            correction_R = (logp_N[t] - (_gather(z_RV, y_N[t]) - lse_R)).exp()
            g_RV = z_RV.sub_(lse_R[:, None]).exp_().mul_((other_N[t] * correction_R)[:, None])
            _scatter(g_RV, y_N[t], target_N[t])
            grads.add_rows(z_BV[r], g_RV, chain_RV)
        grads.add_block(start, n, x_nH, z_BV)
    return grads.result()


class _Blocks:
    """Iterates over (start, n, x_nH, z_BV): n tokens from `start`, and their matmul padded to B."""

    def __init__(self, x_NH: Tensor, w_VH: Tensor, head: Head) -> None:
        self.x_NH, self.w_VH, self.head = x_NH, w_VH, head
        self.acc = accumulator(x_NH.dtype)
        self.bias_V = None if head.bias_V is None else head.bias_V.to(self.acc)
        V = len(w_VH)
        low, high = BLOCK_ROWS
        self.B = _power_of_two(BUFFER_BYTES // (V * x_NH.element_size()), low, high)
        self.R = _power_of_two(GROUP_BYTES // (V * self.acc.itemsize), 1, self.B)

    def __iter__(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        z_BV = self.x_NH.new_empty(self.B, len(self.w_VH))
        for start in range(0, len(self.x_NH), self.B):
            x_BH = self.x_NH[start : start + self.B]
            n = len(x_BH)
            torch.mm(F.pad(x_BH, (0, 0, 0, self.B - n)), self.w_VH.T, out=z_BV)
            yield start, n, x_BH, z_BV

    def groups(self, n: int) -> Iterator[slice]:
        """Slices of R rows that cover a block's first n: always R, for the reductions' bits too."""
        return (slice(r, r + self.R) for r in range(0, n, self.R))

    def pad(self, v_N: Tensor) -> Tensor:
        return F.pad(v_N, (0, -len(v_N) % self.B))

    def epilogue(self, z_RV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The logits of some rows in the accumulator's dtype, in place where the buffer has it;
        and their derivative by the softcap's input, 1 - tanh^2, where there is a cap."""
        z_RV = z_RV.to(self.acc)
        if self.head.logit_scale != 1.0:
            z_RV.mul_(self.head.logit_scale)
        if self.bias_V is not None:
            z_RV.add_(self.bias_V)
        if self.head.softcap is None:
            return z_RV, None
        z_RV.div_(self.head.softcap).tanh_()
        chain_RV = 1.0 - z_RV * z_RV
        return z_RV.mul_(self.head.softcap), chain_RV


class _Gradients:
    """dX, dW, db as blocks add to them: sums in the accumulator's dtype, rounded once."""

    def __init__(
        self, x_NH: Tensor, w_VH: Tensor, blocks: _Blocks, needs: tuple[bool, bool, bool]
    ) -> None:
        x, w, bias = needs
        acc, head = blocks.acc, blocks.head
        self.w_VH, self.head = w_VH, head
        self.dx_NH = torch.empty_like(x_NH) if x else None
        self.dw_VH = torch.zeros_like(w_VH, dtype=acc) if w else None
        self.db_V = w_VH.new_zeros(len(w_VH), dtype=acc) if bias else None

    def add_rows(self, z_RV: Tensor, g_RV: Tensor, chain_RV: Tensor | None) -> None:
        """Turn the gradient at the final logits into that at the matmul's, and put it into z_RV."""
        if chain_RV is not None:
            g_RV.mul_(chain_RV)
        if self.db_V is not None:
            self.db_V += g_RV.sum(dim=0)
        if self.head.logit_scale != 1.0:
            g_RV.mul_(self.head.logit_scale)
        if g_RV.data_ptr() != z_RV.data_ptr():
            z_RV.copy_(g_RV)

    def add_block(self, start: int, n: int, x_nH: Tensor, g_BV: Tensor) -> None:
        g_nV = g_BV[:n]
        if self.dx_NH is not None:
            torch.mm(g_nV, self.w_VH, out=self.dx_NH[start : start + n])
        if self.dw_VH is None:
            return
        if self.dw_VH.dtype == g_nV.dtype:
            self.dw_VH.addmm_(g_nV.T, x_nH)
            return
        for v in range(0, len(self.dw_VH), DW_ROWS):
            self.dw_VH[v : v + DW_ROWS] += g_nV[:, v : v + DW_ROWS].T @ x_nH

    def result(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        dtype = self.w_VH.dtype
        dw_VH = None if self.dw_VH is None else self.dw_VH.to(dtype)
        return self.dx_NH, dw_VH, self.db_V


def _gather(z_RV: Tensor, y_R: Tensor) -> Tensor:
    return z_RV.gather(1, y_R[:, None])[:, 0]


def _scatter(g_RV: Tensor, y_R: Tensor, value_R: Tensor) -> None:
    g_RV.scatter_(1, y_R[:, None], value_R[:, None])


def _power_of_two(n: int, low: int, high: int) -> int:
    """The largest power of two that is at most n, within [low, high]."""
    return min(max(1 << max(n, 1).bit_length() - 1, low), high)
