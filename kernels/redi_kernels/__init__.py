"""Log-probabilities and preference losses of an LM head, without its logits.

from redi_kernels import redi_loss
out = redi_loss(hidden_TH, lm_head.weight, targets_T, cu_seqlens, is_chosen_S, alpha=0.8)
out.loss.backward()
"""

from torch.utils import _pytree

from redi_kernels.head import LossHead
from redi_kernels.logprobs import (
    Fast,
    LogProbs,
    SequenceLogProbs,
    sequence_logprobs,
    token_logprobs,
)
from redi_kernels.losses import (
    PreferenceOutput,
    RediOutput,
    SftOutput,
    dpo_loss,
    redi_loss,
    sft_loss,
    simpo_loss,
)

# FSDP2 looks for tensors in a module's output as a pytree. Before torch 2.12 it does not look into
# dataclasses it was not told of: LossHead's parameter would get no gradient, without a word.
for _result in (Fast, LogProbs, SequenceLogProbs, PreferenceOutput, RediOutput, SftOutput):
    _pytree.register_dataclass(_result)

__all__ = [
    "LogProbs",
    "LossHead",
    "PreferenceOutput",
    "RediOutput",
    "SequenceLogProbs",
    "SftOutput",
    "dpo_loss",
    "redi_loss",
    "sequence_logprobs",
    "sft_loss",
    "simpo_loss",
    "token_logprobs",
]
