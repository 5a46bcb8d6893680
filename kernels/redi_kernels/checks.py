"""What a call of the losses may look like: its options after checks, and what is refused, by name.

Whatever needs a tensor's values is checked without waiting for a GPU.
"""

import importlib.util
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
BACKENDS = ("reference", "cpu", "triton")


@dataclass(frozen=True)
class Options:
    """The static options of one call, after checks."""

    softcap: float | None
    logit_scale: float
    ignore_index: int
    num_valid: int | None
    tolerance: float
    backend: str
    dtype: torch.dtype

    def cast(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.to(self.dtype) for t in tensors)

    def args(self) -> tuple[Any, ...]:
        """As _HEAD has them, after the bias."""
        head = self.softcap, self.logit_scale, self.ignore_index, self.num_valid
        return *head, self.tolerance, self.backend


def check(
    x_TH: Tensor,
    w_VH: Tensor,
    y_T: Tensor,
    bias: Tensor | None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    num_valid: int | None = None,
    tolerance: float = 0.0,
    backend: str | None = None,
) -> Options:
    tensors = {"x_TH": x_TH, "w_VH": w_VH, "y_T": y_T, "bias": bias}
    for name, t in tensors.items():
        if t is not None and hasattr(t, "device_mesh"):
            raise TypeError(
                f"{name} is a DTensor: the loss needs whole, local tensors. Call it inside the "
                "module that owns the weight (LossHead under fully_shard), or pass full_tensor()."
            )
        if t is not None and t.device != x_TH.device:
            raise ValueError(f"{name} is on {t.device}, x_TH on {x_TH.device}")
    if x_TH.dim() != 2:
        raise ValueError(f"x_TH must be [T, H], not {list(x_TH.shape)}; flatten the batch first")
    if w_VH.dim() != 2 or w_VH.shape[1] != x_TH.shape[1] or len(w_VH) == 0:
        raise ValueError(
            f"w_VH must be [V, {x_TH.shape[1]}], not {list(w_VH.shape)}. Under FSDP or ZeRO-3 that "
            "is a shard: call the loss inside the module that owns the weight (LossHead)."
        )
    if y_T.shape != x_TH.shape[:1] or y_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"y_T must be int64 or int32 [{len(x_TH)}], not {y_T.dtype} {list(y_T.shape)}"
        )
    if bias is not None and bias.shape != w_VH.shape[:1]:
        raise ValueError(f"bias must be [{len(w_VH)}], not {list(bias.shape)}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
    if num_valid is not None and not 0 <= num_valid <= len(y_T):
        raise ValueError(f"num_valid must be in [0, {len(y_T)}], not {num_valid}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, not {backend!r}")
    backend = backend or ("triton" if _has_kernels(x_TH) else "cpu")
    dtype = _compute_dtype(x_TH, w_VH)
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance must be 0 (exact) or above, not {tolerance}")
    if tolerance and (backend == "reference" or dtype == torch.float16):
        raise ValueError(
            f'tolerance={tolerance}: fast mode is for the backends "cpu" and "triton", and not for '
            f"fp16, whose range ends above the probabilities it weighs (this call: {backend}, "
            f"{dtype}); use tolerance=0"
        )
    return Options(
        None if softcap is None else float(softcap),
        float(logit_scale),
        ignore_index,
        num_valid,
        float(tolerance),
        backend,
        dtype,
    )


def check_cu_seqlens(cu_seqlens: Tensor, T: int, device: torch.device) -> None:
    if cu_seqlens.dim() != 1 or len(cu_seqlens) == 0 or cu_seqlens.is_floating_point():
        raise ValueError(
            f"cu_seqlens must be integers [S + 1], not {cu_seqlens.dtype} {list(cu_seqlens.shape)}"
        )
    if cu_seqlens.device != device:
        raise ValueError(f"cu_seqlens is on {cu_seqlens.device}, the tokens on {device}")
    if not has_values(cu_seqlens):
        return
    ends = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == T) & (cu_seqlens.diff() >= 0).all()
    require(ends, f"cu_seqlens must start at 0, never decrease and end at T = {T}")


def _compute_dtype(x_TH: Tensor, w_VH: Tensor) -> torch.dtype:
    device = x_TH.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x_TH.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    if x_TH.dtype != w_VH.dtype or x_TH.dtype not in FLOATS:
        raise TypeError(
            f"x_TH is {x_TH.dtype}, w_VH {w_VH.dtype}: both must be one of fp16, bf16, fp32, fp64; "
            "cast one of them, or call this under torch.autocast"
        )
    return x_TH.dtype


def _has_kernels(x_TH: Tensor) -> bool:
    if not x_TH.is_cuda or x_TH.dtype == torch.float64:
        return False
    if not torch.version.hip and torch.cuda.get_device_capability(x_TH.device) < (8, 0):
        return False  # too little shared memory for the tiles, and no bf16
    return importlib.util.find_spec("triton") is not None


def has_values(t: Tensor) -> bool:
    """False while tracing and for tensors that are only a shape."""
    return not (torch.compiler.is_compiling() or t.is_meta or isinstance(t, FakeTensor))


def require(condition: Tensor, message: str) -> None:
    """ValueError on CPU; elsewhere a device-side assertion, which does not wait for the device."""
    if condition.device.type == "cpu":
        if has_values(condition) and not condition:
            raise ValueError(message)
    else:
        torch._assert_async(condition, message)
