"""Traces of one optimizer step, laid end to end in packs: no padding, no trace ever cut.

Every denominator of a loss is counted over the step beforehand, so any packing of a step gives the
same gradient; packs only decide what is in memory at once, and which rank computes what.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from redi.data.tokenize import Trace

IGNORE_INDEX = -100
# What a squared token costs beside a token, by default: Qwen2.5-Math-1.5B's (PackedLM counts it).
SQUARES = 2.8e-5


@dataclass(frozen=True)
class Pack:
    """T tokens of S whole traces. Host tensors; what is no tensor spares device syncs."""

    input_ids_T: Tensor  # int64
    position_ids_T: Tensor  # int64, restart at 0 in each trace
    targets_T: Tensor  # int64: the next token where that is a completion token, else -100
    cu_seqlens: Tensor  # int32 [S + 1]
    is_chosen_S: Tensor  # bool
    seqlens: tuple[int, ...]
    examples: tuple[int, ...]  # which example each trace came from
    num_targets: int  # other than -100
    ref_logps_S: Tensor | None = None  # float32, where all its traces have one (DPO)
    pushed_T: Tensor | None = None  # bool: rejected targets that are pushed down; None: all

    @property
    def is_trained(self) -> bool:
        return self.num_targets > 0

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def without_targets(self) -> "Pack":
        """The same tokens, none of them trained: keeps a rank in step, and adds nothing."""
        targets_T = torch.full_like(self.targets_T, IGNORE_INDEX)
        return replace(self, targets_T=targets_T, num_targets=0)


def pack_traces(traces: Sequence[Trace], max_tokens: int) -> list[Pack]:
    """Best-fit decreasing: longest first, each trace goes into the fullest pack with room for it.

    A pack has at most `max_tokens` tokens; a trace longer than that gets a pack of its own. Traces
    keep their given order inside a pack. The result depends on nothing but the arguments.
    """
    bins = _best_fit([len(trace.input_ids) for trace in traces], max_tokens)
    return [_pack([traces[i] for i in sorted(bin)]) for bin in bins]


def pack_step(
    traces: Sequence[Trace],
    max_tokens: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    pairs: bool = False,
    squares: float = SQUARES,
) -> list[Pack]:
    """What one rank runs of an optimizer step; `traces` are the whole step's, on every rank.

    All ranks get equally many packs; one that lacks traces repeats the step's smallest pack
    without targets.
    Arguments as of `arrange`, on nothing but which the result depends. `pairs`: an example's
    traces stay in one pack, next to each other, for objectives not linear in the log-probs.
    """
    lengths = [len(trace.input_ids) for trace in traces]
    keys = [trace.example for trace in traces] if pairs else None
    ranks = arrange(lengths, max_tokens, world_size=world_size, keys=keys, squares=squares)
    bins = [bin for bins in ranks for bin in bins if bin]
    smallest = min(bins, key=lambda bin: sum(lengths[i] for i in bin))
    filler = _pack([traces[i] for i in smallest]).without_targets()
    return [_pack([traces[i] for i in bin]) if bin else filler for bin in ranks[rank]]


def arrange(
    lengths: Sequence[int],
    max_tokens: int,
    *,
    world_size: int = 1,
    keys: Sequence[int] | None = None,
    squares: float = SQUARES,
) -> list[list[list[int]]]:
    """Indices of `lengths`, in packs, of each rank; equally many packs for every rank.

    A trace of n tokens is taken to cost n + squares * n^2 (attention is the square). Ranks get
    equal cost, as far as whole traces allow, and so do a rank's packs where they have room for it.

    Args:
        max_tokens: of a pack; what is longer gets a pack of its own.
        keys: traces of the same key stay together.
        squares: see `PackedLM.cost_of_squares`.
    """
    units: dict[int, list[int]] = {}  # what must not be parted
    for i in range(len(lengths)):
        units.setdefault(i if keys is None else keys[i], []).append(i)
    members = list(units.values())
    length_U = np.array([sum(lengths[i] for i in unit) for unit in members])
    cost_U = np.array([sum(trace_cost(lengths[i], squares) for i in unit) for unit in members])
    owner_U = _spread(cost_U, world_size)
    mine_R = [np.flatnonzero(owner_U == rank) for rank in range(world_size)]
    count = max(len(_best_fit(length_U[mine].tolist(), max_tokens)) for mine in mine_R)
    return [
        [
            [i for u in sorted(bin) for i in members[mine[u]]]
            for bin in _fill(length_U[mine].tolist(), cost_U[mine], count, max_tokens)
        ]
        for mine in mine_R
    ]


def trace_cost(length: int, squares: float = SQUARES) -> float:
    """Of a trace, in tokens: what as many tokens would cost without attention."""
    return length + squares * length**2


def _best_fit(lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Indices of `lengths` in bins of at most `max_tokens`, but for single ones that are longer."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, bin), sorted
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        slot = bisect_left(room, (lengths[i], -1))
        if slot < len(room):
            free, bin = room.pop(slot)
            bins[bin].append(i)
        else:
            free, bin = max_tokens, len(bins)
            bins.append([i])
        insort(room, (free - lengths[i], bin))
    return bins


def _spread(cost_U: np.ndarray, num_bins: int) -> np.ndarray:
    """The bin of each unit: costliest first into the idlest bin, then swaps that relieve the
    busiest bin for as long as one does and it carries more than 0.5% above the mean."""
    owner_U = np.zeros(len(cost_U), dtype=np.int64)
    load_B: np.ndarray = np.zeros(num_bins)
    for u in np.argsort(-cost_U, kind="stable"):
        owner_U[u] = load_B.argmin()
        load_B[owner_U[u]] += cost_U[u]
    while load_B.max() > 1.005 * load_B.mean():
        busiest = load_B.argmax()
        mine, others = np.flatnonzero(owner_U == busiest), np.flatnonzero(owner_U != busiest)
        relief = cost_U[mine][:, None] - cost_U[others]
        higher = np.maximum(load_B[busiest] - relief, load_B[owner_U[others]] + relief)
        if not higher.size or higher.min() >= (1 - 1e-9) * load_B[busiest]:
            break
        i, j = np.unravel_index(higher.argmin(), higher.shape)
        swapped = [mine[i], others[j]]
        owner_U[swapped] = owner_U[swapped[::-1]]
        load_B = np.bincount(owner_U, cost_U, num_bins)
    return owner_U


def _fill(lengths: list[int], cost_U: np.ndarray, count: int, max_tokens: int) -> list[list[int]]:
    """`count` bins, the costliest first: sharded ranks go through their forwards side by side, so
    like should meet like. Of equal cost where they have room for that, else filled tightly and
    halved to make up the number; with fewer lengths than `count`, the last ones are empty."""
    owner_U = _spread(cost_U, count)
    bins = [np.flatnonzero(owner_U == b).tolist() for b in range(count)]
    if any(len(bin) > 1 and sum(lengths[u] for u in bin) > max_tokens for bin in bins):
        bins = _best_fit(lengths, max_tokens)
    while len(bins) < count:
        most = max(bins, key=len)
        bins = [bin for bin in bins if bin is not most] + [most[::2], most[1::2]]
    return sorted(bins, key=lambda bin: -sum(cost_U[bin]))


def _pack(traces: list[Trace]) -> Pack:
    seqlens = tuple(len(trace.input_ids) for trace in traces)
    refs = [trace.ref_logp for trace in traces if trace.ref_logp is not None]
    input_ids_T = np.concatenate([trace.input_ids for trace in traces]).astype(np.int64)
    targets_T = np.concatenate([_targets(trace) for trace in traces])
    partly = any(trace.pushed is not None for trace in traces)
    return Pack(
        input_ids_T=torch.from_numpy(input_ids_T),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(n) for n in seqlens])),
        targets_T=torch.from_numpy(targets_T),
        cu_seqlens=torch.from_numpy(np.cumsum((0, *seqlens)).astype(np.int32)),
        is_chosen_S=torch.tensor([trace.is_chosen for trace in traces], dtype=torch.bool),
        seqlens=seqlens,
        examples=tuple(trace.example for trace in traces),
        num_targets=int((targets_T != IGNORE_INDEX).sum()),
        ref_logps_S=torch.tensor(refs) if len(refs) == len(traces) else None,
        pushed_T=torch.from_numpy(np.concatenate(list(map(_pushed, traces)))) if partly else None,
    )


def _targets(trace: Trace) -> np.ndarray:
    targets = np.full(len(trace.input_ids), IGNORE_INDEX, dtype=np.int64)
    first = max(trace.num_prompt_tokens, 1)  # with no prompt, nothing predicts the first token
    targets[first - 1 : -1] = trace.input_ids[first:]
    return targets


def _pushed(trace: Trace) -> np.ndarray:
    """Where a target lies within `trace.pushed`."""
    start, end = trace.pushed or (0, len(trace.input_ids))
    position = 1 + np.arange(len(trace.input_ids))  # of the target
    return (start <= position) & (position < end)
