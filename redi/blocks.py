"""How a transformer's blocks compute: Liger's kernels, torch.compile, activation checkpointing.

None of them changes a result beyond rounding; checkpointing does not change a bit.
"""

import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from redi.config import TrainConfig
from redi.errors import RediError


def prepare(lm: Any, config: TrainConfig, device: torch.device) -> None:
    """Applies the recipe's choices to `lm` in place, before it is sharded."""
    if config.use_liger_kernel is not False:
        use_liger(lm, device, required=config.use_liger_kernel is True)
    if config.gradient_checkpointing != "none":
        checkpoint_activations(lm, offload=config.gradient_checkpointing == "offload")
    if config.torch_compile:
        compile_blocks(lm)


def use_liger(lm: Any, device: torch.device, *, required: bool = False) -> None:
    """RMSNorm, RoPE and SwiGLU (or GeGLU) by Liger's Triton kernels, on CUDA, where it is installed
    and knows the family. Never its loss.

    Raises RediError when `required` and it cannot be used.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        if required:
            raise RediError("use_liger_kernel: needs pip install liger-kernel")
        return
    if device.type != "cuda" and required:
        raise RediError(f"use_liger_kernel: Liger's kernels need a GPU, this is {device.type}")
    if device.type == "cuda":
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(
            lm, cross_entropy=False, fused_linear_cross_entropy=False, rope=True, rms_norm=True
        )


def checkpoint_activations(lm: Any, *, offload: bool = False) -> None:
    """Keeps each block's input only and computes the block again in the backward; `offload` keeps
    that input in (on CUDA: pinned) host memory."""
    options = {"use_reentrant": False}
    if hasattr(lm, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
        lm.activation_checkpointing_enable(options)
    else:
        lm.gradient_checkpointing_enable(options)
    if not offload:
        return

    def offloaded(checkpoint: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            with saved_tensors_hooks(_to_host, _from_host):
                return checkpoint(*args, **kwargs)

        return run

    for module in lm.modules():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = offloaded(module._gradient_checkpointing_func)


def _to_host(tensor: Tensor) -> tuple[torch.device, Tensor]:
    """As `save_on_cpu`, but the host does not wait: both copies and the computation between them
    are in the order of one stream."""
    host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
    return tensor.device, host.copy_(tensor, non_blocking=True)


def _from_host(saved: tuple[torch.device, Tensor]) -> Tensor:
    device, host = saved
    return host.to(device, non_blocking=True)


def compile_blocks(lm: Any) -> None:
    """torch.compile for what stands around attention in each block: norms and MLP, once for all
    blocks and any number of tokens. Attention stays out, since the boundaries of the traces are
    Python numbers: it would be compiled again for each pack."""
    for block in lm.model.layers:
        for name, module in block.named_children():
            if "attn" not in name:
                module.compile(dynamic=True)
