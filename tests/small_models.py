"""A small model of every type that transformers has for causal language modelling, made offline."""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

TYPES = sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
V = 64
# what a config may call its sizes
SIZES = {
    **dict.fromkeys(("vocab_size", "vocab_size_per_layer_input"), V),
    **dict.fromkeys(
        (
            "hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "attention_hidden_size", "lru_width",
            "embedding_size", "emb_dim", "dim", "n_positions", "max_position_embeddings",
        ),
        32,
    ),
    **dict.fromkeys(
        (
            "intermediate_size", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim", "ffn_dim", "d_ff", "ffn_hidden_size",
            "hidden_dim",
        ),
        48,
    ),
    **dict.fromkeys(
        ("moe_intermediate_size", "shared_expert_intermediate_size", "expert_ffn_hidden_size"), 24,
    ),
    **dict.fromkeys(
        (
            "num_hidden_layers", "n_layer", "n_layers", "encoder_layers", "decoder_layers", "num_layers",
            "num_decoder_layers", "num_key_value_heads", "num_experts_per_tok",
        ),
        2,
    ),
    **dict.fromkeys(
        (
            "num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads",
            "decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "rotary_dim",
        ),
        4,
    ),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), 1),
    **dict.fromkeys(("q_lora_rank", "kv_lora_rank", "sliding_window", "mamba_d_head"), 16),
    **dict.fromkeys(
        (
            "head_dim", "d_kv", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "state_size", "mamba_d_state",
            "hidden_size_per_layer_input",
        ),
        8,
    ),
    "mamba_n_heads": 4,
}  # fmt: skip
# what those sizes alone do not make
BY_HAND: dict[str, dict[str, Any]] = {
    "bamba": {
        "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "attn_rotary_emb": 4,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1},
    "gemma3n_text": {
        "num_hidden_layers": 4, "layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2,
        "laurel_rank": 4, "activation_sparsity_pattern": [0.0] * 4,
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention"], "mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1,
    },
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "mamba_dt_rank": 4, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"num_layers": 1, "moe_topk": 2, "zero_expert_num": 1, "head_dim": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "dots3_note_text": {"num_attention_heads": 4},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "recurrent_gemma": {"num_hidden_layers": 3, "block_types": ["recurrent", "recurrent", "attention"]},
    "reformer": {
        "axial_pos_embds": False, "num_hashes": 1, "hash_seed": 0, "hidden_dropout_prob": 0.0,
        "local_attention_probs_dropout_prob": 0.0, "lsh_attention_probs_dropout_prob": 0.0,
    },
    "xlnet": {"max_position_embeddings": None},
    "xlstm": {"hidden_size": 64},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "zamba": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "attn_layer_period": 2,
        "attn_layer_offset": 1, "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4,
        "mamba_dt_rank": 4, "use_mamba_kernels": False,
    },
    "zamba2": {
        "num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3],
        "attention_hidden_size": 64, "attention_head_dim": 16, "num_key_value_heads": 4, "kv_channels": 8,
        "num_query_groups": 4, "n_mamba_heads": 4, "mamba_headdim": 16, "use_mamba_kernels": False,
    },
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def small_options(config_class: type, by_hand: dict[str, Any]) -> dict[str, Any]:
    """Options of a config that make its model small, its sub-configs included."""
    default, options = config_class(), {}
    for name, value in SIZES.items():
        try:
            old = getattr(default, name)
        except Exception:  # an attribute that belongs to single layers
            continue
        whole = isinstance(old, int) and not isinstance(old, bool)
        if whole and not isinstance(getattr(config_class, name, None), property):
            options[name] = value
    if hasattr(default, "qk_rope_head_dim"):  # latent attention: a head of its own for every query, sizes by the others
        options.pop("head_dim", None)
        options["num_key_value_heads"] = 4
    for name, value in vars(default).items():
        if name.endswith(("_token_id", "_token_index")) and isinstance(value, int) and value >= V:
            options[name] = 40 + len(options) % 20
    for name in ("text_config", "audio_config", "vision_config", "decoder", "encoder"):
        if isinstance(getattr(default, name, None), PretrainedConfig):
            part = type(getattr(default, name))
            options[name] = small_options(part, BY_HAND.get(part.model_type, {}))
    options = options | by_hand
    return {name: value for name, value in options.items() if value is not None}


def small_config(model_type: str) -> PretrainedConfig:
    config = CONFIG_MAPPING[model_type](**small_options(CONFIG_MAPPING[model_type], BY_HAND.get(model_type, {})))
    for part in (config, config.get_text_config(decoder=True)):
        part.use_cache = False
        part.is_decoder = True
    return config


def small_model(model_type: str) -> torch.nn.Module:
    """In evaluation; a RuntimeError for one that stays large."""
    config = small_config(model_type)
    with torch.device("meta"):
        parameters = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > 3e7:
        raise RuntimeError(f"{parameters:,} parameters")
    return AutoModelForCausalLM.from_config(config).float().eval()
