"""Small launches around the matmuls: per token or per column, all loops in a fixed order.

reduce_kernel   statistics of tiles -> lse, logp, entropy, arg-max correctness
anchor_kernel   z_y = head(x_t . w_{y_t}), the fused path's first guess at lse
patch_kernel    the target's column of d(logits)
column_kernel   db_v = sum_t s_t g_tv
compact_kernel  the slab's active columns, side by side (fast.py)
"""

import triton
import triton.language as tl

from redi_kernels.triton.tiles import MASKED, apply_head


@triton.jit
def reduce_kernel(
    max_ptr, sum_ptr, ent_ptr, target_ptr, logp_ptr, lse_ptr, entropy_ptr, correct_ptr,
    weight_ptr, c_ptr, active_ptr, scale_ptr, patch_ptr, T, num_tiles, softcap, limit,
    BLOCK_T: tl.constexpr, ENTROPY: tl.constexpr, FUSED: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """lse = m + log s with m = max_j m_j, s = sum_j s_j exp(m_j - m), and, centred on m so that
    logits near +-1000 lose nothing, logp = (z_y - m) - log s and
    entropy = lse - sum p z = log s - (1/s) sum_j exp(m_j - m) (e_j + s_j (m_j - m)).
    A NaN logit passes m by (a maximum returns the other operand), but not s, and so nothing else.

    FUSED (weighted.py): a row whose anchor c lies more than `limit` below lse gets c = lse and its
    block is marked active, to be done again; a NaN row too. Then log Z = (m - c) + log s, the row's
    scale is -weight / Z and its target's element Z (p - 1) slope.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = rows < T
    m = tl.full((BLOCK_T,), MASKED, tl.float32)
    for j in range(0, num_tiles):
        m_j = tl.load(max_ptr + tl.cast(j, tl.int64) * T + rows, mask=in_t, other=0.0)
        m = tl.maximum(m, m_j)
    s, e = tl.zeros((BLOCK_T,), tl.float32), tl.zeros((BLOCK_T,), tl.float32)
    for j in range(0, num_tiles):
        cell = tl.cast(j, tl.int64) * T + rows
        shift = tl.load(max_ptr + cell, mask=in_t, other=0.0) - m
        s_j = tl.load(sum_ptr + cell, mask=in_t, other=1.0)
        s += s_j * tl.exp(shift)
        if ENTROPY:
            e_j = tl.load(ent_ptr + cell, mask=in_t, other=0.0)
            e += tl.exp(shift) * (e_j + s_j * shift)
    log_s = tl.log(s)
    z_y = tl.load(target_ptr + rows, mask=in_t, other=0.0)
    logp = tl.minimum((z_y - m) - log_s, 0.0, propagate_nan=tl.PropagateNan.ALL)
    logp = tl.where(z_y == MASKED, logp - float("inf"), logp)
    tl.store(logp_ptr + rows, logp, mask=in_t)
    if ENTROPY:
        tl.store(entropy_ptr + rows, log_s - e / s, mask=in_t)
        tl.store(correct_ptr + rows, (z_y >= m) & (s > 0), mask=in_t)  # s is NaN or above 0
    if FUSED:
        c = tl.load(c_ptr + rows, mask=in_t, other=0.0)
        far = in_t & ~((m - c) + log_s <= limit)
        c = tl.where(far, m + log_s, c)
        tl.store(c_ptr + rows, c, mask=far)
        tl.store(active_ptr + tl.program_id(0), tl.max(far.to(tl.int32), 0))
        total = tl.exp((m - c) + log_s)
        weight = tl.load(weight_ptr + rows, mask=in_t, other=0.0)
        tl.store(scale_ptr + rows, -weight / total, mask=in_t)
        slope = 1.0
        if HAS_SOFTCAP:
            slope = 1.0 - (z_y / softcap) * (z_y / softcap)
        tl.store(patch_ptr + rows, total * (tl.exp(logp) - 1.0) * slope, mask=in_t)
    else:
        tl.store(lse_ptr + rows, m + log_s, mask=in_t)


@triton.jit
def anchor_kernel(
    x_TH, w_VH, y_ptr, bias_ptr, c_ptr, T, V, H, x_stride, w_stride, logit_scale, softcap,
    BLOCK_T: tl.constexpr, BLOCK_H: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One dot product of length H per token: 1 / V of a logits matmul. Reads nothing for a target
    outside [0, V)."""
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = rows < T
    y = tl.load(y_ptr + rows, mask=in_t, other=-1).to(tl.int64)
    has_target = (y >= 0) & (y < V)
    z = tl.zeros((BLOCK_T,), tl.float32)
    for h in range(0, H, BLOCK_H):
        cols = h + tl.arange(0, BLOCK_H)
        inside = has_target[:, None] & (cols < H)[None, :]
        x_rows = rows.to(tl.int64)[:, None] * x_stride
        x = tl.load(x_TH + x_rows + cols[None, :], mask=inside, other=0.0)
        w = tl.load(w_VH + y[:, None] * w_stride + cols[None, :], mask=inside, other=0.0)
        z += tl.sum(x.to(tl.float32) * w.to(tl.float32), 1)
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + y, mask=has_target, other=0.0).to(tl.float32)
    z = apply_head(z, bias, logit_scale, softcap, HAS_BIAS, HAS_SOFTCAP, True)
    tl.store(c_ptr + rows, z, mask=in_t)


@triton.jit
def patch_kernel(
    slab_TV, y_ptr, value_ptr, T, first_v, num_v, slab_stride, BLOCK_T: tl.constexpr
):  # fmt: skip
    """g_ty = value_t, rounded once, where the target's column lies in the slab's slice.

    An element of its own because 1 - p must not be what rounding leaves of a difference.
    """
    rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_t = rows < T
    col = tl.load(y_ptr + rows, mask=in_t, other=-1) - first_v
    value = tl.load(value_ptr + rows, mask=in_t, other=0.0).to(slab_TV.dtype.element_ty)
    inside = in_t & (col >= 0) & (col < num_v)
    tl.store(slab_TV + rows.to(tl.int64) * slab_stride + col, value, mask=inside)


@triton.jit
def column_kernel(
    slab_TV, scale_ptr, acc_ptr, index_ptr, count_ptr, T, num_v, slab_stride,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, HAS_SCALE: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """acc_v += sum_t s_t g_tv, one program per BLOCK_V columns (the bias's gradient); LISTED as in
    matmul.py."""
    if LISTED:
        num_v = tl.load(count_ptr)
    cols = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    in_v = cols < num_v
    place = cols
    if LISTED:
        place = tl.load(index_ptr + cols, mask=in_v, other=0)
    total = tl.load(acc_ptr + place, mask=in_v, other=0.0)
    for t in range(0, T, BLOCK_T):
        rows = t + tl.arange(0, BLOCK_T)
        inside = (rows < T)[:, None] & in_v[None, :]
        cell = rows.to(tl.int64)[:, None] * slab_stride + cols[None, :]
        g = tl.load(slab_TV + cell, mask=inside, other=0.0).to(tl.float32)
        if HAS_SCALE:
            g = g * tl.load(scale_ptr + rows, mask=rows < T, other=0.0)[:, None]
        total += tl.sum(g, 0)
    tl.store(acc_ptr + place, total, mask=in_v)


@triton.jit
def compact_kernel(
    slab_TV, index_ptr, count_ptr, total_ptr, lost_ptr, T, V, slab_stride, slab_columns,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """slab_ta = slab_{t, index_a} for a < count, in place, zeros behind them up to a whole block;
    lost_t = total_t - sum_a slab_ta, at least 0. Nothing where all columns stay.

    index_a >= a, so what a block of columns overwrites no later block reads; the barrier holds a
    program's own threads to reading before writing.
    """
    count = tl.load(count_ptr)
    if count < V:
        rows = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        in_t = rows < T
        start = rows.to(tl.int64)[:, None] * slab_stride
        kept = tl.zeros((BLOCK_T,), tl.float32)
        for a in range(0, count, BLOCK_V):
            cols = a + tl.arange(0, BLOCK_V)
            from_cols = tl.load(index_ptr + cols, mask=cols < count, other=0)
            inside = in_t[:, None] & (cols < count)[None, :]
            g = tl.load(slab_TV + start + from_cols[None, :], mask=inside, other=0.0)
            kept += tl.sum(g.to(tl.float32), 1)
            tl.debug_barrier()
            inside = in_t[:, None] & (cols < slab_columns)[None, :]
            tl.store(slab_TV + start + cols[None, :], g, mask=inside)
        total = tl.load(total_ptr + rows, mask=in_t, other=0.0)
        lost = tl.maximum(total - kept, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(lost_ptr + rows, lost, mask=in_t)
