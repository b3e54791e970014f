"""OLMoE.

Sources: transformers' `modeling_olmoe`; llama.cpp's loader and graph of `olmoe`.
"""

from collections.abc import Iterator

from allocator.families.base import Family
from allocator.families.common import (
    BASE,
    EXPERTS,
    FFN_NORM,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    NORMED_ATTENTION,
    ROUTED,
    STACKS,
    WIDE_NORMS,
    layer,
    softmax_router,
)
from allocator.families.gguf import Fixed, Gguf, ModelFacts, Pair, check_equal_heads, nothing_else
from allocator.families.keys import Keys

_LAYER = layer(NORMED_ATTENTION, ROUTED)
_RULES = (
    *BASE,
    *FFN_NORM,
    *KEYS_VALUES,
    MLP[0],
    *EXPERTS,
    *WIDE_NORMS,
)


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    yield "attention.head_count_kv", facts.dimensions.kv_heads
    yield "rope.dimension_count", facts.dimensions.head


OLMOE = Family(
    model_type="olmoe",
    models="OLMoE-1B-7B",
    rules=_RULES,
    keys=Keys(experts=("num_experts",), expert_width="intermediate_size"),
    layer_parts=lambda config, number: _LAYER,
    layers=(_LAYER,),
    scoring=softmax_router,
    stacks=STACKS,
    gguf=Gguf(
        "olmoe",
        _hyperparameters,
        None,
        fixed=(
            Fixed("hidden_act", "silu", "silu"),
            Fixed("norm_topk_prob", False, False),
            Fixed("clip_qkv", None, None),
        ),
        check=lambda facts: check_equal_heads(facts, "olmoe"),
        source=nothing_else,
    ),
    never_null=NEVER_NULL - {"moe_intermediate_size"},
    bias_keys=("attention_bias",),
)
