"""What turns a hidden state into a logit, and the module that owns it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from redi_kernels.checks import check_softcap, number

# Of d(logits) that the GPU's kernels hold at once: 1152 tokens of a vocabulary of 151,936 in bf16.
# It stands here, where a plan can read it on a machine without Triton.
SLAB_BYTES = 336 << 20


@dataclass(frozen=True)
class Head:
    """z = softcap * tanh((logit_scale * x @ w.T + bias) / softcap); None means no cap."""

    bias_V: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0


class LossHead(nn.Module):
    """Owns the LM head's weight, so that FSDP, DDP and ZeRO hooks fire around the loss.

    A fused loss reads `lm_head.weight` without calling `lm_head`, so a sharded weight would still
    be a shard. Put the parameter in here, wrap this module as any other, call the loss through it:

        head = LossHead(model.lm_head.weight)
        out = head(redi_loss, x_TH, y_T, cu_seqlens, is_chosen_S, alpha=0.8)

    `weight` [V, H] and `bias` [V] are registered as given: tied parameters stay tied.
    """

    def __init__(
        self,
        weight: nn.Parameter,
        bias: nn.Parameter | None = None,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
    ) -> None:
        super().__init__()
        check_softcap(softcap)
        number("logit_scale", logit_scale)
        self.weight = weight
        self.register_parameter("bias", bias)
        self.softcap = softcap
        self.logit_scale = logit_scale

    def forward(self, function: Callable[..., Any], x_TH: Tensor, *args: Any, **kwargs: Any) -> Any:
        """`function` is any of this package's: `token_logprobs`, `redi_loss`, `sft_loss`, ..."""
        shape = {"bias": self.bias, "softcap": self.softcap, "logit_scale": self.logit_scale}
        return function(x_TH, self.weight, *args, **shape, **kwargs)

    def extra_repr(self) -> str:
        V, H = self.weight.shape
        return f"vocab={V}, hidden={H}, softcap={self.softcap}, logit_scale={self.logit_scale}"


def weigh(weight: Tensor | float, value: Tensor) -> Tensor:
    """weight * value, but weight 0 adds 0 even where the value is infinite: what is masked or left
    out by a weight may have a log-prob of -inf. NaN stays NaN. The weight is a constant."""
    return (weight * value).masked_fill((weight == 0) & value.isinf(), 0)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-probs and of sums over tokens or vocabulary: fp32, fp64 for fp64."""
    return torch.promote_types(dtype, torch.float32)
