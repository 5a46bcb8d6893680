"""Peak memory at full scale without a GPU: fake tensors, launches that do nothing.

    python bench/memory.py                print the table
    python bench/memory.py --write FILE   and write it as Markdown

Counts every tensor made between the inputs and the two gradients, in bf16, forward and backward of
a mean cross entropy; gradients are what any method must return, so the table shows what comes on
top. "one fp32 accumulator" is the largest single one: dW's (4 V H bytes) in the fused path, dX's
(4 T H) in the primitive. Without allocator rounding and cuBLAS workspaces.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from redi_kernels import triton as kernels
from redi_kernels.head import Head
from redi_kernels.triton import config as configs
from redi_kernels.triton import launch
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.runtime.autotuner import Autotuner, Heuristics
from triton.runtime.jit import JITFunction

sys.path.insert(0, str(Path(__file__).resolve().parent))
import triton_peers
from triton_cost import TorchCost

MODELS = {  # hidden, vocabulary
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3-8B": (4096, 128256),
    "Gemma-2-2B": (2304, 256000),
}
HEADING = """<!-- made by bench/memory.py -->
# Memory at full size

`make memory`: every tensor between the inputs and the two gradients, forward and backward of a mean
cross entropy in bf16, counted on fake tensors. The fused path's figure does not grow with T. The
primitive's grows by 4 H bytes of fp32 dX per token and, beyond 43k tokens, by 8 KiB of slab too.
"""
TOKENS = (8192, 32768, 131072)
LIMIT = 0.4e9  # beyond gradients and one fp32 accumulator, at T = 32768, Qwen2.5-1.5B


def fused(x, w, y) -> int:
    """Bytes of the one fp32 accumulator."""
    kernels.weighted(x, w, y, torch.empty(len(x)), Head(), (True, True, False))
    return 4 * w.numel()


def fast(x, w, y) -> int:
    v = torch.empty(len(x))
    kernels.gradients(x, w, y, v, v, Head(), (True, True, False), 2.0)
    return 4 * w.numel()


def primitive(x, w, y) -> int:
    logp, lse, *_ = kernels.forward(x, w, y, Head())
    v = torch.empty(len(x))
    kernels.backward(x, w, y, logp, lse, v, v, Head(), (True, True, False))
    return 4 * x.numel()


def autograd(loss) -> Callable[..., int]:
    def run(x, w, y) -> int:
        loss(x.requires_grad_(), w.requires_grad_(), y).backward()
        return 0

    return run


def eager(x, w, y):
    return torch.nn.functional.cross_entropy((x @ w.T).float(), y)


def peak(run: Callable[..., int], T: int, H: int, V: int) -> tuple[int, int]:
    """(bytes beyond the two gradients, bytes of the one fp32 accumulator)."""
    with FakeTensorMode():
        x = torch.empty(T, H, dtype=torch.bfloat16)
        w = torch.empty(V, H, dtype=torch.bfloat16)
        y = torch.empty(T, dtype=torch.int64)
        with TorchCost() as cost:
            accumulator = run(x, w, y)
    return cost.peak - 2 * (T * H + V * H), accumulator


def pretend() -> None:
    """Launches do nothing, descriptors are not made, sm_90's configuration is chosen."""
    for launcher in (JITFunction, Autotuner, Heuristics):
        launcher.run = lambda self, *args, **kwargs: None
    launch.operand = lambda matrix, block, tma: matrix
    launch.can_use_tma = lambda *matrices: True
    configs.select = lambda device, dtype: configs.SM90
    torch.Tensor.item = lambda self: self.numel()
    torch.equal = lambda a, b: True


def peers() -> dict[str, Callable[..., int]]:
    found = {}
    for name, loss in triton_peers.available().items():
        if name != "CCE, no filter":
            found[name] = autograd(loss)
    if "CCE" in found:
        from cut_cross_entropy import cce as module

        module._build_flat_valids = lambda *args: None
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--write", type=Path)
    args = parser.parse_args()
    pretend()
    methods = {"ours, fused": fused, "ours, fused, tolerance": fast, "ours, primitive": primitive}
    methods |= peers()
    methods["eager"] = autograd(eager)
    lines = [
        "GB beyond the two gradients; in brackets, beyond one fp32 accumulator too.\n",
        "| model | method | " + " | ".join(f"T = {T // 1024}k" for T in TOKENS) + " |",
        "|---|---|" + "---|" * len(TOKENS),
    ]
    failed = []
    for model, (H, V) in MODELS.items():
        for name, run in methods.items():
            cells = []
            for T in TOKENS:
                try:
                    extra, accumulator = peak(run, T, H, V)
                except Exception as error:  # a peer that cannot run on fake tensors says so
                    cells.append(type(error).__name__)
                    continue
                bracket = f" ({(extra - accumulator) / 1e9:.2f})" if accumulator else ""
                cells.append(f"{extra / 1e9:.2f}{bracket}")
                at_limit = model == "Qwen2.5-1.5B" and T == 32768 and accumulator
                if at_limit and extra - accumulator > LIMIT:
                    failed.append(f"{name}: {(extra - accumulator) / 1e9:.2f} GB")
            lines.append(f"| {model} | {name} | " + " | ".join(cells) + " |")
    text = "\n".join(lines)
    print(f"triton {triton.__version__}, torch {torch.__version__}\n{text}")
    if args.write:
        args.write.write_text(f"{HEADING}\n{text}\n")
    print("\n".join(f"FAIL {line}" for line in failed))
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
