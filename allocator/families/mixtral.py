"""Mixtral.

Sources: transformers' `modeling_mixtral`, and its `conversion_mapping` for names on disk;
llama.cpp's loader and graph of `llama`.
"""

from collections.abc import Iterator

from allocator.families.base import Family, Parts
from allocator.families.common import (
    BASE,
    EXPERTS,
    FFN_NORM,
    GROUPED_ATTENTION,
    KEYS_VALUES,
    MLP,
    NEVER_NULL,
    ROUTED,
    also_named,
    layer,
)
from allocator.families.config import Config, whole
from allocator.families.gguf import ComputeGraph, Fixed, Gguf, ModelFacts, Pair, paired_halves
from allocator.families.keys import Keys
from allocator.families.roles import Role

_ON_DISK = {
    ".mlp.": ".block_sparse_moe.",
    ".gate_proj.": ".w1.",
    ".up_proj.": ".w3.",
    ".down_proj.": ".w2.",
}
_LAYER = layer(GROUPED_ATTENTION, ROUTED)


def _layer_parts(config: Config, number: int) -> Parts:
    return _LAYER


def _hyperparameters(facts: ModelFacts) -> Iterator[Pair]:
    head = facts.dimensions.head
    yield "attention.head_count_kv", whole(facts.config, facts.keys.kv_heads)
    yield "attention.key_length", head
    yield "attention.value_length", head
    yield "rope.dimension_count", head


MIXTRAL = Family(
    model_type="mixtral",
    rules=(*BASE, *FFN_NORM, *KEYS_VALUES, *also_named((MLP[0], *EXPERTS), _ON_DISK)),
    keys=Keys(experts=("num_local_experts",), expert_width="intermediate_size"),
    layer_parts=_layer_parts,
    layers=(_LAYER,),
    gguf=Gguf(
        "llama",
        _hyperparameters,
        ComputeGraph.GROUPED,
        fixed=(Fixed("hidden_act", "silu", "silu"), Fixed("sliding_window", None, None)),
        row_orders={
            Role.Q: lambda dimensions: paired_halves(dimensions.heads, dimensions.head),
            Role.K: lambda dimensions: paired_halves(dimensions.kv_heads, dimensions.head),
        },
    ),
    never_null=NEVER_NULL - {"moe_intermediate_size", "attention_bias"},
)
