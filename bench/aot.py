"""Compile every shipped Triton kernel for GPUs that are not here, and hold the result to account.

    python bench/aot.py --write docs/aot.md    all of them; exit 1 if a gate fails
    python bench/aot.py --arch 90              one architecture

Gates, for sm_80 and sm_90: no register spills (LDL/STL), shared memory within what a block may
have, tensor-core instructions inside a loop of every matmul, and the clamps of a result and of a
masked logit in the form that keeps a NaN. sm_100 and gfx942 are compiled and
reported. No GPU is needed: the library's own functions run on small CPU tensors, with Triton's
driver replaced by one that names the target and never launches, so what is compiled is what would
be launched there, specialisations included.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton
from redi_kernels import triton as kernels
from redi_kernels.head import Head
from redi_kernels.triton import config as configs
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

TARGETS = {
    "80": GPUTarget("cuda", 80, 32),
    "90": GPUTarget("cuda", 90, 32),
    "100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
GATED = ("80", "90")
SHARED_LIMIT = {"80": 166912, "90": 232448, "100": 232448, "gfx942": 65536}  # bytes per block
TENSOR = ("HMMA", "HGMMA", "UTCHMMA")
COUNTED = (*TENSOR, "LDGSTS", "UTMALDG", "LDSM", "STSM", "MUFU", "FFMA", "BAR", "LDL", "STL")
BINARIES = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
HEADING = """<!-- made by bench/aot.py -->
# What the Triton kernels compile to

`make aot` with triton {}. On sm_80 and sm_90 spills must be 0, shared memory within a block's limit
(163 and 227 KiB), and every bf16 matmul must have tensor-core instructions in a loop ("in a loop").
The others are for information. A change of these numbers is a change of the kernels.
"""
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Compiled:
    """One kernel as it would run on one target."""

    arch: str
    dtype: str
    kernel: str
    variant: str
    tile: str
    warps: int
    stages: int
    registers: int = 0
    spills: int = 0
    shared: int = 0
    in_loop: int = 0  # tensor-core instructions inside a loop
    instructions: int = 0
    keeps_nan: bool = True
    counts: dict[str, int] = field(default_factory=dict)

    def problems(self) -> list[str]:
        """What a gate would refuse."""
        is_matmul = self.kernel in ("logits_kernel", "matmul_kernel")
        found = []
        if self.spills:
            found.append(f"{self.spills} spills")
        if self.shared > SHARED_LIMIT[self.arch]:
            found.append(f"{self.shared} bytes of shared memory")
        if is_matmul and self.dtype == "bf16" and not self.in_loop:
            found.append("no tensor-core instruction in a loop")
        if not self.keeps_nan:
            found.append("a clamp that turns NaN into a number")
        return found


class Driver:
    """Enough of a driver to compile for `target`; there is nothing to launch on."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of Triton's cache of compiled kernels

    def get_current_stream(self, device: object = None) -> int:
        return 0


def compile_shipped(arch: str) -> list[Compiled]:
    """Every kernel that the four backend functions launch, over dtypes and head options."""
    target = TARGETS[arch]
    found: dict[tuple, Compiled] = {}
    run = JITFunction.run
    dtype = torch.bfloat16

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        row = describe(arch, dtype, self, kernel, kwargs)
        found.setdefault((row.dtype, row.kernel, row.variant, row.tile), (row, kernel))
        return kernel

    triton.runtime.driver.set_active(Driver(target))
    JITFunction.run = compile_only
    select = configs.select
    configs.select = lambda _, dtype: configs.for_target(target.backend, _number(arch), dtype)
    try:
        for dtype in DTYPES.values() if arch in GATED else [torch.bfloat16]:
            launch_everything(dtype, every_option=arch in GATED and dtype == torch.bfloat16)
    finally:
        JITFunction.run, configs.select = run, select
    for row, kernel in found.values():
        inspect(row, kernel)
    return [row for row, _ in found.values()]


def launch_everything(dtype: torch.dtype, every_option: bool) -> None:
    """Sizes divisible by 16 as real ones are, for several chunks and slices; every tile."""
    T, V = 8192, 49152
    y_T, v_T, bias_V = torch.zeros(T, dtype=torch.long), torch.zeros(T), torch.zeros(V, dtype=dtype)
    plain, full = Head(), Head(bias_V, 30.0, 0.5)
    cases = (
        [(256, plain), (128, plain), (64, plain), (64, full)] if every_option else [(256, plain)]
    )
    for H, head in cases:
        x_TH, w_VH = torch.zeros(T, H, dtype=dtype), torch.zeros(V, H, dtype=dtype)
        needs = (True, True, head.bias_V is not None)
        logp_T, lse_T, *_ = kernels.forward(x_TH, w_VH, y_T, head)
        kernels.backward(x_TH, w_VH, y_T, logp_T, lse_T, v_T, v_T, head, needs)
        kernels.weighted(x_TH, w_VH, y_T, v_T, head, needs)
        kernels.gradients(x_TH, w_VH, y_T, v_T, v_T, head, needs, 2.0)


def describe(arch, dtype, function, kernel, kwargs) -> Compiled:
    """Names of the flags that are on, and the tile."""
    hidden = {"FLATTEN", "EVEN_H", "EVEN_N"}
    on = [name.lower() for name, v in kwargs.items() if v is True and name not in hidden]
    tile = "x".join(str(v) for name, v in kwargs.items() if name.startswith("BLOCK_"))
    dtype = next(name for name, d in DTYPES.items() if d == dtype)
    meta = kernel.metadata
    return Compiled(
        arch, dtype, function.__name__, " ".join(on), tile, meta.num_warps, meta.num_stages,
        shared=meta.shared,
    )  # fmt: skip


def inspect(row: Compiled, kernel) -> None:
    """Registers, spills and instruction counts from the binary; clamps from the PTX."""
    if "cubin" not in kernel.asm:
        _inspect_amd(row, kernel.asm["amdgcn"])
        return
    if row.kernel == "reduce_kernel" or "has_bias" in row.variant.split():
        row.keeps_nan = re.search(r"m(in|ax)\.NaN\.f32", kernel.asm["ptx"]) is not None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    row.registers = int(re.search(r"Function (?!\.)\S*:\s*REG:(\d+)", usage)[1])
    instructions, loops = _parse(listing)
    counts = Counter(instructions)
    row.instructions = len(instructions)
    row.counts = {name: counts[name] for name in COUNTED if counts[name]}
    row.spills = counts["LDL"] + counts["STL"]
    row.in_loop = max((sum(op in TENSOR for op in instructions[a:b]) for a, b in loops), default=0)


def _parse(listing: str) -> tuple[list[str], list[tuple[int, int]]]:
    """Opcodes in order, and the spans of backward branches."""
    label = re.compile(r"^(\.L_x_\d+):")
    code = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_]*)(.*)")
    opcodes: list[str] = []
    labels: dict[str, int] = {}
    loops = []
    for line in listing.splitlines():
        if found := label.match(line):
            labels[found[1]] = len(opcodes)
        elif found := code.match(line):
            opcodes.append(found[1])
            to = re.search(r"\((\.L_x_\d+)\)", found[2])
            if found[1] == "BRA" and to and to[1] in labels:
                loops.append((labels[to[1]], len(opcodes)))
    return opcodes, loops


def _inspect_amd(row: Compiled, assembly: str) -> None:
    number = lambda name: int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])
    row.registers, row.spills = number("vgpr_count"), number("vgpr_spill_count")
    row.in_loop = len(re.findall(r"v_mfma", assembly))
    row.instructions = len(re.findall(r"^\s+[vs]_", assembly, re.MULTILINE))
    row.counts = {"v_mfma": row.in_loop, "AGPR": number("agpr_count")}


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([str(BINARIES / name), *args], capture_output=True, text=True)
    return done.stdout + done.stderr


def _number(arch: str) -> int:
    return int(arch) if arch.isdigit() else 0


def table(rows: list[Compiled]) -> str:
    """Markdown, one line per kernel."""
    lines = [
        "| target | dtype | kernel | variant | tile | warps, stages | registers | spills | shared "
        "| in a loop | counts |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        counts = ", ".join(f"{k} {v}" for k, v in r.counts.items() if k not in ("LDL", "STL"))
        name = f"sm_{r.arch}" if r.arch.isdigit() else r.arch
        lines.append(
            f"| {name} | {r.dtype} | {r.kernel.removesuffix('_kernel')} | {r.variant} | {r.tile} "
            f"| {r.warps}, {r.stages} | {r.registers} | {r.spills} | {r.shared} | {r.in_loop} "
            f"| {counts} |"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=TARGETS)
    parser.add_argument("--write", type=Path, help="also write the table to this Markdown file")
    args = parser.parse_args()
    rows = [
        row for arch in ([args.arch] if args.arch else TARGETS) for row in compile_shipped(arch)
    ]
    text = table(rows)
    print(text)
    if args.write:
        args.write.write_text(f"{HEADING.format(triton.__version__)}\n{text}\n")
    failed = [(row, p) for row in rows if row.arch in GATED for p in row.problems()]
    for row, problem in failed:
        print(f"FAIL sm_{row.arch} {row.dtype} {row.kernel} [{row.variant}]: {problem}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
