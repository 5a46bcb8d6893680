"""The logits matmul, z = head(x wT), whose [T, V] result is never stored. Per tile it leaves behind

* STATS: for each row the tile's max m, s = sum exp(z - m) and e = sum exp(z - m) (z - m), in fp32
  tables [V / BLOCK_V, T], and the target's logit, written by the one tile that holds its column.
  The target comes from the same accumulator as the sum, so z_y <= m + log s: logp <= 0 always.
* SLAB: the gradient of some objective with respect to the raw products, g_TV for a slice of the
  vocabulary, rounded once to x's dtype: g = (a_t exp(z - c_t), or b_t where v = y_t) dz/d(x w).
  With c = lse and the a, b of primitive.py this is the gradient of log-probs. The fused path does
  not know lse yet: it takes any c near it and a = 1 everywhere (PLAIN), and corrects afterwards.

Both may be on at once: that is how the fused path gets statistics and slab from one matmul.
`active_ptr` (one int32 per row block) lets a second launch redo single row blocks and cost nothing
when there are none.
"""

import triton
import triton.language as tl

from redi_kernels.triton.tiles import apply_head, load_tile, swizzle


@triton.jit
def logits_kernel(
    x_TH, w_VH, y_ptr, bias_ptr,
    max_ptr, sum_ptr, ent_ptr, target_ptr,
    slab_TV, a_ptr, b_ptr, c_ptr, active_ptr,
    T, V, H, first_v, num_v, x_stride, w_stride, slab_stride, logit_scale, softcap,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, GROUP_T: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, EVEN_H: tl.constexpr, TMA: tl.constexpr,
    STATS: tl.constexpr, ENTROPY: tl.constexpr, SLAB: tl.constexpr, PLAIN: tl.constexpr,
    HAS_ACTIVE: tl.constexpr,
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
            z = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
            for h in range(0, H, BLOCK_H):
                x = load_tile(x_TH, x_stride, row, h, T, H, BLOCK_T, BLOCK_H, TMA, EVEN_H)
                w = load_tile(w_VH, w_stride, col, h, V, H, BLOCK_V, BLOCK_H, TMA, EVEN_H)
                z = tl.dot(x, w.T, z, input_precision=PRECISION)

            rows, cols = row + tl.arange(0, BLOCK_T), col + tl.arange(0, BLOCK_V)
            in_t, in_v = rows < T, cols < V
            bias = 0.0
            if HAS_BIAS:
                bias = tl.load(bias_ptr + cols, mask=in_v, other=0.0).to(tl.float32)[None, :]
            z, slope = apply_head(z, bias, logit_scale, softcap, HAS_SOFTCAP)
            y = tl.load(y_ptr + rows, mask=in_t, other=-1).to(tl.int32)
            is_target = cols[None, :] == y[:, None]

            if STATS:
                z = tl.where(in_v[None, :], z, float("-inf"))
                m = tl.max(z, 1)
                shifted = z - tl.where(m > float("-inf"), m, 0.0)[:, None]  # a bias may be -inf
                p = tl.exp(shifted)
                cell = (first_v // BLOCK_V + pid_v).to(tl.int64) * T + rows
                tl.store(max_ptr + cell, m, mask=in_t)
                tl.store(sum_ptr + cell, tl.sum(p, 1), mask=in_t)
                if ENTROPY:
                    ent = tl.sum(tl.where(p > 0, p * shifted, 0.0), 1)
                    tl.store(ent_ptr + cell, ent, mask=in_t)
                is_owner = in_t & (y >= col) & (y < col + BLOCK_V)
                tl.store(target_ptr + rows, tl.sum(tl.where(is_target, z, 0.0), 1), mask=is_owner)

            if SLAB:
                c = tl.load(c_ptr + rows, mask=in_t, other=float("inf"))  # rows past T become 0
                g = tl.exp(z - c[:, None])
                if not PLAIN:
                    a = tl.load(a_ptr + rows, mask=in_t, other=0.0)
                    b = tl.load(b_ptr + rows, mask=in_t, other=0.0)
                    g = tl.where(is_target, b[:, None], g * a[:, None])
                # T and V are padded to whole tiles: the slab has room, and the padding must be zero
                g = tl.where(in_v[None, :], g * slope, 0.0).to(slab_TV.dtype.element_ty)
                local = pid_v * BLOCK_V + tl.arange(0, BLOCK_V)
                cell = rows.to(tl.int64)[:, None] * slab_stride + local[None, :]
                tl.store(slab_TV + cell, g)
