"""What a stage optimises, as a sum over a step's packs.

Each objective divides by counts of the whole optimizer step (`StepCounts`), known before the first
forward. So every pack adds its share, and the step's gradient is the same for any packing, order,
accumulation or sharding.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from redi.data.pack import Pack
from redi.data.tokenize import Trace


@dataclass(frozen=True)
class StepCounts:
    """How much one optimizer step trains on, over all its packs and ranks."""

    num_tokens: int  # trained completion tokens, stop tokens included
    num_chosen: int  # traces
    num_rejected: int

    @classmethod
    def of(cls, traces: Iterable[Trace]) -> "StepCounts":
        tokens = chosen = rejected = 0
        for trace in traces:
            tokens += len(trace.input_ids) - max(trace.num_prompt_tokens, 1)
            chosen += trace.is_chosen
            rejected += not trace.is_chosen
        return cls(tokens, chosen, rejected)


@dataclass(frozen=True)
class PackLoss:
    """A pack's share of the step's loss, and its traces' log-probs for the log (detached)."""

    loss: Tensor  # scalar, float32
    logps_S: Tensor  # summed over each trace's trained tokens
    lengths_S: Tensor
    logp_T: Tensor  # of each token, 0 where it is not trained


Objective = Callable[[StepCounts, Tensor, Tensor, Pack, dict[str, Any]], PackLoss]


def sft(counts: StepCounts, x_TH: Tensor, w_VH: Tensor, pack: Pack, options: dict) -> PackLoss:
    """Stage 1: mean negative log-prob over the step's completion tokens."""
    from redi_kernels import sft_loss

    out = sft_loss(
        x_TH, w_VH, pack.targets_T, pack.cu_seqlens, num_tokens=counts.num_tokens, **options
    )
    assert out.logps_S is not None and out.lengths_S is not None  # cu_seqlens was given
    return PackLoss(out.loss, out.logps_S, out.lengths_S, out.logp_T)


def redi(alpha: float) -> Objective:
    """Stage 2, paper Eq. 5: -log p(y_w)/|y_w| + alpha log p(y_l)/|y_l|, means over the step's
    traces.

    Linear in the log-probs, so the two traces of a pair need not share a pack, and rows that have
    only one of them train too.
    """
    from redi_kernels import redi_loss

    def objective(
        counts: StepCounts, x_TH: Tensor, w_VH: Tensor, pack: Pack, options: dict
    ) -> PackLoss:
        out = redi_loss(
            x_TH,
            w_VH,
            pack.targets_T,
            pack.cu_seqlens,
            pack.is_chosen_S,
            alpha=alpha,
            num_chosen=max(counts.num_chosen, 1),
            num_rejected=max(counts.num_rejected, 1),
            **options,
        )
        return PackLoss(out.loss, out.logps_S, out.lengths_S, out.logp_T)

    return objective


def make_objective(name: str, alpha: float) -> Objective:
    return sft if name == "sft" else redi(alpha)
