"""Traces of one optimizer step, laid end to end in packs: no padding, no trace ever cut.

Because REDI's loss is linear in token log-probs, any packing of a step gives the same gradient; a
pack only decides what is in memory at once.
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


@dataclass(frozen=True)
class Pack:
    """T tokens of S whole traces. Host tensors; `seqlens` and `examples` spare device syncs."""

    input_ids_T: Tensor  # int64
    position_ids_T: Tensor  # int64, restart at 0 in each trace
    targets_T: Tensor  # int64: the next token where that is a completion token, else -100
    cu_seqlens: Tensor  # int32 [S + 1]
    is_chosen_S: Tensor  # bool
    seqlens: tuple[int, ...]
    examples: tuple[int, ...]  # which example each trace came from

    def to(self, device: torch.device | str) -> "Pack":
        """The same pack with its tensors on `device`."""
        moved: dict[str, Any] = {
            name: value.to(device, non_blocking=True)
            for name, value in vars(self).items()
            if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def without_targets(self) -> "Pack":
        """The same tokens, none of them trained."""
        return replace(self, targets_T=torch.full_like(self.targets_T, IGNORE_INDEX))


def pack_traces(traces: Sequence[Trace], max_tokens: int) -> list[Pack]:
    """Best-fit decreasing: longest first, each trace goes into the fullest pack with room for it.

    A pack has at most `max_tokens` tokens; a trace longer than that gets a pack of its own. Traces
    keep their given order inside a pack. The result depends on nothing but the arguments.
    """
    order = sorted(range(len(traces)), key=lambda i: (-len(traces[i].input_ids), i))
    packs: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, pack), sorted
    for i in order:
        length = len(traces[i].input_ids)
        slot = bisect_left(room, (length, -1))
        if slot < len(room):
            free, pack = room.pop(slot)
            packs[pack].append(i)
        else:
            free, pack = max_tokens, len(packs)
            packs.append([i])
        insort(room, (free - length, pack))
    return [_pack([traces[i] for i in sorted(members)]) for members in packs]


def _pack(traces: list[Trace]) -> Pack:
    seqlens = tuple(len(trace.input_ids) for trace in traces)
    input_ids_T = np.concatenate([trace.input_ids for trace in traces]).astype(np.int64)
    return Pack(
        input_ids_T=torch.from_numpy(input_ids_T),
        position_ids_T=torch.from_numpy(np.concatenate([np.arange(n) for n in seqlens])),
        targets_T=torch.from_numpy(np.concatenate([_targets(trace) for trace in traces])),
        cu_seqlens=torch.from_numpy(np.cumsum((0, *seqlens)).astype(np.int32)),
        is_chosen_S=torch.tensor([trace.is_chosen for trace in traces], dtype=torch.bool),
        seqlens=seqlens,
        examples=tuple(trace.example for trace in traces),
    )


def _targets(trace: Trace) -> np.ndarray:
    targets = np.full(len(trace.input_ids), IGNORE_INDEX, dtype=np.int64)
    first = max(trace.num_prompt_tokens, 1)  # with no prompt, nothing predicts the first token
    targets[first - 1 : -1] = trace.input_ids[first:]
    return targets
