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
from dataclasses import fields
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from redi_kernels import anatomy, modelcheck
from redi_kernels.losses import sft_loss

BALANCING = (
    "output_router_logits: the experts' balancing loss is not part of the patched forward; "
    "set it to False (in the text config too), or unpatch(model)"
)


def patch(model: Any, *, check: bool = True) -> Any:
    """Gives `model` the forward above, in place, and returns it. A peft model's base is patched.

    Any causal LM with a base model and a plain linear head on it whose logits are that head's,
    times a scale, plus a bias, soft-capped as its config says. `check` compares loss and logits
    with the model's own and refuses a family that does something else, and finds out whether its
    traces leave each other alone in a pack; where they do not, `position_ids` that restart are
    refused when they come. It costs a few tiny forwards and is left out where weights are sharded
    or not there yet.

    Raises TypeError for a head that is no plain linear layer (LoRA on it, or quantized) or has
    hooks, ValueError when the check fails or a mixture of experts wants its balancing loss.
    """
    lm = _base(model)
    if "_own_forward" in vars(lm):
        return model
    _weights(lm)
    if modelcheck.wants_balancing_loss(lm.config):
        raise ValueError(BALANCING)
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
    vars(lm).pop("_mixes_packs", None)
    return model


def logit_options(config: Any) -> dict[str, Any]:
    """How a family shapes its logits, as `softcap` and `logit_scale` of this package's functions.

    Known: `final_logit_softcapping` (Gemma; `logits_soft_cap` in RecurrentGemma), `logit_scale`
    (Cohere), `lm_head_multiplier` (Falcon H1), `logits_scaling` (Granite divides by it, HyperCLOVA
    X multiplies). What a config calls otherwise, `modelcheck.check_head` finds.
    """
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    scale = 1.0
    for name in ("logit_scale", "lm_head_multiplier"):
        scale *= 1.0 if getattr(config, name, None) is None else getattr(config, name)
    divisor = getattr(config, "logits_scaling", None)
    if divisor is not None:
        scale *= divisor if config.model_type == "hyperclovax" else 1 / divisor
    caps = (getattr(config, n, None) for n in ("final_logit_softcapping", "logits_soft_cap"))
    return {"softcap": next(filter(None, caps), None), "logit_scale": scale}


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
    asked = kwargs.get("output_router_logits")
    if modelcheck.wants_balancing_loss(self.config) if asked is None else asked:
        raise ValueError(BALANCING)
    _refuse_mixed(self, kwargs.get("position_ids"), kwargs.get("attention_mask"))
    # A cache is of no use in training, and with one, packed sequences see each other.
    kwargs["use_cache"] = bool(kwargs.get("use_cache"))
    out = anatomy.body_of(self)(return_dict=True, **kwargs)
    x_BTH = out.last_hidden_state
    head = head_of(self)
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

    # the cache's field has one name or another, by transformers' version
    names = (field.name for field in fields(CausalLMOutputWithPast))
    return CausalLMOutputWithPast(loss=loss, **{name: out[name] for name in names if name in out})


def head_of(lm: Any) -> Callable[..., Any]:
    weight, bias = _weights(lm)
    options = {"bias": bias, **logit_options(lm.config)}
    return lambda function, x_TH, *args, **kw: function(x_TH, weight, *args, **options, **kw)


def _base(model: Any) -> Any:
    lm = model.get_base_model() if hasattr(model, "get_base_model") else model
    anatomy.body_of(lm), anatomy.output_layer(lm)  # raise for what is no causal LM
    return lm


def _weights(lm: Any) -> tuple[Tensor, Tensor | None]:
    """The head's weight and bias, looked up at each call: peft and FSDP replace modules."""
    head = anatomy.output_layer(lm)
    if hasattr(head, "modules_to_save"):  # peft trains a copy of the whole head
        active = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[active[0]] if active else head.original_module
    if type(head).forward is not nn.Linear.forward:
        raise TypeError(
            f"lm_head is a {type(head).__module__}.{type(head).__name__}: its weight alone does "
            "not make the logits. If that is LoRA, take lm_head off target_modules (or train all "
            "of it: modules_to_save=['lm_head']), or merge it: model.merge_and_unload()"
        )
    hooks = [head._forward_hooks, head._forward_pre_hooks]
    hooks += [head._backward_hooks, head._backward_pre_hooks]
    replaced = "forward" in vars(head) and not hasattr(head, "_hf_hook")  # accelerate's moves only
    is_fsdp = type(head).__name__ == "FSDPLinear"  # its hooks gather the weight, no more
    if (any(hooks) or replaced) and not is_fsdp:
        raise TypeError(
            "lm_head has a hook, which the patched forward would pass by, as it reads the weight "
            "without calling the module: remove the hook, or unpatch(model)"
        )
    return head.weight, head.bias


def _check(lm: Any) -> None:
    """Raises ValueError unless loss and logits are the model's own; notes if packs mix traces."""
    weight, _ = _weights(lm)
    if weight.is_meta or weight.numel() == 0 or hasattr(weight, "device_mesh"):
        return
    try:
        modelcheck.check_head(lm, head_of(lm))
    except modelcheck.Mismatch as error:
        raise ValueError(f"{error}. Do not use patch() on it") from None
    except Exception as error:
        raise ValueError(
            f"{type(lm).__name__}: its own forward could not be compared, as it fails on token ids "
            f"with labels ({type(error).__name__}: {error}); patch(model, check=False) does not ask"
        ) from error

    body = anatomy.body_of(lm)

    def states(ids_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
        position_ids_T = torch.cat([torch.arange(n, device=ids_T.device) for n in lengths])
        places = {"input_ids": ids_T[None], "position_ids": position_ids_T[None]}
        return body(**places, use_cache=False, return_dict=True).last_hidden_state[0]

    try:
        draw = functools.partial(modelcheck.draw_ids, lm)
        difference, limit = modelcheck.mixing(states, lm, draw)
        why = f"hidden states differ by {difference:.2g} of their size, {limit:.1g} is rounding"
    except Exception as error:  # no position_ids, or a kernel that needs more than these
        difference, limit, why = float("inf"), 0.0, f"{type(error).__name__}: {error}"
    if not difference <= limit:
        lm._mixes_packs = (
            f"{type(lm).__name__}: traces end to end in one row change each other ({why}); give it "
            "one trace a row, padded, with an attention_mask"
        )


def _refuse_mixed(lm: Any, position_ids: Tensor | None, attention_mask: Any) -> None:
    """Where packs are known to mix traces only, as looking at the positions waits for a GPU."""
    why = getattr(lm, "_mixes_packs", None)
    if why is None or position_ids is None or attention_mask is not None:
        return
    if bool((position_ids[..., 1:] < position_ids[..., :-1]).any()):
        raise ValueError(why)
