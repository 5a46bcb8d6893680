"""A model is trusted by a number, not by its name: what is asked of each when it is loaded.

    compare_with_own   does it compute, packed and through our loss, what its own forward computes?
    check_packs        do the traces of a pack leave each other alone, with the device, the dtype
                       and the kernels that train?
    refuse_untold      what a check of a few dozen tokens cannot see, since length hides it

`model_check: false` in a recipe leaves the first two out. The numbers and their limits are in
`redi_kernels.modelcheck`, which `redi_kernels.hf.patch` asks too.
"""

from collections.abc import Callable
from typing import Any

import torch
from redi_kernels import modelcheck
from redi_kernels.hf import head_of
from torch import Tensor

from redi.config import TrainConfig
from redi.data.pack import Pack
from redi.distributed import reshard
from redi.errors import RediError

HOW_TO_GO_ON = "model_check: false trains it all the same, unchecked"


def compare_with_own(lm: Any, wrap: Callable[[Any], Any], device: torch.device) -> Any:
    """wrap(lm), the model that trains, shown to compute what `lm`'s own forward does.

    On the CPU in float32, before anything is sharded or cast: the comparison is sharp there.
    (On `device`, for its time, where a family has kernels for that only.)
    Raises RediError with the difference.
    """
    try:
        return _compare(lm, wrap)
    except RediError:
        raise
    except modelcheck.Mismatch as error:
        raise RediError(f"{error}. {HOW_TO_GO_ON}") from None
    except Exception as error:
        problem = f"{type(error).__name__}: {_first_line(error)}"
        if device.type == "cpu":
            raise RediError(
                f"{type(lm).__name__}: could not be compared with its own forward on token ids "
                f"({problem}). {HOW_TO_GO_ON}"
            ) from error
    try:
        model = _compare(lm.to(device), wrap)
        lm.to("cpu")
        return model
    except Exception as error:
        raise RediError(f"{type(lm).__name__}: {error} (and {problem}). {HOW_TO_GO_ON}") from error


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
    if not difference <= limit:
        raise modelcheck.Mismatch(
            f"{type(lm).__name__}: hidden states differ by {difference:.2g} of their size from those"
            f" of its own forward ({limit:.1g} could be rounding): its attention or its positions "
            "are not the causal ones that redi computes"
        )
    return model


def before_training(model: Any, config: TrainConfig) -> list[str]:
    """Asks what only the sharded model, on its device, can tell; returns what the user should know.
    A collective."""
    why = counts_over_packs(model.lm.config, config.max_tokens_per_batch)
    model.one_at_a_time = why is not None
    if why is None and config.model_check:
        why = check_packs(model)
    return [line for line in (router_note(model.lm), why) if line is not None]


def check_packs(model: Any) -> str | None:
    """Sets `model.one_at_a_time` where the traces of a pack do not leave each other alone; returns
    why, or None. A collective, of the same outcome on every rank.

    Raises RediError when not even single traces run.
    """
    lm = model.lm

    def states(ids_T: Tensor, lengths: tuple[int, ...]) -> Tensor:
        # through the model's own call, where sharded weights are gathered
        return model(pack_of(ids_T, lengths), lambda x_TH, *_: x_TH)

    def draw(number: int, seed: int) -> Tensor:
        return modelcheck.draw_ids(lm, number, seed).to(next(model.parameters()).device)

    dtype = torch.bfloat16 if model.autocast else None
    try:
        difference, limit = modelcheck.mixing(states, model, draw, dtype=dtype)
        if difference <= limit:
            return None
        why = (
            f"hidden states differ by {difference:.2g} of their size, {limit:.1g} could be rounding"
        )
    except RediError:
        raise
    except Exception as error:  # transformers' own refusal, or a kernel that is not there
        why = _first_line(error)
    finally:
        reshard(model)
    model.one_at_a_time = True
    try:
        with modelcheck.undisturbed(model), torch.no_grad():
            finite = states(draw(9, 0), (9,)).isfinite().all()
    except Exception as error:
        raise RediError(f"{lm.config.model_type}: {why}; {_first_line(error)}") from error
    finally:
        reshard(model)
    if not finite:
        raise RediError(f"{lm.config.model_type}: its hidden states are not finite")
    return (
        f"{lm.config.model_type}: in one pack its traces would change each other ({why}); so each "
        "runs by itself, which is right and slower"
    )


def refuse_untold(model_config: Any, config: TrainConfig) -> None:
    """Raises RediError for what a config tells and a check of short traces cannot see.

    In chunks: only a mask knows where they end. An indexer's choice of keys: with fewer keys than
    it chooses, it chooses all. longrope, dynamic: the longest trace of a pack decides.
    """
    if modelcheck.wants_balancing_loss(model_config):
        raise RediError(
            f"{model_config.model_type}: output_router_logits is on, and so its routers' balancing "
            "loss, which redi does not add; set it to false in the model's config.json"
        )
    for c in text_configs(model_config):
        for name, what in (
            ("attention_chunk_size", "attends in chunks of {} tokens"),
            ("index_topk", "attends to the {} keys that an indexer chooses"),
        ):
            limit = getattr(c, name, None)
            if limit and config.max_length > limit:
                raise RediError(
                    f"{c.model_type}: {what.format(limit)}, which redi does not compute; set "
                    f"max_length to {limit} at most"
                )
        for rope in rope_settings(c):
            scaling = rope.get("rope_type")
            names = ("original_max_position_embeddings", "max_position_embeddings")
            known = (rope.get(names[0]), *(getattr(c, name, None) for name in names))
            original = next(filter(None, known), config.max_length)
            if scaling in ("longrope", "dynamic") and config.max_length > original:
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
        f"{lm.config.model_type}: a mixture of experts, trained without its routers' balancing loss "
        "(output_router_logits is off, as transformers has it)"
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
