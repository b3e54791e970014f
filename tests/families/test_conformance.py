"""Every family of ours passes the cases that we ship for families."""

import pytest

from allocator.checkpoint.outline import planned_inventory
from allocator.errors import CheckpointError, TargetError
from allocator.families import Role, planned_family_of
from allocator.testing.families import FamilyConformance

SMALL = {
    "vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_experts_per_tok": 2, "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
    "hidden_act": "silu", "tie_word_embeddings": False, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip


class TestDeepseekV3(FamilyConformance):
    config = SMALL | {
        "model_type": "deepseek_v3", "num_hidden_layers": 3, "first_k_dense_replace": 1,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 2,
        "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 40, "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 8, "v_head_dim": 12, "routed_scaling_factor": 2.5,
        "num_nextn_predict_layers": 0, "norm_topk_prob": True, "num_key_value_heads": 4,
    }  # fmt: skip
    family = planned_family_of(config)
    without_gguf_names = (Role.MLP_GATE, Role.MLP_UP, Role.MLP_DOWN)


class TestQwen3Moe(FamilyConformance):
    config = SMALL | {
        "model_type": "qwen3_moe", "num_hidden_layers": 2, "moe_intermediate_size": 32,
        "num_experts": 8, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    }  # fmt: skip
    family = planned_family_of(config)
    without_gguf_names = (Role.MLP_GATE, Role.MLP_UP, Role.MLP_DOWN)


class TestDeepseekV2(FamilyConformance):
    config = SMALL | {
        "model_type": "deepseek_v2", "num_hidden_layers": 3, "first_k_dense_replace": 1,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 1,
        "topk_group": 1, "topk_method": "greedy", "q_lora_rank": 24, "kv_lora_rank": 40,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8,
        "routed_scaling_factor": 1.0, "norm_topk_prob": False, "num_key_value_heads": 4,
    }  # fmt: skip
    family = planned_family_of(config)
    without_gguf_names = (Role.MLP_GATE, Role.MLP_UP, Role.MLP_DOWN)


class TestQwen2Moe(FamilyConformance):
    config = SMALL | {
        "model_type": "qwen2_moe", "num_hidden_layers": 2, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 96, "num_experts": 8, "norm_topk_prob": False,
        "qkv_bias": True,
    }  # fmt: skip
    family = planned_family_of(config)
    without_gguf_names = (Role.MLP_GATE, Role.MLP_UP, Role.MLP_DOWN)


class TestOlmoe(FamilyConformance):
    config = SMALL | {
        "model_type": "olmoe", "num_hidden_layers": 2, "num_experts": 8, "norm_topk_prob": False,
        "num_key_value_heads": 4,
    }  # fmt: skip
    family = planned_family_of(config)


class TestMixtral(FamilyConformance):
    config = SMALL | {"model_type": "mixtral", "num_hidden_layers": 2, "num_local_experts": 4}
    family = planned_family_of(config)


class TestGlm4Moe(FamilyConformance):
    config = SMALL | {
        "model_type": "glm4_moe", "num_hidden_layers": 2, "first_k_dense_replace": 1,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 1, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 1.5, "norm_topk_prob": True,
        "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip
    family = planned_family_of(config)


class TestGlm4MoeLite(FamilyConformance):
    config = SMALL | {
        "model_type": "glm4_moe_lite", "num_hidden_layers": 2, "moe_intermediate_size": 32,
        "mlp_layer_types": ["dense", "sparse"], "n_routed_experts": 8, "n_shared_experts": 1,
        "n_group": 1, "topk_group": 1, "q_lora_rank": 24, "kv_lora_rank": 40,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "head_dim": 8,
        "routed_scaling_factor": 1.8, "num_nextn_predict_layers": 0, "norm_topk_prob": True,
        "num_key_value_heads": 4,
    }  # fmt: skip
    family = planned_family_of(config)
    without_gguf_names = (Role.MLP_GATE, Role.MLP_UP, Role.MLP_DOWN)


class TestMinimaxM2(FamilyConformance):
    config = SMALL | {
        "model_type": "minimax_m2", "num_hidden_layers": 2, "num_local_experts": 8,
        "rotary_dim": 8,
    }  # fmt: skip
    family = planned_family_of(config)


class TestDots1(FamilyConformance):
    config = SMALL | {
        "model_type": "dots1", "num_hidden_layers": 2, "first_k_dense_replace": 1,
        "moe_intermediate_size": 32, "n_routed_experts": 8, "n_shared_experts": 2, "n_group": 1,
        "topk_group": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
        "num_key_value_heads": 4, "sliding_window": None,
    }  # fmt: skip
    family = planned_family_of(config)


LINEAR = {
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "linear_num_key_heads": 2, "linear_num_value_heads": 4,
}  # fmt: skip


class TestQwen3Next(FamilyConformance):
    config = SMALL | LINEAR | {
        "model_type": "qwen3_next", "num_hidden_layers": 3, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48, "num_experts": 8, "norm_topk_prob": True,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }  # fmt: skip
    family = planned_family_of(config)
    without_gguf_names = (Role.MLP_GATE, Role.MLP_UP, Role.MLP_DOWN)


class TestQwen35MoeText(FamilyConformance):
    config = SMALL | LINEAR | {
        "model_type": "qwen3_5_moe_text", "num_hidden_layers": 3, "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48, "num_experts": 8,
        "rope_parameters": {"rope_theta": 10000.0, "mrope_section": [1, 1, 0]},
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }  # fmt: skip
    family = planned_family_of(config)


NESTED = {
    "model_type": "qwen3_5_moe", "text_config": TestQwen35MoeText.config,
    "vision_config": {"depth": 1},
}  # fmt: skip


class TestQwen35Moe(FamilyConformance):
    config = NESTED
    family = planned_family_of(config)
    in_transformers = False  # the language model alone is


class TestKimiK2(TestDeepseekV3):
    config = TestDeepseekV3.config | {"model_type": "kimi_k2"}
    family = planned_family_of(config)
    in_transformers = False


class TestLfm2Moe(FamilyConformance):
    config = {k: v for k, v in SMALL.items() if k != "head_dim"} | {
        "model_type": "lfm2_moe", "num_hidden_layers": 4, "moe_intermediate_size": 32,
        "num_experts": 8, "num_dense_layers": 1, "conv_L_cache": 3, "norm_eps": 1e-5,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
        "tie_word_embeddings": False,
    }  # fmt: skip
    family = planned_family_of(config)
    without_gguf_names = (Role.HEAD,)  # llama.cpp's loader has one if it is there


class TestAfmoe(FamilyConformance):
    config = SMALL | {
        "model_type": "afmoe", "num_hidden_layers": 4, "moe_intermediate_size": 32,
        "num_experts": 8, "num_shared_experts": 2, "num_dense_layers": 1, "route_scale": 1.5,
        "sliding_window": 16, "mup_enabled": True,
    }  # fmt: skip
    family = planned_family_of(config)


class TestLaguna(FamilyConformance):
    config = SMALL | {
        "model_type": "laguna", "num_hidden_layers": 4, "moe_intermediate_size": 32,
        "num_experts": 8, "shared_expert_intermediate_size": 48, "sliding_window": 16,
        "num_attention_heads_per_layer": [4, 2, 2, 4], "gating": "per-element",
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    }  # fmt: skip
    family = planned_family_of(config)


class TestErnie45Moe(FamilyConformance):
    config = SMALL | {
        "model_type": "ernie4_5_moe", "num_hidden_layers": 3, "moe_intermediate_size": 32,
        "moe_num_experts": 8, "moe_k": 2, "moe_num_shared_experts": 2, "moe_layer_start_index": 1,
    }  # fmt: skip
    family = planned_family_of(config)


class TestHunyuanV1Moe(FamilyConformance):
    config = SMALL | {
        "model_type": "hunyuan_v1_moe", "num_hidden_layers": 2, "num_experts": 8, "moe_topk": 2,
    }  # fmt: skip
    family = planned_family_of(config)


class TestNemotronH(FamilyConformance):
    config = SMALL | {
        "model_type": "nemotron_h", "num_hidden_layers": 3, "layer_norm_epsilon": 1e-6,
        "layers_block_type": ["linear_attention", "moe", "full_attention"],
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 16, "n_groups": 2,
        "conv_kernel": 4, "moe_intermediate_size": 48, "moe_latent_size": 32,
        "moe_shared_expert_intermediate_size": 40, "n_routed_experts": 8,
    }  # fmt: skip
    family = planned_family_of(config)


class TestGptOss(FamilyConformance):
    config = SMALL | {
        "model_type": "gpt_oss", "num_hidden_layers": 2, "num_local_experts": 8,
        "sliding_window": 32, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    family = planned_family_of(config)
    saved_as_read = False


def described(config):
    """What a GGUF file says of a config, by key."""
    inventory = planned_inventory(config)
    part = inventory.family.for_gguf()
    return dict(part.pairs(inventory.facts, n_experts=8, experts_used=2))


@pytest.mark.parametrize("case", [TestDots1, TestQwen3Moe])
def test_whole_heads_are_rotated_where_transformers_rotates_them_whatever_the_config_says(case):
    own = case.config | {"partial_rotary_factor": 0.5}
    assert described(own) == described(case.config)


@pytest.mark.parametrize("case", [TestMixtral, TestGlm4Moe, TestMinimaxM2, TestDots1])
def test_heads_of_keys_are_never_guessed(case):
    config = {k: v for k, v in case.config.items() if k != "num_key_value_heads"}
    with pytest.raises(CheckpointError, match="num_key_value_heads is None, needed a number"):
        described(config)


@pytest.mark.parametrize(
    ("sections", "message"),
    [([11, 11, 10], "needs heads of at least 32 channels"), ([0, 0, 0, 4], "mrope_section is"),
     ("11", "mrope_section is"), ([], "mrope_section is")],
)  # fmt: skip
def test_sections_that_end_llama_cpps_process_are_refused(sections, message):
    rope = {"rope_theta": 10000.0, "mrope_section": sections}
    with pytest.raises((CheckpointError, TargetError), match=message):
        described(TestQwen35MoeText.config | {"rope_parameters": rope})


def test_which_layers_are_linear_is_an_interval_or_a_list():
    linear, full = "linear_attention", "full_attention"
    config = {k: v for k, v in TestQwen3Next.config.items() if k != "layer_types"}
    assert described(config | {"num_hidden_layers": 8})["qwen3next.full_attention_interval"] == 4
    known = described(
        config | {"num_hidden_layers": 4, "layer_types": [full, linear, linear, full]}
    )
    assert known["qwen3next.attention.recurrent_layers"] == (0, 1, 1, 0)
    assert "qwen3next.full_attention_interval" not in known
    none = described(config | {"num_hidden_layers": 2, "layer_types": [linear, linear]})
    assert none["qwen3next.full_attention_interval"] == 3
    with pytest.raises(CheckpointError, match="layer_types is"):
        described(config | {"layer_types": [linear, "sliding_attention", full]})


@pytest.mark.parametrize("case", [TestQwen3Next, TestQwen35MoeText])
def test_heads_of_linear_attention_that_llama_cpp_has_no_names_for_are_refused(case):
    with pytest.raises(TargetError, match="linear_value_head_dim"):
        described(case.config | {"linear_value_head_dim": 32})
    with pytest.raises(CheckpointError, match="needed a multiple of linear_num_key_heads"):
        described(case.config | {"linear_num_value_heads": 5})


class TestGemma4Text(FamilyConformance):
    config = {k: v for k, v in SMALL.items() if k not in ("hidden_act", "num_experts_per_tok")} | {
        "model_type": "gemma4_text", "num_hidden_layers": 2, "moe_intermediate_size": 32,
        "num_experts": 8, "top_k_experts": 2, "enable_moe_block": True,
        "hidden_size_per_layer_input": 0, "tie_word_embeddings": True, "attention_k_eq_v": True,
        "hidden_activation": "gelu_pytorch_tanh", "global_head_dim": 32, "sliding_window": 16,
        "num_global_key_value_heads": 1, "final_logit_softcapping": 30.0,
        "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    family = planned_family_of(config)
    saved_as_read = False
    without_gguf_names = (Role.EXPERT_GATE, Role.EXPERT_UP)  # gguf-py knows them as one


GEMMA4 = {
    "model_type": "gemma4", "text_config": TestGemma4Text.config, "vision_config": {"depth": 1},
}  # fmt: skip


class TestGemma4(FamilyConformance):
    config = GEMMA4
    family = planned_family_of(config)
    in_transformers = False  # the language model alone is
    without_gguf_names = TestGemma4Text.without_gguf_names
