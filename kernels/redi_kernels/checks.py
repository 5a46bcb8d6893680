"""What a call of the losses may look like: its options after checks, and what is refused, by name.

Whatever needs a tensor's values is checked without waiting for a GPU.
"""

import importlib.util
import math
import numbers
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


def number(name: str, value: Any) -> float:
    """`value` as a float: a finite number of the host's. A tensor's value would be waited for, and
    gets no gradient here: TypeError, as for all else that is no number."""
    if isinstance(value, Tensor):
        learnable = " that requires grad, and would get none here" if value.requires_grad else ""
        raise TypeError(
            f"{name} is a tensor{learnable}: it must be a number. Give float({name}), or, to learn "
            "a scale, multiply x_TH by it"
        )
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    found = float(value)
    if not -math.inf < found < math.inf:  # math.isfinite would break a compiled graph
        raise ValueError(f"{name} must be finite, not {value}")
    return found


def integer(name: str, value: Any) -> Any:
    """`value` as it is: int() would make a graph of its own of each."""
    if isinstance(value, bool | Tensor) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, not {value!r}")
    return value


def check_softcap(softcap: Any) -> float | None:
    if softcap is not None and not number("softcap", softcap) > 0:
        raise ValueError(f"softcap must be above 0, not {softcap}")
    return None if softcap is None else float(softcap)


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
    softcap, logit_scale = check_softcap(softcap), number("logit_scale", logit_scale)
    tolerance, ignore_index = number("tolerance", tolerance), integer("ignore_index", ignore_index)
    if x_TH.dim() != 2:
        raise ValueError(f"x_TH must be [T, H], not {list(x_TH.shape)}; flatten the batch first")
    if w_VH.dim() != 2 or w_VH.shape[1] != x_TH.shape[1] or w_VH.shape[0] == 0:
        raise ValueError(
            f"w_VH must be [V, {x_TH.shape[1]}], not {list(w_VH.shape)}. Under FSDP or ZeRO-3 that "
            "is a shard: call the loss inside the module that owns the weight (LossHead)."
        )
    if y_T.shape != x_TH.shape[:1] or y_T.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"y_T must be int64 or int32 [{x_TH.shape[0]}], not {y_T.dtype} {list(y_T.shape)}"
        )
    if bias is not None and bias.shape != w_VH.shape[:1]:
        raise ValueError(f"bias must be [{w_VH.shape[0]}], not {list(bias.shape)}")
    if num_valid is not None and not 0 <= integer("num_valid", num_valid) <= y_T.shape[0]:
        raise ValueError(f"num_valid must be in [0, {y_T.shape[0]}], not {num_valid}")
    if backend is not None and backend not in BACKENDS:
        raise ValueError(f"backend must be None or one of {BACKENDS}, not {backend!r}")
    backend = backend or ("triton" if _has_kernels(x_TH) else "cpu")
    dtype = _compute_dtype(x_TH, w_VH)
    if tolerance < 0:
        raise ValueError(f"tolerance must be 0 (exact) or above, not {tolerance}")
    if tolerance and (backend == "reference" or dtype == torch.float16):
        raise ValueError(
            f'tolerance={tolerance}: fast mode is for the backends "cpu" and "triton", and not for '
            f"fp16, whose range ends above the probabilities it weighs (this call: {backend}, "
            f"{dtype}); use tolerance=0"
        )
    return Options(softcap, logit_scale, ignore_index, num_valid, tolerance, backend, dtype)


def check_cu_seqlens(cu_seqlens: Tensor, T: int, device: torch.device) -> None:
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0 or cu_seqlens.is_floating_point():
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
