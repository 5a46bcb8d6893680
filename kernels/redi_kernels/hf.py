"""A transformers causal LM without its logits: one line, and one line takes it back.

    from redi_kernels.hf import patch
    patch(model)
    model(input_ids=ids, labels=labels).loss.backward()

The patched forward looks at what it is given:

    labels or shift_labels    the loss, through `sft_loss`; `num_items_in_batch` divides it
    loss_fn                   whatever loss_fn(hidden_states, head) returns: any loss of this
                              package, or the hidden states themselves
    neither                   the model's own forward, so `generate` works as before

`head` is called like `LossHead`: head(redi_loss, x_TH, y_T, cu_seqlens, is_chosen_S). All of it
happens inside the model's forward, where the hooks of DDP and FSDP fire.
"""

import functools
import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redi_kernels.logprobs import token_logprobs
from redi_kernels.losses import sft_loss


def patch(model: Any, *, check: bool = True) -> Any:
    """Gives `model` the forward above, in place, and returns it. A peft model's base is patched.

    Any model with `.model` and a plain linear `.lm_head` whose logits are that head's, times
    a scale, plus a bias, soft-capped as its config says. `check` compares eight log-probs with the
    model's own and refuses a family that does something else; it costs one tiny forward and is
    left out where weights are sharded or not there yet.

    Raises TypeError for a head that is no plain linear layer (LoRA on it, or quantized), ValueError
    when the check fails or a mixture of experts wants its balancing loss.
    """
    lm = _base(model)
    if "_own_forward" in vars(lm):
        return model
    _weights(lm)
    if check:
        _check(lm)
    own = lm.forward
    names = list(inspect.signature(own).parameters)

    @functools.wraps(type(lm).forward)  # `generate` and Trainer read the signature
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            kwargs.update(zip(names, args, strict=False))
        wanted = ("labels", "shift_labels", "loss_fn")
        if all(kwargs.get(name) is None for name in wanted):
            kwargs.pop("loss_fn", None)
            return self._own_forward(**kwargs)
        return _forward(self, **kwargs)

    lm._own_forward, lm._patched_forward = own, forward
    lm.forward = MethodType(forward, lm)
    return model


def unpatch(model: Any) -> Any:
    """Restores the forward that `patch` found. Raises RuntimeError if something else wrapped it."""
    lm = _base(model)
    if "_own_forward" not in vars(lm):
        return model
    if getattr(lm.forward, "__func__", None) is not lm._patched_forward:
        raise RuntimeError(
            "forward was wrapped again after patch() (by accelerate or TRL): undo that first, e.g. "
            "accelerator.unwrap_model(model, keep_fp32_wrapper=False)"
        )
    if getattr(lm._own_forward, "__func__", None) is type(lm).forward:
        del lm.forward  # the class has it
    else:
        lm.forward = lm._own_forward
    del lm._own_forward, lm._patched_forward
    return model


def logit_options(config: Any) -> dict[str, Any]:
    """How a family shapes its logits, as `softcap` and `logit_scale` of this package's functions.

    Known: `final_logit_softcapping` (Gemma), `logit_scale` (Cohere), `lm_head_multiplier` (Falcon
    H1), `logits_scaling` (Granite divides by it, HyperCLOVA X multiplies).
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= 1.0 if getattr(config, name, None) is None else getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
    return {"softcap": getattr(config, "final_logit_softcapping", None), "logit_scale": scale}


def _forward(
    self: Any,
    *,
    labels: Any = None,
    shift_labels: Tensor | None = None,
    loss_fn: Callable[..., Any] | None = None,
    num_items_in_batch: int | Tensor | None = None,
    ignore_index: int = -100,
    return_dict: bool | None = None,
    logits_to_keep: Any = 0,  # there are no logits to keep
    **kwargs: Any,
) -> Any:
    if kwargs.get("output_router_logits", getattr(self.config, "output_router_logits", False)):
        raise ValueError(
            "output_router_logits: the experts' balancing loss is not part of the patched forward; "
            "set it to False, or unpatch(model)"
        )
    # A cache is of no use in training, and with one, packed sequences see each other.
    kwargs["use_cache"] = bool(kwargs.get("use_cache"))
    out = self.model(return_dict=True, **kwargs)
    x_BTH = out.last_hidden_state
    head = _head(self)
    if loss_fn is not None:
        return loss_fn(x_BTH, head)
    if shift_labels is None:
        shift_labels = F.pad(labels[..., 1:], (0, 1), value=ignore_index)
    y_T = shift_labels.reshape(-1).to(x_BTH.device)
    options = {"num_tokens": num_items_in_batch, "ignore_index": ignore_index}
    loss = head(sft_loss, x_BTH.flatten(0, -2), y_T, **options).loss
    if return_dict is False or (return_dict is None and not self.config.return_dict):
        return (loss,)
    from transformers.modeling_outputs import CausalLMOutputWithPast

    states = {name: out.get(name) for name in ("past_key_values", "hidden_states", "attentions")}
    return CausalLMOutputWithPast(loss=loss, **states)


def _head(lm: Any) -> Callable[..., Any]:
    weight, bias = _weights(lm)
    options = {"bias": bias, **logit_options(lm.config)}
    return lambda function, x_TH, *args, **kw: function(x_TH, weight, *args, **options, **kw)


def _base(model: Any) -> Any:
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (hasattr(lm, "model") and hasattr(lm, "lm_head")):
        raise TypeError(f"{type(lm).__name__}: need a causal LM with .model and .lm_head")
    return lm


def _weights(lm: Any) -> tuple[Tensor, Tensor | None]:
    """The head's weight and bias, looked up at each call: peft and FSDP replace modules."""
    head = lm.lm_head
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the whole head
        active = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[active[0]] if active else head.original_module
    if type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"lm_head is a {type(head).__module__}.{type(head).__name__}: its weight alone does "
            "not make the logits. If that is LoRA, take lm_head off target_modules (or train all "
            "of it: modules_to_save=['lm_head']), or merge it: model.merge_and_unload()"
        )
    return head.weight, head.bias


@torch.no_grad()
def _check(lm: Any) -> None:
    """ValueError unless the log-probs from the last hidden states are those of the own logits."""
    weight, _ = _weights(lm)
    if weight.is_meta or weight.numel() == 0 or hasattr(weight, "device_mesh"):
        return
    ids = torch.arange(min(8, len(weight)), device=weight.device)
    seen: list[Any] = []
    modes = [(module, module.training) for module in lm.modules()]
    hook = lm.model.register_forward_hook(lambda module, args, out: seen.append(out))
    try:
        lm.eval()
        logits = lm(input_ids=ids[None], use_cache=False, return_dict=True).logits[0].float()
    finally:
        hook.remove()
        for module, training in modes:
            module.training = training
    x_TH = seen[0].last_hidden_state[0]
    logp = _head(lm)(token_logprobs, x_TH, ids).logp_T
    error = (logp - logits.log_softmax(-1).gather(1, ids[:, None])[:, 0]).abs().max()
    if error > 0.02 * (logits.max() - logits.min()):  # bf16 logits are within 0.4 %
        raise ValueError(
            f"{type(lm).__name__} makes its logits in a way that its config does not tell: "
            f"log-probs are off by {error:.3g}. Please report it; do not use patch() on it"
        )
