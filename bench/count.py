"""Count FLOP, bytes, exponentials and launches: our Triton kernels and the peers', in one run.

    python bench/count.py                          made-up activations
    python bench/count.py --activations FILE.pt    and those of bench/activations.py, cut to
                                                   --tokens and --vocab
    python bench/count.py ... --blocks 256 1024    only f, by the number of tokens that share a plan
    python bench/count.py ... --only NAME ...      these methods on the last table's states alone

Everything runs in Triton's interpreter on CPU, forward and backward of a mean cross entropy, so
sizes are small; counts of dense kernels grow with them exactly. V / H of the made-up ones is that
of Qwen2.5-1.5B, on which the length of Liger's chunks depends; what CCE's filter leaves out depends
on the text, so only real states show it. Our tiles are those of sm_90 and our slab is scaled with T
V, so that chunks and slices are as many as at full size (T = 32k, V = 152k), or as whole tiles
allow. Exit 1 unless ours need 3 U (fused) and 4 U (primitive) FLOP within 2%, U = 2 T V H, and the
fused path's footprint is at most half of Liger's; and unless fast mode, where it drops anything,
needs at most 1 + 2 f U (primitive: 2 + 2 f) and its stand-ins, and 1.8 times less than any peer.
"""

import argparse
import dataclasses
import os
import sys
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") != "1":  # the interpreter is chosen when triton is imported
    os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"TRITON_INTERPRET": "1"})

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests/tools"), str(ROOT / "bench")]

import interpreter  # noqa: E402
import torch  # noqa: E402
import triton_peers  # noqa: E402
from redi_kernels import cpu, fast, sft_loss, token_logprobs  # noqa: E402
from redi_kernels.head import Head  # noqa: E402
from redi_kernels.triton import config as configs  # noqa: E402
from triton_cost import KernelCost, TorchCost  # noqa: E402

HEADING = """<!-- made by bench/count.py -->
# What the kernels cost, counted

`make count`: bf16, forward and backward of a mean cross entropy in Triton's interpreter. U = 2 T V
H FLOP, one logits matmul; TV is one element of the logits. Requested: bytes asked for by loads and
stores, the load on L2. Footprint: distinct 32-byte sectors per launch plus inputs and outputs of
torch ops, what HBM must move at least. Errors are relative to fp64.

{tables}

Ours write d(logits) to memory once and read it twice (the slab: 6 B / TV of footprint). CCE does
not, and its footprint is out of our reach: a tile of d(logits) feeds a tile of dX and one of dW,
and no program can own both, so CCE's take turns under locks, adding to both in bf16. That costs it
determinism and the error of dX above. Without locks or atomics the choice is a slab (4 U) or
recomputing once more (5 U); `kernels/redi_kernels/triton/primitive.py` has the arithmetic.

f is the share of d(logits) that fast mode (`tolerance`, docs/fast-mode.md) computed: 1 where the
text leaves nothing out. Its stand-ins cost 32 / H + 32 / T + 270 / V of U beside 1 + 2 f, of which
only the first term is left at full size; a small vocabulary is also a worse case for f.
"""
FAST, FAST_PRIMITIVE = "ours, fused, tolerance 2", "ours, primitive, tolerance 2"
FULL = {"tokens": 32768, "vocab": 151936}  # where chunks and slices are counted


@dataclasses.dataclass
class Count:
    """One method's totals, in units that do not depend on the size where there are such."""

    name: str
    flops: float  # in U = 2 T V H
    exps: float  # per element of the logits
    requested: float  # bytes per element of the logits
    footprint: float
    launches: int
    torch_ops: int
    error_dx: float  # relative to fp64
    error_dw: float
    active: float | None  # fast mode's share of rows computed: f


def ours() -> dict:
    return {
        "ours, fused": lambda x, w, y: sft_loss(x, w, y, backend="triton").loss,
        "ours, primitive": lambda x, w, y: -token_logprobs(x, w, y, backend="triton").logp_T.mean(),
        FAST: fast_fused,
        FAST_PRIMITIVE: fast_primitive,
    }


def fast_fused(x, w, y):
    out = sft_loss(x, w, y, backend="triton", tolerance=2.0)
    return out.loss, out.fast


def fast_primitive(x, w, y):
    out = token_logprobs(x, w, y, backend="triton", tolerance=2.0)
    return -out.logp_T.mean(), out.fast


def eager(x, w, y):
    return torch.nn.functional.cross_entropy((x @ w.T).float(), y)


def count(name: str, loss, x_TH, w_VH, y_T, truth) -> Count:
    x, w = (t.clone().requires_grad_() for t in (x_TH, w_VH))
    with KernelCost() as kernels, TorchCost() as ops:
        out = loss(x, w, y_T)
        value, report = out if isinstance(out, tuple) else (out, None)
        value.backward()
    T, H = x.shape
    V = len(w)
    total = lambda key: sum(getattr(k, key) for k in kernels.kernels.values())
    for kernel_name, k in kernels.kernels.items():
        print(
            f"    {kernel_name:36s} {k.launches:4d} launches {k.programs:6d} programs "
            f"{k.flops / (2 * T * V * H):5.2f} U {k.requested / 1e6:8.1f} MB requested "
            f"{k.footprint / 1e6:8.1f} MB footprint"
        )
    errors = [
        ((g.double() - t).norm() / t.norm()).item()
        for g, t in zip((x.grad, w.grad), truth, strict=True)
    ]
    return Count(
        name,
        (total("flops") + ops.flops) / (2 * T * V * H),
        total("exps") / (T * V),
        (total("requested") + ops.bytes) / (T * V),
        (total("footprint") + ops.bytes) / (T * V),
        total("launches"),
        ops.ops,
        *errors,
        None if report is None else float(report.active),
    )


def sm90_scaled(T: int, V: int) -> configs.Config:
    """sm_90's tiles with a slab that gives as many chunks and slices as at full size, or as many
    as whole tiles allow."""
    config = configs.SM90
    share = T * V / (FULL["tokens"] * FULL["vocab"])
    return dataclasses.replace(
        config, slab_bytes=int(config.slab_bytes * share), min_slice=config.logits.n, tma=False
    )


States = tuple[str, torch.Tensor, torch.Tensor, torch.Tensor]


def states(args) -> list[States]:
    """(what they are, x_TH, w_VH, y_T) of each table."""
    random = torch.Generator().manual_seed(0)
    x_TH = torch.randn(args.tokens, args.hidden, generator=random)
    w_VH = torch.randn(args.vocab, args.hidden, generator=random) * 3 * args.hidden**-0.5
    y_T = torch.randint(0, args.vocab, (args.tokens,), generator=random)
    found = [("made-up states", x_TH.bfloat16(), w_VH.bfloat16(), y_T)]
    if args.activations:
        saved = torch.load(args.activations)
        y_T = saved["y_T"]
        keep = ((y_T >= 0) & (y_T < args.vocab)).nonzero()[: args.tokens, 0]
        x_TH, w_VH = saved["x_TH"][keep], saved["w_VH"][: args.vocab]
        found.append((saved["source"], x_TH.bfloat16(), w_VH.bfloat16(), y_T[keep]))
    return found


def measure(what: str, x_TH, w_VH, y_T, only: list[str] | None) -> list[Count]:
    config = sm90_scaled(len(x_TH), len(w_VH))
    configs.select = lambda *_: config
    leaves = [t.double().requires_grad_() for t in (x_TH, w_VH)]
    torch.nn.functional.cross_entropy(leaves[0] @ leaves[1].T, y_T).backward()
    truth = [leaf.grad for leaf in leaves]
    rows = []
    for name, loss in {**ours(), **triton_peers.available(), "eager": eager}.items():
        if only and name not in only:
            continue
        print(f"{what}: {name}", flush=True)
        rows.append(count(name, loss, x_TH, w_VH, y_T, truth))
    return rows


def shares(x_TH, w_VH, y_T, sizes: list[int]) -> int:
    """f by the number of tokens that share a plan; of the CPU's fast mode, whose plan is ours."""
    cpu.BUFFER_BYTES = 1 << 40
    weight_T = torch.ones(len(y_T)) / len(y_T)
    args = x_TH, w_VH, y_T, weight_T, weight_T * 0, Head(), (False, False, False), 2.0
    for size in sizes:
        cpu.BLOCK_TOKENS = size, size
        print(
            f"tolerance 2, {size} tokens a plan: f = {float(fast.gradients(*args)[-1].active):.3f}"
        )
    return 0


def table(rows: list[Count]) -> str:
    lines = [
        "| | FLOP / U | f | exp / TV | requested B / TV | footprint B / TV | launches | torch ops "
        "| dX error | dW error |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        active = "" if r.active is None else f"{r.active:.3f}"
        lines.append(
            f"| {r.name} | {r.flops:.2f} | {active} | {r.exps:.2f} | {r.requested:.1f} "
            f"| {r.footprint:.2f} | {r.launches} | {r.torch_ops} | {r.error_dx:.1e} "
            f"| {r.error_dw:.1e} |"
        )
    return "\n".join(lines)


def failures(rows: list[Count], T: int, H: int, V: int) -> list[str]:
    by_name = {row.name: row for row in rows}
    fused, primitive = by_name["ours, fused"], by_name["ours, primitive"]
    limits = [
        ("fused FLOP", fused.flops, 3 * 1.02),
        ("primitive FLOP", primitive.flops, 4 * 1.02),
    ]
    if "Liger" in by_name:
        limits.append(("fused footprint", fused.footprint, 0.5 * by_name["Liger"].footprint))
    sparse = by_name[FAST]
    if sparse.active < 1:
        # moments; putting back; the basis, on at most 4095 tokens; a matmul's tiles, half full
        stand_ins = 32 / H + 32 / T + (30 + 240 * min(1, 4095 / T)) / V + 256 / V
        limits += [
            (name, by_name[name].flops, exact + 2 * by_name[name].active + stand_ins)
            for name, exact in ((FAST, 1), (FAST_PRIMITIVE, 2))
        ]
        limits += [
            (f"1.8 times fast mode's FLOP, over {row.name}'s", 1.8 * sparse.flops, row.flops)
            for row in rows if not row.name.startswith("ours")
        ]  # fmt: skip
    return [f"{name}: {value:.2f} > {limit:.2f}" for name, value, limit in limits if value > limit]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=6144)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--activations", type=Path)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    parser.add_argument("--blocks", type=int, nargs="+", help="only f, for plans of so many tokens")
    args = parser.parse_args()
    if args.blocks:
        return shares(*states(args)[-1][1:], args.blocks)
    interpreter.install()
    triton_peers.interpret()
    tables, failed = [], []
    for what, x_TH, w_VH, y_T in states(args)[-1 if args.only else 0 :]:
        rows = measure(what, x_TH, w_VH, y_T, args.only)
        T, H, V = *x_TH.shape, len(w_VH)
        tables.append(f"T = {T}, H = {H}, V = {V}, {what}:\n\n{table(rows)}")
        failed += [] if args.only else failures(rows, T, H, V)
    text = HEADING.format(tables="\n\n".join(tables))
    print("\n" + text)
    if args.write:
        args.write.write_text(text)
    print("\n".join(f"FAIL {line}" for line in failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
