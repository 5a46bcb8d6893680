"""Exact bounds and race checks of kernels in Triton's interpreter.

    with checked():              every launch inside is checked
        kernel[grid](...)

Every load, store and atomic is recorded by address and program. A launch fails if an address lies
outside all tensor arguments (`OutOfBounds`), if two programs store the same address, or if one
stores what another reads (`Race`): the interpreter runs programs in turn, a GPU does not.
`order` runs the programs reversed or shuffled, which shows a dependence that no address betrays.

Blind spots: an access meant for one argument that lands in another, and races inside a program.
"""

import contextlib
from dataclasses import dataclass, field

import numpy as np
import torch
from triton.runtime import interpreter
from triton.tools.tensor_descriptor import TensorDescriptor


class OutOfBounds(AssertionError):
    pass


class Race(AssertionError):
    pass


@dataclass
class Launch:
    """What one launch may touch and what it did."""

    name: str
    first: np.ndarray  # per argument: address of its first byte, ascending
    end: np.ndarray  # one past its last byte (or an overlapping neighbour's)
    labels: list[str]
    program: int = -1
    reads: list[tuple[int, np.ndarray]] = field(default_factory=list)
    writes: list[tuple[int, np.ndarray]] = field(default_factory=list)
    atomics: list[tuple[int, np.ndarray]] = field(default_factory=list)

    def touch(self, log: list, pointers, mask, what: str) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        active = np.broadcast_to(mask.data, pointers.data.shape)
        addresses = np.unique(pointers.data[active])
        self.check_bounds(addresses, size, what)
        log.append((self.program, addresses))

    def check_bounds(self, addresses: np.ndarray, size: int, what: str) -> None:
        if not len(addresses):
            return
        owner = np.searchsorted(self.first, addresses, side="right") - 1
        inside = (owner >= 0) & (addresses + np.uint64(size) <= self.end[np.maximum(owner, 0)])
        if not inside.all():
            address, near = int(addresses[~inside][0]), max(int(owner[~inside][0]), 0)
            raise OutOfBounds(
                f"{self.name}, program {self.program}: {what} {(~inside).sum()} elements outside "
                f"every argument, the first {address - int(self.end[near]):+d} bytes from the end "
                f"of {self.labels[near]}"
            )

    def check_races(self) -> None:
        writes, writers = _flat(self.writes)
        again = np.nonzero(writes[1:] == writes[:-1])[0]
        if len(again):
            pair = writers[again[0]], writers[again[0] + 1]
            raise Race(f"{self.name}: programs {pair[0]} and {pair[1]} store the same address")
        for log, what in ((self.reads, "loads"), (self.atomics, "updates")):
            _conflict(self.name, writes, writers, *_flat(log), f"{what} what {{}} stores")
        _conflict(self.name, *_flat(self.atomics), *_flat(self.reads), "loads what {} updates")


def _flat(log: list[tuple[int, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Sorted unique (address, program) pairs."""
    if not log:
        return np.empty(0, np.uint64), np.empty(0, np.int64)
    addresses = np.concatenate([a for _, a in log])
    programs = np.concatenate([np.full(len(a), p) for p, a in log])
    order = np.lexsort((programs, addresses))
    addresses, programs = addresses[order], programs[order]
    new = np.ones(len(addresses), bool)
    new[1:] = (addresses[1:] != addresses[:-1]) | (programs[1:] != programs[:-1])
    return addresses[new], programs[new]


def _conflict(name, written, writers, touched, touchers, sentence) -> None:
    """Raise if a program touches an address that another one writes."""
    if not len(written) or not len(touched):
        return
    at = np.minimum(np.searchsorted(written, touched), len(written) - 1)
    bad = np.nonzero((written[at] == touched) & (writers[at] != touchers))[0]
    if len(bad):
        other = sentence.format(f"program {writers[at[bad[0]]]}")
        raise Race(f"{name}: program {touchers[bad[0]]} {other} ({len(bad)} such)")


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, TensorDescriptor):
        yield value.base
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """Bytes [first, end) that its own elements span, not its storage."""
    first = tensor.data_ptr()
    if tensor.numel() == 0:
        return first, first
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return first, first + (last + 1) * tensor.element_size()


def _begin(executor, args, kwargs) -> Launch:
    named = [*zip(executor.arg_names, args, strict=False), *kwargs.items()]
    spans = sorted((*_extent(t), name) for name, value in named for t in _tensors(value))
    return Launch(
        executor.fn.__name__,
        np.array([s[0] for s in spans], np.uint64),
        # arguments may overlap (views of one tensor): reach to the furthest end so far
        np.maximum.accumulate(np.array([s[1] for s in spans], np.uint64)),
        [s[2] for s in spans],
    )


@contextlib.contextmanager
def checked(order: str | None = None, seed: int = 0):
    """Check every launch inside; `order`: None, "reversed" or "shuffled" programs."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    names = ("create_masked_load", "create_masked_store", "create_atomic_rmw", "set_grid_idx")
    plain = {name: getattr(builder, name) for name in names}
    call = executor.__call__
    current: list[Launch] = []
    permutation: list[np.ndarray] = []

    def load(self, pointers, mask, *rest, **options):
        current[-1].touch(current[-1].reads, pointers, mask, "loads")
        return plain["create_masked_load"](self, pointers, mask, *rest, **options)

    def store(self, pointers, value, mask, *rest, **options):
        current[-1].touch(current[-1].writes, pointers, mask, "stores")
        return plain["create_masked_store"](self, pointers, value, mask, *rest, **options)

    def atomic(self, op, pointers, value, mask, *rest, **options):
        current[-1].touch(current[-1].atomics, pointers, mask, "updates")
        return plain["create_atomic_rmw"](self, op, pointers, value, mask, *rest, **options)

    def set_program(self, x, y, z):
        gx, gy, gz = self.grid_dim
        number = (x * gy + y) * gz + z
        if order and not permutation:
            programs = np.arange(gx * gy * gz)
            permutation.append(
                programs[::-1]
                if order == "reversed"
                else np.random.default_rng(seed).permutation(programs)
            )
        if order:
            number = int(permutation[-1][number])
            x, y, z = number // (gy * gz), number // gz % gy, number % gz
        current[-1].program = number
        return plain["set_grid_idx"](self, x, y, z)

    def launch(self, *args, **kwargs):
        current.append(_begin(self, args, kwargs))
        permutation.clear()
        try:
            result = call(self, *args, **kwargs)
            current[-1].check_races()
            return result
        except interpreter.InterpreterError as error:
            if isinstance(error.__cause__, OutOfBounds):
                raise error.__cause__ from None
            raise
        finally:
            current.pop()

    try:
        for name, replacement in zip(names, (load, store, atomic, set_program), strict=True):
            setattr(builder, name, replacement)
        executor.__call__ = launch
        yield
    finally:
        for name, original in plain.items():
            setattr(builder, name, original)
        executor.__call__ = call
