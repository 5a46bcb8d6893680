"""One loss, mean NLL, by every implementation that can be had: ours, plain torch, and peers.

`known`: the weight of each token is known before the forward, so gradients may be made there (3 U).
`later`: log-probs come out and their coefficients arrive in backward (4 U).
`keeps`: the same with all logits kept from forward to backward (3 U, and their memory).
An implementation that is not installed or needs a GPU raises here, and the table says so.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x_TH, w_VH, y_T) -> scalar


@dataclass(frozen=True)
class Implementation:
    kind: str  # known, later, or keeps
    make: Callable[[], Loss]


def ours_fused(tolerance: float = 0.0) -> Loss:
    from redi_kernels import sft_loss

    return lambda x_TH, w_VH, y_T: sft_loss(x_TH, w_VH, y_T, tolerance=tolerance).loss


def ours_primitive(tolerance: float = 0.0) -> Loss:
    from redi_kernels import token_logprobs

    return lambda x_TH, w_VH, y_T: (
        -token_logprobs(x_TH, w_VH, y_T, tolerance=tolerance).logp_T.mean()
    )


def naive() -> Loss:
    """What most trainers do: all logits at once, log-softmax in fp32."""
    return lambda x_TH, w_VH, y_T: F.cross_entropy((x_TH @ w_VH.T).float(), y_T)


def torch_chunked(policy: str) -> Callable[[], Loss]:
    def make() -> Loss:
        options = torch.nn.LinearCrossEntropyOptions(acc_policy=policy)
        return lambda x_TH, w_VH, y_T: F.linear_cross_entropy(x_TH, w_VH, y_T, options=options)

    return make


def cce() -> Loss:
    from cut_cross_entropy import linear_cross_entropy

    return lambda x_TH, w_VH, y_T: linear_cross_entropy(x_TH, w_VH, y_T, impl="torch_compile")


def cce_triton() -> Loss:
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU")
    from cut_cross_entropy import linear_cross_entropy

    return lambda x_TH, w_VH, y_T: linear_cross_entropy(x_TH, w_VH, y_T, impl="cce_exact")


def liger() -> Loss:
    """Its Triton cross-entropy, chunked over tokens."""
    if not torch.cuda.is_available():
        raise RuntimeError("needs a GPU")
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as loss

    return lambda x_TH, w_VH, y_T: loss(x_TH, w_VH, y_T)


def trl() -> Loss:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as chunk

    def loss(x_TH: Tensor, w_VH: Tensor, y_T: Tensor) -> Tensor:
        out = ChunkedLogProbFunction.apply(x_TH, w_VH, None, y_T, 1.0, chunk, None, 1.0, ())
        return -out[0].mean()

    return loss


def liger_preference() -> Loss:
    """Liger's chunked preference base, with a loss linear in the log-probs of equal lengths."""
    from liger_kernel.chunked_loss.fused_linear_preference import LigerFusedLinearPreferenceBase

    class Linear(LigerFusedLinearPreferenceBase):
        @staticmethod
        def preference_loss_fn(chosen, rejected, full_target, beta=0.1, **_):
            return -(chosen.sum() + rejected.sum()) / full_target.shape[0], chosen, rejected

        @classmethod
        def forward(cls, ctx, x, w, y):
            options = {"compute_nll_loss": False, "compiled": False, "average_log_prob": True}
            return super().forward(cls=cls, ctx=ctx, _input=x, weight=w, target=y, **options)

        @staticmethod
        def backward(ctx, *grads):
            return LigerFusedLinearPreferenceBase.backward(ctx, grads)[:3]

    def loss(x_TH: Tensor, w_VH: Tensor, y_T: Tensor) -> Tensor:
        sequences = len(y_T) // 512 or 2
        x = x_TH.unflatten(0, (sequences, -1))
        return Linear.apply(x, w_VH, y_T.unflatten(0, (sequences, -1)))[0]

    return loss


IMPLEMENTATIONS = {
    "redi_kernels, fused": Implementation("known", ours_fused),
    "redi_kernels, fused, tolerance 2": Implementation("known", lambda: ours_fused(2.0)),
    "F.linear_cross_entropy, compact": Implementation("known", torch_chunked("compact")),
    "F.linear_cross_entropy, accurate": Implementation("known", torch_chunked("accurate")),
    "Liger 0.8 chunked preference": Implementation("known", liger_preference),
    "redi_kernels, primitive": Implementation("later", ours_primitive),
    "redi_kernels, primitive, tolerance 2": Implementation("later", lambda: ours_primitive(2.0)),
    "TRL 1.16 chunked log-probs": Implementation("later", trl),
    "CCE exact (Triton)": Implementation("later", cce_triton),
    "CCE torch_compile": Implementation("keeps", cce),
    "plain torch, full logits": Implementation("keeps", naive),
}
