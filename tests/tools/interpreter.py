"""Repairs for Triton's interpreter, so that what it computes is what a GPU computes.

Call `install()` before the first launch in a process started with TRITON_INTERPRET=1. As shipped
(triton 3.4 to 3.9) the interpreter keeps bf16 as raw uint16 and is silently wrong with it:

* `tl.dot` and arithmetic work on the raw bits       -> widened to fp32 (exact products)
* `tl.dot` is BLAS's matmul, in which a row's bits may depend on its place -> one sum per element
* fp32 -> bf16 casts drop the low bits               -> round to nearest, ties to even
* every nested @jit call re-scans all builtins       -> once per launch (2-3 x faster)
* numpy >= 2.4 refuses int() of a 1-element array    -> loop bounds are read as scalars (triton 3.6)
* `@triton.autotune` asks a driver for timings       -> takes the first configuration (peers only)
"""

import numpy as np
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.autotuner import Autotuner

_Handle = interpreter.TensorHandle


def bf16_to_fp32(bits):
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def fp32_to_bf16(values):
    """Round to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    is_odd = (bits >> np.uint32(16)) & np.uint32(1)
    rounded = ((bits + np.uint32(0x7FFF) + is_odd) >> np.uint32(16)).astype(np.uint16)
    is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)
    return np.where(is_nan, np.uint16(0x7FC0), rounded).reshape(np.shape(values))


def row_invariant_product(a, b):
    """a [..., M, K] @ b [..., K, N], every element summed one k after the other.

    A GPU gives a row the same bits wherever it lies in a tile; BLAS, whose kernels cut a matrix up
    by its shape and by the CPU, does not. Here each step is an element-wise product and an
    element-wise sum, both rounded as IEEE says: a row of the result can depend on that row alone.
    """
    columns = np.ascontiguousarray(np.moveaxis(a, -1, 0))[..., None]
    rows = np.ascontiguousarray(np.moveaxis(b, -2, 0))[..., None, :]
    total = np.zeros((columns[0] * rows[0]).shape, a.dtype)
    product = np.empty_like(total)
    for column, row in zip(columns, rows, strict=True):
        np.multiply(column, row, out=product)
        total += product
    return total


def _is_bf16(handle):
    return handle.dtype.scalar == tl.bfloat16


def _widen(handle):
    return _Handle(bf16_to_fp32(handle.data), tl.float32) if _is_bf16(handle) else handle


def _narrow(handle):
    return _Handle(fp32_to_bf16(handle.data), tl.bfloat16)


def install():
    """Patch the interpreter in this process. Calling it twice changes nothing."""
    if getattr(interpreter, "_redi_repaired", False):
        return
    interpreter._redi_repaired = True
    _repair_builder(interpreter.InterpreterBuilder)
    _repair_reductions(interpreter.ReduceOps)
    _scan_builtins_once(interpreter.InterpretedFunction, interpreter.GridExecutor)
    _repair_loop_bounds()
    Autotuner.do_bench = property(
        lambda self: lambda call, quantiles=None, **_: (call(), [1.0] * 3)[1]
    )
    np.seterr(over="ignore", invalid="ignore", divide="ignore")


def _repair_builder(builder):
    cast_impl = builder.cast_impl
    binary_op, unary_op = builder.binary_op, builder.unary_op

    def cast(self, source, target):
        source_is_bf16, target_is_bf16 = _is_bf16(source), target.scalar == tl.bfloat16
        if source_is_bf16 == target_is_bf16:
            return cast_impl(self, source, target)
        if source_is_bf16:
            wide = _widen(source)
            return wide if target.scalar == tl.float32 else cast_impl(self, wide, target)
        if source.dtype.scalar != tl.float32:
            source = cast_impl(self, source, tl.float32)
        return _narrow(source)

    def dot(self, a, b, accumulator, *args):
        kind = accumulator.data.dtype
        product = row_invariant_product(_widen(a).data.astype(kind), _widen(b).data.astype(kind))
        return _Handle(product + accumulator.data, accumulator.dtype.scalar)

    def binary(self, left, right, op):
        if not (_is_bf16(left) and _is_bf16(right)):
            return binary_op(self, left, right, op)
        result = binary_op(self, _widen(left), _widen(right), op)
        return result if result.data.dtype == np.bool_ else _narrow(result)

    def unary(self, value, op):
        if _is_bf16(value):
            return _narrow(unary_op(self, _widen(value), op))
        return unary_op(self, value, op)

    builder.cast_impl, builder.create_dot = cast, dot
    builder.binary_op, builder.unary_op = binary, unary


def _repair_reductions(reduce_ops):
    apply = reduce_ops.apply

    def typed(handle, scalar):
        shape = list(handle.data.shape)
        return tl.tensor(handle, tl.block_type(scalar, shape) if shape else scalar)

    def repaired(self, value):
        if isinstance(value, tl.tensor) and _is_bf16(value.handle):
            wide = apply(self, typed(_widen(value.handle), tl.float32))
            return typed(_narrow(wide.handle), tl.bfloat16)
        return apply(self, value)

    reduce_ops.apply = repaired


def _scan_builtins_once(function, executor):
    call, launch = function.__call__, executor.__call__
    scanned: set[int] = set()
    depth = [0]

    def nested(self, *args, **kwargs):
        module = id(self.fn.__globals__)
        if depth[0] and module in scanned:
            try:
                return self.rewrite()(*args, **kwargs)
            except Exception as error:
                raise interpreter.InterpreterError(repr(error)) from error
        scanned.add(module)
        return call(self, *args, **kwargs)

    def outermost(self, *args, **kwargs):
        depth[0] += 1
        scanned.clear()
        try:
            return launch(self, *args, **kwargs)
        finally:
            depth[0] -= 1

    function.__call__, executor.__call__ = nested, outermost


def _repair_loop_bounds():
    patch = interpreter._patch_lang_tensor

    def patched(tensor, *scope):
        patch(tensor, *scope)
        as_index = lambda self: int(self.handle.data.reshape(-1)[0])
        if scope:
            scope[0].set_attr(tensor, "__index__", as_index)
        else:
            tensor.__index__ = as_index

    interpreter._patch_lang_tensor = patched
