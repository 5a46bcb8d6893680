"""One specification of "right" for every backend: CPU, Triton in the interpreter, a real GPU.

Truth is the textbook in fp64 on the same, already rounded, inputs. An error is judged against the
error that a dense implementation makes in the inputs' own dtype, never by an absolute constant:
published absolute tolerances pass gradients that are all zero. `faults` lists wrong gradients that
`complaints` must find; test_meta.py holds it to that.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from redi_kernels import reference
from redi_kernels.head import Head
from torch import Tensor

FACTOR = 2.0  # an error may be this many times the dense implementation's, plus the floor
FLOOR = {  # relative to the gradient's RMS: a few roundings of the result
    torch.bfloat16: 1e-3,
    torch.float16: 1e-3,
    torch.float32: 2e-6,
    torch.float64: 1e-13,
}


@dataclass(frozen=True)
class Problem:
    x_TH: Tensor
    w_VH: Tensor
    y_T: Tensor
    dlogp_T: Tensor  # the coefficients that arrive in backward: signed, tiny and zero
    dlse_T: Tensor
    head: Head

    def double(self) -> "Problem":
        bias = self.head.bias_V
        head = replace(self.head, bias_V=None if bias is None else bias.double())
        wide = (t.double() for t in (self.x_TH, self.w_VH))
        return Problem(*wide, self.y_T, self.dlogp_T.double(), self.dlse_T.double(), head)


@dataclass(frozen=True)
class Result:
    logp_T: Tensor
    lse_T: Tensor
    dx_TH: Tensor
    dw_VH: Tensor
    db_V: Tensor | None


def make_problem(
    T: int,
    V: int,
    H: int,
    dtype: torch.dtype = torch.float32,
    *,
    seed: int = 0,
    peak: float = 3.0,
    ignored: float = 0.25,
    bias: bool = False,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    dlse: float = 0.0,
) -> Problem:
    """Random states, logits of standard deviation about `peak`, half of the targets likely."""
    g = torch.Generator().manual_seed(seed)
    w_VH = torch.randn(V, H, generator=g)
    y_T = torch.randint(V, (T,), generator=g)
    x_TH = torch.randn(T, H, generator=g) * peak / H**0.5
    likely_T = torch.rand(T, generator=g) < 0.5
    x_TH += likely_T[:, None] * w_VH[y_T] * 2 * peak / H
    y_T[torch.rand(T, generator=g) < ignored] = -100
    # REDI's weights: the sign of the sequence, 1 / length; some far smaller, some zero
    kinds = torch.tensor([1.0, -0.8, 1.0, -0.8, 1e-6, 0.0])
    dlogp_T = kinds[torch.randint(len(kinds), (T,), generator=g)] / max(T, 1)
    dlogp_T *= 0.5 + torch.rand(T, generator=g)
    head = Head(
        torch.randn(V, generator=g).to(dtype) if bias else None,
        softcap,
        logit_scale,
    )
    dlse_T = dlse * torch.randn(T, generator=g) / max(T, 1)
    return Problem(x_TH.to(dtype), w_VH.to(dtype), y_T, dlogp_T, dlse_T, head)


def text(
    dtype: torch.dtype = torch.float32,
    T: int = 400,
    V: int = 3000,
    H: int = 96,
    likely: float = 0.06,
    **options,
) -> Problem:
    """As a model sees it: frequent and rare tokens, states that share directions, likely targets,
    and REDI's kinds of weights."""
    problem = make_problem(T, V, H, dtype, ignored=0.0, **options)
    g = torch.Generator().manual_seed(1)
    y_T = (V ** torch.rand(T, generator=g)).long() - 1
    w_VH = problem.w_VH.float()
    topics = torch.randn(12, H, generator=g) * 0.25
    x_TH = topics[torch.randint(12, (T,), generator=g)] + 0.05 * torch.randn(T, H, generator=g)
    x_TH += (likely + 0.08 * torch.rand(T, 1, generator=g)) * w_VH[y_T]
    w_VH[:, 0], x_TH[:, 0] = -1.5 * torch.arange(1, V + 1).log(), 1.0
    y_T[torch.rand(T, generator=g) < 0.2] = -100
    for t, value in ((problem.x_TH, x_TH), (problem.w_VH, w_VH), (problem.y_T, y_T)):
        t.copy_(value)
    return problem


def textbook(problem: Problem) -> Result:
    """Logits, log-softmax and autograd, in the problem's own dtype."""
    x_TH, w_VH = (t.detach().clone().requires_grad_() for t in (problem.x_TH, problem.w_VH))
    bias = problem.head.bias_V
    bias = None if bias is None else bias.detach().clone().requires_grad_()
    head = replace(problem.head, bias_V=bias)
    logp_T, lse_T, *_ = reference.token_logprobs(x_TH, w_VH, problem.y_T, head)
    total = (logp_T * problem.dlogp_T + lse_T * problem.dlse_T).sum()
    inputs = [t for t in (x_TH, w_VH, bias) if t is not None]
    grads = torch.autograd.grad(total, inputs)
    return Result(logp_T.detach(), lse_T.detach(), grads[0], grads[1], (*grads, None)[2])


@dataclass(frozen=True)
class Errors:
    rms: float  # ||error|| / ||truth||
    max: float  # max |error| / RMS(truth)
    bias: float  # ||sum over rows of error|| / the truth's, which a step sees; see `errors`
    cosine: float


def errors(got: Tensor, truth: Tensor) -> Errors:
    got, truth = got.double().cpu(), truth.double().cpu()
    error = got - truth
    norm = truth.norm().clamp(min=1e-300)
    # over V the truth sums to zero, and signed weights may cancel: never less than one norm
    summed = truth.sum(dim=0).norm().maximum(norm)
    return Errors(
        float(error.norm() / norm),
        float(error.abs().amax() / norm * truth.numel() ** 0.5) if truth.numel() else 0.0,
        float(error.sum(dim=0).norm() / summed),
        float((got * truth).sum() / (got.norm() * truth.norm()).clamp(min=1e-300)),
    )


def complaints(problem: Problem, got: Result, factor: float = FACTOR) -> list[str]:
    """What is wrong with `got`; empty when nothing is."""
    truth, dense = textbook(problem.double()), textbook(problem)
    found = list(_logp_complaints(problem, got, truth, dense))
    for name, got_g, truth_g, dense_g in _gradients(problem, got, truth, dense):
        if got_g is None or got_g.dtype != dense_g.dtype or not got_g.isfinite().all():
            found.append(f"{name}: missing, not finite or not {dense_g.dtype}")
            continue
        found += _gradient_complaints(name, got_g, truth_g, dense_g, factor)
    ignored_T = problem.y_T == -100
    if got.dx_TH[ignored_T.to(got.dx_TH.device)].any():
        found.append("dx: an ignored token has a gradient")
    return found


def check(problem: Problem, got: Result, factor: float = FACTOR) -> None:
    found = complaints(problem, got, factor)
    assert not found, "\n".join(found)


def _logp_complaints(problem: Problem, got: Result, truth: Result, dense: Result) -> Iterator[str]:
    if (got.logp_T > 0).any():
        yield "logp: above 0"
    eps, eps_in = (torch.finfo(d).eps for d in (got.logp_T.dtype, problem.x_TH.dtype))
    z_T = truth.logp_T + truth.lse_T  # few tokens: the dense error may be small by luck
    luck = eps_in * z_T.norm() / max(int((problem.y_T >= 0).sum()), 1) ** 0.5
    for name in ("logp_T", "lse_T"):
        mine, exact, peer = (getattr(r, name).double().cpu() for r in (got, truth, dense))
        allowed = 1.1 * (peer - exact).norm() + 4 * eps * (1 + exact.abs()).norm() + luck
        if not (mine - exact).norm() <= allowed:
            yield f"{name}: error {(mine - exact).norm():.3g}, dense allows {allowed:.3g}"


def _gradients(problem: Problem, got: Result, truth: Result, dense: Result) -> Iterator[tuple]:
    """Each gradient, and dW again by row class: errors in rarely touched rows hide in the norm."""
    yield "dx", got.dx_TH, truth.dx_TH, dense.dx_TH
    yield "dw", got.dw_VH, truth.dw_VH, dense.dw_VH
    is_target_V = torch.zeros(len(problem.w_VH), dtype=torch.bool)
    is_target_V[problem.y_T[problem.y_T >= 0].cpu()] = True
    if got.dw_VH is not None:
        for name, rows in (("dw[targets]", is_target_V), ("dw[others]", ~is_target_V)):
            if rows.any():
                yield name, *(r.dw_VH.cpu()[rows] for r in (got, truth, dense))
    if problem.head.bias_V is not None:
        yield "db", got.db_V, truth.db_V, dense.db_V


def _gradient_complaints(
    name: str, got: Tensor, truth: Tensor, dense: Tensor, factor: float
) -> Iterator[str]:
    mine, peer = errors(got, truth), errors(dense, truth)
    floor = FLOOR[dense.dtype]
    for kind, times in (("rms", 1), ("max", 20), ("bias", 3)):  # larger than an RMS by nature
        allowed = factor * getattr(peer, kind) + times * floor
        if not getattr(mine, kind) <= allowed:
            yield f"{name}: {kind} error {getattr(mine, kind):.3g}, allowed {allowed:.3g}"
    zero_rows = _zero_rows(got), _zero_rows(dense)
    if zero_rows[0] > zero_rows[1] and zero_rows[0] > _zero_rows(truth):
        yield f"{name}: {zero_rows[0]} rows are zero, {zero_rows[1]} in the dense gradient"


def _zero_rows(g: Tensor) -> int:
    return int((g.reshape(len(g), -1) == 0).all(dim=1).sum())


# ---------------------------------------------------------------------------------- wrong gradients


def faults(problem: Problem, right: Result) -> Iterator[tuple[str, Result]]:
    """Named wrong results, each made from a right one; every one must draw a complaint."""
    names = ["dx_TH", "dw_VH"] + (["db_V"] if right.db_V is not None else [])
    changes: dict[str, Callable[[Tensor], Tensor]] = {
        "zeroed": torch.zeros_like,
        "sign flipped": torch.neg,
        "1.05 times": lambda g: (g.float() * 1.05).to(g.dtype),
        "rows shifted by one": lambda g: g.roll(1, dims=0),
        "first 16 rows missing": lambda g: torch.cat([torch.zeros_like(g[:16]), g[16:]]),
        "last 16 rows missing": lambda g: torch.cat([g[:-16], torch.zeros_like(g[-16:])]),
    }
    for name in names:
        for what, change in changes.items():
            yield f"{name} {what}", replace(right, **{name: change(getattr(right, name))})
    first = problem.dlogp_T[problem.dlogp_T != 0][0]
    broadcast = textbook(replace(problem, dlogp_T=first.expand_as(problem.dlogp_T).clone()))
    for name in names:
        wrong = getattr(broadcast, name)
        yield f"{name} from grad_output[0] broadcast", replace(right, **{name: wrong})
    short = textbook(_without_tile(problem))
    yield "dx_TH one vocabulary tile short", replace(right, dx_TH=short.dx_TH)
    tokens = problem.dlogp_T.clone()
    tokens[:16] = 0
    yield (
        "dw_VH one token tile short",
        replace(right, dw_VH=textbook(replace(problem, dlogp_T=tokens)).dw_VH),
    )
    yield "logp_T above zero", replace(right, logp_T=right.logp_T + 1e-3)


def _without_tile(problem: Problem, columns: int = 32) -> Problem:
    """The last columns masked out of the softmax, as a loop that ends one tile early would."""
    V = len(problem.w_VH)
    bias_V = problem.head.bias_V
    bias_V = problem.w_VH.new_zeros(V) if bias_V is None else bias_V.clone()
    bias_V[V - columns :] = -1e4
    return replace(problem, head=replace(problem.head, bias_V=bias_V))
