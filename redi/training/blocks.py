"""How a transformer's blocks compute: Liger's kernels, torch.compile, activation checkpointing.

None of them changes a result beyond rounding; checkpointing does not change a bit.
"""

import functools
import importlib.util
from typing import Any

import torch
from redi_kernels.anatomy import blocks_of
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from redi.config import TrainConfig
from redi.errors import RediError


def prepare(lm: Any, config: TrainConfig, device: torch.device) -> None:
    """Applies the recipe's choices to `lm` in place, before it is sharded."""
    if config.use_liger_kernel is not False:
        use_liger(lm, device, required=config.use_liger_kernel is True)
    if config.gradient_checkpointing != "none":
        checkpoint_activations(lm, config.gradient_checkpointing, config.kept_blocks)
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
        from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

        if required and lm.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
            raise RediError(f"use_liger_kernel: Liger does not know {lm.config.model_type}")
        # which of the others it has for a family is Liger's to say
        _apply_liger_kernel_to_instance(lm, cross_entropy=False, fused_linear_cross_entropy=False)


def checkpoint_activations(lm: Any, how: str, kept_blocks: int) -> None:
    """Keeps each block's input and computes the block again in the backward.

    `full`: that input only. `offload`: it is kept in (on CUDA: pinned) host memory. `selective`:
    attention's output too, so that attention, as costly as the weights at 30,000 tokens, is not
    computed again; nor are the last `kept_blocks`: one, whose backward follows at once, costs
    little, more of them trade memory for time.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if how == "selective":
        keep_attention = functools.partial(create_selective_checkpoint_contexts, _keep_attention)
        options["context_fn"] = keep_attention
    try:
        if hasattr(lm, "activation_checkpointing_enable"):  # the name from transformers 5.2x on
            lm.activation_checkpointing_enable(options)
        else:
            lm.gradient_checkpointing_enable(options)
    except ValueError as error:  # jetmoe
        raise RediError(f"gradient_checkpointing: {how}: {error} Set it to none") from None
    if how == "selective":
        layers: Any = blocks_of(lm)
        for layer in layers[max(len(layers) - kept_blocks, 0) :]:
            layer.gradient_checkpointing = False
    for module in lm.modules() if how == "offload" else ():
        if getattr(module, "gradient_checkpointing", False):
            module._gradient_checkpointing_func = _offloaded(module._gradient_checkpointing_func)


def _keep_attention(_: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Any fused kernel's: SDPA's on CPU and CUDA, flash-attn's. (Softcapped or windowed attention
    without flash-attn has none, and is computed again.)"""
    is_attention = any(name in operator.name() for name in ("scaled_dot_product", "flash_attn"))
    return CheckpointPolicy.MUST_SAVE if is_attention else CheckpointPolicy.PREFER_RECOMPUTE


def _offloaded(checkpoint: Any) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        with saved_tensors_hooks(_to_host, _from_host):
            return checkpoint(*args, **kwargs)

    return run


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
    for block in blocks_of(lm):
        for name, module in block.named_children():
            if "attn" not in name and "attention" not in name:
                module.compile(dynamic=True)
