"""Tiny random models of transformers: three layers, of several kinds where the family has some."""

import pytest
import torch

_SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
    "sliding_window": 4,
    "pad_token_id": 0,
}
_SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
TINY = {
    "qwen3_next": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "shared_expert_intermediate_size": 24,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "gpt_oss": {"layer_types": _SLIDING, "num_local_experts": 8},
    "afmoe": {
        "layer_types": _SLIDING,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "mup_enabled": True,
    },
    "laguna": {
        "layer_types": _SLIDING,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "shared_expert_intermediate_size": 24,
        "num_attention_heads_per_layer": [4, 4, 4],
        "moe_routed_scaling_factor": 2.5,
    },
    "gemma4_text": {
        "layer_types": _SLIDING,
        "enable_moe_block": True,
        "top_k_experts": 2,
        "hidden_size_per_layer_input": 0,
        "num_kv_shared_layers": 0,
        "global_head_dim": 16,
        "final_logit_softcapping": 3.0,
    },
    "nemotron_h": {
        "layers_block_type": ["mamba", "moe", "attention"],
        "n_routed_experts": 8,
        "moe_latent_size": 16,
        "moe_shared_expert_intermediate_size": 24,
        "mamba_num_heads": 4,
        "mamba_head_dim": 8,
        "ssm_state_size": 8,
        "n_groups": 2,
        "n_group": 1,
        "topk_group": 1,
    },
    "granitemoehybrid": {
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 8,
        "shared_intermediate_size": 24,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.3,
        "logits_scaling": 5.0,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 8,
    },
    "cohere2_moe": {
        "layer_types": _SLIDING,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "logit_scale": 0.25,
    },
    "mixtral": {"num_local_experts": 8},
    "deepseek_v4": {"n_routed_experts": 8, "swiglu_limit": 1.0},
}


@torch.inference_mode(False)  # tests in it may be the first to ask
def tiny_model(name):
    """Builds a model with weights large enough that every tensor matters."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**_SIZES, **TINY[name]})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn_like(parameter)
            wide = parameter.dim() > 1
            parameter.copy_(values / parameter.shape[-1] ** 0.5 if wide else 1 + values * 0.1)
    model.set_experts_implementation("eager")
    return model.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def tiny():
    """Tiny models by transformers' model type, built once; a test leaves them as they were."""
    models = {}
    return lambda name: models.get(name) or models.setdefault(name, tiny_model(name))
