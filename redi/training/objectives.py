"""What a stage optimises, as a sum over a step's packs.

Each objective divides by counts of the whole optimizer step (`StepCounts`), known before the first
forward. So every pack adds its share, and the step's gradient is the same for any packing, order,
accumulation or sharding.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from redi.config import TrainConfig
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
    rewards_S: Tensor | None = None  # DPO and SimPO: what their margins are differences of
    fast: Any = None  # with a loss_tolerance: what it left out (`redi_kernels`' Fast)


# Not linear in the log-probs: the traces of a pair must share a pack.
NEEDS_PAIRS = ("dpo", "simpo")
Objective = Callable[[StepCounts, Tensor, Tensor, Pack, dict[str, Any]], PackLoss]


def sft(counts: StepCounts, x_TH: Tensor, w_VH: Tensor, pack: Pack, options: dict) -> PackLoss:
    """Stage 1: mean negative log-prob over the step's completion tokens."""
    from redi_kernels import sft_loss

    out = sft_loss(
        x_TH, w_VH, pack.targets_T, pack.cu_seqlens, num_tokens=counts.num_tokens, **options
    )
    assert out.logps_S is not None and out.lengths_S is not None  # cu_seqlens was given
    return PackLoss(out.loss, out.logps_S, out.lengths_S, out.logp_T, fast=out.fast)


def redi(alpha: float, **bounds: Any) -> Objective:
    """Stage 2, paper Eq. 5: -log p(y_w)/|y_w| + alpha log p(y_l)/|y_l|, means over the step's
    traces. `bounds`: rejected_loss and rejected_floor of `redi_loss`.

    A sum over tokens, so the two traces of a pair need not share a pack, and rows that have only
    one of them train too.
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
            pushed_T=pack.pushed_T,
            **bounds,
            num_chosen=max(counts.num_chosen, 1),
            num_rejected=max(counts.num_rejected, 1),
            **options,
        )
        return PackLoss(out.loss, out.logps_S, out.lengths_S, out.logp_T, fast=out.fast)

    return objective


def dpo(beta: float) -> Objective:
    """DPO (arXiv 2305.18290): a pair's reward is beta times how much likelier it became."""
    from redi_kernels import dpo_loss

    def objective(
        counts: StepCounts, x_TH: Tensor, w_VH: Tensor, pack: Pack, options: dict
    ) -> PackLoss:
        packed = pack.targets_T, pack.cu_seqlens, pack.is_chosen_S
        assert pack.ref_logps_S is not None  # redi/training/dpo_reference.py put them there
        kwargs = {"beta": beta, "num_pairs": counts.num_chosen, **options}
        out = dpo_loss(x_TH, w_VH, *packed, pack.ref_logps_S, **kwargs)
        rewards_S = beta * (out.logps_S - pack.ref_logps_S)
        return _of_pairs(out, rewards_S, pack)

    return objective


def simpo(beta: float, gamma: float) -> Objective:
    """SimPO (arXiv 2405.14734): a trace's reward is beta times its mean log-prob per token."""
    from redi_kernels import simpo_loss

    def objective(
        counts: StepCounts, x_TH: Tensor, w_VH: Tensor, pack: Pack, options: dict
    ) -> PackLoss:
        packed = pack.targets_T, pack.cu_seqlens, pack.is_chosen_S
        kwargs = {"beta": beta, "gamma": gamma, "num_pairs": counts.num_chosen, **options}
        out = simpo_loss(x_TH, w_VH, *packed, **kwargs)
        return _of_pairs(out, beta * out.logps_S / out.lengths_S.clamp(min=1), pack)

    return objective


def _of_pairs(out: Any, rewards_S: Tensor, pack: Pack) -> PackLoss:
    """A pair without targets would still lose log 2."""
    from redi_kernels.head import weigh

    counts = float(pack.is_trained)
    each = (out.logps_S, out.lengths_S, out.logp_T)
    return PackLoss(weigh(counts, out.loss), *each, weigh(counts, rewards_S), out.fast)


def make_objective(config: TrainConfig) -> Objective:
    """What `config` optimises, in exact or fast mode."""
    objective, tolerance = _objective(config), config.loss_tolerance
    if not tolerance:
        return objective

    def fast(counts: StepCounts, x_TH: Tensor, w_VH: Tensor, pack: Pack, options: dict) -> PackLoss:
        return objective(counts, x_TH, w_VH, pack, {**options, "tolerance": tolerance})

    return fast


def _objective(config: TrainConfig) -> Objective:
    if config.objective == "sft":
        return sft
    if config.objective == "redi":
        bounds = {"rejected_loss": config.rejected_loss, "rejected_floor": config.rejected_floor}
        return redi(config.alpha, **bounds)
    if config.objective == "dpo":
        return dpo(config.beta_or_default)
    return simpo(config.beta_or_default, config.simpo_gamma)
