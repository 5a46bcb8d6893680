"""Tile shapes and the form of the loads, per device and dtype. One place, no autotuning: a choice
that depended on timing would make log-probs depend on it too."""

import os
from dataclasses import dataclass

import torch

from redi_kernels.head import SLAB_BYTES


@dataclass(frozen=True)
class Tile:
    """One matmul's output tile M x N, its step K, the swizzle's group, warps and pipeline depth.
    The epilogue takes the tile in `parts` vertical strips: fewer temporaries at a time."""

    m: int
    n: int
    k: int
    group: int = 8
    warps: int = 8
    stages: int = 3
    parts: int = 1


@dataclass(frozen=True)
class Config:
    """`logits`: tokens x vocabulary x hidden. `dx`: tokens x hidden x vocabulary. `dw`: vocabulary
    x hidden x tokens; of several tiles the one whose n pads this H least (n = 32: fast mode's
    moments). `tma`: loads by host
    tensor descriptors. `persistent`: one program per SM walks the tiles. `slab_bytes` bounds the
    buffer of d(logits), but a slice of the vocabulary has at least `min_slice` columns: dX's fp32
    sum moves 8 T H bytes per slice, which at 4096 columns is less than a third of the time of the
    slice's dX matmul."""

    logits: Tile
    dx: tuple[Tile, ...]
    dw: tuple[Tile, ...]
    tma: bool = False
    persistent: bool = False
    precision: str = "ieee"
    slab_bytes: int = SLAB_BYTES
    min_slice: int = 4096

    def __post_init__(self) -> None:
        # d(logits) is zero in whole tiles of the logits matmul: the others must not read past them
        assert all(self.logits.n % tile.k == 0 for tile in self.dx)
        assert all(self.logits.m % tile.k == 0 for tile in self.dw)


def fitting(tiles: tuple[Tile, ...], columns: int) -> Tile:
    """The tile that pads `columns` least; the first of equals."""
    return min(tiles, key=lambda tile: -columns % tile.n)


INTERPRETER = Config(
    Tile(64, 128, 64, parts=2), (Tile(64, 64, 64),), (Tile(128, 64, 64), Tile(128, 32, 64)),
    persistent=True, slab_bytes=256 << 10, min_slice=128,
)  # fmt: skip
# Ampere: 128 x 128 leaves registers for the epilogue; dX and dW have none to speak of. 163 KiB of
# shared memory. Pointers: asynchronous copies need no descriptor, and tiles are not persistent
# because there is nothing to prefetch across them without TMA.
_SM80_MATMUL = (
    Tile(128, 256, 32, stages=4, parts=8),
    Tile(128, 128, 64, parts=4),
    Tile(128, 64, 64, warps=4, parts=2),
)
SM80 = Config(
    Tile(128, 128, 64, parts=4), _SM80_MATMUL, (*_SM80_MATMUL, Tile(128, 32, 64, warps=4))
)
# Hopper: 128 x 256 on two warp groups is the largest tile whose fp32 accumulator (128 registers a
# thread) leaves room for an epilogue, and at 85 FLOP per byte of L2 traffic it is needed. Four
# stages fill 227 KiB. Strips of 32 (logits) and 64 columns keep all variants free of spills.
_SM90_MATMUL = (
    Tile(128, 256, 64, stages=4, parts=4),
    Tile(256, 128, 64, parts=4),
    Tile(256, 64, 64, stages=4, parts=2),
)
SM90 = Config(
    Tile(128, 256, 64, stages=4, parts=8),
    _SM90_MATMUL,
    (*_SM90_MATMUL, Tile(256, 32, 64, stages=4)),
    tma=True,
    persistent=True,
)
# fp32 runs on the ordinary cores: tf32 would not be the fp32 that was asked for.
_FP32_TILE = Tile(128, 64, 16)
FP32 = Config(_FP32_TILE, (_FP32_TILE,), (_FP32_TILE, Tile(128, 32, 16)))
# AMD: 64 KiB of LDS.
_CDNA_TILE = Tile(128, 128, 32, stages=2, parts=4)
CDNA = Config(_CDNA_TILE, (_CDNA_TILE,), (_CDNA_TILE, Tile(128, 32, 32, warps=4, stages=2)))


def select(device: torch.device, dtype: torch.dtype) -> Config:
    """The configuration for tensors of `dtype` on `device`."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        return INTERPRETER
    if torch.version.hip:
        return for_target("hip", 0, dtype)
    major, minor = torch.cuda.get_device_capability(device)
    return for_target("cuda", 10 * major + minor, dtype)


def without_tma(config: Config) -> Config:
    """For matrices that TMA cannot read: rows not 16-byte aligned."""
    return SM80 if config.tma else config


def for_target(vendor: str, capability: int, dtype: torch.dtype) -> Config:
    """By vendor ("cuda" or "hip") and compute capability (90 is Hopper)."""
    if dtype == torch.float32:
        return FP32
    if vendor == "hip":
        return CDNA
    # 12x, consumer Blackwell, has 99 KiB of shared memory a block, too little for Hopper's tiles
    return SM90 if 90 <= capability < 120 else SM80


def num_programs(config: Config, device: torch.device, num_tiles: int) -> int:
    """Programs of a launch: all tiles, or as many as run at once."""
    if not config.persistent:
        return num_tiles
    if device.type == "cpu":  # the interpreter: few programs, so that each walks several tiles
        return min(num_tiles, 3)
    return min(num_tiles, torch.cuda.get_device_properties(device).multi_processor_count)
