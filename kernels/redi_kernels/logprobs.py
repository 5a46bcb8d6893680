"""Token log-probabilities: which backend runs, and how autograd and torch.compile see it. The
arithmetic is the backends' (`cpu.py`, `triton/`); what is refused stands in `checks.py`.

A backend is a module with `forward`, `backward` and `weighted` over the N tokens that have a target
(signatures in `cpu.py`). Three custom operators wrap those functions, so that torch.compile treats
each as one opaque node with known shapes:

    logprobs            1 U   logp, lse, entropy, correct
    logprobs_backward   3 U   gradients from recomputed logits; the coefficients arrive in backward
    weighted            3 U   logp, and the gradients of sum(weight * logp) at once

With a tolerance the latter two take fast mode's one function instead (`fast.py`, `triton/fast.py`),
and report what it left out.

Ignored tokens leave before any matmul. How many stay is data, so on a GPU each operator waits for
the device once, unless the caller knows it (`num_valid`); nothing else here does. Out-of-range
targets raise on CPU and trip a device-side assertion on a GPU.
"""

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from redi_kernels import fast, reference
from redi_kernels.checks import Options, check, check_cu_seqlens, has_values, require
from redi_kernels.head import Head, accumulator, weigh


@dataclass(frozen=True)
class LogProbs:
    """Per token, in fp32 (fp64 for fp64 inputs). Ignored tokens hold 0 and False."""

    logp_T: Tensor  # log p(y); never above 0; differentiable
    lse_T: Tensor  # log-sum-exp of the logits; differentiable, for a z-loss
    entropy_T: Tensor  # of the predicted distribution, in nats; detached
    correct_T: Tensor  # bool: no logit exceeds the target's
    fast: "Fast | None" = None  # with a tolerance; filled in by the backward


@dataclass(frozen=True)
class Fast:
    """What fast mode left out of the gradients. Zeros where no gradient was asked for (yet)."""

    dropped_T: Tensor  # probability mass outside each token's active rows, put back approximately
    active: Tensor  # share of d(logits) computed exactly, as counted
    error: Tensor  # estimate, from above, of dX's RMS error relative to dX

    @classmethod
    def empty(cls, x_TH: Tensor) -> "Fast":
        dropped_T = x_TH.new_zeros(x_TH.shape[0], dtype=accumulator(x_TH.dtype))
        return cls(dropped_T, dropped_T.new_zeros(()), dropped_T.new_zeros(()))


@dataclass(frozen=True)
class SequenceLogProbs:
    sum_S: Tensor
    mean_S: Tensor  # over the sequence's valid targets; 0 where there are none
    length_S: Tensor  # number of valid targets, int64


def token_logprobs(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    num_valid: int | None = None,
    tolerance: float = 0.0,
    backend: str | None = None,
) -> LogProbs:
    """Log-probability of each target without the [T, V] logits: 1 U forward, 3 U backward.

    Args:
        x_TH: hidden states [T, H], fp16, bf16, fp32 or fp64.
        w_VH: LM head [V, H] in the same dtype (under autocast both are cast, as in F.linear).
        y_T: targets [T], int32 or int64: y[t] is the token x[t] must predict, already shifted.
        bias: [V], added to the logits.
        softcap: c in c tanh(z / c), as in Gemma 2.
        logit_scale: factor on x @ w.T (1 / temperature).
        ignore_index: tokens with this target cost no matmul and get exactly zero gradient.
        num_valid: how many targets are not `ignore_index`, where the host knows: then nothing waits
            for the GPU. A wrong number raises as a wrong target does.
        tolerance: 0 is exact, and so are calls of fewer than 256 targets. Above, gradients may
            have this many times the RMS error of a dense bf16 implementation, and cost less:
            docs/fast-mode.md. Not for fp16. Here log-probs stay exact; the fused losses' may be off
            by a tenth of the report's `dropped_T` on a CPU.
        backend: None picks triton on CUDA, blocked torch ("cpu") elsewhere; "reference" is the
            textbook with full logits.

    Raises ValueError or TypeError for inputs that do not fit together, naming the argument.
    """
    options = check(
        x_TH, w_VH, y_T, bias, softcap, logit_scale, ignore_index, num_valid, tolerance, backend
    )
    x_TH, w_VH = options.cast(x_TH, w_VH)
    if options.backend == "reference":
        head = Head(bias, softcap, logit_scale)
        return LogProbs(*reference.token_logprobs(x_TH, w_VH, y_T, head, ignore_index=ignore_index))
    report = Fast.empty(x_TH) if tolerance else None
    logp_T, lse_T, entropy_T, correct_T = _TokenLogProbs.apply(
        x_TH, w_VH, bias, y_T, options, report
    )
    return LogProbs(logp_T, lse_T, entropy_T, correct_T, report)


def weighted_logprobs(
    x_TH: Tensor, w_VH: Tensor, y_T: Tensor, weight_T: Tensor, bias: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Fast | None]:
    """(sum(weight * logp), logp_T detached, what fast mode left out): the fused path, for weights
    known before the forward.

    `weight_T` [T] is a constant: it gets no gradient; 0 adds 0, whatever the log-prob. 3 U in the
    forward where a gradient is needed, 1 U where none is; the backward multiplies by one scalar. In
    fp16, 4 U: gradients must not be rounded before GradScaler's factor, the scalar, has reached
    them.
    Options as in `token_logprobs`.
    """
    checked = check(x_TH, w_VH, y_T, bias, **options)
    x_TH, w_VH = checked.cast(x_TH, w_VH)
    weight_T = weight_T.detach().masked_fill(y_T == checked.ignore_index, 0)
    if checked.backend == "reference":
        head = Head(bias, checked.softcap, checked.logit_scale)
        logp_T = reference.token_logprobs(x_TH, w_VH, y_T, head, ignore_index=checked.ignore_index)[
            0
        ]
        return weigh(weight_T, logp_T).sum(), logp_T.detach(), None
    if checked.dtype == torch.float16:
        out = token_logprobs(x_TH, w_VH, y_T, bias=bias, **options)
        return weigh(weight_T, out.logp_T).sum(), out.logp_T.detach(), None
    grad = torch.is_grad_enabled()
    needs = tuple(grad and t is not None and t.requires_grad for t in (x_TH, w_VH, bias))
    total, logp_T, *fast = _WeightedSum.apply(x_TH, w_VH, bias, y_T, weight_T, checked, needs)
    return total, logp_T, Fast(*fast) if checked.tolerance else None


def sequence_logprobs(
    logp_T: Tensor,
    cu_seqlens: Tensor,
    y_T: Tensor | None = None,
    *,
    ignore_index: int = -100,
) -> SequenceLogProbs:
    """Sum, mean and number of the valid tokens of each packed sequence; differentiable.

    `cu_seqlens` [S + 1] holds the boundaries, as in FlashAttention: 0 first, T last. Lengths count
    the targets other than `ignore_index`; without `y_T` every token counts. Sums run in fp64, in
    order, one sequence at a time: bits depend on nothing outside the sequence.
    """
    check_cu_seqlens(cu_seqlens, logp_T.shape[0], logp_T.device)
    valid_T = torch.ones_like(logp_T) if y_T is None else (y_T != ignore_index).to(logp_T.dtype)
    length_S = segment_sum(valid_T, cu_seqlens).long()
    sum_S = segment_sum(logp_T, cu_seqlens)
    return SequenceLogProbs(sum_S, sum_S / length_S.clamp(min=1), length_S)


def segment_sum(v_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    wide = v_T if v_T.device.type == "mps" else v_T.double()  # MPS has no fp64
    sum_S = torch.segment_reduce(wide, "sum", offsets=cu_seqlens.long(), initial=0)
    return sum_S.to(v_T.dtype)


# --------------------------------------------------------------------------------------- autograd


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        w_VH: Tensor,
        bias: Tensor | None,
        y_T: Tensor,
        options: Options,
        fast: Fast | None,
    ) -> tuple[Tensor, ...]:
        out = torch.ops.redi_kernels.logprobs(x_TH, w_VH, y_T, bias, *options.args())
        logp_T, lse_T, entropy_T, correct_T = out
        ctx.save_for_backward(x_TH, w_VH, bias, y_T, logp_T, lse_T)
        ctx.mark_non_differentiable(entropy_T, correct_T)
        ctx.options, ctx.fast = options, fast
        return out

    @staticmethod
    def backward(ctx: Any, dlogp_T: Tensor, dlse_T: Tensor, *_: Tensor) -> tuple[Any, ...]:
        _refuse_double_backward()
        x_TH, w_VH, bias, y_T, logp_T, lse_T = ctx.saved_tensors
        needs = ctx.needs_input_grad[:3]
        *grads, dropped_T, active, error = torch.ops.redi_kernels.logprobs_backward(
            x_TH, w_VH, y_T, logp_T, lse_T, dlogp_T, dlse_T, bias, *ctx.options.args(), *needs
        )
        if ctx.fast is not None:
            ctx.fast.dropped_T.copy_(dropped_T)
            ctx.fast.active.copy_(active)
            ctx.fast.error.copy_(error)
        return *(g if need else None for g, need in zip(grads, needs, strict=True)), *[None] * 3


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_TH: Tensor,
        w_VH: Tensor,
        bias: Tensor | None,
        y_T: Tensor,
        weight_T: Tensor,
        options: Options,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor, ...]:
        total, logp_T, *rest = torch.ops.redi_kernels.weighted(
            x_TH, w_VH, y_T, weight_T, bias, *options.args(), *needs
        )
        ctx.save_for_backward(*rest[:3])
        ctx.mark_non_differentiable(logp_T, *rest[3:])
        ctx.needs = needs
        return total, logp_T, *rest[3:]

    @staticmethod
    def backward(ctx: Any, dtotal: Tensor, *_: Tensor) -> tuple[Any, ...]:
        _refuse_double_backward()
        grads = zip(ctx.saved_tensors, ctx.needs, strict=True)
        return *(_scaled(g, dtotal) if need else None for g, need in grads), *[None] * 4


def _scaled(grad: Tensor, factor: Tensor) -> Tensor:
    """grad * factor with one rounding and, where the graph is not kept, no second [V, H] tensor."""
    factor = factor.reshape(1)  # a 0-dim tensor would first be rounded to bf16, for all alike
    if torch.compiler.is_compiling():
        return (grad * factor).to(grad.dtype)
    if torch._C._autograd._get_current_graph_task_keep_graph():
        grad = grad.clone()  # another backward will want the saved one as it is
    if has_values(factor) and factor.device.type == "cpu" and factor == 1:
        return grad
    for rows in grad.split(4096):  # on CPU the wider product is a temporary
        rows.mul_(factor)
    return grad


def _refuse_double_backward() -> None:
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            "redi_kernels' losses can be differentiated once: no create_graph=True. "
            'backend="reference" can be differentiated any number of times.'
        )


# ------------------------------------------------------------------------------- custom operators


def _as_given(kernel: Callable[..., Any]) -> Callable[..., Any]:
    """Inputs were cast at the door; autocast must not round what is computed from them."""

    @functools.wraps(kernel)
    def run(x_TH: Tensor, *args: Any) -> Any:
        with torch.autocast(x_TH.device.type, enabled=False):
            return kernel(x_TH, *args)

    return run


_HEAD = (
    "Tensor? bias, float? softcap, float logit_scale, int ignore_index, SymInt? num_valid, "
    "float tolerance, str backend"
)
_NEEDS = "bool need_x, bool need_w, bool need_bias"


@torch.library.custom_op(
    "redi_kernels::logprobs",
    mutates_args=(),
    schema=f"(Tensor x, Tensor w, Tensor y, {_HEAD}) -> (Tensor, Tensor, Tensor, Tensor)",
)
@_as_given
def _logprobs(x_TH, w_VH, y_T, bias, softcap, logit_scale, ignore_index, num_valid, _, backend):
    valid = _Valid(y_T, ignore_index, num_valid, len(w_VH))
    head = Head(bias, softcap, logit_scale)
    out = _load(backend).forward(valid.take(x_TH), w_VH, valid.y_N, head)
    return tuple(valid.put(v_N) for v_N in out)


@torch.library.custom_op(
    "redi_kernels::logprobs_backward",
    mutates_args=(),
    schema="(Tensor x, Tensor w, Tensor y, Tensor logp, Tensor lse, Tensor dlogp, Tensor dlse, "
    f"{_HEAD}, {_NEEDS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@_as_given
def _logprobs_backward(
    x_TH, w_VH, y_T, logp_T, lse_T, dlogp_T, dlse_T, bias, softcap, logit_scale, ignore_index,
    num_valid, tolerance, backend, need_x, need_w, need_bias,
):  # fmt: skip
    needs = (need_x, need_w, need_bias)
    valid = _Valid(y_T, ignore_index, num_valid, len(w_VH))
    head = Head(bias, softcap, logit_scale)
    x_NH, dlogp_N, dlse_N = map(valid.take, (x_TH, dlogp_T, dlse_T))
    if tolerance:
        _, *grads, report = _fast(backend).gradients(
            x_NH, w_VH, valid.y_N, dlogp_N, dlse_N, head, needs, tolerance
        )
        return *_gradients(valid, x_TH, bias, *grads), *_report(valid, logp_T, report)
    stats = map(valid.take, (logp_T, lse_T))
    grads = _load(backend).backward(x_NH, w_VH, valid.y_N, *stats, dlogp_N, dlse_N, head, needs)
    return *_gradients(valid, x_TH, bias, *grads), *_report(valid, logp_T)


@torch.library.custom_op(
    "redi_kernels::weighted",
    mutates_args=(),
    schema=f"(Tensor x, Tensor w, Tensor y, Tensor weight, {_HEAD}, {_NEEDS})"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@_as_given
def _weighted(
    x_TH, w_VH, y_T, weight_T, bias, softcap, logit_scale, ignore_index, num_valid, tolerance,
    backend, need_x, need_w, need_bias,
):  # fmt: skip
    needs = (need_x, need_w, need_bias)
    valid = _Valid(y_T, ignore_index, num_valid, len(w_VH))
    head = Head(bias, softcap, logit_scale)
    x_NH, weight_N, report = valid.take(x_TH), valid.take(weight_T), None
    if tolerance and any(needs):
        zero_N = torch.zeros_like(weight_N)
        logp_N, *grads, report = _fast(backend).gradients(
            x_NH, w_VH, valid.y_N, weight_N, zero_N, head, needs, tolerance
        )
    else:
        logp_N, *grads = _load(backend).weighted(x_NH, w_VH, valid.y_N, weight_N, head, needs)
    logp_T = valid.put(logp_N)
    grads = _gradients(valid, x_TH, bias, *grads)
    if tolerance and report is None:
        dropped_T, active, error = vars(Fast.empty(x_TH)).values()
    else:
        dropped_T, active, error = _report(valid, logp_T, report)
    return weigh(weight_T, logp_T).sum(), logp_T, *grads, dropped_T, active, error


@_logprobs.register_fake
def _(x_TH, w_VH, y_T, *options):
    v_T = x_TH.new_empty(x_TH.shape[0], dtype=accumulator(x_TH.dtype))
    return (
        v_T,
        torch.empty_like(v_T),
        torch.empty_like(v_T),
        v_T.new_empty(v_T.shape[0], dtype=torch.bool),
    )


@_logprobs_backward.register_fake
def _(x_TH, w_VH, *args):
    grads = _fake_gradients(x_TH, w_VH, args[5], args[-3:])
    return *grads, *_fake_report(args[1], tolerance=args[-5])


@_weighted.register_fake
def _(x_TH, w_VH, *args):
    logp_T = x_TH.new_empty(x_TH.shape[0], dtype=accumulator(x_TH.dtype))
    grads = _fake_gradients(x_TH, w_VH, args[2], args[-3:])
    return logp_T.new_empty(()), logp_T, *grads, *_fake_report(logp_T, tolerance=args[-5])


def _fake_report(logp_T, *, tolerance):
    shape = logp_T.shape[0] if tolerance else 0
    return logp_T.new_empty(shape), logp_T.new_empty(()), logp_T.new_empty(())


def _fake_gradients(x_TH, w_VH, bias, needs):
    shapes = (x_TH, w_VH, bias)
    return tuple(
        torch.empty_like(t) if need else x_TH.new_empty(0)
        for t, need in zip(shapes, needs, strict=True)
    )


class _Valid:
    """The N tokens that have a target, and the way back to all T. Waits for a GPU once where N is
    not given."""

    def __init__(self, y_T: Tensor, ignore_index: int, num_valid: int | None, V: int) -> None:
        self.T = len(y_T)
        valid_T = y_T != ignore_index
        if num_valid is None:
            index_N = valid_T.nonzero()[:, 0]
        else:
            require(valid_T.sum() == num_valid, f"num_valid={num_valid} is not y_T's number")
            index_N = torch.nonzero_static(valid_T, size=num_valid)[:, 0]
        self.index_N = None if len(index_N) == self.T else index_N
        self.y_N = self.take(y_T).long()
        inside = ((self.y_N >= 0) & (self.y_N < V)).all()
        require(
            inside, f"y_T holds targets outside [0, {V}) other than ignore_index={ignore_index}"
        )

    def take(self, v_T: Tensor) -> Tensor:
        return v_T if self.index_N is None else v_T[self.index_N]

    def put(self, v_N: Tensor) -> Tensor:
        if self.index_N is None:
            return v_N
        return v_N.new_zeros(self.T, *v_N.shape[1:]).index_copy_(0, self.index_N, v_N)


def _gradients(valid, x_TH, bias, dx_NH, dw_VH, db_V):
    """An empty tensor stands for a gradient not asked for: operators cannot return None."""
    return (
        x_TH.new_empty(0) if dx_NH is None else valid.put(dx_NH),
        x_TH.new_empty(0) if dw_VH is None else dw_VH,
        x_TH.new_empty(0) if db_V is None else db_V.to(bias.dtype),
    )


def _report(valid, logp_T, report=None):
    """(dropped_T, active, error): of fast mode; empty in exact mode, which drops nothing."""
    if report is None:
        return logp_T.new_zeros(0), logp_T.new_zeros(()), logp_T.new_zeros(())
    return valid.put(report.dropped_N), report.active, report.error


def _load(backend: str) -> ModuleType:
    return importlib.import_module(f"redi_kernels.{backend}")


def _fast(backend: str) -> ModuleType:
    return fast if backend == "cpu" else _load(backend)
