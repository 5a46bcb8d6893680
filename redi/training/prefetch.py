"""The next step's packs, made in a thread while the present step computes."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Generic, TypeVar

from torch import Tensor

from redi.data.pack import Pack

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """`get(step)` is `make(step)`, and starts on `make(step + 1)`.

    The order of the calls changes nothing but the time: `make` must depend on the step alone. What
    it raises for a step is raised by that step's `get`. One thread makes everything, so `make`
    needs no locks.
    """

    def __init__(self, make: Callable[[int], Item]):
        self._make = make
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="redi-prefetch")
        self._ahead: dict[int, Future[Item]] = {}

    def get(self, step: int) -> Item:
        made = self._ahead.pop(step, None) or self._thread.submit(self._make, step)
        self._ahead = {step + 1: self._thread.submit(self._make, step + 1)}
        return made.result()

    def close(self) -> None:
        """Drops what was made ahead; waits for at most one `make`."""
        self._thread.shutdown(cancel_futures=True)


def pin(pack: Pack) -> Pack:
    """The same pack in page-locked memory, from which a copy to CUDA waits for nobody."""
    pinned: dict[str, Any] = {
        name: value.pin_memory() for name, value in vars(pack).items() if isinstance(value, Tensor)
    }
    return replace(pack, **pinned)
