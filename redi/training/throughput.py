"""What a run costs as it goes: seconds by part, tokens/s, MFU, peak memory.

Nothing here waits for the device. On CUDA the parts are told apart by events, which are read once
the device has passed them (the loop waits for it once a step anyway); elsewhere by the clock.
"""

import contextlib
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from redi_kernels.anatomy import blocks_of, output_layer
from torch import nn

from redi.training.logging import PARTS

# Dense bf16 tensor FLOP/s by part of the device's name, from NVIDIA's and AMD's data sheets (as
# torchtitan has them); the first that matches. Consumer cards: at fp32 accumulation.
PEAK_FLOPS = {
    "B200": 2250e12, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12,
    "A100": 312e12, "A10G": 70e12, "A10": 125e12, "L40S": 362e12, "L40": 181e12, "L4": 121e12,
    "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12, "MI250": 181e12,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    return next((peak for name, peak in PEAK_FLOPS.items() if name in device_name), None)


def attention_width(model_config: Any) -> int:
    """Heads times their size; 0 for a family without attention."""
    config = model_config.get_text_config(decoder=True)
    heads = getattr(config, "num_attention_heads", None) or 0
    head_dim = getattr(config, "head_dim", None)
    return heads * head_dim if heads and head_dim else config.hidden_size if heads else 0


def model_flops(lm: Any, seqlens: list[int]) -> float:
    """FLOP of one forward and backward over whole traces: 6 for each weight of a matmul and token
    (of the experts, those a token is sent to), and causal attention (half of the square), less
    where a window hides keys. Recomputation does not count (that is what makes it MFU)."""
    config = lm.config.get_text_config(decoder=True)
    layers = blocks_of(lm)
    weights = sum(p.numel() for p in layers.parameters() if p.ndim >= 2)
    weights += output_layer(lm).weight.numel() - idle_weights(lm)
    width = attention_width(config)
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * len(layers)
    window = getattr(config, "sliding_window", None)
    seen = 0.0  # keys that all queries of all layers see
    for n in seqlens:
        hidden = max(0, n - window) if window else 0
        whole, windowed = n * n / 2, n * n / 2 - hidden * hidden / 2
        seen += sum(windowed if kind == "sliding_attention" else whole for kind in kinds)
    return 6.0 * weights * sum(seqlens) + 12.0 * width * seen


def idle_weights(lm: Any) -> int:
    """Weights of the experts that a token is not sent to.

    An expert is known by its place: the first dimension of a stacked weight is a number of experts
    in the config, or it is one of the modules of a list named `experts`. How many a token is sent
    to, its router says (`top_k`), or the config.
    """
    config = lm.config.get_text_config(decoder=True)
    counts = {v for k, v in vars(config).items() if "expert" in k and type(v) is int and v > 1}
    known = (getattr(module, "top_k", None) for module in lm.modules())
    chosen = next((k for k in known if type(k) is int), None)
    chosen = chosen or getattr(config, "num_experts_per_tok", None)
    if not chosen:
        return 0
    idle = 0.0
    for name, module in lm.named_modules():
        if isinstance(module, nn.ModuleList) and name.endswith("experts"):
            total = sum(p.numel() for p in module.parameters())
            idle += total * max(0, 1 - chosen / max(len(module), 1))
        stacked = [p for p in module.parameters(recurse=False) if p.ndim == 3]
        for p in stacked if not isinstance(module, nn.Conv1d) else []:
            if p.shape[0] in counts:
                idle += p.numel() * max(0, 1 - chosen / p.shape[0])
    return round(idle)


class Meter:
    """`start()` a step, `mark(part)` when that part ends; `row()` when it is logged."""

    def __init__(self, device: torch.device, world_size: int = 1):
        self.device, self.world_size = device, world_size
        self.cuda = device.type == "cuda"
        self.peak = peak_flops(torch.cuda.get_device_name(device)) if self.cuda else None
        self.seconds = dict.fromkeys(PARTS, 0.0)
        self.pending: deque[tuple[str, Any, Any]] = deque()
        self.steps = 0
        self.inside = ""
        self.last, self.started = self._now(), time.monotonic()

    def start(self) -> None:
        self.steps += 1
        self.last, self.started = self._now(), time.monotonic()

    def mark(self, part: str) -> None:
        """Counts the time since the last mark as `part`'s."""
        now, part = self._now(), self.inside or part
        if self.cuda:
            self.pending.append((part, self.last, now))
        else:
            self.seconds[part] += now - self.last
        self.last = now

    @contextlib.contextmanager
    def only(self, part: str) -> Iterator[None]:
        """Counts all that happens inside as `part`'s."""
        self.last, self.inside = self._now(), part
        try:
            yield
        finally:
            self.mark(part)
            self.inside = ""

    def speed(self, lm: nn.Module, seqlens: list[int]) -> dict[str, float]:
        """Of the step since `start`, once its result is here."""
        elapsed = time.monotonic() - self.started
        speed = {"num_tokens": sum(seqlens), "tokens_per_second": sum(seqlens) / elapsed}
        if self.peak is not None:
            speed["mfu"] = model_flops(lm, seqlens) / (elapsed * self.peak * self.world_size)
        return speed

    def row(self) -> dict[str, float]:
        """Seconds a step by part, averaged since the last call, and the peak memory of this rank:
        allocated on the GPU since the last call; elsewhere the process's largest so far."""
        while self.pending and self.pending[0][2].query():
            part, start, end = self.pending.popleft()
            self.seconds[part] += start.elapsed_time(end) / 1e3
        row = {f"time/{part}": s / max(self.steps, 1) for part, s in self.seconds.items() if s}
        row["memory/peak_gib"] = self._peak_bytes() / 2**30
        self.seconds, self.steps = dict.fromkeys(PARTS, 0.0), 0
        return row

    def _peak_bytes(self) -> int:
        if self.cuda:
            peak = torch.cuda.max_memory_allocated(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            return peak
        largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return largest if sys.platform == "darwin" else largest * 1024

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
