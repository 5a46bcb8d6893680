"""A transformers causal LM that reads packs: load it, run it into the loss head, write it back.

The model's own code is untouched. A pack's hidden states go straight from the decoder into a loss
of `redi_kernels`, so the [T, V] logits never exist.
"""

import copy
import difflib
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from redi_kernels import anatomy
from redi_kernels.hf import logit_options
from torch import Tensor, nn

from redi.config import TrainConfig
from redi.data.pack import Pack
from redi.data.tokenize import with_template_arguments
from redi.errors import RediError
from redi.training import attention, blocks, selfcheck
from redi.training.start import broken_json, first_line, read_causal_lm
from redi.training.throughput import attention_width, idle_weights

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")
Out = TypeVar("Out")
# A loss head: (x_TH, w_VH, pack, options of `redi_kernels`' losses) -> anything.
Head = Callable[[Tensor, Tensor, Pack, dict[str, Any]], Out]


class PackedLM(nn.Module):
    """Wraps an unmodified `*ForCausalLM` (any with a base model and a linear head on it).

    The loss runs inside this forward, so that hooks which gather sharded parameters (FSDP) fire
    around it; tied embeddings, the head and the final norm belong to this outer module's shard
    group.
    """

    def __init__(self, lm: Any, *, autocast: bool = False):
        """`autocast`: compute in bfloat16 on a CPU (on CUDA the sharding policy casts)."""
        super().__init__()
        try:
            anatomy.body_of(lm), anatomy.blocks_of(lm), anatomy.output_layer(lm).weight
        except (TypeError, AttributeError) as error:
            raise RediError(f"{error}: this family cannot be trained here") from None
        attention.register()
        self.lm = lm
        self.lm.set_attn_implementation(attention.NAME)  # any other would mix the traces
        self.autocast = autocast
        # As redi/training/selfcheck.py finds: why traces must not share a forward. None: they may.
        self.why_alone: str | None = None

    def forward(self, pack: Pack, head: Head[Out]) -> Out:
        device_type = pack.input_ids_T.device.type
        with torch.autocast(device_type, torch.bfloat16, enabled=self.autocast):
            x_TH = self.states(pack)
            options = {**self.logit_options(), "num_valid": pack.num_targets}
            return head(x_TH, self.head.weight, pack, options)

    def states(self, pack: Pack) -> Tensor:
        """The last hidden states [T, H]. Sharded ranks must hold equally many traces where they
        run one at a time: see `pack_size`."""
        if self.why_alone is None or len(pack.seqlens) == 1:
            return self._states(
                pack.input_ids_T, pack.position_ids_T, pack.cu_seqlens, pack.seqlens
            )
        tokens = (z.split(pack.seqlens) for z in (pack.input_ids_T, pack.position_ids_T))
        ends = (pair_2 - pair_2[0] for pair_2 in pack.cu_seqlens.unfold(0, 2, 1))
        traces = zip(*tokens, ends, ((n,) for n in pack.seqlens), strict=True)
        return torch.cat([self._states(*trace) for trace in traces])

    def _states(
        self, ids_T: Tensor, positions_T: Tensor, cu_seqlens: Tensor, seqlens: tuple[int, ...]
    ) -> Tensor:
        """Where traces end is told to our attention, and, in transformers' own words, to the
        kernels of recurrent families. To them not of a single trace: there is nothing to keep
        apart, and where such a kernel is missing its stand-in would refuse."""
        more: dict[str, Any] = {}
        if len(seqlens) > 1:
            more["cu_seq_lens_q"] = more["cu_seq_lens_k"] = cu_seqlens
            more["max_length_q"] = more["max_length_k"] = max(seqlens)
            more["seq_idx"] = (positions_T == 0).cumsum(0, dtype=torch.int32)[None] - 1
        return anatomy.body_of(self.lm)(
            input_ids=ids_T[None],
            position_ids=positions_T[None],
            use_cache=False,  # a cache would let traces see each other
            seqlens=seqlens,
            ends_S=cu_seqlens,
            **more,
        ).last_hidden_state[0]

    @property
    def head(self) -> nn.Linear:
        """Looked up each time: sharding replaces modules."""
        return anatomy.output_layer(self.lm)

    def pack_size(self, max_tokens: int) -> int:
        """What a packer may put together; 1: each trace (or pair) alone, as many on each rank."""
        return max_tokens if self.why_alone is None else 1

    def logit_options(self) -> dict[str, Any]:
        """How this family shapes its logits, in `redi_kernels`' words."""
        return {"bias": self.head.bias, **logit_options(self.lm.config)}

    def cost_of_squares(self) -> float:
        """What a squared token costs beside a token: a trace of n tokens takes 2 P n FLOP in the
        weights and, causally, 2 L A D n^2 in attention (backward doubles both)."""
        num_active = sum(p.numel() for p in self.parameters()) - idle_weights(self.lm)
        num_blocks = len(anatomy.blocks_of(self.lm))
        return num_blocks * attention_width(self.lm.config) / num_active


@torch.no_grad()
def token_logps(model: PackedLM, packs: Iterable[Pack]) -> Iterator[tuple[Pack, Tensor]]:
    """Yields (pack on the model's device, log-prob of each token's target [T] fp32, 0 where there
    is none) for each pack."""
    from redi_kernels import token_logprobs

    def head(x_TH, w_VH, pack, options):
        return token_logprobs(x_TH, w_VH, pack.targets_T, **options).logp_T

    device = next(model.parameters()).device
    for pack in packs:
        pack = pack.to(device)
        yield pack, model(pack, head)


def sequence_logps(model: PackedLM, packs: Iterable[Pack]) -> Iterator[tuple[Pack, Tensor, Tensor]]:
    """Yields (pack, summed log-prob per trace [S] fp32, trained tokens per trace [S]) for each
    pack."""
    from redi_kernels import sequence_logprobs

    for pack, logp_T in token_logps(model, packs):
        sequences = sequence_logprobs(logp_T, pack.cu_seqlens, pack.targets_T)
        yield pack, sequences.sum_S, sequences.length_S


def load_tokenizer(config: TrainConfig) -> Any:
    """The tokenizer of `tokenizer_name_or_path` (default: of the model), with the recipe's
    template."""
    name = config.tokenizer_name_or_path or config.model_name_or_path
    assert name is not None  # the recipe was checked
    tokenizer = load_tokenizer_from(
        name, revision=config.model_revision, trust_remote_code=config.trust_remote_code
    )
    if config.chat_template is not None:
        file = Path(config.chat_template)
        if not file.is_file():
            raise RediError(f"chat_template: {file}: no such file")
        try:
            tokenizer.chat_template = file.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise RediError(f"chat_template: {file}: cannot be read as text ({error})") from None
    return with_template_arguments(tokenizer, config.chat_template_kwargs)


def load_tokenizer_from(name: str, **options: Any) -> Any:
    """The tokenizer in a folder or under a hub name. Raises RediError when there is none."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    folder = Path(name)
    why = "no tokenizer.json, tokenizer_config.json or tokenizer.model in it"
    if not folder.is_dir() or any((folder / file).exists() for file in TOKENIZER_FILES):
        try:
            # Beside a Qwen2 config.json, AutoTokenizer splits text by Qwen2's rules, whatever a
            # tokenizer.json of one's own says: stage 2 would read other ids than stage 1.
            loader = PreTrainedTokenizerFast if _is_generic(folder) else AutoTokenizer
            return loader.from_pretrained(name, **options)
        except (
            OSError, ValueError, KeyError, TypeError, AttributeError, StrictDataclassError
        ) as error:  # fmt: skip
            why = broken_json(folder) or first_line(error)
    # From a folder that has only config.json, transformers would make an empty tokenizer.
    raise RediError(
        f"{name}: no tokenizer could be loaded ({why}); "
        "set tokenizer_name_or_path to a folder or hub name that has one"
    )


def _is_generic(folder: Path) -> bool:
    """Whether tokenizer.json alone says what the tokenizer does."""
    file = folder / "tokenizer_config.json"
    if not (file.exists() and (folder / "tokenizer.json").exists()):
        return False
    settings = json.loads(file.read_text(encoding="utf-8"))
    if not isinstance(settings, dict):
        raise ValueError(f"{file.name} holds no JSON object")
    return settings.get("tokenizer_class") in ("PreTrainedTokenizerFast", "TokenizersBackend")


def load_model_config(config: TrainConfig, *, for_weights: bool = False) -> Any:
    """The model's transformers config with the recipe's overrides. Reads no weights.

    A recipe's `architecture` stands for that of a name on the Hub, but where its weights follow.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    name = config.model_name_or_path
    is_real = name is not None and (for_weights or Path(name).is_dir())
    is_from_recipe = name is None or not (is_real or config.architecture is None)
    where = "architecture" if is_from_recipe else str(name)
    settings = dict(config.architecture or {})
    if is_from_recipe and "model_type" not in settings:
        raise RediError("architecture: needs model_type, as in a config.json")
    try:
        if is_from_recipe:
            model_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
            _check_names(settings, model_config)
        else:
            model_config = AutoConfig.from_pretrained(
                where,
                revision=config.model_revision,
                trust_remote_code=config.trust_remote_code,
            )
    except (OSError, ValueError, StrictDataclassError) as error:
        raise RediError(f"{where}: no model could be loaded ({first_line(error)})") from None
    text_config = model_config.get_text_config(decoder=True)  # itself, but for composite ones
    if config.max_position_embeddings is not None:
        text_config.max_position_embeddings = config.max_position_embeddings
    if config.rope_theta is not None:
        _set_rope_theta(text_config, config.rope_theta)
    return model_config


@contextmanager
def _naming_the_architecture() -> Iterator[None]:
    """What transformers raises for settings of which no model can be made is of many kinds."""
    try:
        yield
    except RediError:
        raise
    except Exception as error:
        words = " ".join(str(error).split())[:300]
        raise RediError(
            f"architecture: no model can be made of it ({type(error).__name__}: {words})"
        ) from error


def _check_names(settings: dict[str, Any], model_config: Any) -> None:
    """Raises RediError for a name that is nearly one of the model's: transformers takes any."""
    try:
        known = {*type(model_config)().to_dict(), *model_config.attribute_map}
    except Exception:  # a config that is not made without arguments
        return
    for name in sorted(settings.keys() - known):
        near = difflib.get_close_matches(name, known - settings.keys(), n=1, cutoff=0.85)
        if near:
            raise RediError(f"architecture: unknown key {name}; did you mean {near[0]}?")


def _drop_nothing(model_config: Any) -> None:
    """The paper disables dropout; exact resume needs it off too. In memory only: the export has
    what the model came with."""
    for field, value in list(vars(model_config).items()):
        if is_dropout(field, value):
            setattr(model_config, field, 0.0)
        elif hasattr(value, "to_dict"):  # the config of a part, as `text_config`
            _drop_nothing(value)


def is_dropout(field: str, value: Any) -> bool:
    """Whether a config's field is a probability of dropping something."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(field, str) and "drop" in field and is_number and value != 0


def load_model(config: TrainConfig, *, device: torch.device | str = "cpu") -> PackedLM:
    """The model in float32, with packed attention. From scratch when no name is given.

    Prepared for `device`, but on the CPU: no GPU may hold it whole before it is sharded.
    `device="meta"` builds shapes only. Raises RediError when the files are missing or do not fit,
    or when the family does not compute what redi would (redi/training/selfcheck.py).
    """
    from transformers import AutoModelForCausalLM

    is_meta = str(device) == "meta"
    model_config = load_model_config(config, for_weights=not is_meta)
    selfcheck.refuse_balancing(model_config)
    selfcheck.refuse_untold(model_config, config.max_length)
    as_it_came = copy.deepcopy(model_config)
    _drop_nothing(model_config)
    common = {"dtype": torch.float32, "trust_remote_code": config.trust_remote_code}
    if config.model_name_or_path is None or is_meta:
        torch.manual_seed(config.seed)
        with torch.device("meta" if is_meta else "cpu"), _naming_the_architecture():
            lm = AutoModelForCausalLM.from_config(model_config, **common)
    else:
        name, revision = config.model_name_or_path, config.model_revision
        lm = read_causal_lm(name, config=model_config, revision=revision, **common)
    lm.config_as_it_came = as_it_came  # its dtype and dropout are exported, training's are not
    if config.model_check and not is_meta:
        model = selfcheck.compare_with_own(lm, PackedLM, torch.device(device))
    else:
        model = PackedLM(lm)
    blocks.prepare(lm, config, torch.device(device))
    model.autocast = bool(config.bf16) and torch.device(device).type == "cpu"
    return model.train()


def bf16_note(model: PackedLM) -> str | None:
    """What is to be said where bf16 is asked of a CPU without instructions for it."""
    if not model.autocast or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    return (
        "bf16: this CPU has no instructions for bfloat16, so that it takes many times as long as "
        "float32; leave `bf16: true` out to train in float32"
    )


def _set_rope_theta(model_config: Any, theta: float) -> None:
    rope = getattr(model_config, "rope_parameters", None)  # transformers 5 keeps it in here
    if isinstance(rope, dict) and "rope_theta" in rope:
        rope["rope_theta"] = theta
    elif isinstance(rope, dict):  # one dict per layer type (Gemma 3)
        raise RediError("rope_theta: this model has several; edit its config.json instead")
    else:
        model_config.rope_theta = theta
