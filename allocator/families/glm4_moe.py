"""GLM-4.5 to 4.7: grouped attention with DeepSeek-V3's router.

Sources: transformers' `modeling_glm4_moe`; llama.cpp's loader and graph of `glm4moe`.
"""

from collections.abc import Iterator

from allocator.families.base import Family, Parts, Rule
from allocator.families.common import (
    BASE,
    BIASED_ATTENTION,
    BIASED_ROUTED,
    DENSE,
    EXPERTS,
    GROUPED_ATTENTION,
    HEAD_NORMS,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    QKV_BIASES,
    SELECTION_BIAS,
    STACKS,
    WITH_SHARED,
    B,
    L,
    dense_then_routed,
    layers,
    shared_expert,
)
from allocator.families.config import Config
from allocator.families.gguf import (
    SIGMOID,
    Fixed,
    Gguf,
    GgufFacts,
    ModelFacts,
    Pair,
    grouped_pairs,
    scaled_router_pairs,
    scaled_router_source,
)
from allocator.families.keys import Keys
from allocator.families.roles import Role
from allocator.families.sizes import Scoring

_NORMS = ("q_norm", "k_norm")
_RULES = (
    *BASE,
    *KEYS_VALUES,
    *QKV_BIASES,
    *HEAD_NORMS,
    Rule(L + "post_attention_layernorm.weight", Role.NORM, "hidden",
         B + "post_attention_norm.weight"),
    *MLP,
    *EXPERTS,
    SELECTION_BIAS,
    *shared_expert("shared_experts"),
)  # fmt: skip


def _layer_parts(config: Config, layer: int) -> Parts:
    attention = BIASED_ATTENTION if config.get("attention_bias") else GROUPED_ATTENTION
    attention += _NORMS if config.get("use_qk_norm") else ()
    return dense_then_routed(attention, config, layer)


def _scoring(config: Config) -> tuple[str, bool]:
    return Scoring.SIGMOID, bool(config.get("norm_topk_prob", True))


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield from grouped_pairs(facts, rotated=0.5)
    yield from scaled_router_pairs(facts)
    yield "expert_gating_func", SIGMOID


def _source(file: GgufFacts) -> Config:
    return scaled_router_source(file) | {
        "attention_bias": B + "attn_q.bias" in file.names,
        "use_qk_norm": B + "attn_q_norm.weight" in file.names,
        "partial_rotary_factor": file["rope.dimension_count"] / file["attention.key_length"],
    }


GLM4_MOE = Family(
    model_type="glm4_moe",
    models="GLM-4.5, 4.5-Air, 4.6, 4.7",
    rules=_RULES,
    keys=Keys(experts=("n_routed_experts", "num_local_experts")),
    layer_parts=_layer_parts,
    layers=layers(
        (
            GROUPED_ATTENTION,
            BIASED_ATTENTION,
            (*GROUPED_ATTENTION, *_NORMS),
            (*BIASED_ATTENTION, *_NORMS),
        ),
        (DENSE, BIASED_ROUTED, WITH_SHARED),
    ),
    scoring=_scoring,
    stacks=STACKS,
    gguf=Gguf(
        "glm4moe",
        _hyperparameters,
        None,
        fixed=(Fixed("hidden_act", "silu", "silu"),),
        source=_source,
    ),
    n_nextn_layers=1,
    ranks_groups=True,
    selection_bias=True,
    scales_gates=True,
    never_null=NEVER_NULL | {"first_k_dense_replace", "n_shared_experts", "routed_scaling_factor"},
)
