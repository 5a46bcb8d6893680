"""From tensors to launches: pads, strides, descriptors and grids. Nothing here computes."""

import contextlib
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from redi_kernels.triton import reduce
from redi_kernels.triton.config import Config, Tile, fitting, num_programs
from redi_kernels.triton.logits import logits_kernel
from redi_kernels.triton.matmul import matmul_kernel


def on_device(tensor: Tensor):
    """Triton launches on the current device, which need not be the tensors'."""
    if tensor.is_cuda:
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


def operand(matrix: Tensor, block: tuple[int, int], tma: bool):
    """A matrix as the kernels read it: a pointer, or a descriptor of `block`-shaped boxes."""
    return TensorDescriptor.from_tensor(matrix, list(block)) if tma else matrix


def has_rows(matrix: Tensor) -> bool:
    """Rows of neighbouring elements that do not overlap: what the kernels can read."""
    return matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]


def can_use_tma(*matrices: Tensor) -> bool:
    """TMA wants 16-byte aligned bases and rows, these and those of a dense copy (scaled x)."""
    return all(
        m.data_ptr() % 16 == 0
        and all(n * m.element_size() % 16 == 0 for n in (m.stride(0), m.shape[1]))
        for m in matrices
    )


def padded(size: int, multiple: int) -> int:
    return triton.cdiv(size, multiple) * multiple


@dataclass
class Problem:
    """One call's tensors and options. `x` may be a chunk of the tokens."""

    x_TH: Tensor
    w_VH: Tensor
    y_T: Tensor
    bias_V: Tensor | None
    softcap: float | None
    logit_scale: float
    config: Config

    @property
    def sizes(self) -> tuple[int, int, int]:
        return self.x_TH.shape[0], self.w_VH.shape[0], self.x_TH.shape[1]

    def chunk(self, first: int, last: int) -> "Problem":
        return Problem(
            self.x_TH[first:last], self.w_VH, self.y_T[first:last],
            self.bias_V, self.softcap, self.logit_scale, self.config,
        )  # fmt: skip

    def new(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=self.x_TH.device)

    def slab(self, num_v: int) -> Tensor:
        """Room for d(logits) of all tokens and num_v columns in whole tiles: rows of the logits
        matmul's (dX reads none past T), columns of any."""
        rows, cols = padded(self.sizes[0], self.config.logits.m), padded(num_v, self.slab_unit)
        return self.new(rows, cols, dtype=self.x_TH.dtype)

    @property
    def slab_unit(self) -> int:
        """Whole tiles of a slab's columns."""
        return max(self.config.logits.n, *(tile.m for tile in self.config.dw))


@dataclass
class Statistics:
    """Per tile and token: max, sum, entropy term (or None); per token: the target's logit."""

    max_JT: Tensor
    sum_JT: Tensor
    ent_JT: Tensor | None
    target_T: Tensor

    @classmethod
    def empty(cls, problem: Problem, entropy: bool) -> "Statistics":
        T, V, _ = problem.sizes
        table = (triton.cdiv(V, problem.config.logits.n), T)
        # a target outside [0, V) has no owner and stays NaN: loud, without a host sync
        target_T = problem.new(T).fill_(float("nan"))
        ent_JT = problem.new(*table) if entropy else None
        return cls(problem.new(*table), problem.new(*table), ent_JT, target_T)


@dataclass
class Slab:
    """g = a exp(z - c) slope; a = None: 1. `active`: row blocks to work on; None: all."""

    out_TV: Tensor
    c_T: Tensor
    a_T: Tensor | None = None
    active: Tensor | None = None


@dataclass
class Fused:
    """Per token: weight in; anchor c in and out; scale and the target's element of the slab out.
    `active` marks the row blocks whose anchor was more than `limit` off."""

    weight_T: Tensor
    c_T: Tensor
    active: Tensor
    scale_T: Tensor
    patch_T: Tensor
    limit: float


def logits(
    problem: Problem,
    stats: Statistics | None = None,
    slab: Slab | None = None,
    first_v: int = 0,
    num_v: int | None = None,
) -> None:
    """Launch the logits matmul over a slice of the vocabulary; fills `stats` and `slab`."""
    p, config, tile = problem, problem.config, problem.config.logits
    T, V, H = p.sizes
    num_v = V if num_v is None else num_v
    grid = num_programs(config, p.x_TH.device, triton.cdiv(T, tile.m) * triton.cdiv(num_v, tile.n))
    logits_kernel[(grid,)](
        operand(p.x_TH, (tile.m, tile.k), config.tma),
        operand(p.w_VH, (tile.n, tile.k), config.tma),
        p.y_T, p.bias_V,
        stats and stats.max_JT, stats and stats.sum_JT, stats and stats.ent_JT,
        stats and stats.target_T,
        slab and slab.out_TV, slab and slab.a_T, slab and slab.c_T,
        slab and slab.active,
        T, V, H, first_v, num_v, p.x_TH.stride(0), p.w_VH.stride(0),
        slab.out_TV.stride(0) if slab else 0, p.logit_scale, p.softcap or 0.0,
        BLOCK_T=tile.m, BLOCK_V=tile.n, BLOCK_H=tile.k, GROUP_T=tile.group,
        PARTS=2 * tile.parts if p.softcap else tile.parts,  # a cap needs more temporaries
        HAS_BIAS=p.bias_V is not None, HAS_SOFTCAP=p.softcap is not None,
        HAS_SCALE=p.logit_scale != 1.0,
        EVEN_H=H % tile.k == 0, TMA=config.tma,
        STATS=stats is not None, ENTROPY=stats is not None and stats.ent_JT is not None,
        SLAB=slab is not None, SCALED=slab is not None and slab.a_T is not None,
        HAS_ACTIVE=slab is not None and slab.active is not None,
        FLATTEN=config.persistent and not (slab and slab.active is not None),
        PRECISION=config.precision, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip


def finish(
    problem: Problem, stats: Statistics, logp_T: Tensor, lse_T: Tensor | None = None,
    entropy_T: Tensor | None = None, correct_T: Tensor | None = None, fused: Fused | None = None,
) -> None:  # fmt: skip
    """Statistics of tiles -> per-token results, or what the fused path needs."""
    T = problem.sizes[0]
    block_t = problem.config.logits.m  # `active` marks blocks of the logits matmul
    reduce.reduce_kernel[(triton.cdiv(T, block_t),)](
        stats.max_JT, stats.sum_JT, stats.ent_JT, stats.target_T,
        logp_T, lse_T, entropy_T, correct_T,
        fused and fused.weight_T, fused and fused.c_T, fused and fused.active,
        fused and fused.scale_T, fused and fused.patch_T,
        T, stats.max_JT.shape[0], problem.softcap or 0.0, fused.limit if fused else 0.0,
        BLOCK_T=block_t, ENTROPY=entropy_T is not None, FUSED=fused is not None,
        HAS_SOFTCAP=problem.softcap is not None,
    )  # fmt: skip


@dataclass
class Listed:
    """The slab's columns as a list of vocabulary rows, ascending: index_V[:count]. The device's."""

    index_V: Tensor  # int64
    count: Tensor  # int32 [], at least 1


def matmul(
    config: Config, tiles: tuple[Tile, ...], a: Tensor, b_KN: Tensor, out_MN: Tensor, *,
    transposed: bool, num_k: int, first_k: int = 0, alpha: float = 1.0,
    scale_M: Tensor | None = None, acc_MN: Tensor | None = None, listed: Listed | None = None,
) -> None:  # fmt: skip
    """out = acc + scale * alpha * (a or a.T) @ b[first_k : first_k + num_k]; one rounding. With a
    list, a's columns stand for those rows of b, or of acc and out (transposed)."""
    M, N = out_MN.shape
    tile = fitting(tiles, N)
    gathers = listed is not None and not transposed
    # a load whose address is loaded takes two steps of the pipeline; FFMA hides one by itself
    is_deep = gathers and b_KN.dtype != torch.float32
    stages = 2 * tile.stages - 1 if is_deep else tile.stages
    a_block = (tile.k, tile.m) if transposed else (tile.m, tile.k)
    grid = num_programs(config, b_KN.device, triton.cdiv(M, tile.m) * triton.cdiv(N, tile.n))
    matmul_kernel[(grid,)](
        operand(a, a_block, config.tma),
        operand(b_KN, (tile.k, tile.n), config.tma and not gathers),
        acc_MN, out_MN, scale_M, listed and listed.index_V, listed and listed.count,
        M, N, b_KN.shape[0], first_k, num_k, a.stride(0), b_KN.stride(0),
        acc_MN.stride(0) if acc_MN is not None else 0, out_MN.stride(0), alpha,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP_M=tile.group, PARTS=tile.parts,
        TRANSPOSED=transposed, HAS_SCALE=scale_M is not None, ACCUMULATE=acc_MN is not None,
        LISTED=listed is not None,
        EVEN_N=N % tile.n == 0, TMA=config.tma, FLATTEN=config.persistent,
        PRECISION=config.precision, num_warps=tile.warps, num_stages=stages,
    )  # fmt: skip


def patch(problem: Problem, slab_TV: Tensor, value_T: Tensor, first_v: int, num_v: int) -> None:
    """The target's element of each row of the slab, where it lies in the slice."""
    T, block_t = problem.sizes[0], 128
    reduce.patch_kernel[(triton.cdiv(T, block_t),)](
        slab_TV, problem.y_T, value_T, T, first_v, num_v, slab_TV.stride(0), BLOCK_T=block_t
    )


def column_sum(
    slab_TV: Tensor, scale_T: Tensor | None, acc_V: Tensor, T: int, listed: Listed | None = None
) -> None:
    """acc_v += sum_t scale_t slab_tv over the first T rows and acc's columns."""
    block_v = 64
    reduce.column_kernel[(triton.cdiv(acc_V.numel(), block_v),)](
        slab_TV, scale_T, acc_V, listed and listed.index_V, listed and listed.count,
        T, acc_V.numel(), slab_TV.stride(0), BLOCK_T=64, BLOCK_V=block_v,
        HAS_SCALE=scale_T is not None, LISTED=listed is not None,
    )  # fmt: skip


def compact(problem: Problem, slab_TV: Tensor, listed: Listed, total_T: Tensor) -> Tensor:
    """The slab's listed columns move to its left; returns what each row's others sum to."""
    T, V, _ = problem.sizes
    lost_T, block_t = problem.new(T).zero_(), 2
    reduce.compact_kernel[(triton.cdiv(T, block_t),)](
        slab_TV, listed.index_V, listed.count, total_T, lost_T, T, V, slab_TV.stride(0),
        slab_TV.shape[1], BLOCK_T=block_t, BLOCK_V=1024,
    )  # fmt: skip
    return lost_T
