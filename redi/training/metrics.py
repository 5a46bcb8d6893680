"""What a step shows of the model's health: log-probs from its own forward, entropy from a probe.

All but the entropy come from the log-probs that the loss has computed anyway: sums on the device,
fetched once a step. The fused loss has no entropy, so a few traces are run once more, now and then.
"""

import math
from typing import Any

import torch
from torch import Tensor

from redi.data.pack import IGNORE_INDEX, Pack, pack_traces
from redi.data.tokenize import Trace
from redi.training.model import PackedLM
from redi.training.objectives import PackLoss, StepCounts

FAINT = 1e-4  # a token less probable than this has been pushed out of the model's reach
PROBE_STEPS = 10  # an entropy every so many steps,
PROBE_TRACES = 2  # over so many chosen traces a rank: a forward of 2 of 64 traces, in 1 of 10 steps
NUM_SUMS = 12


@torch.no_grad()
def pack_sums(pack: Pack, out: PackLoss) -> Tensor:
    """One pack's share of what `step_means` divides: [NUM_SUMS], on the device, no wait for it."""
    chosen_S, zero = pack.is_chosen_S, out.loss.new_zeros(())
    mean_S = out.logps_S / out.lengths_S.clamp(min=1)
    stop_S = out.logp_T[(pack.cu_seqlens[1:] - 2).clamp(min=0)]  # a trace's last target
    chosen_T = torch.repeat_interleave(
        chosen_S, pack.cu_seqlens.diff(), output_size=len(out.logp_T)
    )
    faint_T = (out.logp_T < math.log(FAINT)) & ~chosen_T  # 0 where not trained: not faint
    sums = (
        out.loss.detach(),
        torch.where(chosen_S, mean_S, zero).sum(),
        torch.where(chosen_S, stop_S, zero).sum(),
        torch.where(chosen_S, zero, mean_S).sum(),
        faint_T.sum(),
        torch.where(chosen_S, 0, out.lengths_S).sum(),
    )
    first = torch.stack([z.to(mean_S.dtype) for z in sums])
    return torch.cat([first, _reward_sums(pack, out), _fast_sums(pack, out)])


def step_means(
    sums: list[float], counts: StepCounts, *, rewards: bool = False, fast: bool = False
) -> dict[str, float]:
    """A step's `pack_sums`, added up over packs and ranks, as metrics.

    `logps/*`: mean over traces of the mean log-prob per token; `logps/stop`: mean log-prob of the
    token that ends a chosen trace; `rejected_below_1e-4`: share of the rejected traces' tokens;
    `rewards/*` (TRL's names): what an objective on pairs compares. `fast/*`, with a loss_tolerance:
    means over tokens of the share of d(logits) that was computed, of the probability mass outside
    it, and of the estimated relative error of dX.
    """
    loss, chosen, stop, rejected, faint, num_rejected_tokens, *of_pairs = sums[:-3]
    means = {"loss": loss}
    if counts.num_chosen:
        means |= {
            "logps/chosen": chosen / counts.num_chosen,
            "logps/stop": stop / counts.num_chosen,
        }
    if counts.num_rejected:
        means |= {
            "logps/rejected": rejected / counts.num_rejected,
            "rejected_below_1e-4": faint / max(num_rejected_tokens, 1),
        }
    if rewards:
        chosen, rejected, right = (x / counts.num_chosen for x in of_pairs)
        means |= {
            "rewards/chosen": chosen,
            "rewards/rejected": rejected,
            "rewards/margins": chosen - rejected,
            "rewards/accuracies": right,
        }
    if fast:
        names = ("fast/active", "fast/dropped", "fast/error")
        each = (z / max(counts.num_tokens, 1) for z in sums[-3:])
        means |= dict(zip(names, each, strict=True))
    return means


def _fast_sums(pack: Pack, out: PackLoss) -> Tensor:
    """[3]: of each token, what `step_means` calls fast/*."""
    if out.fast is None:
        return out.logps_S.new_zeros(3)
    number = pack.num_targets
    sums = (out.fast.active * number, out.fast.dropped_T.sum(), out.fast.error * number)
    return torch.stack([z.to(out.logps_S.dtype) for z in sums])


def _reward_sums(pack: Pack, out: PackLoss) -> Tensor:
    """[3]: rewards of chosen and of rejected traces, and pairs whose chosen one has the greater."""
    if out.rewards_S is None:
        return out.logps_S.new_zeros(3)
    chosen_S = torch.where(pack.is_chosen_S, out.rewards_S, 0.0)
    rejected_S = torch.where(pack.is_chosen_S, 0.0, out.rewards_S)  # a chosen one may be -inf
    margins = (chosen_S - rejected_S).unflatten(0, (-1, 2)).sum(1)  # pairs stand side by side
    return torch.stack([chosen_S.sum(), rejected_S.sum(), (margins > 0).sum()])


@torch.no_grad()
def entropy_sums(model: PackedLM, traces: list[Trace], rank: int, world_size: int) -> Tensor:
    """[sum, tokens] of the entropy of predictions along a few chosen traces of this rank's.

    Every rank runs one forward (sharded ones must), one without a chosen trace runs it for nothing.
    """
    from redi_kernels import token_logprobs

    chosen = [trace for trace in traces if trace.is_chosen][rank::world_size][:PROBE_TRACES]
    if chosen:
        (pack,) = pack_traces(chosen, sum(len(trace.input_ids) for trace in chosen))
    else:
        pack = pack_traces(traces[:1], 1)[0].without_targets()

    def head(x_TH: Tensor, w_VH: Tensor, pack: Pack, options: dict[str, Any]) -> Tensor:
        entropy_T = token_logprobs(x_TH, w_VH, pack.targets_T, **options).entropy_T
        return torch.stack([entropy_T.sum(), (pack.targets_T != IGNORE_INDEX).sum()])

    return model(pack.to(next(model.parameters()).device), head)
