"""What fast mode leaves out and puts back, against fp64: docs/fast-mode.md quotes these tables.

    python bench/fast_frontier.py FILE.pt... --plot docs/fast-mode/frontier.png

FILEs are bench/activations.py's; the first --tokens of each, rounded to bf16. Weights are REDI's
(alpha 0.8) where a file has right and wrong sequences, else those of a mean NLL. Rows:

    bf16         a dense implementation that rounds only d(logits) to bf16: the unit of the errors
    CCE's filter 128 x 128 tiles of d(logits) are skipped where no element exceeds 2^-12 (its bf16)
    threshold    rows of 256 tokens with no |weight / RMS| p above it are dropped, and put back by
                 nothing / evenly / by share (rank 1 per sign) / share for dX and K moments for dW
    tolerance    redi_kernels itself, in fp32
    in bf16      redi_kernels itself on the same states, exact and with tolerance 2

f: share computed. cost: 1 + 2f (+ K/H) in U, logits kept, as the fused path does; that int8 does
the 1 in a quarter to half of the time is not counted (bench/loss_table.py times it). dX, dW: RMS
error over bf16's. bias: error of dX summed over tokens, over bf16's. max: largest error over RMS.
Adam: share of coordinates whose first step keeps its sign, for target rows, other rows that are
active in some block, and rows that never are; cos: median cosine of the last kind's dW rows.
The plot has the forms on the first file and the tolerances on all.
"""

import argparse
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from redi_kernels import cpu, fast, fast_plan, scan
from redi_kernels.head import Head
from redi_kernels.logprobs import weighted_logprobs
from torch import Tensor

BLOCK = 256
Gradients = tuple[Tensor, Tensor]


class Truth:
    """One file's gradients, and how far others are from them."""

    def __init__(self, path: Path, tokens: int) -> None:
        made = torch.load(path)
        self.source = made["source"]
        self.x, self.y = made["x_TH"][:tokens].bfloat16().float(), made["y_T"][:tokens]
        self.w = made["w_VH"].bfloat16().float()
        T = len(self.y)
        self.weight = -torch.ones(T) / T
        right_S = made.get("is_chosen_S", torch.tensor([True]))
        if not right_S.all():
            self.source += ", signed weights"
            length_S = made["cu_seqlens"].clamp(max=T).diff()
            sign_S = torch.where(right_S, -1 / right_S.sum(), 0.8 / (~right_S).sum())
            self.weight = (sign_S / length_S.clamp(min=1)).repeat_interleave(length_S)
        z_TV = self.x.double() @ self.w.double().T
        p_TV = z_TV.softmax(dim=1)
        rows = torch.arange(T)
        self.logp = p_TV[rows, self.y].log()
        self.nll = -self.logp.mean().item()
        g_TV = p_TV * -self.weight[:, None]
        g_TV[rows, self.y] += self.weight
        self.dx, self.dw = (g_TV @ self.w.double()).float(), (g_TV.T @ self.x.double()).float()
        self.p, self.g = p_TV.float(), g_TV.float()
        self.is_target = torch.zeros(len(self.w), dtype=torch.bool)
        self.is_target[self.y] = True
        self.unit = self.errors(self.dense(self.g.bfloat16().float()))

    def dense(self, g_TV: Tensor) -> Gradients:
        return g_TV @ self.w, g_TV.T @ self.x

    def errors(self, got: Gradients) -> tuple[float, float, float]:
        error = got[0] - self.dx
        bias = error.double().sum(0).norm() / self.dx.double().sum(0).norm()
        dx, dw = error.norm() / self.dx.norm(), (got[1] - self.dw).norm() / self.dw.norm()
        return float(dx), float(dw), float(bias)

    def point(self, name: str, f: float, cost: float, got: Gradients, never_V: Tensor) -> "Point":
        dx, dw, bias = (e / u for e, u in zip(self.errors(got), self.unit, strict=True))
        largest = (got[0] - self.dx).abs().max() / self.dx.square().mean().sqrt()
        classes = (self.is_target, ~self.is_target & ~never_V, never_V)
        adam = [_agreement(got[1][rows], self.dw[rows]) for rows in classes]
        cosine = F.cosine_similarity(got[1][never_V], self.dw[never_V], dim=1)
        zero = float((got[1] == 0).all(dim=1).float().mean())
        cosine = cosine.median().item() if never_V.any() else None
        return Point(name, f, cost, dx, float(largest), bias, dw, adam, cosine, zero)


@dataclass
class Point:
    """One row of the table."""

    name: str
    f: float
    cost: float
    dx: float
    largest: float
    bias: float
    dw: float
    adam: list[float | None]  # targets, active, never active
    cosine: float | None
    zero: float

    def __str__(self) -> str:
        adam = " | ".join("-" if share is None else f"{share:.1%}" for share in self.adam)
        cosine = "-" if self.cosine is None else f"{self.cosine:.3f}"
        return (
            f"| {self.name} | {self.f:.3f} | {self.cost:.2f} | {self.dx:.2f} | {self.largest:.2f} "
            f"| {self.bias:.3g} | {self.dw:.2f} | {adam} | {cosine} | {self.zero:.1%} |"
        )


def _agreement(got: Tensor, want: Tensor) -> float | None:
    return float((got.sign() == want.sign()).float().mean()) if len(want) else None


def filtered(truth: Truth) -> tuple[str, float, float, Gradients, Tensor]:
    """CCE's: d(logits) unscaled by the weights, element maximum per tile."""
    g_TV = truth.g / -truth.weight[:, None]
    T, V = g_TV.shape
    keep = g_TV.view(T // 128, 128, V // 128, 128).abs().amax(dim=(1, 3)) >= 2**-12
    mask = keep.repeat_interleave(128, 0).repeat_interleave(128, 1)
    f = float(keep.float().mean())
    got = truth.dense(truth.g * mask)
    return "CCE's filter", f, 2 + 2 * f, got, ~mask.any(dim=0) & ~truth.is_target


def thresholds(truth: Truth, exponents: list[int]) -> Iterator[tuple]:
    T, V = truth.g.shape
    H = truth.x.shape[1]
    scale_T = (truth.weight.abs() / truth.weight.square().mean().sqrt())[:, None]
    largest = (truth.p * scale_T).view(T // BLOCK, BLOCK, V).amax(dim=1)
    for exponent in exponents:
        active = largest >= 2.0**-exponent
        active[torch.arange(T) // BLOCK, truth.y] = True
        f, never_V = float(active.float().mean()), ~active.any(dim=0)
        drop = ~active.repeat_interleave(BLOCK, 0)
        tail = truth.g * drop
        base = truth.dense(truth.g - tail)
        lost_T = tail.sum(dim=1)
        name = f"threshold 2^-{exponent}: "
        yield name + "nothing", f, 1 + 2 * f, base, never_V
        even_TV = drop * (lost_T / drop.sum(dim=1))[:, None]
        yield name + "evenly", f, 1 + 2 * f, _add(base, truth.dense(even_TV)), never_V
        dx, dw = (torch.zeros_like(t) for t in base)
        for rows in (lost_T > 0, lost_T < 0):
            if rows.any():
                total_V = tail[rows].sum(dim=0)
                dx[rows] = lost_T[rows, None] * (total_V / total_V.sum() @ truth.w)
                dw += torch.outer(total_V, lost_T[rows] @ truth.x[rows] / lost_T[rows].sum())
        yield name + "share", f, 1 + 2 * f, _add(base, (dx, dw)), never_V
        for k in (8, 32, 64, 128):
            fast_plan.MOMENTS = k
            basis_HK = fast_plan.basis(truth.x, truth.weight)
            dw = (tail.T @ (truth.x @ basis_HK)) @ basis_HK.T
            yield name + f"{k} moments", f, 1 + 2 * f + k / H, _add(base, (dx, dw)), never_V
        fast_plan.MOMENTS = 32


def _add(a: Gradients, b: Gradients) -> Gradients:
    return a[0] + b[0], a[1] + b[1]


def library(truth: Truth, tolerance: float, dtype: torch.dtype) -> tuple[tuple, str]:
    seen: list[Tensor] = []
    active = fast._Sparse._active
    fast._Sparse._active = lambda *args: (seen.append(args[4]), active(*args))[1]
    x, w = (t.to(dtype).requires_grad_() for t in (truth.x.clone(), truth.w.clone()))
    total, logp, report = weighted_logprobs(x, w, truth.y, truth.weight, None, tolerance=tolerance)
    fast._Sparse._active = active
    total.backward()
    never_V = torch.zeros(len(w), dtype=torch.bool)
    if seen:
        never_V[:] = True
        never_V[torch.cat([*seen, truth.y])] = False
    got, error = (x.grad.float(), w.grad.float()), logp.double() - truth.logp
    name = "exact" if report is None else f"**tolerance {tolerance:g}**"
    name += "" if dtype == torch.float32 else ", in bf16"
    says = f"{name}: dX's error {truth.errors(got)[0]:.2e}, "
    if report is not None:
        says += f"the estimate says {float(report.error):.2e}; "
        says += f"mean dropped mass {float(report.dropped_T.mean()):.1e}, "
    says += f"log-probs off by {error.square().mean().sqrt():.1e}, {error.mean():+.1e} in the mean"
    f = 1.0 if report is None else float(report.active)
    cost = 3.0 if report is None else 1 + 2 * f + fast_plan.MOMENTS / truth.x.shape[1]
    return (name, f, cost, got, never_V), says


def looks(truth: Truth) -> str:
    """RMS errors of logits: of fast mode's int8, of int8 as it comes, and of bf16."""
    blocks = cpu.Blocks(truth.x, truth.w, Head(None, None, 1.0))
    _, x_nH, x_BH = next(iter(blocks))
    z_Vn = truth.w @ x_nH.T
    int8 = scan.Int8(blocks, None)
    seen = int8.scan(x_BH, truth.y[: blocks.B])
    off = {"int8": seen.e_VB.float().log() + int8.shift_B / scan.LOG2_E - z_Vn}
    w8, x8 = (levels * step for levels, step in map(scan._levels, (truth.w.clone(), x_nH.clone())))
    off["int8 as it comes"] = w8 @ x8.T - z_Vn
    off["bf16"] = (truth.w.bfloat16() @ x_nH.bfloat16().T).float() - z_Vn
    errors = (f"{name} {error.square().mean().sqrt():.3f}" for name, error in off.items())
    return "logits off by: " + ", ".join(errors)


HEADER = """
| {source}, {nll:.2f} nats | f | cost / U | dX | max | bias | dW \
| Adam: targets | active | never | cos | zero rows |
| :--- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--exponents", type=int, nargs="*", default=[12, 14, 16, 18])
    parser.add_argument("--tolerances", type=float, nargs="*", default=[0.5, 1, 2, 4, 8])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    tables: list[tuple[str, list[Point]]] = []
    for path in args.files:
        truth = Truth(path, args.tokens)
        print(HEADER.format(source=truth.source, nll=truth.nll))
        none_V = torch.zeros(len(truth.w), dtype=torch.bool)
        points = []

        def show(*form: Any, truth: Truth = truth, points: list[Point] = points) -> None:
            points.append(truth.point(*form))
            print(points[-1], flush=True)

        show("bf16", 1, 3, truth.dense(truth.g.bfloat16().float()), none_V)
        show(*filtered(truth))
        for form in thresholds(truth, args.exponents):
            show(*form)
        remarks = []
        own = [(tolerance, torch.float32) for tolerance in args.tolerances]
        for tolerance, dtype in [*own, (0.0, torch.bfloat16), (2.0, torch.bfloat16)]:
            form, says = library(truth, tolerance, dtype)
            show(*form)
            remarks.append(says)
        dx, dw, bias = truth.unit
        print(
            f"\nbf16: dX {dx:.1e}, dW {dw:.1e}, bias {bias:.1e}", *remarks, looks(truth), sep="\n"
        )
        tables.append((f"{truth.source}, {truth.nll:.2f} nats", points))
    if args.plot:
        plot(tables, args.plot)


FORMS = {
    "nothing put back": ": nothing",
    "evenly": "evenly",
    "by share (rank 1 per sign)": "share",
    "by share, dW from 8 moments": " 8 moments",
    "by share, dW from 32 moments": "32 moments",
    "by share, dW from 128 moments": "128 moments",
}


def plot(tables: list[tuple[str, list[Point]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (dx, dw, signs) = plt.subplots(1, 3, figsize=(15, 4.8))
    source, points = tables[0]
    panel(dx, "RMS error of dX, over bf16's", points, lambda p: p.dx, list(FORMS)[:3])
    panel(dw, "RMS error of dW, over bf16's", points, lambda p: p.dw, FORMS)
    panel(signs, "rows never active: signs as in the truth", points, lambda p: p.adam[2], FORMS)
    handles, labels = signs.get_legend_handles_labels()
    bf16 = [axes.axhline(1, color="gray", ls=":") for axes in (dx, dw)]
    labels.append("d(logits) rounded to bf16, at 3 U")
    signs.legend([*handles, bf16[0]], labels, fontsize=8, loc="center right")
    others = [
        line(dx, rows, lambda p: p.dx, "**", "", ms=3, lw=1, alpha=0.7) for _, rows in tables[1:]
    ]
    if others:
        texts = [text.removeprefix(source.partition(",")[0] + ", ") for text, _ in tables[1:]]
        title = "tolerance 0.5 to 8 on other texts"
        dx.legend(others, texts, fontsize=7, loc="upper right", title=title, title_fontsize=7)
    for axes, limits in (
        (dx, (0.08, 30)),
        (dw, (0.008, 4)),
    ):  # exact blocks, of flat text, are below
        axes.set(yscale="log", ylim=limits)
    for axes in (dx, dw, signs):
        axes.set_xlabel("cost in U (exact: 3)")
    signs.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    figure.suptitle(source, fontsize=10)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def panel(axes: Any, title: str, points: list[Point], value: Any, forms: Iterable[str]) -> None:
    import matplotlib.pyplot as plt

    for form, color in zip(forms, plt.cm.viridis.colors[::42], strict=False):
        line(axes, points, value, "threshold", FORMS[form], label=form, color=color)
    line(axes, points, value, "CCE", "", label="CCE's filter", marker="s", color="tab:red", ls="")
    ours = {"label": "redi_kernels: tolerance 0.5 to 8", "color": "tab:orange"}
    line(axes, points, value, "**", "", marker="D", lw=2, **ours)
    axes.set_title(title, fontsize=10)


def line(
    axes: Any,
    points: list[Point],
    value: Any,
    start: str,
    end: str,
    marker: str = "o",
    **style: Any,
) -> None:
    named = [p for p in points if p.name.startswith(start) and p.name.endswith(end)]
    chosen = [p for p in named if "in bf16" not in p.name]
    chosen.sort(key=lambda point: point.cost)
    return axes.plot([p.cost for p in chosen], [value(p) for p in chosen], marker=marker, **style)[
        0
    ]


if __name__ == "__main__":
    main()
