"""What the default paths must also get right: NaN, ignored tokens, strides, bits, graphs, size.

The last row trips an assertion on the device on purpose. That ends this process's GPU context; what
follows it runs in a new one.
"""

import contextlib
import functools
from dataclasses import replace
from typing import Any

import torch
from gpu_check_problem import (
    DEVICE,
    PATHS,
    REHEARSAL,
    Problem,
    gradients,
    is_alive,
    problem,
    ratios,
    rms,
    same_bits,
    synchronize,
)
from gpu_check_rows import CannotRun, Row, Values
from gradcheck_tools import errors, text, textbook
from redi_kernels import sft_loss, token_logprobs
from redi_kernels.logprobs import weighted_logprobs
from torch import Tensor

BF16 = torch.bfloat16
SHAPE = (70, 32, 200) if REHEARSAL else (1000, 576, 49152)
LONG, MANY, WIDE = (70_000, 64, 50_257), (540_000, 4096, 1000), (256, 8448, 262_144)
ROUNDING = 2**-9  # of d(logits) to bf16, at most


def rows(part: str, rehearse: bool) -> list[Row]:
    of_a_path = {
        "padded rows": padded, "transposed": transposed, "no TMA: odd H": odd,
        "no TMA: base": misaligned, "one frozen": frozen, "batch invariance": invariance,
    }  # fmt: skip
    both = {f"{name}, {path}": functools.partial(function, path)
            for path in PATHS for name, function in of_a_path.items()}  # fmt: skip
    nan = {f"NaN in {where}{', bias' if full else ''}": functools.partial(not_a_number, where, full)
           for where in ("x", "W") for full in (False, True)}  # fmt: skip
    sizes = {"T V": LONG, "T H": MANY, "V H": WIDE}
    big = {f"{name} > 2^31, {shape}, {path}": functools.partial(large, shape, path)
           for name, shape in sizes.items() for path in PATHS}  # fmt: skip
    single = {
        "fused and primitive log-probs": paths_agree, "ignored tokens": ignored,
        "no token": empty, "nothing waits for the GPU": no_sync, "a second stream": side_stream,
        "a CUDA graph": graph, "torch.compile (aot_eager)": compiled,
        "fast mode against fp64": fast,
    }  # fmt: skip
    last = {"a target out of range": out_of_range}
    return [
        Row(name, run, seconds=10.0 if name in big else 3.0)
        for name, run in (nan | single | both | big | last).items()
    ]


def not_a_number(where: str, full: bool) -> tuple[Values, bool]:
    """A NaN row of x is that token's, a NaN row of W is everyone's; nothing else moves."""
    p = problem(SHAPE, BF16, full=full)
    clean = gradients(p, "fused", "triton", BF16)
    matrix = p.x_TH if where == "x" else p.w_VH
    matrix[3] = float("nan")
    bad_T = torch.ones_like(p.y_T, dtype=torch.bool)
    if where == "x":
        bad_T = torch.arange(len(p.y_T), device=DEVICE) == 3
    found: dict[str, Any] = {}
    options = {"bias": p.bias_V, "backend": "triton", **p.options}
    out = token_logprobs(p.x_TH, p.w_VH, p.y_T, **options)
    found["logp"] = torch.equal(out.logp_T.isnan(), bad_T)
    found["lse"] = torch.equal(out.lse_T.isnan(), bad_T)
    found["loss"] = bool(sft_loss(p.x_TH, p.w_VH, p.y_T, **options).loss.isnan())
    for path in PATHS:
        got = gradients(p, path, "triton", BF16)
        found[f"{path} logp"] = torch.equal(got["logp"].isnan(), bad_T)
        found[f"{path} dX"] = torch.equal(got["dx"].isnan().any(dim=1), bad_T)
        found[f"{path} dW"] = bool(got["dw"].isnan().any())
        if path == "fused" and where == "x":
            good = ~bad_T
            found["others' bits"] = torch.equal(got["logp"][good], clean["logp"][good])
    return found, all(found.values())


def paths_agree() -> tuple[Values, bool]:
    found = {}
    for full in (False, True):
        p = problem(SHAPE, BF16, full=full)
        fused, primitive = (gradients(p, path, "triton", BF16)["logp"] for path in PATHS)
        name = "bias, cap, scale" if full else "plain"
        found[f"{name}: same bits"] = torch.equal(fused, primitive)
        found[f"{name}: farthest"] = (fused - primitive).abs().max().item()
    return found, all(v for v in found.values() if isinstance(v, bool))


def ignored() -> tuple[Values, bool]:
    """As if those tokens were not there, whether or not their number is told."""
    p = problem(SHAPE, BF16)
    valid_T = torch.arange(len(p.y_T), device=DEVICE) % 3 != 0
    fewer = Problem(p.x_TH[valid_T], p.w_VH, p.y_T[valid_T], p.weight_T[valid_T], None, {})
    p.y_T = p.y_T.where(valid_T, -100)
    found = {}
    for path in PATHS:
        want = gradients(fewer, path, "triton", BF16)
        for name, options in (("", {}), (" num_valid", {"num_valid": int(valid_T.sum())})):
            p.options = options
            got = gradients(p, path, "triton", BF16)
            rest = not got["dx"][~valid_T].any() and not got["logp"][~valid_T].any()
            got = {"logp": got["logp"][valid_T], "dx": got["dx"][valid_T], "dw": got["dw"]}
            found[path + name] = rest and same_bits(got, want)
    return found, all(found.values())


def empty() -> tuple[Values, bool]:
    """No token at all, and none with a target: zero gradients."""
    found = {}
    for path in PATHS:
        p = problem(SHAPE, BF16)
        none = Problem(p.x_TH[:0], p.w_VH, p.y_T[:0], p.weight_T[:0], None, {})
        p.y_T.fill_(-100)
        for name, case in (("T = 0", none), ("all ignored", p)):
            found[f"{path}, {name}"] = not any(
                t.any() for t in gradients(case, path, "triton", BF16).values()
            )
    return found, all(found.values())


# --------------------------------------------------------------------------------- how memory lies


def near(p: Problem, path: str) -> tuple[Values, bool]:
    return ratios(p, gradients(p, path, "triton", p.x_TH.dtype), path)


def padded(path: str) -> tuple[Values, bool]:
    """Rows of H elements out of longer ones; 9 of 16 (not 16 bytes long, but 32 apart), too."""
    found: dict[str, Any] = {}
    for H, of in ((SHAPE[1], SHAPE[1] + 16), (9, 16)):
        p = problem((SHAPE[0], of, SHAPE[2]), BF16)
        p.x_TH, p.w_VH = p.x_TH[:, :H], p.w_VH[:, :H]
        got, passed = near(p, path)
        found |= {f"{key}, {H} of {of}": value for key, value in got.items()}
        found[f"{H} of {of}"] = passed
    return found, all(v for v in found.values() if isinstance(v, bool))


def transposed(path: str) -> tuple[Values, bool]:
    """Columns of neighbours; and weights that are a stride and an expansion of others."""
    p = problem(SHAPE, BF16)
    p.w_VH, p.x_TH = p.w_VH.T.contiguous().T, p.x_TH.T.contiguous().T
    strided = replace(p, weight_T=p.weight_T.repeat_interleave(2)[::2])
    expanded = replace(p, weight_T=p.weight_T[:1].expand(len(p.y_T)))
    a, a_near = near(strided, path)
    b, b_near = near(expanded, path)
    return a | {f"{key}, expanded": v for key, v in b.items()}, a_near and b_near


def odd(path: str) -> tuple[Values, bool]:
    return near(problem((SHAPE[0], SHAPE[1] + 1, SHAPE[2] + 3), BF16, full=True), path)


def misaligned(path: str) -> tuple[Values, bool]:
    """Rows 16 bytes apart, the first of them not at a multiple of 16."""
    p = problem(SHAPE, BF16)
    for name in ("x_TH", "w_VH"):
        whole = getattr(p, name)
        moved = whole.new_empty(whole.numel() + 1)[1:].view_as(whole)
        setattr(p, name, moved.copy_(whole))
    return near(p, path)


def frozen(path: str) -> tuple[Values, bool]:
    """Each gradient alone has the bits that it has beside the other."""
    p = problem(SHAPE, BF16)
    both, found = gradients(p, path, "triton", BF16), {}
    for name in ("dx", "dw"):
        x_TH = p.x_TH.detach().requires_grad_(name == "dx")
        w_VH = p.w_VH.detach().requires_grad_(name == "dw")
        if path == "fused":
            total = weighted_logprobs(x_TH, w_VH, p.y_T, p.weight_T, None, backend="triton")[0]
        else:
            out = token_logprobs(x_TH, w_VH, p.y_T, backend="triton")
            total = (out.logp_T * p.weight_T).sum() + out.lse_T.sum()
        (got,) = torch.autograd.grad(total, [x_TH if name == "dx" else w_VH])
        found[f"{name} alone"] = torch.equal(got, both[name])
    return found, all(found.values())


def invariance(path: str) -> tuple[Values, bool]:
    """A token's log-prob has the same bits alone, among few and among many, at any place."""
    p = problem(SHAPE, BF16)
    whole = gradients(p, path, "triton", BF16)["logp"]
    found = {}
    T = SHAPE[0]
    for first, last in ((0, 1), (5, 6), (0, T // 3), (T // 2 + 1, T), (T - 1, T)):
        rows = slice(first, last)
        few = Problem(p.x_TH[rows], p.w_VH, p.y_T[rows], p.weight_T[rows], None, {})
        found[f"{first}..{last}"] = torch.equal(
            gradients(few, path, "triton", BF16)["logp"], whole[rows]
        )
    return found, all(found.values())


# ------------------------------------------------------------------------- streams, graphs, waiting


def step(p: Problem, **options: Any) -> list[Tensor]:
    """[loss, dX, dW] with the number of targets told: what a trainer runs."""
    out = sft_loss(p.x_TH, p.w_VH, p.y_T, backend="triton", num_valid=len(p.y_T), **options)
    return [out.loss.detach(), *torch.autograd.grad(out.loss, [p.x_TH, p.w_VH])]


def trained() -> Problem:
    p = problem(SHAPE, BF16)
    p.x_TH.requires_grad_(), p.w_VH.requires_grad_()
    return p


def equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))


@contextlib.contextmanager
def waiting_is_an_error():
    if REHEARSAL:
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def no_sync() -> tuple[Values, bool]:
    p = trained()
    for tolerance in (0.0, 2.0):
        step(p, tolerance=tolerance)  # compiles, which may wait
    synchronize()
    found: dict[str, Any] = {}
    for tolerance in (0.0, 2.0):
        name = "fast mode" if tolerance else "exact"
        try:
            with waiting_is_an_error():
                step(p, tolerance=tolerance)
            found[name] = True
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0]
    return found, found["exact"] is True and found["fast mode"] is True


def needs_a_gpu() -> None:
    if REHEARSAL:
        raise CannotRun("a GPU")


def side_stream() -> tuple[Values, bool]:
    needs_a_gpu()
    p = trained()
    want = step(p)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        got = step(p)
    stream.synchronize()
    same = equal(got, want)
    return {"same bits": same}, same


def graph() -> tuple[Values, bool]:
    """Captured once, replayed on other states: the bits of a call that is not captured."""
    needs_a_gpu()
    p = trained()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compilation and the allocator's first blocks
        for _ in range(3):
            step(p)
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        got = step(p)
    with torch.no_grad():
        p.x_TH.copy_(p.x_TH.flip(0))
    captured.replay()
    torch.cuda.synchronize()
    same = equal(got, step(p))
    return {"same bits": same}, same


def compiled() -> tuple[Values, bool]:
    """One opaque node: the graph around it is torch's."""
    p = trained()
    call = lambda x_TH, w_VH: sft_loss(x_TH, w_VH, p.y_T, backend="triton").loss
    loss = torch.compile(call, backend="aot_eager", fullgraph=True)(p.x_TH, p.w_VH)
    got = [loss.detach(), *torch.autograd.grad(loss, [p.x_TH, p.w_VH])]
    want = step(p)
    off = max(rms(g - w) / rms(w) for g, w in zip(got, want, strict=True))
    return {"farthest from eager": off}, off < 5e-3  # its last product is rounded once more


def fast() -> tuple[Values, bool]:
    """Both gradients within what tolerance 2 promises beyond a dense implementation's errors, and
    dX within what was stated."""
    T, V, H = (150, 1000, 64) if REHEARSAL else (2048, 20_000, 96)
    made = text(BF16, T, V, H, likely=0.2)
    p = [t.to(DEVICE).requires_grad_() for t in (made.x_TH, made.w_VH)]
    y_T, weight_T = made.y_T.to(DEVICE), made.dlogp_T.to(DEVICE)
    options = {"backend": "triton", "tolerance": 2.0}
    total, _, report = weighted_logprobs(*p, y_T, weight_T, None, **options)
    got = torch.autograd.grad(total, p)
    truth, dense = textbook(made.double()), textbook(made)
    found: dict[str, Any] = {"f": report.active.item(), "stated": report.error.item()}
    passed = True
    for name, mine in zip(("dx_TH", "dw_VH"), got, strict=True):
        off = errors(mine, getattr(truth, name)).rms
        floor = errors(getattr(dense, name), getattr(truth, name)).rms
        found |= {name[:2]: off, f"dense {name[:2]}": floor}
        passed &= off <= ((1.2 * floor) ** 2 + (2 * ROUNDING) ** 2) ** 0.5
    return found, passed and found["dx"] <= found["stated"] + 1.5 * found["dense dx"]


# ------------------------------------------------------------------------------------ what is large


def large(shape: tuple[int, int, int], path: str) -> tuple[Values, bool]:
    """More elements than an int32 counts: the first and last rows against fp64 from blocks."""
    if REHEARSAL:
        shape = (70, 32, 200)
    try:
        p = problem(shape, BF16)
        p.y_T[:5] = shape[2] - 1  # rare rows hide nothing where a target is among them
        got = gradients(p, path, "triton", BF16)
        found = dict(_ends(p, got, path))
    except torch.OutOfMemoryError:
        raise CannotRun("more memory than this GPU has") from None
    # bf16 keeps 2^-9 of a result; d(logits) in bf16 adds as much
    return found, found["logp"] < 1e-4 and max(found["dx"], found["dw"]) < 6e-3


def _ends(p: Problem, got: dict[str, Tensor], path: str):
    """The relative RMS errors of the first and last 64 rows of each."""
    T, V = len(p.x_TH), len(p.w_VH)
    ends = lambda n: torch.cat([torch.arange(min(64, n)), torch.arange(max(n - 64, 0), n)]).to(
        DEVICE
    )
    t_E, v_E = ends(T), ends(V)
    dw_EH = torch.zeros(len(v_E), p.w_VH.shape[1], dtype=torch.float64, device=DEVICE)
    logp_T = torch.empty(T, dtype=torch.float64, device=DEVICE)
    dx = {}
    block = max(1, (1 << 28) // V)  # tokens whose logits in fp64 are 2 GB
    for first in range(0, T, block):
        rows = slice(first, first + block)
        x_BH = p.x_TH[rows].double()
        z_BV = torch.cat([x_BH @ w.double().T for w in p.w_VH.split(16384)], dim=1)
        y_B1, weight_B1 = p.y_T[rows, None], p.weight_T[rows, None].double()
        lse_B1 = z_BV.logsumexp(dim=1, keepdim=True)
        logp_T[rows] = (z_BV.gather(1, y_B1) - lse_B1)[:, 0]
        # d/dz of weight logp, and of the primitive's lse beside it
        factor_B1 = weight_B1 - 1 if path == "primitive" else weight_B1
        g_BV = (z_BV - lse_B1).exp_().mul_(-factor_B1)
        g_BV.scatter_add_(1, y_B1, weight_B1)
        dw_EH += g_BV[:, v_E].T @ x_BH
        for t in t_E[(t_E >= first) & (t_E < first + block)].tolist():
            g_V = g_BV[t - first]
            dx[t] = sum(
                g @ w.double() for g, w in zip(g_V.split(16384), p.w_VH.split(16384), strict=True)
            )
    yield "logp", rms(got["logp"] - logp_T) / rms(logp_T)
    dx_EH = torch.stack([dx[t] for t in t_E.tolist()])
    yield "dx", rms(got["dx"][t_E] - dx_EH) / rms(dx_EH)
    yield "dw", rms(got["dw"][v_E] - dw_EH) / rms(dw_EH)


def out_of_range() -> tuple[Values, bool]:
    p = problem(SHAPE, BF16)
    p.y_T[7] = SHAPE[2]
    try:
        sft_loss(p.x_TH, p.w_VH, p.y_T, backend="triton")
        synchronize()
    except (RuntimeError, ValueError) as error:
        return {"refused": str(error).splitlines()[0][:120]}, True
    return {"refused": "no"}, False


__all__ = ["is_alive", "rows"]
