"""Log-probabilities and preference losses of an LM head, without its logits.

from redi_kernels import redi_loss
out = redi_loss(hidden_TH, lm_head.weight, targets_T, cu_seqlens, is_chosen_S, alpha=0.8)
out.loss.backward()
"""

from redi_kernels.head import LossHead
from redi_kernels.logprobs import (
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
