"""A model is trusted by a number, not by its name: what is asked of each when it is loaded.

    compare_with_own   does it compute, packed and through our loss, what its own forward computes?
    check_packs        do the traces of a pack leave each other alone, with the device, the dtype
                       and the kernels that train?
    refuse_untold      what a check of a few dozen tokens cannot see, since length hides it

`model_check: false` in a recipe leaves the first two out. The numbers and their limits are in
`redi_kernels.modelcheck`, which `redi_kernels.hf.patch` asks too.
"""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from redi_kernels import anatomy, modelcheck
from redi_kernels.hf import head_of
from torch import Tensor

from redi.data.pack import Pack
from redi.errors import RediError
from redi.training.distributed import reshard

OR_ELSE = "model_check: false trains it all the same, unchecked"


def compare_with_own(
    lm: Any, wrap: Callable[[Any], Any], device: torch.device, *, or_else: str = OR_ELSE
) -> Any:
    """wrap(lm), the model that trains, shown to compute what `lm`'s own forward does.

    Where the weights are: for training on the CPU in float32, before anything is sharded or cast,
    since the comparison is sharp there (and on `device`, for its time, where a family has kernels
    for that only). Raises RediError with the difference, and with what to do `or_else`.
    """
    try:
        return _compare(lm, wrap)
    except RediError:
        raise
    except modelcheck.Mismatch as error:
        raise RediError(f"{error}. {or_else}") from None
    except Exception as error:
        problem = f"{type(error).__name__}: {_first_line(error)}"
        if device == lm.device:
            raise RediError(
                f"{type(lm).__name__}: could not be compared with its own forward on token ids "
                f"({problem}); it cannot be trained here"
            ) from error
    try:
        model = _compare(lm.to(device), wrap)
        lm.to("cpu")
        return model
    except Exception as error:
        raise RediError(f"{type(lm).__name__}: {error} (and {problem}). {or_else}") from error


def _compare(lm: Any, wrap: Callable[[Any], Any]) -> Any:
    try:
        head = head_of(lm)
    except TypeError as error:  # not of one weight: patch says the same
        raise RediError(f"{error}") from None
    ids_T, own_TH = modelcheck.check_head(lm, head)
    model = wrap(lm)
    with modelcheck.undisturbed(model), torch.no_grad():
        model.eval()
        x_TH = model.states(pack_of(ids_T, (len(ids_T),)))
    difference, limit = modelcheck.relative_difference(x_TH, own_TH)
    if not difference <= limit:  # some versions' SDPA passes over a cap that eager attention knows
        difference, limit = modelcheck.relative_difference(x_TH, _in_eager_attention(lm, ids_T))
    if not difference <= limit:
        raise modelcheck.Mismatch(
            f"{type(lm).__name__}: hidden states differ by {difference:.2g} of their size from "
            f"its own forward's ({limit:.1g} could be rounding): its attention or its positions "
            "are not the causal ones that redi computes"
        )
    # In float32 the smallest leak shows. What does not run here is asked again where it trains.
    with contextlib.suppress(Exception):
        _ask_packs(model, model.states, modelcheck.SHORT_PACK)
    return model


def _in_eager_attention(lm: Any, ids_T: Tensor) -> Tensor:
    """`lm`'s own last hidden states [T, H] of ids [T], attention as the family spells it out."""
    packed = lm.config._attn_implementation
    try:
        with modelcheck.undisturbed(lm), torch.no_grad():
            lm.eval()
            lm.set_attn_implementation("eager")
            out = anatomy.body_of(lm)(input_ids=ids_T[None], use_cache=False, return_dict=True)
    finally:
        lm.set_attn_implementation(packed)
    return out.last_hidden_state[0]


def keep_apart(model: Any, max_tokens: int, *, check: bool = True) -> str | None:
    """Has `model` run one trace at a time where packs of `max_tokens` would be wrong; returns why,
    or None. A collective, which asks what only the sharded model on its device can tell."""
    if model.why_alone is None:
        model.why_alone = counts_over_packs(model.lm.config, max_tokens)
    if model.why_alone is None and check:
        check_packs(model)
    return model.why_alone


def check_packs(model: Any) -> str | None:
    """Sets `model.why_alone` where the traces of a pack do not leave each other alone, with the
    device, the dtype and the kernels that train; returns it. A collective, of the same outcome on
    every rank.

    Raises RediError when not even single traces run.
    """
    # through the model's own call, where sharded weights are gathered
    states = lambda pack: model(pack, lambda x_TH, *_: x_TH)
    model_type = model.lm.config.model_type
    try:
        _ask_packs(model, states, modelcheck.PACK)
    except RediError:
        raise
    except Exception as error:  # transformers' own refusal, or a kernel that is not there
        model.why_alone = _alone(model_type, _first_line(error))
        reshard(model)
        ids_T = modelcheck.draw_ids(model.lm, 9, 0).to(next(model.parameters()).device)
        try:
            with modelcheck.undisturbed(model), torch.no_grad():
                states(pack_of(ids_T, (9,)))
        except Exception as again:
            raise RediError(f"{model_type}: {_first_line(again)}") from error
    finally:
        reshard(model)
    return model.why_alone


def _ask_packs(model: Any, states: Callable[[Pack], Tensor], lengths: tuple[int, int, int]) -> None:
    """Sets `model.why_alone` by the numbers of `modelcheck.mixing`."""
    device = next(model.parameters()).device
    difference, limit = modelcheck.mixing(
        lambda ids_T, lengths: states(pack_of(ids_T, lengths)),
        model,
        lambda number, seed: modelcheck.draw_ids(model.lm, number, seed).to(device),
        lengths=lengths,
        dtype=torch.bfloat16 if model.autocast else None,
    )
    if not difference <= limit:
        what = f"hidden states differ by {difference:.2g} of their size, {limit:.1g} is rounding"
        model.why_alone = _alone(model.lm.config.model_type, what)


def _alone(model_type: str, why: str) -> str:
    return (
        f"{model_type}: in one pack its traces would change each other ({why}); so each runs by "
        "itself, which is right and slower"
    )


def refuse_balancing(model_config: Any) -> None:
    """Raises RediError where a mixture of experts adds its routers' loss to its own."""
    if modelcheck.wants_balancing_loss(model_config):
        raise RediError(
            f"{model_config.model_type}: output_router_logits is on, and so its routers' balancing "
            "loss, which redi does not add; set it to false in the model's config.json"
        )


def refuse_untold(model_config: Any, max_length: int) -> None:
    """Raises RediError for what a config tells and a check of short traces cannot see, where one
    may have `max_length` tokens.

    In chunks: only a mask knows where they end. An indexer's choice of keys: with fewer keys than
    it chooses, it chooses all. longrope, dynamic: the longest trace of a pack decides.
    """
    for c in text_configs(model_config):
        for name, what in (
            ("attention_chunk_size", "attends in chunks of {} tokens"),
            ("index_topk", "attends to the {} keys that an indexer chooses"),
        ):
            limit = getattr(c, name, None)
            if limit and max_length > limit:
                raise RediError(
                    f"{c.model_type}: {what.format(limit)}, which redi does not compute; set "
                    f"max_length to {limit} at most"
                )
        for rope in rope_settings(c):
            scaling = rope.get("rope_type")
            names = ("original_max_position_embeddings", "max_position_embeddings")
            known = (rope.get(names[0]), *(getattr(c, name, None) for name in names))
            original = next(filter(None, known), max_length)
            if scaling in ("longrope", "dynamic") and max_length > original:
                raise RediError(
                    f"{c.model_type}: beyond {original} tokens its {scaling} positions change "
                    f"with the longest trace of a pack; set max_length to {original} at most"
                )


def counts_over_packs(model_config: Any, max_tokens: int) -> str | None:
    """Why packs of `max_tokens` would be wrong though short ones are right: Llama 4 scales its
    queries by a position that it counts over the whole row, from `floor_scale` on."""
    for c in text_configs(model_config):
        scale = getattr(c, "floor_scale", None)
        if getattr(c, "attn_temperature_tuning", False) and scale and max_tokens >= scale:
            return (
                f"{c.model_type}: from {scale} tokens on its attention counts positions over the "
                f"whole pack; so each trace runs by itself, which is right and slower (or set "
                f"max_tokens_per_batch below {scale})"
            )
    return None


def text_configs(model_config: Any) -> list[Any]:
    """The part of a (composite) config that describes the language model, and what is nested
    there."""
    return list(modelcheck.configs(model_config.get_text_config(decoder=True)))


def rope_settings(config: Any) -> list[dict[str, Any]]:
    """`rope_parameters`, which some families keep for each kind of layer."""
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict):
        return []
    nested = [value for value in rope.values() if isinstance(value, dict)]
    return nested or [rope]


def router_note(lm: Any) -> str | None:
    """What is worth a line, once, about a mixture of experts."""
    if not any(name.split(".")[-1] == "experts" for name, _ in lm.named_modules()):
        return None
    return (
        f"{lm.config.model_type}: a mixture of experts, trained without its routers' balancing "
        "loss (output_router_logits is off, as transformers has it)"
    )


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__


def pack_of(ids_T: Tensor, lengths: tuple[int, ...]) -> Pack:
    """A pack of traces that are all prompt, on the device of the ids."""
    device = ids_T.device
    return Pack(
        input_ids_T=ids_T,
        position_ids_T=torch.cat([torch.arange(n, device=device) for n in lengths]),
        targets_T=torch.full_like(ids_T, -100),
        cu_seqlens=torch.tensor((0, *lengths), device=device).cumsum(0, dtype=torch.int32),
        is_chosen_S=torch.zeros(len(lengths), dtype=torch.bool, device=device),
        seqlens=lengths,
        examples=(0,) * len(lengths),
        num_targets=0,
    )
