"""What a computation costs, counted: Triton launches in the interpreter, torch ops by dispatch.

`KernelCost` sees every load, store, dot and exponential of the interpreter. Per kernel name:
launches, programs, FLOP of tl.dot (padding included), exponentials, bytes asked for by active lanes
("requested": what L2 must serve, an upper bound on HBM traffic) and distinct 32-byte sectors per
launch ("footprint": what HBM must move at least once, a lower bound).
`TorchCost` adds up torch ops: FLOP of matmuls, bytes in and out, and the peak of new tensors.
"""

import contextlib
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import torch
from redi_kernels import logprobs
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from redi.training.rehearsal import LiveBytes

SECTOR_BITS = 5


@dataclass
class Kernel:
    """Totals of one kernel over its launches."""

    launches: int = 0
    programs: int = 0
    flops: int = 0
    exps: int = 0
    requested: int = 0
    footprint: int = 0
    sectors: dict[str, list[np.ndarray]] = field(default_factory=lambda: {"load": [], "store": []})

    def access(self, kind: str, pointers, mask) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = pointers.data[active]
        self.requested += size * len(addresses)
        self.sectors[kind].append(np.unique(addresses >> np.uint64(SECTOR_BITS)))

    def end_launch(self) -> None:
        for touched in self.sectors.values():
            if touched:
                self.footprint += len(np.unique(np.concatenate(touched))) << SECTOR_BITS
            touched.clear()


class KernelCost:
    """`with KernelCost() as cost:` counts every launch inside; `cost.kernels` by name."""

    def __init__(self) -> None:
        self.kernels: dict[str, Kernel] = {}
        self.current: list[Kernel] = []
        self.undo = contextlib.ExitStack()

    def __enter__(self) -> "KernelCost":
        from triton.runtime import interpreter

        builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
        for name in ("create_masked_load", "create_masked_store", "create_atomic_rmw"):
            self._wrap(builder, name, self._accessing(name))
        for name in ("create_exp", "create_exp2"):
            self._wrap(builder, name, self._exponential)
        self._wrap(builder, "create_dot", self._dot)
        self._wrap(builder, "set_grid_idx", self._program)
        self._wrap(executor, "__call__", self._launch)
        return self

    def __exit__(self, *error) -> None:
        self.undo.close()

    def _wrap(self, owner, name, make) -> None:
        original = getattr(owner, name)
        setattr(owner, name, make(original))
        self.undo.callback(setattr, owner, name, original)

    def _accessing(self, name):
        def make(original):
            def load(builder, pointers, mask, *rest, **options):
                self.current[-1].access("load", pointers, mask)
                return original(builder, pointers, mask, *rest, **options)

            def store(builder, pointers, value, mask, *rest, **options):
                self.current[-1].access("store", pointers, mask)
                return original(builder, pointers, value, mask, *rest, **options)

            def atomic(builder, op, pointers, value, mask, *rest, **options):
                for kind in ("load", "store"):
                    self.current[-1].access(kind, pointers, mask)
                return original(builder, op, pointers, value, mask, *rest, **options)

            kinds = {"load": load, "store": store, "rmw": atomic}
            return kinds[name.rsplit("_", 1)[1]]

        return make

    def _exponential(self, original):
        def counted(builder, value):
            self.current[-1].exps += value.data.size
            return original(builder, value)

        return counted

    def _dot(self, original):
        def counted(builder, a, b, accumulator, *rest, **options):
            self.current[-1].flops += 2 * accumulator.data.size * a.data.shape[-1]
            return original(builder, a, b, accumulator, *rest, **options)

        return counted

    def _program(self, original):
        def counted(builder, *index):
            self.current[-1].programs += 1
            return original(builder, *index)

        return counted

    def _launch(self, original):
        def counted(executor, *args, **kwargs):
            kernel = self.kernels.setdefault(executor.fn.__name__, Kernel())
            kernel.launches += 1
            self.current.append(kernel)
            try:
                with _disable_current_modes():  # the interpreter's own copies are not the kernel's
                    return original(executor, *args, **kwargs)
            finally:
                self.current.pop()
                kernel.end_launch()

        return counted


class TorchCost(LiveBytes):
    """FLOP of matmuls, bytes in and out of every op that moves data, live and peak new bytes; of
    redi_kernels' own operators, what is inside them."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.bytes = self.ops = 0
        self.by_op: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func.namespace == "redi_kernels":  # a mode does not see into an operator by itself
            with self:
                return getattr(logprobs, "_" + func._opname)._init_fn(*args, **kwargs)
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if func._overloadpacket in flop_registry:
            self.flops += flop_registry[func._overloadpacket](*args, **kwargs, out_val=out)
        elif func._opname in ("addmm_", "addmm"):
            self.flops += 2 * args[1].shape[0] * args[1].shape[1] * args[2].shape[1]
        if not _is_free(func):
            moved = _moved(func._opname, _tensors((args, kwargs)), _tensors(out))
            self.ops += 1
            self.bytes += moved
            self.by_op[func._opname] += moved
        return out


def _tensors(tree) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def _is_free(func) -> bool:
    free = ("empty", "empty_like", "new_empty", "empty_strided", "detach", "_unsafe_view", "alias")
    return func.is_view or func._opname in (*free, "lift_fresh", "set_")


def _moved(name: str, inputs: list[torch.Tensor], outputs: list[torch.Tensor]) -> int:
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)
    if name in ("zero_", "fill_", "zeros", "full", "new_zeros", "new_full", "ones", "zeros_like"):
        return size(outputs)
    if name == "copy_":
        return size(inputs)
    return size(inputs) + size(outputs)
