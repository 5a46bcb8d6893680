"""Folders to start from: small models of many families as transformers writes them."""

from copy import deepcopy
from pathlib import Path

import tiny
import torch
from transformers import AutoConfig, AutoModelForCausalLM

EXPERTS = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
           "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1,
           "topk_group": 1}  # fmt: skip
LATENT = {"q_lora_rank": None, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
          "v_head_dim": 8, "head_dim": 4}  # fmt: skip
LAYERS = ["sliding_attention", "full_attention", "full_attention"]
FAMILIES = {  # tied, scaled, experts with and without a float32 bias, hybrids, with images
    "llama": {},
    "gemma2": tiny.FAMILIES["gemma2"],
    "apertus": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "deepseek_v3": {**EXPERTS, **LATENT},
    "glm4_moe": {**EXPERTS, "partial_rotary_factor": 0.5},
    "gpt_oss": {"num_local_experts": 4},
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2, "mamba_n_heads": 4,
                         "shared_intermediate_size": 16, "mamba_d_head": 16, "mamba_d_state": 8,
                         "layer_types": ["mamba", "attention", "mamba"]},
    "gemma3": {"text_config": {**tiny.BASE, "sliding_window": 6, "layer_types": LAYERS},
               "vision_config": {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
                                 "num_attention_heads": 2, "image_size": 8, "patch_size": 4},
               "mm_tokens_per_image": 4},
}  # fmt: skip


def make_start(folder: Path, family: str = "qwen2", dtype=torch.float32, **changes) -> Path:
    """A folder as transformers writes it, every tensor random, buffers too; and a tokenizer."""
    settings = deepcopy(tiny.architecture(family, **FAMILIES.get(family, {}) | changes))
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    torch.manual_seed(0)
    lm = AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for tensor in lm.state_dict().values():
            tensor.copy_(0.2 * torch.randn(tensor.shape) + (tensor.ndim == 1))
    lm.save_pretrained(folder)
    return tiny.save_tokenizer(folder)


def settings_for(start: Path, **changes) -> dict:
    settings = tiny.train_settings(start.parent, model_name_or_path=str(start), max_steps=1)
    del settings["architecture"], settings["tokenizer_name_or_path"]
    return settings | {"learning_rate": 1e-30, "weight_decay": 0.0} | changes
