"""A tiny config of any causal-LM family, made mechanically from the family's own default config.

One table of rules (a field's name, its small value) serves all families and whatever is nested in
them. What is given a layer at a time (kinds of layers, rope or not, experts or not) is thinned out
so that each combination stays; windows and chunks get shorter than the traces; scales that
are 1 by default get another value, so that one that is forgotten shows.
"""

import json
import re
from typing import Any

import torch

VOCAB, HIDDEN, LAYERS, MOST_LAYERS = 96, 32, 4, 7
WINDOW = 8  # shorter than every trace
POSITIONS = 512  # longer than every trace
PAD, BOS, EOS, MARK = 0, 1, 4, 90  # MARK: a token that no text has, of images and the like

LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
    "num_blocks", "depth", "num_encoder_layers", "num_decoder_layers", "num_global_layers",
)  # fmt: skip
# The first rule whose pattern is the whole name counts. A function gets the family's own value.
RULES: list[tuple[str, Any]] = [
    (
        "chunk_size_feed_forward|num_logits_to_keep|num_labels|pretraining_tp|"
        "type_vocab_size|num_channels|in_channels",
        None,
    ),
    (
        r"(unpadded_|padded_|decoder_)?vocab_size(_per_layer_input)?|ngram_vocab_size_base|"
        r"n_vocab|encoder_hash_byte_group_vocab",
        VOCAB,
    ),
    ("pad_token_id|pad_index", PAD),
    ("bos_token_id|decoder_start_token_id", BOS),
    ("eos_token_id|forced_eos_token_id|sep_token_id", EOS),
    (r".*_token_(id|index)|.*vocab_offset", MARK),
    ("|".join(LAYER_COUNTS), LAYERS),
    ("num_kv_shared_layers", lambda n: min(n, 2)),
    (
        "n_(input|recurrent|output)_layers|num_dense_layers|first_k_dense_replace",
        lambda n: min(n, 1),
    ),
    (
        r""
        r"(attn|expert|full_attention|layer|moe|hybrid)?_?(layer|layers)?_?(period|interval|freq|frequency)|"
        r".*sliding_window_pattern|.*_every_n_layers|.*_layer_interval|layer_group_size|"
        r"interleave_moe_layer_step|n_layers_per_attn_res_block",
        lambda n: min(n, 2),
    ),
    ("attn_layer_offset|expert_layer_offset", 1),
    ("mamba_n_heads|n_mamba_heads", lambda n: min(n, 8)),
    (
        r"(num|n|.*_num|.*_n)_(key_value|kv|query)_?(heads|groups)|kv_n_heads|.*num_kv_heads|"
        r"multi_query_group_num",
        lambda n: min(n, 2),
    ),
    (r"(linear_)?num_key_heads|linear_num_key_heads", 2),
    (
        r".*(num|n)_?(attention_|value_|linear_|key_|q_)*heads|n_head|.*attention_heads|"
        r"num_heads|heads_per_ngram",
        4,
    ),
    ("num_attention_heads_per_layer", None),
    ("qk_rope_head_dim|qk_nope_head_dim|rotary_dim", 4),
    (
        r".*head_dim|d_kv|d_head|dim_head|kv_channels|mamba_d_head|head_size|mamba_headdim|"
        r"time_step_rank|mamba_dt_rank",
        8,
    ),
    (
        r""
        r"(n|num|moe_num|n_routed|num_local|num_routed|moe_n|zero|num_zero)_?(routed_|local_)?experts|"
        r"zero_expert_num",
        4,
    ),
    (
        r"(num_|n_)?experts_per_(tok|token)|(moe_)?top_?k|moe_k|num_selected_experts|"
        r"num_experts_per_tok(en)?|moe_topk|num_experts_per_topk",
        2,
    ),
    (r"(moe_)?(num|n)_shared_experts|moe_num_shared_experts", lambda n: min(n, 1)),
    ("n_group|num_expert_group", lambda n: min(n, 2)),
    ("topk_group", 1),
    (
        r".*(intermediate|ffn).*(size|dim)(_mlp)?|.*ffn_dim|dff|dim_ff|d_ff|ffn_hidden_size|"
        r"n_inner|d_inner|.*feed_forward.*(size|dim|proj)|intermediate_size_mlp|mlp_dim|"
        r"mlp_hidden_size",
        48,
    ),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank|.*lowrank|.*_rank|adapter_rank|.*lora_dim", 8),
    ("hidden_size_per_layer_input", 8),
    (
        r"hidden_size.*|d_model|n_embd|dim|embed_dim|emb_dim|embedding_size|"
        r"word_embed_proj_dim|lru_width|ple_embed_dim|.*hidden_dim|vision_output_dim|"
        r"out_hidden_size|projection_dim|mamba_d_ssm|embedding_dim|"
        r"cross_attention_hidden_size|d_embed|adapter_(in|out)_dim|backbone_hidden_size",
        HIDDEN,
    ),
    (
        r"max_position_embeddings|n_positions|max_seq_len|n_ctx|seq_length|model_max_length|"
        r"max_sequence_length|.*original_max_position_embeddings|max_source_positions|"
        r"max_target_positions|context_length|num_position_embeddings|max_length|"
        r"position_embedding_size",
        POSITIONS,
    ),
    (
        r"sliding_window(_size)?|window_size|attention_window(_size)?|attention_chunk_size|"
        r"keep_window_size|local_attention_window_len|swa_window|local_attention|rel_extent|"
        r"index_topk",
        WINDOW,
    ),
    (
        r"(mamba_)?(chunk_size|block_size)|.*_chunk_(size|length)|index_block_size|"
        r"indexer_block_size|floor_scale|log_scaling_n_floor",
        lambda n: WINDOW if n and n > 1 else n,
    ),
    (
        r"(mamba_|ssm_)?(d_)?state(_size)?|ssm_state_size|mamba_n_groups|n_groups|o_groups",
        lambda n: min(n, 8) if n > 2 else n,
    ),
    ("attention_hidden_size", lambda n: 2 * HIDDEN if n in (7424, 5120) else HIDDEN),
    ("image_size", 8),
    ("(vision_)?patch_size", 4),
    (r"codebook_size|audio_vocab_size", 32),
    ("compress_rates", None),
]  # fmt: skip
# Where a family's default is None but its code wants a number.
NONE_MEANS = {"head_dim": 8, "num_key_value_heads": 2, "num_experts_per_tok": 2}
# Caps, and scales that would not show at 1.
CAP = r".*softcap(ping)?|logits_soft_cap"
SCALE = r".*(multiplier|logit_scale|logits_scaling|scaling_factor|route_scale)"


def tiny_config(model_type: str, *, window: int = WINDOW) -> Any:
    """The family's config, made tiny. `window`: of what is meant to be shorter than the traces.

    Raises whatever transformers' own config classes raise.
    """
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    start = cls(**START.get(model_type, {}))
    settings = json.loads(json.dumps(start.to_dict(), default=str))
    settings = _merged(shrink(settings, window), OVERRIDES.get(model_type, {}))
    for key in ("id2label", "label2id", "transformers_version", "architectures", "dtype"):
        settings.pop(key, None)
    return cls.from_dict(settings)


# What no rule makes. START: arguments without which the default config is none of a real model.
START: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
        }
    },
    "lfm2_moe": {"layer_types": (["conv", "full_attention"] * 16)},  # no default
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
PER_LAYER_BASES = {
    "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
}
INDEXER = {  # without defaults
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}  # fmt: skip
OVERRIDES: dict[str, dict[str, Any]] = {
    "cohere_compass_text": {"rope_parameters": PER_LAYER_BASES},  # no default
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "dory": {  # counts attention and MLP apart, in pairs
        "layer_types": ["sliding_attention", "mlp"] * 2 + ["full_attention", "mlp"] * 2,
        "num_hidden_layers": 8,
        "n_input_layers": 2,
        "n_recurrent_layers": 4,
        "n_output_layers": 2,
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": 64},  # heads x their size
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"n_groups": 2},
    "qwen4_exp": {"text_config": INDEXER},
    "qwen4_exp_text": INDEXER,
    "zamba2": {"hybrid_layer_ids": [2, 3]},
    "zaya": {"num_experts_per_tok": 1},  # all that it supports
}


def _merged(settings: dict[str, Any], more: dict[str, Any]) -> dict[str, Any]:
    for name, value in more.items():
        nested = isinstance(value, dict) and isinstance(settings.get(name), dict)
        settings[name] = _merged(settings[name], value) if nested else value
    return settings


def shrink(settings: dict[str, Any], window: int) -> dict[str, Any]:
    """The content of a config.json with small values, by the rules above."""
    small: dict[str, Any] = {}
    kept = _kept_layers(settings)
    for name, value in settings.items():
        if name == "per_layer_config":  # what single layers have otherwise, by their number
            layers = kept[0] if kept else range(LAYERS)
            numbered = {int(n): shrink(v, window) for n, v in value.items()}
            small[name] = {str(i): numbered[n] for i, n in enumerate(layers) if n in numbered}
        elif isinstance(value, dict) and (name.endswith("_config") or "model_type" in value):
            small[name] = shrink(value, window)
        elif isinstance(value, dict) and "rope_t" in str(value):
            small[name] = _rope(value)
        elif isinstance(value, list) and kept and len(value) == kept[1]:
            small[name] = _thinned(value, kept[0])
        elif "drop" in name and isinstance(value, int | float):
            small[name] = type(value)(
                0
            )  # training drops nothing, and the reference shall not either
        elif name == "is_decoder":
            small[name] = True  # these families are encoders too
        elif value is None and name in NONE_MEANS:
            small[name] = NONE_MEANS[name]
        elif isinstance(value, bool) or value is None:
            small[name] = value
        elif isinstance(value, int):
            small[name] = _int(name, value, window)
        elif isinstance(value, float):
            small[name] = _float(name, value)
        else:
            small[name] = value
    for name in LAYER_COUNTS if kept else ():
        if name in settings and settings[name] == kept[1]:
            small[name] = len(kept[0])
            if settings.get("num_kv_shared_layers") == kept[1]:
                small["num_kv_shared_layers"] = len(kept[0])
    if settings.get("kv_lora_rank"):  # latent attention: as many keys as queries, rope's own size
        for name, as_much_as in (("num_key_value_heads", "num_attention_heads"),
                                 ("head_dim", "qk_rope_head_dim")):  # fmt: skip
            if name in small and settings[name] == settings.get(as_much_as):
                small[name] = small[as_much_as]
    return small


def _kept_layers(settings: dict[str, Any]) -> tuple[list[int], int] | None:
    """Indices of the layers to keep, and how many there were; None where all are alike."""
    count = next((settings[n] for n in LAYER_COUNTS if isinstance(settings.get(n), int)), 0)
    if count < 2:
        return None
    lists = [
        value
        for value in settings.values()
        if isinstance(value, list) and len(value) == count and value != list(range(count))
    ]
    if not lists:
        return None
    seen: dict[str, int] = {}
    for i, kinds in enumerate(zip(*lists, strict=True)):
        seen.setdefault(str(kinds), i)
    kept = sorted(seen.values())[:MOST_LAYERS]
    for i, kinds in enumerate(zip(*lists, strict=True)):  # some share weights with one of a kind
        if len(kept) < LAYERS and i not in kept and str(kinds) in seen:
            kept.append(i)
            del seen[str(kinds)]
    return sorted(kept), count


def _thinned(value: list[Any], kept: list[int]) -> list[Any]:
    if value == list(range(len(value))):  # a list of numbers of layers, all of them
        return list(range(len(kept)))
    return [value[i] for i in kept]


def _int(name: str, value: int, window: int) -> int:
    for pattern, small in RULES:
        if re.fullmatch(pattern, name):
            if small is None or value < 0 or (value == 0 and not name.endswith("_id")):
                return value  # 0 and less: not there
            small = small(value) if callable(small) else small
            return window if small == WINDOW and pattern.startswith("sliding_window") else small
    return value if value <= 128 else HIDDEN


def _float(name: str, value: float) -> float:
    if re.fullmatch(CAP, name):
        return 4.0
    return 1.25 if value == 1.0 and re.fullmatch(SCALE, name) else value


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Positions' bases: one dictionary, or one a kind of layer."""
    small = {}
    for name, value in rope.items():
        if isinstance(value, dict):
            value = _rope(value)
        elif name == "original_max_position_embeddings":
            value = POSITIONS
        elif isinstance(value, list) and name.endswith("_factor"):
            value = value[:4]  # half a head
        small[name] = value
    return small


@torch.no_grad()
def perturb(lm: torch.nn.Module, seed: int = 0) -> None:
    """Moves every parameter and every float buffer that is saved off its initial value, so that
    what is dropped (a bias, a norm, a routing bias) shows, and attention is far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    saved = lm.state_dict().keys()
    for name, tensor in [*lm.named_parameters(), *lm.named_buffers()]:
        if name not in saved or not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if not isinstance(tensor, torch.nn.Parameter):
            noise = noise.abs()  # some are variances
        tensor.add_(noise.to(tensor.dtype) * (0.1 if tensor.ndim >= 2 else 0.2))
