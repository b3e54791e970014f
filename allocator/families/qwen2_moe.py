"""Qwen2-MoE (Qwen1.5-MoE).

Sources: transformers' `modeling_qwen2_moe`; llama.cpp's loader and graph of `qwen2moe`.
"""

from collections.abc import Iterator

from allocator.families.base import Family, Parts, Rule
from allocator.families.common import (
    BIASED_ATTENTION,
    COMMON,
    DENSE,
    GROUPED_ATTENTION,
    KEYS_VALUES,
    NEVER_NULL,
    QKV_BIASES,
    ROUTED,
    SHARED,
    STACKS,
    B,
    L,
    is_sparse,
    layer,
    layers,
    shared_expert,
    softmax_router,
)
from allocator.families.config import Config, whole
from allocator.families.gguf import Fixed, Gguf, GgufFacts, ModelFacts, Pair, check_all_route
from allocator.families.keys import Keys
from allocator.families.roles import Role

_BLOCK = (*ROUTED, *(f"mlp.shared_expert.{name}" for name in SHARED), "mlp.shared_expert_gate")
_RULES = (
    *COMMON,
    *KEYS_VALUES,
    *QKV_BIASES,
    *shared_expert("shared_expert"),
    Rule(L + "mlp.shared_expert_gate.weight", Role.SHARED_ROUTER, "one x hidden",
         B + "ffn_gate_inp_shexp.weight"),
)  # fmt: skip


def _layer_parts(config: Config, number: int) -> Parts:
    attention = BIASED_ATTENTION if config.get("qkv_bias", True) else GROUPED_ATTENTION
    return layer(attention, _BLOCK if is_sparse(config, number) else DENSE)


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    check_all_route(facts, "qwen2moe")
    yield "attention.head_count_kv", facts.dimensions.kv_heads
    yield "rope.dimension_count", facts.dimensions.head
    yield "expert_shared_feed_forward_length", whole(facts.config, facts.keys.shared_width)


def _source(file: GgufFacts) -> Config:
    return {
        "shared_expert_intermediate_size": file["expert_shared_feed_forward_length"],
        "qkv_bias": B + "attn_q.bias" in file.names,
    }


QWEN2_MOE = Family(
    model_type="qwen2_moe",
    models="Qwen1.5-MoE-A2.7B, Qwen2-57B-A14B",
    rules=_RULES,
    keys=Keys(experts=("num_experts", "num_local_experts")),
    layer_parts=_layer_parts,
    layers=layers((GROUPED_ATTENTION, BIASED_ATTENTION), (DENSE, _BLOCK)),
    scoring=softmax_router,
    stacks=STACKS,
    gguf=Gguf(
        "qwen2moe",
        _hyperparameters,
        None,
        fixed=(
            Fixed("hidden_act", "silu", "silu"),
            Fixed("norm_topk_prob", False, False),
            Fixed("use_sliding_window", False, False),
        ),
        source=_source,
    ),
    never_null=(NEVER_NULL - {"attention_bias"})
    | {
        "decoder_sparse_step", "norm_topk_prob", "qkv_bias", "shared_expert_intermediate_size",
        "use_sliding_window",
    },
)  # fmt: skip
