"""The two matmuls of the backward, one kernel: out = acc + r_m sum_k a_mk b_kn.

    dX_TH = G_TV  W_VH      a = slab,            reduction over a vocabulary slice
    dW_VH = G_TV^T X_TH     a = slab transposed, reduction over tokens

One program owns one output tile: fp32 accumulators, no atomics, no locks, the same bits each run.
Where the reduction arrives in pieces (a slab per slice), `acc_MN` is the running fp32 sum, read and
written by the tile's owner; the last piece goes straight to the output's dtype: one rounding.
The slab is padded with zeros to whole tiles, so b's rows past the end are multiplied by zero.

LISTED (fast.py): the slab's column a is vocabulary row index_a, a < count, which only the device
knows. In dX the list picks b's rows, in dW the rows of acc and out; tiles past the count are no
work. TMA cannot gather, so W's listed rows are read through pointers.
"""

import triton
import triton.language as tl

from redi_kernels.triton.tiles import columns, load_listed, load_tile, swizzle


@triton.jit
def matmul_kernel(
    a_ref, b_KN, acc_MN, out_MN, scale_ptr, index_ptr, count_ptr,
    M, N, K, first_k, num_k, a_stride, b_stride, acc_stride, out_stride, alpha,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
    PARTS: tl.constexpr, TRANSPOSED: tl.constexpr, HAS_SCALE: tl.constexpr,
    ACCUMULATE: tl.constexpr, LISTED: tl.constexpr, EVEN_N: tl.constexpr, TMA: tl.constexpr,
    FLATTEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """K rows in b; this piece reduces over [first_k, first_k + num_k), columns [0, num_k) of a."""
    if LISTED:
        if TRANSPOSED:
            M = tl.load(count_ptr)
        else:
            num_k = tl.load(count_ptr)
    num_m, num_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    padded_k = tl.cdiv(num_k, BLOCK_K) * BLOCK_K
    for tile in tl.range(tl.program_id(0), num_m * num_n, tl.num_programs(0), flatten=FLATTEN):
        pid_m, pid_n = swizzle(tile, num_m, num_n, GROUP_M)
        row, col = pid_m * BLOCK_M, pid_n * BLOCK_N
        out_tile = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, num_k, BLOCK_K):
            if TRANSPOSED:
                a = load_tile(
                    a_ref, a_stride, k, row, padded_k, M, BLOCK_K, BLOCK_M, True, TMA, True
                )
            else:
                a = load_tile(a_ref, a_stride, row, k, M, K, BLOCK_M, BLOCK_K, False, TMA, True)
            if LISTED and not TRANSPOSED:
                b = load_listed(
                    b_KN, b_stride, index_ptr, k, num_k, col, N, BLOCK_K, BLOCK_N, EVEN_N
                )
            else:
                b = load_tile(
                    b_KN, b_stride, first_k + k, col, K, N, BLOCK_K, BLOCK_N, False, TMA, EVEN_N
                )
            out_tile = tl.dot(a, b, out_tile, input_precision=PRECISION)

        rows = row + tl.arange(0, BLOCK_M)
        scale = alpha
        if HAS_SCALE:
            scale = alpha * tl.load(scale_ptr + rows, mask=rows < M, other=0.0)[:, None]
        parts = columns(out_tile, PARTS)
        for i in tl.static_range(PARTS):
            cols = col + i * (BLOCK_N // PARTS) + tl.arange(0, BLOCK_N // PARTS)
            inside = (rows < M)[:, None] & (cols < N)[None, :]
            out = parts[i] * scale
            cell = rows.to(tl.int64)[:, None]
            if LISTED and TRANSPOSED:
                cell = tl.load(index_ptr + rows, mask=rows < M, other=0)[:, None]
            if ACCUMULATE:
                out += tl.load(acc_MN + cell * acc_stride + cols[None, :], mask=inside, other=0.0)
            out = out.to(out_MN.dtype.element_ty)
            tl.store(out_MN + cell * out_stride + cols[None, :], out, mask=inside)
