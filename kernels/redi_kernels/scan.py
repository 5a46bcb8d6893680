"""Fast mode's look at all logits on a CPU (`fast.py`), from which it plans, and sums up the tail:
`Int8` where the CPU multiplies int8 (AVX-512 VNNI: x86 servers from 2019, Ryzen from 2022), else
`Full`, in the weights' own dtype.

Int8. What an inactive row gets, its place in the plan and its share of the tail, needs no 24 bits
of logit. A block's matmul in int8 takes a quarter of its time in fp32, half of bf16's:

    w x  =  w m + w (x - m)  ~  w m + step_v step_t (w8 x8)

* m is the tokens' mean, which holds most of x and is the same for all: w m is done exactly.
* What is left is divided by a number per column of x, and w multiplied by it, so that neither's
  columns differ much in size: a row's largest element, which sets its step, is then nearer to the
  rest. Together: an error of 0.08, where int8 as it comes has 0.29 (SmolLM2 on GSM8K).
* Integers add up exactly: the logits of some rows, made again, are the same to the bit.

The active rows' logits are then computed in fp32. They hold nearly all of sum exp(z); the rest is
the coarse sum less the same rows' coarse part. So a log-prob is off by about the coarse logits'
error times the mass outside the active rows: a few 1e-4, where dense bf16 logits are off by 1e-2;
more for tokens of little or no weight, as rows that matter to them alone are not active. The error
itself is seen on active elements, both of whose logits are known: a block with a token whose error
exceeds LARGEST_ERROR, or whose sum LARGEST_SUM, is done exactly instead.

Each pass leaves a tile's rows with the core that will do them in the next: `cpu.over_rows`.
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from redi_kernels.cpu import LOG2_E, Blocks, Statistics, over_rows

LARGEST_ERROR = (
    0.5  # RMS, of a token's coarse logits; real texts: 0.08, the worst token of 2,048 0.33
)
TOKENS, EVERY = 2048, 16  # enough of x, and every 16th row of w, to know their columns by
SEEN = 64  # active rows whose error is looked at, where there are so many
WEIGHT_BYTES = 2 << 20  # of w in fp32 that is made int8 at a time: still in the cache
TILE_BYTES = 4 << 20  # of int32 logits
LEVELS = 127
LARGEST_SUM = 2.0**64  # of exp(z - shift): times a token's weight its inverse is no subnormal yet


@dataclass
class Scan:
    """Of a block: e = exp(z - shift) times the cap's slope."""

    e_VB: Tensor
    scales: list[tuple[slice, Tensor]]  # per group of rows, what turns e into probabilities [B]
    logp_B: Tensor
    target_B: Tensor  # the target's logit


@dataclass
class Found:
    """Of a block, once its active rows are known."""

    g_AB: Tensor  # probability times the cap's slope and the token's weight
    logp_B: Tensor
    target_B: Tensor
    dropped_B: Tensor  # mass outside, times the cap's slope there


def make(blocks: Blocks, lent_VH: Tensor | None) -> "Int8 | Full":
    return Int8(blocks, lent_VH) if _pays(blocks.x_NH) else Full(blocks, lent_VH)


def _pays(x_NH: Tensor) -> bool:
    """Without VNNI int8 is slower than fp32."""
    known = x_NH.device.type == "cpu" and x_NH.dtype in (torch.float32, torch.bfloat16)
    fast = known and bool(torch.backends.mkldnn.enabled) and _has("_is_vnni_supported")
    return fast and is_exact(x_NH.shape[1])


@functools.cache
def is_exact(H: int) -> bool:
    """Whether `torch._int_mm` adds up H products of int8 rightly here. Not where the CPU, or what
    oneDNN is told to use of it, adds pairs of them in 16 bits; nor for H = 1 (torch 2.13)."""
    random = torch.Generator().manual_seed(0)
    a_NH, b_NH = (torch.randint(-LEVELS, LEVELS + 1, (32, H), generator=random) for _ in range(2))
    for m in (a_NH, b_NH):  # sums as large as can be, and of either sign
        m[:8] = LEVELS
        m[8:16] = -LEVELS
    a_NH, b_NH = a_NH.to(torch.int8), b_NH.to(torch.int8)
    found_NN = torch._int_mm(a_NH, b_NH.T)
    return torch.equal(found_NN.double(), a_NH.double() @ b_NH.double().T)


def _has(probe: str) -> bool:
    """torch's own probes of the CPU are private: one that is gone says no."""
    return bool(getattr(torch.cpu, probe, lambda: False)())


class Full:
    """Logits in the weights' dtype: log-probs are exact mode's, to the bit."""

    share = 1.0  # of the budget

    def __init__(self, blocks: Blocks, lent_VH: Tensor | None) -> None:
        self.blocks, self.e_VB = blocks, blocks.logits_buffer(lent_VH)
        self.stats: Statistics | None = None

    def scan(self, x_BH: Tensor, y_B: Tensor) -> Scan:
        blocks = self.blocks
        stats = blocks.statistics(blocks.logits(x_BH, self.e_VB), y_B, keep=True)
        rows = (rows for rows, _ in blocks.groups(self.e_VB))
        self.stats, scales = stats, list(zip(rows, stats.scale_GB, strict=True))
        return Scan(self.e_VB, scales, stats.logp_B, stats.target_B)

    def find(
        self, active_A: Tensor, w_AH: Tensor, x_BH: Tensor, y_B: Tensor, other_B: Tensor, n: int
    ) -> Found | None:
        stats = self.stats
        assert stats is not None
        p_AB = self.e_VB.index_select(0, active_A).to(self.blocks.acc)
        p_AB.mul_(stats.scale_GB[active_A // self.blocks.R])
        # The target's element, replaced later, was kept in the weights' dtype: where the model is
        # sure, its rounding is many times what lies outside the active rows.
        p_AB.scatter_(0, torch.searchsorted(active_A, y_B[None]).clamp_(max=len(p_AB) - 1), 0)
        target_B = self.blocks.sloped(stats.logp_B.exp(), stats.target_B)
        dropped_B = (stats.kept_B / stats.sum_B - target_B - p_AB.sum(dim=0)).clamp_(min=0)
        return Found(p_AB.mul_(other_B), stats.logp_B, stats.target_B, dropped_B)


class Int8:
    """Coarse logits; those of active rows in fp32."""

    share = 0.875  # of the budget: its own error comes on top of what is dropped
    stats = None  # nothing that exact mode could go on from

    def __init__(self, blocks: Blocks, lent_VH: Tensor | None) -> None:
        self.blocks, head, w_VH = blocks, blocks.head, blocks.w_VH
        narrow = _has("_is_avx512_bf16_supported")  # e goes through one matmul more
        V, dtype = len(w_VH), torch.bfloat16 if narrow else blocks.x_NH.dtype
        self.e_VB = blocks.logits_buffer(lent_VH, dtype)
        tile = min(TILE_BYTES // (4 * blocks.B), V)
        self.z_tB = w_VH.new_empty(tile, blocks.B, dtype=torch.int32)
        x_NH = blocks.x_NH[:: max(len(blocks.x_NH) // TOKENS, 1)].to(blocks.acc)
        self.mean_H = x_NH.mean(dim=0)
        spread_H = (x_NH - self.mean_H).square().mean(dim=0).sqrt()
        size_H = w_VH[::EVERY].to(blocks.acc).square().mean(dim=0).sqrt()
        ratio_H = (spread_H / size_H).sqrt()
        self.ratio_H = ratio_H.where(ratio_H.isfinite() & (ratio_H > 0), 1)
        self.w8_VH = torch.empty_like(w_VH, dtype=torch.int8)
        self.step_V1, self.offset_V1 = (w_VH.new_empty(V, 1, dtype=blocks.acc) for _ in range(2))
        R = max(WEIGHT_BYTES // (4 * w_VH.shape[1]), 16)
        for v in range(0, V, R):
            rows = slice(v, v + R)
            w_RH = w_VH[rows].to(blocks.acc)
            # no matmul, which would split the rows between the cores in another way
            self.offset_V1[rows] = (w_RH * self.mean_H).sum(dim=1, keepdim=True)
            self.w8_VH[rows], self.step_V1[rows] = _levels(w_RH * self.ratio_H)
        # logits are counted in bits, or in units of the cap
        unit = LOG2_E if head.softcap is None else 1 / head.softcap
        self.step_V1.mul_(head.logit_scale * unit)
        self.offset_V1.mul_(head.logit_scale * unit)
        if blocks.bias_V is not None:
            self.offset_V1.add_(blocks.bias_V[:, None], alpha=unit)

    def scan(self, x_BH: Tensor, y_B: Tensor) -> Scan:
        blocks, acc, V = self.blocks, self.blocks.acc, len(self.e_VB)
        x_BH = x_BH.to(acc)
        level_BH, step_B1 = _levels((x_BH - self.mean_H).div_(self.ratio_H))
        self.x8_BH, self.step_B = level_BH.to(torch.int8), step_B1[:, 0]
        target_B = (x_BH * blocks.w_VH[y_B]).sum(dim=1)
        target_B = blocks.shaped(target_B[None], y_B[None])[0]
        self.sum_B = self.kept_B = torch.zeros_like(target_B)
        for v in range(0, V, len(self.z_tB)):
            rows = slice(v, min(v + len(self.z_tB), V))
            z_RB = self.z_tB[: rows.stop - v]
            torch._int_mm(self.w8_VH[rows], self.x8_BH.T, out=z_RB)
            f_RB, slope_RB = self._bits(z_RB, rows)
            if v == 0:  # no maximum, but near enough, or the block is done exactly
                self.shift_B = torch.maximum(target_B * LOG2_E, over_rows(torch.amax, f_RB))
            sums = self._exp(f_RB, slope_RB)
            self.sum_B, self.kept_B = self.sum_B + sums[0], self.kept_B + sums[1]
            self.e_VB[rows].copy_(f_RB)
        # where a token is sure, 1 - p would be the coarse error of its target's logit
        true_B = (target_B * LOG2_E - self.shift_B).exp2()
        total_B = (self.sum_B - self._target(y_B)).clamp_(min=0) + true_B
        logp_B = (target_B - self.shift_B / LOG2_E - total_B.log()).clamp_(max=0)
        return Scan(self.e_VB, [(slice(0, V), 1 / total_B)], logp_B, target_B)

    def find(
        self, active_A: Tensor, w_AH: Tensor, x_BH: Tensor, y_B: Tensor, other_B: Tensor, n: int
    ) -> Found | None:
        """None where the coarse logits are too far from the truth. n tokens are real."""
        blocks = self.blocks
        z_AB = blocks.shaped(w_AH.to(blocks.acc) @ x_BH.to(blocks.acc).T, active_A)
        c_AB, slope_AB = self._bits(torch._int_mm(self.w8_VH[active_A], self.x8_BH.T), active_A)
        some = slice(None, None, max(1, min(EVERY, len(z_AB) // SEEN)))
        error_n = (c_AB[some, :n] - z_AB[some, :n] * LOG2_E).square_().mean(dim=0).sqrt_()
        if not (error_n.amax() <= LARGEST_ERROR * LOG2_E and self.sum_B[:n].amax() <= LARGEST_SUM):
            return None
        top_B = torch.maximum(z_AB.amax(dim=0), self.shift_B / LOG2_E)
        shrink_B = (self.shift_B - top_B * LOG2_E).exp2()
        sums = zip((self.sum_B, self.kept_B), self._exp(c_AB, slope_AB), strict=True)
        tail_B, kept_B = ((all_B - part_B).clamp_(min=0) * shrink_B for all_B, part_B in sums)
        place_1B = torch.searchsorted(active_A, y_B[None]).clamp_(max=len(z_AB) - 1)
        target_B, slope_AB = z_AB.gather(0, place_1B)[0], blocks.slope(z_AB)
        g_AB = z_AB.sub_(top_B).mul_(LOG2_E).exp2_()
        sum_B = g_AB.sum(dim=0) + tail_B
        logp_B = (target_B - top_B - sum_B.log()).clamp_(max=0)
        g_AB.mul_(other_B / sum_B)
        if slope_AB is not None:
            g_AB.mul_(slope_AB)
        return Found(g_AB, logp_B, target_B, kept_B / sum_B)

    def _target(self, y_B: Tensor) -> Tensor:
        """exp(z - shift) of the targets' coarse logits."""
        z_B = (self.w8_VH[y_B].int() * self.x8_BH).sum(dim=1, dtype=torch.int32)
        f_B = z_B * self.step_V1[y_B, 0] * self.step_B + self.offset_V1[y_B, 0]
        cap = self.blocks.head.softcap
        if cap is not None:
            f_B = f_B.tanh_().mul_(cap * LOG2_E)
        return f_B.sub_(self.shift_B).exp2_()

    def _bits(self, z_RB: Tensor, rows: slice | Tensor) -> tuple[Tensor, Tensor | None]:
        """Logits / ln 2 in z's memory, and the cap's slope there.

        In place because two large buffers both begin a page: reading one and writing the other at
        the same offset took six times as long (4K aliasing).
        """
        f_RB = z_RB.view(self.blocks.acc).copy_(z_RB)
        f_RB.mul_(self.step_V1[rows]).mul_(self.step_B).add_(self.offset_V1[rows])
        cap = self.blocks.head.softcap
        if cap is None:
            return f_RB, None
        slope_RB = 1 - f_RB.tanh_().square()
        return f_RB.mul_(cap * LOG2_E), slope_RB

    def _exp(self, f_RB: Tensor, slope_RB: Tensor | None) -> tuple[Tensor, Tensor]:
        """exp(z - shift) times slope in place; sums without and with the slope."""
        sum_B = over_rows(torch.sum, f_RB.sub_(self.shift_B).exp2_())
        return sum_B, sum_B if slope_RB is None else over_rows(torch.sum, f_RB.mul_(slope_RB))


def _levels(v_RH: Tensor) -> tuple[Tensor, Tensor]:
    """(whole numbers within LEVELS, in v's memory; their step [R, 1])."""
    step_R1 = v_RH.abs().amax(dim=1, keepdim=True).div_(LEVELS)
    return v_RH.div_(step_R1.clamp(min=torch.finfo(v_RH.dtype).tiny)).round_(), step_R1
