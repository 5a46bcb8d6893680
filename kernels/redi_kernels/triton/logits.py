"""The logits matmul, z = head(x wT), whose [T, V] result is never stored. Per tile it leaves behind

* STATS: for each row the tile's max m, s = sum exp(z - m) and e = sum exp(z - m) (z - m), in fp32
  tables [V / BLOCK_V, T], and the target's logit, written by the one tile that holds its column.
  The target comes from the same accumulator as the sum, so z_y <= m + log s: logp <= 0 always.
* SLAB: exp(z_tv - c_t) dz/d(x w), times a_t if SCALED, for a slice of the vocabulary, rounded once
  to x's dtype. With c = lse this is d(logits) but for the target's column, which patch_kernel
  overwrites. The fused path does not know lse yet and takes any c near it (weighted.py).

Both may be on at once: that is how the fused path gets statistics and slab from one matmul.
`active_ptr` (one int32 per row block) lets a second launch redo single row blocks and cost next to
nothing when there are none.

Per element of the logits an H100's SM spends 2 H / 4096 cycles in its tensor cores (0.75 at H =
1536) and n / 128 in an epilogue of n instructions, which nothing hides. So it is short (n ~ 8):
exp2, one instruction, for exp, five; target and vocabulary tail only in tiles that hold them; one
exponential for statistics and slab together.
"""

import triton
import triton.language as tl

from redi_kernels.triton.tiles import LOG2E, MASKED, apply_head, columns, load_tile, swizzle


@triton.jit
def logits_kernel(
    x_TH, w_VH, y_ptr, bias_ptr,
    max_ptr, sum_ptr, ent_ptr, target_ptr,
    slab_TV, a_ptr, c_ptr, active_ptr,
    T, V, H, first_v, num_v, x_stride, w_stride, slab_stride, logit_scale, softcap,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_T: tl.constexpr,
    PARTS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SCALE: tl.constexpr, STATS: tl.constexpr, ENTROPY: tl.constexpr, SLAB: tl.constexpr,
    SCALED: tl.constexpr, HAS_ACTIVE: tl.constexpr, EVEN_H: tl.constexpr, TMA: tl.constexpr,
    FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Columns [first_v, first_v + num_v) of the vocabulary; slab column 0 is vocabulary first_v."""
    num_t = tl.cdiv(T, BLOCK_T)
    num_tiles = num_t * tl.cdiv(num_v, BLOCK_V)
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=FLATTEN):
        pid_t, pid_v = swizzle(tile, num_t, tl.cdiv(num_v, BLOCK_V), GROUP_T)
        active = True
        if HAS_ACTIVE:
            active = tl.load(active_ptr + pid_t) != 0
        if active:
            row, col = pid_t * BLOCK_T, first_v + pid_v * BLOCK_V
            z_tile = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            for h in range(0, H, BLOCK_H):
                x = load_tile(x_TH, x_stride, row, h, T, H, BLOCK_T, BLOCK_H, False, TMA, EVEN_H)
                w = load_tile(w_VH, w_stride, col, h, V, H, BLOCK_V, BLOCK_H, True, TMA, EVEN_H)
                z_tile = tl.dot(x, w, z_tile, input_precision=PRECISION)

            rows = row + tl.arange(0, BLOCK_T)
            in_t = rows < T
            if STATS:
                y = tl.load(y_ptr + rows, mask=in_t, other=-1)
                y = tl.where(y < V, y, -1).to(tl.int32)  # one beyond int32 must not wrap into V
                is_owner = (y >= col) & (y < col + BLOCK_V)
                has_target = tl.max(is_owner.to(tl.int32), 0) > 0
                m = tl.full((BLOCK_T,), MASKED, tl.float32)
                s = tl.zeros((BLOCK_T,), tl.float32)
                e, z_y = s, s
            if SLAB:
                c = tl.load(c_ptr + rows, mask=in_t, other=float("inf"))  # rows past T become 0
                if SCALED:
                    a = tl.load(a_ptr + rows, mask=in_t, other=0.0)

            parts = columns(z_tile, PARTS)
            for i in tl.static_range(PARTS):
                local = i * (BLOCK_V // PARTS) + tl.arange(0, BLOCK_V // PARTS)
                cols = col + local
                bias = 0.0
                if HAS_BIAS:
                    bias = tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)
                z = apply_head(
                    parts[i], bias, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, HAS_SCALE
                )
                if col + BLOCK_V > V:
                    z = tl.where((cols < V)[None, :], z, MASKED)
                if STATS:
                    new_m = tl.maximum(m, tl.max(z, 1))
                    z_m = z - new_m[:, None]
                    p = tl.exp2(z_m * LOG2E)
                    shift = m - new_m
                    rescale = tl.exp2(shift * LOG2E)
                    if ENTROPY:
                        e = rescale * (e + s * shift) + tl.sum(p * z_m, 1)
                    s = rescale * s + tl.sum(p, 1)
                    m = new_m
                    if has_target:
                        z_y += tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
                if SLAB:
                    if STATS:  # m - c < LIMIT, or the block is done again
                        g = p * tl.exp2((m - c) * LOG2E)[:, None]
                    else:
                        g = tl.exp2((z - c[:, None]) * LOG2E)
                    if SCALED:
                        g = g * a[:, None]
                    if HAS_SOFTCAP:  # d tanh = 1 - tanh^2
                        tanh = z * (1.0 / softcap)
                        g = g * (1.0 - tanh * tanh)
                    # T and V are padded to whole tiles: the slab has room, and padding becomes zero
                    cell = rows.to(tl.int64)[:, None] * slab_stride + (pid_v * BLOCK_V + local)
                    tl.store(slab_TV + cell, g.to(slab_TV.dtype.element_ty))

            if STATS:
                cell = (first_v // BLOCK_V + pid_v).to(tl.int64) * T + rows
                tl.store(max_ptr + cell, m, mask=in_t)
                tl.store(sum_ptr + cell, s, mask=in_t)
                if ENTROPY:
                    tl.store(ent_ptr + cell, e, mask=in_t)
                tl.store(target_ptr + rows, z_y, mask=in_t & is_owner)
