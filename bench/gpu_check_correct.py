"""The default paths against fp64: every dtype, head and kind of shape that is shipped for."""

import functools

from gpu_check_problem import (
    DTYPES,
    PATHS,
    REHEARSAL,
    gradients,
    is_alive,
    problem,
    ratios,
    same_bits,
)
from gpu_check_rows import Row, Values

SHAPES = [(4100, 1536, 50257), (1, 64, 1000), (1000, 72, 5003)]
if REHEARSAL:
    SHAPES = [(70, 32, 200)]


def rows(part: str, rehearse: bool) -> list[Row]:
    """Plain heads in bf16 first, which is what most models train."""
    heads = [("bf16", False), ("bf16", True), ("fp32", False), ("fp32", True),
             ("fp16", False), ("fp16", True)]  # fmt: skip
    return [
        Row(
            f"{dtype}, {'bias, cap, scale' if full else 'plain'}, {path}, {shape}",
            functools.partial(check, shape, dtype, full, path),
            seconds=4.0 if shape == SHAPES[0] else 1.5,
        )
        for dtype, full in heads for path in PATHS for shape in SHAPES
    ]  # fmt: skip


def check(
    shape: tuple[int, int, int], dtype: str, full: bool, path: str
) -> tuple[Values, bool]:  # fmt: skip
    p = problem(shape, DTYPES[dtype], full=full)
    ours = gradients(p, path, "triton", p.x_TH.dtype)
    again = gradients(p, path, "triton", p.x_TH.dtype)
    found, near = ratios(p, ours, path)
    at_most_0, same = bool((ours["logp"] <= 0).all()), same_bits(ours, again)
    values = found | {"logp <= 0": at_most_0, "same bits twice": same}
    return values, near and at_most_0 and same


__all__ = ["is_alive", "rows"]
