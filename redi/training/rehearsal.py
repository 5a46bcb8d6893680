"""One micro-batch on tensors that are only shapes: what it would keep in memory, without memory.

The real model, attention and loss run on PyTorch's fake tensors, once with a block of each kind and
once with one more; every further block adds what its kind added. So no family needs a formula of
its own, and a model of any size takes a second or two.
"""

import copy
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from redi_kernels import cpu, scan
from redi_kernels.head import SLAB_BYTES
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from redi.config import TrainConfig
from redi.data.pack import Pack
from redi.errors import RediError
from redi.training import attention
from redi.training.model import PackedLM, load_model
from redi.training.objectives import NEEDS_PAIRS, StepCounts, make_objective, redi
from redi.training.start import first_line

FLASH = "redi_shapes"
MOMENTS = ("forward", "loss", "backward")


@dataclass(frozen=True)
class Bytes:
    """Largest sums of live tensors while a micro-batch is in each of `MOMENTS`; without weights,
    gradients and optimizer."""

    forward: int
    loss: int
    backward: int

    @property
    def peak(self) -> int:
        return max(self.forward, self.loss, self.backward)


def rehearse(
    config: TrainConfig, model_config: Any, seqlens: tuple[int, ...], *, cuda: bool
) -> Bytes:
    """Activations and loss of one micro-batch of whole traces of `seqlens` tokens.

    `cuda`: bf16 weights gathered by FSDP and FlashAttention; otherwise what the CPU runs.
    """
    try:
        return _from_few_blocks(config, model_config, seqlens, cuda)
    except RediError:
        raise
    except Exception:  # a family whose config does not let it have fewer blocks
        pass
    try:
        return _micro_batch(config, model_config, (), seqlens, cuda)
    except RediError:
        raise
    except Exception as error:
        why = f"{type(error).__name__}: {first_line(error)}"
        raise RediError(
            f"{model_config.model_type}: its memory cannot be planned, since its code does not run "
            f"on shapes alone ({why}); it can be trained where `redi train` accepts it"
        ) from error


def _from_few_blocks(
    config: TrainConfig, model_config: Any, seqlens: tuple[int, ...], cuda: bool
) -> Bytes:
    text_config = model_config.get_text_config(decoder=True)
    kinds = list(getattr(text_config, "layer_types", None) or [])
    kinds = kinds or ["full_attention"] * text_config.num_hidden_layers
    measured: dict[tuple[str, ...], Bytes] = {}

    def of(*layers: str) -> Bytes:
        if layers not in measured:
            measured[layers] = _whatever_runs(config, model_config, layers, seqlens, cuda)
        return measured[layers]

    # One of each, the last ones in place: there the backward, and mostly the peak, begins.
    each = tuple(dict.fromkeys(reversed(kinds)))[::-1]
    total = {moment: getattr(of(*each), moment) for moment in MOMENTS}
    for kind in each:
        for moment in MOMENTS:
            more = getattr(of(kind, *each), moment) - getattr(of(*each), moment)
            total[moment] += more * (kinds.count(kind) - 1)
    return Bytes(**total)


def _whatever_runs(
    config: TrainConfig, model_config: Any, kinds: tuple[str, ...], seqlens: tuple[int, ...],
    cuda: bool,
) -> Bytes:  # fmt: skip
    """The pack, or its longest trace where a family takes one at a time (selfcheck.py)."""
    for traces in (seqlens, seqlens[:1]):
        try:
            return _micro_batch(config, model_config, kinds, traces, cuda)
        except RediError:
            raise
        except Exception as error:
            problem = error  # else Python forgets it
    raise RediError(
        f"{model_config.model_type}: its memory cannot be counted, since it does not run on shapes "
        f"({type(problem).__name__}: {str(problem).strip().splitlines()[0]})"
    ) from problem


def _micro_batch(
    config: TrainConfig,
    model_config: Any,
    kinds: tuple[str, ...],
    seqlens: tuple[int, ...],
    cuda: bool,
) -> Bytes:
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = _shallow(config, model_config, kinds, cuda)
        for parameter in model.parameters():  # as in the second micro-batch of a step
            parameter.grad = torch.zeros_like(parameter)
        pack, num_tokens = _shapes(seqlens), sum(seqlens)
        # Picking pairs apart has no shape beforehand, so DPO and SimPO are rehearsed as REDI.
        objective = (
            redi(config.alpha) if config.objective in NEEDS_PAIRS else make_objective(config)
        )
        counts = StepCounts(num_tokens, len(seqlens), len(seqlens))
        peaks = {}
        with LiveBytes() as live:

            def head(x_TH: Tensor, w_VH: Tensor, pack: Pack, options: dict[str, Any]) -> Any:
                peaks["forward"] = live.take()
                out = objective(counts, x_TH, w_VH, pack, options)
                peaks["loss"] = live.take() + _workspace(x_TH, w_VH, options, cuda)
                return out

            out = model(pack, head)
            live.take()
            out.loss.backward()
            peaks["backward"] = live.take()
            del out
    attention._rows_in_padded_batch.cache_clear()  # it may hold shapes now
    return Bytes(**peaks)


def _shallow(
    config: TrainConfig, model_config: Any, kinds: tuple[str, ...], cuda: bool
) -> PackedLM:
    """The recipe's model with as many blocks as `kinds` (none: all of them), on shapes."""
    model_config = copy.deepcopy(model_config)
    text_config = model_config.get_text_config(decoder=True)
    if kinds:
        text_config.num_hidden_layers = len(kinds)
        if getattr(text_config, "layer_types", None):
            text_config.layer_types = list(kinds)
    settings = model_config.to_dict()
    changes = {"model_name_or_path": None, "tokenizer_name_or_path": "", "architecture": settings}
    changes |= {"use_liger_kernel": False, "torch_compile": False, "model_check": False}
    if cuda:
        changes["bf16"] = None  # no autocast: FSDP hands the model bf16 weights
    model = load_model(config.model_copy(update=changes))
    if cuda:
        _register_flash()
        model.lm.set_attn_implementation(FLASH)
        if config.bf16 is not False:
            _to_bfloat16(model)
    return model


def _to_bfloat16(model: nn.Module) -> None:
    """As `model.to`, which fake tensors refuse; tied weights stay tied."""
    narrow: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in narrow:
                narrow[parameter] = nn.Parameter(parameter.detach().to(torch.bfloat16))
            setattr(module, name, narrow[parameter])


def _shapes(seqlens: tuple[int, ...]) -> Pack:
    ids_T = torch.zeros(sum(seqlens), dtype=torch.int64)
    return Pack(
        input_ids_T=ids_T,
        position_ids_T=ids_T.clone(),
        targets_T=ids_T.clone(),
        cu_seqlens=torch.zeros(len(seqlens) + 1, dtype=torch.int32),
        is_chosen_S=torch.zeros(len(seqlens), dtype=torch.bool),
        seqlens=seqlens,
        examples=(0,) * len(seqlens),
        num_targets=len(ids_T),
    )


def _workspace(x_TH: Tensor, w_VH: Tensor, options: dict[str, Any], cuda: bool) -> int:
    """Bytes that the loss uses inside, beyond what it returns (docs/memory.md): a slab of logits,
    dW in fp32 where it is returned in less, and the trained tokens' rows of x and dX."""
    V = len(w_VH)
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x_TH.dtype
    accumulator = 4 * w_VH.numel() if dtype.itemsize < 4 else 0
    rows = 2 * x_TH.numel() * dtype.itemsize
    if cuda:
        return SLAB_BYTES + accumulator + rows
    B = cpu._power_of_two(cpu.BUFFER_BYTES // (V * dtype.itemsize), *cpu.BLOCK_TOKENS)
    groups = 1 if options.get("softcap") is None else 3
    if options.get("tolerance"):  # the weights in int8, a tile of logits as integers and floats
        accumulator += w_VH.numel() + 2 * scan.TILE_BYTES
    return B * V * dtype.itemsize + groups * cpu.GROUP_BYTES + accumulator + rows


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages made inside: live now, and at most since the last `take`."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def take(self) -> int:
        peak, self.peak = self.peak, self.live
        return peak

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._grouped_mm.default:
            out = _grouped_mm(*args, **(kwargs or {}))
        else:
            out = func(*args, **(kwargs or {}))
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        for tensor in tree_leaves(out):
            if _is_tensor(tensor) and tensor.untyped_storage()._cdata not in old:
                self._track(tensor.untyped_storage())
        return out

    def _track(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)

        def gone() -> None:
            self.known.discard(key)
            self.live -= size

        weakref.finalize(storage, gone)


def _grouped_mm(a: Tensor, b: Tensor, offs: Tensor | None = None, *_: Any, **__: Any) -> Tensor:
    """Shapes of what experts multiply by: PyTorch's own are for bfloat16 only, its kernels for the
    CPU are not. Of 2-D factors the rows (of both: what is summed over) are in groups."""
    if a.ndim == b.ndim == 2:
        assert offs is not None
        return a.new_empty(len(offs), a.shape[0], b.shape[1])
    if a.ndim == b.ndim == 3:
        return a.new_empty(*a.shape[:2], b.shape[2])
    return a.new_empty(a.shape[-2], b.shape[-1])


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _register_flash() -> None:
    from transformers import AttentionInterface

    AttentionInterface.register(FLASH, _flash)


def _flash(module: Any, q_1ATD: Tensor, k_1KTD: Tensor, v_1KTD: Tensor, mask: None, **_: Any):
    operator = torch.ops.redi.flash_attn_shapes
    return operator(*(z.transpose(1, 2) for z in (q_1ATD, k_1KTD, v_1KTD)))[0], None


# What FlashAttention 2 keeps and uses: q, k, v, out and a log-sum-exp a head; in its backward dQ in
# fp32 and dK, dV for every query head. An operator, as the real one is: checkpointing knows it by
# its name (redi/training/blocks.py). It has shapes only.
FLASH_OPERATOR = "redi::flash_attn_shapes"
torch.library.define(FLASH_OPERATOR, "(Tensor q, Tensor k, Tensor v) -> (Tensor, Tensor)")


@torch.library.register_fake(FLASH_OPERATOR)
def _(q_1TAD: Tensor, k_1TKD: Tensor, v_1TKD: Tensor) -> tuple[Tensor, Tensor]:
    out_1TAD = torch.empty_like(q_1TAD, memory_format=torch.contiguous_format)
    return out_1TAD, q_1TAD.new_empty(q_1TAD.shape[2], q_1TAD.shape[1], dtype=torch.float32)


def _flash_backward(ctx: Any, *_: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, _, lse_AT = ctx.saved_tensors
    used = [q.new_empty(q.shape, dtype=torch.float32), torch.empty_like(lse_AT)]
    if k.shape != q.shape:
        used += [torch.empty_like(q), torch.empty_like(q)]
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _keep(ctx: Any, inputs: tuple, output: tuple) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs, *output)


torch.library.register_autograd(FLASH_OPERATOR, _flash_backward, setup_context=_keep)
