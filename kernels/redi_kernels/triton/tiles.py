"""Device functions the kernels share: which tile is next, how a tile is read, what the head does.

Shapes: T tokens, V vocabulary, H hidden. Every matrix is row-major with unit column stride.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)  # exp2 is one instruction, exp five
MASKED = tl.constexpr(-1e18)  # a logit that is not there: far below all, its square finite


@triton.jit
def swizzle(tile, num_m, num_n, GROUP_M: tl.constexpr):
    """Tile number -> (row block, column block): down a group of GROUP_M rows, then one column on.

    Programs that run together then share GROUP_M blocks of the left operand, which stay in L2
    while the right operand streams past: it is read num_m / GROUP_M times instead of num_m.
    """
    tiles_per_group = GROUP_M * num_n
    first_m = (tile // tiles_per_group) * GROUP_M
    rows = tl.minimum(num_m - first_m, GROUP_M)
    local = tile % tiles_per_group
    return first_m + local % rows, local // rows


@triton.jit
def load_tile(
    ref, stride, row, col, num_rows, num_cols, ROWS: tl.constexpr, COLS: tl.constexpr,
    TRANSPOSED: tl.constexpr, TMA: tl.constexpr, EVEN_COLS: tl.constexpr,
):  # fmt: skip
    """`ref[row : row + ROWS, col : col + COLS]` or its transpose; columns past the end are zero.

    Rows past the end are zero (TMA) or repeat the last row (pointers): callers either mask the
    result or multiply those rows by zeros, which saves a mask in every inner loop.
    """
    if TMA:
        tile = ref.load([row, col])
        return tile.T if TRANSPOSED else tile
    else:
        rows = tl.minimum(row + tl.arange(0, ROWS), num_rows - 1).to(tl.int64) * stride
        cols = col + tl.arange(0, COLS)
        # transposed pointers, not a transposed load: sm_80 would take the latter through registers
        offsets = cols[:, None] + rows[None, :] if TRANSPOSED else rows[:, None] + cols[None, :]
        if EVEN_COLS:
            return tl.load(ref + offsets)
        else:
            inside = cols < num_cols
            mask = inside[:, None] if TRANSPOSED else inside[None, :]
            return tl.load(ref + offsets, mask=mask, other=0.0)


@triton.jit
def load_listed(
    matrix, stride, index_ptr, first, count, col, num_cols, ROWS: tl.constexpr,
    COLS: tl.constexpr, EVEN_COLS: tl.constexpr,
):  # fmt: skip
    """`matrix[index[first : first + ROWS], col : col + COLS]`; row 0 past the `count`-th."""
    place = first + tl.arange(0, ROWS)
    rows = tl.load(index_ptr + place, mask=place < count, other=0)
    cols = col + tl.arange(0, COLS)
    offsets = rows[:, None] * stride + cols[None, :]
    if EVEN_COLS:
        return tl.load(matrix + offsets)
    else:
        return tl.load(matrix + offsets, mask=(cols < num_cols)[None, :], other=0.0)


@triton.jit
def columns(z, PARTS: tl.constexpr):
    """An accumulator as PARTS (a power of two) tensors of neighbouring columns, left to right.

    An epilogue that works on one part at a time needs registers for the temporaries of that part
    only. The split is free: columns lie in a thread's own registers.
    """
    if PARTS == 1:
        return (z,)
    else:
        halves = tl.reshape(z, (z.shape[0], 2, z.shape[1] // 2))
        left, right = tl.split(tl.permute(halves, (0, 2, 1)))
        return columns(left, PARTS // 2) + columns(right, PARTS // 2)


@triton.jit
def apply_head(
    z, bias, logit_scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SCALE: tl.constexpr,
):  # fmt: skip
    """Raw products -> logits: z = softcap * tanh((x.w * logit_scale + bias) / softcap).

    bias broadcasts against z. A bias of -inf (a masked token) becomes MASKED, so that 0 * z is 0
    and not NaN; a NaN stays (by itself `maximum` returns the operand that is none).
    tanh a = 1 - 2 / (exp(2 a) + 1): exp may overflow, the result does not.
    """
    if HAS_SCALE:
        z = z * logit_scale
    if HAS_BIAS:
        z = tl.maximum(z + bias, MASKED, propagate_nan=tl.PropagateNan.ALL)
    if HAS_SOFTCAP:
        z = softcap - 2.0 * softcap / (tl.exp2(z * (2.0 * LOG2E / softcap)) + 1.0)
    return z
