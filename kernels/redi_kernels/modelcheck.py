"""Whether a transformers model does what this package takes it to do: shown by numbers, not by its
name. `hf.patch` asks both questions of a model, and so may any trainer.

    check_head    are its loss and its logits those that the head makes of its last hidden states?
    mixing        do the traces of a pack leave each other alone?

A few forwards of some dozen tokens. Nothing of them stays: not in the random generators, the
buffers, the modes, or the gradients.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from redi_kernels import anatomy
from redi_kernels.logprobs import token_logprobs
from redi_kernels.losses import sft_loss

LENGTH = (
    23  # odd: then no target of the reversed ids is the token's own id, which tied heads favour
)
TARGETS = 32  # log-probs compared a row
# At this size every cap in use (15 to 50) bends the logits, and so does one that no config names.
LARGE = 100.0
# Traces of a pack: longer than a convolution's kernel, no multiple of a scan's chunk (64) where one
# begins, and a chunk's end inside the last.
PACK = (40, 21, 36)
SHORT_PACK = (9, 6, 9)
EARLY = 4  # tokens of a trace that a state left over by the trace before reaches first


class Mismatch(ValueError):
    """The model is not what it was taken for."""


def check_head(lm: Any, head: Callable[..., Any]) -> tuple[Tensor, Tensor]:
    """Compares `lm`'s own loss and logits with those of `head` on its last hidden states.

    The labels are the ids in reverse. The logits are compared as they are and, through a larger
    input of `lm_head`, where scales and soft caps show. Parameters that are neither the base
    model's nor the head's must not matter.

    Args:
        lm: a causal LM with a base model and a head on it, its weights whole and on one device.
        head: head(redi_loss, x_TH, y_T, ...), with the weight and its options filled in.

    Returns: the ids [T] and the last hidden states [T, H] of the model's own forward.
    Raises Mismatch with the difference; what the model itself raises passes through.
    """
    name = type(lm).__name__
    with undisturbed(lm), torch.no_grad():
        lm.eval()
        ids_T = draw_ids(lm, LENGTH, seed=0)
        labels_T = ids_T.flip(0)
        ask = functools.partial(lm, input_ids=ids_T[None], use_cache=False, return_dict=True)
        own = ask(labels=labels_T[None])
        is_out_V = own.logits[0].isneginf().all(0)  # as of a padded vocabulary
        if is_out_V[labels_T].any():  # an infinite loss would tell nothing
            labels_T = labels_T.where(~is_out_V[labels_T], int(is_out_V.logical_not().max(0)[1]))
            own = ask(labels=labels_T[None])
        x_TH = anatomy.body_of(lm)(input_ids=ids_T[None], use_cache=False, return_dict=True)
        x_TH = x_TH.last_hidden_state[0]
        if own.loss is None or own.logits.shape[:2] != (1, LENGTH) or len(x_TH) != LENGTH:
            raise Mismatch(f"{name} has no loss of its own on token ids with labels")
        if own.loss.isnan():
            raise Mismatch(f"{name}: its own loss is NaN{_first_that_is_no_number(lm)}")
        largest = _largest(own.logits)
        y_T = torch.cat([labels_T[1:], labels_T.new_tensor([-100])])
        loss, own_loss = (float(z) for z in (head(sft_loss, x_TH, y_T).loss, own.loss))
        if own_loss != own_loss:
            raise Mismatch(f"{name}: its loss is NaN on any text: its weights hold NaN or infinity")
        if not abs(loss - own_loss) <= _slack(own.logits, largest):
            raise Mismatch(
                f"{name}: its own loss is {own_loss:.6g} where its next-token loss is {loss:.6g}. "
                "Either its logits are more than lm_head's with the scale and cap of its config, "
                "or it is trained on something else (an encoder-decoder, a masked model, an added "
                "router loss)"
            )
        _compare_logits(name, head, x_TH, own.logits[0])
        scale = 2.0 ** round(torch.tensor(LARGE / max(largest, 1e-3)).log2().item())
        with _scaled_input(anatomy.output_layer(lm), scale) as calls:
            logits_TV = ask().logits[0]
        if calls:  # else its weight is used some other way, and the logits were as before
            _compare_logits(name, head, x_TH * scale, logits_TV)
        with _others_moved(lm) as moved:
            if moved:
                again = float(ask(labels=labels_T[None]).loss)
                if not abs(again - own_loss) <= _slack(own.logits, largest):
                    raise Mismatch(
                        f"{name}: its loss depends on {moved[0]}, which is neither its base "
                        "model's nor lm_head's, and would get no gradient"
                    )
    return ids_T, x_TH


def _compare_logits(name: str, head: Callable[..., Any], x_TH: Tensor, logits_TV: Tensor) -> None:
    """Raises Mismatch unless log-probs of random targets agree. Of their differences the root mean
    square counts: rounding averages out there, a scale or a cap does not."""
    T, V = logits_TV.shape
    generator = torch.Generator().manual_seed(1)
    y_TN = torch.randint(V, (T, TARGETS), generator=generator).to(x_TH.device)
    own_TN = logits_TV.float().log_softmax(-1).gather(1, y_TN)
    rows_KH = x_TH.repeat_interleave(TARGETS, 0)
    logp_TN = head(token_logprobs, rows_KH, y_TN.flatten()).logp_T.view_as(own_TN)
    error_TN = torch.where(own_TN == logp_TN, 0.0, own_TN - logp_TN)  # -inf is equal to -inf
    error = error_TN.square().mean().sqrt()
    if not error <= _slack(logits_TV, _largest(logits_TV)):
        raise Mismatch(
            f"{name} makes its logits in a way that its config does not tell: "
            f"log-probs are off by {error:.3g}"
        )


def _largest(logits: Tensor) -> float:
    """A row of -inf, as of padded vocabularies, is no size."""
    return float(torch.where(logits.isfinite(), logits.float().abs(), 0.0).max())


def _slack(logits: Tensor, largest: float) -> float:
    """What rounding may do to log-probs: of the logits themselves in their dtype (each a few times,
    by half a unit at most, with either sign), and of fp32 sums over the hidden size."""
    return (precision(logits) / 2 + 256 * torch.finfo(torch.float32).eps) * (1 + largest)


def precision(values: Tensor) -> float:
    """The relative step of the arithmetic that made `values`. On a GPU, fp32 matmuls may be TF32's,
    whatever torch was told: Triton kernels decide for themselves."""
    eps = torch.finfo(values.dtype).eps
    return max(eps, 2.0**-10) if values.is_cuda else eps


def _first_that_is_no_number(lm: Any) -> str:
    bad = (name for name, p in lm.named_parameters() if not p.float().isfinite().all())
    return next((f": its weight {name} holds NaN or infinity" for name in bad), "")


@contextlib.contextmanager
def _others_moved(lm: Any) -> Iterator[list[str]]:
    """The names of the parameters that are neither in the base model nor in the head, which inside
    have other values: a learned scale of 1 or a bias of 0 would not show as it is."""
    parts = (anatomy.body_of(lm), anatomy.output_layer(lm))
    known = {id(p) for part in parts for p in part.parameters()}
    others = {
        name: p for name, p in lm.named_parameters() if id(p) not in known and p.is_floating_point()
    }
    before = [p.clone() for p in others.values()]
    generator = torch.Generator().manual_seed(2)
    try:
        for p in others.values():
            p.add_((torch.randn(p.shape, generator=generator) * 0.5).to(p))
        yield list(others)
    finally:
        for p, values in zip(others.values(), before, strict=True):
            p.copy_(values)


@contextlib.contextmanager
def _scaled_input(module: nn.Module, scale: float) -> Iterator[list[bool]]:
    calls: list[bool] = []

    def enlarge(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        calls.append(True)
        return (args[0] * scale, *args[1:])

    handle = module.register_forward_pre_hook(enlarge)
    try:
        yield calls
    finally:
        handle.remove()


def mixing(
    states: Callable[[Tensor, tuple[int, ...]], Tensor],
    module: nn.Module,
    draw: Callable[[int, int], Tensor],
    *,
    lengths: tuple[int, int, int] = PACK,
    dtype: torch.dtype | None = None,
) -> tuple[float, float]:
    """How far the traces of a pack change each other's last hidden states, and how far they may.

    In the mode that `module` is in: other tokens in the middle trace must leave the first and the
    last alone. In eval mode, where routers draw no noise: the pack in reverse, and the last trace
    by itself, must give each trace the same states.

    Families that keep traces apart differ by 0, mixtures of experts (whose matmuls take as many
    rows as the router sends) by their rounding, 5e-7 in fp32; those that do not, by 1e-2 to 1. The
    limit is 1e-4, or two steps of a half precision, or eight times what is seen where nothing can
    leak: in a trace with none before it. In half precision a rounding may send a token to another
    expert, so medians count there: of a trace, and of its first tokens, which a state left over
    reaches first.

    Args:
        states: (ids_T, lengths of the traces) -> x_TH.
        draw: (number, seed) -> ids_T on the device.
        lengths: of the three traces, of more than `EARLY` tokens each.
        dtype: of the arithmetic, where it is not that of the states (autocast).

    Returns: (difference, limit) relative to a state's norm; the difference is not finite where the
    states are not.
    """
    A, B, C = (draw(n, seed) for seed, n in enumerate(lengths))
    other_B = draw(len(B), len(lengths))

    def run(*traces: Tensor) -> list[Tensor]:
        sizes = tuple(map(len, traces))
        torch.manual_seed(0)  # what a family draws, it draws alike
        return list(states(torch.cat(traces), sizes).clone().split(sizes))

    with undisturbed(module), torch.no_grad():
        base, swapped = run(A, B, C), run(A, other_B, C)
        module.eval()
        straight, reverse = run(A, B, C), run(C, B, A)[::-1]
        (alone,) = run(C)
    narrow = dtype is not None and dtype.itemsize < 4
    eps = torch.finfo(dtype).eps if dtype is not None and narrow else precision(alone)
    size = lambda x, y: _relative(x, y, robust=eps > 1e-5)
    quiet = max(size(base[0], swapped[0]), size(reverse[2], alone))  # nothing stands before these
    limit = max(1e-4, 2 * eps)
    if not quiet <= 16 * limit:
        return quiet, 16 * limit
    pairs = [(base[2], swapped[2]), (straight[2], alone)]
    pairs += list(zip(straight, reverse, strict=True))
    return max(size(x, y) for x, y in pairs), max(limit, 8 * quiet)


def _relative(x_TH: Tensor, y_TH: Tensor, *, robust: bool) -> float:
    x_TH, y_TH = x_TH.float(), y_TH.float()
    error_T = (x_TH - y_TH).norm(dim=-1) / y_TH.norm(dim=-1).clamp_min(1e-30)
    if not error_T.isfinite().all():
        return float("inf")
    if robust:
        return float(torch.stack([error_T[:EARLY].median(), error_T.median()]).max())
    return float(error_T.max())


def relative_difference(x_TH: Tensor, y_TH: Tensor) -> tuple[float, float]:
    """Of two ways to compute the same states: (difference, what rounding may do at most).

    In fp32 deep models differ by 1e-5; an attention that is not theirs, by 1e-2 and more."""
    eps = max(precision(x_TH), precision(y_TH))
    return _relative(x_TH, y_TH, robust=eps > 1e-5), max(1e-3, 16 * eps)


def draw_ids(lm: Any, number: int, seed: int) -> Tensor:
    """Random ids [number], no two alike where the vocabulary allows, none of them one that a config
    gives a meaning (padding, image), on the device of the head."""
    special = {
        value
        for config in configs(lm.config)
        for name, value in vars(config).items()
        if name.endswith(("token_id", "token_index")) and isinstance(value, int)
    }
    weight = anatomy.output_layer(lm).weight
    V = weight.shape[0]
    embedding = lm.get_input_embeddings()
    V = min(V, getattr(embedding, "num_embeddings", V))
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(V, generator=generator)
    ids = [i for i in order[: number + len(special)].tolist() if i not in special] or [0]
    ids = (ids * (number // len(ids) + 1))[:number]
    return torch.tensor(ids, device=weight.device)


def configs(config: Any) -> Iterator[Any]:
    """A transformers config and all those nested in it (`text_config`, ...)."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(value, "to_dict") and hasattr(value, "model_type"):
            yield from configs(value)


def wants_balancing_loss(config: Any) -> bool:
    """Whether a mixture of experts adds its routers' loss to its own."""
    return any(getattr(c, "output_router_logits", None) for c in configs(config))


@contextlib.contextmanager
def undisturbed(module: nn.Module) -> Iterator[None]:
    """Puts back the modes, the buffers and the random generators."""
    modes = [(m, m.training) for m in module.modules()]
    buffers = [(b, b.clone()) for b in module.buffers() if not b.is_meta]
    devices = {p.device for p in module.parameters() if p.is_cuda}
    with torch.random.fork_rng(devices=[d.index for d in devices]):
        try:
            yield
        finally:
            for m, training in modes:
                m.training = training
            with torch.no_grad():
                for buffer, content in buffers:
                    if not torch.equal(buffer, content):
                        buffer.copy_(content)
